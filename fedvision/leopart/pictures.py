"""Pictures of what is found without labels: classes, foreground, and parts that are side by side.

Source: after figures 3, 4 and 5 of arXiv 2204.13101.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from fedvision.colors import NOTHING, palette
from fedvision.data.examples import IGNORED
from fedvision.gallery import Gallery, Picture, enlarged
from fedvision.leopart import communities as cd
from fedvision.leopart import matching
from fedvision.leopart.clusters import resized
from fedvision.leopart.judging import Discovery
from fedvision.leopart.masks import jaccard

BACKGROUND = (45, 45, 45)
"""The color of the background, and of parts without a community."""

DARK = 0.2
"""How much is left of a picture's brightness beside a mask."""

SIDE, RADIUS = 480, 8
"""Pixels of the drawing of a network, and of a node of average size."""

BESIDE, GAP = 3, 4
"""Pictures beside a network, and the pixels between them."""


def galleries(pictures: Sequence[Picture], found: Discovery) -> dict[str, Gallery]:
    """What is found in some images; the network of parts only if any are linked.

    Args:
        pictures: the first of the images, as they are shown.
        found: in all of them.
    """
    drawn = {"classes-found": classes_found(pictures, found), "foreground": foreground(pictures, found)}
    network = neighboring_parts(pictures, found)
    return drawn if network is None else {**drawn, "neighboring-parts": network}


# ---- classes --------------------------------------------------------------------------------------------------------


def classes_found(pictures: Sequence[Picture], found: Discovery) -> Gallery:
    """Clusters, clusters of the foreground, and communities of parts, in the colors of the classes that they are matched with."""
    number = max(found.classes - 1, 1)
    groups = found.communities(1)
    maps = {
        "clusters": (found.clusters, found.classes),
        "in the foreground": (found.clustered_foreground(number, 0), number + 1),
        "communities": (groups[found.parts], int(groups.max()) + 1),
    }
    taken = {name: matched(found, *pair) for name, pair in maps.items()}
    rows = [
        [enlarged(picture), _painted(truth, picture), *(_painted(each[i], picture) for each in taken.values())]
        for i, (picture, truth) in enumerate(zip(pictures, found.semseg, strict=False))
    ]
    caption = (
        f"As many clusters of patches as classes ({found.classes}); clusters of the foreground that is found, beside one background; "
        f"communities of its parts. Colors are those of the classes that clusters are matched with in {len(found.semseg)} pictures, dark "
        "is background."
    )
    return Gallery([f"{i}" for i in range(len(pictures))], ["picture", "truth", *maps], rows, caption)


def matched(found: Discovery, maps: Int[np.ndarray, "n rows columns"], number: int) -> Int[np.ndarray, "n rows columns"]:
    """Clusters as the classes that they overlap best with, one to one; background for those that are left over.

    As they are, where no class is known.
    """
    counts = found.counts(maps, number, np.ones(len(maps), bool))
    return matching.one_to_one(matching.ious(counts))[maps] if counts.any() else maps


def _painted(classes: Int[np.ndarray, "rows columns"], like: Picture) -> Picture:
    """A map of classes as large as a picture is shown."""
    height, width, _ = enlarged(like).shape
    colors = np.array([BACKGROUND, *palette()[:-2], (NOTHING,) * 3], np.uint8)
    return np.asarray(colors[resized(classes[None], height, width)[0]])


# ---- foreground -----------------------------------------------------------------------------------------------------


def foreground(pictures: Sequence[Picture], found: Discovery) -> Gallery:
    """Where attention looks, beside the clusters that it marks in all pictures; below, how each agrees with the truth."""
    truth = found.semseg != matching.BACKGROUND
    masks = {"attention": found.attention, "clusters (CBFE)": found.foreground, "truth": truth}
    rows = [[enlarged(picture), *(_lit(picture, mask[i]) for mask in masks.values())] for i, picture in enumerate(pictures)]
    notes = [
        ["", *(_agreement(found.semseg[i], mask[i]) for mask in (found.attention, found.foreground)), ""] for i in range(len(pictures))
    ]
    caption = (
        "What is taken for foreground is bright: where the attention of the network looks, and the clusters on which it rests most "
        "over all pictures. Below: intersection over union with the true foreground."
    )
    return Gallery([f"{i}" for i in range(len(pictures))], ["picture", *masks], rows, caption, notes)


def _lit(picture: Picture, mask: Bool[np.ndarray, "rows columns"]) -> Picture:
    """A picture that is dark beside a mask."""
    whole = enlarged(picture)
    inside = resized(mask[None], *whole.shape[:2])[0][..., None]
    return np.where(inside, whole, (DARK * whole).astype(np.uint8))


def _agreement(semseg: Int[np.ndarray, "h w"], mask: Bool[np.ndarray, "rows columns"]) -> str:
    """How well a mask agrees with the truth, in words; nothing where there is no truth."""
    share = jaccard(semseg[None] != matching.BACKGROUND, resized(mask[None], *semseg.shape))
    return "" if math.isnan(share) or (semseg == IGNORED).all() else f"{share:.0%}"


