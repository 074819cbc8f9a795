"""A grid that counts the array bytes of training going through it."""

from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

from fedvision.arrays import nbytes
from fedvision.grids.passing import PassingGrid


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
