"""The roster: clients by their partition ids, whatever node ids Flower gave them."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any, NoReturn

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedvision.arrays import config_of
from fedvision.errors import EngineError
from fedvision.grids.passing import PassingGrid

ROLL_CALL = "query.roster"
"""The message that asks a node which partition it holds."""

NODE_GONE = 5
"""Flower's error code for a node that is not connected."""

LATECOMER_SECONDS = 60.0
"""How long a round waits for a node to say what it holds that came after the others."""

SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 0.5
"""Seconds between two looks for answers; doubled from the shortest to the longest, since Flower's grids wake nobody."""


def present(message: Message, context: Context) -> Message:
    """In the client: the answer to the roll call: versions, and -1 for what the node's configuration leaves out."""
    held = {name: int(context.node_config.get(name, -1)) for name in ("partition-id", "num-partitions")}
    return Message(RecordDict({"config": ConfigRecord({**held, "versions": versions()})}), reply_to=message)


def versions() -> str:
    """The versions here of what must be equal on all sides: of torch, without what it was built for."""
    return ", ".join(f"{name} {metadata.version(name).partition('+')[0]}" for name in ("flwr", "torch"))


class Roster(PassingGrid):
    """Presents the nodes of one of Flower's grids by the partitions that they hold.

    Flower gives nodes random ids, so the same seed would draw other cohorts in every run. Here a node is its partition,
    as in the in-process grid. Each node is asked once; nodes that come later are asked when they are first seen.

    Answers are a stream in partition-id order, each yielded as soon as those before it have come. A node that cannot be
    reached becomes an error reply of its client.

    Args:
        grid: of Flower's.
        clients: how many partitions there are.
        seconds: how long to wait until every partition has a node.
    """

    def __init__(self, grid: Grid, clients: int, seconds: float = 300.0) -> None:
        super().__init__(grid)
        self._clients = clients
        self._seconds = seconds
        self._partitions: dict[int, int] = {}
        self._nodes: dict[int, int] = {}
        self._silent: dict[int, str] = {}
        self._sent: dict[str, int] = {}
        self._complete = False

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        """A message to one client."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """The partition ids of the nodes that are connected, in order; the first call waits until all are.

        Raises:
            EngineError: not all partitions have a node in time, two nodes hold the same, or one fails the roll call.
        """
        if not self._complete:
            self._gather()
        return sorted(self._connected())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages to partitions.

        Raises:
            EngineError: the node of a partition has left.
        """
        ids, lost = self._push(list(messages))
        if lost:
            raise EngineError(f"the nodes of the clients {_shown(sorted(lost))} have left; send to those of get_node_ids")
        return list(ids)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers that have come, under their partition ids; that of a dead node bears another id than its own."""
        return [_from(self._sent.pop(reply.metadata.reply_to_message_id), reply) for reply in self._grid.pull_messages(message_ids)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The answers in partition-id order; those that have not come after ``timeout`` seconds are left out."""
        awaited, arrived = self._push(list(messages))
        deadline, pause = math.inf if timeout is None else time.monotonic() + timeout, SHORTEST_PAUSE
        for client in sorted([*awaited.values(), *arrived]):
            while client not in arrived and time.monotonic() < deadline:
                for reply in self.pull_messages(set(awaited)):
                    arrived[awaited.pop(reply.metadata.reply_to_message_id)] = reply
                if client not in arrived:
                    time.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
            if client in arrived:
                yield arrived.pop(client)

    def load_client_states(self, states: Mapping[int, RecordDict]) -> NoReturn:
        """Refuse what clients kept: over Flower's grids it stays with the nodes.

        Raises:
            EngineError: always.
        """
        held = f"the checkpoint holds what {len(states)} clients keep between rounds, which cannot be sent to Flower's nodes"
        raise EngineError(f"{held}; resume the run with the engine that it began with")

    # ---- who holds what ----------------------------------------------------------------------------------------

    def _gather(self) -> None:
        """Wait until every partition has a node."""
        deadline, pause = time.monotonic() + self._seconds, SHORTEST_PAUSE
        while missing := sorted(set(range(self._clients)) - self._connected(deadline - time.monotonic()).keys()):
            for node, reason in self._silent.items():
                raise EngineError(f"node {node} did not say which partition it holds: {reason}; mend that silo, then run again")
            if time.monotonic() >= deadline:
                came = f"{self._clients - len(missing)} of {self._clients} clients came within {self._seconds:g} seconds"
                raise EngineError(f"{came}, those of the partitions {_shown(missing)} did not; start their nodes, then run again")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        self._complete = True

    def _connected(self, seconds: float = LATECOMER_SECONDS) -> dict[int, int]:
        """The node of each partition among those connected now; strangers are asked first."""
        connected = set(self._grid.get_node_ids())
        strangers = sorted(connected - self._partitions.keys() - self._silent.keys())
        if strangers:
            self._call(strangers, max(seconds, SHORTEST_PAUSE))
        self._nodes = {partition: node for node, partition in self._partitions.items() if node in connected}
        return self._nodes

    def _call(self, nodes: list[int], seconds: float) -> None:
        """Ask nodes which partitions they hold."""
        messages = [Message(RecordDict({"config": ConfigRecord()}), dst_node_id=node, message_type=ROLL_CALL) for node in nodes]
        replies = {reply.metadata.reply_to_message_id: reply for reply in self._grid.send_and_receive(messages, timeout=seconds)}
        found: dict[int, int] = {}
        for node, message in zip(nodes, messages, strict=True):
            reply = replies.get(message.metadata.message_id)
            if reply is None or reply.has_error():
                self._silent[node] = f"no answer within {seconds:.0f} seconds" if reply is None else _reason(reply)
                continue
            partition = self._checked(node, config_of(reply.content))
            if partition in found:
                both = f"nodes {found[partition]} and {node} both hold partition {partition}"
                raise EngineError(f"{both}; give each silo a partition-id of its own")
            found[partition] = node
        self._partitions.update({node: partition for partition, node in found.items()})

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

    def _push(self, messages: list[Message]) -> tuple[dict[str, int], dict[int, Message]]:
        """Send messages to partitions.

        Returns:
            The client of each accepted message by the message's id, and error replies of clients whose nodes have left.
        """
        clients = [message.metadata.dst_node_id for message in messages]
        for message, client in zip(messages, clients, strict=True):
            message.metadata.dst_node_id = self._nodes[client]
        accepted = set(self._grid.push_messages(messages))
        awaited, lost = {}, {}
        for message, client in zip(messages, clients, strict=True):
            if message.metadata.message_id in accepted:
                awaited[message.metadata.message_id] = client
            else:
                lost[client] = _from(client, Message(Error(NODE_GONE, "its node has left the federation"), reply_to=message))
        self._sent.update(awaited)
        return awaited, lost


def _from(client: int, reply: Message) -> Message:
    reply.metadata.__dict__["_src_node_id"] = client
    return reply


def _reason(reply: Message) -> str:
    return reply.error.reason or f"error {reply.error.code}"


def _shown(partitions: list[int]) -> str:
    return ", ".join(map(str, partitions[:10])) + (", ..." if len(partitions) > 10 else "")
