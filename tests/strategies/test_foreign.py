"""Flower's own strategies run by their dotted names, reproducibly, and agree with ours where the mathematics is the same."""

import random

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from torch import nn

from benchmarks import run
from fedvision.arrays import pack
from fedvision.data import Examples, FederatedData
from fedvision.errors import AggregationError, ExperimentError
from fedvision.experiment import Experiment
from fedvision.learners.classifier import Classifier
from fedvision.models import MLP
from fedvision.registry import strategies
from fedvision.seeds import generator
from fedvision.settings import resolve
from strategies.fedavg import FedAvg
from strategies.foreign import Foreign, adapted

SUPPLIED = frozenset({"seed"})


class Toy(Classifier):
    """A tiny classifier."""

    def build(self, spec=None, rng=None):
        with torch.random.fork_rng():
            torch.manual_seed(2)
            return MLP((1, 2, 3), (5,), 3)


class Normalized(Toy):
    """With BatchNorm, whose state has a counter."""

    def build(self, spec=None, rng=None):
        with torch.random.fork_rng():
            torch.manual_seed(2)
            return nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))


def parts_of(*sizes):
    parts = []
    for silo, n in enumerate(sizes):
        rng = generator(3, "examples", silo)
        parts.append(Examples({"image": torch.randn(n, 1, 2, 3, generator=rng), "label": torch.randint(3, (n,), generator=rng)}))
    return parts


def built(name, seed=0, **settings):
    """A strategy from its settings, as an experiment builds it."""
    target = strategies.find(name)
    return target(**resolve(target, settings, "strategy", SUPPLIED), seed=seed)


def foreign(name, seed=0, **settings):
    return built(f"flwr.serverapp.strategy:{name}", seed, **settings)


# ---- the same mathematics -----------------------------------------------------------------------------------------------

PAIRS = {
    "FedAvg": ({}, "fedavg", {}),
    "FedMedian": ({}, "fedmedian", {}),
    "FedTrimmedAvg": ({"beta": 0.25}, "trimmed-mean", {"trim_fraction": 0.25}),
    "FedAvgM": ({"server_learning_rate": 0.5, "server_momentum": 0.8}, "fedavgm", {"server_lr": 0.5, "momentum": 0.8}),
    "FedYogi": (
        {"eta": 0.02, "beta_1": 0.8, "beta_2": 0.9, "tau": 0.01},
        "fedyogi",
        {"server_lr": 0.02, "beta1": 0.8, "beta2": 0.9, "tau": 0.01},
    ),
    "MultiKrum": ({"num_malicious_nodes": 1, "num_nodes_to_select": 2}, "krum", {"byzantine": 1, "selected": 2}),
}


@pytest.mark.parametrize("name", list(PAIRS))
def test_a_flower_strategy_agrees_with_ours(federate, name):
    theirs, our_name, ours = PAIRS[name]
    local = {"epochs": 2, "batch_size": 4, "client_optimizer": {"name": "SGD", "lr": 0.2}}
    learner, parts = Toy(), parts_of(7, 7, 7, 7, 7) if name == "MultiKrum" else parts_of(7, 5, 9, 4, 6)
    one = federate(foreign(name, **theirs, **local), learner, learner.build(), parts)
    other = federate(built(our_name, **ours, **local), learner, learner.build(), parts)
    for number in (1, 2, 3):
        metrics, expected = one.round(number), other.round(number)
    for array, tensor in other.arrays.items():
        assert torch.allclose(one.arrays[array], tensor, rtol=1e-4, atol=1e-6), array
        assert not torch.allclose(learner.build().state_dict()[array], tensor, rtol=1e-4, atol=1e-6), array
    if other.strategy.weight_by == "examples":
        assert metrics["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-6)


# ---- a run ----------------------------------------------------------------------------------------------------------------


def small_data():
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(8, 1, 2, 3)).astype(np.float32), np.arange(8) % 2) for _ in range(7)]
    return FederatedData.from_arrays(pairs[:6], test=pairs[6])


def played(path, seed):
    tables = {
        "name": "foreign",
        "seed": seed,
        "rounds": 4,
        "checkpoint_every": 4,
        "tensorboard": False,
        "data": {"name": "digits"},
        "partition": {"name": "iid", "clients": 6},
        "learner": {"name": "classifier", "hidden": [3]},
        "strategy": {"name": "flwr.serverapp.strategy:FedAvg", "fraction_train": 0.4},
    }
    return run(Experiment.from_tables(tables), data=small_data(), out=path)


def test_a_run_with_partial_participation_can_be_repeated(tmp_path):
    random.seed(1)
    one = played(tmp_path / "one", seed=0)
    random.seed(2)
    two, other = played(tmp_path / "two", seed=0), played(tmp_path / "other", seed=5)
    assert all(torch.equal(one.state[name], two.state[name]) for name in one.state)
    assert one.rounds["train_loss"][1:].tolist() == two.rounds["train_loss"][1:].tolist()
    assert one.rounds["train_loss"][1:].tolist() != other.rounds["train_loss"][1:].tolist()
    assert one.rounds["clients"].tolist() == [0, 2, 2, 2, 2]


def test_other_cohorts_are_drawn_in_other_rounds_and_for_other_seeds(federate):
    def cohorts(seed):
        federation = federate(foreign("FedAvg", seed, fraction_train=0.4), Toy(), Toy().build(), parts_of(7, 5, 9, 4, 6))
        drawn = []
        for number in range(1, 6):
            federation.round(number)
            drawn.append(federation.strategy.cohort)
        return drawn

    drawn = cohorts(0)
    assert all(len(set(cohort)) == 2 and cohort == sorted(cohort) for cohort in drawn)
    assert len(set(map(tuple, drawn))) > 1
    assert cohorts(0) == drawn != cohorts(1)


