"""What engines with processes of their own need of a machine: a folder, this project's packages, GPUs that can be seen."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedvision.errors import EngineError

PACKAGES = ("fedvision", "strategies", "clients", "server", "benchmarks")
"""What other machines get from this one; everything else must be installed there."""

LONGEST_PLACE = 20
"""Characters that the system's folder for temporary files may have: Ray puts sockets far below it, whose names are limited to 107."""


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder with a short name for sockets and logs, for the length of the block."""
    place = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="fedvision-", dir=place if len(place) < LONGEST_PLACE else "/tmp"))
    try:
        yield folder
    finally:
        for _ in range(20):  # processes write a last line as they end
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.1)


def check_gpus_seen(device: str, gpus_per_worker: float) -> None:
    """Refuse a device that Ray would hide from its workers.

    Raises:
        EngineError: clients are to compute on a GPU, of which workers get none.
    """
    if device != "cpu" and not gpus_per_worker:
        raise EngineError(f"engine.device = {device!r}, but engine.gpus_per_worker = 0 hides all GPUs from the workers; set e.g. 1")
