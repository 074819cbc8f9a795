"""Cluster-based foreground extraction (CBFE): the clusters on which attention rests are objects, wherever they occur.

Attention marks the most striking parts of an image; a cluster that it marks in many images is taken as foreground in all of them,
whole.

Source: arXiv 2204.13101, section 3.3; what the paper leaves open from what its public implementation does.
Differs: the published threshold was chosen with the true masks of the training images (``best_cut``). ``separating_threshold``
    needs no labels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from fedvision.leopart.masks import jaccard

FIRST, LAST = 0.55, 0.75
"""The share of clusters that are background in the first cut that is tried, and beyond the last one."""

STEP = 0.05
"""To a multiple of which a threshold that was chosen with labels is rounded."""


class Cut(NamedTuple):
    """The least precise clusters are background, the others foreground.

    Attributes:
        precision: of the least precise cluster of the foreground.
        start: how many clusters are background.
        jaccard: how well the foreground agrees with the true one.
    """

    precision: float
    start: int
    jaccard: float


def by_image(
    clusters: Int[np.ndarray, "n h w"], attention: Bool[np.ndarray, "n h w"], number: int
) -> tuple[Int[np.ndarray, "n k"], Int[np.ndarray, "n k"]]:
    """By image and cluster: the pixels of the cluster, and those of them that attention marks."""
    images = len(clusters)
    pairs = (clusters + number * np.arange(images)[:, None, None]).ravel()
    sizes, marked = (np.bincount(own, minlength=images * number).reshape(images, number) for own in (pairs, pairs[attention.ravel()]))
    return sizes, marked


def precisions(clusters: Int[np.ndarray, "n h w"], attention: Bool[np.ndarray, "n h w"], number: int) -> Float[np.ndarray, "k"]:
    """How much of each cluster attention marks, in [0, 1]: the mean over the images where it occurs; 0 if it occurs in none.

    >>> precisions(np.array([[[0, 0, 1]], [[0, 2, 2]]]), np.array([[[True, False, False]], [[True, True, True]]]), 4).tolist()
    [0.75, 0.0, 1.0, 0.0]
    """
    sizes, marked = by_image(clusters, attention, number)
    shares = marked / np.maximum(sizes, 1)
    return np.asarray(shares.sum(0) / np.maximum((sizes > 0).sum(0), 1))


def cuts(
    clusters: Int[np.ndarray, "n h w"],
    precision: Float[np.ndarray, "k"],
    truth: Bool[np.ndarray, "n h w"],
    first: float = FIRST,
    last: float = LAST,
) -> list[Cut]:
    """The cuts that are tried, from the worst foreground to the best.

    Args:
        clusters: of labeled images.
        precision: of the clusters.
        truth: the foreground of the labeled images.
        first: the share of clusters that are background in the first cut.
        last: the share that are so no more.
    """
    number, order = len(precision), precision.argsort(kind="stable")
    found = []
    for start in range(int(first * number), max(int(last * number), int(first * number) + 1)):
        above = np.zeros(number, bool)
        above[order[start:]] = True
        found.append(Cut(float(precision[order[start]]), start, jaccard(truth, above[clusters])))
    return sorted(found, key=lambda cut: (not np.isnan(cut.jaccard), cut.jaccard))


def labeled_threshold(tried: Sequence[Cut]) -> float:
    """The precision of the best cut, rounded to the nearest twentieth; the highest of several.

    >>> labeled_threshold([Cut(0.2, 3, 0.1), Cut(0.68, 4, 0.7)])
    0.7000000000000001
    """
    return round(tried[-1].precision / STEP) * STEP


def separating_threshold(precision: Float[np.ndarray, "k"], sizes: Int[np.ndarray, "k"]) -> float:
    """The precision from which on clusters are foreground, chosen without labels: where pixels fall apart into two groups best.

    Every pixel has the precision of its cluster; the two groups are those whose means differ most for their sizes, that is, with
    the largest variance between them. If all pixels have the same precision, one half.

    Args:
        precision: of the clusters.
        sizes: their pixels; clusters without any do not count.

    Source: Otsu, A threshold selection method from gray-level histograms, 1979.

    >>> separating_threshold(np.array([0.1, 0.8, 0.2, 0.9]), np.array([10, 5, 10, 5]))
    0.8
    """
    levels, level = np.unique(precision[sizes > 0], return_inverse=True)
    if len(levels) < 2:
        return 0.5
    weights = np.bincount(level, sizes[sizes > 0])
    below, mass = weights.cumsum()[:-1], (weights * levels).cumsum()[:-1]
    above = weights.sum() - below
    between = below * above * (mass / below - ((weights * levels).sum() - mass) / above) ** 2
    return float(levels[between.argmax() + 1])


def foreground(clusters: Int[np.ndarray, "n h w"], precision: Float[np.ndarray, "k"], threshold: float) -> Bool[np.ndarray, "n h w"]:
    """Where the clusters are whose precision reaches the threshold."""
    return np.asarray((precision >= threshold)[clusters])
