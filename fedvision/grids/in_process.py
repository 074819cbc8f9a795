"""The in-process grid: every client answers in this process, one after the other or several in one go."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flwr.app import Message
from flwr.clientapp import ClientApp

from fedvision.grids.local import Answer, LocalGrid
from fedvision.registry import engines
from fedvision.settings import Count


@engines("in-process")
class InProcessGrid(LocalGrid):
    """Clients in this process, in partition-id order; nothing is serialized.

    Answers come back as a stream: each client runs when its answer is asked for, so only one answer is alive
    and memory does not grow with the cohort. With ``batch_clients``, as many train as one computation on stacked
    tensors, which is for GPUs; their answers are alive together. A client that raises becomes an error reply.

    Attributes:
        device: where clients compute: ``cpu``, ``cuda``, ``cuda:1``, ...
        batch_clients: how many clients train in one go.
    """

    def __init__(
        self, client_app: ClientApp, run_config: Mapping[str, Any], clients: int, device: str = "cpu", batch_clients: Count = 1
    ) -> None:
        super().__init__(client_app, run_config, clients, batch_clients)

    def _work(self, messages: Sequence[Message]) -> Iterator[tuple[Message, Answer]]:
        return self._desk.answers(messages, self._states)
