"""Clients that train together give what each gives alone, or are refused with a reason and a remedy."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedMedian as FlowerMedian
from torch import Tensor, nn

from clients.app import app as client_app
from clients.batching import check_batchable
from clients.cohort import Cohort
from fedvision.arrays import metrics_of, pack, unpack
from fedvision.assembly import Assembly, installed
from fedvision.data import Examples, FederatedData, Spec
from fedvision.data.federated import Silos
from fedvision.errors import EngineError
from fedvision.grids.in_process import InProcessGrid
from fedvision.holdings import Holdings
from fedvision.learners.classifier import Classifier, cross_entropy
from fedvision.learners.learner import Learner, Loss, mean_over_examples
from fedvision.models import MLP
from fedvision.seeds import generator
from fedvision.silo import Silo
from strategies.fedavg import FedAvg
from strategies.fedopt import FedAdam
from strategies.fedprox import FedProx
from strategies.fedsgd import FedSGD
from strategies.foreign import adapted
from strategies.geometric import Geometric
from strategies.robust import FedMedian
from strategies.strategy import Strategy, Update, batchable, obstacle

SMALL, LARGE = Spec((1, 4, 4), 3), Spec((3, 16, 16), 3)
RUNS = count(77_000)

ADAM = {"name": "Adam", "lr": 0.01}
MOMENTUM = {"name": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def examples(spec: Spec, n: int, seed: int) -> Examples:
    return Examples({"image": torch.rand(n, *spec.image_shape, generator=generator(seed)), "label": torch.arange(n) % spec.classes})


@dataclass(frozen=True)
class Pair:
    """The same clients, one by one and as a cohort."""

    learner: Learner
    sizes: tuple[int, ...]
    spec: Spec = SMALL

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", self.learner.build(self.spec, generator(0)))
        object.__setattr__(self, "arrays", dict(Holdings.of(self.learner, self.model).shared))
        object.__setattr__(self, "trains", [examples(self.spec, n, i) for i, n in enumerate(self.sizes)])

    def alone(self, client: int) -> Silo:
        return Silo(self.learner, self.model, self.arrays, self.trains[client], None, generator(client), 0.5)

    def together(self) -> Cohort:
        rngs = [generator(client) for client, _ in enumerate(self.sizes)]
        return Cohort(self.learner, self.model, self.arrays, Silos.of(self.trains), range(len(self.sizes)), rngs, 0.5)

    def assert_agree(self, strategy: Strategy) -> None:
        """What a strategy's clients answer, metrics and parts of the loss too, is the same within 1e-5."""
        cohort = self.together()
        update = strategy.client_update(cohort, RecordDict())
        answers = Update(update.records, {**update.metrics, **cohort.loss_parts()}).parted(len(self.sizes))
        for client, answer in enumerate(answers):
            silo = self.alone(client)
            expected = strategy.client_update(silo, RecordDict())
            assert answer.metrics == pytest.approx({**expected.metrics, **silo.loss_parts()}, abs=1e-5)
            assert answer.records.keys() == expected.records.keys()
            for record, arrays in expected.records.items():
                assert answer.records[record].keys() == arrays.keys()
                for name, array in arrays.items():
                    assert torch.allclose(answer.records[record][name], array, rtol=0, atol=1e-5), (client, record, name)


@dataclass(frozen=True, kw_only=True)
class Noisy(Classifier):
    """Its views are drawn, and its loss has parts."""

    def train_view(self, batch, rng):
        noise = torch.rand(batch.image.shape, generator=rng)
        return Examples({**batch.fields, "image": batch.image + noise, "strength": noise.flatten(1).mean(1)})

    @mean_over_examples
    def loss(self, model, batch, progress, rng):
        total = cross_entropy(model(batch.image), batch.label).mean()
        return Loss(total * (1 + progress), {"class": total, "strength": batch.fields["strength"].mean()})


STRATEGIES = {
    "fedsgd": FedSGD(),
    "fedsgd in chunks": FedSGD(chunk_size=3),
    "geometric": Geometric(chunk_size=5),
    "fedavg": FedAvg(batch_size=4, epochs=2),
    "fedavg in the data's order": FedAvg(batch_size=4, epochs=2, shuffle=False),
    "fedavg with momentum and weight decay": FedAvg(batch_size=4, epochs=3, client_optimizer=MOMENTUM),
    "fedavg with Adam": FedAvg(batch_size=4, epochs=3, client_optimizer=ADAM),
    "fedavg by steps": FedAvg(batch_size=4, steps=7, client_optimizer=ADAM),
    "fedavg with RMSprop": FedAvg(batch_size=4, client_optimizer={"name": "RMSprop", "lr": 0.01}),
    "fedprox": FedProx(batch_size=4, epochs=3, mu=1.0, client_optimizer=MOMENTUM),
    "fedadam": FedAdam(batch_size=4),
    "fedmedian": FedMedian(batch_size=4),
    "a strategy of Flower's": adapted(FlowerMedian)(batch_size=4, epochs=2),
}
SIZES = {"equal sizes": (8, 8, 8), "a short last batch": (10, 10), "unequal sizes": (3, 8, 13, 17)}


