"""The compose file's services as processes of this machine, for where there are no containers: the same commands, keys and networks."""

import os
import re
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.deploy.compose import CLI, COMPOSE, Service, services
from benchmarks.deploy.places import Loopback, Namespaces, Places
from fedvision.errors import EngineError
from fedvision.grids.local_superlink import commands, end, last_words, runs, started_for
from fedvision.grids.workplace import short_folder

HEALTHY_SECONDS = 90.0
"""How long a service may take until it is healthy."""

STAYS_SECONDS, REVIVED_SECONDS = 10.0, 240.0
"""How long a service must run to count as started again; how long that may be tried: Flower refuses a silo for a minute."""


class Topology(ABC):
    """Coordinator and silos of a compose file, somewhere.

    Args:
        known: the services by name.
        kind: where they run.
    """

    def __init__(self, known: Mapping[str, Service], kind: str) -> None:
        self._known, self.kind = known, kind

    @property
    def silos(self) -> list[str]:
        """The names of the silos."""
        return [name for name in self._known if name.startswith("silo")]

    @abstractmethod
    def start(self, *names: str) -> None:
        """Start services, and wait until they are healthy.

        Raises:
            EngineError: one ends, or is not healthy in time; with its last words.
        """

    @abstractmethod
    def command(self, *words: str, service: str = CLI, seconds: float | None = None) -> "subprocess.CompletedProcess[str]":
        """Run a command where ``service`` runs, to its end; what it says is kept. Paths are those of the compose file."""

    @abstractmethod
    def show(self, *words: str, service: str = CLI) -> int:
        """Run a command where ``service`` runs, before the user's eyes; its status."""

    @abstractmethod
    def address(self, name: str, service: str = CLI) -> str:
        """A name of the compose file with its port, as ``service`` reaches it."""

    @abstractmethod
    def close(self) -> None:
        """End everything."""


