"""The accumulators against naive float64 loops written from the formulas, and their contracts."""

import copy
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedvision.errors import AggregationError
from fedvision.seeds import generator
from strategies import means
from strategies.means import (
    Accumulator,
    ArithmeticMean,
    Sum,
    WeightedGeometricMean,
    fold_geometric,
)

Kind = Callable[[], Accumulator]
masked_mean = partial(WeightedGeometricMean, 0.4)
KINDS: list[Kind] = [Sum, ArithmeticMean, WeightedGeometricMean, masked_mean]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: repr(kind()))


def folded(
    accumulator: Accumulator,
    answers: Sequence[Tensor],
    weights: Sequence[float] = (),
) -> Tensor:
    for answer, weight in zip(answers, weights or [1.0] * len(answers), strict=True):
        accumulator.add({"x": answer}, weight)
    return accumulator.result()["x"]


def columns(answers: Sequence[Tensor]) -> list[list[float]]:
    """The answers' values of each coordinate."""
    return torch.stack(list(answers)).T.tolist()


def naive_groups(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """The two terms of the formula, for one coordinate."""

    def term(group: list[tuple[float, float]]) -> float:
        if not group:
            return 0.0
        group_weight = sum(w for _, w in group)
        mean_log = sum(w * math.log(abs(g) + 1e-10) for g, w in group) / group_weight
        return group_weight / sum(weights) * math.exp(mean_log)

    pairs = list(zip(values, weights, strict=True))
    return term([(g, w) for g, w in pairs if g > 0]), term([(g, w) for g, w in pairs if g <= 0])


def naive_agreement(values: Sequence[float], weights: Sequence[float]) -> float:
    signs = [(g > 0) - (g < 0) for g in values]
    return abs(sum(w * sign for w, sign in zip(weights, signs, strict=True))) / sum(weights)


def random_answers(name: str, clients: int, size: int = 120) -> list[Tensor]:
    rng = generator(0, "test_means", name, clients)
    same = torch.exp(-23 * torch.rand(size, generator=rng))
    drawn = []
    for client in range(clients):
        normal = 1e-3 * torch.randn(size, generator=rng)
        spread = torch.exp(25 * torch.rand(size, generator=rng) - 20)
        kept = torch.rand(size, generator=rng) < 0.1
        drawn.append(
            {
                "normal": normal,
                "large": normal * 1e6,
                "sparse": normal * kept,
                "positive": normal.abs(),
                "negative": -normal.abs(),
                "of all magnitudes": spread * normal.sign(),
                "of one large positive": -spread * 1e-6 if client else spread,
                "zero": normal * 0,
                "all the same": same,
            }[name]
        )
    return drawn


ANSWERS = [
    "normal",
    "large",
    "sparse",
    "positive",
    "negative",
    "of all magnitudes",
    "of one large positive",
    "zero",
    "all the same",
]
WEIGHTS: dict[str, Callable[[int], list[float]]] = {
    "equal weights": lambda clients: [1.0] * clients,
    "example counts": lambda clients: [float(1 + 37 * client % 600) for client in range(clients)],
    "fractions": lambda clients: [(3 + client % 5) / (7 * clients) for client in range(clients)],
}
every_case = pytest.mark.parametrize("clients", [2, 7, 50])
every_answer = pytest.mark.parametrize("answers", ANSWERS)
every_weight = pytest.mark.parametrize("weights", WEIGHTS)


# The formulas


@every_case
@every_answer
@every_weight
def test_geometric_mean_follows_the_formula(clients: int, answers: str, weights: str) -> None:
    drawn, given_weights = random_answers(answers, clients), WEIGHTS[weights](clients)
    computed = folded(WeightedGeometricMean(), drawn, given_weights).tolist()
    for value, column in zip(computed, columns(drawn), strict=True):
        positive, negative = naive_groups(column, given_weights)
        assert abs(value - (positive - negative)) <= 1e-5 * (positive + negative)


@every_answer
@every_weight
def test_geometric_mean_of_float64_follows_the_formula_to_1e_12(answers: str, weights: str) -> None:
    drawn = [answer.double() for answer in random_answers(answers, 50)]
    computed = folded(WeightedGeometricMean(), drawn, WEIGHTS[weights](50)).tolist()
    for value, column in zip(computed, columns(drawn), strict=True):
        positive, negative = naive_groups(column, WEIGHTS[weights](50))
        assert abs(value - (positive - negative)) <= 1e-12 * (positive + negative)


@every_case
@every_answer
@every_weight
def test_sum_and_mean_follow_the_formula(clients: int, answers: str, weights: str) -> None:
    drawn, given_weights = random_answers(answers, clients), WEIGHTS[weights](clients)
    sums = folded(Sum(), drawn, given_weights).tolist()
    averages = folded(ArithmeticMean(), drawn, given_weights).tolist()
    for total, average, column in zip(sums, averages, columns(drawn), strict=True):
        products = [w * x for w, x in zip(given_weights, column, strict=True)]
        allowed = 2e-6 * sum(map(abs, products))
        assert abs(total - sum(products)) <= allowed
        assert abs(average - sum(products) / sum(given_weights)) <= allowed / sum(given_weights)


@pytest.mark.parametrize("rows", [3, 4])
@every_answer
def test_numpy_and_torch_fold_a_geometric_mean_alike(answers: str, rows: int) -> None:
    sums = torch.zeros(2, rows, 120)
    for weight, answer in enumerate(random_answers(answers, 5), start=1):
        fold_geometric(sums[0], answer, weight, torch.empty(rows, 120))
        fold_geometric(sums[1].numpy(), answer.numpy(), weight, np.empty((rows, 120), np.float32))
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-4)
    assert sums.any()


