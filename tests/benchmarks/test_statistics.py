import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks.statistics import bootstrap, holm, paired_p, summarize

numbers = st.floats(-100, 100).map(lambda x: round(x, 3))
samples = st.lists(numbers, min_size=2, max_size=12)
pairs = st.lists(st.tuples(numbers, numbers), min_size=2, max_size=12)
probabilities = st.lists(st.floats(0, 1), max_size=8)


def naive_holm(p: list[float]) -> list[float]:
    """From the definition: the largest, over the tests with p no larger, of p times the number of tests with p no smaller."""

    def adjusted(i: int) -> float:
        ranked = sorted(range(len(p)), key=lambda k: (p[k], k))
        return max((len(p) - rank) * p[k] for rank, k in enumerate(ranked[: ranked.index(i) + 1]))

    return [min(1.0, adjusted(i)) for i in range(len(p))]


@given(pairs)
def test_the_paired_test_is_scipys(values):
    a, b = (tuple(column) for column in zip(*values, strict=True))
    differences = np.subtract(a, b)
    if np.ptp(differences) > 1e-6:
        assert paired_p(a, b) == pytest.approx(float(stats.ttest_rel(a, b).pvalue), abs=1e-12)


def test_the_paired_test_pairs_the_seeds():
    base = np.array([1.0, 5.0, 9.0, 13.0])
    better = base - np.array([0.10, 0.11, 0.09, 0.10])
    assert paired_p(tuple(better), tuple(base)) < 1e-3  # unpaired, the spread between seeds would drown it
    assert paired_p(tuple(better), tuple(base[::-1])) > 0.5


@given(samples)
def test_equal_values_cannot_be_told_apart(values):
    assert paired_p(tuple(values), tuple(values)) == 1.0


@given(samples, st.sampled_from([-5.0, 0.5, 3.0]))
def test_a_difference_that_is_the_same_for_every_seed_is_certain(values, shift):
    assert paired_p(tuple(np.add(values, shift)), tuple(values)) == 0.0


def test_one_pair_tests_nothing():
    assert math.isnan(paired_p((1.0,), (2.0,)))


def test_holm_by_hand():
    # Sorted: 0.005 * 4 = 0.02; 0.01 * 3 = 0.03; 0.03 * 2 = 0.06; 0.04 * 1 = 0.04, but no less than 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_counts_only_what_was_tested():
    corrected = holm([0.02, math.nan, 0.01])
    assert corrected[::2] == pytest.approx([0.02, 0.02])
    assert math.isnan(corrected[1])
    assert holm([]) == []


@given(probabilities)
def test_holm_follows_its_definition(p):
    assert holm(p) == pytest.approx(naive_holm(p))


@given(probabilities)
def test_holm_raises_every_p_to_at_most_one_and_keeps_their_order(p):
    corrected = holm(p)
    assert all(raw <= new <= 1 for raw, new in zip(p, corrected, strict=True))
    in_order = [corrected[i] for i in np.argsort(p, kind="stable")]
    assert in_order == sorted(in_order)


@given(samples)
def test_the_bootstrap_interval_lies_within_the_values_and_contains_their_mean(values):
    low, high = bootstrap(tuple(values))
    assert min(values) - 1e-9 <= low <= np.mean(values) + 1e-9
    assert np.mean(values) - 1e-9 <= high <= max(values) + 1e-9


def test_the_bootstrap_interval_is_the_same_for_the_same_values():
    values = tuple(np.random.default_rng(0).normal(size=7))
    assert bootstrap(values) == bootstrap(values)


def test_the_bootstrap_interval_of_many_values_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    error = values.std() / math.sqrt(len(values))
    assert bootstrap(tuple(values)) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.02)


def test_the_bootstrap_interval_shrinks_with_the_number_of_values():
    widths = [np.ptp(bootstrap(tuple([0.0, 1.0] * n))) for n in (2, 8, 32, 128)]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < widths[0] / 4


def test_one_value_is_its_own_interval():
    assert bootstrap((3.0,)) == (3.0, 3.0)


def test_a_summary_states_mean_and_sample_deviation():
    summary = summarize({"a": (1.0, 2.0, 6.0)})["a"]
    assert (summary.mean, summary.std) == (3.0, pytest.approx(math.sqrt(7)))
    assert (summary.low, summary.high) == bootstrap((1.0, 2.0, 6.0))
    assert summary.values == (1.0, 2.0, 6.0)
    assert summary.best and summary.p == 1.0


@pytest.mark.parametrize(("lower_is_better", "best"), [(True, "low"), (False, "high")])
def test_the_best_row_has_the_lowest_or_the_highest_mean(lower_is_better, best):
    rows = {"middle": (2.0, 2.1, 1.9), "low": (1.0, 1.1, 0.9), "high": (3.0, 3.1, 3.2)}
    summaries = summarize(rows, lower_is_better)
    assert [name for name, summary in summaries.items() if summary.best] == [best]
    assert list(summaries) == list(rows)


@given(st.dictionaries(st.sampled_from("abcd"), st.lists(numbers, min_size=3, max_size=3), min_size=1), st.booleans())
def test_every_comparison_has_one_best_row_that_no_other_beats(rows, lower_is_better):
    summaries = summarize({name: tuple(values) for name, values in rows.items()}, lower_is_better)
    (best,) = [summary for summary in summaries.values() if summary.best]
    assert best.tied
    assert best.mean == (min if lower_is_better else max)(summary.mean for summary in summaries.values())


def test_rows_are_tested_against_the_best_with_holms_correction():
    rng = np.random.default_rng(1)
    best = rng.normal(size=6)
    rows = {"near": best + rng.normal(0.1, 0.3, 6), "best": best - 0.2, "far": best + rng.normal(3, 0.1, 6)}
    rows = {name: tuple(values) for name, values in rows.items()}
    summaries = summarize(rows)
    raw = [float(stats.ttest_rel(rows[name], rows["best"]).pvalue) for name in ("near", "far")]
    assert [summaries[name].p for name in ("near", "far")] == pytest.approx(holm(raw))
    assert [summaries[name].tied for name in rows] == [summaries["near"].p >= 0.05, True, False]


def test_correction_can_turn_a_difference_into_a_tie():
    base = np.array([0.0, 0.1, -0.1, 0.05])
    noise = np.array([0.2, -0.2, 0.1, -0.1])
    worse = {name: tuple(base + shift + noise) for name, shift in (("b", 0.35), ("c", 0.36), ("d", 0.37))}
    alone = summarize({"a": tuple(base), "b": worse["b"]})
    together = summarize({"a": tuple(base), **worse})
    assert (alone["b"].tied, together["b"].tied) == (False, True)


def test_equal_rows_tie():
    summaries = summarize({"a": (1.0, 2.0), "b": (1.0, 2.0), "c": (3.0, 4.0)})
    assert (summaries["a"].best, summaries["b"].best) == (True, False)
    assert (summaries["a"].tied, summaries["b"].tied, summaries["c"].tied) == (True, True, False)


def test_one_seed_tells_no_rows_apart():
    summaries = summarize({"a": (1.0,), "b": (100.0,)})
    assert all(summary.tied for summary in summaries.values())
    assert [summary.std for summary in summaries.values()] == [0.0, 0.0]
