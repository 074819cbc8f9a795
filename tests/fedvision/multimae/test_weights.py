"""Published weights: what is taken of them, what is told of the rest, and the way back."""

import argparse
import json
import logging
from functools import partial

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from fedvision.checkpoints import Fit
from fedvision.errors import ExperimentError
from fedvision.multimae.decoders import DecoderSize
from fedvision.multimae.modalities import DEPTH_MAP, RGB, Modality, semantic
from fedvision.multimae.model import SIZES, Autoencoder, Size, Trunk
from fedvision.multimae.transformer import initialized
from fedvision.multimae.weights import from_timm, initialized_from, layout_of, resized_positions, to_timm
from fedvision.seeds import generator, global_generators

SEMSEG = semantic(10, embedding=8)
ALL = (RGB, DEPTH_MAP, SEMSEG)
SIZE, DECODER = Size(32, 2, 4), DecoderSize(16, 1, 4)


def autoencoder(seed, modalities=ALL, size=SIZE, decoder=DECODER, patch=16, grid=(4, 4), **options):
    """A small network of pre-training; of different seeds, no two weights are the same."""
    with global_generators(generator(seed)):
        model = Autoencoder(modalities, modalities, size, decoder, patch, grid, **options)
        for param in model.parameters():
            if param.requires_grad:
                param.data.add_(torch.rand(param.shape), alpha=0.1)
    return model


def trunk(seed, modalities=ALL, size=SIZE, patch=16, grid=(4, 4)):
    """A small network without decoders."""
    return initialized(Trunk(modalities, size, patch, grid), generator(seed))


def vit(seed=0, **options):
    """A small vision transformer of timm, in evaluation mode."""
    with global_generators(generator(seed)):
        model = VisionTransformer(img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=4, num_classes=5, **options)
        for param in model.parameters():
            param.data.add_(torch.rand(param.shape), alpha=0.1)
    return model.eval()


def published(state, path):
    """A file as training code leaves it."""
    torch.save({"model": state, "optimizer": {"step": 3}, "epoch": 1599, "scaler": {}, "args": argparse.Namespace(lr=1e-4)}, path)
    return path


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- MultiMAE's layout ----------------------------------------------------------------------------------------------


@pytest.fixture
def papers(golden):
    """The published checkpoint: its names, with arrays that take no memory."""
    names = json.loads((golden / "multimae_full_keys.json").read_text())
    assert len(names) == 351
    return {name: torch.empty(shape, device="meta") for name, shape in names.items()}


@pytest.mark.golden
def test_the_published_checkpoint_is_the_papers_network(papers):
    with torch.device("meta"):
        modalities = (RGB, DEPTH_MAP, semantic(133))
        model = Autoencoder(modalities, modalities, SIZES["base"], DecoderSize(), 16, (14, 14))
    assert Fit.of(papers, model), str(Fit.of(papers, model))


@pytest.mark.golden
def test_the_published_checkpoint_is_timms_base_model_without_norm_and_head(papers):
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    fit = Fit.of(to_timm(papers).state, model)
    assert set(fit.missing) == {"norm.weight", "norm.bias", "head.weight", "head.bias"} and not fit.unexpected and not fit.misshapen


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_pre_training_goes_on_with_everything(tmp_path, ending):
    model, other = autoencoder(0), autoencoder(1)
    path = tmp_path / f"file.{ending}"
    if ending == "pth":
        published(other.state_dict(), path)
    else:
        save_file(other.state_dict(), path)
    report = initialized_from(model, path, decoders=True)
    assert same(copied(model), copied(other))
    assert report.fit and not report.new and not report.new_outputs
    assert (report.modalities, report.outputs) == (("rgb", "depth", "semseg"), ("rgb", "depth", "semseg", "norm_rgb"))


def test_fine_tuning_takes_the_trunk_and_leaves_the_decoders(tmp_path):
    model, other = autoencoder(0), autoencoder(1)
    before, given = copied(model), copied(other)
    report = initialized_from(model, published(given, tmp_path / "file.pth"))
    for name, tensor in copied(model).items():
        assert torch.equal(tensor, (before if name.startswith("output_adapters.") else given)[name]), name
    assert report.new_outputs == ("rgb", "depth", "semseg", "norm_rgb") and not report.outputs
    assert set(report.fit.unexpected) == {name for name in given if name.startswith("output_adapters.")}


