"""A SuperLink of our own on this machine, which simulates its SuperNodes with Ray; nothing of it outlives the block."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedvision.errors import EngineError
from fedvision.grids.workplace import short_folder

LOCAL = "local"
"""The name of the connection to a SuperLink of our own."""

START_SECONDS, END_SECONDS = 60.0, 3.0
"""How long the SuperLink may take to listen; how long its processes may take to end before they are killed."""

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # what is installed here is what runs
    "PYTHONUNBUFFERED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Flower and Ray install nothing, report nothing, and write their logs as they go."""


@contextmanager
def local_superlink(runs: str) -> Iterator[dict[str, str]]:
    """Start a SuperLink whose connection is called ``local``; at the end of the block, end it and all of its processes.

    Args:
        runs: the environment variable that tells its ServerApps where to keep runs: ``runs`` in the SuperLink's folder.

    Yields:
        The environment for Flower's commands; ``FLWR_HOME`` is the SuperLink's folder, which is removed in the end.

    Raises:
        EngineError: the SuperLink does not start.
    """
    with short_folder() as home:
        port = free_port()
        environment = {**commands(), "FLWR_HOME": str(home), "RAY_TMPDIR": str(home), runs: str(home / "runs")}
        environment.pop("RAY_ADDRESS", None)
        connection = f'[superlink]\ndefault = "{LOCAL}"\n\n[superlink.{LOCAL}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        (home / "config.toml").write_text(connection)
        (home / "runs").mkdir()
        with (home / "superlink.log").open("wb") as log:
            line = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
            superlink = subprocess.Popen(line, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            _listening(superlink, port, home / "superlink.log")
            yield environment
        finally:
            end(superlink, home)


def commands() -> dict[str, str]:
    """The environment in which Flower's commands are found: those of this Python first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, **QUIET, "PATH": path}


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _listening(superlink: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    """Wait until the SuperLink accepts connections."""
    deadline = time.monotonic() + START_SECONDS
    while superlink.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    ended = "does not listen" if superlink.poll() is None else f"ended with status {superlink.returncode}"
    raise EngineError(f"Flower's SuperLink {ended}; its last words: {last_words(log)}")


def last_words(log: Path, lines: int = 5) -> str:
    """The last lines of a log in one, with what colors them left out."""
    written = log.read_text(errors="replace").splitlines() if log.exists() else []
    words = [line.strip() for line in written if line.strip()][-lines:]
    return " | ".join(words) or "none"


def end(process: "subprocess.Popen[bytes]", home: Path) -> None:
    """End one of Flower's processes and every process that was started for it: gently, then not.

    Args:
        process: the first of them.
        home: their ``FLWR_HOME``, which others do not have.
    """
    process.terminate()
    deadline = time.monotonic() + END_SECONDS
    while (process.poll() is None or started_for(home)) and time.monotonic() < deadline:
        time.sleep(0.1)
    while survivors := started_for(home):
        for survivor in survivors:
            with suppress(ProcessLookupError):
                os.kill(survivor, signal.SIGKILL)
        time.sleep(0.1)
    process.kill()
    process.wait()


def started_for(home: Path) -> list[int]:
    """The ids of all processes that were started for one of Flower's: they bear its folder in their environment (on Linux)."""
    mark = f"FLWR_HOME={home}".encode()
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if mark in _read(entry / "environ").split(b"\0")]


def runs(process: int, program: str) -> bool:
    """Whether a process is one of a program, or of a script of that name."""
    words = _read(Path(f"/proc/{process}/cmdline")).split(b"\0")
    return program in [Path(word.decode(errors="replace")).name for word in words[:2]]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""
