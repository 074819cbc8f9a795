"""The contract of a strategy: both halves of an algorithm, the server's and what it changes inside the client.

A strategy is a Flower ``Strategy``: a plain Flower app calls ``strategy.start(grid, ...)`` at the server and
``strategy.client_update(silo, content)`` in the client. What differs between algorithms is four short methods.
"""

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from torch import Tensor, nn

from fedvision.arrays import Named, array_records, config_of, held_bytes, metrics_of, pack, unpack
from fedvision.data import Examples
from fedvision.errors import AggregationError, EngineError, ExperimentError, TooFewAnswersError
from fedvision.learners.learner import Learner
from fedvision.privacy import EPSILON, Privacy
from fedvision.seeds import numpy_generator
from fedvision.settings import Count, PositiveFraction
from strategies.means import ArithmeticMean, Layout
from strategies.private import Guard

log = logging.getLogger("fedvision")

Records = Mapping[str, Named]
"""Named arrays by record, such as ``{"gradient": {...}, "buffers": {...}}``."""

HEADER_BYTES = 1024
"""How much more than its values an array may take in an answer."""

MOST_METRICS = 1000
"""How many numbers an answer may have."""

UNTRAINED = "untrained"
"""The record of an answer that says which arrays each of the others leaves out, if any does."""


@runtime_checkable
class Silo(Protocol):
    """What the client half of a strategy works with: one client, holding the global model of this round."""

    learner: Learner
    model: nn.Module
    train: Examples
    state: RecordDict
    rng: torch.Generator
    progress: float

    @property
    def params(self) -> dict[str, Tensor]:
        """The model's trainable parameters by name, as they are in the model."""

    @property
    def untrained(self) -> frozenset[str]:
        """The shared arrays that no gradient of the loss has reached so far."""

    def arrays(self) -> dict[str, Tensor]:
        """A copy of all of the model's shared arrays: parameters and buffers."""

    def buffers(self) -> dict[str, Tensor]:
        """A copy of the model's shared arrays that are not trained, such as BatchNorm's running statistics."""

    def loss(self, model: Callable[..., Any], batch: Examples) -> Tensor:
        """The learner's mean loss on a batch; ``model`` may be the silo's, or anything that is called like it."""

    def batches(self, size: int, shuffle: bool = True, epochs: int = 1, steps: int | None = None) -> Iterator[Examples]:
        """Passes over the training examples, as the learner's loss sees them; ``steps``: exactly so many batches instead."""

    def gradient(self, batches: Iterable[Examples]) -> tuple[float, dict[str, Tensor]]:
        """Mean loss over the examples of all batches, and its gradient."""

    def descend(self, batches: Iterable[Examples], optimizer: dict[str, Any], penalty: Callable[[], Tensor] | None = None) -> float:
        """One optimizer step a batch, in place; the mean loss seen on the way."""

    def arrange(self) -> None:
        """Put rows whose order means nothing in that of the global model's which they are most like."""


ONE_BY_ONE = "set engine.batch_clients = 1"
"""What helps wherever clients cannot answer together."""

Half = TypeVar("Half", bound=Callable[..., "Update"])


def batchable(half: Half) -> Half:
    """Declare that a ``client_update`` may answer for several clients at once, on tensors that are stacked over clients.

    It may use ``silo.params``, ``arrays``, ``buffers``, ``batches``, ``gradient`` and ``descend``, whose tensors and losses
    have the clients as a first dimension, and must keep the clients apart: element by element, or in sums of terms that
    each belong to one client. A class that overrides the method declares it anew. See decision 0009.
    """
    half.obstacle = None  # type: ignore[attr-defined]
    return half


def one_by_one(reason: str) -> Callable[[Half], Half]:
    """Declare why a ``client_update`` cannot answer for several clients at once."""

    def declare(half: Half) -> Half:
        half.obstacle = reason  # type: ignore[attr-defined]
        return half

    return declare


def protects(*units: str, otherwise: str = "") -> Callable[[Half], Half]:
    """Declare for which units ``[privacy]`` covers all that a ``client_update`` sends, and why not for the others.

    For ``"example"`` all of it must follow from ``silo.descend`` and from what the client was sent. For ``"client"`` the server must take
    means of clients' parameters, and nothing else of theirs. A class that overrides the method declares it anew.
    """

    def declare(half: Half) -> Half:
        half.protects, half.unprotected = frozenset(units), otherwise  # type: ignore[attr-defined]
        return half

    return declare


