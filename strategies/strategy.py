"""The contract of a strategy: both halves of an algorithm, the server's and what it changes inside the client.

A strategy is a Flower ``Strategy``: a plain Flower app calls ``strategy.start(grid, ...)`` at the server and
``strategy.client_update(silo, content)`` in the client. What differs between algorithms is four short methods.
"""

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from torch import Tensor, nn

from fedvision.arrays import Named, pack, unpack
from fedvision.data import Examples
from fedvision.errors import AggregationError
from fedvision.learners.learner import Learner
from fedvision.seeds import numpy_generator
from fedvision.settings import Count, PositiveFraction
from strategies.means import Accumulator, ArithmeticMean

log = logging.getLogger("fedvision")

Records = Mapping[str, Named]
"""Named arrays by record, such as ``{"gradient": {...}, "buffers": {...}}``."""


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

    def arrays(self) -> dict[str, Tensor]:
        """A copy of all of the model's shared arrays: parameters and buffers."""

    def buffers(self) -> dict[str, Tensor]:
        """A copy of the model's buffers, such as BatchNorm's running statistics."""

    def batches(self, size: int, shuffle: bool = True) -> Iterator[Examples]:
        """One pass over the training examples, as the learner's loss sees them."""

    def gradient(self, batches: Iterable[Examples]) -> tuple[float, dict[str, Tensor]]:
        """Mean loss over the examples of all batches, and its gradient."""

    def descend(self, batches: Iterable[Examples], optimizer: dict[str, Any], penalty: Callable[[], Tensor] | None = None) -> float:
        """One optimizer step a batch, in place; the mean loss seen on the way."""


@dataclass(frozen=True)
class Update:
    """One client's answer.

    Attributes:
        records: named arrays by record.
        metrics: numbers to average over the clients, ``train_loss`` among them.
    """

    records: Records
    metrics: Mapping[str, float] = field(default_factory=dict)


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
        failures: the clients that failed or were refused in the latest round.
        answered: how many clients' answers were accepted in the latest round.
    """

    fraction: PositiveFraction = 1.0
    fraction_evaluate: PositiveFraction | None = None
    min_clients: Count = 1
    weight_by: Literal["clients", "examples"] = "clients"
    seed: int = 0
    failures: list[Failure] = field(default_factory=list, init=False)
    answered: int = field(default=0, init=False)

    # ---- what an algorithm says --------------------------------------------------------------------------------

    @abstractmethod
    def client_update(self, silo: Silo, content: RecordDict) -> Update:
        """In the client: the answer to a round's message, from a silo that holds the global model."""

    @abstractmethod
    def accumulators(self) -> dict[str, Accumulator]:
        """At the server: a fresh accumulator for each record of the answers."""

    @abstractmethod
    def server_update(self, arrays: Named, aggregates: Records) -> Named:
        """At the server: the next global parameters, from this round's and the accumulators' results."""

    def prepare(self, content: RecordDict, ask: Callable[[RecordDict], Iterator[RecordDict]]) -> RecordDict:
        """At the server, before training: what to send; ``ask`` first collects ``client_statistics`` where needed."""
        return content

    def client_statistics(self, silo: Silo, content: RecordDict) -> Update:
        """In the client: the answer to ``prepare``'s question."""
        raise AggregationError(f"{type(self).__name__} asks its clients for no statistics")

    def state(self) -> dict[str, Any]:
        """What the server must remember between rounds: nested dicts and lists of tensors, numbers and text."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state``."""

    # ---- Flower's side; final ----------------------------------------------------------------------------------

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """One message to each client of this round's cohort."""
        self._arrays = unpack(arrays)
        self.failures = []
        cohort = self._cohort(server_round, "cohort", self.fraction, grid)
        config["server-round"] = server_round
        content = self.prepare(RecordDict({"arrays": arrays, "config": config}), lambda asked: self._ask(asked, cohort, grid))
        return [Message(content, dst_node_id=node, message_type="train") for node in cohort]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """The next global model and the clients' mean metrics; answers are folded one by one as they arrive.

        Raises:
            AggregationError: fewer than ``min_clients`` answers could be used.
        """
        accumulators = self.accumulators()
        means = WeightedMeans()
        for content in self._accepted(replies, self._expected):
            weight = self._weight(content)
            for name, record in content.array_records.items():
                accumulators.setdefault(name, ArithmeticMean()).add(unpack(record), weight)
            means.add(content["metrics"], weight)
        self.answered = means.count
        if self.answered < self.min_clients:
            raise AggregationError(self._too_few(server_round))
        aggregates = {name: accumulator.result() for name, accumulator in accumulators.items() if accumulator.count}
        following = {**self._arrays, **aggregates.pop("buffers", {})}
        following.update(self.server_update(self._arrays, aggregates))
        return pack(following), MetricRecord(means.result())

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """One message to each client that evaluates in this round."""
        cohort = self._cohort(server_round, "evaluate", self.fraction_evaluate or self.fraction, grid)
        config["server-round"] = server_round
        content = RecordDict({"arrays": arrays, "config": config})
        return [Message(content, dst_node_id=node, message_type="evaluate") for node in cohort]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord:
        """The clients' mean metrics; a client that evaluated nothing does not count."""
        means = WeightedMeans()
        for content in self._accepted(replies, lambda content: None):
            if content["metrics"]["num-examples"]:
                means.add(content["metrics"], self._weight(content))
        return MetricRecord(means.result())

    def summary(self) -> None:
        """Log the settings."""
        log.info("strategy %r", self)

    # ---- parts -------------------------------------------------------------------------------------------------

    def _cohort(self, server_round: int, purpose: str, fraction: float, grid: Grid) -> list[int]:
        nodes = list(grid.get_node_ids())
        if len(nodes) < self.min_clients:
            raise AggregationError(f"{len(nodes)} clients are connected, strategy.min_clients = {self.min_clients}; lower it or add clients")
        size = min(max(round(fraction * len(nodes)), self.min_clients, 1), len(nodes))
        if size == len(nodes):
            return nodes
        chosen = numpy_generator(self.seed, purpose, server_round).choice(len(nodes), size, replace=False)
        return [nodes[i] for i in sorted(chosen)]

    def _ask(self, content: RecordDict, cohort: list[int], grid: Grid) -> Iterator[RecordDict]:
        messages = [Message(content, dst_node_id=node, message_type="query.statistics") for node in cohort]
        return self._accepted(grid.send_and_receive(messages), _finite)

    def _accepted(self, replies: Iterable[Message], fault: "Callable[[RecordDict], str | None]") -> Iterator[RecordDict]:
        """The contents of the replies that can be used; the others are noted with their reasons."""
        seen: set[int] = set()
        for reply in replies:
            client = reply.metadata.src_node_id
            if reply.has_error():
                reason: str | None = reply.error.reason or f"error {reply.error.code}"
            elif client in seen:
                reason = "answered twice; the second answer is ignored"
            else:
                reason = _without_metrics(reply.content) or fault(reply.content)
            if reason is None:
                seen.add(client)
                yield reply.content
            else:
                self.failures.append(Failure(client, reason))

    def _expected(self, content: RecordDict) -> str | None:
        """Why a training answer cannot be used: a missing record, or an array that is misshapen or not finite."""
        missing = [name for name in self.accumulators() if name not in content.array_records]
        if missing:
            return f"the answer lacks the record {missing[0]!r}"
        for record in content.array_records.values():
            for name, array in record.items():
                if name in self._arrays and tuple(array.shape) != tuple(self._arrays[name].shape):
                    return f"array {name!r} has shape {tuple(array.shape)}, expected {tuple(self._arrays[name].shape)}"
        return _finite(content)

    def _weight(self, content: RecordDict) -> float:
        return float(content["metrics"]["num-examples"]) if self.weight_by == "examples" else 1.0

    def _too_few(self, server_round: int) -> str:
        reasons = "; ".join(str(failure) for failure in self.failures[:5]) or "no client answered"
        return (
            f"round {server_round}: {self.answered} usable answers, strategy.min_clients = {self.min_clients}. {reasons}. "
            "Mend the clients, or lower min_clients, and resume"
        )


