"""The roster: clients by their partition ids, whatever node ids Flower gave them."""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any, NoReturn

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid

from fedvision.arrays import config_of
from fedvision.errors import EngineError
from fedvision.grids.exchange import ROLL_CALL, Exchange, named, reason_of
from fedvision.grids.passing import PassingGrid

log = logging.getLogger("fedvision")

STATE = "state"
"""The key of a node's configuration that names a folder in which the silo keeps what its client keeps from round to round."""

LATECOMER_SECONDS = 60.0
"""How long a round waits for a node to say what it holds that came after the others."""

SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 0.5
"""Seconds between two looks for answers; doubled from the shortest to the longest, since Flower's grids wake nobody."""


def present(message: Message, context: Context) -> Message:
    """In the client: the answer to the roll call: versions, whether the silo has a folder, and -1 for what its configuration leaves out."""
    held = {name: int(context.node_config.get(name, -1)) for name in ("partition-id", "num-partitions")}
    config = ConfigRecord({**held, "keeps": STATE in context.node_config, "versions": versions()})
    return Message(RecordDict({"config": config}), reply_to=message)


def versions() -> str:
    """The versions here of what must be equal on all sides: of torch, without what it was built for."""
    return ", ".join(f"{name} {metadata.version(name).partition('+')[0]}" for name in ("flwr", "torch"))


