"""Coordinator and silos that are made for one experiment, and end with it."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.deploy import containers
from benchmarks.deploy.keys import Federation
from benchmarks.deploy.places import Loopback, Namespaces
from benchmarks.deploy.topology import Topology, bring_up, processes
from fedvision.errors import ExperimentError, RunError
from fedvision.experiment import Experiment, parse_overrides

SILOS = 3
"""How many silos the compose file has."""

SHORT = ("rounds=3", "participants=[0, 1, 2]")
"""What makes ``quickstart`` an experiment of three clients that soon ends."""


def best() -> str:
    """The place most like machines of their own that there is: containers, else network namespaces, else loopback."""
    if containers.Containers.available():
        return containers.KIND
    return Namespaces.kind if Namespaces.available() else Loopback.kind


@contextmanager
def silos(federation: Path, kind: str) -> Iterator[Topology]:
    """Coordinator and silos of the compose file, all running, and registered; at the end of the block, none is left.

    Args:
        federation: the folder that ``fedvision deploy keys`` made.
        kind: ``containers``, ``namespaces`` or ``loopback``.

    Raises:
        EngineError: this machine has no such place, or one of them does not start.
    """
    with containers.containers(federation) if kind == containers.KIND else processes(federation, kind) as topology:
        bring_up(topology)
        yield topology


def demonstrate(experiment: str, overrides: Sequence[str], kind: str, out: Path | None) -> tuple[int, Path]:
    """Run an experiment on a coordinator and silos that are made for it, and end with it.

    Returns:
        The run's exit status and its folder.

    Raises:
        RunError: the run's folder holds something.
        ExperimentError: it is not for so many silos.
    """
    resolved = Experiment.load(experiment, parse_overrides(overrides))
    clients = resolved.load_data().num_clients
    if clients != SILOS:
        few = f"there are {SILOS} silos here, the experiment has {clients} clients"
        raise ExperimentError(f"{few}; set partition.clients = {SILOS}, or participants = {list(range(SILOS))}")
    name = f"{resolved.name}-{resolved.fingerprint}"
    place = (out or Path("runs") / name).absolute()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise RunError(f"{place} holds something; choose another folder with --out")
    with tempfile.TemporaryDirectory(prefix="fedvision-") as scratch:
        federation = Federation.make(Path(scratch) / "federation", [], SILOS, days=1)
        runs = federation.folder / "runs"
        (runs / "experiment.toml").write_text(resolved.to_toml())
        try:
            with silos(federation.folder, kind) as topology:
                return topology.show("fedvision", "deploy", "run", "/runs/experiment.toml", "--out", f"/runs/{name}"), place
        finally:
            if (runs / name).is_dir():
                shutil.copytree(runs / name, place, dirs_exist_ok=True)
