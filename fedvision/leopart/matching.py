"""Which class each cluster is taken for, and how well the classes are then found.

Everything is said by one table of counts, rows classes, columns clusters: how many pixels of a class are in a cluster.

Source: arXiv 2204.13101, section 4.1; ties and classes that are absent as in its public implementation.
Differs: the paper speaks of a one-to-one matching after clusters of a class are merged; it would change nothing, and is not there.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

BACKGROUND = 0
"""The class of clusters that are matched with no other."""


@dataclass(frozen=True)
class Overlap:
    """How well classes are found, from pixels counted over all images.

    Attributes:
        true_positives: by class, pixels of the class that are taken for it.
        false_positives: by class, pixels of others that are taken for it.
        false_negatives: by class, pixels of it that are taken for others.
    """

    true_positives: Int[np.ndarray, "classes"]
    false_positives: Int[np.ndarray, "classes"]
    false_negatives: Int[np.ndarray, "classes"]

    @property
    def ious(self) -> Float[np.ndarray, "classes"]:
        """By class, intersection over union in [0, 1]; 0 for a class that is neither there nor found."""
        union = self.true_positives + self.false_positives + self.false_negatives
        return np.asarray(self.true_positives / np.maximum(union, 1))

    @property
    def miou(self) -> float:
        """Their mean over all classes, those that are neither there nor found included."""
        return float(self.ious.mean())


def counted(
    truth: Int[np.ndarray, "..."], clusters: Int[np.ndarray, "..."], classes: int, number: int
) -> Int[np.ndarray, "classes clusters"]:
    """How many pixels of each class, a row each, are in each cluster, a column each; a truth beyond the classes, as 255, counts nowhere.

    >>> counted(np.array([0, 1, 1, 255]), np.array([2, 0, 0, 1]), 2, 3).tolist()
    [[0, 0, 1], [2, 0, 0]]
    """
    known = (truth >= 0) & (truth < classes)
    pairs = truth[known].astype(np.int64) * number + clusters[known]
    return np.bincount(pairs, minlength=classes * number).reshape(classes, number)


def precisions(counts: Int[np.ndarray, "classes clusters"]) -> Float[np.ndarray, "classes clusters"]:
    """Of each cluster's pixels the share that is of each class; 0 in a cluster without any."""
    return np.asarray(counts / np.maximum(counts.sum(0), 1))


def ious(counts: Int[np.ndarray, "classes clusters"]) -> Float[np.ndarray, "classes clusters"]:
    """Of each class and cluster, the pixels that are in both over those that are in one; 0 where neither has any."""
    union = counts.sum(1, keepdims=True) + counts.sum(0) - counts
    return np.asarray(counts / np.maximum(union, 1))


def best(scores: Float[np.ndarray, "classes clusters"]) -> Int[np.ndarray, "clusters"]:
    """The class of each cluster that scores highest, the lowest of several; many clusters may have one class.

    >>> best(np.array([[0.5, 0.1], [0.5, 0.9]])).tolist()
    [0, 1]
    """
    return np.asarray(scores.argmax(0))


def one_to_one(scores: Float[np.ndarray, "classes clusters"]) -> Int[np.ndarray, "clusters"]:
    """A class for each cluster, no class for two of them, such that the scores sum to most; background for those that are left over.

    Source: Kuhn, The Hungarian method.

    >>> one_to_one(np.array([[0.9, 0.8, 0.0], [0.7, 0.1, 0.0]])).tolist()
    [1, 0, 0]
    """
    from scipy.optimize import linear_sum_assignment

    matched = np.full(scores.shape[1], BACKGROUND)
    classes, clusters = linear_sum_assignment(scores, maximize=True)
    matched[clusters] = classes
    return matched


def grouped(
    counts: Int[np.ndarray, "classes clusters"], groups: Int[np.ndarray, "clusters"], number: int
) -> Int[np.ndarray, "classes groups"]:
    """The counts of groups of clusters, ``number`` of them: a cluster's pixels are in the group that ``groups`` says.

    >>> grouped(np.array([[1, 2, 3], [4, 5, 6]]), np.array([1, 0, 1]), 2).tolist()
    [[2, 4], [5, 10]]
    """
    merged = np.zeros((number, len(counts)), counts.dtype)
    np.add.at(merged, groups, counts.T)
    return merged.T


def overlap(counts: Int[np.ndarray, "classes clusters"], match: Int[np.ndarray, "clusters"]) -> Overlap:
    """How well classes are found where each cluster is taken for the class that ``match`` says."""
    taken = grouped(counts, match, len(counts))
    right = np.diag(taken)
    return Overlap(right, taken.sum(0) - right, taken.sum(1) - right)


def by_precision(counts: Int[np.ndarray, "classes clusters"]) -> float:
    """The mIoU where each cluster is taken for the class that most of its pixels are of: overclustering."""
    return overlap(counts, best(precisions(counts))).miou


def by_iou(counts: Int[np.ndarray, "classes clusters"]) -> float:
    """The mIoU where each cluster is taken for the class that it overlaps best with."""
    return overlap(counts, best(ious(counts))).miou


def by_assignment(counts: Int[np.ndarray, "classes clusters"]) -> float:
    """The mIoU where clusters are matched with classes one to one, by how they overlap."""
    return overlap(counts, one_to_one(ious(counts))).miou
