"""The compose file's services as processes of this machine, for where there are no containers: the same commands, keys and networks."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.deploy.compose import CLI, COMPOSE, Service, services
from fedvision.errors import EngineError
from fedvision.grids.local_superlink import commands, end, free_port, last_words, runs, started_for
from fedvision.grids.workplace import short_folder

HEALTHY_SECONDS = 90.0
"""How long a service may take until it is healthy."""

STAYS_SECONDS, REVIVED_SECONDS = 10.0, 240.0
"""How long a service must run to count as started again; how long that may be tried: Flower refuses a silo for a minute."""


class Places(ABC):
    """Where services run: how their names become addresses, and what stands before their commands."""

    kind: str

    @abstractmethod
    def rewritten(self, service: Service, text: str) -> str:
        """A word of the service's command or configuration, with names and ports as they are here."""

    @abstractmethod
    def prefix(self, service: Service) -> list[str]:
        """What a command is preceded by to run where ``service`` does."""

    @abstractmethod
    def close(self) -> None:
        """Leave nothing."""


class Loopback(Places):
    """All services on 127.0.0.1, each of their ports on a free one."""

    kind = "loopback"

    def __init__(self, known: Mapping[str, Service]) -> None:
        self._owners = {alias: service.name for service in known.values() for names in service.names.values() for alias in names}
        self._ports: dict[tuple[str, str], int] = {}

    def rewritten(self, service: Service, text: str) -> str:
        """``superlink:9092`` and ``--port=8000`` with the port that this one has here; names alone become 127.0.0.1."""
        text = re.sub(rf"(?<![\w.-])({self._hosts}):(\d+)\b", lambda found: self._address(service, found[1], found[2]), text)
        text = re.sub(r"^--port=(\d+)$", lambda found: f"--port={self._port(service.name, found[1])}", text)
        return re.sub(rf"^--host=({self._hosts})$", "--host=127.0.0.1", text)

    def prefix(self, service: Service) -> list[str]:
        """Nothing."""
        return []

    def close(self) -> None:
        """Nothing to leave."""

    @property
    def _hosts(self) -> str:
        return "|".join(map(re.escape, [*self._owners, "127.0.0.1", "0.0.0.0"]))

    def _address(self, service: Service, host: str, port: str) -> str:
        return f"127.0.0.1:{self._port(self._owners.get(host, service.name), port)}"

    def _port(self, owner: str, port: str) -> int:
        return self._ports.setdefault((owner, port), free_port())


class Namespaces(Places):
    """Each service in a network namespace of its own, joined by a bridge for each network, with no way out; needs root on Linux.

    Names are those of the compose file, in a file of hosts for each service: a service knows only whom it shares a network with.
    """

    kind = "namespaces"

    def __init__(self, known: Mapping[str, Service]) -> None:
        self._tag = f"fv{os.getpid()}"
        self._spaces = [self._space("net"), *map(self._space, known)]
        try:
            self._lay(known)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def available() -> bool:
        """Whether this process may make network namespaces."""
        ip, name = shutil.which("ip"), f"fv{os.getpid()}-try"
        if ip is None or os.geteuid() != 0:
            return False
        made = subprocess.run([ip, "netns", "add", name], capture_output=True, check=False).returncode == 0
        works = made and subprocess.run([ip, "netns", "exec", name, "true"], capture_output=True, check=False).returncode == 0
        if made:
            _ip("netns", "delete", name)
        return works

    def rewritten(self, service: Service, text: str) -> str:
        """As it is."""
        return text

    def prefix(self, service: Service) -> list[str]:
        """``ip netns exec`` and the service's namespace."""
        return ["ip", "netns", "exec", self._space(service.name)]

    def close(self) -> None:
        """Delete the namespaces, and with them their links."""
        for space in self._spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)
            shutil.rmtree(_etc(space), ignore_errors=True)

    def _space(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def _lay(self, known: Mapping[str, Service]) -> None:
        for space in self._spaces:
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
        addresses: dict[str, dict[str, str]] = {}
        for number, network in enumerate(sorted({network for service in known.values() for network in service.names})):
            members = [service for service in known.values() if network in service.names]
            addresses[network] = self._join(number, members)
        for service in known.values():
            met = [line for network in service.names for line in _hosts(known, network, addresses[network])]
            _etc(self._space(service.name)).mkdir(parents=True)
            (_etc(self._space(service.name)) / "hosts").write_text("\n".join(["127.0.0.1 localhost", *met, ""]))

    def _join(self, number: int, members: Sequence[Service]) -> dict[str, str]:
        """Lay a bridge and a link to each member; their addresses by name."""
        bridge, addresses = f"br{number}", {}
        _ip("-n", self._space("net"), "link", "add", bridge, "type", "bridge")
        _ip("-n", self._space("net"), "link", "set", bridge, "up")
        for place, service in enumerate(members, start=2):
            here, there, address = self._space(service.name), f"p{number}x{place}", f"10.213.{number}.{place}"
            _ip("-n", here, "link", "add", f"eth{number}", "type", "veth", "peer", "name", there, "netns", self._space("net"))
            _ip("-n", self._space("net"), "link", "set", there, "master", bridge, "up")
            _ip("-n", here, "address", "add", f"{address}/24", "dev", f"eth{number}")
            _ip("-n", here, "link", "set", f"eth{number}", "up")
            addresses[service.name] = address
        return addresses


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


def reaches(address: str, seconds: float = 2.0) -> bool:
    """Whether something accepts connections at ``address``, ``host:port``."""
    host, _, port = address.rpartition(":")
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=seconds):
        return True
    return False


def _hosts(known: Mapping[str, Service], network: str, addresses: Mapping[str, str]) -> list[str]:
    return [f"{address} {' '.join(known[name].names[network])}" for name, address in addresses.items()]


def _etc(space: str) -> Path:
    return Path("/etc/netns") / space


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"`ip {' '.join(words)}` failed: {done.stderr.strip()}")