def test_geometric_mean_by_hand() -> None:
    by_hand = {(2.0, 8.0): 4.0, (-2.0, -8.0): -4.0, (4.0, -1.0): 1.5, (-9.0, 1.0): -4.0}
    computed = folded(WeightedGeometricMean(), torch.tensor(list(by_hand)).T.unbind())
    assert computed.tolist() == pytest.approx(list(by_hand.values()))


def test_geometric_mean_counts_an_exact_zero_as_negative() -> None:
    answers = [torch.tensor([1e-9, 0.0, -0.0]), torch.tensor([0.0, 0.0, 0.0])]
    expected = [(1.1e-9 - 1e-10) / 2, -1e-10, -1e-10]
    computed = folded(WeightedGeometricMean(), answers)
    assert computed.tolist() == pytest.approx(expected, rel=1e-5, abs=0)


def test_geometric_mean_adds_the_floor_to_every_magnitude() -> None:
    computed = folded(WeightedGeometricMean(), [torch.tensor([1e-10, -3e-10])] * 2)
    assert computed.tolist() == pytest.approx([2e-10, -4e-10], rel=1e-5, abs=0)


@pytest.mark.parametrize("merged", [False, True])
def test_an_empty_group_adds_nothing_whatever_the_rounding_of_weights(merged: bool) -> None:
    weights = torch.rand(60, generator=generator(1, "weights"), dtype=torch.float64).tolist()
    parts = [WeightedGeometricMean() for _ in range(7)]
    for client, weight in enumerate(weights):
        parts[client % 7 if merged else 0].add({"x": torch.tensor([1e-9, -1e-9])}, weight)
    for part in parts[1:]:
        parts[0].merge(part)
    assert parts[0].result()["x"].tolist() == pytest.approx([1.1e-9, -1.1e-9], rel=2e-5, abs=0)


def test_a_light_group_of_fractional_weight_keeps_three_digits() -> None:
    weights = [0.5 / 7, 1.5 / 7, 2.1 / 7, 0.1 / 7, 0.7 / 7]  # sums of such are rounded in float32
    values = [1e-6, 2e-6, 3e-6, -300.0, 4e-6]
    computed = folded(WeightedGeometricMean(), [torch.tensor([value]) for value in values], weights)
    positive, negative = naive_groups(values, weights)
    assert computed.item() == pytest.approx(positive - negative, rel=1e-3)


@every_kind
def test_a_weight_of_three_is_three_answers(kind: Kind) -> None:
    first, second = torch.tensor([1.0, -2.0, 0.0, 3.0]), torch.tensor([4.0, 5.0, -6.0, 0.0])
    weighted = folded(kind(), [first, second], [3.0, 1.0])
    torch.testing.assert_close(weighted, folded(kind(), [first, first, first, second]))
    assert not torch.equal(weighted, folded(kind(), [first, second]))


