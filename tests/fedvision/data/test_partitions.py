"""Partitions are disjoint, cover what they claim, are seeded, terminate, and say why they cannot."""

import os
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvision.data import partitions as module
from fedvision.errors import DataError
from fedvision.registry import partitions
from fedvision.settings import resolve

BY_LABEL = ["dirichlet", "exponential-sizes", "iid", "inner-dirichlet", "linear-sizes", "pathological", "shards", "square-sizes"]
COVERING = ["dirichlet", "exponential-sizes", "iid", "inner-dirichlet", "linear-sizes", "square-sizes"]
quick = settings(max_examples=25, deadline=None)


def rng(seed=0):
    return np.random.default_rng(seed)


def labels_of(n, classes=10, seed=0):
    return rng(seed).integers(classes, size=n)


def split(name, labels, seed=0, **values):
    return partitions.find(name)(labels=labels, rng=rng(seed), **values)


def sizes(parts):
    return [len(part) for part in parts]


def same(one, other):
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_all_partitions_are_registered():
    assert partitions.names() == sorted([*BY_LABEL, "environment"])


@pytest.mark.parametrize("name", [*BY_LABEL, "environment"])
def test_every_partition_resolves_its_defaults_and_has_a_summary(name):
    find = partitions.find(name)
    assert resolve(find, {}, "partition", frozenset({"labels", "environments", "rng"}))
    assert partitions.summary(name)


@pytest.mark.parametrize("name", BY_LABEL)
@quick
@given(clients=st.integers(1, 5), counts=st.lists(st.integers(5, 80), min_size=2, max_size=6), seed=st.integers(0, 2**32))
def test_a_partition_is_disjoint_and_within_the_data(name, clients, counts, seed):
    labels = rng(seed).permutation(np.repeat(np.arange(len(counts) + 1), [200, *counts]))
    parts = split(name, labels, seed, clients=clients)
    together = np.concatenate(parts)
    assert len(parts) == clients
    assert all(part.dtype == np.int64 for part in parts)
    assert len(np.unique(together)) == len(together)
    assert together.min() >= 0
    assert together.max() < len(labels)


@pytest.mark.parametrize("name", COVERING)
@quick
@given(n=st.integers(200, 400), clients=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_a_covering_partition_deals_every_example(name, n, clients, seed):
    parts = split(name, labels_of(n, seed=seed), seed, clients=clients)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))


@pytest.mark.parametrize("name", BY_LABEL)
def test_the_same_generator_gives_the_same_partition_and_another_gives_another(name):
    labels = labels_of(500)
    assert same(split(name, labels, 1, clients=4), split(name, labels, 1, clients=4))
    assert not same(split(name, labels, 1, clients=4), split(name, labels, 2, clients=4))


@pytest.mark.parametrize("name", ["dirichlet", "inner-dirichlet", "pathological", "shards"])
def test_another_generator_gives_other_mixes_of_classes_and_not_only_other_examples(name):
    labels = labels_of(500)
    mixes = {str([np.bincount(labels[part], minlength=10).tolist() for part in split(name, labels, seed, clients=4)]) for seed in range(5)}
    assert len(mixes) == 5


@pytest.mark.parametrize("name", BY_LABEL)
def test_no_global_generator_is_touched(name):
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    split(name, labels_of(500), clients=4)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("name", BY_LABEL)
def test_global_generators_do_not_change_a_partition(name):
    labels = labels_of(500)
    first = split(name, labels, clients=4)
    state = np.random.get_state()
    try:
        np.random.seed(12345)
        assert same(first, split(name, labels, clients=4))
    finally:
        np.random.set_state(state)