def test_a_trunk_takes_what_it_has_and_the_report_names_the_rest(tmp_path):
    model, given = trunk(0, (RGB, DEPTH_MAP)), copied(trunk(1))
    report = initialized_from(model, published(given, tmp_path / "file.pth"))
    assert same(copied(model), {name: tensor for name, tensor in given.items() if ".semseg." not in name})
    assert report.modalities == ("rgb", "depth") and not report.fit.missing
    assert set(report.fit.unexpected) == {name for name in given if ".semseg." in name}
    assert "4 unexpected: input_adapters.semseg." in str(report)


def test_a_modality_that_the_file_does_not_know_begins_anew_and_is_told(tmp_path, caplog):
    thermal = Modality(name="thermal", field="thermal", channels=1)
    model, given = autoencoder(0, (*ALL, thermal)), copied(autoencoder(1))
    before = copied(model)
    with caplog.at_level(logging.WARNING):
        report = initialized_from(model, published(given, tmp_path / "file.pth"), decoders=True)
    assert (report.new, report.new_outputs) == (("thermal",), ("thermal",))
    assert "inputs that begin anew: thermal" in caplog.text
    for name, tensor in copied(model).items():
        assert torch.equal(tensor, given.get(name, before[name])), name
    assert "output_adapters.rgb.task_embeddings.thermal" in report.fit.missing


def test_the_model_of_a_run_has_no_positions_and_the_network_keeps_its_own(tmp_path):
    model, given = autoencoder(0), {name: t for name, t in copied(autoencoder(1)).items() if not name.endswith("pos_emb")}
    before = copied(model)
    save_file(given, tmp_path / "model.safetensors")
    report = initialized_from(model, tmp_path / "model.safetensors", decoders=True)
    assert same(copied(model), before | given)
    assert report.fit.missing and all(name.endswith("pos_emb") for name in report.fit.missing)


def test_positions_of_another_grid_are_interpolated(tmp_path):
    model, given = autoencoder(0, grid=(2, 6)), copied(autoencoder(1))
    report = initialized_from(model, published(given, tmp_path / "file.pth"), decoders=True)
    found = copied(model)
    for name, mode in (("input_adapters.semseg", "bicubic"), ("output_adapters.rgb", "bilinear")):
        expected = F.interpolate(given[f"{name}.pos_emb"], size=(2, 6), mode=mode, align_corners=False)
        assert torch.equal(found[f"{name}.pos_emb"], expected)
    assert len(report.resized) == 7


def test_positions_in_half_precision_are_interpolated():
    given = {"input_adapters.rgb.pos_emb": torch.ones(1, 8, 4, 4, dtype=torch.float16)}
    (found,) = resized_positions(given, {"input_adapters.rgb.pos_emb": torch.empty(1, 8, 3, 3)}).values()
    assert found.shape == (1, 8, 3, 3) and torch.allclose(found, torch.ones(()))


def test_a_class_for_what_is_not_known_gets_an_embedding_of_zeros(tmp_path):
    model, given = trunk(0, (semantic(10, embedding=8, padded=True),)), copied(trunk(1))
    initialized_from(model, published(given, tmp_path / "file.pth"))
    rows = model.state_dict()["input_adapters.semseg.class_emb.weight"]
    assert torch.equal(rows[:10], given["input_adapters.semseg.class_emb.weight"]) and not rows[10].any() and len(rows) == 11
    again = trunk(2, (semantic(10, embedding=8, padded=True),))
    initialized_from(again, published(copied(model), tmp_path / "again.pth"))
    assert same(copied(again), copied(model))


