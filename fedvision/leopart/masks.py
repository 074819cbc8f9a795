"""How well one mask of the foreground agrees with another: areas and boundaries.

Source: arXiv 2204.13101, section 4.3 and table of foreground extraction; contours as OpenCV finds them, as in its public implementation.
"""

import math

import numpy as np
from jaxtyping import Bool, Float, Int

from fedvision.leopart.packages import required


def jaccard(truth: Bool[np.ndarray, "n h w"], predicted: Bool[np.ndarray, "n h w"]) -> float:
    """Mean over images of the pixels that are in both masks over those that are in one.

    NaN if both masks of every image are empty.

    Differs: images where both masks are empty are left out; the reference's mean over all would be NaN.

    >>> jaccard(np.array([[[True, True]], [[False, False]]]), np.array([[[True, False]], [[False, False]]]))
    0.5
    """
    shared, either = ((mask.sum((1, 2))) for mask in (truth & predicted, truth | predicted))
    return _mean(shared[either > 0] / either[either > 0])


def boundary(mask: Bool[np.ndarray, "h w"]) -> Int[np.ndarray, "points 2"]:
    """The points (column, row) of all contours, outer ones and those of holes; one that a contour passes twice is there twice.

    They are pixels of the mask. Beyond the edges there is nothing: a mask that reaches them has a contour along them.
    """
    cv2 = required("cv2")
    contours, _ = cv2.findContours(np.ascontiguousarray(mask, np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return np.concatenate([np.zeros((0, 2), np.int64), *(contour.reshape(-1, 2) for contour in contours)]).astype(np.int64)


def boundary_f1(truth: Bool[np.ndarray, "h w"], predicted: Bool[np.ndarray, "h w"], threshold: float) -> float:
    """The harmonic mean of how many boundary points of each mask have one of the other nearer than ``threshold`` pixels.

    NaN if neither mask has a boundary, 0 if one has none. 16 pixels at 448 are the published threshold.

    The reference's script hands over a truth that is inverted, 1 where there is background, beside a prediction that is not. What is
    published may have been measured so; it is another number (on a toy pair .25 instead of .78), since the edges of the image
    become contours. Give ``~truth`` for it. Here both masks are of the foreground.

    Differs: where only one mask has a boundary, 0 counts; the reference does not say.
    """
    points, found = boundary(truth), boundary(predicted)
    if not len(points) and not len(found):
        return math.nan
    if not len(points) or not len(found):
        return 0.0
    precision, recall = _near(found, points, threshold), _near(points, found, threshold)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def mean_boundary_f1(truth: Bool[np.ndarray, "n h w"], predicted: Bool[np.ndarray, "n h w"], threshold: float) -> float:
    """The mean over images that have a boundary in either mask; NaN if none has."""
    scores = np.array([boundary_f1(*pair, threshold) for pair in zip(truth, predicted, strict=True)])
    return _mean(scores[~np.isnan(scores)])


def _near(points: Int[np.ndarray, "n 2"], others: Int[np.ndarray, "m 2"], threshold: float) -> float:
    """The share of points that have one of the others nearer than the threshold."""
    from scipy.spatial import cKDTree

    distances, _ = cKDTree(others).query(points)
    return float((distances < threshold).mean())


def _mean(values: Float[np.ndarray, "n"]) -> float:
    return float(values.mean()) if len(values) else math.nan
