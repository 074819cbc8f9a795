"""A cache on disk: tensors that take long to compute, kept in safetensors files.

The folder is that of the environment variable ``FEDVISION_CACHE``, else ``~/.cache/fedvision``; ``FEDVISION_CACHE=off``
(or empty) switches the cache off. Whatever goes wrong with the disk costs time, never the result: removing the folder
is always safe.
"""

import json
import logging
import os
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

VARIABLE = "FEDVISION_CACHE"
FORMAT = 1
"""Part of every file's name: raise it when files written before must not be read any more."""

log = logging.getLogger(__name__)


def cached(kind: str, key: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What ``make`` returns, computed once for each ``kind`` and ``key`` and read from disk afterwards.

    Files appear in one step, so processes that make the same one at once do not disturb each other. A damaged file is made
    anew; a folder that cannot be written costs a warning.

    Args:
        kind: what it is, the beginning of the file's name, such as ``"scenes"``.
        key: everything that the result depends on, a version of the code that makes it included; JSON's types, and tuples.
        make: computes the tensors; it is not called if they are on disk.

    Returns:
        The tensors by name, contiguous and on the CPU, with the same values whether they were made or read.

    Raises:
        TypeError: a ``key`` that JSON cannot express.
    """
    named = json.dumps([kind, FORMAT, key], sort_keys=True)
    folder = cache_folder()
    if folder is None:
        return _own(make())
    file = folder / f"{kind}-{blake2b(named.encode(), digest_size=12).hexdigest()}.safetensors"
    kept = _read(file, named)
    if kept is None:
        kept = _own(make())
        _write(file, named, kept)
    return kept


def cache_folder() -> Path | None:
    """Where files are kept, whether or not it exists; None: nowhere."""
    chosen = os.environ.get(VARIABLE, "~/.cache/fedvision")
    if chosen in ("", "off"):
        return None
    try:
        return Path(chosen).expanduser()
    except RuntimeError as error:
        log.warning("no cache: %s; set %s to a folder", error, VARIABLE)
        return None


def _read(file: Path, named: str) -> dict[str, Tensor] | None:
    """The tensors of a file; None if there is no such file, or not as it was written."""
    try:
        with safe_open(file, framework="pt") as opened:
            written = opened.metadata() or {}
            kept = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        if written != _description(named, kept):
            raise ValueError("its contents are not those that were written")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError) as error:
        log.warning("%s cannot be used (%s); it is made anew", file, error)
        return None
    return kept


def _write(file: Path, named: str, tensors: dict[str, Tensor]) -> None:
    temporary = file.with_name(f".{file.name}.{uuid4().hex}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, _description(named, tensors))
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        log.warning("%s cannot be written (%s); going on without. Set %s to another folder, or to 'off'", file, error, VARIABLE)


def _description(named: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What a file says of itself: what it was made for, and a checksum of each tensor."""
    sums = {f"crc32 of {name}": str(zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data)) for name, tensor in tensors.items()}
    return {"key": named, **sums}


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file can hold them: on the CPU, contiguous, none a part of another's memory."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    storages = [tensor.untyped_storage().data_ptr() for tensor in held.values()]
    return {
        name: tensor.clone() if storages.count(storage) > 1 or tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
        for (name, tensor), storage in zip(held.items(), storages, strict=True)
    }