@pytest.mark.parametrize("kind", KINDS[1:], ids=lambda kind: repr(kind()))
def test_means_do_not_depend_on_the_unit_of_the_weights(kind: Kind) -> None:
    answers = random_answers("of all magnitudes", 4)
    once, scaled = folded(kind(), answers, [1, 2, 3, 4]), folded(kind(), answers, [32, 64, 96, 128])
    torch.testing.assert_close(once, scaled)


@every_kind
def test_an_answer_of_weight_zero_changes_nothing(kind: Kind) -> None:
    first, second = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([-7.0, 5.0, 6.0])
    assert torch.equal(folded(kind(), [first, second], [2.0, 0.0]), folded(kind(), [first], [2.0]))


nonzero = st.floats(2**-30, 2**20, width=32)


@settings(deadline=None)
@given(st.lists(nonzero, min_size=1, max_size=20), st.sampled_from([1.0, -1.0]))
def test_geometric_mean_of_one_sign_is_no_larger_than_the_arithmetic_mean(
    values: list[float],
    sign: float,
) -> None:
    answers = [torch.tensor([sign * value]) for value in values]
    geometric = folded(WeightedGeometricMean(), answers).item() * sign
    arithmetic = folded(ArithmeticMean(), answers).item() * sign
    assert min(values) * (1 - 1e-5) <= geometric <= arithmetic * (1 + 1e-5) + 1e-10


# The agreement mask


def test_agreement_mask_zeroes_what_falls_below_the_threshold_and_keeps_a_tie() -> None:
    answers = [torch.tensor([sign * 2.0]) for sign in (1, 1, 1, 1, -1)]  # mean sign 3/5
    assert folded(WeightedGeometricMean(0.6), answers).item() == pytest.approx(1.2)
    assert folded(WeightedGeometricMean(0.61), answers).item() == 0


def test_agreement_mask_counts_a_zero_as_neither_sign() -> None:
    answers = [torch.tensor([value]) for value in (2.0, 2.0, 0.0, 0.0)]  # mean sign 1/2
    assert folded(WeightedGeometricMean(0.5), answers).item() == pytest.approx(1.0)
    assert folded(WeightedGeometricMean(0.51), answers).item() == 0


def test_agreement_mask_weighs_the_signs() -> None:
    answers = [torch.tensor([2.0]), torch.tensor([-2.0])]  # mean sign 1/2
    assert folded(WeightedGeometricMean(0.5), answers, [3.0, 1.0]).item() == pytest.approx(1.0)
    assert folded(WeightedGeometricMean(0.51), answers, [3.0, 1.0]).item() == 0


def test_without_a_threshold_nothing_is_masked() -> None:
    answers = [torch.tensor([4.0]), torch.tensor([-1.0])]  # mean sign 0
    assert folded(WeightedGeometricMean(), answers).item() == pytest.approx(1.5)
    assert folded(WeightedGeometricMean(0.01), answers).item() == 0


@every_answer
def test_agreement_mask_follows_the_formula(answers: str) -> None:
    drawn, weights = random_answers(answers, 7), [1.0, 2.0, 1.0, 4.0, 1.0, 1.0, 3.0]
    whole = folded(WeightedGeometricMean(), drawn, weights).tolist()
    masked = folded(WeightedGeometricMean(0.4), drawn, weights).tolist()
    agreements = [naive_agreement(column, weights) for column in columns(drawn)]
    for part, kept, agreement in zip(masked, whole, agreements, strict=True):
        assert part == (kept if agreement >= 0.4 else 0)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_an_agreement_threshold_outside_the_unit_interval_is_refused(threshold: float) -> None:
    with pytest.raises(AggregationError, match=f"agreement_threshold is {threshold}.*\\[0, 1\\]"):
        WeightedGeometricMean(threshold)


# The monoid


magnitudes = st.floats(2**-30, 2**10, width=32)
values = st.just(0.0) | magnitudes | magnitudes.map(lambda magnitude: -magnitude)
answer = st.tuples(st.lists(values, min_size=3, max_size=3), st.integers(1, 5))


