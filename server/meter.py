"""Grids around a grid: one that only passes on, and one that counts the array bytes of training on their way."""

from collections.abc import Iterable, Iterator

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedvision.arrays import nbytes


class PassingGrid(Grid):
    """Passes everything on to another grid; who changes or watches something on the way says only that.

    Args:
        grid: the other one.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: Run) -> None:
        """Pass on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """Of the other grid."""
        return self._grid.run

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        """Pass on."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Pass on."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Pass on."""
        return self._grid.send_and_receive(messages, timeout=timeout)


class MeteredGrid(PassingGrid):
    """Counts bytes of arrays on their way, evaluation left out.

    Attributes:
        bytes_down: sent to clients since the last ``reset``.
        bytes_up: received from clients since the last ``reset``.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.reset()

    def reset(self) -> None:
        """Start counting from zero."""
        self.bytes_down = self.bytes_up = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on, counted."""
        return self._grid.push_messages(self._down(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on, counted."""
        return self._up(self._grid.pull_messages(message_ids))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Pass on, counted."""
        return self._up(self._grid.send_and_receive(self._down(messages), timeout=timeout))

    def _down(self, messages: Iterable[Message]) -> Iterator[Message]:
        for message in messages:
            self.bytes_down += _training_bytes(message)
            yield message

    def _up(self, messages: Iterable[Message]) -> Iterator[Message]:
        for message in messages:
            self.bytes_up += _training_bytes(message)
            yield message
            del message  # or this answer would stay alive while the next is computed


def _training_bytes(message: Message) -> int:
    if not message.has_content() or message.metadata.message_type.startswith("evaluate"):
        return 0
    return nbytes(message.content)
