import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedvision.metrics import Metrics, areas, prefixed, total


def measured(values: list[float], scored: bool = False) -> Metrics:
    """Metrics of examples whose losses are ``values``; the labels alternate."""
    tensor = torch.tensor(values, dtype=torch.float64)
    scores = tensor if scored else None
    labels = torch.arange(len(values)) % 2 if scored else None
    return Metrics.of_batch({"loss": tensor.sum(), "twice": 2 * tensor.sum()}, len(values), scores, labels)


@given(st.lists(st.lists(st.integers(-100, 100).map(float), min_size=1, max_size=4), min_size=1, max_size=6))
def test_metrics_of_batches_add_up_to_those_of_the_whole(batches):
    whole = measured([value for batch in batches for value in batch]).result()
    parts = total(measured(batch) for batch in batches).result()
    assert parts.keys() == whole.keys() == {"loss", "twice"}
    assert all(parts[name] == pytest.approx(whole[name]) for name in whole)


def test_adding_is_associative_and_nothing_is_neutral():
    a, b, c, nothing = measured([1, 2], True), measured([3], True), measured([4, 5, 6], True), Metrics(0, {})
    assert ((a + b) + c).result() == (a + (b + c)).result()
    assert (nothing + a).result() == (a + nothing).result() == a.result()
    assert (nothing + nothing).result() == {}


def test_means_are_over_examples_not_batches():
    assert (measured([0, 0, 0]) + measured([4])).result()["loss"] == 1


def test_areas_agree_with_counting_pairs():
    scores, labels = np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels == 1] for b in scores[labels == 0]]
    assert areas(scores, labels)["auroc"] == pytest.approx(np.mean(pairs)) == 0.75
    assert areas(scores, labels)["auprc"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_areas_are_over_the_whole_set_not_a_mean_over_batches():
    # Within each batch the ranking is perfect; over both it is not.
    first = Metrics.of_batch({}, 2, torch.tensor([0.0, 1.0]), torch.tensor([0, 1]))
    second = Metrics.of_batch({}, 2, torch.tensor([2.0, 3.0]), torch.tensor([0, 1]))
    assert first.result()["auroc"] == second.result()["auroc"] == 1
    assert (first + second).result()["auroc"] == 0.75


def test_areas_do_not_change_with_the_scale_of_the_scores():
    scores, labels = np.linspace(-5, 5, 40) + 2 * np.sin(np.arange(40)), np.arange(40) % 3 == 0
    assert areas(scores, labels) == areas(1 / (1 + np.exp(-scores)), labels)


@pytest.mark.parametrize(
    ("scores", "labels"), [([0.1, 0.2], [1, 1]), ([0.1, 0.2], [0, 0]), ([0.1, math.nan], [0, 1]), ([math.inf, 0.0], [0, 1])]
)
def test_areas_that_do_not_exist_are_nan(scores, labels):
    assert all(math.isnan(area) for area in areas(np.array(scores), np.array(labels)).values())


def test_a_prefix_names_what_was_measured():
    assert prefixed("test", {"loss": 1.0, "auroc": 0.5}) == {"test_loss": 1.0, "test_auroc": 0.5}
