"""Every registered strategy passes `check_strategy`, and `check_strategy` catches strategies that are spoilt in one respect."""

import copy
import random
from dataclasses import dataclass, field, replace

import pytest
import torch

from clients.cohort import Cohort
from fedvision.arrays import TensorArray, pack, unpack
from fedvision.registry import strategies
from fedvision.silo import Silo
from server.checkpoint import Checkpoint
from strategies.check import CHECKS, FAULTS, Case, check_strategy
from strategies.fedavg import FedAvg
from strategies.fedsgd import FedSGD
from strategies.strategy import Update, batchable, obstacle

NAMES = strategies.names()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_every_registered_strategy(name, check):
    check(Case(strategies.find(name), Silo, {}, Cohort))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fedsgd", {"server_optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9}, "weight_by": "examples", "chunk_size": 3}),
        ("geometric", {"agreement_threshold": 0.3}),
        ("fedavg", {"steps": 3, "shuffle": False, "client_optimizer": {"name": "Adam"}}),
    ],
)
def test_other_settings_conform(name, settings):
    check_strategy(name, Silo, Cohort, **settings)


def test_those_without_private_state_and_looks_into_the_model_may_answer_together():
    alone = {name for name in NAMES if obstacle(strategies.find(name)()) is not None}
    assert alone == {"fedcurv", "fishr", "fishr-inter-geo", "fishr-intra-arith", "fishr-intra-geo", "scaffold"}


