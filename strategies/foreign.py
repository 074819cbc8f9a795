"""Strategies of other projects: any Flower strategy, with FedAvg's local training as its client half."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from torch import Tensor

from fedvision.arrays import Named, pack, unpack
from fedvision.errors import AggregationError, ExperimentError
from fedvision.seeds import python_generator
from fedvision.settings import parameters
from strategies.fedavg import FedAvg
from strategies.strategy import Fold, Inspection, Records, Silo, Strategy, Update, batchable, protects

CLIENT_SETTINGS = ("epochs", "steps", "batch_size", "shuffle", "client_optimizer")
"""FedAvg's settings that a foreign strategy's table may carry for the clients."""


WAITED_FOR = ("min_available_nodes", "min_train_nodes", "min_evaluate_nodes")
"""Flower's settings that have a strategy wait for clients."""


def adapted(target: Callable[..., Any]) -> Callable[..., Any]:
    """``target`` itself if it is one of this project's strategies, else what builds it with a client half.

    Raises:
        ExperimentError: no Flower strategy at all.
    """
    if inspect.isclass(target) and issubclass(target, Strategy):
        return target
    if not (inspect.isclass(target) and issubclass(target, FlowerStrategy)):
        raise ExperimentError(f"strategy {target!r} is no flwr.serverapp.strategy.Strategy; name a class that is")
    own = parameters(target)
    local = {name: parameter for name, parameter in parameters(FedAvg).items() if name in CLIENT_SETTINGS and name not in own}

    def build(**settings: Any) -> Foreign:
        clients = FedAvg(**{name: settings[name] for name in local if name in settings})
        return Foreign(target(**{name: settings[name] for name in own if name in settings}), clients, settings.get("seed", 0))

    keyword = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in (*own.values(), *local.values())]
    build.__name__, build.__doc__ = target.__name__, target.__doc__
    build.__annotations__ = {parameter.name: parameter.annotation for parameter in keyword} | {"seed": int}
    seeded = inspect.Parameter("seed", inspect.Parameter.KEYWORD_ONLY, default=0, annotation=int)
    build.__signature__ = inspect.Signature([*keyword, *([] if "seed" in own else [seeded])])  # type: ignore[attr-defined]
    return build


class Foreign(Strategy):
    """Another project's Flower strategy at the server, FedAvg's local training in the clients.

    Its cohorts are as reproducible as the rest of a run: Python's global generator, which Flower's strategies
    draw from, is lent a seed of the round. What it keeps between rounds is not checkpointed.

    Args:
        strategy: the other project's.
        clients: whose client half is used.
        seed: from which the cohorts are drawn.
    """

    def __init__(self, strategy: FlowerStrategy, clients: FedAvg, seed: int = 0) -> None:
        super().__init__(seed=seed, weight_by="examples")
        self._strategy, self._clients = strategy, clients

    @batchable
    @protects(otherwise="what it does with the answers is another project's")
    def client_update(self, silo: Silo, content: RecordDict) -> Update:
        """The locally trained model, all of it: Flower's strategies take means of whole models."""
        return replace(self._clients.client_update(silo, content), untrained=frozenset())

    @property
    def client_optimizer(self) -> dict[str, Any]:
        """That of the clients' local training."""
        return self._clients.client_optimizer

    def accumulators(self) -> dict[str, Fold]:
        """The one record that Flower's strategies expect."""
        return self._clients.accumulators()

    def server_update(self, arrays: Named, aggregates: Records) -> Named:
        """Not used: the other strategy aggregates messages."""
        raise AggregationError("a foreign strategy aggregates messages itself")

    def remember(self) -> None:
        """Nothing: what clients are told is up to the other strategy."""

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """As the other strategy says."""
        super().configure_train(server_round, arrays, config, grid)
        self._require_connected(grid)
        with python_generator(self.seed, "cohort", server_round):
            messages = self._strategy.configure_train(server_round, arrays, config, grid)
        messages = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        self.cohort = [message.metadata.dst_node_id for message in messages]
        return messages

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """As the other strategy says."""
        self._require_connected(grid)
        with python_generator(self.seed, "evaluate", server_round):
            return list(self._strategy.configure_evaluate(server_round, arrays, config, grid))

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """As the other strategy says, of the answers that can be used."""
        accepted = list(self._accepted(replies, Inspection(self._arrays, frozenset({"arrays"})).fault))
        self.answered = len(accepted)
        self._require(self.answered, server_round)
        arrays, metrics = self._strategy.aggregate_train(server_round, accepted)
        if arrays is None:
            name = type(self._strategy).__name__
            raise AggregationError(f"round {server_round}: {name} aggregated nothing from {self.answered} answers; see its log")
        return pack({name: self._typed(name, tensor) for name, tensor in unpack(arrays).items()}), metrics or MetricRecord()

    def _typed(self, name: str, tensor: Tensor) -> Tensor:
        """An array in the model's own type, which Flower's strategies lose for counters."""
        dtype = self._arrays[name].dtype
        return tensor.to(dtype) if dtype.is_floating_point else tensor.round().to(dtype)

    def _require_connected(self, grid: Grid) -> None:
        """Refuse what Flower's strategies would wait for without end."""
        connected = len(list(grid.get_node_ids()))
        for setting in WAITED_FOR:
            if connected < getattr(self._strategy, setting, 0):
                few = f"{connected} clients are connected, strategy.{setting} = {getattr(self._strategy, setting)}"
                raise AggregationError(f"{few}; lower it or add clients")