# ---- files that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"size": Size(64, 2, 4)},
            r"file\.pth has global_tokens of shape \[1, 1, 64\], the network \[1, 1, 32\]; choose the encoder's width",
        ),
        ({"size": Size(32, 3, 4)}, r"file\.pth has 12 arrays that .* no place for, such as encoder\.2\.norm1\.weight; .* as deep"),
        ({"size": Size(32, 1, 4)}, r"file\.pth lacks 12 arrays of the network, such as encoder\.1\.norm1\.weight; .* as deep"),
        ({"patch": 8}, r"input_adapters\.rgb\.proj\.weight of shape \[32, 3, 8, 8\], the network \[32, 3, 16, 16\]; choose the patch"),
        ({"global_tokens": 2}, r"global_tokens of shape \[1, 2, 32\], the network \[1, 1, 32\]; .* number of global tokens"),
        (
            {"modalities": (RGB, semantic(40, embedding=8))},
            r"semseg\.class_emb\.weight of shape \[40, 8\], the network \[10, 8\]; choose 40 classes",
        ),
        ({"modalities": (RGB, semantic(10, embedding=8, interpolated=True))}, r"lacks 2 arrays .*semseg\.proj\.weight; .* same adapters"),
        ({"decoder": DecoderSize(32, 1, 4)}, r"output_adapters\.rgb\.mask_token of .*; choose decoders of the size"),
    ],
    ids=["width", "deeper", "shallower", "patch", "global tokens", "classes", "interpolated", "decoders"],
)
def test_a_checkpoint_of_another_size_is_refused_and_changes_nothing(other, message, tmp_path):
    model = autoencoder(0)
    before = copied(model)
    published(copied(autoencoder(1, **other)), tmp_path / "file.pth")
    with pytest.raises(ExperimentError, match=message):
        initialized_from(model, tmp_path / "file.pth", decoders=True)
    assert same(copied(model), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("encoder.1.attn.qkv.bias"), r"lacks 1 arrays of the network, such as encoder\.1\.attn\.qkv\.bias"),
        (lambda state: state.update({"encoder.0.ls1.gamma": torch.ones(32)}), r"no place for, such as encoder\.0\.ls1\.gamma"),
        (lambda state: state.update({"norm_pre.weight": torch.ones(32)}), r"no place for, such as norm_pre\.weight"),
        (lambda state: state["encoder.0.mlp.fc1.bias"].fill_(torch.nan), r"encoder\.0\.mlp\.fc1\.bias with values that are not finite"),
    ],
    ids=["bias lost", "layer scale", "normalized before", "NaN"],
)
def test_an_encoder_is_never_loaded_in_part(change, message, tmp_path):
    model, given = trunk(0), copied(trunk(1))
    before = copied(model)
    change(given)
    with pytest.raises(ExperimentError, match=message):
        initialized_from(model, published(given, tmp_path / "file.pth"))
    assert same(copied(model), before)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"model": copied(trunk(0)), "hook": partial(print, "boo")}, tmp_path / "file.pth")
    with pytest.raises(ExperimentError, match="which loading would run"):
        initialized_from(trunk(0), tmp_path / "file.pth")


def test_a_file_cut_short_is_refused(tmp_path):
    path = published(copied(trunk(0)), tmp_path / "file.pth")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ExperimentError, match=r"file\.pth cannot be read .*; get it anew"):
        initialized_from(trunk(0), path)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "file.pth")
    with pytest.raises(ExperimentError, match=r"file\.pth holds conv1\.weight, .* neither MultiMAE's names"):
        initialized_from(trunk(0), tmp_path / "file.pth")


# ---- timm's layout --------------------------------------------------------------------------------------------------


@torch.no_grad()
def after_blocks(model, images):
    """What timm's vision transformer makes of images, before its last normalization: patches first, class token last."""
    tokens = model.blocks(model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images)))))
    return torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1)


@torch.no_grad()
def encoded(model, images):
    return model.encoded(model.tokens({"rgb": images})["rgb"])


def test_timms_vision_transformer_computes_the_same_as_a_trunk(tmp_path):
    model, other = trunk(1, (RGB,)), vit()
    report = initialized_from(model, published(other.state_dict(), tmp_path / "file.pth"))
    images = torch.rand(2, 3, 64, 64, generator=generator(0))
    assert torch.allclose(encoded(model, images), after_blocks(other, images), rtol=1e-4, atol=1e-5)
    assert report.layout == "timm" and not report.fit.missing
    assert set(report.fit.unexpected) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_timm_takes_an_exported_trunk_and_computes_the_same():
    model, other = trunk(1), vit()
    exported = to_timm(model.state_dict())
    keys = other.load_state_dict(exported.state, strict=False)
    assert set(keys.missing_keys) == {"norm.weight", "norm.bias", "head.weight", "head.bias"} and not keys.unexpected_keys
    images = torch.rand(2, 3, 64, 64, generator=generator(0))
    assert torch.allclose(after_blocks(other, images), encoded(model, images), rtol=1e-4, atol=1e-5)
    assert {name.split(".")[1] for name in exported.dropped} == {"depth", "semseg"}