class WeightedMeans:
    """Weighted means of clients' numbers, by name."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Any], weight: float) -> None:
        """Count one client's metrics; ``num-examples`` is summed up, not averaged."""
        self.count += 1
        for name, value in metrics.items():
            scale = 1.0 if name == "num-examples" else weight
            self._sums[name] = self._sums.get(name, 0.0) + scale * value
            self._weights[name] = self._weights.get(name, 0.0) + scale

    def result(self) -> dict[str, float]:
        """The means; and the total of ``num-examples``."""
        means = {name: self._sums[name] / self._weights[name] for name in self._sums if self._weights[name]}
        return means | {name: self._sums[name] for name in ("num-examples",) if name in self._sums}


def reply(message: Message, update: Update, examples: int) -> Message:
    """A client's answer as Flower carries it."""
    records: dict[str, Any] = {name: pack(arrays) for name, arrays in update.records.items() if arrays}
    records["metrics"] = MetricRecord({"num-examples": examples, **update.metrics})
    return Message(RecordDict(records), reply_to=message)


def _without_metrics(content: RecordDict) -> str | None:
    metrics = content.metric_records.get("metrics")
    return None if metrics is not None and "num-examples" in metrics else "the answer has no 'metrics' record with 'num-examples'"


def _finite(content: RecordDict) -> str | None:
    """The first array with a NaN or an infinity, in words."""
    for record in content.array_records.values():
        for name, tensor in unpack(record).items():
            if tensor.is_floating_point() and tensor.numel() and not torch.linalg.vector_norm(tensor, ord=torch.inf).isfinite():
                return f"array {name!r} holds NaN or infinite values"
    return None
