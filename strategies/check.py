"""The conformance suite of strategies: what every run relies on, as a function anyone can run on their own class.

    from fedvision.silo import Silo
    from strategies.check import check_strategy

    check_strategy("my_package.my_module:MyStrategy", Silo, my_setting=3)

Strategies know silos by the protocol ``strategies.strategy.Silo`` only, and this folder must not import the one that
implements it. So the suite is given the class and builds the rest of a federation around it: a ClientApp of a few
lines, five clients with random data, and the in-process grid.
"""

import copy
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import tomli_w
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedvision import settings
from fedvision.arrays import Named, array_records, config_of, metrics_of, pack, unpack
from fedvision.data import Examples, Spec
from fedvision.data.federated import Silos
from fedvision.errors import AggregationError
from fedvision.grids.in_process import InProcessGrid
from fedvision.learners.classifier import Classifier
from fedvision.learners.learner import Loss, mean_over_examples
from fedvision.models import MLP
from fedvision.registry import strategies
from fedvision.seeds import generator, global_generators
from strategies.memory import agreed
from strategies.strategy import UNTRAINED, Silo, Strategy, Update, obstacle, reply

CLIENTS = 5
SPEC = Spec((1, 4, 4), 3)
FIRST, LAST = 0, CLIENTS - 1

Fault = Callable[[Message, Message], list[Message]]
"""(what a client was sent, its answer) -> what arrives at the server instead of the answer."""


def check_strategy(
    strategy: str | type[Strategy], silo: Callable[..., Silo], cohort: Callable[..., Any] | None = None, **values: Any
) -> None:
    """Hold a strategy to its contract.

    Args:
        strategy: a registered or dotted name, or a class.
        silo: makes a client, as ``fedvision.silo.Silo`` does: (learner, model, arrays, train, state, rng, progress).
        cohort: makes several clients that answer together, as ``clients.cohort.Cohort`` does: (learner, model, arrays, silos,
            clients, rngs, progress); without it, strategies that are declared batchable are not tried on one.
        values: settings of the strategy, as an experiment file would give them.

    Raises:
        AssertionError: the strategy breaks the contract; the message says how.
    """
    kind = strategies.find(strategy) if isinstance(strategy, str) else strategy
    for check in CHECKS:
        check(Case(kind, silo, values, cohort))


@dataclass(frozen=True)
class Case:
    """A strategy under test.

    Attributes:
        kind: its class.
        silo: makes a client.
        values: its settings.
        cohort: makes several clients that answer together.
        normalized: whether the model has BatchNorm.
        branched: whether the model has a part that only some data train; which clients have such data.
        serialized: whether arrays travel as bytes.
    """

    kind: Callable[..., Strategy]
    silo: Callable[..., Silo]
    values: Mapping[str, Any]
    cohort: Callable[..., Any] | None = None
    normalized: bool = False
    branched: tuple[int, ...] | None = None
    serialized: bool = False

    @property
    def name(self) -> str:
        """Of the strategy's class."""
        return self.kind.__name__

    def strategy(self, seed: int = 0, **changes: Any) -> Strategy:
        """A fresh strategy with some settings changed."""
        resolved = settings.resolve(self.kind, {**self.values, **changes}, "strategy", without=frozenset({"seed"}))
        return self.kind(**resolved, seed=seed)

    def federation(self, seed: int = 0, **changes: Any) -> "Federation":
        """Fresh clients and a server with a fresh strategy."""
        return Federation(self, self.strategy(seed, **changes))

    def model(self) -> nn.Module:
        """The same tiny model every time."""
        return self.learner().build(SPEC, generator(0, "model"))

    def learner(self) -> "_Learner":
        """What clients learn."""
        return _Learner(hidden=(6,), normalized=self.normalized, branched=self.branched is not None)


