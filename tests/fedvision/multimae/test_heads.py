"""Heads of fine-tuning against the reference's arrays, against their formulas in loops, and in a network."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedvision.errors import DataError, ExperimentError
from fedvision.multimae.dpt import DPTHead, Fusion, doubled
from fedvision.multimae.finetuned import MultiViT
from fedvision.multimae.heads import ConvNeXtBlock, ConvNeXtHead, Encoded, LinearHead, SegmenterHead
from fedvision.multimae.modalities import DEPTH_MAP, RGB, semantic
from fedvision.multimae.model import SIZES, Size
from fedvision.multimae.transformer import initialized
from fedvision.seeds import global_generators

PADDED = semantic(10, embedding=8, padded=True)
SMALL_DPT = {"taps": (0, 0, 1, 1), "layers": (8, 12, 16, 20), "features": 16}

KINDS = {
    "cls_mean": ([RGB], "cls", lambda: LinearHead(32, 7)),
    "cls_global": ([RGB], "cls", lambda: LinearHead(32, 7, pooled=False)),
    "seg_convnext": ([RGB, DEPTH_MAP], "semseg", lambda: ConvNeXtHead(32, 7, ["rgb"], 64, 2)),
    "seg_convnext_rgbd": ([RGB, DEPTH_MAP], "semseg", lambda: ConvNeXtHead(32, 7, ["rgb", "depth"], 64, 1)),
    "seg_segmenter": ([RGB, DEPTH_MAP], "semseg", lambda: SegmenterHead(32, 7, ["rgb"], 32, 2, 4)),
    "depth_dpt": ([RGB], "depth", lambda: DPTHead(32, 1, ["rgb"], "regression", **SMALL_DPT)),
    "seg_dpt": ([RGB], "semseg", lambda: DPTHead(32, 7, ["rgb"], "classes", **SMALL_DPT)),
    "seg_pad_input": ([RGB, DEPTH_MAP, PADDED], "semseg", lambda: ConvNeXtHead(32, 7, ["rgb"], 64, 1)),
}
"""The reference's networks: modalities, name of the head, head."""


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(modalities, name, head, patch=16, grid=(4, 4)):
    with global_generators(torch.Generator().manual_seed(0)):
        return MultiViT(modalities, {name: head()}, Size(32, 2, 4), patch, grid).eval()


def kind(name):
    return network(*KINDS[name])


@pytest.mark.golden
@pytest.mark.parametrize("name", KINDS)
def test_names_and_shapes_are_those_of_published_checkpoints(golden, name):
    models = json.loads((golden / "multimae_tiny_keys.json").read_text())["models"]
    expected = {key: tuple(shape) for key, (shape, _) in models[name].items()}
    assert {key: tuple(value.shape) for key, value in kind(name).state_dict().items()} == expected


@pytest.mark.golden
@pytest.mark.parametrize("name", KINDS)
def test_predictions_are_the_references(arrays, group, name):
    weights = group(f"{name}/sd/")
    if not weights:
        pytest.skip(f"the reference's arrays have no group {name}")
    model = kind(name)
    model.load_state_dict(weights)
    given = {"rgb": arrays["in/rgb"], "depth": arrays["in/depth"], "semseg": arrays["in/semseg_with_pad"]}
    head = KINDS[name][1]
    with torch.no_grad():
        found = model({modality: given[modality] for modality in model.modalities})[head]
    expected = arrays[f"{name}/pred_{head}"]
    assert torch.allclose(found, expected, rtol=1e-5, atol=2e-5 + 1e-6 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("head", "whole", "alone"),
    [
        (lambda: LinearHead(768, 1000), 86_416_360, None),
        (lambda: ConvNeXtHead(768, 150, ["rgb"]), 95_234_454, 9_588_630),
        (lambda: SegmenterHead(768, 150, ["rgb"]), 101_708_844, 16_063_020),
        (lambda: DPTHead(768, 1, ["rgb"], "regression", (2, 5, 8, 11)), 105_711_745, 20_065_921),
    ],
)
def test_numbers_of_parameters_are_the_papers(head, whole, alone):
    with torch.device("meta"):
        model = MultiViT([RGB], {"task": head()}, SIZES["base"], 16, (14, 14))

    def trained(module):
        return sum(param.numel() for param in module.parameters() if param.requires_grad)

    assert trained(model) == whole
    assert alone is None or trained(model.output_adapters) == alone


