"""A grid of clients that are slow, drop out or come too late, on a virtual clock."""

from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

from fedvision.arrays import config_of, nbytes
from fedvision.behavior import Behavior
from fedvision.grids.passing import PassingGrid
from strategies.strategy import work_of


class ClockedGrid(PassingGrid):
    """Passes messages on to another grid, and answers only of clients that are there and in time.

    The clock runs while the server waits for training; evaluation takes no time, and nobody misses it. Clients work side by
    side, so an exchange takes as long as its slowest answer, or until the deadline if one is missing. A client that drops out
    is not asked at all; one that is late did its work in vain, and keeps what it keeps.

    Args:
        grid: of the clients.
        behavior: how they behave.
        seed: of the experiment.

    Attributes:
        seconds: on the clock since the last ``reset``.
        dropped: how many clients have dropped out since then.
        late: how many answers came too late.
    """

    def __init__(self, grid: Grid, behavior: Behavior, seed: int) -> None:
        super().__init__(grid)
        self._behavior, self._seed = behavior, seed
        self.reset()

    def reset(self) -> None:
        """Start a round."""
        self.seconds, self.dropped, self.late = 0.0, 0, 0

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The answers that come in time."""
        asked = list(messages)
        if not asked or asked[0].metadata.message_type.startswith("evaluate"):
            yield from self._grid.send_and_receive(asked, timeout=timeout)
            return
        present = [message for message in asked if not self._drops_out(message)]
        self.dropped += len(asked) - len(present)
        sent = {message.metadata.dst_node_id: message for message in present}
        deadline, slowest, missing = self._behavior.deadline, 0.0, len(present) < len(asked)
        for answer in self._grid.send_and_receive(present, timeout=timeout):
            seconds = self._taken(sent[answer.metadata.src_node_id], answer)
            if deadline is not None and seconds > deadline:
                self.late, missing = self.late + 1, True
            else:
                slowest = max(slowest, seconds)
                yield answer
            del answer  # or it would stay alive while the next is computed
        self.seconds += deadline if deadline is not None and missing else slowest

    def _drops_out(self, message: Message) -> bool:
        return self._behavior.drops_out(self._seed, message.metadata.dst_node_id, _round_of(message))

    def _taken(self, message: Message, answer: Message) -> float:
        """Seconds from sending a message to having its answer; none for a client that failed, which is told at once."""
        if answer.has_error():
            return 0.0
        slowdown = self._behavior.slowdown(self._seed, message.metadata.dst_node_id, _round_of(message))
        work = work_of(answer.content) * self._behavior.seconds_per_example * slowdown
        return self._behavior.transfer(nbytes(message.content)) + work + self._behavior.transfer(nbytes(answer.content))


def _round_of(message: Message) -> int:
    return int(config_of(message.content)["server-round"])