def obstacle(strategy: Any) -> str | None:
    """Why a strategy's clients must answer one by one; None if several may answer at once."""
    return getattr(strategy.client_update, "obstacle", "its client_update is not declared @batchable")


@runtime_checkable
class Fold(Protocol):
    """Where clients' answers go, one by one; ``strategies.means`` has those that keep only sums."""

    @property
    def count(self) -> int:
        """The number of answers so far."""

    def add(self, update: Named, weight: float = 1.0) -> None:
        """Fold one answer in."""

    def result(self) -> Named:
        """What all answers amount to."""


class Equally:
    """A fold in which all answers count the same, whatever the strategy weights clients by."""

    def __init__(self, fold: Fold) -> None:
        self._fold = fold

    @property
    def count(self) -> int:
        """The number of answers so far."""
        return self._fold.count

    def add(self, update: Named, weight: float = 1.0) -> None:
        """Fold one answer in with weight 1."""
        self._fold.add(update, 1.0)

    def result(self) -> Named:
        """What all answers amount to."""
        return self._fold.result()


@dataclass(frozen=True)
class Update:
    """One client's answer.

    Attributes:
        records: named arrays by record.
        metrics: numbers to average over the clients, ``train_loss`` among them.
        untrained: arrays that do not travel, since the client has learned nothing about them; see ``Strategy.left_out``.
    """

    records: Records
    metrics: Mapping[str, float] = field(default_factory=dict)
    untrained: AbstractSet[str] = frozenset()

    def parted(self, clients: int) -> "list[Update]":
        """The answer of clients who answered together, as one for each of them; they share its memory.

        Args:
            clients: how many; the first dimension of every array, and of every metric that is a tensor.

        Raises:
            EngineError: an array has another first dimension.
        """
        shapes = {f"{record}/{name}": tuple(tensor.shape) for record, arrays in self.records.items() for name, tensor in arrays.items()}
        odd = [name for name, shape in shapes.items() if shape[:1] != (clients,)]
        if odd:
            raise EngineError(f"{clients} clients answer together, but {odd[0]} has shape {shapes[odd[0]]}; {ONE_BY_ONE}")
        numbers = {name: value.tolist() if isinstance(value, Tensor) else [value] * clients for name, value in self.metrics.items()}
        metrics = [{name: values[i] for name, values in numbers.items()} for i in range(clients)]
        return [Update(self._records_of(i), metrics[i], self.untrained) for i in range(clients)]

    def _records_of(self, client: int) -> Records:
        return {record: {name: tensor[client] for name, tensor in arrays.items()} for record, arrays in self.records.items()}


@dataclass(frozen=True)
class Failure:
    """A client that did not contribute to a round, and why."""

    client: int
    reason: str

    def __str__(self) -> str:
        return f"client {self.client}: {self.reason}"