# ---- formulas -------------------------------------------------------------------------------------------------------


def encoded(layers=1, names=("rgb", "depth"), grid=(2, 3), width=8, patch=16, seed=0):
    """What a head sees of two pictures: patches of each modality, and one global token."""
    n = math.prod(grid)
    spans = {name: slice(i * n, (i + 1) * n) for i, name in enumerate(names)}
    tokens = [random(2, len(names) * n + 1, width, seed=seed + layer) for layer in range(layers)]
    return Encoded(tokens, spans, grid, (grid[0] * patch, grid[1] * patch))


def normalized(vector, weight, bias):
    mean = sum(vector) / len(vector)
    variance = sum((value - mean) ** 2 for value in vector) / len(vector)
    return [(value - mean) / math.sqrt(variance + 1e-6) * w + b for value, w, b in zip(vector, weight, bias, strict=True)]


def shaken(module):
    """The module with weights that no part of it can hide behind."""
    for i, param in enumerate(module.parameters()):
        param.data = random(*param.shape, seed=i) / 2
    return module.eval()


@pytest.mark.parametrize("pooled", [True, False])
def test_the_linear_head_takes_the_mean_of_all_tokens_or_the_global_one(pooled):
    head, seen = shaken(LinearHead(8, 3, pooled)), encoded()
    for found, tokens in zip(head(seen).tolist(), seen.layers[-1].tolist(), strict=True):
        vector = [sum(column) / len(tokens) for column in zip(*tokens, strict=True)] if pooled else tokens[-1]
        vector = normalized(vector, head.norm.weight.tolist(), head.norm.bias.tolist())
        for logit, row, bias in zip(found, head.head.weight.tolist(), head.head.bias.tolist(), strict=True):
            assert logit == pytest.approx(sum(w * v for w, v in zip(row, vector, strict=True)) + bias, abs=1e-4)