@every_kind
@settings(deadline=None)
@given(data=st.data())
def test_merging_in_any_grouping_and_order_equals_adding_in_turn(
    kind: Kind,
    data: st.DataObject,
) -> None:
    answers = data.draw(st.lists(answer, min_size=1, max_size=12))
    in_turn = kind()
    parts = [kind() for _ in range(4)]
    for numbers, weight in answers:
        in_turn.add({"x": torch.tensor(numbers)}, weight)
    for numbers, weight in data.draw(st.permutations(answers)):
        data.draw(st.sampled_from(parts)).add({"x": torch.tensor(numbers)}, weight)
    while len(parts) > 1:
        other = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        data.draw(st.sampled_from(parts)).merge(other)
    assert (parts[0].count, parts[0].weight) == (in_turn.count, in_turn.weight)
    largest = max(abs(number) * weight for numbers, weight in answers for number in numbers)
    merged, expected = parts[0].result()["x"], in_turn.result()["x"]
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5 * largest)


@every_kind
def test_merging_leaves_the_other_as_it_is_and_shares_nothing_with_it(kind: Kind) -> None:
    one, other = kind(), kind()
    other.add({"x": torch.tensor([3.0])}, 2.0)
    one.merge(other)
    one.add({"x": torch.tensor([100.0])}, 5.0)
    assert (other.count, other.weight) == (1, 2.0)
    assert torch.equal(other.result()["x"], folded(kind(), [torch.tensor([3.0])], [2.0]))
    assert (one.count, one.weight) == (2, 7.0)


@every_kind
def test_merging_with_an_empty_one_changes_nothing(kind: Kind) -> None:
    one = kind()
    one.add({"x": torch.tensor([3.0])}, 2.0)
    before = one.result()
    one.merge(kind())
    assert torch.equal(one.result()["x"], before["x"])
    assert (one.count, one.weight) == (1, 2.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ArithmeticMean(), Sum()),
        (WeightedGeometricMean(0.5), WeightedGeometricMean(0.25)),
        (WeightedGeometricMean(), ArithmeticMean()),
    ],
)
def test_accumulators_of_other_kinds_or_settings_do_not_merge(
    one: Accumulator,
    other: Accumulator,
) -> None:
    with pytest.raises(AggregationError, match="cannot merge"):
        one.merge(other)


@every_kind
def test_accumulators_of_other_arrays_do_not_merge(kind: Kind) -> None:
    one, other = kind(), kind()
    one.add({"x": torch.ones(3)})
    other.add({"x": torch.ones(4)})
    with pytest.raises(AggregationError, match=r"'x'.*\[4\].*\[3\]"):
        one.merge(other)
    assert one.count == 1


@every_kind
@pytest.mark.parametrize("how", ["copied", "sent"])
def test_a_partial_result_may_be_copied_or_sent_and_go_on(kind: Kind, how: str) -> None:
    first, second = random_answers("normal", 2)
    part = kind()
    part.add({"x": first}, 2.0)
    sent = copy.deepcopy(part) if how == "copied" else pickle.loads(pickle.dumps(part))
    assert torch.equal(folded(sent, [second], [3.0]), folded(kind(), [first, second], [2.0, 3.0]))
    assert part.count == 1


def test_a_partial_result_is_sent_without_scratch() -> None:
    part = WeightedGeometricMean()
    part.add({"x": torch.ones(10_000)})
    assert len(pickle.dumps(part)) < 3.2 * 4 * 10_000  # its three sums


# Streaming, and what is whose


@every_kind
def test_a_result_may_be_asked_for_at_any_time(kind: Kind) -> None:
    first, second, third = random_answers("of all magnitudes", 3)
    stream = kind()
    early = folded(stream, [first, second])
    assert torch.equal(early, folded(kind(), [first, second]))
    assert torch.equal(stream.result()["x"], early)
    assert torch.equal(folded(stream, [third]), folded(kind(), [first, second, third]))
    assert torch.equal(early, folded(kind(), [first, second]))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_answers_are_neither_changed_nor_kept(kind: Kind, dtype: torch.dtype) -> None:
    given_answer = torch.tensor([1.0, -2.0, 0.0]).to(dtype)
    accumulator = kind()
    first = folded(accumulator, [given_answer])
    assert torch.equal(given_answer, torch.tensor([1.0, -2.0, 0.0]).to(dtype))
    given_answer.fill_(7)
    assert torch.equal(accumulator.result()["x"], first)
    assert not torch.equal(first, given_answer)


