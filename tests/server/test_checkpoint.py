import json

import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from fedvision.arrays import pack, unpack
from fedvision.errors import RunError
from fedvision.trees import decode, encode, load_weights, save_tensors
from server.checkpoint import FORMAT, Checkpoint

PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5),
    st.lists(st.integers(-5, 5), max_size=3).map(torch.tensor),
)  # fmt: skip
KEYS = st.one_of(st.integers(0, 3), st.text("ab/1", max_size=3))
TREES = st.dictionaries(
    KEYS, st.recursive(PLAIN, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)))
)


def alike(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(alike, one, other))
    return type(one) is type(other) and one == other


@given(TREES)
def test_what_is_encoded_is_decoded(tree):
    tensors: dict[str, torch.Tensor] = {}
    written = json.loads(json.dumps(encode(tree, "state", tensors)))
    assert alike(decode(written, tensors), tree)


def test_keys_that_look_alike_do_not_collide():
    tree = {1: torch.tensor(1), "1": torch.tensor(2), "a/b": torch.tensor(3), "a": {"b": torch.tensor(4)}}
    tensors: dict[str, torch.Tensor] = {}
    assert alike(decode(encode(tree, "", tensors), tensors), tree)


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", 1j])
def test_what_cannot_be_kept_is_refused_by_its_place(value):
    with pytest.raises(TypeError, match=rf"state/a/0: a {type(value).__name__} cannot be kept in a checkpoint"):
        encode({"a": [value]}, "state", {})


def sample() -> Checkpoint:
    adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    adam.param_groups[0]["params"][0].grad = torch.ones(3)
    adam.step()
    memory = RecordDict({
        "teacher": pack({"w": torch.arange(3.0)}),
        "numbers": MetricRecord({"times": 3, "rate": [0.5, 0.25]}),
        "words": ConfigRecord({"name": "x", "flag": True}),
    })  # fmt: skip
    arrays = {"w": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(7), "empty": torch.zeros(0, 3)}
    return Checkpoint(5, "identity", arrays, adam.state_dict(), {2: memory, 0: RecordDict()})


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    kept = sample()
    kept.save(tmp_path / "checkpoint")
    read = Checkpoint.load(tmp_path / "checkpoint")
    assert (read.round, read.identity) == (5, "identity")
    assert alike(dict(read.arrays), dict(kept.arrays))
    assert alike(dict(read.strategy), dict(kept.strategy))
    assert list(read.clients) == [2, 0]
    assert torch.equal(unpack(read.clients[2]["teacher"])["w"], torch.arange(3.0))
    assert dict(read.clients[2]["numbers"]) == {"times": 3, "rate": [0.5, 0.25]}
    assert dict(read.clients[2]["words"]) == {"name": "x", "flag": True}


def test_an_optimizer_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path):
    def optimizer(param):
        return torch.optim.Adam([param], lr=0.1, weight_decay=0.01)

    def steps(param, adam, start, number):
        for step in range(start, start + number):
            param.grad = torch.sin(torch.arange(4.0) + step)
            adam.step()

    param = torch.nn.Parameter(torch.ones(4))
    adam = optimizer(param)
    steps(param, adam, 0, 3)
    Checkpoint(3, "x", {"w": param.detach().clone()}, adam.state_dict()).save(tmp_path / "checkpoint")
    steps(param, adam, 3, 3)
    read = Checkpoint.load(tmp_path / "checkpoint")
    resumed = torch.nn.Parameter(read.arrays["w"].clone())
    again = optimizer(resumed)
    again.load_state_dict(dict(read.strategy))
    steps(resumed, again, 3, 3)
    assert torch.equal(param, resumed)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(tmp_path, share):
    file = tmp_path / "checkpoint"
    sample().save(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(RunError, match=r"checkpoint: not a readable checkpoint .*start again in another folder with --out"):
        Checkpoint.load(file)


def header(**changes) -> str:
    tree = {"arrays": {"items": []}, "strategy": {"items": []}, "clients": {"items": []}}
    return json.dumps({"format": FORMAT, "round": 1, "identity": "x", "tree": tree} | changes)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"fedvision": "{"},
        {"fedvision": "[]"},
        {"fedvision": "{}"},
        {"fedvision": header(format=FORMAT + 1)},
        {"fedvision": header(tree=[])},
        {"fedvision": header(tree={"arrays": {"items": [["w", {"tensor": "absent"}]]}, "strategy": {}, "clients": {}})},
        {"fedvision": header(tree={"arrays": {"items": 3}, "strategy": {"items": []}, "clients": {"items": []}})},
        {"fedvision": header(tree={"arrays": {"items": []}})},
        {"fedvision": header(tree={"arrays": {"items": []}, "strategy": {"items": []}, "clients": {"items": [["0", 3]]}})},
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, metadata):
    save_file({"w": torch.zeros(1)}, tmp_path / "checkpoint", metadata)
    with pytest.raises(RunError, match="not a readable checkpoint"):
        Checkpoint.load(tmp_path / "checkpoint")


def test_a_checkpoint_of_a_later_version_says_so(tmp_path):
    save_file({}, tmp_path / "checkpoint", {"fedvision": header(format=FORMAT + 1)})
    with pytest.raises(RunError, match=f"its format is {FORMAT + 1}, this version of FedVision reads {FORMAT}"):
        Checkpoint.load(tmp_path / "checkpoint")


def test_a_missing_or_unreadable_checkpoint_is_refused(tmp_path):
    with pytest.raises(RunError, match="not a readable checkpoint"):
        Checkpoint.load(tmp_path / "absent")
    with pytest.raises(RunError, match="not a readable checkpoint"):
        Checkpoint.load(tmp_path)


def test_no_pickle_is_loaded(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "weights.pt")
    for read in (Checkpoint.load, load_weights):
        with pytest.raises(RunError):
            read(tmp_path / "weights.pt")


def test_a_checkpoint_replaces_the_one_before_as_a_whole(tmp_path, monkeypatch):
    file = tmp_path / "checkpoint"
    sample().save(file)
    before = file.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedvision.trees.save_file", full)
    with pytest.raises(RunError, match="No space left on device"):
        Checkpoint(6, "identity", {"w": torch.ones(100)}).save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_tied_and_strided_tensors_are_written_out_each(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "row first": base.clone()[1],
        "one": base,
        "same": base,
        "row": base[1],
        "turned": base.T,
        "part": base[:, 1:3],
        "scalar": base[2, 2],
        "none": base[:0],
    }
    save_tensors(tmp_path / "weights", tensors)
    read = load_weights(tmp_path / "weights")
    assert alike(read, {name: tensors[name] for name in read}) and set(read) == set(tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_types_survive(tmp_path, dtype):
    save_tensors(tmp_path / "weights", {"w": torch.ones(3, dtype=dtype)})
    assert load_weights(tmp_path / "weights")["w"].dtype == dtype


def test_missing_weights_are_an_error_of_ours(tmp_path):
    with pytest.raises(RunError, match=r"absent.safetensors: not a readable safetensors file"):
        load_weights(tmp_path / "absent.safetensors")
