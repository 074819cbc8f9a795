import argparse
import json
from functools import partial

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from fedvision.checkpoints import Fit, flat, load, read
from fedvision.errors import ExperimentError
from fedvision.seeds import generator

WEIGHTS = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
OTHERS = {"weight": torch.full((2, 3), 7.0), "bias": torch.zeros(2)}


@pytest.fixture(scope="module")
def arrays(golden):
    with np.load(golden / "usi.npz") as file:
        return dict(file)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "checkpoint",
    [
        WEIGHTS,
        {"state_dict": WEIGHTS, "epoch": 3},
        {"model": WEIGHTS},
        {"state_dict_ema": WEIGHTS, "state_dict": OTHERS},
        {"model": OTHERS, "model_ema": WEIGHTS},
        {"state_dict": {f"module.{name}": tensor for name, tensor in WEIGHTS.items()}},
        {f"_orig_mod.module.{name}": tensor for name, tensor in WEIGHTS.items()},
        {**WEIGHTS, "epoch": 7},
        {"state_dict": WEIGHTS, "state_dict_ema": None, "args": argparse.Namespace(lr=0.1)},
    ],
    ids=["flat", "state_dict", "model", "ema", "model_ema", "module", "compiled", "with numbers", "timm's"],
)
def test_weights_are_found_in_a_file_wherever_they_are(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "file.pth.tar")
    assert same(read(tmp_path / "file.pth.tar"), WEIGHTS)


def test_weights_are_found_under_other_names_if_told():
    assert same(flat({"teacher": WEIGHTS, "student": OTHERS}, ["teacher"]), WEIGHTS)


def test_safetensors_are_read(tmp_path):
    save_file(WEIGHTS, tmp_path / "file.safetensors")
    assert same(read(tmp_path / "file.safetensors"), WEIGHTS)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"state_dict": WEIGHTS, "hook": partial(print, "boo")}, tmp_path / "file.pth")
    with pytest.raises(ExperimentError, match=r"needs .*partial.*which loading would run; save its weights alone, as safetensors"):
        read(tmp_path / "file.pth")


@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
def test_a_damaged_file_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"<html>404</html>")
    with pytest.raises(ExperimentError, match="cannot be read as"):
        read(tmp_path / name)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ExperimentError, match="there is no checkpoint"):
        read(tmp_path / "nothing.pth")


@pytest.mark.parametrize("empty", [{}, {"epoch": 3, "state_dict": {}}, [1, 2], None])
def test_a_file_without_weights_is_refused(empty):
    with pytest.raises(ExperimentError, match="holds no weights"):
        flat(empty)


def test_a_model_takes_the_weights_that_fit():
    model = nn.Linear(3, 2)
    load(model, WEIGHTS)
    assert same(model.state_dict(), WEIGHTS)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": WEIGHTS["weight"]}, "1 missing: bias"),
        ({**WEIGHTS, "scale": torch.ones(2)}, "1 unexpected: scale"),
        ({"weight": torch.ones(5, 3), "bias": torch.ones(5)}, r"2 of another shape: weight \[5, 3\] instead of \[2, 3\], bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(state, message):
    model = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ExperimentError, match=message):
        load(model, state)
    assert same(model.state_dict(), before)


def test_counters_of_batch_norm_may_be_missing():
    model = nn.BatchNorm2d(3)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "num_batches_tracked"}
    assert Fit.of(state, model)


# ---- the teacher of USI ---------------------------------------------------------------------------------------------


def tiny_tresnet(second):
    from timm.models.tresnet import TResNet

    return TResNet([1, 1, 2, 1] if second else [1, 2, 1, 1], num_classes=7, width_factor=0.125, v2=second)


@pytest.mark.golden
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_checkpoint_of_the_reference_gives_the_references_logits(arrays, version, tmp_path):
    from fedvision.teachers import converted

    if f"tresnet_{version}_x" not in arrays:
        pytest.skip(f"the golden arrays hold no tresnet {version}")
    begin = f"tresnet_{version}_sd/"
    state = {name.removeprefix(begin): torch.from_numpy(array) for name, array in arrays.items() if name.startswith(begin)}
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "teacher.pth")
    model = tiny_tresnet(version == "v2").eval()
    load(model, converted(read(tmp_path / "teacher.pth"), model))
    with torch.no_grad():
        logits = model(torch.from_numpy(arrays[f"tresnet_{version}_x"]))
    assert torch.allclose(logits, torch.from_numpy(arrays[f"tresnet_{version}_logits"]), rtol=1e-5, atol=1e-5)


@pytest.mark.golden
def test_space_to_depth_is_the_references(arrays):
    from timm.layers import SpaceToDepth

    assert np.array_equal(SpaceToDepth(4)(torch.from_numpy(arrays["s2d_in"])).numpy(), arrays["s2d_out"])


@pytest.mark.golden
def test_the_papers_teacher_has_the_references_names_and_shapes(golden):
    from fedvision.teachers import converted

    lists = json.loads((golden / "usi_tresnet_keys.json").read_text())
    with torch.device("meta"):
        model = timm.create_model("tresnet_v2_l")
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == lists["timm_tresnet_v2_l"]
    for names in lists.values():
        state = {name: torch.empty(shape, device="meta") for name, shape in names.items()}
        assert Fit.of(converted(state, model), model), str(Fit.of(converted(state, model), model))


def test_a_checkpoint_in_timms_names_is_taken_as_it_is():
    from fedvision.teachers import converted

    model = tiny_tresnet(True)
    assert same(converted(model.state_dict(), model), model.state_dict())


def test_a_checkpoint_of_other_classes_is_refused():
    model, other = timm.create_model("test_resnet", num_classes=5), timm.create_model("test_resnet", num_classes=3)
    with pytest.raises(ExperimentError, match=r"instead of \[5.*choose the model and the classes"):
        load(model, other.state_dict())


def test_a_checkpoint_of_another_model_is_refused():
    with pytest.raises(ExperimentError, match="does not fit ResNet"):
        load(timm.create_model("resnet10t"), {"weight": torch.rand(3, generator=generator(0))})