@dataclass(kw_only=True)
class Strategy(FlowerStrategy):
    """How the clients' answers become the next global model.

    Attributes:
        fraction: share of the clients that trains in a round, drawn anew from the seed each round.
        fraction_evaluate: share that evaluates; as ``fraction`` if not given.
        min_clients: a round with fewer accepted answers stops the run.
        weight_by: whether clients count equally or by their number of examples.
        seed: from which the cohorts are drawn.
        population: how many clients were connected in the latest round.
        cohort: those who took part.
        failures: those that failed or were refused.
        answered: how many answers were accepted.
        guard: what stands before the clients' answers under client-level privacy; see ``protect``.
        heard: the round of each client's latest answer that was counted, where clients keep anything; see ``remember``.
        client_memory: the records of ``silo.state`` that the client half keeps from one round to the next. They are taken back where the
            server did not count the answer that they came to be with.
        per_example: whether it needs the gradient of each example, of a loss that is a mean over them.
        partial: whether answers leave out the arrays that no gradient reached, as the decoder of what a silo has no data of. Each array
            is then combined over those who trained it, with their weights, and one that nobody trained stays as it is. If not, what
            was not trained counts as unchanged, or as a gradient of zero. See decision 0013.
    """

    client_memory: ClassVar[tuple[str, ...]] = ()
    per_example: ClassVar[bool] = False
    partial: ClassVar[bool] = False
    fraction: PositiveFraction = 1.0
    fraction_evaluate: PositiveFraction | None = None
    min_clients: Count = 1
    weight_by: Literal["clients", "examples"] = "clients"
    seed: int = 0
    population: int = field(default=0, init=False)
    cohort: list[int] = field(default_factory=list, init=False)
    failures: list[Failure] = field(default_factory=list, init=False)
    answered: int = field(default=0, init=False)
    guard: Guard | None = field(default=None, init=False)
    heard: dict[int, int] | None = field(default=None, init=False)

    # ---- what an algorithm says --------------------------------------------------------------------------------

    @abstractmethod
    def client_update(self, silo: Silo, content: RecordDict) -> Update:
        """In the client: the answer to a round's message, from a silo that holds the global model."""

    @abstractmethod
    def accumulators(self) -> dict[str, Fold]:
        """At the server: a fresh accumulator for each record of the answers."""

    @abstractmethod
    def server_update(self, arrays: Named, aggregates: Records) -> Named:
        """At the server: the next global parameters, from this round's and the accumulators' results; those not named stay."""

    def prepare(self, content: RecordDict, ask: Callable[[RecordDict], Iterator[RecordDict]]) -> RecordDict:
        """At the server, before training: what to send.

        Args:
            content: the global ``arrays`` and the ``config`` of the round.
            ask: collects the ``client_statistics`` of the cohort; who does not answer leaves the cohort.
        """
        return content

    def client_statistics(self, silo: Silo, content: RecordDict) -> Update:
        """In the client: the answer to ``prepare``'s question."""
        raise AggregationError(f"{type(self).__name__} asks its clients for no statistics")

    def left_out(self, silo: Silo) -> frozenset[str]:
        """In the client: what an answer leaves out, for its ``Update.untrained``; nothing, unless the strategy is ``partial``."""
        return silo.untrained if self.partial else frozenset()

    def state(self) -> dict[str, Any]:
        """What the server must remember between rounds: nested dicts and lists of tensors, numbers and text."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state``."""

    @property
    def joint(self) -> bool:
        """Whether this round's answers hold only together, since each was computed from statistics of the whole cohort.

        If somebody leaves between the phases, the round is asked for again of those who are left.
        """
        return False

    def remember(self) -> None:
        """Tell clients from now on which of their answers was the latest that counted: they keep something that must agree with it.

        Not under client-level privacy, where clients must not learn who was in a cohort.
        """
        self.heard = {} if self.guard is None else None

    def protect(self, privacy: Privacy, rounds: int, trained: AbstractSet[str]) -> None:
        """Take only clipped and noised means of the clients' parameters from now on, and draw cohorts as the accountant assumes.

        Args:
            privacy: what is asked for.
            rounds: planned.
            trained: the names of the parameters that clients train and send.

        Raises:
            ExperimentError: no noise meets the target, or the server takes no means.
        """
        odd = [name for name, fold in self.accumulators().items() if type(fold) is not ArithmeticMean]
        if odd:
            fact = f"{type(self).__name__} makes something else than a mean of the clients' {odd[0]!r}, which one client may move far"
            raise ExperimentError(f"privacy.unit = 'client': {fact}; choose e.g. fedavg")
        self.guard = Guard(privacy, privacy.noise(self.fraction, max(rounds, 1)), self.fraction, frozenset(trained), self.seed)

    # ---- Flower's side; final ----------------------------------------------------------------------------------

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """One message to each client of this round's cohort."""
        self._arrays = unpack(arrays)
        self.failures = []
        self.cohort = self._sample(server_round, "cohort", self.fraction, grid)
        config["server-round"] = server_round
        self._again = lambda: grid.send_and_receive(self._messages(arrays, config, grid))
        return self._messages(arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """The next global model and the clients' mean metrics; answers are folded one by one as they arrive.

        Raises:
            AggregationError: fewer than ``min_clients`` answers could be used.
        """
        accumulators, means = self._folded(replies)
        while self.joint and 0 < means.count < len(self.cohort):
            left = sorted(set(self.cohort) - self._counted.keys())
            log.warning("round %d: no usable answers from clients %s; the %d others are asked again", server_round, left, means.count)
            self.cohort = list(self._counted)
            accumulators, means = self._folded(self._again())
        self.answered = means.count
        self._require(means.count, server_round)
        aggregates = {name: accumulator.result() for name, accumulator in accumulators.items() if accumulator.count}
        if self.guard is not None:
            sums = {name: aggregates.get(name, {}) for name in accumulators if name != "buffers"}
            aggregates = dict(self.guard.released(sums, self._arrays, means.count, self.population, server_round))
        following = {**self._arrays, **aggregates.pop("buffers", {})}
        following.update(self.server_update(self._arrays, aggregates))
        if self.heard is not None:
            self.heard.update(dict.fromkeys(self._counted, server_round))
        return pack(following), MetricRecord({**means.result()})

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """One message to each client that evaluates in this round."""
        nodes = self._sample(server_round, "evaluate", self.fraction_evaluate or self.fraction, grid)
        config["server-round"] = server_round
        content = RecordDict({"arrays": arrays, "config": config})
        return [Message(content, dst_node_id=node, message_type="evaluate") for node in nodes]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord:
        """The clients' mean metrics; a client that evaluated nothing does not count."""
        means = WeightedMeans()
        for content in self._contents(replies, lambda content: None):
            if metrics_of(content)["num-examples"]:
                means.add(metrics_of(content), self._weight(content))
        return MetricRecord({**means.result()})

    def summary(self) -> None:
        """Log the settings."""
        log.info("strategy %r", self)

    # ---- parts -------------------------------------------------------------------------------------------------

    def _sample(self, server_round: int, purpose: str, fraction: float, grid: Grid) -> list[int]:
        nodes = sorted(grid.get_node_ids())  # Flower's grids promise no order
        self.population = len(nodes)
        if len(nodes) < self.min_clients:
            few = f"{len(nodes)} clients are connected, strategy.min_clients = {self.min_clients}"
            raise AggregationError(f"{few}; lower it or add clients")
        if self.guard is not None and purpose == "cohort":
            return self.guard.cohort(nodes, server_round)
        size = min(max(round(fraction * len(nodes)), self.min_clients, 1), len(nodes))
        if size == len(nodes):
            return nodes
        chosen = numpy_generator(self.seed, purpose, server_round).choice(len(nodes), size, replace=False)
        return [nodes[i] for i in sorted(chosen)]

    def _messages(self, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """What the cohort is asked."""
        if self.heard is not None:
            config["cohort"], config["heard"] = self.cohort, [self.heard.get(client, 0) for client in self.cohort]
        content = self.prepare(RecordDict({"arrays": arrays, "config": config}), lambda asked: self._ask(asked, grid))
        return [Message(content, dst_node_id=node, message_type="train") for node in self.cohort]

    def _ask(self, content: RecordDict, grid: Grid) -> Iterator[RecordDict]:
        messages = [Message(content, dst_node_id=node, message_type="query.statistics") for node in self.cohort]
        for reply in self._accepted(grid.send_and_receive(messages), Inspection(self._arrays).fault):
            yield reply.content
        self.cohort = list(self._counted)

    def _folded(self, replies: Iterable[Message]) -> tuple[dict[str, Fold], "WeightedMeans"]:
        """The answers of a round, each folded in as it arrives, and their numbers."""
        accumulators = self.accumulators()
        expected = Inspection(self._arrays, frozenset(accumulators), self.partial)
        accumulators["buffers"] = ArithmeticMean()
        means = WeightedMeans()
        for content in self._contents(replies, expected.fault):
            self._fold(content, accumulators, means)
            del content  # or this answer would stay alive while the next is computed
        return accumulators, means

    def _fold(self, content: RecordDict, accumulators: Mapping[str, Fold], means: "WeightedMeans") -> None:
        weight = self._weight(content)
        records: Records = {name: unpack(record) for name, record in array_records(content).items()}
        if self.guard is not None:
            records = self.guard.clipped(records, self._arrays)
        for name, arrays in records.items():
            accumulators[name].add(arrays, weight)
        means.add(metrics_of(content), weight)

    def _contents(self, replies: Iterable[Message], fault: Callable[[RecordDict], str | None]) -> Iterator[RecordDict]:
        for reply in self._accepted(replies, fault):
            content = reply.content
            del reply
            yield content
            del content

    def _accepted(self, replies: Iterable[Message], fault: Callable[[RecordDict], str | None]) -> Iterator[Message]:
        """The replies that can be used; the others are noted with their reasons."""
        self._counted: dict[int, None] = {}
        for reply in replies:
            client = reply.metadata.src_node_id
            if reply.has_error():
                reason: str | None = reply.error.reason or f"error {reply.error.code}"
            elif client in self._counted:
                reason = "answered twice; the second answer is ignored"
            else:
                reason = _bad_metrics(reply.content) or fault(reply.content)
            if reason is None:
                self._counted[client] = None
                yield reply
            else:
                self.failures.append(Failure(client, reason))
            del reply

    def _weight(self, content: RecordDict) -> float:
        return float(metrics_of(content)["num-examples"]) if self.weight_by == "examples" else 1.0

    def _require(self, answers: int, server_round: int) -> None:
        """Stop a round that has fewer usable answers than ``min_clients``."""
        if self.guard is not None and not self.cohort:
            return  # that nobody was drawn must not show
        if answers < self.min_clients:
            reasons = "; ".join(str(failure) for failure in self.failures[:5]) or "no client answered"
            raise TooFewAnswersError(
                f"round {server_round}: {answers} usable answers, strategy.min_clients = {self.min_clients}. {reasons}. "
                "Mend the clients and resume, or start again with a lower min_clients"
            )


class Inspection:
    """Finds out whether answers can be folded together.

    An array that is named after one of the model's must have its shape and type; apart from that, the first answer
    without fault fixes what the others hold. What an answer says it leaves out counts as held: a client that trained nothing of an
    array says so, one that forgets an array is refused.

    Args:
        model: the global arrays.
        records: which records an answer has, apart from ``buffers``; None: those of the first.
        partial: whether answers may leave arrays out.
    """

    def __init__(self, model: Named, records: frozenset[str] | None = None, partial: bool = False) -> None:
        self._model = model
        self._records = records
        self._partial = partial
        self._first: dict[str, dict[str, str]] | None = None
        self._most = sum(2 * tensor.nbytes + HEADER_BYTES for tensor in model.values())

    def fault(self, content: RecordDict) -> str | None:
        """Why an answer cannot be used: a missing or foreign record or array, a wrong shape or type, a NaN; or None."""
        given = array_records(content).keys() - {"buffers"}
        if not given or given != (self._records or given):
            return f"the answer has the records {sorted(given)}, expected {sorted(self._records or ['at least one'])}"
        heaviest = max(array_records(content).items(), key=lambda item: held_bytes(item[1]))
        if held_bytes(heaviest[1]) > self._most:
            return f"record {heaviest[0]!r} has {held_bytes(heaviest[1])} bytes, the model's arrays take {self._most} at the most"
        try:
            records = {name: unpack(record) for name, record in array_records(content).items()}
        except Exception as error:  # whatever bytes a client sent
            return f"the answer cannot be read: {error}"
        layout = {record: {name: _layout(tensor) for name, tensor in arrays.items()} for record, arrays in records.items()}
        left_out = config_of(content, UNTRAINED)
        reason = self._unfounded(left_out, layout)
        if reason is not None:
            return reason
        for record, names in left_out.items():
            layout[record] |= {name: _layout(self._model[name]) for name in names}
        reason = next(filter(None, (self._misfit(record, arrays) for record, arrays in layout.items())), None)
        reason = reason or next(filter(None, map(_not_finite, records.values())), None)
        if reason is None and self._first is None:
            self._first = layout
        return reason

    def _unfounded(self, left_out: Mapping[str, Any], layout: Mapping[str, Mapping[str, str]]) -> str | None:
        """What is wrong with what an answer says it leaves out."""
        for record, names in left_out.items():
            if record not in layout or not isinstance(names, list):
                return f"the answer leaves out {names!r} of a record {record!r}, which it does not have"
            for name in names:
                if name not in self._model:
                    return f"array {name!r} is left out, but is not an array of the model"
                if name in layout[record]:
                    return f"array {name!r} is left out and sent all the same"
                if not self._partial:
                    return f"array {name!r} is left out, but the strategy needs all of them"
        return None

    def _misfit(self, record: str, arrays: Mapping[str, str]) -> str | None:
        foreign = sorted(arrays.keys() - self._model.keys())
        if foreign and len(foreign) < len(arrays):
            return f"array {foreign[0]!r} is not an array of the model"
        about = self._model if record == "arrays" else self._model.keys() & arrays.keys()
        expected = {name: _layout(self._model[name]) for name in about} if self._first is None else self._first.get(record, {})
        checked = expected if self._first is None else expected.keys() | arrays.keys()
        for name in sorted(checked):
            if arrays.get(name) != expected.get(name):
                return f"array {name!r} is {arrays.get(name, 'missing')}, expected {expected.get(name, 'none of that name')}"
        return None


class WeightedMeans:
    """Weighted means of clients' numbers, by name; of what they have spent of their privacy, the largest."""

    def __init__(self) -> None:
        self.count = 0
        self._spent: list[float] = []
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Any], weight: float) -> None:
        """Count one client's metrics; ``num-examples`` is summed up, not averaged."""
        self.count += 1
        self._spent += [float(metrics[EPSILON])] if EPSILON in metrics else []
        for name, value in metrics.items():
            if name == EPSILON:
                continue
            scale = 1.0 if name == "num-examples" else weight
            self._sums[name] = self._sums.get(name, 0.0) + scale * value
            self._weights[name] = self._weights.get(name, 0.0) + scale

    def result(self) -> dict[str, float]:
        """The means; and the total of ``num-examples``."""
        means = {name: self._sums[name] / self._weights[name] for name in self._sums if self._weights[name]}
        spent = {EPSILON: max(self._spent)} if self._spent else {}
        return means | spent | {name: self._sums[name] for name in ("num-examples",) if name in self._sums}


