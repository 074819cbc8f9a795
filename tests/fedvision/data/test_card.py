"""The data card against naive loops written from the formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvision.data.card import card, frequencies, jensen_shannon, total_variation
from fedvision.data.examples import Examples
from fedvision.data.federated import FederatedData, Silos
from fedvision.errors import DataError

quick = settings(max_examples=50, deadline=None)


def federation(clients, classes=3, validation=None):
    """One client per list of labels."""

    def pairs(parts):
        return [(np.zeros((len(part), 2)), np.asarray(part, dtype=np.int64)) for part in parts]

    held = None if validation is None else pairs(validation)
    return FederatedData.from_arrays(pairs(clients), held, test=pairs([[0]])[0], classes=classes, name="toy")


labels = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=6)


@quick
@given(labels)
def test_counts_and_sizes_agree_with_a_naive_loop(clients):
    made = card(federation(clients))
    assert made.name == "toy"
    assert made.train.tolist() == [len(part) for part in clients]
    assert made.counts.tolist() == [[part.count(c) for c in range(3)] for part in clients]


@quick
@given(labels)
def test_divergences_agree_with_a_naive_loop(clients):
    made = card(federation(clients))
    pooled = [label for part in clients for label in part]
    q = [pooled.count(c) / len(pooled) for c in range(3)]
    for i, part in enumerate(clients):
        p = [part.count(c) / len(part) for c in range(3)]
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        variation = sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
        divergence = sum(0.5 * a * math.log2(a / c) for a, c in zip(p, m, strict=True) if a > 0)
        divergence += sum(0.5 * b * math.log2(b / c) for b, c in zip(q, m, strict=True) if b > 0)
        assert made.total_variation[i] == pytest.approx(variation, abs=1e-12)
        assert made.jensen_shannon[i] == pytest.approx(divergence, abs=1e-12)
    assert made.mean_total_variation == pytest.approx(sum(made.total_variation) / len(clients))
    assert made.mean_jensen_shannon == pytest.approx(sum(made.jensen_shannon) / len(clients))


@quick
@given(st.data())
def test_divergences_are_symmetric_and_between_zero_and_one(data):
    p, q = (frequencies(np.array(data.draw(st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(any)))) for _ in range(2))
    for divergence in (total_variation, jensen_shannon):
        assert divergence(p, q) == pytest.approx(divergence(q, p))
        assert 0 <= divergence(p, q) <= 1 + 1e-12
        assert divergence(p, p) == 0


def test_disjoint_distributions_are_at_distance_one():
    p, q = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert total_variation(p, q) == 1
    assert jensen_shannon(p, q) == pytest.approx(1)


def test_equal_clients_have_no_divergence():
    made = card(federation([[0, 1, 2], [2, 1, 0], [0, 1, 2, 0, 1, 2]]))
    assert made.mean_total_variation == made.mean_jensen_shannon == 0


def test_the_global_distribution_weighs_clients_by_their_examples():
    made = card(federation([[0] * 3, [1]], classes=2))
    assert made.total_variation.tolist() == [0.25, 0.75]


def test_validation_sizes_are_listed_and_zero_where_there_are_none():
    assert card(federation([[0], [1]], validation=[[0, 1], [2]])).validation.tolist() == [2, 1]
    assert card(federation([[0], [1]])).validation.tolist() == [0, 0]


def test_data_without_labels_have_sizes_and_no_divergence():
    silos = Silos.of([Examples({"image": torch.zeros(n, 2)}) for n in (2, 3)])
    made = card(FederatedData("captions", silos, None, silos[0], 0))
    assert made.train.tolist() == [2, 3]
    assert made.counts.shape == (2, 0)
    assert made.mean_total_variation == made.mean_jensen_shannon == 0


def test_a_label_beyond_the_classes_is_refused():
    silos = Silos.of([Examples({"image": torch.zeros(2, 2), "label": torch.tensor([0, 3])})])
    with pytest.raises(DataError, match=r"labels run from 0 to 3, the data set has 3 classes; give labels 0\.\.2"):
        card(FederatedData("toy", silos, None, silos[0], 3))


def test_unlabeled_examples_count_for_no_class():
    silos = Silos.of([Examples({"image": torch.zeros(3, 2), "label": torch.tensor(labels)}) for labels in ([0, -1, 1], [-1, -1, -1])])
    made = card(FederatedData("toy", silos, None, silos[0], 2))
    assert made.train.tolist() == [3, 3]
    assert made.counts.tolist() == [[1, 1], [0, 0]]


def test_thousands_of_clients_have_a_card():
    silos = Silos.dealt(
        Examples({"image": torch.zeros(20_000, 1), "label": torch.arange(20_000) % 10}), np.array_split(np.arange(20_000), 10_000)
    )
    made = card(FederatedData("many", silos, None, silos[0], 10))
    assert made.counts.shape == (10_000, 10)
    assert made.mean_total_variation == pytest.approx(0.8)
