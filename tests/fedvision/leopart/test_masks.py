"""Areas and boundaries agree as the definitions say, and as the reference measures them."""

import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedvision.errors import ExperimentError
from fedvision.leopart.masks import boundary, boundary_f1, jaccard, mean_boundary_f1

masks = arrays(bool, (7, 9), elements=st.booleans())


def naive_boundary(mask):
    """Pixels of the mask of which one of four neighbors is not in it."""
    whole = np.pad(mask, 1)
    steps = ((0, 1), (1, 0), (0, -1), (-1, 0))
    rows, columns = mask.shape
    return {(c, r) for r in range(rows) for c in range(columns) if mask[r, c] and not all(whole[r + 1 + y, c + 1 + x] for y, x in steps)}


def naive_f1(truth, predicted, threshold):
    """With the points as often as contours pass them."""
    shares = []
    for points, others in ((boundary(predicted), boundary(truth)), (boundary(truth), boundary(predicted))):
        near = [any(math.hypot(*(p - o)) < threshold for o in others) for p in points]
        shares.append(sum(near) / len(near))
    return 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0


@pytest.mark.golden
def test_areas_agree_as_in_the_reference(golden):
    with np.load(golden / "leopart.npz") as held:
        assert jaccard(held["cbfe_gt"][:, 0] != 0, held["cbfe_noisy"][:, 0] != 0) == pytest.approx(held["jac"], abs=1e-7)


@pytest.mark.golden
def test_boundaries_agree_as_in_the_reference(golden):
    with np.load(golden / "leopart.npz") as held:
        truth, predicted = held["bf_gt"] != 0, held["bf_pred"] != 0
        for threshold in (2, 4):
            assert boundary_f1(truth, predicted, threshold) == pytest.approx(held[f"bf_thr{threshold}"], abs=1e-12)
        assert boundary_f1(~truth, predicted, 4) == pytest.approx(held["bf_inverted_thr4"], abs=1e-12)


@given(masks)
def test_a_boundary_is_where_a_mask_ends(mask):
    assert {tuple(point) for point in boundary(mask).tolist()} == naive_boundary(mask)


@given(masks, masks, st.sampled_from([1, 1.5, 2, 3]))
def test_boundaries_agree_where_points_are_near(truth, predicted, threshold):
    found = boundary_f1(truth, predicted, threshold)
    if not truth.any() and not predicted.any():
        assert math.isnan(found)
    elif not truth.any() or not predicted.any():
        assert found == 0
    else:
        assert found == pytest.approx(naive_f1(truth, predicted, threshold))


def test_nearer_than_the_threshold_is_not_as_near():
    truth, predicted = (np.zeros((5, 9), bool) for _ in range(2))
    truth[2, 1], predicted[2, 4] = True, True
    assert boundary_f1(truth, predicted, 3) == 0 and boundary_f1(truth, predicted, 3.01) == 1


def test_a_contour_that_passes_a_pixel_twice_counts_it_twice():
    line = np.zeros((5, 9), bool)
    line[2, 2:6] = True
    assert sorted(boundary(line)[:, 0].tolist()) == [2, 3, 3, 4, 4, 5]


def test_images_without_a_boundary_are_left_out():
    square = np.zeros((3, 8, 8), bool)
    square[0, 2:5, 2:5] = square[1, 2:5, 2:5] = True
    predicted = np.stack([square[0], np.zeros((8, 8), bool), np.zeros((8, 8), bool)])
    assert mean_boundary_f1(square, predicted, 1) == 0.5
    assert math.isnan(mean_boundary_f1(square[2:], predicted[2:], 1))


def test_images_where_both_masks_are_empty_are_left_out():
    truth, predicted = np.zeros((3, 2, 2), bool), np.zeros((3, 2, 2), bool)
    truth[0], predicted[0, 0] = True, True
    truth[1, 0, 0] = True
    assert jaccard(truth, predicted) == 0.25
    assert math.isnan(jaccard(truth[2:], predicted[2:]))


def test_what_is_not_installed_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ExperimentError, match=r"opencv-python-headless, which is not installed; pip install 'fedvision\[parts\]'"):
        boundary(np.ones((2, 2), bool))