def reply(message: Message, update: Update, examples: int, work: int | None = None) -> Message:
    """A client's answer as Flower carries it.

    Args:
        message: what is answered.
        update: the answer.
        examples: how many the client trains on; its weight, where examples count.
        work: how many it pushed through the model for this answer, one that was used twice counting twice.
    """
    given = {name: arrays for name, arrays in update.records.items() if arrays}
    records: dict[str, Any] = {name: pack(_without(arrays, update.untrained)) for name, arrays in given.items()}
    left_out = {name: sorted(arrays.keys() & update.untrained) for name, arrays in given.items()}
    if any(left_out.values()):
        records[UNTRAINED] = ConfigRecord({name: names for name, names in left_out.items() if names})
    records["metrics"] = MetricRecord({"num-examples": examples, **update.metrics})
    records["work"] = ConfigRecord({"examples": examples if work is None else work})  # Flower's strategies take one MetricRecord only
    return Message(RecordDict(records), reply_to=message)


def work_of(content: RecordDict) -> int:
    """How many examples a client pushed through the model for an answer; 0 if it does not say."""
    return int(config_of(content, "work").get("examples", 0))


def _without(arrays: Named, names: AbstractSet[str]) -> Named:
    return {name: tensor for name, tensor in arrays.items() if name not in names} if names else arrays


def _bad_metrics(content: RecordDict) -> str | None:
    """Why an answer's numbers cannot be averaged."""
    metrics = metrics_of(content)
    if "num-examples" not in metrics:
        return "the answer has no 'metrics' record with 'num-examples'"
    if len(metrics) > MOST_METRICS:
        return f"the answer has {len(metrics)} metrics, expected at most {MOST_METRICS}"
    lists = [name for name, value in metrics.items() if not isinstance(value, int | float)]
    if lists:
        return f"metric {lists[0]!r} is {metrics[lists[0]]!r}, expected a number"
    if not 0 <= metrics["num-examples"] < math.inf:
        return f"'num-examples' is {metrics['num-examples']!r}, expected a number of examples"
    return None


def _layout(tensor: Tensor) -> str:
    return str(Layout(tensor.shape, tensor.dtype))


def _not_finite(arrays: Named) -> str | None:
    """The first array with a NaN or an infinity, in words."""
    for name, tensor in arrays.items():
        if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():  # the sum is the quick look
            return f"array {name!r} holds NaN or infinite values"
    return None
