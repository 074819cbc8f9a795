"""Clusters of tokens are those that are there, whatever their number, and maps are resized as PyTorch resizes them."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedvision.errors import DataError
from fedvision.leopart.clusters import clustered, clustered_by_direction, reduced, resized

WAYS = pytest.mark.parametrize("way", [clustered, clustered_by_direction])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def same_parts(one, other):
    """Whether two ways of numbering clusters part the points alike."""
    return len(set(zip(one, other, strict=True))) == len(set(one)) == len(set(other))


# ---- fewer numbers --------------------------------------------------------------------------------------------------


def test_features_are_standardized_and_keep_their_distances_if_none_is_left_out(rng):
    tokens = rng.normal(3, 5, (40, 6)) * [1, 10, 100, 1, 1, 1]
    standard = (tokens - tokens.mean(0)) / tokens.std(0)
    found = reduced(tokens, 50)
    assert found.shape == (40, 6)
    assert np.allclose(found.mean(0), 0)
    assert np.allclose(found @ found.T, standard @ standard.T)


def test_the_directions_that_are_kept_vary_most(rng):
    tokens = rng.normal(size=(60, 5))
    standard = (tokens - tokens.mean(0)) / tokens.std(0)
    largest = np.sort(np.linalg.eigvalsh(standard.T @ standard))[::-1]
    assert np.allclose((reduced(tokens, 2) ** 2).sum(0), largest[:2])


def test_a_feature_that_never_changes_adds_nothing(rng):
    tokens = rng.normal(size=(30, 3))
    constant = np.concatenate([tokens, np.full((30, 1), 7.0)], 1)
    assert np.allclose(np.abs(reduced(constant, 3)), np.abs(reduced(tokens, 3)))


def test_there_are_never_more_numbers_than_tokens(rng):
    assert reduced(rng.normal(size=(4, 9)), 50).shape == (4, 4)
    assert reduced(rng.normal(size=(1, 9)), 50).tolist() == [[0.0]]
    assert len(reduced(np.zeros((0, 9)), 50)) == 0


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(DataError, match="not finite"):
        reduced(np.array([[1.0, np.nan], [0.0, 1.0]]), 2)


# ---- k-means --------------------------------------------------------------------------------------------------------


@WAYS
def test_groups_that_lie_apart_are_found(way, rng):
    truth = np.arange(90) % 3
    points = np.eye(3)[truth] * 10 + rng.normal(size=(90, 3))
    assert same_parts(way(points, 3, 0), truth)


@WAYS
def test_the_same_seed_gives_the_same_clusters_and_another_gives_others(way, rng):
    points = rng.normal(size=(300, 4))
    one, again, other = (way(points, 12, seed) for seed in (0, 0, 1))
    assert (one == again).all() and not same_parts(one, other)


@WAYS
def test_fewer_points_than_clusters_leave_clusters_empty(way, rng):
    points = rng.normal(size=(5, 3))
    found = way(points, 20, 0)
    assert len(set(found)) == 5 and found.max() < 20
    assert way(np.zeros((6, 2)), 3, 0).max() < 3, "points that are all the same"
    assert way(points[:0], 3, 0).shape == (0,)


@WAYS
def test_centers_are_sought_in_a_sample_and_given_to_all(way, rng):
    truth = np.arange(900) % 3
    points = np.eye(3)[truth] * 10 + rng.normal(size=(900, 3))
    assert same_parts(way(points, 3, 0, sample=20), truth)
    plain = rng.normal(size=(400, 4))
    assert not same_parts(way(plain, 10, 0, sample=2), way(plain, 10, 0)), "so few points lead elsewhere"


def test_directions_count_whatever_the_length(rng):
    truth = np.arange(60) % 2
    points = np.array([[1.0, 0.2], [0.2, 1.0]])[truth] * rng.uniform(0.1, 50, (60, 1))
    assert same_parts(clustered_by_direction(points, 2, 0), truth)
    assert not same_parts(clustered(points, 2, 0), truth)


def test_spherical_centers_agree_with_their_points_better_after_more_iterations(rng):
    points = rng.normal(size=(200, 3))

    def agreement(own):
        sums = np.stack([points[own == k].sum(0) for k in range(8)])
        return np.linalg.norm(sums, axis=1).sum()

    once, often = (agreement(clustered_by_direction(points, 8, 0, restarts=1, iterations=number)) for number in (1, 50))
    assert often > once


# ---- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [(28, 100), (448, 100), (6, 7), (7, 6), (3, 3), (14, 448)])
def test_maps_are_resized_as_by_pytorch(old, new, rng):
    maps = rng.integers(0, 500, (2, old, old + 1))
    wanted = F.interpolate(torch.from_numpy(maps)[:, None].double(), (new, new + 2), mode="nearest")[:, 0].long().numpy()
    assert (resized(maps, new, new + 2) == wanted).all()
    assert resized(maps > 250, new, new).dtype == bool


def test_no_maps_are_resized_to_none():
    assert resized(np.zeros((0, 4, 4), int), 2, 3).shape == (0, 2, 3)