def test_a_strategy_may_be_named_by_its_module():
    check_strategy("strategies.fedavg:FedAvg", Silo, Cohort)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_survives_a_checkpoint(name, tmp_path):
    case = Case(strategies.find(name), Silo, {})
    federation = case.federation()
    federation.rounds(1, 2)
    kept = Checkpoint(2, "x", federation.arrays, copy.deepcopy(federation.strategy.state()), federation.grid.client_states())
    kept.save(tmp_path / "checkpoint")
    loaded = Checkpoint.load(tmp_path / "checkpoint")
    assert all(torch.equal(loaded.arrays[key], value) for key, value in federation.arrays.items())
    resumed = federation.resumed(case.strategy(), loaded.strategy, case)
    resumed.grid.load_client_states(loaded.clients)
    expected, arrays = federation.rounds(3, 4), resumed.rounds(3, 4)
    assert all(torch.equal(arrays[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_says_whether_its_clients_remember(name):
    federation = Case(strategies.find(name), Silo, {}).federation()
    federation.rounds(1)
    assert bool(federation.grid.client_states()) == bool(federation.strategy.client_memory)


# ---- spoilt strategies ----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Sound(FedAvg):
    """A strategy that others spoil in one respect each."""


@dataclass(kw_only=True)
class Nameless(FedAvg): ...


Nameless.__doc__ = ""


@dataclass(kw_only=True)
class Lazy(Sound):
    """Its server keeps the old model."""

    def server_update(self, arrays, aggregates):
        return arrays


@dataclass(kw_only=True)
class Renaming(Sound):
    """Its model grows."""

    def server_update(self, arrays, aggregates):
        return {**aggregates["arrays"], "velocity": torch.zeros(1)}


@dataclass(kw_only=True)
class Widening(Sound):
    """Its model becomes float64."""

    def server_update(self, arrays, aggregates):
        return {name: tensor.double() for name, tensor in aggregates["arrays"].items()}


@dataclass(kw_only=True)
class Exploding(Sound):
    """Its model overflows."""

    def server_update(self, arrays, aggregates):
        return {name: tensor / 0 for name, tensor in aggregates["arrays"].items()}


@dataclass(kw_only=True)
class InPlace(Sound):
    """It overwrites the arrays it was given."""

    def server_update(self, arrays, aggregates):
        for name, tensor in arrays.items():
            tensor.copy_(aggregates["arrays"][name])
        return {name: tensor.clone() for name, tensor in arrays.items()}


@dataclass(kw_only=True)
class Silent(Sound):
    """It reports no loss."""

    def client_update(self, silo, content):
        return Update(super().client_update(silo, content).records)


@dataclass(kw_only=True)
class Gambling(Sound):
    """Its clients draw from Python's generator."""

    def client_update(self, silo, content):
        update = super().client_update(silo, content)
        return Update({"arrays": {name: tensor + random.random() for name, tensor in update.records["arrays"].items()}}, update.metrics)


@dataclass(kw_only=True)
class Mixing(Sound):
    """Its clients, if they answer together, answer with their mean."""

    @batchable
    def client_update(self, silo, content):
        update = super().client_update(silo, content)
        if torch.is_tensor(update.metrics["train_loss"]):
            arrays = {name: tensor.mean(0).expand_as(tensor) for name, tensor in update.records["arrays"].items()}
            return Update({"arrays": arrays}, update.metrics)
        return update


class LastOne:
    """Keeps the last answer."""

    count = 0

    def add(self, update, weight=1.0):
        self.count, self.last = self.count + 1, dict(update)

    def result(self):
        return self.last


@dataclass(kw_only=True)
class LastAnswers(Sound):
    """Its model is that of the client who answers last."""

    def accumulators(self):
        return {"arrays": LastOne()}


@dataclass(kw_only=True)
class Transport(Sound):
    """Clients count by their examples only if their arrays were serialized."""

    def _weight(self, content):
        return 1.0 if isinstance(next(iter(content["arrays"].values())), TensorArray) else super()._weight(content)


@dataclass(kw_only=True)
class Credulous(Sound):
    """It takes every answer that is no error, and every client as often as it likes."""

    def _accepted(self, replies, fault):
        return (reply for reply in replies if not reply.has_error())


@dataclass(kw_only=True)
class Unforgiving(Sound):
    """It goes on without answers."""

    def _require(self, answers, server_round):
        pass

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        if all(reply.has_error() for reply in replies):
            return pack(self._arrays), None
        return super().aggregate_train(server_round, replies)


@dataclass(kw_only=True)
class Forgetful(Sound):
    """It counts its rounds, and does not tell."""

    seen: int = field(default=0, init=False)

    def server_update(self, arrays, aggregates):
        self.seen += 1
        return {name: tensor * (1 + self.seen) for name, tensor in aggregates["arrays"].items()}


@dataclass(kw_only=True)
class Unkeepable(Sound):
    """Its state is a set."""

    def state(self):
        return {"clients": [{1, 2}]}


@dataclass(kw_only=True)
class Deaf(Sound):
    """It does not load its state."""

    seen: int = field(default=0, init=False)

    def server_update(self, arrays, aggregates):
        self.seen += 1
        return aggregates["arrays"]

    def state(self):
        return {"seen": self.seen}


@dataclass(kw_only=True)
class Unnormalized(FedSGD):
    """It drops the clients' buffers."""

    def client_update(self, silo, content):
        update = super().client_update(silo, content)
        return Update({"gradient": update.records["gradient"]}, update.metrics)


@dataclass(kw_only=True)
class Everyone(Sound):
    """All clients train, whatever the fraction."""

    def _sample(self, server_round, purpose, fraction, grid):
        return super()._sample(server_round, purpose, 1.0, grid)


@dataclass(kw_only=True)
class Favorites(Sound):
    """The same clients train in every round."""

    def _sample(self, server_round, purpose, fraction, grid):
        return super()._sample(1, purpose, fraction, grid)


@dataclass(kw_only=True)
class Seedless(Sound):
    """Its cohorts do not depend on the seed."""

    def _sample(self, server_round, purpose, fraction, grid):
        self.seed = 0
        return super()._sample(server_round, purpose, fraction, grid)


@dataclass(kw_only=True)
class NeedsOurLoop(Sound):
    """Its clients read what Flower's loop does not send."""

    def client_update(self, silo, content):
        update = super().client_update(silo, content)
        factor = 1 + float(content["config"].get("progress", 0.0))
        return Update(
            {"arrays": {name: (tensor * factor).to(tensor.dtype) for name, tensor in update.records["arrays"].items()}}, update.metrics
        )


@dataclass(kw_only=True)
class SharedMemory(Sound):
    """Its clients look at what its server remembers, which only works in one process."""

    seen: int = field(default=0, init=False)

    def server_update(self, arrays, aggregates):
        self.seen += 1
        return aggregates["arrays"]

    def client_update(self, silo, content):
        assert content["config"]["server-round"] == self.seen + 1, "out of step"
        return super().client_update(silo, content)


@dataclass(kw_only=True)
class HoldingBack(Sound):
    """Its clients send back what they did not train."""

    @batchable
    def client_update(self, silo, content):
        return replace(super().client_update(silo, content), untrained=frozenset())


@dataclass(kw_only=True)
class Drifting(Sound):
    """Its server forgets a little of everything."""

    def server_update(self, arrays, aggregates):
        following = {**arrays, **aggregates["arrays"]}
        return {name: 0.9 * tensor if tensor.is_floating_point() else tensor for name, tensor in following.items()}


SPOILT = {
    Nameless: "docstring has no first line",
    Lazy: "changes nothing in round 1",
    Renaming: "turns the arrays",
    Widening: "turns array",
    Exploding: "NaN or infinite in round 1",
    InPlace: "writes into the arrays|changes nothing",
    Silent: "reports the training loss nan",
    Gambling: "draw from silo.rng",
    Mixing: "declared batchable, but client 0 gives another array arrays/hidden1.weight among others than alone",
    LastAnswers: "depends on the order",
    Transport: "other numbers when its arrays are serialized",
    Credulous: "client 0 sends a NaN",
    Unforgiving: "goes on with",
    Forgetful: "remembers something that is not in its state",
    Unkeepable: r"state\['clients'\]\[0\] is a set",
    Deaf: "loads a state and gives back another",
    Unnormalized: "drops the clients' buffers",
    Everyone: "fraction = 0.6 of 5 clients draws",
    Favorites: "draws the same cohort",
    Seedless: "for another seed",
    NeedsOurLoop: "other numbers in Flower's own loop",
    SharedMemory: "out of step",
    HoldingBack: "did not train 'aside.weight' hold it back",
    Drifting: "moves 'aside.weight', which nobody trained",
}


def test_the_sound_strategy_conforms():
    check_strategy(Sound, Silo, Cohort)


@pytest.mark.parametrize("kind", SPOILT, ids=lambda kind: kind.__name__)
def test_the_suite_catches_a_strategy_that_is(kind):
    with pytest.raises(Exception, match=SPOILT[kind]) as caught:
        check_strategy(kind, Silo, Cohort)
    assert isinstance(caught.value, AssertionError) or "out of step" in str(caught.value)


def test_the_suite_says_who_answers_twice():
    class Twice(Sound):
        """It counts every answer."""

        def _accepted(self, replies, fault):
            for reply in replies:
                yield from super()._accepted([reply], fault)

    with pytest.raises(AssertionError, match="client 0 answers twice"):
        check_strategy(Twice, Silo)


def test_a_refused_answer_is_noted_with_its_client():
    case = Case(Sound, Silo, {})
    federation = case.federation()
    federation.round(1, {3: FAULTS["a NaN"]})
    [failure] = federation.strategy.failures
    assert failure.client == 3
    assert "holds NaN or infinite values" in failure.reason
    assert all(tensor.isfinite().all() for tensor in unpack(pack(federation.arrays)).values())
