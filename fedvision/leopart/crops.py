"""Crops of a picture that overlap, and where each lies within the others.

Letters in shapes: n = pictures, v = crops, of which the first two are the global ones, g.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedvision.leopart.colors import Colors
from fedvision.normalization import Normalization

IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Of red, green and blue."""

GLOBAL = 2
"""Crops that teach, and are taught; the others are only taught."""

RATIO = (3 / 4, 4 / 3)
"""A crop's width over its height, least and most."""

TRIES, REDRAWN = 10, 100
"""Of a crop that fits into the picture, as torchvision's ``RandomResizedCrop``; and of one that overlaps with the global ones."""

Scale = tuple[float, float]


class Overlaps(NamedTuple):
    """What crops share, as left, top, right and bottom, in pixels of the crops as they are resized.

    Attributes:
        of_global: what global crop g shares with crop v, in pixels of g.
        of_crop: the same in pixels of v.
    """

    of_global: Float[Tensor, "*n g v 4"]
    of_crop: Float[Tensor, "*n v g 4"]


class Cropped(NamedTuple):
    """Crops of pictures, normalized.

    Attributes:
        global_crops: the large ones.
        local_crops: the small ones; there may be none.
        overlaps: of all of them.
    """

    global_crops: Float[Tensor, "n g c side side"]
    local_crops: Float[Tensor, "n l c small small"]
    overlaps: Overlaps


@dataclass(frozen=True)
class MultiCrop:
    """Two large crops of a picture and some small ones, each with colors of its own.

    Attributes:
        global_size: pixels a side.
        local_size: pixels a side.
        local_crops: how many small ones.
        global_scale: area of a large crop, least and most, as a fraction of the picture's.
        local_scale: that of a small one.
        overlap: what each crop shares with each global one before it exceeds this fraction of the picture's area, twice that for two
            global ones.
        colors: how colors change.

    Source: arXiv 2204.13101, section 3.1 and appendix. Nothing is mirrored.
    Differs: a crop that does not overlap after 100 draws, where the public implementation would go on, is moved to the middle of what
        the global ones share; the blur is Gaussian, where PIL's approximates one.
    """

    global_size: int
    local_size: int
    local_crops: int = 4
    global_scale: Scale = (0.25, 1.0)
    local_scale: Scale = (0.05, 0.25)
    overlap: float = 0.01
    colors: Colors = field(default_factory=Colors)

    def __call__(self, images: Float[Tensor, "n c h w"], rng: torch.Generator) -> Cropped:
        """Crops of pictures in [0, 1], which are not changed."""
        boxes = self.boxes(len(images), tuple(images.shape[-2:]), rng)  # type: ignore[arg-type]
        crops = self.cut(images, boxes)
        global_crops, local_crops = (self._colored(each, rng) for each in crops)
        return Cropped(global_crops, local_crops, self.overlaps(boxes.to(images.device)))

    def plain(self, images: Float[Tensor, "n c h w"], rngs: list[torch.Generator]) -> Cropped:
        """Crops in the pictures' own colors, drawn from a generator for each picture."""
        size = tuple(images.shape[-2:])
        boxes = torch.cat([self.boxes(1, size, rng) for rng in rngs])  # type: ignore[arg-type]
        crops = self.cut(images, boxes)
        global_crops, local_crops = (IMAGENET.of_channels(images.shape[1])(each) for each in crops)
        return Cropped(global_crops, local_crops, self.overlaps(boxes.to(images.device)))

    def boxes(self, n: int, size: tuple[int, int], rng: torch.Generator) -> Int[Tensor, "n v 4"]:
        """Where crops are cut from ``n`` pictures of one size: left, top, right and bottom, in pixels."""
        drawn: list[Tensor] = []
        for crop in range(GLOBAL + self.local_crops):
            scale = self.global_scale if crop < GLOBAL else self.local_scale
            share = 2 * self.overlap if crop == 1 else self.overlap
            drawn.append(overlapping_boxes(drawn[:GLOBAL], n, size, scale, int(share * size[0] * size[1]), rng))
        return torch.stack(drawn, dim=1)

    def cut(self, images: Float[Tensor, "n c h w"], boxes: Int[Tensor, "n v 4"]) -> tuple[Tensor, Tensor]:
        """The global crops [n, 2, c, side, side], and the local ones."""
        boxes = boxes.to(images.device)
        return resized_crops(images, boxes[:, :GLOBAL], self.global_size), resized_crops(images, boxes[:, GLOBAL:], self.local_size)

    def overlaps(self, boxes: Int[Tensor, "n v 4"]) -> Overlaps:
        """What crops that are cut there share."""
        return overlaps(boxes, [self.global_size] * GLOBAL + [self.local_size] * self.local_crops)

    def _colored(self, crops: Float[Tensor, "n v c side side"], rng: torch.Generator) -> Tensor:
        flat = self.colors(crops.flatten(0, 1), rng)
        return IMAGENET.of_channels(flat.shape[1])(flat).unflatten(0, crops.shape[:2])  # type: ignore[no-any-return]


