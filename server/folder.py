"""A run's folder: what is in it, and writing to it so that a crash at any moment loses nothing."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvision.errors import RunError
from fedvision.files import write_atomically


@dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    ``experiment.toml`` the resolved experiment; ``rounds.jsonl`` one line a round; ``checkpoint.safetensors`` to go on
    from; ``model.safetensors`` the final model; ``manifest.json`` what ran where; ``figures/``; ``tensorboard/``.
    """

    path: Path

    @property
    def experiment(self) -> Path:
        """The resolved experiment."""
        return self.path / "experiment.toml"

    @property
    def rounds(self) -> Path:
        """One line of JSON a round."""
        return self.path / "rounds.jsonl"

    @property
    def checkpoint(self) -> Path:
        """What a resumed run goes on from."""
        return self.path / "checkpoint.safetensors"

    @property
    def model(self) -> Path:
        """The final model; there once the run has finished."""
        return self.path / "model.safetensors"

    @property
    def manifest(self) -> Path:
        """What ran where, with which versions."""
        return self.path / "manifest.json"

    @property
    def figures(self) -> Path:
        """The folder of pictures."""
        return self.path / "figures"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def started(self) -> bool:
        """Whether a run lives here."""
        return self.manifest.exists()

    @property
    def finished(self) -> bool:
        """Whether the run that lives here is complete."""
        return self.started and self.read_manifest().get("status") == "finished"

    def read_manifest(self) -> dict[str, Any]:
        """The manifest.

        Raises:
            RunError: it is missing or damaged.
        """
        try:
            manifest = json.loads(self.manifest.read_bytes())
            if not isinstance(manifest, dict):
                raise ValueError(f"it holds a {type(manifest).__name__}")
            return manifest
        except (OSError, ValueError) as error:
            raise RunError(f"{self.manifest}: cannot be read ({error}); choose another folder with --out, or remove this one") from error

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Replace the manifest."""
        write_atomically(self.manifest, lambda path: path.write_text(json.dumps(manifest, indent=2) + "\n"))