def test_some_of_the_clients_evaluate_if_the_strategy_says_so(federate):
    federation = federate(foreign("FedAvg", fraction_evaluate=0.4), Toy(), Toy().build(), parts_of(7, 5, 9, 4, 6))

    def asked(number):
        with federation.grid:
            messages = federation.strategy.configure_evaluate(number, pack(federation.arrays), ConfigRecord(), federation.grid)
        return sorted(message.metadata.dst_node_id for message in messages)

    assert [len(asked(number)) for number in range(4)] == [2, 2, 2, 2]
    assert [asked(number) for number in range(4)] == [asked(number) for number in range(4)]


def test_pythons_global_generator_stays_as_it_was(federate):
    federation = federate(foreign("FedAvg", fraction_train=0.4), Toy(), Toy().build(), parts_of(7, 5, 9, 4, 6))
    before = random.getstate()
    federation.round(1)
    assert random.getstate() == before


# ---- settings ---------------------------------------------------------------------------------------------------------


def test_settings_of_the_strategy_and_of_its_clients_share_a_table(federate):
    strategy = foreign("FedTrimmedAvg", beta=0.3, epochs=3, batch_size=2, shuffle=False, client_optimizer={"lr": 0.5})
    assert strategy._strategy.beta == 0.3
    assert strategy._clients == FedAvg(epochs=3, batch_size=2, shuffle=False, client_optimizer={"name": "SGD", "lr": 0.5})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 1}, "strategy.gamma: FedTrimmedAvg has no such setting"),
        ({"beta": "much"}, "strategy.beta = 'much': expected number"),
        ({"batch_size": 0}, "strategy.batch_size = 0: expected whole number >= 1"),
        ({"client_optimizer": {"name": "Sgd"}}, "unknown optimizer 'Sgd'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ExperimentError, match=message):
        foreign("FedTrimmedAvg", **settings)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("collections:OrderedDict", "OrderedDict.* is no flwr.serverapp.strategy.Strategy"),
        ("math:sqrt", "sqrt.* is no flwr.serverapp.strategy.Strategy"),
        ("math:pi", "neither a class nor a function"),
        ("flwr.serverapp.strategy:FedNothing", "cannot be imported"),
        ("no.such.module:Strategy", "cannot be imported"),
    ],
)
def test_what_is_no_strategy_is_refused(name, message):
    with pytest.raises(ExperimentError, match=message):
        strategies.find(name)


def test_a_strategy_of_this_project_is_taken_as_it_is():
    assert adapted(FedAvg) is FedAvg
    assert strategies.find("strategies.fedavg:FedAvg") is FedAvg


class Seeded(flower.FedAvg):
    """A foreign strategy with a seed of its own."""

    def __init__(self, seed: int = 7, fraction_train: float = 1.0) -> None:
        super().__init__(fraction_train=fraction_train)
        self.seed = seed


def test_a_foreign_strategy_that_wants_a_seed_gets_the_experiments():
    strategy = adapted(Seeded)(seed=3, fraction_train=0.5)
    assert isinstance(strategy, Foreign)
    assert strategy.seed == strategy._strategy.seed == 3


# ---- what may go wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["min_available_nodes", "min_train_nodes", "min_evaluate_nodes"])
def test_too_few_clients_are_an_error_and_not_waited_for(federate, setting):
    federation = federate(foreign("FedAvg", **{setting: 3}), Toy(), Toy().build(), parts_of(7, 5))
    with pytest.raises(AggregationError, match=f"2 clients are connected, strategy.{setting} = 3"):
        federation.round(1)


@pytest.mark.parametrize("name", ["FedAvg", "FedMedian", "FedTrimmedAvg"])
def test_counters_of_the_model_keep_their_type(federate, name):
    """Flower's means of integers are floats; a second round would refuse every client."""
    federation = federate(foreign(name, batch_size=4), Normalized(), Normalized().build(), parts_of(8, 8, 16))
    for number in (1, 2):
        federation.round(number)
    counter = federation.arrays["2.num_batches_tracked"]
    assert counter.dtype == torch.int64
    assert counter.item() == {"FedAvg": 6, "FedMedian": 4, "FedTrimmedAvg": 6}[name]


def test_an_answer_that_cannot_be_used_is_refused_by_name(federate):
    strategy = foreign("FedAvg")
    federation = federate(strategy, Toy(), Toy().build(), parts_of(7, 5, 9))
    honest = strategy.client_update

    def update(silo, content):
        answer = honest(silo, content)
        if len(silo.train) == 5:
            next(iter(answer.records["arrays"].values())).fill_(torch.nan)
        return answer

    strategy.client_update = update
    federation.round(1, failures=1)
    assert strategy.failures[0].client == 1
    assert "NaN" in strategy.failures[0].reason
    assert strategy.answered == 2
    assert all(tensor.isfinite().all() for tensor in federation.arrays.values())


class Idle(flower.FedAvg):
    """Aggregates nothing."""

    def aggregate_train(self, server_round, replies) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return None, None


def test_a_strategy_that_aggregates_nothing_stops_the_run(federate):
    federation = federate(adapted(Idle)(), Toy(), Toy().build(), parts_of(7, 5))
    with pytest.raises(AggregationError, match="round 1: Idle aggregated nothing from 2 answers"):
        federation.round(1)