def test_a_patch_of_the_convnext_head_becomes_four_by_four_places():
    head, seen = shaken(ConvNeXtHead(8, 5, ["rgb", "depth"], 48, 0)), encoded()
    seen = Encoded(seen.layers, seen.spans, seen.grid, (8, 12))  # as many pixels as places: nothing is interpolated
    found, weight, bias = head(seen), head.final_layer.weight[:, :, 0, 0], head.final_layer.bias
    tokens = seen.layers[0]
    for b in range(2):
        for row in range(8):
            for column in range(12):
                patch = (row // 4) * 3 + column // 4
                both = torch.cat([tokens[b, patch], tokens[b, 6 + patch]])
                place = (row % 4) * 4 + column % 4
                channels = head.proj_dec(both)[3 * place : 3 * place + 3]
                assert torch.allclose(found[b, :, row, column], weight @ channels + bias, atol=1e-4)


def test_a_convnext_block_is_its_formula():
    block, x = shaken(ConvNeXtBlock(3)), random(1, 3, 4, 5)
    found = block(x)
    for row in range(4):
        for column in range(5):
            mixed = []
            for c in range(3):
                total = block.dwconv.bias[c].item()
                for i in range(7):
                    for j in range(7):
                        y, z = row + i - 3, column + j - 3
                        if 0 <= y < 4 and 0 <= z < 5:
                            total += (block.dwconv.weight[c, 0, i, j] * x[0, c, y, z]).item()
                mixed.append(total)
            hidden = F.gelu(block.pwconv1(torch.tensor(normalized(mixed, block.norm.weight.tolist(), block.norm.bias.tolist()))))
            assert torch.allclose(found[0, :, row, column], x[0, :, row, column] + block.pwconv2(hidden), rtol=1e-4, atol=1e-4)


def test_the_segmenter_compares_patches_with_classes():
    head, seen = shaken(SegmenterHead(8, 3, ["depth"], 12, 2, 4)), encoded()
    seen = Encoded(seen.layers, seen.spans, seen.grid, seen.grid)
    found = head(seen)
    for b in range(2):
        patches = head.proj_dec(seen.layers[0][b : b + 1, 6:12])
        x = head.decoder_norm(head.blocks[1](head.blocks[0](torch.cat([patches, head.cls_emb], dim=1))))[0]
        for place in range(6):
            patch = head.patch_proj.weight @ x[place]
            cosines = []
            for k in range(3):
                shown = head.classes_proj.weight @ x[6 + k]
                cosines.append((patch @ shown / (patch.norm() * shown.norm())).item())
            expected = normalized(cosines, head.mask_norm.weight.tolist(), head.mask_norm.bias.tolist())
            assert found[b, :, place // 3, place % 3].tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("predicts", ["regression", "classes"])
def test_dpt_is_its_formula(predicts):
    head = shaken(DPTHead(8, 2, ["rgb"], predicts, (0, 1, 2, 3), (4, 5, 6, 7), 8))
    seen, parts = encoded(4, ("rgb",), (2, 4)), head.scratch

    def unit(u, x):
        return u.conv2(u.conv1(x.clamp(min=0)).clamp(min=0)) + x

    a, b, c, d = (tokens[:, :8].permute(0, 2, 1).reshape(2, 8, 2, 4) for tokens in seen.layers)
    a = F.conv2d(head.act_1_postprocess(a), parts.layer1_rn.weight, padding=1)
    b = F.conv2d(head.act_2_postprocess(b), parts.layer2_rn.weight, padding=1)
    c = F.conv2d(head.act_3_postprocess[0](c), parts.layer3_rn.weight, padding=1)
    d = F.conv2d(head.act_4_postprocess(d), parts.layer4_rn.weight, padding=1)
    assert [tuple(x.shape[2:]) for x in (a, b, c, d)] == [(8, 16), (4, 8), (2, 4), (1, 2)]
    x = parts.refinenet4.out_conv(doubled(unit(parts.refinenet4.resConfUnit2, d)))
    for step, layer in ((parts.refinenet3, c), (parts.refinenet2, b), (parts.refinenet1, a)):
        x = step.out_conv(doubled(unit(step.resConfUnit2, x + unit(step.resConfUnit1, layer))))
    if predicts == "regression":
        x = head.head[4](head.head[2](doubled(head.head[0](x))).clamp(min=0))
    else:
        x = doubled(head.head[4](head.head[0](x).clamp(min=0)))
    assert x.shape == (2, 2, 32, 64)
    assert torch.allclose(head(seen), x, rtol=1e-4, atol=1e-3)


def test_doubling_keeps_corners_where_they_are():
    maps, found = random(1, 1, 3, 4), doubled(random(1, 1, 3, 4))
    for row in range(6):
        for column in range(8):
            y, z = row * 2 / 5, column * 3 / 7
            top, left = min(int(y), 1), min(int(z), 2)
            dy, dz = y - top, z - left
            corners = maps[0, 0, top : top + 2, left : left + 2]
            upper, lower = (corners[i, 0] * (1 - dz) + corners[i, 1] * dz for i in (0, 1))
            assert found[0, 0, row, column].item() == pytest.approx((upper * (1 - dy) + lower * dy).item(), abs=1e-5)


def test_the_coarsest_step_leaves_its_first_unit_unused():
    model = kind("depth_dpt")
    model({"rgb": random(1, 3, 64, 64)})["depth"].sum().backward()
    idle = {name for name, param in model.named_parameters() if param.requires_grad and param.grad is None}
    assert {name.rsplit(".", 2)[0] for name in idle} == {"output_adapters.depth.scratch.refinenet4.resConfUnit1"}
    assert Fusion(4)(random(1, 4, 2, 2), None).shape == (1, 4, 4, 4)


def test_arrays_with_two_names_are_the_same():
    state = kind("seg_dpt").state_dict(keep_vars=True)
    head = "output_adapters.semseg"
    for i in (1, 2, 3, 4):
        assert state[f"{head}.scratch.layer{i}_rn.weight"] is state[f"{head}.scratch.layer_rn.{i - 1}.weight"]
        assert state[f"{head}.act_{i}_postprocess.0.bias"] is state[f"{head}.act_postprocess.{i - 1}.0.bias"]


def test_pictures_in_other_patches_than_the_papers_are_predicted_in_full():
    model = network([RGB], "depth", lambda: DPTHead(32, 1, ["rgb"], "regression", **SMALL_DPT), patch=8)
    assert model({"rgb": random(1, 3, 32, 48)})["depth"].shape == (1, 1, 32, 48)


def test_heads_that_cannot_be_are_refused():
    with pytest.raises(DataError, match=r"DPT cannot halve and double 3 x 4 patches; choose learner.resolution"):
        kind("depth_dpt")({"rgb": random(1, 3, 48, 64)})
    with pytest.raises(ExperimentError, match=r"16 places cannot share 50 channels; choose learner.head_width"):
        ConvNeXtHead(8, 5, ["rgb"], 50)
    with pytest.raises(ExperimentError, match=r"12 heads cannot share a width of 32; choose learner.head_width"):
        SegmenterHead(8, 5, ["rgb"], 32)


# ---- a network with some of its modalities ---------------------------------------------------------------------------


def inputs(n=4, seed=0):
    ids = torch.randint(10, (n, 16, 16), generator=torch.Generator().manual_seed(seed))
    return {"rgb": random(n, 3, 64, 64, seed=seed), "depth": random(n, 1, 64, 64, seed=seed + 1), "semseg": ids}


def test_an_example_without_a_modality_is_encoded_without_its_patches():
    model, given = network([RGB, DEPTH_MAP, PADDED], "cls", lambda: LinearHead(32, 7)), inputs()
    given["depth"][1], given["semseg"][1], given["depth"][3] = torch.nan, 255, torch.nan
    found = model(given)["cls"]
    for i, names in enumerate([["rgb", "depth", "semseg"], ["rgb"], ["rgb", "depth", "semseg"], ["rgb", "semseg"]]):
        alone = model({name: given[name][i : i + 1] for name in names})["cls"]
        assert torch.allclose(found[i : i + 1], alone, atol=1e-5)
    with_mean = model(given | {"depth": given["depth"].nan_to_num(0.0)})["cls"]
    assert not torch.allclose(found[1], with_mean[1], atol=1e-3)


def test_what_a_head_reads_is_the_mean_where_it_is_not_known():
    model, given = kind("seg_convnext_rgbd"), inputs()
    whole, without = {name: given[name] for name in ("rgb", "depth")}, {"rgb": given["rgb"]}
    zero = model(whole | {"depth": torch.zeros_like(given["depth"])})["semseg"]
    assert torch.allclose(model(without)["semseg"], zero, atol=1e-5)
    whole["depth"][2] = torch.nan
    assert torch.allclose(model(whole)["semseg"][2], zero[2], atol=1e-5)


def test_of_an_example_of_which_nothing_is_known_something_is_predicted():
    model, given = network([RGB, DEPTH_MAP, PADDED], "cls", lambda: LinearHead(32, 7)), inputs(2)
    given = {name: torch.full_like(values, torch.nan if name != "semseg" else 255) for name, values in given.items()}
    assert model(given)["cls"].isfinite().all()


def test_heads_read_modalities_in_the_order_that_they_are_given():
    seen = encoded()
    assert torch.equal(seen.patches(["depth", "rgb"]), torch.cat([seen.layers[0][:, 6:12], seen.layers[0][:, :6]], dim=2))


def test_a_network_without_any_modality_is_refused():
    with pytest.raises(DataError, match="do not cover the same patches: nothing"):
        kind("cls_mean")({})
    with pytest.raises(DataError, match="no modality 'thermal', only rgb"):
        kind("cls_mean")({"thermal": random(1, 1, 64, 64)})


def test_several_heads_predict_at_once():
    heads = {"cls": LinearHead(32, 7), "depth": DPTHead(32, 1, ["rgb"], "regression", **SMALL_DPT)}
    model = MultiViT([RGB], heads, Size(32, 2, 4), 16, (4, 4)).eval()
    found = model({"rgb": random(2, 3, 64, 64)})
    assert {name: tuple(values.shape) for name, values in found.items()} == {"cls": (2, 7), "depth": (2, 1, 64, 64)}


def test_weights_of_heads_begin_by_xaviers_rule():
    rng = torch.Generator().manual_seed(0)
    model = initialized(MultiViT([RGB], {"cls": LinearHead(64, 100)}, Size(64, 1, 4), 16, (2, 2)), rng)
    segmenter = initialized(SegmenterHead(64, 50, ["rgb"], 64, 1, 4), rng)
    weight, bound = model.output_adapters["cls"].head.weight, (6 / 164) ** 0.5
    assert 0.98 * bound < weight.abs().max() <= bound
    assert 0.015 < segmenter.cls_emb.std() < 0.025
    assert isinstance(model.output_adapters["cls"].norm, nn.LayerNorm) and model.output_adapters["cls"].norm.eps == 1e-6
