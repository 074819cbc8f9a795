"""Named tensors and Flower's array records, converted without copies where both ends share a process."""

from collections.abc import Iterable, Mapping
from functools import cache
from math import prod
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

Named = Mapping[str, Tensor]
"""Tensors by name, such as a state dict."""


class TensorArray(Array):
    """A Flower array that holds a tensor and serializes it only if it leaves the process.

    Flower's own array turns every tensor into bytes when it is made and back when it is read;
    messages that stay in one process, or travel through shared memory, need neither.
    """

    def __init__(self, tensor: Tensor) -> None:
        tensor = tensor.detach()
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.__dict__.update(tensor=tensor, dtype=dtype, shape=tuple(tensor.shape), stype="numpy.ndarray")

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The tensor in NumPy's file format."""
        return Array(self.numpy()).data

    def numpy(self) -> np.ndarray:
        """The tensor as an array that shares its memory."""
        return self.__dict__["tensor"].cpu().numpy()  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[type, tuple[Tensor]]:
        return TensorArray, (self.__dict__["tensor"],)

    def slice_array(self) -> Any:
        """The serialized chunks."""
        return Array(self.numpy()).slice_array()

    def deflate(self) -> bytes:
        """The serialized form, that of a plain ``Array``, so that any Flower peer reads it."""
        return Array(self.numpy()).deflate()


def pack(tensors: Named) -> ArrayRecord:
    """A record that shares the tensors' memory; neither side may write to it afterwards."""
    record = ArrayRecord()
    for name, tensor in tensors.items():
        record[name] = TensorArray(tensor)  # the constructor would turn it into a plain Array, and so into bytes
    return record


def unpack(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of a record, sharing memory where they were packed in this process; read-only by agreement."""
    return {name: _tensor(array) for name, array in record.items()}


def array_records(content: RecordDict) -> dict[str, ArrayRecord]:
    """The array records of a message, by name.

    Flower's properties ``content.array_records``, ``metric_records`` and ``config_records`` each leave a reference cycle
    that keeps the whole message, arrays and all, until the garbage collector comes by. Hence this and the next two.
    """
    return {name: record for name, record in content.items() if isinstance(record, ArrayRecord)}


def metrics_of(content: RecordDict, name: str = "metrics") -> dict[str, Any]:
    """The numbers of a message; empty if there are none."""
    record = content.get(name)
    return dict(record) if isinstance(record, MetricRecord) else {}


def config_of(content: RecordDict, name: str = "config") -> dict[str, Any]:
    """The configuration in a message; empty if there is none."""
    record = content.get(name)
    return dict(record) if isinstance(record, ConfigRecord) else {}


def nbytes(content: RecordDict | Iterable[ArrayRecord]) -> int:
    """Bytes of array data in a message: what a network must carry, without headers and metrics."""
    records = array_records(content).values() if isinstance(content, RecordDict) else content
    return sum(_size(array) for record in records for array in record.values())


def held_bytes(record: ArrayRecord) -> int:
    """Bytes that a record takes here, whatever it says of its arrays' shapes."""
    return sum(len(array.data) if "tensor" not in array.__dict__ else array.__dict__["tensor"].nbytes for array in record.values())


def _tensor(array: Array) -> Tensor:
    held: Tensor | None = array.__dict__.get("tensor")
    return held if held is not None else torch.from_numpy(array.numpy())


def _size(array: Array) -> int:
    return prod(array.shape) * _itemsize(array.dtype)


@cache
def _itemsize(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)