@pytest.mark.parametrize("name", BY_LABEL)
def test_a_partition_neither_warns_nor_prints(name, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split(name, labels_of(500), clients=4)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", BY_LABEL)
def test_labels_need_not_be_consecutive(name):
    labels = labels_of(500, classes=4)
    assert same(split(name, labels, clients=3), split(name, labels * 7 - 3, clients=3))


def test_partitions_write_nothing_to_the_home_folder(tmp_path):
    """Flower's partitioners run on data sets of Hugging Face, which may cache; matplotlib's own folder is sent elsewhere."""
    home = tmp_path / "home"
    home.mkdir()
    code = f"""
import numpy as np
from fedvision.registry import partitions
for name in {BY_LABEL}:
    partitions.find(name)(labels=np.arange(500) % 10, rng=np.random.default_rng(0), clients=4)
"""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    environ = {**kept, "HOME": str(home), "MPLCONFIGDIR": str(tmp_path / "mpl"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert [path for path in home.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", ["dirichlet", "inner-dirichlet", "linear-sizes", "pathological", "shards"])
def test_bulk_reading_agrees_with_flowers_own_partitions(name, monkeypatch):
    """The assignment is read from a private table of flwr-datasets; this fails if that table changes its meaning."""
    kept = []

    real = module._dealt_by

    def watched(partitioner, *arguments, **named):
        kept.append(partitioner)
        return real(partitioner, *arguments, **named)

    monkeypatch.setattr(module, "_dealt_by", watched)
    parts = split(name, labels_of(300), clients=4)
    (partitioner,) = kept
    assert same(parts, [np.asarray(partitioner.load_partition(client)["index"][:]) for client in range(4)])


# iid


@quick
@given(n=st.integers(1, 300), seed=st.integers(0, 2**32), data=st.data())
def test_iid_shares_differ_by_one_at_most(n, seed, data):
    clients = data.draw(st.integers(1, n))
    parts = split("iid", np.zeros(n, np.int64), seed, clients=clients)
    assert max(sizes(parts)) - min(sizes(parts)) <= 1


def test_iid_gives_the_sizes_of_flowers_iid_partitioner():
    from datasets import Dataset
    from flwr_datasets.partitioner import IidPartitioner

    theirs = IidPartitioner(7)
    theirs.dataset = Dataset.from_dict({"index": np.arange(100)})
    assert sizes(split("iid", np.zeros(100, np.int64), clients=7)) == [len(theirs.load_partition(i)) for i in range(7)]


def test_iid_deals_a_hundred_thousand_clients():
    parts = split("iid", np.zeros(150_000, np.int64), clients=100_000)
    assert len(parts) == 100_000
    assert set(sizes(parts)) == {1, 2}


def test_iid_shuffles():
    labels = np.repeat(np.arange(10), 100)
    assert all(len(np.unique(labels[part])) == 10 for part in split("iid", labels, clients=5))


# environment


def deal_environments(environments, **values):
    return partitions.find("environment")(environments=np.asarray(environments), rng=rng(), **values)


def test_environment_gives_one_client_per_environment_in_ascending_order():
    parts = deal_environments([7, 2, 7, 5, 2])
    assert [part.tolist() for part in parts] == [[1, 4], [3], [0, 2]]


def test_environment_groups_consecutive_environments_in_storage_order():
    parts = deal_environments([0, 1, 2, 3, 4, 0, 1, 2, 3, 4], environments_per_client=2)
    assert [part.tolist() for part in parts] == [[0, 1, 5, 6], [2, 3, 7, 8], [4, 9]]


@quick
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=60), st.integers(1, 4))
def test_environment_agrees_with_a_naive_loop(environments, group):
    known = sorted(set(environments))
    if len(known) < group:
        with pytest.raises(DataError, match=f"set it to at most {len(known)}"):
            deal_environments(environments, environments_per_client=group)
        return
    naive = [[i for i, e in enumerate(environments) if e in known[start : start + group]] for start in range(0, len(known), group)]
    parts = deal_environments(environments, environments_per_client=group)
    assert [part.tolist() for part in parts] == naive
    assert all(part.dtype == np.int64 for part in parts)


# label skew


def total_skew(labels, parts):
    overall = np.bincount(labels, minlength=10) / len(labels)
    return np.mean([np.abs(np.bincount(labels[part], minlength=10) / len(part) - overall).sum() / 2 for part in parts])


@pytest.mark.parametrize("name", ["dirichlet", "inner-dirichlet"])
def test_a_small_alpha_skews_more_than_a_large_one(name):
    labels = labels_of(2000)
    skews = [total_skew(labels, split(name, labels, clients=5, alpha=alpha)) for alpha in (0.1, 1.0, 100.0)]
    assert skews[0] > skews[1] > skews[2]
    assert skews[0] > 0.4
    assert skews[2] < 0.1


@quick
@given(st.integers(0, 2**32), st.integers(1, 20))
def test_dirichlet_respects_the_smallest_size(seed, smallest):
    assert min(sizes(split("dirichlet", labels_of(2000), seed, clients=5, alpha=1.0, min_size=smallest))) >= smallest


def test_balanced_dirichlet_has_more_even_sizes():
    labels = labels_of(2000)
    spreads = [np.std(sizes(split("dirichlet", labels, clients=5, alpha=0.3, balanced=balanced))) for balanced in (False, True)]
    assert spreads[1] < spreads[0]


def test_dirichlet_gives_up_with_a_remedy_instead_of_drawing_for_ever():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=r"alpha = 0.001 .*min_size = 1 .*; raise alpha, lower clients"):
            split("dirichlet", labels_of(200), clients=100, alpha=0.001)


@pytest.mark.parametrize("alpha", [1e-300, 1e-5, 1e6])
@pytest.mark.parametrize("name", ["dirichlet", "inner-dirichlet"])
@pytest.mark.parametrize("balanced", [False, True])
def test_extreme_concentrations_end_in_a_partition_or_in_our_error(name, alpha, balanced):
    values = {"balanced": balanced} if name == "dirichlet" else {}
    labels = labels_of(200)
    for seed in range(5):
        try:
            parts = split(name, labels, seed, clients=3, alpha=alpha, **values)
        except DataError as error:
            assert "raise alpha" in str(error)
        else:
            assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(200))