def test_there_and_back_is_where_it_began():
    state = trunk(0, (RGB,)).state_dict()
    assert same(from_timm(to_timm(state).state).state, state)
    back = {name: tensor for name, tensor in vit().state_dict().items() if not name.startswith(("norm.", "head."))}
    again = to_timm(from_timm(back).state).state
    assert torch.equal(again["cls_token"] + again["pos_embed"][:, :1], back["cls_token"] + back["pos_embed"][:, :1])
    rest = lambda state: {name: tensor for name, tensor in state.items() if name not in ("cls_token", "pos_embed")}  # noqa: E731
    assert same(rest(again), rest(back)) and torch.equal(again["pos_embed"][:, 1:], back["pos_embed"][:, 1:])


def test_maes_decoder_is_dropped_and_told(tmp_path):
    state = {name: tensor for name, tensor in vit().state_dict().items() if not name.startswith("head.")}
    mae = state | {
        "mask_token": torch.ones(1, 1, 16),
        "decoder_embed.weight": torch.ones(16, 32),
        "decoder_pos_embed": torch.ones(1, 17, 16),
    }
    report = initialized_from(trunk(0, (RGB,)), published(mae, tmp_path / "mae.pth"))
    assert set(report.fit.unexpected) == {"mask_token", "decoder_embed.weight", "decoder_pos_embed", "norm.weight", "norm.bias"}


def test_of_a_timm_checkpoint_other_modalities_begin_anew(tmp_path):
    model = autoencoder(0)
    report = initialized_from(model, published(vit().state_dict(), tmp_path / "file.pth"), decoders=True)
    assert (report.modalities, report.new) == (("rgb",), ("depth", "semseg"))
    assert report.new_outputs == ("rgb", "depth", "semseg", "norm_rgb")


def test_a_vision_transformer_without_a_class_token_brings_no_global_token(tmp_path):
    model = trunk(0, (RGB,))
    before = model.global_tokens.detach().clone()
    report = initialized_from(model, published(vit(class_token=False, global_pool="avg").state_dict(), tmp_path / "file.pth"))
    assert torch.equal(model.global_tokens, before) and report.fit.missing == ("global_tokens",)


def test_positions_of_a_rectangle_need_its_sides():
    state = {"cls_token": torch.ones(1, 1, 8), "pos_embed": torch.arange(1.0, 8).view(1, 7, 1).expand(1, 7, 8)}
    with pytest.raises(ExperimentError, match=r"has 7 positions, not those of a square"):
        from_timm(state)
    found = from_timm(state, (2, 3)).state
    assert found["input_adapters.rgb.pos_emb"][0, 0].tolist() == [[2, 3, 4], [5, 6, 7]]
    assert found["global_tokens"].flatten().tolist() == [2.0] * 8


@pytest.mark.parametrize(
    ("modalities", "tokens", "message"),
    [
        ((DEPTH_MAP,), 1, "no positions of rgb, which timm's layout needs"),
        ((RGB,), 2, "2 global tokens, timm's layout has one class token"),
    ],
)
def test_what_timm_cannot_hold_is_refused(modalities, tokens, message):
    with pytest.raises(ExperimentError, match=message):
        to_timm(autoencoder(0, modalities, global_tokens=tokens).state_dict())


def test_other_vision_transformers_are_refused(tmp_path):
    file = published(vit(init_values=1e-5).state_dict(), tmp_path / "file.pth")
    with pytest.raises(ExperimentError, match=r"no place for, such as encoder\.0\.ls1\.gamma"):
        initialized_from(trunk(0, (RGB,)), file)
    with pytest.raises(ExperimentError, match="has no pos_embed"):
        from_timm({"blocks.0.norm1.weight": torch.ones(3)})


def test_the_layout_is_recognized():
    assert layout_of(trunk(0).state_dict()) == "multimae"
    assert layout_of(vit().state_dict()) == "timm"