class Roster(PassingGrid):
    """Presents the nodes of one of Flower's grids by the partitions that they hold.

    Flower gives nodes random ids, so the same seed would draw other cohorts in every run. Here a node is its partition,
    as in the in-process grid. Each node is asked once; nodes that come later are asked when they are first seen.

    Whoever is connected, the clients are the same, and so are the cohorts drawn from them: a client whose node is not connected, cannot be
    reached or is too late answers with an error; a message that is lost on the way is sent again, see ``Exchange``. Answers are a
    stream in partition-id order, each yielded as soon as those before it have come.

    Args:
        grid: of Flower's.
        clients: how many partitions there are.
        seconds: how long to wait for nodes: until every partition has one at first, until ``least`` have one in later rounds.
        least: how many clients must be connected for a round.
        deadline: seconds until an answer comes too late; none if not given.
    """

    def __init__(self, grid: Grid, clients: int, seconds: float = 300.0, least: int = 1, deadline: float | None = None) -> None:
        super().__init__(grid)
        self._clients, self._seconds, self._least, self._deadline = clients, seconds, least, deadline
        self._online: set[int] = set()
        self._partitions: dict[int, int] = {}
        self._nodes: dict[int, int] = {}
        self._silent: dict[int, str] = {}
        self._keeping: set[int] = set()
        self._sent: dict[str, int] = {}
        self._complete = False

    @property
    def keeps(self) -> bool:
        """Whether the nodes keep on disk what their clients keep from round to round, so that it outlives this run of Flower's."""
        self.get_node_ids()
        return self._keeping >= self._nodes.keys()

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        """A message to one client."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """The partition ids, in order, once enough of their nodes are connected.

        Raises:
            EngineError: too few come in time; or, before the first round, two nodes hold the same partition, or one is set up wrongly.
        """
        self._silent.clear()
        self._gather(self._least if self._complete else self._clients)
        self._complete = True
        return range(self._clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages to partitions.

        Raises:
            EngineError: the node of a partition has left.
        """
        exchange = Exchange(self._grid, self._nodes, messages)
        if exchange.arrived:
            raise EngineError(f"the nodes of the clients {_shown(sorted(exchange.arrived))} have left; send to those that are connected")
        self._sent.update(exchange.awaited)
        return list(exchange.awaited)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers that have come, under their partition ids; that of a dead node bears another id than its own."""
        return [named(self._sent.pop(reply.metadata.reply_to_message_id), reply) for reply in self._grid.pull_messages(message_ids)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The answers in partition-id order; those that have not come after ``timeout`` seconds are left out.

        Without ``timeout``, those that have not come at the ``deadline`` are errors.
        """
        sent = list(messages)
        if self._deadline is not None:
            for message in sent:
                message.metadata.ttl = self._deadline  # after which Flower does not deliver it, nor its answer
        clients = sorted(message.metadata.dst_node_id for message in sent)
        exchange = Exchange(self._grid, self._nodes, sent, self._keeping)
        seconds = self._deadline if timeout is None else timeout
        end, pause = math.inf if seconds is None else time.monotonic() + seconds, SHORTEST_PAUSE
        for client in clients:
            while client not in exchange.arrived and time.monotonic() < end:
                exchange.look()
                if client not in exchange.arrived:
                    time.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
            if client in exchange.arrived:
                yield exchange.arrived.pop(client)
            elif timeout is None:
                yield exchange.late(client)

    def load_client_states(self, states: Mapping[int, RecordDict]) -> NoReturn:
        """Refuse what clients kept: over Flower's grids it stays with the nodes.

        Raises:
            EngineError: always.
        """
        held = f"the checkpoint holds what {len(states)} clients keep between rounds, which cannot be sent to Flower's nodes"
        raise EngineError(f"{held}; resume the run with the engine that it began with")

    # ---- who holds what ----------------------------------------------------------------------------------------

    def _gather(self, wanted: int) -> None:
        """Wait until so many partitions have a node; if that takes too long, until ``least`` have."""
        deadline, pause = time.monotonic() + self._seconds, SHORTEST_PAUSE
        while len(self._connected(deadline - time.monotonic())) < wanted:
            hopeless = len(self._nodes) + len(self._silent) >= wanted  # the others are there, but do not answer
            if hopeless or time.monotonic() >= deadline:
                self._go_on_with_fewer("" if hopeless else f" within {self._seconds:g} seconds")
                return
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _go_on_with_fewer(self, within: str) -> None:
        """Say who is missing.

        Raises:
            EngineError: too many are.
        """
        missing = sorted(set(range(self._clients)) - self._nodes.keys())
        came = f"{len(self._nodes)} of {self._clients} clients came{within}, those of the partitions {_shown(missing)} did not"
        said = "; ".join([came, *(f"node {node} did not say which partition it holds: {reason}" for node, reason in self._silent.items())])
        if len(self._nodes) < self._least:
            raise EngineError(f"{said}. strategy.min_clients = {self._least}; start or mend the others, then run again")
        log.warning("%s; the round goes on without them", said)

    def _connected(self, seconds: float = LATECOMER_SECONDS) -> dict[int, int]:
        """The node of each partition among those connected now; strangers are asked first."""
        self._online = set(self._grid.get_node_ids())
        strangers = sorted(self._online - self._partitions.keys() - self._silent.keys())
        if strangers:
            self._call(strangers, max(min(seconds, LATECOMER_SECONDS) if self._complete else seconds, SHORTEST_PAUSE))
        self._nodes = {partition: node for node, partition in self._partitions.items() if node in self._online}
        return self._nodes

    def _call(self, nodes: list[int], seconds: float) -> None:
        """Ask nodes which partitions they hold."""
        messages = [Message(RecordDict({"config": ConfigRecord()}), dst_node_id=node, message_type=ROLL_CALL) for node in nodes]
        replies = {reply.metadata.reply_to_message_id: reply for reply in self._grid.send_and_receive(messages, timeout=seconds)}
        for node, message in zip(nodes, messages, strict=True):
            reply = replies.get(message.metadata.message_id)
            if reply is None or reply.has_error():
                self._silent[node] = f"no answer within {seconds:.0f} seconds" if reply is None else reason_of(reply)
                continue
            try:
                self._enter(node, config_of(reply.content))
            except EngineError as error:
                if not self._complete:
                    raise
                self._silent[node] = str(error)

    def _enter(self, node: int, held: Mapping[str, Any]) -> None:
        """Note which partition a node holds."""
        partition = self._checked(node, held)
        others = [other for other, theirs in self._partitions.items() if theirs == partition and other in self._online]
        if others:
            raise EngineError(f"nodes {others[0]} and {node} both hold partition {partition}; give each silo a partition-id of its own")
        self._partitions = {other: theirs for other, theirs in self._partitions.items() if theirs != partition}
        self._partitions[node] = partition
        self._keeping -= {partition}
        if held.get("keeps", False):
            self._keeping.add(partition)

    def _checked(self, node: int, held: Mapping[str, Any]) -> int:
        """The partition that a node says it holds, if it can be, and if it runs what runs here."""
        theirs = held.get("versions", versions())
        if theirs != versions():
            raise EngineError(f"node {node} has {theirs}, the coordinator has {versions()}; install the same on all sides")
        partition, partitions = int(held["partition-id"]), int(held["num-partitions"])
        if partitions not in (-1, self._clients):
            differ = f"the federation has {partitions} nodes, the experiment has {self._clients} clients"
            raise EngineError(f"{differ}; in a simulation, give --federation-config 'num-supernodes={self._clients}'")
        if not 0 <= partition < self._clients:
            said = "no partition" if partition == -1 else f"partition {partition}"
            raise EngineError(f"node {node} holds {said}; start it with --node-config 'partition-id=N', N from 0 to {self._clients - 1}")
        return partition


def _shown(partitions: list[int]) -> str:
    return ", ".join(map(str, partitions[:10])) + (", ..." if len(partitions) > 10 else "")
