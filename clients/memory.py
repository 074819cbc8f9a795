"""What a client keeps from one round to the next: that it agrees with what the server counted, and outlives its process."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict

from fedvision import trees
from fedvision.assembly import Assembly
from fedvision.errors import RunError
from fedvision.experiment import Experiment
from fedvision.grids.roster import STATE
from fedvision.privacy import RECORD
from strategies.memory import agreed

FORMAT = 1

PHASES = ("statistics", "fit", "evaluate")
"""What a client may be asked in a round, in order; the last changes nothing that it keeps."""


@contextmanager
def recalled(assembly: Assembly, context: Context, config: Mapping[str, Any], phase: str) -> Iterator[None]:
    """Within the block, a client has what it must have at the beginning of its answer; what it has at the end is kept.

    Args:
        assembly: the parts of the run.
        context: of the client; its ``state`` is what it keeps.
        config: of the server's message.
        phase: what the client is asked, one of ``PHASES``.

    Raises:
        RunError: what it kept was lost, or cannot be kept.
    """
    if not assembly.remembering:
        yield
        return
    server_round, client = int(config["server-round"]), int(context.node_config["partition-id"])
    names: Sequence[str] = getattr(assembly.strategy, "client_memory", ())
    shelf = Shelf.of(context, assembly.experiment)
    if shelf is not None:
        shelf.take(context.state, server_round, phase)
    with agreed(context.state, names, config, client, training=phase == "fit"):
        yield
    if shelf is not None and phase != "evaluate":
        shelf.put(context.state, server_round, phase)


@dataclass(frozen=True)
class Shelf:
    """A silo's folder of what its client kept after each of the latest rounds, from which a server that goes back can go on.

    Attributes:
        folder: of one experiment and one client.
        every: rounds between the server's checkpoints; what no checkpoint needs any more is removed.
    """

    folder: Path
    every: int

    @classmethod
    def of(cls, context: Context, experiment: Experiment) -> "Shelf | None":
        """The folder that the node's configuration names; None if it names none."""
        if STATE not in context.node_config:
            return None
        own = f"{experiment.name}-{experiment.fingerprint}-client{context.node_config['partition-id']}"
        return cls(Path(str(context.node_config[STATE])) / own, experiment.checkpoint_every)

    def take(self, state: RecordDict, server_round: int, phase: str) -> None:
        """Make ``state`` what the client kept when it was asked in a round, before it answered.

        What was spent of its privacy is never taken back.

        Raises:
            RunError: a file is damaged.
        """
        files = self._files()
        before = [path for path in files if path.name < _name(server_round, phase)]
        kept = _read(before[-1]) if before else RecordDict()
        spent = _read(files[-1]).get(RECORD) if files else None
        state.clear()
        state.update(kept if spent is None else {**kept, RECORD: spent})

    def put(self, state: RecordDict, server_round: int, phase: str) -> None:
        """Keep what the client keeps; on disk before this returns.

        Raises:
            RunError: the folder cannot be written.
        """
        path = self.folder / _name(server_round, phase)
        trees.save(path, {"state": trees.tree_of(state)}, {"format": FORMAT})
        checkpoint = (server_round - 1) // self.every * self.every
        settled = [other for other in self._files() if other.name <= _name(checkpoint, PHASES[-1])]
        undone = [other for other in self._files() if other.name > path.name]
        for other in [*settled[:-1], *undone]:
            other.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))


def _name(server_round: int, phase: str) -> str:
    return f"{server_round:08d}-{PHASES.index(phase)}-{phase}.safetensors"


def _read(path: Path) -> RecordDict:
    try:
        return trees.record_of(trees.load(path, FORMAT)[1]["state"])
    except trees.UNREADABLE as error:
        raise RunError(f"{path}: not readable ({type(error).__name__}: {error}); restore it from a copy, or remove the folder") from error
