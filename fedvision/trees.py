"""Nested values with tensors among them, as one safetensors file: no pickle, and a crash leaves what was there before."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedvision.arrays import Named, array_records, pack, unpack
from fedvision.errors import RunError
from fedvision.files import write_atomically


def save(path: Path, trees: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    """Write nested values.

    Args:
        path: of the file.
        trees: mappings, lists and tuples of tensors, numbers and text, by name.
        header: what is to be known of them; as JSON has it.
    """
    tensors: dict[str, Tensor] = {}
    encoded = {name: encode(tree, name, tensors) for name, tree in trees.items()}
    save_tensors(path, tensors, {"fedvision": json.dumps({**header, "tree": encoded})})


def load(path: Path, format: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header and the nested values of a file.

    Raises:
        OSError, SafetensorError, AttributeError, LookupError, TypeError, ValueError: it is damaged, is something else, or has
            another ``format`` in its header.
    """
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {})["fedvision"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if header["format"] != format:
        raise ValueError(f"its format is {header['format']!r}, this version of FedVision reads {format}")
    return header, {name: decode(part, tensors) for name, part in header["tree"].items()}


UNREADABLE = (OSError, SafetensorError, AttributeError, LookupError, TypeError, ValueError)
"""What ``load`` raises."""


def save_tensors(path: Path, tensors: Named, metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as a safetensors file, atomically; tied tensors are written out each."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        shared = tensor.numel() > 0 and tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        packed = tensor.detach().cpu().contiguous()
        separate[name] = packed.clone() if shared and packed.data_ptr() == tensor.data_ptr() else packed
    write_atomically(path, lambda temporary: save_file(separate, temporary, dict(metadata or {})))


def encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON, its tensors moved to ``tensors`` under names that begin with ``path``."""
    if isinstance(value, Tensor):
        while path in tensors:  # the keys 1 and "1", or "a/b" and a's "b"
            path += "+"
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"items": [[key, encode(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [encode(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: a {type(value).__name__} cannot be kept in a checkpoint; use tensors, numbers, text, dicts, lists")


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of ``encode``."""
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "items":
        return {key: decode(item, tensors) for key, item in content}
    items = [decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def tree_of(record: RecordDict) -> dict[str, Any]:
    """A record as a nested value."""
    return {
        "arrays": {name: unpack(arrays) for name, arrays in array_records(record).items()},
        "metrics": {name: dict(metrics) for name, metrics in record.items() if isinstance(metrics, MetricRecord)},
        "configs": {name: dict(config) for name, config in record.items() if isinstance(config, ConfigRecord)},
    }


def record_of(tree: Mapping[str, Any]) -> RecordDict:
    """The inverse of ``tree_of``."""
    record = RecordDict()
    record.update({name: pack(arrays) for name, arrays in tree["arrays"].items()})
    record.update({name: MetricRecord(metrics) for name, metrics in tree["metrics"].items()})
    record.update({name: ConfigRecord(config) for name, config in tree["configs"].items()})
    return record


def load_weights(path: Path) -> dict[str, Tensor]:
    """Named tensors of a safetensors file.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: torch.as_tensor(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: not a readable safetensors file ({error}); give a model.safetensors of a run") from error