class Federation:
    """Five clients, and a server that runs a strategy's rounds.

    The client half runs on a strategy object of its own, as it does where clients are other machines.
    """

    def __init__(self, case: Case, strategy: Strategy) -> None:
        self.strategy = strategy
        if strategy.client_memory:
            strategy.remember()
        self.serialized = case.serialized
        self.grid = InProcessGrid(_client_app(case, copy.deepcopy(strategy)), {}, CLIENTS)
        self.initial = {name: tensor.detach().clone() for name, tensor in case.model().state_dict().items()}
        self.metrics: dict[str, Any] = {}
        self._arrays = pack(self.initial)

    def rounds(self, *numbers: int) -> dict[str, Tensor]:
        """The global model after some rounds."""
        for number in numbers:
            self.round(number)
        return self.arrays

    def round(self, number: int, faults: Mapping[int, Fault] | None = None, order: int = 1) -> dict[str, Tensor]:
        """The global model after one round in which the answers of some clients are replaced.

        Args:
            number: of the round.
            faults: what happens to the answer, by client.
            order: -1 has the answers arrive in reverse.
        """
        arrived: list[Message] = []
        with self.grid:
            messages = list(self.strategy.configure_train(number, self._arrays, ConfigRecord({"progress": 0.5}), self.grid))
            for message, answer in zip(messages, self.grid.send_and_receive(messages), strict=True):
                fault = (faults or {}).get(message.metadata.dst_node_id, _none)
                arrived += fault(message, _as_bytes(answer) if self.serialized else answer)
            self._arrays, metrics = self.strategy.aggregate_train(number, iter(arrived[::order]))
        self.metrics = dict(metrics)
        return self.arrays

    @property
    def arrays(self) -> dict[str, Tensor]:
        """A copy of the global model."""
        return {name: tensor.clone() for name, tensor in unpack(self._arrays).items()}

    def resumed(self, strategy: Strategy, state: Mapping[str, Any], case: Case) -> "Federation":
        """A new server that goes on from this one's model and from ``state``; the clients remember what they remembered."""
        strategy.load_state(state)
        other = Federation(case, strategy)
        other.grid.load_client_states(copy.deepcopy(dict(self.grid.client_states())))
        other.strategy.heard = copy.deepcopy(self.strategy.heard)
        other._arrays = pack(self.arrays)
        return other


def settings_come_from_a_file(case: Case) -> None:
    """The class has a summary, and its settings survive being written to TOML."""
    assert (case.kind.__doc__ or "").strip().split("\n")[0], f"{case.name}'s docstring has no first line to list it by"
    resolved = settings.resolve(case.kind, case.values, "strategy", without=frozenset({"seed"}))
    written = tomli_w.dumps({name: value for name, value in resolved.items() if value is not None})
    again = settings.resolve(case.kind, tomllib.loads(written), "strategy", without=frozenset({"seed"}))
    assert again == resolved, f"{case.name}'s settings written to TOML and read again are {again}, not {resolved}"


def a_round_changes_the_model(case: Case) -> None:
    """Two rounds give finite arrays of the same layout, and a training loss; the arrays sent stay as they are."""
    federation = case.federation()
    sent = {name: tensor.clone() for name, tensor in federation.initial.items()}
    before = federation.initial
    for number in (1, 2):
        after = federation.round(number)
        assert after.keys() == before.keys(), f"{case.name} turns the arrays {sorted(before)} into {sorted(after)}"
        for name, tensor in after.items():
            layout, expected = (tensor.dtype, tensor.shape), (before[name].dtype, before[name].shape)
            assert layout == expected, f"{case.name} turns array {name!r} of {expected} into one of {layout}"
            assert tensor.isfinite().all(), f"{case.name} makes array {name!r} NaN or infinite in round {number}"
        assert not _same(before, after), f"{case.name} changes nothing in round {number}"
        loss = federation.metrics.get("train_loss", math.nan)
        assert math.isfinite(loss), f"{case.name} reports the training loss {loss} in round {number}"
        taken = federation.strategy.answered
        assert taken == CLIENTS, f"{case.name} accepted {taken} of {CLIENTS} good answers: {federation.strategy.failures}"
        before = after
    assert _same(sent, federation.initial), f"{case.name} writes into the arrays that it was given"


