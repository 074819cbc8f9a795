"""A coordinator, as Flower's command line shows it: which silos are registered, which are online."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvision.errors import EngineError
from fedvision.grids.local_superlink import commands

KNOWN_ALREADY = "already"
"""The word by which Flower says that a public key is registered."""


@dataclass(frozen=True)
class Coordinator:
    """A SuperLink, reached over a connection of Flower's ``config.toml``.

    Attributes:
        connection: its name.
    """

    connection: str

    def nodes(self) -> list[dict[str, Any]]:
        """The registered silos: ``node-id``, ``status`` and times.

        Raises:
            EngineError: the SuperLink does not answer.
        """
        return [node for node in self._asked("supernode", "list", self.connection)["nodes"] if node["status"] != "unregistered"]

    def runs(self) -> list[dict[str, Any]]:
        """The runs, the latest first: ``run-id``, ``status`` and times.

        Raises:
            EngineError: the SuperLink does not answer.
        """
        return list(self._asked("list", self.connection)["runs"])

    def register(self, public_keys: Mapping[str, Path]) -> list[str]:
        """Register silos; those that are known are left as they are.

        Args:
            public_keys: by name.

        Returns:
            The names of those that were not known.

        Raises:
            EngineError: one is refused, or the SuperLink does not answer.
        """
        return [name for name, key in public_keys.items() if self._register(name, key)]

    def _register(self, name: str, key: Path) -> bool:
        try:
            self._asked("supernode", "register", str(key), self.connection, "--name", name)
        except EngineError as error:
            if KNOWN_ALREADY in str(error):
                return False
            raise
        return True

    def _asked(self, *words: str) -> dict[str, Any]:
        done = subprocess.run(["flwr", *words, "--format", "json"], env=commands(), capture_output=True, text=True, check=False)
        said = " ".join((done.stdout + done.stderr).replace("│", " ").split())
        try:
            answer = dict(json.loads(done.stdout))
        except ValueError:
            answer = {}
        if not answer.get("success", False):
            raise EngineError(f"`flwr {' '.join(words)}` failed: {answer.get('error-message', said)}")
        return answer
