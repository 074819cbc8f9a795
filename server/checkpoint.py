"""Checkpoints: everything a run needs to go on, in one safetensors file, without pickle."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from fedvision import trees
from fedvision.arrays import Named
from fedvision.errors import RunError

FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a round.

    Attributes:
        round: the last finished round.
        identity: of the run, so that it is not resumed as another.
        arrays: the global model.
        strategy: the strategy's ``state()``.
        clients: what clients keep between rounds, by partition id; None where they keep it themselves.
        server: what the server keeps for its own training.
    """

    round: int
    identity: str
    arrays: Named
    strategy: Mapping[str, Any] = field(default_factory=dict)
    clients: Mapping[int, RecordDict] | None = None
    server: RecordDict = field(default_factory=RecordDict)

    def save(self, path: Path) -> None:
        """Write atomically: a crash leaves the checkpoint that was there before."""
        trees.save(
            path,
            {
                "arrays": dict(self.arrays),
                "strategy": dict(self.strategy),
                "clients": None if self.clients is None else {client: trees.tree_of(state) for client, state in self.clients.items()},
                "server": trees.tree_of(self.server),
            },
            {"format": FORMAT, "round": self.round, "identity": self.identity},
        )

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Read a checkpoint.

        Raises:
            RunError: the file is missing, truncated, damaged, or not a checkpoint.
        """
        try:
            header, tree = trees.load(path, FORMAT)
            kept = tree["clients"]
            clients = None if kept is None else {client: trees.record_of(state) for client, state in kept.items()}
            return cls(header["round"], header["identity"], tree["arrays"], tree["strategy"], clients, trees.record_of(tree["server"]))
        except trees.UNREADABLE as error:
            raise RunError(
                f"{path}: not a readable checkpoint ({type(error).__name__}: {error}); "
                "restore the file from a copy, or start again in another folder with --out"
            ) from error
