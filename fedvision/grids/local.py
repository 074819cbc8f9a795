"""What grids have in common whose clients are partitions of this experiment, and not machines of their own."""

import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import Any, NamedTuple, Self

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

log = logging.getLogger("fedvision")

CLIENT_RAISED = 2
"""Flower's error code for a client whose code raised an exception."""


class Answer(NamedTuple):
    """What comes back from a client: content or an error, and what it keeps until the next message."""

    result: RecordDict | Error
    state: RecordDict | None

    def to(self, message: Message) -> Message:
        """The answer as a reply to ``message``."""
        return Message(self.result, reply_to=message)


@dataclass(frozen=True)
class Desk:
    """Where the clients of one process answer.

    Attributes:
        client_app: what they run.
        run_config: the run's configuration; its ``run-id`` names the run.
        clients: how many there are in the federation.
    """

    client_app: ClientApp
    run_config: Mapping[str, Any]
    clients: int
    run_id: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "run_id", int(self.run_config.get("run-id", 1)))

    def __enter__(self) -> Self:
        identity = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
        object.__setattr__(self, "_identity", identity)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, self.run_id, 0  # Flower's messages ask for it
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = self.__dict__["_identity"]

    def answer(self, message: Message, state: RecordDict | None) -> Answer:
        """Have the message's client answer; one that raises answers with an error and keeps what it kept before."""
        client = message.metadata.dst_node_id
        context = Context(
            run_id=self.run_id,
            node_id=client,
            node_config={"partition-id": client, "num-partitions": self.clients},
            state=RecordDict({**(state or {})}),  # so that one who fails half-way has changed nothing
            run_config=dict(self.run_config),
        )
        try:
            reply = self.client_app(message, context)
        except Exception as error:
            log.debug("client %d raised", client, exc_info=True)
            return Answer(Error(CLIENT_RAISED, f"{type(error).__name__}: {error}"), state)
        result = reply.error if reply.has_error() else reply.content
        return Answer(result, context.state or None)


class LocalGrid(Grid):
    """Nodes are partitions, and what clients keep between rounds is kept here, whoever does their work.

    Args:
        client_app: what clients run.
        run_config: the run's configuration.
        clients: how many there are.
    """

    def __init__(self, client_app: ClientApp, run_config: Mapping[str, Any], clients: int) -> None:
        self._desk = Desk(client_app, dict(run_config), clients)
        self._run = Run.create_empty(self._desk.run_id)
        self._states: dict[int, RecordDict] = {}
        self._answers: dict[str, Message] = {}
        self._message_ids = count(1)

    def __enter__(self) -> Self:
        self._desk.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._desk.__exit__(kind, error, trace)

    @abstractmethod
    def _work(self, messages: Sequence[Message]) -> Iterator[tuple[Message, Answer]]:
        """Each message with its client's answer, in the order of ``messages``, as it is asked for."""

    def set_run(self, run: Run) -> None:
        """Adopt Flower's description of the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """Flower's description of the run."""
        return self._run

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        """A message to one client."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """The partition ids; here a node is its partition."""
        return range(self._desk.clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have the clients answer at once; the answers wait to be pulled."""
        answers = {reply.metadata.reply_to_message_id: reply for reply in self.send_and_receive(messages)}
        self._answers.update(answers)
        return list(answers)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers to pushed messages, each once."""
        return [self._answers.pop(message_id) for message_id in message_ids if message_id in self._answers]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The answers in partition-id order, as a stream; ``timeout`` does not apply."""
        ordered = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        for message in ordered:
            message.metadata.__dict__["_message_id"] = str(next(self._message_ids))
        for message, answer in self._work(ordered):
            if answer.state is not None:
                self._states[message.metadata.dst_node_id] = answer.state
            yield answer.to(message)
            del answer  # or it would stay alive while the next is computed

    def client_states(self) -> Mapping[int, RecordDict]:
        """What clients keep between rounds, by partition id; clients that keep nothing are left out."""
        return dict(sorted(self._states.items()))

    def load_client_states(self, states: Mapping[int, RecordDict]) -> None:
        """Go on with what clients kept."""
        self._states = dict(states)
