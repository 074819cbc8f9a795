"""One exchange with Flower's nodes: messages out, answers in; what is lost on the way is sent again."""

import logging
import re
import time
from collections.abc import Collection, Iterable, Mapping

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

log = logging.getLogger("fedvision")

ROLL_CALL = "query.roster"
"""The message that asks a node which partition it holds, and costs it nothing."""

EXPIRED, NODE_GONE = 3, 5
"""Flower's error codes for a message that is valid no longer, and for a node that is not connected."""

SILENT_SECONDS = 60.0
"""How long a client may be silent before its node is asked whether it is at work."""

RAISED = re.compile(r"<class '(?:[\w.]+\.)?(\w+)'>:<'(.*)'>", re.DOTALL)
"""How Flower describes the exception of a client's code."""

LONGEST_REASON = 500
"""Characters of what a client says went wrong there."""


class Exchange:
    """Messages to clients, and the answers that have come.

    Flower hands each message out once. One that a node asked for while its network was cut is gone, and so is an answer that a SuperLink
    handed out while it was killed; nobody is told. A SuperNode takes one message after the other: if it answers a roll call that came
    after a message, and not that message, it has never got it, or its answer is lost, and the message is sent again.

    Args:
        grid: of Flower's.
        nodes: the node of each client that is connected.
        messages: each to a client; they are sent at once.
        repeatable: the clients who may be sent a message again, since their nodes take one after the other, and what they keep does
            not change when they answer the same message twice.

    Attributes:
        awaited: the client of each message that has no answer yet, by the message's id.
        arrived: the answers by client, each to be taken out by who uses it; a client that cannot be reached has an error.
    """

    def __init__(self, grid: Grid, nodes: Mapping[int, int], messages: Iterable[Message], repeatable: Collection[int] = ()) -> None:
        self._grid, self._nodes, self._repeatable = grid, nodes, repeatable
        self._messages = {message.metadata.dst_node_id: message for message in messages}
        self._questions: dict[str, int] = {}
        self._silent_since: dict[int, float] = {}
        self.awaited: dict[str, int] = {}
        self.arrived: dict[int, Message] = {}
        for client in self._send(self._messages, self.awaited):
            self.arrived[client] = error(client, self._messages[client], NODE_GONE, "its node is not connected")

    def look(self) -> None:
        """Take in what has come, and ask after those who are silent."""
        idle = []
        for reply in self._grid.pull_messages({*self.awaited, *self._questions}):
            name = reply.metadata.reply_to_message_id
            if name in self._questions:
                client = self._questions.pop(name)
                idle += [] if reply.has_error() else [client]
            elif name in self.awaited:
                client = self.awaited[name]
                self.arrived[client] = named(client, reply)
                self.awaited = {other: theirs for other, theirs in self.awaited.items() if theirs != client}
        waiting = set(self.awaited.values())
        self._send_again([client for client in idle if client in waiting])
        self._ask_after([client for client in waiting.intersection(self._repeatable) if client not in self._questions.values()])

    def late(self, client: int) -> Message:
        """The error of a client that is not waited for any longer."""
        return error(client, self._messages[client], EXPIRED)

    def _send_again(self, clients: Collection[int]) -> None:
        for client in clients:
            log.warning("client %d: its node is not at work, and has not answered; what was lost on the way is sent again", client)
        self._send({client: self._copy(self._messages[client]) for client in clients}, self.awaited)

    def _ask_after(self, clients: Iterable[int]) -> None:
        silent = [client for client in clients if time.monotonic() - self._silent_since[client] >= SILENT_SECONDS]
        self._send({client: Message(RecordDict({"config": ConfigRecord()}), client, ROLL_CALL) for client in silent}, self._questions)

    def _send(self, messages: Mapping[int, Message], awaited: dict[str, int]) -> list[int]:
        """Send each client its message, and note under which id it is awaited; the clients who cannot be reached."""
        there = [message for client, message in messages.items() if client in self._nodes]
        for client, message in messages.items():
            message.metadata.dst_node_id = self._nodes.get(client, 0)
        accepted = set(self._grid.push_messages(there)) if there else set()
        lost = []
        for client, message in messages.items():
            self._silent_since[client] = time.monotonic()
            if message.metadata.message_id and message.metadata.message_id in accepted:
                awaited[message.metadata.message_id] = client
            else:
                lost.append(client)
        return lost

    @staticmethod
    def _copy(message: Message) -> Message:
        """The same message to be sent anew, valid for as long as it still is."""
        left = message.metadata.created_at + message.metadata.ttl - time.time()
        return Message(message.content, message.metadata.dst_node_id, message.metadata.message_type, ttl=max(left, 1.0))


def error(client: int, message: Message, code: int, reason: str = "") -> Message:
    """An error reply to a message, under its client's name."""
    return named(client, Message(Error(code, reason), reply_to=message))


def named(client: int, reply: Message) -> Message:
    """A reply under its client's name, its error in the words of all engines."""
    reply.metadata.__dict__["_src_node_id"] = client
    if reply.has_error():
        reply.error = Error(reply.error.code, reason_of(reply))
    return reply


def reason_of(reply: Message) -> str:
    """Why a client did not answer."""
    if reply.error.code == EXPIRED:
        return "no answer in time"  # Flower's own words are about its database
    reason = reply.error.reason or f"error {reply.error.code}"
    raised = RAISED.fullmatch(reason)
    told = f"{raised[1]}: {raised[2]}" if raised else reason.removeprefix("Error: ")
    return told if len(told) <= LONGEST_REASON else f"{told[:LONGEST_REASON]} ..."
