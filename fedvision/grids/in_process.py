"""The in-process grid: every client answers in this process, one after the other."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from types import TracebackType
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedvision.registry import engines

log = logging.getLogger("fedvision")

CLIENT_RAISED = 2
"""Flower's error code for a client whose code raised an exception."""


@engines("in-process")
class InProcessGrid(Grid):
    """Clients in this process, one after the other in partition-id order; nothing is serialized.

    Answers come back as a stream: each client runs when its answer is asked for, so only one answer is alive
    and memory does not grow with the cohort. A client that raises becomes an error reply.

    Attributes:
        device: where clients compute: ``cpu``, ``cuda``, ``cuda:1``, ...
    """

    def __init__(self, client_app: ClientApp, run_config: Mapping[str, Any], clients: int, device: str = "cpu") -> None:
        self._client_app = client_app
        self._run_config = dict(run_config)
        self._clients = clients
        self._device = device
        self._run = Run.create_empty(int(self._run_config.get("run-id", 1)))
        self._states: dict[int, RecordDict] = {}
        self._answers: dict[str, Message] = {}
        self._message_ids = count(1)

    def __enter__(self) -> "InProcessGrid":
        self._identity = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, self._run.run_id, 0
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = self._identity

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
        return range(self._clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have the clients answer at once; the answers wait to be pulled."""
        answers = {reply.metadata.reply_to_message_id: reply for reply in self.send_and_receive(messages)}
        self._answers.update(answers)
        return list(answers)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers to pushed messages, each once."""
        return [self._answers.pop(message_id) for message_id in message_ids if message_id in self._answers]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The answers in partition-id order, each computed when it is asked for; ``timeout`` does not apply."""
        for message in sorted(messages, key=lambda message: message.metadata.dst_node_id):
            message.metadata.__dict__["_message_id"] = str(next(self._message_ids))
            yield self._answer(message)

    def client_states(self) -> Mapping[int, RecordDict]:
        """What clients keep between rounds, by partition id; clients that keep nothing are left out."""
        return {client: state for client, state in sorted(self._states.items()) if state}

    def load_client_states(self, states: Mapping[int, RecordDict]) -> None:
        """Go on with what clients kept."""
        self._states = dict(states)

    def _answer(self, message: Message) -> Message:
        client = message.metadata.dst_node_id
        state = self._states.get(client)
        context = Context(
            run_id=self._run.run_id,
            node_id=client,
            node_config={"partition-id": client, "num-partitions": self._clients},
            state=RecordDict() if state is None else state,
            run_config=self._run_config,
        )
        try:
            answer = self._client_app(message, context)
        except Exception as error:
            log.debug("client %d raised", client, exc_info=True)
            return Message(Error(CLIENT_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)
        if context.state:
            self._states[client] = context.state
        return answer