# ---- agreement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())
def test_clients_together_answer_as_they_do_alone(strategy, sizes):
    Pair(Classifier(hidden=(8, 8)), sizes).assert_agree(strategy)


@pytest.mark.parametrize("sizes", [(6, 6), (3, 6)], ids=str)
@pytest.mark.parametrize("name", ["fedsgd in chunks", "fedavg", "fedprox"])
def test_so_do_clients_with_a_cnn(name, sizes):
    Pair(Classifier(model="cnn", hidden=(16, 32, 32)), sizes, LARGE).assert_agree(STRATEGIES[name])


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("name", ["fedsgd in chunks", "fedavg", "fedavg by steps"])
def test_every_client_draws_its_views_from_its_own_generator(name, sizes):
    Pair(Noisy(hidden=(8,)), sizes).assert_agree(STRATEGIES[name])


def test_a_lone_client_may_be_a_cohort():
    Pair(Classifier(hidden=(8,)), (7,)).assert_agree(STRATEGIES["fedavg with Adam"])


def test_a_client_that_has_finished_stays_where_it_is():
    # 1 step of the first client, 12 of the second: momentum, weight decay and moments would go on moving it
    for optimizer in (MOMENTUM, ADAM, {"name": "AdamW", "lr": 0.1, "weight_decay": 0.5}):
        Pair(Classifier(hidden=(8,)), (4, 16)).assert_agree(FedProx(batch_size=4, epochs=3, mu=2.0, client_optimizer=optimizer))


def test_a_client_is_not_moved_by_another_whose_numbers_overflow():
    pair = Pair(Classifier(hidden=(8,)), (4, 4))
    expected = FedAvg(batch_size=4).client_update(pair.alone(0), RecordDict())
    pair.trains[1].image[:] = torch.inf
    answer, broken = FedAvg(batch_size=4).client_update(pair.together(), RecordDict()).parted(2)
    assert broken.records["arrays"]["hidden1.weight"].isnan().any()
    for name, array in expected.records["arrays"].items():
        assert torch.allclose(answer.records["arrays"][name], array, rtol=0, atol=1e-6)


class Odd(nn.Module):
    """Frozen, unused and tied parameters, a module with two names, and buffers that training leaves alone."""

    def __init__(self):
        super().__init__()
        self.classifier, self.tied = nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.tied.weight, self.again = self.classifier.weight, self.classifier
        self.frozen, self.unused = nn.Parameter(torch.ones(16), requires_grad=False), nn.Parameter(torch.ones(2))
        self.register_buffer("scale", torch.full((16,), 0.5))
        self.register_buffer("shift", torch.ones(16), persistent=False)

    def forward(self, x):
        return self.tied(self.again(self.classifier((x.flatten(1) + self.shift) * self.scale * self.frozen)))


@dataclass(frozen=True, kw_only=True)
class Made(Classifier):
    """A classifier whose model is made by a function."""

    make: Callable[[], nn.Module] = Odd

    def build(self, spec, rng):
        return self.make()


@pytest.mark.parametrize("strategy", [FedAvg(batch_size=4, client_optimizer=MOMENTUM), FedSGD(chunk_size=4)], ids=["fedavg", "fedsgd"])
def test_parameters_may_be_frozen_unused_or_tied(strategy):
    pair = Pair(Made(), (5, 8))
    pair.arrays["scale"] = torch.full((16,), 0.25)  # the round's, and not the model's own
    pair.assert_agree(strategy)


def test_training_a_cohort_leaves_the_model_and_the_global_arrays_alone():
    pair = Pair(Classifier(hidden=(8,)), (4, 6))
    before = {name: array.clone() for name, array in pair.arrays.items()}
    FedAvg(batch_size=4).client_update(pair.together(), RecordDict())
    assert all(torch.equal(pair.arrays[name], array) for name, array in before.items())
    assert all(torch.equal(pair.model.state_dict()[name], array) for name, array in before.items())


# ---- refusals -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Undeclared(Classifier):
    """A loss that nobody has declared a mean."""

    def loss(self, model, batch, progress, rng):
        return Loss(cross_entropy(model(batch.image), batch.label).mean())


