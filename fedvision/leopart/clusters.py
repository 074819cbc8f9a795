"""Clusters of tokens: patches of many images, grouped by their features alone.

Source: arXiv 2204.13101, section 4.1; what the paper leaves open from what its public implementation does.
Differs: scikit-learn's k-means and ours on directions where the reference has faiss's, which begins and breaks ties otherwise: clusters
    are as good, not the same. As faiss does, centers are sought among 256 tokens a cluster at most, and then given to all.
"""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch.nn import functional as F

from fedvision.errors import DataError
from fedvision.seeds import derive, numpy_generator

SAMPLE = 256
"""Tokens a cluster among which centers are sought."""


def reduced(tokens: Float[np.ndarray, "n width"], dimensions: int) -> Float[np.ndarray, "n d"]:
    """Tokens in fewer numbers: each feature with mean 0 and deviation 1, then the directions in which they vary most.

    Features that never change become 0; if none does, one number is left. There are as many numbers as tokens or features, if these
    are fewer than ``dimensions``.

    Raises:
        DataError: features that are not finite.
    """
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    if not np.isfinite(tokens).all():
        raise DataError("features of patches are not finite, so that nothing can be clustered; train with a lower rate")
    standard = StandardScaler().fit_transform(tokens) if len(tokens) else tokens
    if not standard.any():
        return np.zeros((len(tokens), 1), tokens.dtype)
    return np.asarray(PCA(min(dimensions, *standard.shape), svd_solver="covariance_eigh").fit_transform(standard))


def clustered(
    points: Float[np.ndarray, "n d"], clusters: int, seed: int, restarts: int = 5, iterations: int = 100, sample: int = SAMPLE
) -> Int[np.ndarray, "n"]:
    """The cluster of every point, by k-means.

    Args:
        points: fewer than ``clusters`` of them, or fewer different ones, leave clusters empty.
        clusters: at most.
        seed: of the centers at the beginning and of the sample.
        restarts: of which the best is kept.
        iterations: at most.
        sample: points a cluster among which centers are sought.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if not len(points):
        return np.zeros(0, np.int64)
    some = _sampled(points, clusters * sample, seed)
    means = KMeans(min(clusters, len(points)), n_init=restarts, max_iter=iterations, random_state=_state(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different points than clusters
        means.fit(some)
    return means.predict(points).astype(np.int64)  # type: ignore[no-any-return]


def clustered_by_direction(
    points: Float[np.ndarray, "n d"], clusters: int, seed: int, restarts: int = 5, iterations: int = 100, sample: int = SAMPLE
) -> Int[np.ndarray, "n"]:
    """The cluster of every point, by spherical k-means: centers have length 1, and a point belongs to that of the largest product.

    As in faiss, points count as much as they are long. See ``clustered`` for the arguments.
    """
    if not len(points):
        return np.zeros(0, np.int64)
    some = _sampled(points, clusters * sample, seed)
    runs = [_spherical(some, min(clusters, len(some)), derive(seed, "restart", number), iterations) for number in range(restarts)]
    centers, _ = max(runs, key=lambda run: run[1])
    return np.asarray((points @ centers.T).argmax(1))


def _spherical(points: Float[np.ndarray, "n d"], clusters: int, seed: int, iterations: int) -> tuple[Float[np.ndarray, "k d"], float]:
    """Centers, and how much the points agree with theirs; a cluster that loses all its points keeps its center."""
    from sklearn.cluster import kmeans_plusplus

    centers, _ = kmeans_plusplus(_directions(points), clusters, random_state=_state(seed))
    own = np.full(len(points), -1)
    for _ in range(iterations):
        before, own = own, (points @ centers.T).argmax(1)
        if (own == before).all():
            break
        sums = np.stack([np.bincount(own, column, clusters) for column in points.T], 1)
        centers = np.where(np.abs(sums).max(1, keepdims=True) > 0, _directions(sums), centers).astype(points.dtype)
    return centers, float((points @ centers.T).max(1).sum())


def _directions(points: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    return np.asarray(points / np.where(lengths > 0, lengths, 1))


def _sampled(points: Float[np.ndarray, "n d"], number: int, seed: int) -> Float[np.ndarray, "m d"]:
    if len(points) <= number:
        return points
    return points[np.sort(numpy_generator(seed, "sample").choice(len(points), number, replace=False))]


def _state(seed: int) -> int:
    """A seed as scikit-learn takes it."""
    return derive(seed, "clusters") % 2**32


Clustering = Callable[[Float[np.ndarray, "n d"], int, int], Int[np.ndarray, "n"]]
"""Points, clusters and a seed -> the cluster of every point."""


def resized(maps: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Maps [n, ...] of classes, clusters or booleans at another size: each pixel has the value at the nearest place.

    Which that is, is PyTorch's ``nearest``, to the last pixel.

    >>> resized(np.array([[[1, 2], [3, 4]]]), 2, 4).tolist()
    [[[1, 1, 2, 2], [3, 3, 4, 4]]]
    """
    if not len(maps):
        return np.zeros((0, rows, columns), maps.dtype)
    height, width = (_nearest(old, new) for old, new in zip(maps.shape[1:], (rows, columns), strict=True))
    return maps[:, height[:, None], width]


def _nearest(old: int, new: int) -> Int[np.ndarray, "new"]:
    places = torch.arange(old, dtype=torch.float32)[None, None]
    return F.interpolate(places, new, mode="nearest")[0, 0].numpy().astype(np.int64)