def the_same_seed_gives_the_same_bits(case: Case) -> None:
    """Two federations of the same seed agree in every bit."""
    one, other = case.federation().rounds(1, 2), case.federation().rounds(1, 2)
    assert _same(one, other), f"{case.name} gives other numbers for the same seed; draw from silo.rng"


def the_order_of_answers_does_not_matter(case: Case) -> None:
    """Answers that arrive in reverse give the same model, up to rounding."""
    forward, reverse = case.federation().round(1), case.federation().round(1, order=-1)
    for name, tensor in forward.items():
        odd = (tensor - reverse[name]).abs().max()
        assert torch.allclose(tensor, reverse[name], rtol=1e-4, atol=1e-5), f"{case.name}: array {name!r} depends on the order by {odd}"


def answers_may_travel_as_bytes(case: Case) -> None:
    """Answers that were serialized give the same bits as those that share memory."""
    here, elsewhere = case.federation().rounds(1, 2), replace(case, serialized=True).federation().rounds(1, 2)
    assert _same(here, elsewhere), f"{case.name} gives other numbers when its arrays are serialized"


def wrong_answers_are_refused(case: Case) -> None:
    """A wrong answer is noted with its client and a reason, and leaves no trace in the model."""
    expected = {client: case.federation().round(1, {client: _nothing}) for client in (FIRST, LAST)}
    for what, fault in FAULTS.items():
        client = LAST if what in FIRST_DECIDES else FIRST
        federation = case.federation()
        arrays = federation.round(1, {client: fault})
        noted = [failure.client for failure in federation.strategy.failures]
        assert noted == [client], f"{case.name}: client {client} sends {what}, but clients {noted} are noted as failed"
        assert federation.strategy.failures[0].reason, f"{case.name}: client {client} sends {what}, noted without a reason"
        taken = federation.strategy.answered
        assert taken == CLIENTS - 1, f"{case.name}: client {client} sends {what}, {taken} answers are counted"
        assert _same(arrays, expected[client]), f"{case.name}: client {client} sends {what}, which moves the model"


def an_answer_that_does_not_count_is_taken_back(case: Case) -> None:
    """A client whose answer was lost goes on as if it had not been asked."""
    lost, unasked = case.federation(), case.federation()
    for federation in (lost, unasked):
        federation.round(1)
        before = copy.deepcopy(dict(federation.grid.client_states()))
        federation.round(2, {FIRST: _nothing})
        if before and federation is unasked:
            federation.grid.load_client_states({**federation.grid.client_states(), FIRST: before[FIRST]})
    assert _same(lost.rounds(3, 4), unasked.rounds(3, 4)), f"{case.name}: what a client keeps of an answer that was lost moves the model"


def a_second_answer_is_refused(case: Case) -> None:
    """A client that answers twice counts once."""
    federation, expected = case.federation(), case.federation().round(1)
    arrays = federation.round(1, {FIRST: lambda message, answer: [answer, answer]})
    noted = [failure.client for failure in federation.strategy.failures]
    assert noted == [FIRST], f"{case.name}: client {FIRST} answers twice, clients {noted} are noted"
    assert _same(arrays, expected), f"{case.name} counts a client that answers twice"


def too_few_answers_stop_the_round(case: Case) -> None:
    """Fewer usable answers than ``min_clients`` raise an error that says why; so does a round without any."""
    for least, faults in ((CLIENTS, {FIRST: FAULTS["an error"]}), (1, dict.fromkeys(range(CLIENTS), FAULTS["an error"]))):
        try:
            case.federation(min_clients=least).round(1, faults)
        except AggregationError as error:
            assert "out of memory" in str(error), f"{case.name}: too few answers, but the message does not say why: {error}"
        else:
            raise AssertionError(f"{case.name} goes on with {CLIENTS - len(faults)} answers though min_clients = {least}")


