"""Community detection (CD): parts that are often side by side make an object.

Clusters are the nodes of a network; two of them are linked if each is often beside the other. Infomap finds groups of nodes among
which a random walker stays long.

Source: arXiv 2204.13101, section 3.4; what the paper leaves open from what its public implementation does.
Differs: neighbors are counted for all images at once, and among any number of clusters.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from fedvision.leopart.packages import required

ANGLES = (0, 45, 90, 135, 180, 240, 270, 315)
"""Directions of neighbors in degrees. The sixth is 240, not 225, as in the reference."""

DISTANCES = (1, 2)
"""Of neighbors in rows and columns."""

Network = tuple[Int[np.ndarray, "links 2"], Float[np.ndarray, "links"]]
"""The links, each once, the lower node first, and their weights."""


def offsets(distances: Sequence[int] = DISTANCES) -> list[tuple[int, int]]:
    """Where neighbors are, rows and columns away, for each distance and angle.

    Rounded as scikit-image's co-occurrence does: diagonal neighbors of distance 2 are those of distance 1 once more.

    >>> offsets([2])
    [(0, 2), (1, 1), (2, 0), (1, -1), (0, -2), (-2, -1), (-2, 0), (-1, 1)]
    """
    radians = np.deg2rad(ANGLES)
    return [(round(d * np.sin(angle)), round(d * np.cos(angle))) for d in distances for angle in radians]


def co_occurrence(maps: Int[np.ndarray, "n rows columns"], number: int, distances: Sequence[int] = DISTANCES) -> Float[np.ndarray, "k k"]:
    """How often a neighbor of each cluster, a row each, is of each other one, a column each.

    In every image the neighbors of a cluster that are of others are counted, and divided by their number; of these shares the mean
    over the images where there are any is taken. A row sums to 1, or to 0 if the cluster never has another neighbor.

    Args:
        maps: the clusters, 0 ... ``number`` - 1.
        number: of clusters.
        distances: of neighbors.
    """
    images = len(maps)
    totals = np.zeros(images * number, np.int64)
    for row, _ in _neighbors(maps, number, distances):
        totals += np.bincount(row, minlength=images * number)
    share, sums = 1 / np.maximum(totals, 1), np.zeros(number**2)
    for row, other in _neighbors(maps, number, distances):
        sums += np.bincount(row % number * number + other, share[row], number**2)
    there = (totals > 0).reshape(images, number).sum(0)
    return np.asarray(sums.reshape(number, number) / np.maximum(there, 1)[:, None])


def _neighbors(maps: Int[np.ndarray, "n rows columns"], number: int, distances: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each offset: image times ``number`` plus cluster, and the cluster of the neighbor, where that is another one."""
    _, rows, columns = maps.shape
    keyed = maps + number * np.arange(len(maps))[:, None, None]
    for down, right in offsets(distances):
        here = np.s_[:, max(-down, 0) : max(rows - max(down, 0), 0), max(-right, 0) : max(columns - max(right, 0), 0)]
        there = np.s_[:, max(down, 0) : max(rows + min(down, 0), 0), max(right, 0) : max(columns + min(right, 0), 0)]
        differ = maps[here] != maps[there]
        yield keyed[here][differ], maps[there][differ]


def mutual(conditional: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "k k"]:
    """The lower of two clusters' shares of each other."""
    return np.asarray(np.minimum(conditional, conditional.T))


def linked(conditional: Float[np.ndarray, "k k"], threshold: float) -> Network:
    """The network of clusters of which each has a share of at least ``threshold`` of the other's neighbors; the weight is the lower share.

    Shares of 0 link nothing.
    """
    weights = np.triu(mutual(conditional), 1)
    links = np.argwhere((weights >= threshold) & (weights > 0))
    return links, weights[tuple(links.T)]


def communities(network: Network, number: int, markov_time: float = 2.0, modules: int = 20, seed: int = 1) -> Int[np.ndarray, "k"]:
    """The community of each node from 1 on; 0 for nodes without a link.

    Args:
        network: from ``linked``.
        number: of nodes.
        markov_time: how long the walker walks between two codes; the longer, the larger the communities.
        modules: how many communities are preferred; 0 for as many as there are.
        seed: at least 1.

    Source: Rosvall and Bergstrom, arXiv 0707.0609, as the package ``infomap`` has it: two levels, undirected, one trial.
    """
    found, (links, weights) = np.zeros(number, np.int64), network
    if not len(links):
        return found
    infomap = required("infomap")
    flow = infomap.Network()
    flow.add_links([(int(one), int(other), float(weight)) for (one, other), weight in zip(links, weights, strict=True)])
    options = infomap.Options(
        two_level=True, silent=True, markov_time=markov_time, preferred_number_of_modules=modules or None, seed=seed, num_trials=1
    )
    for node, module in flow.run(options=options).modules().items():
        found[node] = module
    return found


SHARES = tuple(share / 10 for share in range(10))
"""Of the links, how many are weaker than the thresholds that are tried."""


def thresholds(conditional: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "t"]:
    """Thresholds that keep all links, nine tenths of them, and so on to one tenth; none if nothing is linked."""
    _, weights = linked(conditional, 0.0)
    return np.unique(np.quantile(weights, SHARES)) if len(weights) else np.zeros(0)


def unlabeled_threshold(conditional: Float[np.ndarray, "k k"], markov_time: float, modules: int, wanted: int) -> float:
    """The threshold, chosen without labels, whose communities of two or more are nearest in number to those wanted; the highest of several.

    Of ``thresholds``; 0 if nothing is linked. How many are wanted is one fewer than classes are counted, the background's.
    """
    size = len(conditional)
    found = [(_several(communities(linked(conditional, each), size, markov_time, modules)), each) for each in thresholds(conditional)]
    return float(min(found, key=lambda pair: (abs(pair[0] - wanted), -pair[1]), default=(0, 0.0))[1])


def _several(own: Int[np.ndarray, "k"]) -> int:
    """Communities of two nodes or more."""
    return int((np.bincount(own)[1:] > 1).sum())
