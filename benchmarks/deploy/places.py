"""Where services run as processes of this machine: all on 127.0.0.1, or each in a network namespace."""

import os
import re
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.deploy.compose import Service
from fedvision.errors import EngineError
from fedvision.grids.local_superlink import free_port


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


def _hosts(known: Mapping[str, Service], network: str, addresses: Mapping[str, str]) -> list[str]:
    return [f"{address} {' '.join(known[name].names[network])}" for name, address in addresses.items()]


def _etc(space: str) -> Path:
    return Path("/etc/netns") / space


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"`ip {' '.join(words)}` failed: {done.stderr.strip()}")
