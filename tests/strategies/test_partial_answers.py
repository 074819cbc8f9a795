"""What no gradient reached is left out: a model of two branches, in silos that have data for one of them, the other or both."""

import copy
from dataclasses import dataclass

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.serverapp.strategy import FedMedian as FlowerMedian
from torch import Tensor, nn

from clients.cohort import Cohort
from fedvision.arrays import nbytes, pack, unpack
from fedvision.data import Examples
from fedvision.data.federated import Silos
from fedvision.errors import EngineError
from fedvision.learners.learner import Learner, Loss, mean_over_examples
from fedvision.metrics import Metrics
from fedvision.seeds import generator, global_generators
from fedvision.silo import Silo
from strategies.fedavg import FedAvg
from strategies.fedopt import FedAdam, FedAvgM, FedYogi
from strategies.fedprox import FedProx
from strategies.fedsgd import FedSGD
from strategies.foreign import adapted
from strategies.geometric import Geometric
from strategies.robust import FedMedian
from strategies.scaffold import Scaffold
from strategies.strategy import Inspection, Update

SGD = {"name": "SGD", "lr": 0.1}
ADAMW = {"name": "AdamW", "lr": 0.05, "weight_decay": 0.5}
LEFT, RIGHT, NORM = {"left.weight", "left.bias"}, {"right.weight", "right.bias"}, {"right_norm.weight", "right_norm.bias"}
STATISTICS = {"right_norm.running_mean", "right_norm.running_var", "right_norm.num_batches_tracked"}


class Branches(nn.Module):
    """A trunk, and two branches that are trained on targets of their own; before the second there may be a BatchNorm."""

    def __init__(self, normalized: bool):
        super().__init__()
        self.trunk = nn.Linear(3, 2)
        self.left, self.right = nn.Linear(2, 1), nn.Linear(2, 1)
        self.right_norm = nn.BatchNorm1d(2) if normalized else nn.Identity()

    def forward(self, x: Tensor, targets) -> Tensor:
        h = self.trunk(x).tanh()
        outputs = {"left": lambda: self.left(h), "right": lambda: self.right(self.right_norm(h))}
        return torch.stack([(outputs[name]()[:, 0] - target).square().mean() for name, target in targets.items()]).sum()


@dataclass(frozen=True, kw_only=True)
class Toy(Learner):
    """Trains the branches that a batch has targets for."""

    normalized: bool = False

    def build(self, spec=None, rng=None):
        with global_generators(rng or generator(3)):
            return Branches(self.normalized)

    @mean_over_examples
    def loss(self, model, batch, progress, rng):
        return Loss(model(batch.image, {name: batch.fields[name] for name in ("left", "right") if name in batch}))

    def evaluate(self, model, batch):
        return Metrics(len(batch), {})


def examples(seed: int, n: int, *fields: str) -> Examples:
    rng = generator(seed)
    return Examples({"image": torch.randn(n, 3, generator=rng), **{name: torch.randn(n, generator=rng) for name in fields}})


PARTS = [examples(0, 8, "left"), examples(1, 12, "right"), examples(2, 4, "left", "right"), examples(3, 8, "left")]
ALL_LEFT = [PARTS[0], PARTS[3]]


def locally(model: nn.Module, part: Examples, table: dict, steps: int = 2, mu: float = 0.0) -> nn.Module:
    """A plain loop of full-batch steps; gradients are None where there are none, unless the proximal term gives one."""
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    kind = getattr(torch.optim, table["name"])
    optimizer = kind(model.parameters(), **{key: value for key, value in table.items() if key != "name"})
    for _ in range(steps):
        optimizer.zero_grad()
        loss = Toy().loss(model, part, 0.0, generator(0)).total
        if mu:
            loss = loss + mu / 2 * sum((param - start[name]).square().sum() for name, param in model.named_parameters())
        loss.backward()
        optimizer.step()
    return model


def who_has(name: str) -> list[int]:
    branch = name.partition(".")[0].removesuffix("_norm")
    return [i for i, part in enumerate(PARTS) if branch == "trunk" or branch in part]


# ---- the mean over those who trained it -----------------------------------------------------------------------------


