"""The manifest of a run: what runs where, and how it ended."""

import hashlib
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch

from fedvision.arrays import Named
from fedvision.assembly import Assembly
from fedvision.errors import RunError
from fedvision.files import write_atomically
from server.folder import RunFolder


def identity_of(assembly: Assembly, initial: Named | None = None) -> str:
    """Sixteen hex digits that depend on the experiment and what its learner reads, all values of the data, and initial weights if given."""
    hasher = hashlib.sha256(f"{assembly.experiment.fingerprint} {assembly.data.digest}{assembly.learner.digest}".encode())
    for name, tensor in sorted((initial or {}).items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()[:16]


def describe(folder: RunFolder, assembly: Assembly, identity: str, command: Sequence[str] | None = None) -> None:
    """Write the manifest of a run that begins, and the resolved experiment.

    Args:
        folder: of the run.
        assembly: the experiment and its parts.
        identity: the run's.
        command: what started it; the command line of this process if not given.

    Raises:
        RunError: the folder cannot be written.
    """
    described = {
        "status": "running",
        "identity": identity,
        "fingerprint": assembly.experiment.fingerprint,
        "started": _now(),
        "command": list(sys.argv if command is None else command),
        "git_commit": _git_commit(),
        "device": str(assembly.device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "flwr", "numpy", "scikit-learn", "timm", "safetensors")},
        "data": {"name": assembly.data.name, "clients": assembly.data.num_clients, "digest": assembly.data.digest},
        "parameters": sum(param.numel() for param in assembly.model.parameters()),
    }
    folder.write_manifest(described)
    write_atomically(folder.experiment, lambda path: path.write_text(assembly.experiment.to_toml()))


@contextmanager
def closing(folder: RunFolder) -> Iterator[None]:
    """Note in the manifest how the block ended: the run finished, was interrupted, or failed and why."""
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        _note(folder, status="interrupted" if stopped else "failed", reason=str(error) or type(error).__name__)
        raise
    _note(folder, status="finished")


def _note(folder: RunFolder, **changes: str) -> None:
    """Change the manifest of a run that has ended; only an end without error must be noted to be one."""
    try:
        folder.write_manifest(folder.read_manifest() | changes | {"ended": _now()})
    except RunError:
        if changes["status"] == "finished":
            raise


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _git_commit() -> str | None:
    """The commit of the code that runs, with ``-dirty`` if it was changed since; None outside a checkout."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
