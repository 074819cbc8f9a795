"""Starting Ray, or joining it, so that nothing is left behind; and tensors that cross it without copies."""

import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedvision.errors import EngineError
from fedvision.grids.workplace import PACKAGES, short_folder

CONNECT_SECONDS = 10
"""How long to wait for a cluster to accept a connection."""


@contextmanager
def session(address: str | None, cpus: float) -> Iterator[Any]:
    """Ray, for the length of the block: one that runs already, the cluster at ``address``, or a new one on this machine.

    What was started here is stopped with its processes, and its folder removed, however the block ends.

    Args:
        address: of a cluster, such as ``auto``, ``head:6379`` or ``ray://head:10001``.
        cpus: that a new one on this machine is told it has, if more than the machine's own.

    Raises:
        EngineError: there is no cluster at ``address``, or Ray does not start.
    """
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        yield ray
        return
    with short_folder() as folder:
        try:
            with _signals_kept():
                _start(ray, address, cpus, folder)
            yield ray
        finally:
            ray.shutdown()


QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_worker_niceness": "0",
}
"""No statistics sent, no warnings about settings that Ray will change, workers in this very environment, at this priority."""


def _start(ray: Any, address: str | None, cpus: float, folder: Path) -> None:
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        options |= {"num_cpus": max(cpus, os.cpu_count() or 1), "include_dashboard": False, "_temp_dir": str(folder)}
    else:
        _check_reachable(address)
        options |= {"address": address, "runtime_env": {"py_modules": _own_packages()}}
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = "on this machine" if address is None else f"at engine.address = {address!r}"
        remedy = "see `fedvision doctor`" if address is None else "start one with `ray start --head`, or leave the address out"
        raise EngineError(f"Ray cannot be used {where} ({error}); {remedy}") from error


def _check_reachable(address: str) -> None:
    """Refuse an address at which nobody listens, for which Ray would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", which Ray looks up
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise EngineError(
            f"no Ray cluster answers at engine.address = {address!r} ({error}); start one with `ray start --head`, or leave the address out"
        ) from error


def _own_packages() -> list[str]:
    from importlib.util import find_spec

    specs = (find_spec(name) for name in PACKAGES)
    return [str(Path(spec.origin).parent) for spec in specs if spec is not None and spec.origin is not None]


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Put SIGTERM's handler back after ``ray.init``, whose own ends the process without cleaning up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def share_tensors(ray: Any) -> None:
    """Have Ray carry tensors as views of its shared memory, in this process; what arrives must not be written to.

    Of itself Ray copies them, as bytes within a pickle.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once a process that it cannot protect read-only memory: here and now
        torch.frombuffer(bytes(1), dtype=torch.uint8)
    ray.util.register_serializer(Tensor, serializer=_lay_out, deserializer=_look_at)


def _lay_out(tensor: Tensor) -> tuple[np.ndarray, torch.dtype, tuple[int, ...]]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape)


def _look_at(laid_out: tuple[np.ndarray, torch.dtype, tuple[int, ...]]) -> Tensor:
    flat, dtype, shape = laid_out
    if not flat.size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(flat, dtype=dtype).view(shape)