@every_kind
def test_a_result_belongs_to_the_caller(kind: Kind) -> None:
    accumulator = kind()
    first = folded(accumulator, [torch.tensor([1.0, -2.0])])
    expected = first.clone()
    first.fill_(9)
    assert torch.equal(accumulator.result()["x"], expected)


@every_kind
def test_answers_that_require_gradients_leave_no_graph_behind(kind: Kind) -> None:
    result = folded(kind(), [torch.tensor([1.0, 2.0], requires_grad=True)])
    assert not result.requires_grad


@every_kind
def test_blocks_are_seamless(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = random_answers("of all magnitudes", 3, size=1000)
    whole = folded(kind(), answers)
    monkeypatch.setattr(means, "CACHE_BLOCK", 64)
    monkeypatch.setattr(means, "STREAM_BLOCK", 96)
    torch.testing.assert_close(folded(kind(), answers), whole, rtol=1e-6, atol=0)


@every_kind
def test_arrays_of_any_shape_keep_their_names_and_shapes(kind: Kind) -> None:
    rng = generator(0, "shapes")
    strided = torch.randn(4, 3, 5, 5, generator=rng).to(memory_format=torch.channels_last)
    update = {
        "scalar": torch.tensor(-2.5),
        "empty": torch.zeros(0, 3),
        "no steps": torch.zeros(0, dtype=torch.int64),
        "channels last": strided,
        "strided": strided[0, :, 2, 1],
    }
    accumulator = kind()
    accumulator.add(update)
    accumulator.add(dict(reversed(update.items())))
    result = accumulator.result()
    assert list(result) == list(update)
    factor = 2 if kind is Sum else 1
    for name, array in update.items():
        assert result[name].shape == array.shape
        torch.testing.assert_close(result[name], factor * array)


def test_count_and_weight_say_what_was_added() -> None:
    mean = ArithmeticMean()
    assert (mean.count, mean.weight) == (0, 0.0)
    folded(mean, [torch.ones(1)] * 3, [1.0, 0.25, 600])
    assert (mean.count, mean.weight) == (3, 601.25)


# Answers that lack arrays

NAMES = ("a", "b", "c")
partial_answers = st.lists(
    st.tuples(st.sets(st.sampled_from(NAMES)), st.integers(0, 5), st.tuples(*[st.floats(0.1, 10)] * 3)),
    min_size=1,
    max_size=6,
).filter(lambda answers: any(weight for _, weight, _ in answers))


def added(kind: Kind, answers: Sequence[tuple[set[str], int, tuple[float, ...]]]) -> Accumulator:
    accumulator = kind()
    for present, weight, values in answers:
        accumulator.add({name: torch.tensor([value, -value]) for name, value in zip(NAMES, values, strict=True) if name in present}, weight)
    return accumulator


@every_kind
@settings(max_examples=60, deadline=None)
@given(answers=partial_answers)
def test_each_array_is_combined_over_the_answers_that_have_it(kind: Kind, answers: list[Any]) -> None:
    result = added(kind, answers).result()
    for place, name in enumerate(NAMES):
        having = [(torch.tensor([values[place], -values[place]]), weight) for present, weight, values in answers if name in present]
        if not any(weight for _, weight in having):
            assert name not in result
            continue
        alone = folded(kind(), [answer for answer, _ in having], [weight for _, weight in having])
        assert torch.equal(result[name], alone)


@settings(max_examples=60, deadline=None)
@given(answers=partial_answers)
def test_the_mean_of_each_array_is_that_of_a_naive_loop(answers: list[Any]) -> None:
    result = added(ArithmeticMean, answers).result()
    for place, name in enumerate(NAMES):
        total, weights = 0.0, 0
        for present, weight, values in answers:
            if name in present:
                total, weights = total + weight * values[place], weights + weight
        assert (name in result) == (weights > 0)
        if weights:
            assert result[name].tolist() == pytest.approx([total / weights, -total / weights], rel=1e-5)


@every_kind
@settings(max_examples=60, deadline=None)
@given(answers=partial_answers, cut=st.integers(0, 6))
def test_neither_order_nor_grouping_of_answers_that_lack_arrays_matters(kind: Kind, answers: list[Any], cut: int) -> None:
    whole, merged = added(kind, answers[::-1]).result(), added(kind, answers[:cut])
    merged.merge(added(kind, answers[cut:]))
    assert (merged.count, merged.weight) == (len(answers), sum(weight for _, weight, _ in answers))
    assert merged.result().keys() == whole.keys()
    for name, array in merged.result().items():
        torch.testing.assert_close(array, whole[name], rtol=1e-4, atol=1e-5)


# Types


@every_kind
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int32", "int64"])
def test_the_result_has_the_type_of_the_answers(kind: Kind, dtype: str) -> None:
    answer = torch.tensor([1, 2]).to(getattr(torch, dtype))
    assert folded(kind(), [answer]).dtype == answer.dtype


def test_float64_keeps_its_digits() -> None:
    answers = [torch.tensor([value], dtype=torch.float64) for value in (1 + 1e-12, 1 + 3e-12)]
    assert folded(ArithmeticMean(), answers).item() == pytest.approx(1 + 2e-12, rel=1e-15)
    assert folded(WeightedGeometricMean(), answers).item() == pytest.approx(1 + 1.02e-10, rel=1e-14)


def test_half_precision_is_summed_in_float32() -> None:
    ones = [torch.ones(1, dtype=torch.bfloat16)] * 1000  # a bfloat16 sum would stop at 256
    assert folded(ArithmeticMean(), ones).item() == 1
    assert folded(WeightedGeometricMean(), ones).item() == 1
    large = [torch.full((1,), 60_000.0, dtype=torch.float16)] * 3  # a float16 sum would overflow
    assert folded(ArithmeticMean(), large).item() == 60_000


@pytest.mark.parametrize("kind", [ArithmeticMean, WeightedGeometricMean])
def test_integers_are_averaged_in_float64_and_rounded(kind: Kind) -> None:
    steps = [torch.tensor(2**40 + offset) for offset in (1, 4, 4)]  # float32 would lose the offsets
    assert folded(kind(), steps).item() == 2**40 + 3


def test_an_integer_sum_that_does_not_fit_is_refused() -> None:
    total = Sum()
    total.add({"mask": torch.tensor([200], dtype=torch.uint8)})
    total.add({"mask": torch.tensor([100], dtype=torch.uint8)})
    with pytest.raises(AggregationError, match=r"'mask'.*300.*uint8"):
        total.result()


def test_a_rounded_result_leaves_the_sum_unrounded() -> None:
    total = Sum()
    assert folded(total, [torch.tensor([1])], [0.25]).item() == 0
    assert folded(total, [torch.tensor([1])], [0.5]).item() == 1


@every_kind
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int64"])
def test_answers_of_any_type_are_combined_by_their_values(kind: Kind, dtype: str) -> None:
    answers = [torch.tensor([3.0, -4.0, 6.0]), torch.tensor([3.0, -4.0, -2.0])]
    converted = folded(kind(), [answer.to(getattr(torch, dtype)) for answer in answers])
    torch.testing.assert_close(converted.float(), folded(kind(), answers))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@every_kind
def test_answers_on_a_gpu_are_combined_there(kind: Kind) -> None:
    answers = random_answers("of all magnitudes", 3)
    on_gpu = folded(kind(), [answer.cuda() for answer in answers])
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), folded(kind(), answers), rtol=1e-5, atol=0)


