"""The vision transformer alone, from the layouts of the files that it may be in."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fedvision.errors import ExperimentError
from fedvision.leopart.backbones import transformer, weights_of
from fedvision.leopart.vision import VisionSize, VisionTransformer
from fedvision.seeds import generator

TINY = VisionSize(side=16, patch=4, width=8, depth=2, heads=2)


def rng(seed=0):
    return generator(seed, "backbone")


def state(seed=1):
    return VisionTransformer(TINY, rng(seed)).state_dict()


def prefixed(prefix, arrays):
    return {f"{prefix}{name}": value for name, value in arrays.items()}


def leopart(seed=1):
    heads = {"projection_head.0.weight": torch.ones(4, 8), "prototypes.weight": torch.ones(3, 4)}
    return state(seed) | heads


LAYOUTS = {
    "timm's": lambda: state() | {"head.weight": torch.ones(5, 8)},
    "DINO's": lambda: {
        "student": prefixed("module.backbone.", state(2)),
        "teacher": prefixed("backbone.", state()) | {"head.mlp.0.weight": torch.ones(3)},
    },
    "Leopart's": lambda: prefixed("model.", leopart()),
    "that of Leopart's training": lambda: {"state_dict": prefixed("teacher.", leopart(2)) | prefixed("model.", leopart())},
    "a run's of leopart": lambda: prefixed("model.", leopart()) | {"queue": torch.zeros(2, 3, 4)} | prefixed("teacher.", leopart(2)),
    "a run's of leopart-segmentation": lambda: prefixed("backbone.", state()) | {"head.conv_seg.bias": torch.ones(3)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_network_is_found_in_every_layout(tmp_path, layout):
    torch.save(LAYOUTS[layout](), tmp_path / "file.pth")
    built = transformer(TINY, rng(), 0.0, tmp_path / "file.pth").state_dict()
    assert built.keys() == state().keys()
    assert all(torch.equal(value, state()[name]) for name, value in built.items())


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["tiny", "vits16"])
def test_the_references_names_are_found(golden, tmp_path, kind):
    named = json.loads((golden / f"leopart_{kind}_keys.json").read_text())["keys"]
    arrays = {name: torch.zeros(shape) for name, shape in named.items()}
    save_file(arrays, tmp_path / "file.safetensors")
    found = weights_of(tmp_path / "file.safetensors", 4)
    depth, width = 1 + max(int(name.split(".")[1]) for name in found if name.startswith("blocks.")), found["cls_token"].shape[-1]
    patch = found["patch_embed.proj.weight"].shape[-1]
    size = VisionSize(side=16 * patch, patch=patch, width=width, depth=depth, heads=2)
    built = transformer(size, rng(), 0.0, tmp_path / "file.safetensors")
    assert found.keys() == built.state_dict().keys()
    if kind == "vits16":
        assert sum(value.numel() for value in found.values()) == 21_665_664


def test_multimaes_transformer_has_no_last_normalization(tmp_path):
    arrays = {name: value for name, value in state().items() if not name.startswith("norm.")}
    save_file(arrays, tmp_path / "file.safetensors")
    built = transformer(TINY, rng(), 0.0, tmp_path / "file.safetensors").state_dict()
    assert all(torch.equal(value, arrays[name]) for name, value in built.items() if name in arrays)
    assert torch.equal(built["norm.weight"], torch.ones(8)) and not built["norm.bias"].any()


def test_positions_are_kept_and_interpolated_for_other_pictures(tmp_path):
    save_file(state(), tmp_path / "file.safetensors")
    built = transformer(VisionSize(side=32, patch=4, width=8, depth=2, heads=2), rng(), 0.0, tmp_path / "file.safetensors")
    assert torch.equal(built.pos_embed, state()["pos_embed"])
    assert built.tokens(torch.rand(1, 3, 32, 24, generator=rng())).shape == (1, 1 + 8 * 6, 8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda arrays: arrays.pop("cls_token"),
            r"no cls_token, which vision transformers have; give a file of DINO, timm",
        ),
        (lambda arrays: arrays.pop("pos_embed"), r"positions of shape \[\], not those of a class token and a square"),
        (lambda arrays: arrays.update(pos_embed=torch.zeros(1, 13, 8)), r"positions of shape \[1, 13, 8\]"),
        (lambda arrays: arrays.pop("blocks.1.norm1.bias"), r"lacks 1 arrays of the network, such as blocks\.1\.norm1\.bias"),
        (lambda arrays: arrays.update({"blocks.2.norm1.bias": torch.zeros(8)}), r"no place for, such as blocks\.2\.norm1\.bias"),
        (lambda arrays: arrays.update({"patch_embed.proj.weight": torch.zeros(8, 3, 8, 8)}), r"choose the learner\.patch and the channels"),
        (
            lambda arrays: arrays.update({"norm.weight": torch.zeros(9)}),
            r"norm\.weight of shape \[9\], the network \[8\]; choose the learner",
        ),
        (lambda arrays: arrays["norm.bias"].fill_(torch.nan), r"norm\.bias with values that are not finite"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, reason):
    arrays = state()
    change(arrays)
    save_file(arrays, tmp_path / "file.safetensors")
    with pytest.raises(ExperimentError, match=reason):
        transformer(TINY, rng(), 0.0, tmp_path / "file.safetensors")
