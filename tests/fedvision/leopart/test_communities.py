"""Parts that are side by side are linked and grouped as the reference links and groups them."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedvision.errors import ExperimentError
from fedvision.leopart.communities import co_occurrence, communities, linked, mutual, offsets, thresholds, unlabeled_threshold

sizes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))


@pytest.fixture
def held(golden):
    with np.load(golden / "leopart.npz") as arrays_:
        yield {name: arrays_[name] for name in ("cd_clusters", "cd_adj", "cd_edges", "cd_offsets")}


def naive(maps, number, distances):
    """Pair by pair."""
    shares = [[] for _ in range(number)]
    for image in maps:
        table = np.zeros((number, number))
        for r, c in np.ndindex(*image.shape):
            for down, right in offsets(distances):
                if 0 <= r + down < image.shape[0] and 0 <= c + right < image.shape[1]:
                    table[image[r, c], image[r + down, c + right]] += 1
        np.fill_diagonal(table, 0)
        for k in range(number):
            if table[k].any():
                shares[k].append(table[k] / table[k].sum())
    return np.array([np.mean(rows, 0) if rows else np.zeros(number) for rows in shares])


def cliques(number, size, between=0.0):
    """Shares of neighbors in groups of clusters; each cluster's are mostly of its own group."""
    own = np.repeat(np.arange(number), size)
    shares = np.where(own[:, None] == own, 1.0, between)
    np.fill_diagonal(shares, 0)
    return shares / shares.sum(1, keepdims=True)


@pytest.mark.golden
def test_neighbors_are_where_the_reference_looks_for_them(held):
    assert offsets() == [tuple(row[2:]) for row in held["cd_offsets"].tolist()]
    assert offsets([1]) == [tuple(row[2:]) for row in held["cd_offsets"].tolist() if row[0] == 1]


@pytest.mark.golden
def test_shares_and_links_are_the_references(held):
    shares = co_occurrence(held["cd_clusters"][:, 0], 12)
    assert shares == pytest.approx(held["cd_adj"], abs=1e-12)
    links, weights = linked(shares, 0.09)
    assert np.column_stack([links, weights]) == pytest.approx(held["cd_edges"], abs=1e-12)


@given(sizes.flatmap(lambda size: arrays(int, size, elements=st.integers(0, 4))), st.sampled_from([(1,), (2,), (1, 2), (3,)]))
def test_shares_are_those_of_the_definition(maps, distances):
    assert co_occurrence(maps, 6, distances) == pytest.approx(naive(maps, 6, distances))


@given(sizes.flatmap(lambda size: arrays(int, size, elements=st.integers(0, 4))))
def test_shares_sum_to_one_where_there_are_any(maps):
    sums = co_occurrence(maps, 6).sum(1)
    assert ((np.abs(sums - 1) < 1e-9) | (sums == 0)).all()


def test_one_cluster_has_no_neighbors():
    assert (co_occurrence(np.zeros((2, 4, 4), int), 1) == 0).all()
    assert communities(linked(np.zeros((1, 1)), 0.0), 1).tolist() == [0]


def test_both_shares_must_reach_the_threshold():
    shares = np.array([[0, 0.4, 0.6], [0.2, 0, 0.8], [0.5, 0.5, 0]])
    links, weights = linked(shares, 0.5)
    assert links.tolist() == [[0, 2], [1, 2]] and weights.tolist() == [0.5, 0.5]
    assert (mutual(shares) == mutual(shares).T).all()


@pytest.mark.parametrize("markov_time", [1.0, 2.0])
def test_groups_are_communities(markov_time):
    found = communities(linked(cliques(3, 5, between=0.02), 0.001), 15, markov_time, modules=0)
    assert [len(set(found[i : i + 5])) for i in (0, 5, 10)] == [1, 1, 1] and set(found) == {1, 2, 3}


def test_communities_are_larger_the_longer_the_walk():
    network = linked(cliques(8, 4, between=0.12), 0.001)
    numbers = [communities(network, 32, markov_time, modules=0).max() for markov_time in (0.2, 1.0, 8.0)]
    assert numbers[0] > numbers[1] >= numbers[2] and numbers[0] > numbers[2]


def test_communities_depend_on_how_many_are_preferred():
    network = linked(cliques(3, 4, between=0.1), 0.001)
    assert communities(network, 12, modules=12).max() > communities(network, 12, modules=0).max()


def test_a_part_without_links_is_in_no_community():
    shares = np.zeros((5, 5))
    shares[:4, :4] = cliques(2, 2)
    found = communities(linked(shares, 0.1), 5, modules=0)
    assert found[4] == 0 and (found[:4] > 0).all() and found[0] == found[1] != found[2]


def test_the_same_seed_gives_the_same_communities():
    rng = np.random.default_rng(0)
    shares = rng.random((30, 30))
    network = linked(shares / shares.sum(1, keepdims=True), 0.02)
    assert (communities(network, 30, seed=3) == communities(network, 30, seed=3)).all()


def test_thresholds_keep_all_links_down_to_a_tenth():
    shares = co_occurrence(np.random.default_rng(0).integers(0, 20, (5, 8, 8)), 20)
    kept = [len(linked(shares, threshold)[0]) for threshold in thresholds(shares)]
    assert kept[0] == len(linked(shares, 0.0)[0]) and kept == sorted(kept, reverse=True)
    assert kept[-1] == pytest.approx(kept[0] / 10, abs=2)
    assert len(thresholds(np.zeros((3, 3)))) == 0


def test_without_labels_the_threshold_is_that_of_as_many_communities_as_wanted():
    shares = cliques(4, 5, between=0.4)
    threshold = unlabeled_threshold(shares, 2.0, 0, 4)
    assert communities(linked(shares, threshold), 20, modules=0).max() == 4
    assert unlabeled_threshold(np.zeros((3, 3)), 2.0, 0, 4) == 0.0


def test_what_is_not_installed_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "infomap", None)
    with pytest.raises(ExperimentError, match=r"package infomap, which is not installed; pip install 'fedvision\[parts\]'"):
        communities(linked(cliques(2, 2), 0.1), 4)