def the_state_is_all_that_is_remembered(case: Case) -> None:
    """A fresh strategy that loads the state goes on with the same bits; the state is made of plain values."""
    federation = case.federation()
    federation.rounds(1, 2)
    state = federation.strategy.state()
    odd = _not_plain(state, "state")
    assert odd is None, f"{case.name}: {odd}; keep tensors, numbers, text, dicts and lists"
    resumed = federation.resumed(case.strategy(), copy.deepcopy(state), case)
    again = resumed.strategy.state()
    assert _alike(state, again), f"{case.name} loads a state and gives back another"
    assert _same(federation.rounds(3, 4), resumed.rounds(3, 4)), f"{case.name} remembers something that is not in its state()"


def buffers_are_aggregated(case: Case) -> None:
    """BatchNorm's running statistics move with the clients', and stay of their types."""
    federation = replace(case, normalized=True).federation()
    after = federation.rounds(1, 2)
    for name, tensor in after.items():
        assert tensor.dtype == federation.initial[name].dtype, f"{case.name} turns buffer {name!r} into {tensor.dtype}"
        assert tensor.isfinite().all(), f"{case.name} makes {name!r} NaN or infinite"
    assert not torch.equal(after["norm.running_mean"], federation.initial["norm.running_mean"]), f"{case.name} drops the clients' buffers"
    assert after["norm.running_var"].gt(0).all(), f"{case.name} makes a running variance negative"


def some_of_the_clients_may_train(case: Case) -> None:
    """With a fraction below 1 a cohort of that size trains, drawn from the seed, another one in other rounds."""

    def cohorts(seed: int) -> list[list[int]]:
        federation, drawn = case.federation(seed, fraction=0.6), []
        for number in range(1, 5):
            federation.round(number)
            drawn.append(list(federation.strategy.cohort))
        assert all(tensor.isfinite().all() for tensor in federation.arrays.values()), f"{case.name} fails with partial participation"
        return drawn

    drawn = cohorts(0)
    assert all(len(set(cohort)) == 3 for cohort in drawn), f"{case.name}: fraction = 0.6 of {CLIENTS} clients draws {drawn}"
    assert any(cohort != drawn[0] for cohort in drawn), f"{case.name} draws the same cohort {drawn[0]} in every round"
    assert cohorts(0) == drawn, f"{case.name} draws other cohorts for the same seed"
    assert cohorts(1) != drawn, f"{case.name} draws the same cohorts for another seed"


def flower_can_start_it(case: Case) -> None:
    """Flower's own loop gives the same bits as this project's."""
    federation = case.federation()
    with federation.grid:
        result = federation.strategy.start(grid=federation.grid, initial_arrays=pack(federation.initial), num_rounds=2)
    assert _same(unpack(result.arrays), case.federation().rounds(1, 2)), f"{case.name} gives other numbers in Flower's own loop"
    assert set(result.train_metrics_clientapp) == {1, 2}, f"{case.name} reports no training metrics to Flower"


def clients_may_answer_together(case: Case) -> None:
    """If the client half is declared batchable, clients of unequal sizes give together what each gives alone."""
    strategy = case.strategy()
    if case.cohort is None or obstacle(strategy) is not None:
        return
    federation, learner, numbers = case.federation(), _Learner(hidden=(6,)), range(CLIENTS)
    with federation.grid:
        content = next(iter(strategy.configure_train(1, pack(federation.initial), ConfigRecord(), federation.grid))).content
    rngs = [[generator(0, "together", client) for client in numbers] for _ in range(2)]
    silos = [case.silo(learner, case.model(), federation.initial, _examples(client), None, rngs[0][client], 0.5) for client in numbers]
    alone = [strategy.client_update(silo, content) for silo in silos]
    cohort = case.cohort(learner, case.model(), federation.initial, Silos.of([*map(_examples, numbers)]), numbers, rngs[1], 0.5)
    for client, answer in enumerate(strategy.client_update(cohort, content).parted(CLIENTS)):
        odd = _differing(alone[client], answer)
        assert odd is None, f"{case.name} is declared batchable, but client {client} gives another {odd} among others than alone"