# ---- boxes ----------------------------------------------------------------------------------------------------------


def overlapping_boxes(
    before: list[Int[Tensor, "n 4"]], n: int, size: tuple[int, int], scale: Scale, area: int, rng: torch.Generator
) -> Int[Tensor, "n 4"]:
    """A box in each of ``n`` pictures that shares more than ``area`` pixels with each of those before, drawn until it does.

    Args:
        before: boxes of the same pictures.
        n: how many pictures.
        size: height and width of the pictures.
        scale: area of a box, least and most, as a fraction of the picture's.
        area: in pixels.
        rng: for all draws.
    """
    boxes = random_boxes(n, size, scale, rng)
    left = _apart(boxes, before, area)
    for _ in range(REDRAWN):
        if not left.any():
            return boxes
        boxes[left] = random_boxes(int(left.sum()), size, scale, rng)
        left = _apart(boxes, before, area)
    shared = before[0] if len(before) == 1 else intersections(before[0], before[1])
    boxes[left] = _moved(boxes[left], shared[left], size)
    return boxes


def random_boxes(n: int, size: tuple[int, int], scale: Scale, rng: torch.Generator) -> Int[Tensor, "n 4"]:
    """Boxes as torchvision's ``RandomResizedCrop`` draws them, all at once: of ten the first that fits, or else the middle."""
    height, width = size
    areas = height * width * (scale[0] + (scale[1] - scale[0]) * torch.rand(n, TRIES, generator=rng))
    low, high = torch.tensor(RATIO).log()
    ratios = (low + (high - low) * torch.rand(n, TRIES, generator=rng)).exp()
    sides = torch.stack([(areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()], dim=2).long()
    fits = (sides >= 1).all(2) & (sides[..., 0] <= width) & (sides[..., 1] <= height)
    middle = torch.tensor([min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))])
    chosen = torch.where(fits.any(1)[:, None], sides[torch.arange(n), fits.int().argmax(1)], middle)
    room = torch.tensor([width, height]) - chosen
    anywhere = (torch.rand(n, 2, generator=rng) * (room + 1)).long().minimum(room)
    corner = torch.where(fits.any(1)[:, None], anywhere, room // 2)
    return torch.cat([corner, corner + chosen], dim=1)


def intersections(one: Int[Tensor, "*n 4"], other: Int[Tensor, "*n 4"]) -> Int[Tensor, "*n 4"]:
    """What boxes share; where they share nothing right or bottom is not beyond left or top."""
    return torch.cat([one[..., :2].maximum(other[..., :2]), one[..., 2:].minimum(other[..., 2:])], dim=-1)


def _apart(boxes: Int[Tensor, "n 4"], before: list[Int[Tensor, "n 4"]], area: int) -> Bool[Tensor, "n"]:
    """Which boxes share no more than so many pixels with one of those before."""
    apart = torch.zeros(len(boxes), dtype=torch.bool)
    for other in before:
        shared = intersections(boxes, other)
        apart |= (shared[:, 2:] - shared[:, :2]).clamp(min=0).prod(1) <= area
    return apart


def _moved(boxes: Int[Tensor, "n 4"], targets: Int[Tensor, "n 4"], size: tuple[int, int]) -> Int[Tensor, "n 4"]:
    """Boxes with their middle where that of others is, as far as the picture allows."""
    extent = boxes[:, 2:] - boxes[:, :2]
    corner = (targets[:, :2] + targets[:, 2:] - extent) // 2
    corner = corner.clamp(min=0).minimum(torch.tensor([size[1], size[0]]) - extent)
    return torch.cat([corner, corner + extent], dim=1)


def overlaps(boxes: Int[Tensor, "*n v 4"] | Float[Tensor, "*n v 4"], sizes: list[int]) -> Overlaps:
    """What the first two crops share with all of them, see ``Overlaps``.

    Args:
        boxes: where crops are cut, in pixels of the picture.
        sizes: pixels a side that each is resized to.

    Source: arXiv 2204.13101, section 3.1.
    """
    boxes = boxes.float()
    shared = intersections(boxes[..., :GLOBAL, None, :].expand(*boxes.shape[:-2], GLOBAL, len(sizes), 4), boxes[..., None, :, :])  # type: ignore[arg-type]
    factors = torch.tensor(sizes, dtype=boxes.dtype, device=boxes.device)[:, None] / (boxes[..., 2:] - boxes[..., :2])
    of_global = _within(shared, boxes[..., :GLOBAL, None, :], factors[..., :GLOBAL, None, :])
    of_crop = _within(shared, boxes[..., None, :, :], factors[..., None, :, :])
    return Overlaps(of_global, of_crop.transpose(-3, -2))


def _within(shared: Tensor, boxes: Tensor, factors: Tensor) -> Tensor:
    """Boxes of the picture as boxes of a crop."""
    return (shared - boxes[..., :2].repeat(*[1] * (boxes.ndim - 1), 2)) * factors.repeat(*[1] * (factors.ndim - 1), 2)


# ---- pixels ---------------------------------------------------------------------------------------------------------


def resized_crops(images: Float[Tensor, "n c h w"], boxes: Int[Tensor, "n v 4"], size: int) -> Float[Tensor, "n v c size size"]:
    """Boxes of pictures as squares, interpolated linearly; what becomes smaller is smoothed, as PIL and torchvision do it.

    Two matrix products for all crops of all pictures.

    Args:
        images: of any values.
        boxes: within the pictures.
        size: pixels a side.
    """
    down, across = _tents(boxes[..., 1::2], size, images.shape[2]), _tents(boxes[..., ::2], size, images.shape[3])
    rows = torch.einsum("nvsh,nchw->nvcsw", down.to(images.dtype), images)
    return torch.einsum("nvcsw,nvtw->nvcst", rows, across.to(images.dtype))


def _tents(spans: Int[Tensor, "n v 2"], size: int, pixels: int) -> Float[Tensor, "n v size pixels"]:
    """How much each pixel counts for each of ``size`` places evenly spaced in a span."""
    begin, end = spans[..., :1].float(), spans[..., 1:].float()
    scale = (end - begin) / size
    centers = begin + (torch.arange(size, device=spans.device) + 0.5) * scale
    pixel = torch.arange(pixels, device=spans.device)
    weights = (1 - (pixel + 0.5 - centers[..., None]).abs() / scale.clamp(min=1)[..., None]).clamp(min=0)
    weights = weights * ((pixel >= begin[..., None]) & (pixel < end[..., None]))
    return weights / weights.sum(-1, keepdim=True)
