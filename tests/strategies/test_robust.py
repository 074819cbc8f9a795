"""Robust rules on numbers checkable by hand, and what a minority of liars can do to them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedvision.data import Examples
from fedvision.errors import AggregationError, ExperimentError
from fedvision.learners.classifier import Classifier
from fedvision.models import MLP
from fedvision.seeds import generator
from fedvision.settings import resolve
from strategies import robust
from strategies.robust import Collection, FedMedian, Krum, TrimmedMean, by_coordinate, krum_scores, median, trimmed_mean
from strategies.strategy import Update

quick = settings(max_examples=40, deadline=None)
numbers = st.floats(-100, 100, allow_nan=False, width=32)
lies = st.sampled_from([-1e30, -1e6, 1e6, 1e30])


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


# ---- by hand ------------------------------------------------------------------------------------------------------------


def test_the_median_of_an_odd_number_is_the_middle_one():
    assert median(torch.tensor([[3.0, 1.0], [1.0, 5.0], [100.0, 2.0]])).tolist() == [3, 2]


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two():
    assert median(column(1, 100, 3, 4)).tolist() == [3.5]


def test_the_median_of_one_client_is_that_client():
    assert median(column(7)).tolist() == [7]


def test_the_trimmed_mean_cuts_on_either_side():
    values = column(50, 1, 2, 3, -70)
    assert trimmed_mean(values, 0.2).tolist() == [2]
    assert trimmed_mean(values, 0.4).tolist() == [2]
    assert trimmed_mean(values, 0.0).tolist() == [-14 / 5]


def test_the_number_cut_is_rounded_down():
    assert trimmed_mean(column(0, 1, 2, 12), 0.24).tolist() == [15 / 4]
    assert trimmed_mean(column(0, 1, 2, 12), 0.25).tolist() == [1.5]


@pytest.mark.parametrize(("fraction", "clients", "cut"), [(0.29, 100, 29), (0.2, 5, 1), (0.1, 30, 3), (0.07, 100, 7), (0.35, 20, 7)])
def test_a_fraction_cuts_as_many_as_it_says_in_spite_of_rounding(fraction, clients, cut):
    """0.29 * 100 is 28.999999999999996 in floating point."""
    values = torch.arange(clients, dtype=torch.float64).square()[:, None]
    assert trimmed_mean(values, fraction).item() == pytest.approx(values[cut : clients - cut].mean().item(), rel=1e-12)


def test_krums_scores_are_sums_of_the_smallest_squared_distances():
    # five clients on a line; one may lie, so each adds up its 5 - 1 - 2 = 2 smallest
    scores = krum_scores(column(0, 1, 3, 4, 20), byzantine=1)
    assert scores.tolist() == [1 + 9, 1 + 4, 1 + 4, 1 + 9, 256 + 289]


def test_krum_takes_the_whole_model_that_lies_nearest_to_others():
    answers = [{"a": column(x), "b": column(y)} for x, y in ((0, 0), (0.1, 0), (0.3, 0.1), (0, 9), (9, 0))]
    best = Krum(byzantine=1).combine(answers)
    assert (best["a"].item(), best["b"].item()) == (0.1, 0)


def test_multi_krum_averages_the_best():
    answers = [{"a": column(x)} for x in (0, 1, 3, 4, 20)]
    assert Krum(byzantine=1, selected=2).combine(answers)["a"].item() == 2
    assert Krum(byzantine=1, selected=4).combine(answers)["a"].item() == 2
    assert Krum(byzantine=1, selected=5).combine(answers)["a"].item() == pytest.approx(28 / 5)


@pytest.mark.parametrize(
    ("clients", "byzantine", "fits"), [(3, 0, True), (2, 0, False), (5, 1, True), (4, 1, False), (7, 2, True), (6, 2, False)]
)
def test_krum_needs_two_f_plus_three_clients(clients, byzantine, fits):
    answers = [{"a": column(float(i))} for i in range(clients)]
    if fits:
        Krum(byzantine=byzantine).combine(answers)
    else:
        with pytest.raises(AggregationError, match=f"needs at least {2 * byzantine + 3} answers, got {clients}"):
            Krum(byzantine=byzantine).combine(answers)


def test_krum_cannot_average_more_models_than_there_are():
    with pytest.raises(AggregationError, match="selected = 4 models but got 3"):
        Krum(selected=4).combine([{"a": column(float(i))} for i in range(3)])


@pytest.mark.parametrize("fraction", [-0.1, 0.5, 0.9])
def test_a_trim_fraction_that_leaves_nothing_is_refused(fraction):
    with pytest.raises(ExperimentError, match="trim_fraction"):
        resolve(TrimmedMean, {"trim_fraction": fraction}, "strategy", frozenset({"seed"}))


# ---- every array, block by block ----------------------------------------------------------------------------------------


def test_coordinates_are_handled_in_blocks_that_do_not_show(monkeypatch):
    rng = generator(0)
    answers = [{"a": torch.randn(5, 7, generator=rng), "b": torch.randn((), generator=rng), "c": torch.zeros(0)} for _ in range(4)]
    whole = by_coordinate(answers, median)
    monkeypatch.setattr(robust, "BLOCK", 3)
    pieces = by_coordinate(answers, median)
    for name, like in answers[0].items():
        expected = np.median(np.stack([answer[name].numpy() for answer in answers]), axis=0).astype(np.float32)
        assert pieces[name].shape == like.shape
        assert torch.equal(pieces[name], whole[name])
        assert np.array_equal(whole[name].numpy(), expected)


def test_integers_are_rounded_and_keep_their_type():
    answers = [{"n": torch.tensor([n, 10 * n])} for n in (1, 2, 4, 9)]
    found = by_coordinate(answers, median)["n"]
    assert found.dtype == torch.int64
    assert found.tolist() == [3, 30]


def test_a_collection_counts_its_answers_and_ignores_weights():
    collection = Collection(FedMedian().combine)
    for weight, value in ((100.0, 1.0), (1.0, 2.0), (1.0, 3.0)):
        collection.add({"a": column(value)}, weight)
    assert collection.count == 3
    assert collection.result()["a"].item() == 2


# ---- a minority of liars ------------------------------------------------------------------------------------------------


@quick
@given(honest=arrays(np.float64, st.tuples(st.integers(1, 6), st.just(3)), elements=numbers), data=st.data())
def test_the_median_stays_among_the_honest_whatever_a_minority_says(honest, data):
    liars = data.draw(arrays(np.float64, (data.draw(st.integers(0, len(honest) - 1)), 3), elements=lies))
    found = median(torch.from_numpy(np.concatenate([honest, liars]))).numpy()
    assert (found >= honest.min(0)).all()
    assert (found <= honest.max(0)).all()


@quick
@given(honest=arrays(np.float64, st.tuples(st.integers(1, 6), st.just(3)), elements=numbers), data=st.data())
def test_the_trimmed_mean_stays_among_the_honest_if_it_cuts_as_many_as_lie(honest, data):
    liars = data.draw(arrays(np.float64, (data.draw(st.integers(0, len(honest) - 1)), 3), elements=lies))
    together = torch.from_numpy(np.concatenate([honest, liars]))
    found = trimmed_mean(together, len(liars) / len(together)).numpy()
    assert (found >= honest.min(0) - 1e-9).all()
    assert (found <= honest.max(0) + 1e-9).all()


@quick
@given(seed=st.integers(0, 2**32), byzantine=st.integers(1, 3), together=st.booleans(), scale=st.floats(10, 1e6))
def test_krum_takes_an_honest_model_when_the_honest_agree(seed, byzantine, together, scale):
    rng = generator(seed)
    honest = torch.randn(byzantine + 3, 4, generator=rng).double()
    lie = scale * (1 + torch.rand(1 if together else byzantine, 4, generator=rng).double())
    vectors = torch.cat([lie.expand(byzantine, 4), honest])
    order = torch.randperm(len(vectors), generator=rng)
    best = order[krum_scores(vectors[order], byzantine).argmin()].item()
    assert best >= byzantine, "a liar"


@quick
@given(values=arrays(np.float64, st.tuples(st.integers(5, 8), st.just(4)), elements=numbers), seed=st.integers(0, 2**32))
def test_the_order_of_the_answers_does_not_matter(values, seed):
    vectors = torch.from_numpy(values)
    order = torch.randperm(len(vectors), generator=generator(seed))
    assert torch.equal(median(vectors[order]), median(vectors))
    assert torch.equal(trimmed_mean(vectors[order], 0.25), trimmed_mean(vectors, 0.25))
    assert torch.allclose(krum_scores(vectors[order], 1), krum_scores(vectors, 1)[order], rtol=1e-9)


# ---- whole rounds ---------------------------------------------------------------------------------------------------------


class Toy(Classifier):
    """A tiny classifier."""

    def build(self, spec=None, rng=None):
        with torch.random.fork_rng():
            torch.manual_seed(2)
            return MLP((1, 2, 3), (5,), 3)


def parts_of(*sizes):
    parts = []
    for silo, n in enumerate(sizes):
        rng = generator(3, "examples", silo)
        parts.append(Examples({"image": torch.randn(n, 1, 2, 3, generator=rng), "label": torch.randint(3, (n,), generator=rng)}))
    return parts


LIAR = 9
"""The number of examples by which the test knows its liar, the second of five clients."""


@pytest.mark.parametrize("strategy", [FedMedian(), TrimmedMean(trim_fraction=0.2), Krum(byzantine=1)], ids=["median", "trimmed", "krum"])
def test_a_round_with_a_liar_stays_among_the_honest(federate, strategy):
    learner = Toy()
    federation = federate(strategy, learner, learner.build(), parts_of(7, LIAR, 5, 6, 8))
    honest = strategy.client_update

    def update(silo, content):
        answer = honest(silo, content)
        if len(silo.train) != LIAR:
            return answer
        return Update({"arrays": {name: -1e6 * tensor - 1e6 for name, tensor in answer.records["arrays"].items()}}, answer.metrics)

    strategy.client_update = update
    federation.round(1)
    told = [answer["arrays"] for client, answer in enumerate(federation.answers()) if client != 1]
    for name, found in federation.arrays.items():
        stacked = torch.stack([answer[name] for answer in told])
        assert (found >= stacked.amin(0)).all() and (found <= stacked.amax(0)).all(), name
    assert any(not torch.equal(federation.arrays[name], tensor) for name, tensor in learner.build().state_dict().items())


@pytest.mark.parametrize("kind", [FedMedian, TrimmedMean, Krum])
def test_clients_count_equally_and_nothing_else_can_be_asked_for(kind):
    assert kind().weight_by == "clients"
    with pytest.raises(ExperimentError, match="weight_by"):
        resolve(kind, {"weight_by": "examples"}, "strategy", frozenset({"seed"}))