@pytest.mark.parametrize("table", [SGD, ADAMW], ids=lambda table: table["name"])
@pytest.mark.parametrize("weight_by", ["clients", "examples"])
@pytest.mark.parametrize(("kind", "mu"), [(FedAvg, 0.0), (FedProx, 0.7)])
def test_each_array_is_the_mean_over_the_silos_that_trained_it(federate, table, weight_by, kind, mu):
    given = {"mu": mu} if mu else {}
    strategy = kind(epochs=2, batch_size=100, shuffle=False, client_optimizer=table, weight_by=weight_by, **given)
    federation = federate(strategy, Toy(), Toy().build(), PARTS)
    expected = Toy().build()
    for number in (1, 2):
        trained = [dict(locally(copy.deepcopy(expected), part, table, mu=mu).named_parameters()) for part in PARTS]
        weights = [len(part) if weight_by == "examples" else 1 for part in PARTS]
        means = {}
        for name in trained[0]:
            total = sum(weights[i] for i in who_has(name))
            means[name] = sum(weights[i] * trained[i][name].detach() for i in who_has(name)) / total
        expected.load_state_dict(means)
        federation.round(number)
        for name, mean in means.items():
            torch.testing.assert_close(federation.arrays[name], mean)


def test_an_answer_has_what_its_silo_trained_and_says_what_it_leaves_out(federate):
    federation = federate(FedAvg(), Toy(normalized=True), Toy(normalized=True).build(), PARTS)
    federation.round(1)
    sent = [set(answer["arrays"]) for answer in federation.answers()]
    everything = set(federation.arrays)
    assert sent == [everything - RIGHT - NORM - STATISTICS, everything - LEFT, everything, everything - RIGHT - NORM - STATISTICS]
    said = [answer.content.get("untrained") for _, answer in federation.messages]
    assert [set(record["arrays"]) if record else set() for record in said] == [everything - names for names in sent]
    sizes = [nbytes(answer.content) for _, answer in federation.messages]
    assert sizes[0] == sizes[3] < sizes[2] and sizes[1] < sizes[2]


def test_the_statistics_of_a_branch_are_averaged_over_those_who_used_it(federate):
    learner = Toy(normalized=True)
    everybody, users = (federate(FedAvg(), learner, learner.build(), parts) for parts in (PARTS, PARTS[1:3]))
    everybody.round(1)
    users.round(1)
    assert all(torch.equal(everybody.arrays[name], users.arrays[name]) for name in STATISTICS | RIGHT | NORM)
    assert not torch.equal(everybody.arrays["trunk.weight"], users.arrays["trunk.weight"])


STRATEGIES = {
    "fedavg": FedAvg(client_optimizer=ADAMW),
    "fedprox": FedProx(mu=1.0, client_optimizer=ADAMW),
    "fedavgm": FedAvgM(client_optimizer=ADAMW),
    "fedadam": FedAdam(),
    "fedyogi": FedYogi(),
    "fedsgd": FedSGD(server_optimizer=ADAMW),
    "geometric": Geometric(server_optimizer=ADAMW),
}
partial_ones = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())


@partial_ones
def test_what_nobody_trained_keeps_its_bits(federate, strategy):
    federation = federate(copy.deepcopy(strategy), Toy(normalized=True), Toy(normalized=True).build(), ALL_LEFT)
    before = dict(federation.arrays)
    for number in (1, 2):
        federation.round(number)
    still = {name for name, tensor in federation.arrays.items() if torch.equal(tensor, before[name])}
    assert still == RIGHT | NORM | STATISTICS


@partial_ones
def test_a_silo_alone_in_training_an_array_moves_it_as_if_it_were_alone_altogether(federate, strategy):
    parts = [PARTS[0], PARTS[1]]
    both, alone = (federate(copy.deepcopy(strategy), Toy(), Toy().build(), parts) for parts in (parts, parts[1:]))
    both.round(1)
    alone.round(1)
    for name in RIGHT:
        torch.testing.assert_close(both.arrays[name], alone.arrays[name])


@partial_ones
def test_complete_answers_say_nothing_of_what_they_leave_out(federate, strategy):
    federation = federate(copy.deepcopy(strategy), Toy(), Toy().build(), [PARTS[2], PARTS[2]])
    federation.round(1)
    assert all("untrained" not in answer.content for _, answer in federation.messages)


class Idle(FedAvg):
    """Its clients train nothing at all."""

    def client_update(self, silo, content):
        arrays = silo.arrays()
        return Update({"arrays": arrays}, {"train_loss": 0.0}, untrained=frozenset(arrays))