def test_booleans_are_averaged_to_the_majority() -> None:
    answers = [torch.tensor(flags) for flags in ([True, False], [True, False], [False, True])]
    assert folded(ArithmeticMean(), answers).tolist() == [True, False]


@every_kind
def test_values_that_are_not_finite_are_neither_hidden_nor_warned_about(kind: Kind) -> None:
    answers = [torch.tensor([math.nan, math.inf, 1.0, 3e38]), torch.tensor([1.0, 1.0, 1.0, 1.0])]
    assert folded(kind(), answers).isfinite().tolist()[:3] == [False, False, True]


@every_kind
def test_complex_arrays_are_refused(kind: Kind) -> None:
    with pytest.raises(AggregationError, match=r"'x'.*complex64 \[2\]"):
        kind().add({"x": torch.ones(2, dtype=torch.complex64)})


# Refusals


@every_kind
def test_nothing_has_no_result(kind: Kind) -> None:
    with pytest.raises(AggregationError, match=r"0 answers.*add at least one"):
        kind().result()


@every_kind
def test_answers_without_weight_have_no_result(kind: Kind) -> None:
    accumulator = kind()
    accumulator.add({"x": torch.ones(1)}, 0.0)
    with pytest.raises(AggregationError, match=r"1 answers of total weight 0;.*positive weight"):
        accumulator.result()


