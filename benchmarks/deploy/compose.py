"""The compose file, read: what each service runs, where, and what it sees."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedvision.errors import EngineError

COMPOSE = Path(__file__).resolve().parent.parent.parent / "docker" / "compose.yaml"
"""The file that describes coordinator and silos."""

CLI = "cli"
"""The service whose container runs one command at a time."""


@dataclass(frozen=True)
class Service:
    """One service of a compose file.

    Attributes:
        name: of the service.
        command: what it runs.
        environment: variables of its own.
        mounts: folders and files of this machine by the place where the service sees them.
        own: folders that the service has to itself, and that end with it; besides that for temporary files.
        names: the names under which others reach it, by network.
        health: the command that says whether it is well; empty if there is none.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    mounts: Mapping[str, Path]
    own: tuple[str, ...]
    names: Mapping[str, tuple[str, ...]]
    health: tuple[str, ...]


def services(file: Path, variables: Mapping[str, str]) -> dict[str, Service]:
    """The services of a compose file, in its order.

    Args:
        file: the compose file.
        variables: what ``${NAME}`` and ``${NAME:-default}`` stand for.

    Raises:
        EngineError: there is no such file.
    """
    if not file.is_file():
        raise EngineError(f"{file} is not there; run from a checkout of FedVision")
    described = yaml.safe_load(interpolated(file.read_text(), variables))
    return {name: _service(name, table, file.parent) for name, table in described["services"].items()}


def interpolated(text: str, variables: Mapping[str, str]) -> str:
    """``text`` with its variables replaced, as compose does.

    >>> interpolated("${HOST:-superlink}:${PORT:-9092}", {"PORT": "80"})
    'superlink:80'
    """
    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", lambda found: variables.get(found[1]) or found[2] or "", text)


def _service(name: str, table: Mapping[str, Any], folder: Path) -> Service:
    mounts = [volume.split(":") for volume in table.get("volumes", [])]
    joined = table["networks"]
    named = {network: (joined[network] or {}).get("aliases", []) if isinstance(joined, dict) else [] for network in joined}
    return Service(
        name,
        tuple(table["command"]),
        {key: str(value) for key, value in table.get("environment", {}).items()},
        {place: (folder / source).resolve() for source, place, *_ in mounts},
        tuple(place for entry in table.get("tmpfs", []) if (place := entry.partition(":")[0]) != "/tmp"),
        {network: (name, *aliases) for network, aliases in named.items()},
        tuple(table.get("healthcheck", {}).get("test", ["CMD"])[1:]),
    )
