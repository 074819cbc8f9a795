"""The in-process grid: every client answers in this process, one after the other."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flwr.app import Message
from flwr.clientapp import ClientApp

from fedvision.grids.local import Answer, LocalGrid
from fedvision.registry import engines


@engines("in-process")
class InProcessGrid(LocalGrid):
    """Clients in this process, one after the other in partition-id order; nothing is serialized.

    Answers come back as a stream: each client runs when its answer is asked for, so only one answer is alive
    and memory does not grow with the cohort. A client that raises becomes an error reply.

    Attributes:
        device: where clients compute: ``cpu``, ``cuda``, ``cuda:1``, ...
    """

    def __init__(self, client_app: ClientApp, run_config: Mapping[str, Any], clients: int, device: str = "cpu") -> None:
        super().__init__(client_app, run_config, clients)

    def _work(self, messages: Sequence[Message]) -> Iterator[tuple[Message, Answer]]:
        for message in messages:
            yield message, self._desk.answer(message, self._states.get(message.metadata.dst_node_id))
