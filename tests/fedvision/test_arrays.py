import pickle

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedvision.arrays import TensorArray, nbytes, pack, unpack

DTYPES = (torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool)
SHAPES = st.lists(st.integers(0, 4), max_size=3)


@given(st.sampled_from(DTYPES), SHAPES)
def test_arrays_keep_names_types_shapes_and_values(dtype, shape):
    tensor = torch.arange(int(np.prod(shape)), dtype=torch.float64).reshape(shape).to(dtype)
    record = pack({"a/b.c": tensor, "scalar": torch.tensor(3)})
    plain = ArrayRecord({name: Array(array.dtype, tuple(array.shape), array.stype, array.data) for name, array in record.items()})
    for travelled in (record, plain):
        assert list(travelled) == ["a/b.c", "scalar"]
        again = unpack(travelled)
        assert again["a/b.c"].dtype == dtype and torch.equal(again["a/b.c"], tensor)
        assert again["scalar"].shape == () and again["scalar"] == 3


def test_packing_shares_memory():
    tensor = torch.zeros(3)
    assert unpack(pack({"x": tensor}))["x"].data_ptr() == tensor.data_ptr()
    assert pack({"x": tensor})["x"].numpy().ctypes.data == tensor.data_ptr()


def test_packing_drops_the_graph():
    assert not unpack(pack({"x": torch.zeros(3, requires_grad=True) * 2}))["x"].requires_grad


def test_a_packed_tensor_looks_like_flowers_own_array():
    tensor = torch.arange(6.0).reshape(2, 3).T  # not contiguous
    ours, flowers = TensorArray(tensor), Array(tensor.numpy())
    assert (ours.dtype, tuple(ours.shape), ours.stype) == (flowers.dtype, tuple(flowers.shape), flowers.stype)
    assert np.array_equal(ours.numpy(), flowers.numpy())
    assert ours.data == flowers.data


def test_what_leaves_the_process_can_be_read_by_any_flower_peer():
    array = TensorArray(torch.arange(4.0))
    assert np.array_equal(
        Array.inflate(array.deflate(), {chunk.object_id: chunk for _, chunk in array.slice_array()}).numpy(), [0, 1, 2, 3]
    )


def test_a_packed_tensor_survives_pickling_between_our_own_processes():
    again = pickle.loads(pickle.dumps(pack({"x": torch.arange(3)})["x"]))
    assert isinstance(again, TensorArray)
    assert np.array_equal(again.numpy(), [0, 1, 2])


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float64, 8), (torch.float16, 2), (torch.int64, 8), (torch.bool, 1)])
def test_bytes_are_counted_by_shape_and_type(dtype, size):
    record = pack({"x": torch.zeros(3, 5, dtype=dtype), "scalar": torch.zeros((), dtype=dtype), "none": torch.zeros(0, 7, dtype=dtype)})
    assert nbytes([record]) == 16 * size
    assert nbytes(RecordDict({"one": record, "two": record})) == 32 * size
    assert nbytes(RecordDict()) == 0