def arrays_are_combined_over_those_who_trained_them(case: Case) -> None:
    """If answers are partial, what one client alone has data for moves as if that client alone had answered, and what nobody has data
    for keeps its bits; if not, all answers are complete.
    """
    one, none = replace(case, branched=(LAST,)).federation(), replace(case, branched=()).federation()
    together, idle = one.round(1), none.rounds(1, 2)
    for federation in (one, none):
        taken, failures = federation.strategy.answered, federation.strategy.failures
        assert taken == CLIENTS, f"{case.name} accepted {taken} of {CLIENTS} answers of silos that lack something: {failures}"
    if not one.strategy.partial:
        return
    alone = replace(case, branched=(LAST,)).federation().round(1, dict.fromkeys(range(LAST), _nothing))
    for name in _NAMES_ASIDE:
        near = torch.allclose(together[name], alone[name], rtol=1e-4, atol=1e-6)
        assert near, f"{case.name} is partial, but clients that did not train {name!r} hold it back; leave it out, or say partial = False"
        same = torch.equal(idle[name], none.initial[name])
        assert same, f"{case.name} is partial, but moves {name!r}, which nobody trained; leave it alone, or say partial = False"


CHECKS: tuple[Callable[[Case], None], ...] = (
    settings_come_from_a_file,
    a_round_changes_the_model,
    the_same_seed_gives_the_same_bits,
    the_order_of_answers_does_not_matter,
    answers_may_travel_as_bytes,
    wrong_answers_are_refused,
    an_answer_that_does_not_count_is_taken_back,
    a_second_answer_is_refused,
    too_few_answers_stop_the_round,
    the_state_is_all_that_is_remembered,
    buffers_are_aggregated,
    some_of_the_clients_may_train,
    flower_can_start_it,
    clients_may_answer_together,
    arrays_are_combined_over_those_who_trained_them,
)
"""What ``check_strategy`` checks, in order."""


# ---- a federation of five clients ----------------------------------------------------------------------------------


class _NormalizedMLP(MLP):
    """An MLP of one hidden layer with BatchNorm."""

    def __init__(self, inputs: tuple[int, ...], hidden: tuple[int, ...], outputs: int) -> None:
        super().__init__(inputs, hidden, outputs)
        self.norm = nn.BatchNorm1d(hidden[-1])

    def features(self, x: Tensor) -> Tensor:
        return self.norm(super().features(x))  # type: ignore[no-any-return]


class _BranchedMLP(MLP):
    """An MLP of one hidden layer with a second head."""

    def __init__(self, inputs: tuple[int, ...], hidden: tuple[int, ...], outputs: int) -> None:
        super().__init__(inputs, hidden, outputs)
        self.aside = nn.Linear(hidden[-1], 1)

    def forward(self, x: Tensor, aside: bool = False) -> Tensor:
        return self.aside(self.features(x)) if aside else super().forward(x)  # type: ignore[no-any-return]


_NAMES_ASIDE = ("aside.weight", "aside.bias")


@dataclass(frozen=True, kw_only=True)
class _Learner(Classifier):
    """A classifier that can have BatchNorm, or a second head that is trained where examples have the field ``aside``."""

    normalized: bool = False
    branched: bool = False

    def build(self, spec: Spec, rng: torch.Generator) -> nn.Module:
        if not self.normalized and not self.branched:
            return super().build(spec, rng)
        with global_generators(rng):
            return (_NormalizedMLP if self.normalized else _BranchedMLP)(spec.image_shape, self.hidden or (6,), spec.classes)

    @mean_over_examples
    def loss(self, model: Callable[..., Any], batch: Examples, progress: float, rng: torch.Generator) -> Loss:
        loss = super().loss(model, batch, progress, rng)
        if "aside" not in batch:
            return loss
        return Loss(loss.total + (model(batch.image, aside=True)[:, 0] - batch.fields["aside"]).square().mean())


