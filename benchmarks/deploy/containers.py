"""The compose file's services in containers: podman and podman-compose, the image's packages, the code of this checkout."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path

from benchmarks.deploy.compose import CLI, COMPOSE, Service, services
from benchmarks.deploy.topology import HEALTHY_SECONDS, Topology, terminable
from fedvision.errors import EngineError
from fedvision.grids.local_superlink import commands
from fedvision.grids.workplace import PACKAGES

KIND = "containers"
"""What this place is called."""

IMAGE = "fedvision:cpu"
"""The image that docker/Dockerfile makes, unless the environment's FEDVISION_IMAGE names another."""

SETTINGS = COMPOSE.parent / "containers.conf"
"""Podman's settings for a machine without systemd, unless the environment's CONTAINERS_CONF names others."""

USER = 1000
"""Who a federation is given to that is root's: nothing runs as root."""


class Containers(Topology):
    """Coordinator and silos of a compose file, in containers of a project of their own.

    Args:
        known: the services by name.
        federation: the folder that ``fedvision deploy keys`` made.
        file: the compose file.
    """

    def __init__(self, known: Mapping[str, Service], federation: Path, file: Path) -> None:
        super().__init__(known, KIND)
        self._image = f"fedvision:checkout-{os.getpid()}"
        self._environment = {
            **engine(),
            "FEDVISION_FEDERATION": str(federation),
            "FEDVISION_USER": _owner(federation),
            "FEDVISION_IMAGE": self._image,
            "FEDVISION_BIND": str(IPv4Address("127.128.0.0") + os.getpid()),  # of this machine; that no other project has
            **{f"{silo.upper()}_DATA": str(federation / silo / "data") for silo in self.silos},
        }
        self._compose = ["podman-compose", "--no-ansi", "-p", f"fedvision-{os.getpid()}", "-f", str(file), "--profile", CLI]
        self._build()

    @staticmethod
    def available() -> bool:
        """Whether podman, podman-compose and the image are here, and containers start."""
        if not all(shutil.which(program, path=commands()["PATH"]) for program in ("podman", "podman-compose")):
            return False
        environment = engine()
        tried = [["image", "exists", environment["FEDVISION_IMAGE"]], ["run", "--rm", "--init", environment["FEDVISION_IMAGE"], "true"]]
        return all(subprocess.run(["podman", *words], env=environment, capture_output=True, check=False).returncode == 0 for words in tried)

    def start(self, *names: str) -> None:
        """Start services; see ``Topology``."""
        self._said("up", "-d", "--no-deps", "--no-build", *names)
        for name in names:
            self._wait(name)

    def stop(self, name: str) -> None:
        """End a service."""
        self._said("stop", name)

    def command(self, *words: str, service: str = CLI, seconds: float | None = None) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end; see ``Topology``."""
        return self._run(*self._into(service), *words, seconds=seconds)

    def show(self, *words: str, service: str = CLI) -> int:
        """Run a command before the user's eyes; see ``Topology``."""
        return subprocess.run([*self._compose, *self._into(service), *words], env=self._environment, check=False).returncode

    def address(self, name: str, service: str = CLI) -> str:
        """As it is."""
        return name

    def close(self) -> None:
        """End the containers, and with them their networks and the image of this checkout's code."""
        self._run("down", "--timeout", "3")
        subprocess.run(["podman", "rmi", "--force", self._image], env=self._environment, capture_output=True, check=False)

    def _build(self) -> None:
        """Make an image with this checkout's code upon that which has the packages."""
        lines = [f"FROM {engine()['FEDVISION_IMAGE']}", "WORKDIR /app", "COPY pyproject.toml ./"]
        lines += [f"COPY {package} {package}" for package in PACKAGES] + ["WORKDIR /tmp"]
        root, words = COMPOSE.parent.parent, ["podman", "build", "--quiet", "--file", "-", "--tag", self._image]
        built = subprocess.run(
            [*words, str(root)], env=self._environment, input="\n".join(lines), capture_output=True, text=True, check=False
        )
        if built.returncode:
            raise EngineError(f"no image can be made of this checkout: {_last(built)}")

    def _wait(self, name: str) -> None:
        deadline = time.monotonic() + HEALTHY_SECONDS
        while time.monotonic() < deadline:
            if self.command(*self._known[name].health, service=name).returncode == 0:
                return
            time.sleep(0.5)
        raise EngineError(f"{name} is not healthy after {HEALTHY_SECONDS:g} seconds; its last words: {_last(self._run('logs', name))}")

    def _into(self, service: str) -> list[str]:
        """What a command is preceded by: a container of its own for the command line, else that of the service."""
        return ["run", "--rm", "--no-deps", "-T", service] if service == CLI else ["exec", "-T", service]

    def _said(self, *words: str) -> None:
        done = self._run(*words)
        if done.returncode:
            raise EngineError(f"`podman-compose {' '.join(words)}` failed: {_last(done)}")

    def _run(self, *words: str, seconds: float | None = None) -> "subprocess.CompletedProcess[str]":
        line = [*self._compose, *words]
        return subprocess.run(
            line, env=self._environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=seconds
        )


@contextmanager
def containers(federation: Path, file: Path = COMPOSE) -> Iterator[Containers]:
    """A compose file's services, of which none runs yet; at the end of the block, none is left.

    Args:
        federation: the folder that ``fedvision deploy keys`` made; if it is root's, it is given to ``USER``.
        file: the compose file.

    Raises:
        EngineError: there is no podman, no podman-compose or no image.
    """
    if not Containers.available():
        image = engine()["FEDVISION_IMAGE"]
        raise EngineError(f"containers need podman, podman-compose and the image {image} (docker/podman.sh makes it); or use loopback")
    known = services(file, {**os.environ, "FEDVISION_FEDERATION": str(federation.absolute())})
    with terminable():
        topology = Containers(known, federation.absolute(), file)
        try:
            yield topology
        finally:
            topology.close()


def engine() -> dict[str, str]:
    """The environment of podman's commands."""
    environment = {"FEDVISION_IMAGE": IMAGE, **commands()}
    return environment if Path("/run/systemd/system").is_dir() else {"CONTAINERS_CONF": str(SETTINGS), **environment}


def _owner(federation: Path) -> str:
    """The user and group whose the folder is, which are not root's from now on."""
    if federation.stat().st_uid == 0:
        for path in [federation, *federation.rglob("*")]:
            os.chown(path, USER, USER)
    return f"{federation.stat().st_uid}:{federation.stat().st_gid}"


def _last(done: "subprocess.CompletedProcess[str]", lines: int = 5) -> str:
    words: Sequence[str] = (done.stdout + done.stderr).strip().splitlines()
    return " | ".join(words[-lines:]) or "none"
