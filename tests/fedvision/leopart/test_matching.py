"""Clusters are taken for classes as the definitions say, and as the reference takes them."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedvision.leopart.matching import (
    best,
    by_assignment,
    by_iou,
    by_precision,
    counted,
    grouped,
    ious,
    one_to_one,
    overlap,
    precisions,
)

maps = st.integers(1, 60).flatmap(
    lambda n: st.tuples(arrays(int, n, elements=st.integers(0, 3)), arrays(int, n, elements=st.integers(0, 5)))
)


def naive(truth, predicted, classes):
    """Intersection over union of each class, pixel by pixel."""
    found = []
    for c in range(classes):
        pairs = [(t == c, p == c) for t, p in zip(truth, predicted, strict=True) if t < classes]
        union = sum(t or p for t, p in pairs)
        found.append(sum(t and p for t, p in pairs) / union if union else 0.0)
    return found


@pytest.mark.golden
@pytest.mark.parametrize(("name", "scores"), [("prec", precisions), ("iou", ious)])
def test_many_clusters_are_taken_for_classes_as_by_the_reference(golden, name, scores):
    with np.load(golden / "leopart.npz") as held:
        counts = counted(held["ev_gt"], held["ev_pred"], 4, 9)
        match = best(scores(counts))
        found = overlap(counts, match)
        assert found.miou == pytest.approx(held[f"ev_{name}_miou"], abs=1e-12)
        assert (found.true_positives == held[f"ev_{name}_tp"]).all()
        assert (found.false_positives == held[f"ev_{name}_fp"]).all()
        assert (found.false_negatives == held[f"ev_{name}_fn"]).all()
        assert (match[held["ev_pred"]] == held[f"ev_{name}_reordered"]).all()
        assert (match == 0).mean() == held[f"ev_{name}_bg"]


@pytest.mark.golden
def test_predictions_of_classes_are_scored_as_by_the_reference(golden):
    with np.load(golden / "leopart.npz") as held:
        counts = counted(held["ev_gt"], held["ev_pred"].clip(max=3), 4, 4)
        assert overlap(counts, np.arange(4)).miou == pytest.approx(held["ev_linear_miou"], abs=1e-12)


@given(maps)
def test_scores_are_those_of_the_definitions(pair):
    truth, clusters = pair
    counts = counted(truth, clusters, 4, 6)
    for c in range(4):
        for k in range(6):
            both = int(((truth == c) & (clusters == k)).sum())
            size, union = int((clusters == k).sum()), int(((truth == c) | (clusters == k)).sum())
            assert counts[c, k] == both
            assert precisions(counts)[c, k] == (both / size if size else 0)
            assert ious(counts)[c, k] == (both / union if union else 0)


@given(maps)
def test_overlap_is_that_of_the_classes_that_clusters_are_taken_for(pair):
    truth, clusters = pair
    counts = counted(truth, clusters, 4, 6)
    for match, miou in ((best(precisions(counts)), by_precision), (best(ious(counts)), by_iou), (one_to_one(ious(counts)), by_assignment)):
        wanted = naive(truth, match[clusters], 4)
        assert overlap(counts, match).ious == pytest.approx(wanted)
        assert miou(counts) == pytest.approx(np.mean(wanted))


@given(arrays(float, (3, 5), elements=st.floats(0, 1)))
def test_a_one_to_one_match_scores_most_of_all(scores):
    match = one_to_one(scores)
    most = max(sum(scores[c, k] for c, k in enumerate(chosen)) for chosen in permutations(range(5), 3))
    taken = [k for k in range(5) if match[k]]
    left = [scores[0, k] for k in range(5) if not match[k]]
    assert sorted(match[taken]) == [1, 2], "every other class has one cluster, the rest is background"
    assert sum(scores[match[k], k] for k in taken) + max(left) == pytest.approx(most)


def test_fewer_clusters_than_classes_leave_classes_without_any():
    counts = counted(np.array([0, 0, 1, 2, 2, 2]), np.array([0, 0, 0, 1, 1, 1]), 3, 2)
    assert one_to_one(ious(counts)).tolist() == [0, 2]
    assert overlap(counts, one_to_one(ious(counts))).ious == pytest.approx([2 / 3, 0, 1])


def test_a_cluster_that_is_left_over_is_background():
    truth, clusters = np.array([0] * 6 + [1] * 4), np.array([0] * 4 + [1] * 2 + [2] * 3 + [3])
    match = one_to_one(ious(counted(truth, clusters, 2, 4)))
    assert match.tolist() == [0, 0, 1, 0]


def test_a_class_that_is_nowhere_counts_as_zero():
    counts = counted(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]), 4, 2)
    assert by_precision(counts) == 0.5


def test_what_is_not_known_counts_nowhere():
    assert counted(np.array([255, 255]), np.array([0, 1]), 2, 2).sum() == 0
    assert by_precision(counted(np.array([255, 0]), np.array([0, 1]), 1, 2)) == 1.0


def test_groups_have_the_pixels_of_their_clusters():
    rng = np.random.default_rng(0)
    truth, clusters, groups = rng.integers(0, 3, 80), rng.integers(0, 7, 80), rng.integers(0, 4, 7)
    assert (grouped(counted(truth, clusters, 3, 7), groups, 4) == counted(truth, groups[clusters], 3, 4)).all()