# ---- parts side by side ---------------------------------------------------------------------------------------------


def neighboring_parts(pictures: Sequence[Picture], found: Discovery) -> Gallery | None:
    """The network of parts that are often side by side, in the colors of their communities, and some pictures; None without a link."""
    network = cd.linked(found.neighbors, found.link[0])
    if not len(network[0]):
        return None
    groups = found.communities(1)
    drawing = drawn(network, groups, np.bincount(found.parts.ravel(), minlength=len(groups)), len(groups) - 1)
    caption = (
        f"{len(np.unique(network[0]))} of {len(groups)} parts are linked, as each is often beside the other; the darker the link, the more "
        f"often. A color is a community, of which there are {groups.max()}; the square is the background."
    )
    return Gallery([""], ["parts side by side", "their communities"], [[drawing, in_pictures(pictures, groups[found.parts])]], caption)


def in_pictures(pictures: Sequence[Picture], groups: Int[np.ndarray, "n rows columns"]) -> Picture:
    """The first pictures, one below the other, and beside each the communities in it."""
    from PIL import Image

    side = SIDE // BESIDE
    canvas = np.full((SIDE, 2 * side, 3), 255, np.uint8)
    for i, (picture, own) in enumerate(zip(pictures[:BESIDE], groups, strict=False)):
        place = canvas[i * side : (i + 1) * side - GAP]
        place[:, : side - GAP] = np.asarray(Image.fromarray(picture).resize((side - GAP, side - GAP), Image.Resampling.BICUBIC))
        place[:, side:-GAP] = community_colors(resized(own[None], side - GAP, side - GAP)[0])
    return canvas


def community_colors(groups: Int[np.ndarray, "..."]) -> Picture:
    """A color for each community, uint8 [..., 3]; there are 255 of them, which begin anew."""
    colors = palette()[(groups - 1) % 255]
    return np.where(groups[..., None] > 0, colors, np.array(BACKGROUND, np.uint8)).astype(np.uint8)


def drawn(network: cd.Network, groups: Int[np.ndarray, "k"], sizes: Int[np.ndarray, "k"], square: int) -> Picture:
    """A network of nodes in the colors of their communities; nodes without a link are left out.

    Args:
        network: links and weights.
        groups: the community of each node.
        sizes: of the nodes, in any unit.
        square: the node that is drawn as one.
    """
    from PIL import Image, ImageDraw

    places, (links, weights) = layout(network, groups), network
    at = (SIDE * 2 * (0.06 + 0.88 * places)).round()
    canvas = Image.new("RGB", (2 * SIDE, 2 * SIDE), "white")
    draw = ImageDraw.Draw(canvas)
    for (one, other), weight in sorted(zip(links, weights / weights.max(), strict=True), key=lambda link: link[1]):
        shade = round(205 - 145 * weight)
        draw.line([*at[one], *at[other]], fill=(shade, shade, shade), width=round(1 + 3 * weight))
    average = max(sizes[np.unique(links)].mean(), 1)
    for node in np.unique(links):
        radius = 2 * RADIUS * float(np.clip(np.sqrt(sizes[node] / average), 0.6, 1.6))
        shape, color = draw.rectangle if node == square else draw.ellipse, community_colors(groups[node : node + 1])[0]
        shape([*(at[node] - radius), *(at[node] + radius)], fill=tuple(color.tolist()), outline="black", width=2)
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def layout(network: cd.Network, groups: Int[np.ndarray, "k"], steps: int = 300) -> Float[np.ndarray, "k 2"]:
    """Places of nodes in [0, 1]: links pull in proportion to their weights, all nodes push each other away.

    It begins on a circle, communities side by side, so that the same network always looks the same.

    Source: Fruchterman and Reingold, Graph drawing by force-directed placement, 1991; with a pull towards the middle, so that what is
        not linked does not drift apart.
    """
    links, weights = network
    nodes = np.unique(links)
    pulls = np.zeros((len(groups), len(groups)))
    pulls[tuple(links.T)] = weights / weights.max()
    pulls = (pulls + pulls.T)[np.ix_(nodes, nodes)]
    angles = np.empty(len(nodes))
    angles[np.argsort(groups[nodes], kind="stable")] = np.arange(len(nodes)) * 2 * math.pi / len(nodes)
    at, apart = np.stack([np.cos(angles), np.sin(angles)], 1), 1.5 / math.sqrt(len(nodes))
    for step in range(steps):
        away = at[:, None] - at
        distances = np.maximum(np.linalg.norm(away, axis=2, keepdims=True), 1e-3)
        forces = (away * (apart**2 / distances**2 - pulls[..., None] * distances / apart)).sum(1) - 0.5 * at
        lengths = np.maximum(np.linalg.norm(forces, axis=1, keepdims=True), 1e-9)
        at = at + forces / lengths * np.minimum(lengths, 0.1 * (1 - step / steps))
    places = np.full((len(groups), 2), 0.5)
    span = max(float(np.ptp(at, axis=0).max()), 1e-9)
    places[nodes] = 0.5 + (at - (at.max(0) + at.min(0)) / 2) / span
    return places
