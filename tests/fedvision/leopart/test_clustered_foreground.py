"""Clusters that attention marks are the foreground; the threshold is the reference's, or needs no labels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedvision.leopart.clustered_foreground import cuts, foreground, labeled_threshold, precisions, separating_threshold


@pytest.fixture
def held(golden):
    with np.load(golden / "leopart.npz") as arrays_:
        yield {name: arrays_[name][:, 0] for name in ("cbfe_clusters", "cbfe_noisy", "cbfe_gt")} | {
            name: arrays_[name] for name in ("cbfe_precs", "cbfe_sorted", "cbfe_threshold")
        }


def naive_precisions(clusters, attention, number):
    found = []
    for k in range(number):
        shares = [marks[own == k].mean() for own, marks in zip(clusters, attention, strict=True) if (own == k).any()]
        found.append(np.mean(shares) if shares else 0.0)
    return found


@pytest.mark.golden
def test_precisions_cuts_and_threshold_are_the_references(held):
    clusters = held["cbfe_clusters"].astype(int)
    precision = precisions(clusters, held["cbfe_noisy"] != 0, 20)
    assert precision == pytest.approx(held["cbfe_precs"], abs=1e-7)
    tried = cuts(clusters, precision, held["cbfe_gt"] != 0)
    assert np.array(tried) == pytest.approx(held["cbfe_sorted"], abs=1e-6)
    assert labeled_threshold(tried) == pytest.approx(held["cbfe_threshold"], abs=1e-12)


@given(arrays(int, (3, 4, 5), elements=st.integers(0, 6)), arrays(bool, (3, 4, 5), elements=st.booleans()))
def test_precision_is_the_mean_over_the_images_where_a_cluster_occurs(clusters, attention):
    assert precisions(clusters, attention, 8) == pytest.approx(naive_precisions(clusters, attention, 8))


@given(arrays(float, 12, elements=st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.7, 0.8, 1.0])), arrays(int, 12, elements=st.integers(0, 9)))
def test_the_threshold_without_labels_separates_pixels_best(precision, sizes):
    def between(threshold):
        """The variance between the pixels below and those above."""
        pixels = np.repeat(precision, sizes)
        parts = [pixels[pixels < threshold], pixels[pixels >= threshold]]
        return sum(len(part) * (part.mean() - pixels.mean()) ** 2 for part in parts if len(part))

    levels = np.unique(precision[sizes > 0])
    found = separating_threshold(precision, sizes)
    if len(levels) < 2:
        assert found == 0.5
    else:
        assert found in levels[1:] and between(found) == pytest.approx(max(map(between, levels)))


def test_the_threshold_does_not_depend_on_clusters_that_are_nowhere():
    precision, sizes = np.array([0.1, 0.9, 0.5]), np.array([4, 4, 0])
    assert separating_threshold(precision, sizes) == 0.9


def test_the_foreground_is_where_precise_clusters_are():
    clusters = np.array([[[0, 1], [2, 1]]])
    assert foreground(clusters, np.array([0.2, 0.7, 0.9]), 0.7).tolist() == [[[False, True], [True, True]]]


def test_few_clusters_have_one_cut_at_least():
    clusters, truth = np.array([[[0, 1]]]), np.array([[[False, True]]])
    tried = cuts(clusters, np.array([0.3, 0.8]), truth)
    assert tried == [(0.8, 1, 1.0)] and labeled_threshold(tried) == pytest.approx(0.8)
    assert len(cuts(clusters * 0, np.array([0.3]), truth)) == 1


def test_cuts_without_any_foreground_come_first():
    clusters, truth = np.zeros((1, 1, 2), int), np.zeros((1, 1, 2), bool)
    tried = cuts(clusters, np.linspace(0, 1, 10), truth)
    assert np.isnan(tried[0].jaccard) and 0 <= labeled_threshold(tried) <= 1
