"""Checkpoints: everything a run needs to go on, in one safetensors file, without pickle."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedvision.arrays import Named, array_records, pack, unpack
from fedvision.errors import RunError
from server.folder import write_atomically

FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a round.

    Attributes:
        round: the last finished round.
        identity: of the run, so that it is not resumed as another.
        arrays: the global model.
        strategy: the strategy's ``state()``.
        clients: what clients keep between rounds, by partition id; None where they keep it themselves.
        server: what the server keeps for its own training.
    """

    round: int
    identity: str
    arrays: Named
    strategy: Mapping[str, Any] = field(default_factory=dict)
    clients: Mapping[int, RecordDict] | None = None
    server: RecordDict = field(default_factory=RecordDict)

    def save(self, path: Path) -> None:
        """Write atomically: a crash leaves the checkpoint that was there before."""
        tensors: dict[str, Tensor] = {}
        tree = {
            "arrays": dict(self.arrays),
            "strategy": dict(self.strategy),
            "clients": None if self.clients is None else {client: _tree_of(state) for client, state in self.clients.items()},
            "server": _tree_of(self.server),
        }
        encoded = {name: encode(part, name, tensors) for name, part in tree.items()}
        header = {"format": FORMAT, "round": self.round, "identity": self.identity, "tree": encoded}
        save_tensors(path, tensors, {"fedvision": json.dumps(header)})

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Read a checkpoint.

        Raises:
            RunError: the file is missing, truncated, damaged, or not a checkpoint.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["fedvision"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if header["format"] != FORMAT:
                raise ValueError(f"its format is {header['format']!r}, this version of FedVision reads {FORMAT}")
            tree = {name: decode(part, tensors) for name, part in header["tree"].items()}
            kept = tree["clients"]
            clients = None if kept is None else {client: _record_of(state) for client, state in kept.items()}
            return cls(header["round"], header["identity"], tree["arrays"], tree["strategy"], clients, _record_of(tree["server"]))
        except (OSError, SafetensorError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise RunError(
                f"{path}: not a readable checkpoint ({type(error).__name__}: {error}); "
                "restore the file from a copy, or start again in another folder with --out"
            ) from error


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


def _tree_of(record: RecordDict) -> dict[str, Any]:
    return {
        "arrays": {name: unpack(arrays) for name, arrays in array_records(record).items()},
        "metrics": {name: dict(metrics) for name, metrics in record.items() if isinstance(metrics, MetricRecord)},
        "configs": {name: dict(config) for name, config in record.items() if isinstance(config, ConfigRecord)},
    }


def _record_of(tree: Mapping[str, Any]) -> RecordDict:
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