@every_kind
@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_that_cannot_be_is_refused(kind: Kind, weight: float) -> None:
    accumulator = kind()
    with pytest.raises(AggregationError, match=f"weighs {weight}"):
        accumulator.add({"x": torch.ones(1)}, weight)
    assert (accumulator.count, accumulator.weight) == (0, 0.0)


@every_kind
@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"x": torch.ones(2, 3), "y": torch.ones(5)}, r"'y'.*float32 \[5\].*float32 \[4\]"),
        ({"x": torch.ones(3, 2), "y": torch.ones(4)}, r"'x'.*\[3, 2\].*\[2, 3\]"),
        ({"x": torch.ones(2, 3), "y": torch.ones(4).double()}, r"'y'.*float64 .*float32"),
        ({"x": torch.ones(2, 3), "z": torch.ones(1, dtype=torch.complex64)}, r"'z'.*complex64 \[1\]"),
    ],
)
def test_an_answer_of_another_model_is_refused_and_changes_nothing(
    kind: Kind,
    update: dict[str, Tensor],
    message: str,
) -> None:
    accumulator = kind()
    accumulator.add({"x": torch.full((2, 3), 5.0), "y": torch.full((4,), 5.0)})
    before = accumulator.result()
    with pytest.raises(AggregationError, match=message):
        accumulator.add(update)
    assert (accumulator.count, accumulator.weight) == (1, 1.0)
    assert all(torch.equal(array, before[name]) for name, array in accumulator.result().items())


@every_kind
def test_a_refused_first_answer_leaves_no_trace(kind: Kind) -> None:
    accumulator = kind()
    with pytest.raises(AggregationError):
        accumulator.add({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.complex64)})
    accumulator.add({"c": torch.ones(3)})
    assert list(accumulator.result()) == ["c"]


@every_kind
def test_a_model_without_arrays_has_an_empty_result(kind: Kind) -> None:
    accumulator = kind()
    accumulator.add({})
    assert accumulator.result() == {}
    accumulator.add({"x": torch.ones(1)})
    assert accumulator.result()["x"].item() == pytest.approx(1)


# Memory

MEMORY = """
import torch
from pathlib import Path
from strategies.means import ArithmeticMean, WeightedGeometricMean

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

def aggregate(mean, answer):
    for _ in range(50):
        mean.add({"x": answer.neg_()})
    return mean.result()

torch.set_num_threads(1)
answer = torch.ones(10_000_000)
kinds = [ArithmeticMean, WeightedGeometricMean, lambda: WeightedGeometricMean(0.5)]
for kind in kinds:
    aggregate(kind(), torch.ones(1000))
for kind in kinds:
    before = status("VmRSS")
    aggregate(kind(), answer)
    print((status("VmHWM") - before) / answer.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's /proc")
def test_fifty_answers_of_ten_million_parameters_take_a_few_vectors_of_memory() -> None:
    root = Path(means.__file__).parents[1]
    printed = subprocess.check_output([sys.executable, "-c", MEMORY], cwd=root, text=True)
    arithmetic, geometric, masked = map(float, printed.split())
    slack = 0.25  # of a vector: scratch and torch's own
    assert 1.5 < arithmetic <= 2 + slack  # its sum and the result
    assert geometric <= 4 + slack
    assert masked <= 5 + slack