class Processes(Topology):
    """Coordinator and silos of a compose file, as processes of this machine.

    Args:
        known: the services by name.
        places: where they run.
        scratch: a folder for logs and for what a service has to itself.
    """

    def __init__(self, known: Mapping[str, Service], places: Places, scratch: Path) -> None:
        super().__init__(known, places.kind)
        self._places, self._scratch = places, scratch
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        for service in known.values():
            for place in service.own:
                (self._own(service) / place.strip("/")).mkdir(parents=True, exist_ok=True)
        self._tell_connections()

    def start(self, *names: str) -> None:
        """Start services; see ``Topology``."""
        for name in names:
            self.launch(name)
        for name in names:
            self.wait(name)

    def launch(self, name: str, *, replace: Mapping[str, str | None] | None = None) -> None:
        """Start one service, and do not wait for it.

        Args:
            name: of the service.
            replace: words of its command by what stands there instead; None: nothing.
        """
        service = self._known[name]
        words = [(replace or {}).get(word, word) for word in service.command]
        line = self._line(service, [word for word in words if word is not None])
        with self.log(name).open("ab") as log:
            environment = self._environment(service)
            self._running[name] = subprocess.Popen(
                line, env=environment, cwd=self._scratch, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self, name: str, seconds: float = HEALTHY_SECONDS) -> None:
        """Wait until a service is healthy; see ``start``."""
        service, deadline = self._known[name], time.monotonic() + seconds
        check = self._line(service, list(service.health))
        while time.monotonic() < deadline:
            if (status := self._running[name].poll()) is not None:
                raise EngineError(f"{name} ended with status {status}; its last words: {last_words(self.log(name))}")
            if subprocess.run(check, env=self._environment(service), capture_output=True, check=False).returncode == 0:
                return
            time.sleep(0.2)
        raise EngineError(f"{name} is not healthy after {seconds:g} seconds; its last words: {last_words(self.log(name))}")

    def ended(self, name: str, seconds: float) -> int | None:
        """The status with which a service ends; None if it still runs after ``seconds``."""
        with suppress(subprocess.TimeoutExpired):
            return self._running[name].wait(seconds)
        return None

    def kill(self, name: str, program: str = "") -> None:
        """Kill a service and all processes that it has started, as a crash does; those only that run ``program``, if one is named."""
        for process in started_for(self._home(self._known[name])):
            if not program or runs(process, program):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        if not program:
            self._running[name].wait()

    def revive(self, name: str, seconds: float = REVIVED_SECONDS) -> None:
        """Start a service that has ended, again and again until it stays, as its restart policy does.

        Raises:
            EngineError: it does not stay in time; with its last words.
        """
        deadline = time.monotonic() + seconds
        self.launch(name)
        while (status := self.ended(name, STAYS_SECONDS)) is not None:
            if time.monotonic() > deadline:
                raise EngineError(f"{name} ended with status {status} again and again; its last words: {last_words(self.log(name))}")
            self.launch(name)
        self.wait(name)

    def stop(self, name: str) -> None:
        """End a service and all processes that it has started."""
        if name in self._running:
            end(self._running.pop(name), self._home(self._known[name]))

    def command(self, *words: str, service: str = CLI, seconds: float | None = None) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end; see ``Topology``."""
        line, environment = self._line(self._known[service], list(words)), self._environment(self._known[service])
        return subprocess.run(
            line, env=environment, cwd=self._scratch, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=seconds
        )

    def show(self, *words: str, service: str = CLI) -> int:
        """Run a command before the user's eyes; see ``Topology``."""
        line, environment = self._line(self._known[service], list(words)), self._environment(self._known[service])
        return subprocess.run(line, env=environment, cwd=self._scratch, stdin=subprocess.DEVNULL, check=False).returncode

    def log(self, name: str) -> Path:
        """What a service has said."""
        return self._scratch / f"{name}.log"

    def address(self, name: str, service: str = CLI) -> str:
        """Where ``service`` reaches a name; see ``Topology``."""
        return self._places.rewritten(self._known[service], name)

    def close(self) -> None:
        """End everything, silos first."""
        for name in reversed(list(self._running)):
            self.stop(name)

    def _line(self, service: Service, words: Sequence[str]) -> list[str]:
        here = [self._seen(service, self._places.rewritten(service, word)) for word in words]
        if here and here[0] == "python":
            here[0] = sys.executable
        if here and here[0] == "fedvision":
            here[:1] = [sys.executable, "-m", "fedvision"]
        return [*self._places.prefix(service), *here]

    def _seen(self, service: Service, text: str) -> str:
        """``text`` with the places that only a container sees replaced by those of this machine."""
        seen = {place: str(source) for place, source in service.mounts.items()}
        seen |= {place: str(self._own(service) / place.strip("/")) for place in service.own}
        longest_first = "|".join(sorted(map(re.escape, seen), key=len, reverse=True))
        return re.sub(rf"(?<![\w./-])({longest_first})(?![\w.-])", lambda found: seen[found[1]], text)

    def _environment(self, service: Service) -> dict[str, str]:
        own = {name: self._seen(service, self._places.rewritten(service, value)) for name, value in service.environment.items()}
        root = str(COMPOSE.parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        return {**commands(), "PYTHONPATH": path, **own, "FLWR_HOME": str(self._home(service))}

    def _home(self, service: Service) -> Path:
        return self._own(service) / "flower"

    def _own(self, service: Service) -> Path:
        return self._scratch / service.name

    def _tell_connections(self) -> None:
        """Put files that are mounted into a folder that a service has to itself there, as they read here."""
        for service in self._known.values():
            for place, source in service.mounts.items():
                if source.is_file():
                    told = self._own(service) / place.strip("/")
                    told.write_text(self._seen(service, self._places.rewritten(service, source.read_text())))


@contextmanager
def processes(federation: Path, kind: str = "loopback", file: Path = COMPOSE) -> Iterator[Processes]:
    """A compose file's services, of which none runs yet; at the end of the block, none is left.

    Args:
        federation: the folder that ``fedvision deploy keys`` made.
        kind: ``loopback`` or ``namespaces``.
        file: the compose file.

    Raises:
        EngineError: this process may not make network namespaces.
    """
    known = services(file, {**os.environ, "FEDVISION_FEDERATION": str(federation.absolute())})
    if kind == Namespaces.kind and not Namespaces.available():
        raise EngineError("network namespaces need Linux, the program `ip` and the rights of root; use loopback")
    with short_folder() as scratch, terminable():
        places = Namespaces(known) if kind == Namespaces.kind else Loopback(known)
        topology = Processes(known, places, scratch)
        try:
            yield topology
        finally:
            topology.close()
            places.close()


def bring_up(topology: Topology) -> None:
    """Start coordinator and silos, the silos' keys registered in between.

    Raises:
        EngineError: one does not start, or registering fails.
    """
    topology.start("superlink", "superexec")
    registered = topology.command("fedvision", "deploy", "register")
    if registered.returncode:
        raise EngineError(f"the silos cannot be registered: {registered.stderr.strip()}")
    topology.start(*topology.silos)


@contextmanager
def terminable() -> Iterator[None]:
    """Clean up after SIGTERM too, where nobody else has seen to that."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
