"""The memory of a family of processes, shared pages counted once."""

import os
import re
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

MARK = "FEDVISION_SPEED_FAMILY"
"""The environment variable by which the members of a family are known: who inherits it belongs to it, whoever its parent is."""


class Family:
    """The processes that inherited a mark in their environment.

    Args:
        mark: distinguishes the family from any other.
    """

    def __init__(self, mark: str) -> None:
        self._marked = f"{MARK}={mark}".encode()
        self._member: dict[int, bool] = {}

    def members(self) -> list[int]:
        """Their process ids."""
        alive = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        self._member = {pid: self._member.get(pid, False) or self._is_member(pid) for pid in alive}
        return [pid for pid, member in self._member.items() if member]

    def memory(self) -> int:
        """Resident bytes of all of them; a page that n processes share counts 1/n in each."""
        return sum(proportional_bytes(pid) for pid in self.members())

    def kill(self) -> None:
        """End those that are left."""
        for pid in self.members():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _is_member(self, pid: int) -> bool:
        try:
            return self._marked in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False


def proportional_bytes(pid: int) -> int:
    """The proportional set size of a process; 0 if it has gone."""
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return 1024 * int(found.group(1)) if found else 0


class Meter:
    """Watches the memory of a family from a thread while its block runs.

    Args:
        family: of processes.
        seconds: between two looks, at least; a look costs time, so at most a tenth of the time is spent looking.

    Attributes:
        peak: bytes, the most seen at once.
    """

    def __init__(self, family: Family, seconds: float = 0.05) -> None:
        self.peak = 0
        self._family, self._seconds = family, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Meter":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        spent = 0.0
        while not self._stop.wait(max(self._seconds, 9 * spent)):
            began = time.monotonic()
            self.peak = max(self.peak, self._family.memory())
            spent = time.monotonic() - began