def _client_app(case: Case, strategy: Strategy) -> ClientApp:
    """The client half of a strategy in a plain Flower app."""
    app, learner, model = ClientApp(), case.learner(), case.model()

    def work(message: Message, context: Context, purpose: str) -> Message:
        client, config = int(context.node_config["partition-id"]), config_of(message.content)
        rng, train = generator(0, purpose, int(config["server-round"]), client), _examples(client)  # type: ignore[arg-type]
        if client in (case.branched or ()):
            train = Examples({**train.fields, "aside": 2 + train.label})
        half = strategy.client_update if purpose == "fit" else strategy.client_statistics
        with global_generators(rng), agreed(context.state, strategy.client_memory, config, client, training=purpose == "fit"):
            silo = case.silo(learner, model, unpack(array_records(message.content)["arrays"]), train, context.state, rng, 0.5)
            return reply(message, half(silo, message.content), len(train))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return work(message, context, "fit")

    @app.query("statistics")
    def statistics(message: Message, context: Context) -> Message:
        return work(message, context, "statistics")

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "loss": 1.0})}), reply_to=message)

    return app


def _examples(client: int) -> Examples:
    """Some noisy images of three classes; every client has another number of them."""
    n, rng = 8 + 3 * client, generator(0, "examples", client)
    label = torch.randint(3, (n,), generator=rng)
    return Examples({"image": torch.rand(n, *SPEC.image_shape, generator=rng) + label[:, None, None, None], "label": label})


# ---- what can go wrong with an answer --------------------------------------------------------------------------------


def _none(message: Message, answer: Message) -> list[Message]:
    return [answer]


def _nothing(message: Message, answer: Message) -> list[Message]:
    return []


def _edited(edit: Callable[[dict[str, Tensor]], None]) -> Fault:
    """The first array record of the answer, edited."""

    def fault(message: Message, answer: Message) -> list[Message]:
        name, record = next(item for item in sorted(array_records(answer.content).items()) if item[0] != "buffers")
        tensors = {key: tensor.clone() for key, tensor in unpack(record).items()}
        edit(tensors)
        return [Message(RecordDict({**answer.content, name: pack(tensors)}), reply_to=message)]

    return fault


def _filled(value: float) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        _last(tensors).view(-1)[-1] = value

    return edit


def _reshaped(tensors: dict[str, Tensor]) -> None:
    tensors[list(tensors)[-1]] = torch.zeros(7, 7)


def _retyped(tensors: dict[str, Tensor]) -> None:
    tensors[list(tensors)[-1]] = _last(tensors).double()


def _foreign(tensors: dict[str, Tensor]) -> None:
    tensors["intruder"] = torch.zeros(2)


def _shortened(tensors: dict[str, Tensor]) -> None:
    del tensors[list(tensors)[-1]]


def _last(tensors: dict[str, Tensor]) -> Tensor:
    return tensors[list(tensors)[-1]]


def _measured(**metrics: Any) -> Fault:
    """The answer with other numbers."""

    def fault(message: Message, answer: Message) -> list[Message]:
        merged = MetricRecord({**metrics_of(answer.content), **metrics})
        return [Message(RecordDict({**answer.content, "metrics": merged}), reply_to=message)]

    return fault


def _without(records: Callable[[RecordDict], Iterable[str]]) -> Fault:
    def fault(message: Message, answer: Message) -> list[Message]:
        dropped = set(records(answer.content))
        return [Message(RecordDict({name: record for name, record in answer.content.items() if name not in dropped}), reply_to=message)]

    return fault


