import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedvision.metrics import Metrics, areas, confusion, overlap, prefixed, total


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


def naive_overlap(truth, predicted, classes):
    """mIoU, mAcc and aAcc, counted pixel by pixel."""
    pairs = [(t, p) for t, p in zip(truth, predicted, strict=True) if t < classes]
    unions, accuracies = [], []
    for c in range(classes):
        right = sum(t == p == c for t, p in pairs)
        either, true = sum(c in pair for pair in pairs), sum(t == c for t, _ in pairs)
        unions += [right / either] if either else []
        accuracies += [right / true] if true else []
    return {"miou": np.mean(unions), "macc": np.mean(accuracies), "aacc": np.mean([t == p for t, p in pairs])}


@given(st.integers(2, 5), st.integers(0, 10_000), st.integers(1, 40))
def test_overlap_is_that_of_the_pixels(classes, seed, n):
    rng = torch.Generator().manual_seed(seed)
    truth, predicted = torch.randint(classes + 1, (n,), generator=rng), torch.randint(classes, (n,), generator=rng)
    truth[truth == classes] = 255
    truth[0] = 0
    found = overlap(confusion(truth, predicted, classes).numpy())
    assert found == pytest.approx(naive_overlap(truth.tolist(), predicted.tolist(), classes))


def test_a_map_without_a_true_pixel_has_no_overlap():
    assert overlap(np.zeros((3, 3))) == {}


def partly(values, having):
    """Metrics of examples of which only the first ``having`` have a depth; their maps are 0 where it is even."""
    depth = torch.tensor(values[:having], dtype=torch.float64)
    table = confusion(torch.tensor(values).long() % 2, torch.zeros(len(values), dtype=torch.int64), 2)
    loss = torch.tensor(float(sum(values)))
    return Metrics.of_batch({"loss": loss}, len(values), shares={"depth": (depth.sum(), torch.tensor(having))}, confusions={"map_": table})


def test_what_some_examples_lack_is_a_mean_over_the_others():
    both = partly([1.0, 2.0, 6.0], 2) + partly([4.0, 8.0], 0) + partly([3.0], 1)
    found = both.result()
    assert found["depth"] == 2.0
    assert found["loss"] == 4.0
    assert found["map_aacc"] == pytest.approx(4 / 6)
    assert found["map_miou"] == pytest.approx((4 / 6 + 0) / 2)


def test_what_no_example_has_is_not_reported():
    assert partly([1.0], 0).result().keys() == {"loss", "map_miou", "map_macc", "map_aacc"}


def test_batches_may_have_different_things():
    """The second batch has no depth at all, the third nothing else."""
    plain = Metrics.of_batch({"loss": torch.tensor(2.0)}, 1)
    depth = Metrics.of_batch({"loss": torch.tensor(4.0)}, 1, shares={"depth": (torch.tensor(3.0), torch.tensor(1))})
    for parts in ((partly([1.0, 2.0], 2), plain, depth), (depth, partly([1.0, 2.0], 2), plain)):
        assert total(parts).result()["depth"] == 2.0
        assert total(parts).result()["map_aacc"] == 0.5
