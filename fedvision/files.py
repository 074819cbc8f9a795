"""Writing files so that a crash at any moment loses nothing."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from fedvision.errors import RunError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a temporary file, then put it in place of ``path`` in one step.

    Raises:
        RunError: the disk is full or not writable; what stood at ``path`` before is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise unwritable(path, error) from error


def is_temporary(path: Path) -> bool:
    """Whether a file is what ``write_atomically`` leaves behind when the process is killed."""
    return path.name.startswith(".") and path.name.endswith(".part")


def unwritable(path: Path, error: Exception) -> RunError:
    """The error for a file that cannot be written."""
    return RunError(f"{path}: cannot be written ({error}); free space or choose another folder, then go on with --resume")