def test_a_round_in_which_nobody_trains_anything_changes_nothing(federate):
    federation = federate(Idle(), Toy(), Toy().build(), PARTS)
    before = dict(federation.arrays)
    assert federation.round(1)["num-examples"] == 32
    assert all(torch.equal(federation.arrays[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("strategy", [Idle(), FedAvg()], ids=["all", "some"])
def test_what_is_left_out_survives_flowers_wire(federate, strategy):
    federation = federate(strategy, Toy(), Toy().build(), PARTS)
    federation.round(1)
    for _, answer in federation.messages:
        arrived = recorddict_from_proto(recorddict_to_proto(answer.content))
        assert arrived.get("untrained") == answer.content.get("untrained")
        assert Inspection(federation.arrays, frozenset({"arrays"}), True).fault(arrived) is None
        assert all(torch.equal(tensor, unpack(answer.content["arrays"])[name]) for name, tensor in unpack(arrived["arrays"]).items())


# ---- the server's optimizer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    "table", [ADAMW, {"name": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}], ids=lambda table: table["name"]
)
def test_the_servers_optimizer_takes_parameters_as_they_come(table, resumed):
    """First a and b have gradients, then b and c, then c alone: each goes its own way, as with torch's own optimizer."""
    values = {name: torch.nn.Parameter(torch.tensor([1.0, -2.0]) * k) for k, name in enumerate("abc", start=1)}
    arrays = {name: param.detach().clone() for name, param in values.items()}
    optimizer = getattr(torch.optim, table["name"])(values.values(), **{key: value for key, value in table.items() if key != "name"})
    strategy = FedSGD(server_optimizer=table)
    for number, present in enumerate(["ab", "bc", "c", "ca"], start=1):
        gradient = {name: torch.tensor([0.5, 0.1]) * number for name in present}
        for name, param in values.items():
            param.grad = gradient.get(name)
        optimizer.step()
        after = strategy.server_update(arrays, {"gradient": gradient})
        assert after.keys() == gradient.keys()
        arrays |= after
        assert all(torch.equal(arrays[name], values[name]) for name in values)
        if resumed:
            state, strategy = copy.deepcopy(strategy.state()), FedSGD(server_optimizer=table)
            strategy.load_state(state)
            assert strategy.state().keys() == state.keys()


def test_a_gradient_about_nothing_moves_nothing():
    assert FedSGD().server_update({"w": torch.ones(2)}, {"gradient": {}}) == {}


def test_momentum_rests_while_nobody_trains():
    strategy, x = FedAvgM(momentum=0.5), torch.tensor([1.0])
    moved = strategy.server_update({"w": x}, {"params": {"w": x + 1}})["w"]
    assert strategy.server_update({"w": moved}, {"params": {}}) == {}
    assert strategy.server_update({"w": moved}, {"params": {"w": moved}})["w"].item() == 2.5


# ---- who forgets, and who must not leave out ------------------------------------------------------------------------


def inspected(arrays: dict, left_out: dict | None = None, partial: bool = True) -> str | None:
    model = {"a": torch.zeros(2), "b": torch.zeros(3)}
    content = RecordDict({"arrays": pack(arrays), **({"untrained": ConfigRecord(left_out)} if left_out else {})})
    return Inspection(model, frozenset({"arrays"}), partial).fault(content)


def test_a_client_that_forgets_an_array_is_refused_by_its_name():
    assert inspected({"a": torch.ones(2)}) == "array 'b' is missing, expected float32 [3]"
    assert inspected({"a": torch.ones(2)}, {"arrays": ["b"]}) is None


@pytest.mark.parametrize(
    ("left_out", "reason"),
    [
        ({"arrays": ["a"]}, "array 'a' is left out and sent all the same"),
        ({"arrays": ["z"]}, "array 'z' is left out, but is not an array of the model"),
        ({"gradient": ["b"]}, "the answer leaves out ['b'] of a record 'gradient', which it does not have"),
        ({"arrays": "b"}, "the answer leaves out 'b' of a record 'arrays', which it does not have"),
        ({"arrays": [1]}, "array 1 is left out, but is not an array of the model"),
    ],
)
def test_what_is_wrongly_said_to_be_left_out_is_refused(left_out, reason):
    assert inspected({"a": torch.ones(2)}, left_out) == reason


def test_a_strategy_that_needs_all_arrays_refuses_answers_without():
    assert inspected({"a": torch.ones(2)}, {"arrays": ["b"]}, partial=False) == "array 'b' is left out, but the strategy needs all of them"


def test_gradients_that_are_left_out_count_as_held_by_whoever_comes_first():
    model, inspection = {"a": torch.zeros(2), "b": torch.zeros(3)}, None
    inspection = Inspection(model, frozenset({"gradient"}), True)
    first = RecordDict({"gradient": pack({"a": torch.ones(2)}), "untrained": ConfigRecord({"gradient": ["b"]})})
    assert inspection.fault(first) is None
    assert inspection.fault(RecordDict({"gradient": pack({"a": torch.ones(2), "b": torch.ones(3)})})) is None
    assert inspection.fault(RecordDict({"gradient": pack({"b": torch.ones(3)})})) == "array 'a' is missing, expected float32 [2]"


def test_a_forgetful_client_of_a_federation_is_noted_and_leaves_no_trace(federate):
    class Forgetful(FedAvg):
        def client_update(self, silo, content):
            update = super().client_update(silo, content)
            if len(silo.train) == 12:
                del update.records["arrays"]["trunk.bias"]
            return update

    federation = federate(Forgetful(), Toy(), Toy().build(), PARTS)
    federation.round(1, failures=1)
    assert str(federation.strategy.failures[0]) == "client 1: array 'trunk.bias' is missing, expected float32 [2]"
    expected = federate(FedAvg(), Toy(), Toy().build(), [PARTS[0], PARTS[2], PARTS[3]])
    expected.round(1)
    assert all(torch.equal(federation.arrays[name], expected.arrays[name]) for name in expected.arrays)


@pytest.mark.parametrize("strategy", [FedMedian(), Scaffold(), adapted(FlowerMedian)()], ids=["fedmedian", "scaffold", "Flower's"])
def test_other_strategies_get_complete_answers(strategy):
    silo = at_work(PARTS[0])
    update = strategy.client_update(silo, RecordDict())
    assert not update.untrained and set().union(*update.records.values()) >= LEFT | RIGHT
    assert silo.untrained == RIGHT


# ---- silos, alone and stacked ---------------------------------------------------------------------------------------


def at_work(part: Examples, learner: Toy | None = None) -> Silo:
    learner = learner or Toy()
    model = learner.build()
    return Silo(learner, model, {name: tensor.clone() for name, tensor in model.state_dict().items()}, part, None, generator(1))


def test_everything_counts_as_trained_before_any_step():
    assert at_work(PARTS[0]).untrained == frozenset()


def test_one_batch_is_enough_to_train_an_array():
    silo = at_work(PARTS[0])
    silo.descend([PARTS[0]], SGD)
    assert silo.untrained == RIGHT
    silo.descend([PARTS[0], PARTS[1]], SGD)
    assert silo.untrained == frozenset()


def test_a_penalty_alone_trains_nothing():
    silo = at_work(PARTS[0])
    silo.descend([PARTS[0]], SGD, lambda: torch.stack([param.square().sum() for param in silo.params.values()]).sum())
    assert silo.untrained == RIGHT


def test_weight_decay_spares_what_no_gradient_reached():
    silo = at_work(PARTS[0])
    before = silo.arrays()
    silo.descend([PARTS[0]], ADAMW)
    assert all(torch.equal(before[name], tensor) == (name in RIGHT) for name, tensor in silo.arrays().items())


def test_a_gradient_is_zero_where_there_is_none():
    silo = at_work(PARTS[0])
    _, gradient = silo.gradient([PARTS[0]])
    assert gradient.keys() == silo.params.keys() and not gradient["right.weight"].any()
    assert silo.untrained == RIGHT


@partial_ones
def test_stacked_clients_leave_out_what_each_leaves_out_alone(strategy):
    learner, rngs = Toy(), [generator(1), generator(1)]
    model = learner.build()
    arrays = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cohort = Cohort(learner, model, arrays, Silos.of([PARTS[0], examples(9, 5, "left")]), [0, 1], rngs)
    assert cohort.untrained == frozenset()
    together = strategy.client_update(cohort, RecordDict()).parted(2)
    for part, answer in zip([PARTS[0], examples(9, 5, "left")], together, strict=True):
        alone = strategy.client_update(at_work(part), RecordDict())
        assert answer.untrained == alone.untrained == RIGHT
        for record, expected in alone.records.items():
            assert all(torch.allclose(answer.records[record][name], tensor, atol=1e-5) for name, tensor in expected.items())


class Dropping(Toy):
    """Its views leave out the targets of the second branch where all of them are 0."""

    def train_view(self, batch, rng):
        return batch if batch.fields["right"].any() else Examples({name: batch.fields[name] for name in ("image", "left")})


def test_clients_whose_batches_have_other_fields_do_not_train_together():
    learner, both = Dropping(), PARTS[2]
    lacking = Examples({**both.fields, "right": torch.zeros(len(both))})
    model = learner.build()
    arrays = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cohort = Cohort(learner, model, arrays, Silos.of([lacking, both]), [0, 1], [generator(0), generator(1)])
    with pytest.raises(EngineError, match=r"\['image', 'left'\] and \['image', 'left', 'right'\]; set engine\.batch_clients = 1"):
        FedAvg().client_update(cohort, RecordDict())