@dataclass(frozen=True, kw_only=True)
class Contrasting(Classifier):
    """A loss that compares the examples of a batch with each other, and pretends not to."""

    @mean_over_examples
    def loss(self, model, batch, progress, rng):
        logits = model(batch.image)
        return Loss((logits - logits.mean(0)).square().mean())


@dataclass(frozen=True, kw_only=True)
class Looking(Classifier):
    """A loss that looks at a value."""

    @mean_over_examples
    def loss(self, model, batch, progress, rng):
        total = cross_entropy(model(batch.image), batch.label).mean()
        return Loss(total if total.item() > 0 else -total)


class Dropping(MLP):
    """An MLP with dropout."""

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Normalized(nn.Sequential):
    """A model with BatchNorm."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.BatchNorm1d(32), nn.Linear(32, 2))


def learner(kind: type, **settings: Any) -> dict[str, Any]:
    return {"learner": {"name": f"{__name__}:{kind.__name__}", **settings}}


def strategy(name: str, **settings: Any) -> dict[str, Any]:
    return {"strategy": {"name": name, **settings}}


@pytest.fixture
def assembled(experiment, federated, monkeypatch) -> Callable[..., Assembly]:
    """The parts of an experiment that trains two clients at a time."""

    def make(learner: Learner | None = None, data: FederatedData = federated, **changes: Any) -> Assembly:
        if learner is not None:
            monkeypatch.setattr("fedvision.experiment.Experiment.build_learner", lambda self: learner)
        return Assembly.of(experiment(**{"engine": {"batch_clients": 2}, **changes}), data)

    return make


@pytest.fixture(scope="session")
def equal() -> FederatedData:
    """Three clients with 8 examples each."""
    parts = [examples(Spec((2, 4, 4), 2), 8, i) for i in range(3)]
    return FederatedData.from_arrays([(part.image, part.label) for part in parts], test=(parts[0].image, parts[0].label), name="equal")


REFUSED = {
    "keeps state": (strategy("scaffold"), "clients of strategy scaffold must answer one by one, since each client keeps a control variate"),
    "keeps curvature": (strategy("fedcurv"), "strategy fedcurv .* since each client keeps its Fisher information"),
    "looks inside": (strategy("fishr"), "strategy fishr .* since its penalty looks into the model"),
    "closure": (strategy("fedavg", client_optimizer={"name": "LBFGS"}), "the optimizer LBFGS does not move each element on its own"),
    "factored": (strategy("fedavg", client_optimizer={"name": "Adafactor"}), "the optimizer Adafactor does not"),
    "matrices": (strategy("fedprox", client_optimizer={"name": "Muon"}), "the optimizer Muon does not"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_strategy_or_optimizer_is_refused_that(case, assembled):
    changes, reason = REFUSED[case]
    with pytest.raises(EngineError, match=f"(?s)^engine.batch_clients = 2: .*{reason}.*set engine.batch_clients = 1"):
        check_batchable(assembled(**changes))


ODD = {
    "whose loss is not declared a mean, on unequal sizes": (Undeclared(hidden=(4,)), "clients of 8 to 16 examples cannot be stacked"),
    "whose loss is no mean of its examples'": (Contrasting(hidden=(4,)), "the loss .* alone, and .* among others"),
    "that looks at values": (Looking(hidden=(4,)), r"vmap cannot map the training step of learner Looking .*\.item\(\)"),
    "with dropout": (Made(make=lambda: Dropping((2, 4, 4), (4,), 2)), "vmap cannot map .* random operation"),
    "with BatchNorm": (Made(make=Normalized), r"training changes the model's buffer '1.running_mean', as BatchNorm does"),
}


@pytest.mark.parametrize("case", ODD)
def test_a_learner_is_refused(case, assembled):
    odd, reason = ODD[case]
    with pytest.raises(EngineError, match=f"(?s)^engine.batch_clients = 2: .*{reason}.*set engine.batch_clients = 1"):
        check_batchable(assembled(odd, **strategy("fedavg")))


@pytest.mark.parametrize("learner", [Undeclared(hidden=(4,)), Contrasting(hidden=(4,))], ids=lambda learner: type(learner).__name__)
def test_clients_of_equal_sizes_may_have_any_loss(learner, assembled, equal):
    check_batchable(assembled(learner, equal, **strategy("fedavg")))
    Pair(learner, (8, 8)).assert_agree(STRATEGIES["fedavg"])


def test_looking_whether_it_can_be_leaves_no_trace(assembled):
    assembly = assembled(**strategy("fedavg"))
    before = torch.get_rng_state()
    check_batchable(assembly)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(assembly.model.state_dict()[name], array) for name, array in assembly.initial.items())


def test_a_strategy_that_overrides_the_client_half_declares_it_anew():
    @dataclass(kw_only=True)
    class Mine(FedAvg):
        """Another client half."""

        def client_update(self, silo, content):
            return super().client_update(silo, content)

    assert obstacle(FedAvg()) is None
    assert obstacle(Mine()) == "its client_update is not declared @batchable"


USES = {
    "train": lambda silo: len(silo.train),
    "state": lambda silo: silo.state.update(control=1),
    "rng": lambda silo: silo.rng.initial_seed(),
    "loss": lambda silo: silo.loss(silo.model, None),
}


@pytest.mark.parametrize("what", USES)
def test_a_client_half_that_uses_what_is_one_clients_is_told(what):
    cohort = Pair(Classifier(hidden=(4,)), (4, 4)).together()
    with pytest.raises(EngineError, match=rf"declared @batchable uses silo\.{what}.*set engine.batch_clients = 1"):
        USES[what](cohort)


def test_an_answer_without_a_dimension_of_clients_is_refused():
    with pytest.raises(EngineError, match=r"3 clients answer together, but arrays/weight has shape \(2,\)"):
        Update({"arrays": {"weight": torch.ones(2)}}).parted(3)


# ---- over the grid --------------------------------------------------------------------------------------------------


@pytest.fixture
def answered(assembled) -> Callable[..., list[Message]]:
    """Has three clients of 8, 12 and 16 examples answer one message each, so many at a time."""

    def ask(batch_clients: int, learner: Learner | None = None, kind: str = "train", **changes: Any) -> list[Message]:
        assembly, run_id = assembled(learner, **{**strategy("fedavg", batch_size=4), **changes}), next(RUNS)
        content = RecordDict({"arrays": pack(assembly.initial), "config": ConfigRecord({"server-round": 1, "progress": 0.5})})
        with installed(run_id, assembly), InProcessGrid(client_app, {"run-id": run_id}, 3, batch_clients=batch_clients) as grid:
            messages = [Message(content, dst_node_id=node, message_type=kind) for node in range(3)]
            return list(grid.send_and_receive(messages))

    return ask


def weights(reply: Message) -> Tensor:
    return unpack(reply.content["arrays"])["hidden1.weight"]


@pytest.mark.parametrize("batch_clients", [2, 3, 5])
def test_the_grid_gives_the_same_answers_however_many_clients_train_together(answered, batch_clients):
    noisy = Noisy(hidden=(8,))
    for one, other in zip(answered(1, noisy), answered(batch_clients, noisy), strict=True):
        assert one.metadata.src_node_id == other.metadata.src_node_id
        assert metrics_of(other.content) == pytest.approx(metrics_of(one.content), abs=1e-5)
        assert torch.allclose(weights(one), weights(other), rtol=0, atol=1e-5)


def test_one_pass_trains_several_clients(answered, monkeypatch):
    seen = []
    honest = FedAvg.client_update
    noted = batchable(lambda self, silo, content: seen.append(type(silo).__name__) or honest(self, silo, content))
    monkeypatch.setattr(FedAvg, "client_update", noted)
    answered(2)
    assert seen == ["Cohort", "Silo"]


def test_one_failing_client_is_named_and_takes_no_other_down(answered, caplog):
    @dataclass(frozen=True, kw_only=True)
    class Spoilt(Classifier):
        """It cannot stand a client of 12 examples."""

        def train_view(self, batch, rng):
            if batch.image.sum() < 0:
                raise MemoryError("a torn image")
            return batch

    honest = Silos.__getitem__

    def torn(self, client):
        part = honest(self, client)
        return Examples({**part.fields, "image": -part.image}) if len(part) == 12 else part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Silos, "__getitem__", torn)
        replies = answered(3, Spoilt(hidden=(4,)))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert replies[1].error.reason == "MemoryError: a torn image"
    assert "3 clients together raised MemoryError: a torn image; they answer one by one" in caplog.text


def test_a_run_that_cannot_be_batched_is_not_silently_answered_one_by_one(answered):
    with pytest.raises(EngineError, match="strategy scaffold must answer one by one"):
        answered(2, **strategy("scaffold"))


def test_clients_evaluate_one_by_one(answered):
    one, other = ([metrics_of(reply.content) for reply in answered(n, kind="evaluate")] for n in (1, 3))
    assert one == other


def test_a_client_app_without_a_way_to_answer_together_is_refused():
    with pytest.raises(EngineError, match=r"engine.batch_clients = 4, but the client app has no answer_together; set it to 1"):
        InProcessGrid(ClientApp(), {}, 3, batch_clients=4)