def _claiming(array: str) -> Fault:
    def fault(message: Message, answer: Message) -> list[Message]:
        record = next(name for name in sorted(array_records(answer.content)) if name != "buffers")
        return [Message(RecordDict({**answer.content, UNTRAINED: ConfigRecord({record: [array]})}), reply_to=message)]

    return fault


def _rubbish(message: Message, answer: Message) -> list[Message]:
    name, record = next(item for item in sorted(array_records(answer.content).items()) if item[0] != "buffers")
    odd = {key: Array(array.dtype, tuple(array.shape), "numpy.ndarray", b"rubbish") for key, array in record.items()}
    return [Message(RecordDict({**answer.content, name: ArrayRecord(odd)}), reply_to=message)]


def _padded(message: Message, answer: Message) -> list[Message]:
    name, record = next(item for item in sorted(array_records(answer.content).items()) if item[0] != "buffers")
    odd = {key: Array(array.dtype, tuple(array.shape), "numpy.ndarray", array.data + bytes(1 << 20)) for key, array in record.items()}
    return [Message(RecordDict({**answer.content, name: ArrayRecord(odd)}), reply_to=message)]


FAULTS: dict[str, Fault] = {
    "a NaN": _edited(_filled(math.nan)),
    "an infinity": _edited(_filled(-math.inf)),
    "an array of another shape": _edited(_reshaped),
    "an array of another type": _edited(_retyped),
    "an array too many": _edited(_foreign),
    "an array too few": _edited(_shortened),
    "a claim to leave out an array that is none of the model's": _claiming("intruder"),
    "bytes that are no array": _rubbish,
    "more bytes than its arrays have": _padded,
    "no arrays": _without(array_records),
    "no numbers": _without(lambda content: ["metrics"]),
    "a negative number of examples": _measured(**{"num-examples": -3}),
    "NaN examples": _measured(**{"num-examples": math.nan}),
    "a list for a number": _measured(train_loss=[1.0, 2.0]),
    "an error": lambda message, answer: [Message(Error(2, "MemoryError: out of memory"), reply_to=message)],
}
"""What a client may send instead of its answer."""

FIRST_DECIDES = {"an array too few"}
"""What cannot be told from a good answer if no good one has arrived yet: a gradient need not cover the whole model."""


def _as_bytes(message: Message) -> Message:
    """The message with its arrays serialized and read again."""
    if message.has_content():
        for name, record in array_records(message.content).items():
            plain = {key: Array(array.dtype, tuple(array.shape), array.stype, array.data) for key, array in record.items()}
            message.content[name] = ArrayRecord(plain)
    return message


def _not_plain(value: Any, path: str) -> str | None:
    """The first value that cannot be kept in a checkpoint."""
    if isinstance(value, Mapping):
        return next(filter(None, (_not_plain(item, f"{path}[{key!r}]") for key, item in value.items())), None)
    if isinstance(value, list | tuple):
        return next(filter(None, (_not_plain(item, f"{path}[{i}]") for i, item in enumerate(value))), None)
    plain = value is None or isinstance(value, Tensor | bool | int | float | str)
    return None if plain else f"{path} is a {type(value).__name__}"


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def _differing(one: Update, other: Update) -> str | None:
    """The first array or number in which two answers differ by more than rounding."""
    if one.untrained != other.untrained:
        return "set of arrays left out"
    if (one.records.keys(), one.metrics.keys()) != (other.records.keys(), other.metrics.keys()):
        return "set of records or metrics"
    for record, arrays in one.records.items():
        for name, tensor in arrays.items():
            if not torch.allclose(tensor, other.records[record][name], rtol=1e-4, atol=1e-5):
                return f"array {record}/{name}"
    return next((name for name, value in one.metrics.items() if not math.isclose(value, other.metrics[name], rel_tol=1e-4)), None)


def _same(one: Named, other: Named) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