def test_inner_dirichlet_gives_the_sizes_asked_for():
    assert sizes(split("inner-dirichlet", labels_of(100), clients=3, sizes=(10, 20, 30))) == [10, 20, 30]
    assert sizes(split("inner-dirichlet", labels_of(100), clients=3)) == [34, 33, 33]


def test_a_full_client_whose_classes_are_used_up_stops_nobody():
    """With these draws a client that is full already has probability 0 for every class that is left."""
    labels = np.repeat([0, 1], [10, 100])
    assert sizes(split("inner-dirichlet", labels, 15, clients=4, alpha=0.01, sizes=(4, 4, 4, 50))) == [4, 4, 4, 50]


def test_inner_dirichlet_wants_one_size_per_client():
    with pytest.raises(DataError, match="2 sizes for clients = 3; give one size per client"):
        split("inner-dirichlet", labels_of(100), clients=3, sizes=(10, 20))
    with pytest.raises(DataError, match="the sum of sizes, 101, is more than the 100 examples"):
        split("inner-dirichlet", labels_of(100), clients=2, sizes=(100, 1))


def test_shards_are_equal_and_hold_few_classes():
    labels = np.repeat(np.arange(10), 100)
    parts = split("shards", labels[rng(3).permutation(1000)], clients=10, shards_per_client=2)
    shuffled = labels[rng(3).permutation(1000)]
    assert sizes(parts) == [100] * 10
    assert all(len(np.unique(shuffled[part])) <= 2 for part in parts)


def test_shards_leave_only_the_remainder_undealt():
    assert sum(sizes(split("shards", labels_of(107), clients=5, shards_per_client=2))) == 100


@pytest.mark.parametrize("assignment", ["first-deterministic", "deterministic", "random"])
@quick
@given(seed=st.integers(0, 2**32), clients=st.integers(1, 12), classes=st.integers(1, 5))
def test_pathological_clients_hold_exactly_their_number_of_classes(assignment, seed, clients, classes):
    labels = np.repeat(np.arange(5), 40)
    parts = split("pathological", labels, seed, clients=clients, classes_per_client=classes, assignment=assignment)
    held = [np.unique(labels[part]) for part in parts]
    assert all(len(mine) == classes for mine in held)
    dealt = np.isin(labels, np.concatenate(held)).sum()
    assert sum(sizes(parts)) == dealt


def test_deterministic_pathological_clients_hold_consecutive_classes():
    labels = np.repeat(np.arange(5), 40)
    parts = split("pathological", labels, clients=5, classes_per_client=2, assignment="deterministic")
    assert [np.unique(labels[part]).tolist() for part in parts] == [[0, 1], [1, 2], [2, 3], [3, 4], [0, 4]]


def test_pathological_refuses_more_classes_than_there_are():
    with pytest.raises(DataError, match=r"classes_per_client = 6, but the data has 5 class\(es\); set it to at most 5"):
        split("pathological", labels_of(100, classes=5), clients=3, classes_per_client=6)


def test_pathological_refuses_more_holders_than_examples():
    with pytest.raises(DataError, match="some class has more holders than examples"):
        split("pathological", np.array([0] * 30 + [1]), clients=3, classes_per_client=2)


# size skew


@pytest.mark.parametrize(("name", "share"), [("linear-sizes", lambda i: i), ("square-sizes", np.square), ("exponential-sizes", np.exp)])
def test_sizes_follow_their_law(name, share):
    units = share(np.arange(1.0, 5.0))
    wanted = np.floor(units / units.sum() * 1000).astype(int)
    wanted[-1] += 1000 - wanted.sum()
    assert sizes(split(name, labels_of(1000), clients=4)) == wanted.tolist()


@pytest.mark.parametrize("name", ["linear-sizes", "square-sizes", "exponential-sizes"])
def test_size_skew_shuffles_first(name):
    labels = np.repeat(np.arange(4), 250)
    assert all(len(np.unique(labels[part])) == 4 for part in split(name, labels, clients=3))


@pytest.mark.parametrize("name", ["linear-sizes", "square-sizes", "exponential-sizes"])
@pytest.mark.parametrize("clients", [90, 1000])
def test_size_skew_refuses_empty_clients(name, clients):
    with pytest.raises(DataError, match=f"with clients = {clients} the smallest share of 100 examples is less than one; lower clients"):
        split(name, labels_of(100), clients=clients)


# too many clients


@pytest.mark.parametrize("name", ["dirichlet", "iid", "inner-dirichlet", "pathological", "shards"])
def test_more_clients_than_examples_are_refused_with_the_limit(name):
    with pytest.raises(DataError, match=f"{name}.*more than the 9 examples there are; lower it to at most 9"):
        split(name, labels_of(9), clients=10)
