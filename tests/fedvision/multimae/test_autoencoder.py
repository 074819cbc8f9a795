"""The network of pre-training against the reference's arrays and against what must hold of any such network."""

import json

import pytest
import torch

from fedvision.errors import DataError, ExperimentError
from fedvision.multimae.adapters import ClassAdapter
from fedvision.multimae.decoders import DecoderSize
from fedvision.multimae.losses import absolute_errors, class_errors, masked_loss, spread, squared_errors, standardized_patches
from fedvision.multimae.masking import masks_of
from fedvision.multimae.modalities import DEPTH_MAP, RGB, Modality, semantic
from fedvision.multimae.model import NORM_RGB, SIZES, Autoencoder, Size, spans_of
from fedvision.multimae.transformer import initialized


def close(found, expected, atol=2e-5):
    return torch.allclose(found, expected, rtol=1e-4, atol=atol)


def losses_of(model, inputs, visible):
    predictions, spans = model(inputs, visible), spans_of(model.tokens(inputs))
    masks = {name: spread(masked, (4, 4), 4 if name == "semseg" else 16) for name, masked in masks_of(visible, spans).items()}
    return {
        "rgb": masked_loss(squared_errors(predictions["rgb"], inputs["rgb"]), masks["rgb"]),
        "depth": masked_loss(absolute_errors(predictions["depth"], inputs["depth"]), masks["depth"]),
        "semseg": masked_loss(class_errors(predictions["semseg"], inputs["semseg"]), masks["semseg"]),
        "norm_rgb": masked_loss(squared_errors(predictions["norm_rgb"], standardized_patches(inputs["rgb"], 16)), masks["rgb"]),
    }


@pytest.fixture
def reference(autoencoder, group):
    autoencoder.load_state_dict(group("pre/sd/"))
    return autoencoder


@pytest.mark.golden
def test_every_stage_is_the_references(reference, arrays, pictures):
    tokens = reference.tokens(pictures)
    for name, found in tokens.items():
        assert close(found, arrays[f"pre/tokens_{name}"])
    visible = arrays["mask/ids_keep"]
    together = torch.cat(list(tokens.values()), dim=1).gather(1, visible[..., None].expand(-1, -1, 32))
    first, last = reference.tapped(together, [0, 1])
    assert close(reference._begun(together), arrays["pre/encoder_input"])
    assert close(first, arrays["pre/encoder_block0"])
    assert close(last, arrays["pre/encoder_output"])
    for name, decoder in reference.output_adapters.items():
        queries, context = decoder.looking(last, visible, spans_of(tokens), (4, 4))
        assert close(decoder.query_norm(queries), arrays[f"pre/q_{name}"])
        assert close(decoder.context_norm(context), arrays[f"pre/ctx_{name}"])
    for name, found in reference(pictures, visible).items():
        assert close(found, arrays[f"pre/pred_{name}"])


@pytest.mark.golden
def test_losses_and_gradients_are_the_references(reference, arrays, group, pictures):
    found = losses_of(reference, pictures, arrays["mask/ids_keep"])
    for name, loss in found.items():
        assert loss.item() == pytest.approx(arrays[f"pre/loss_{name}"].item(), rel=1e-4)
    total = sum(found.values())
    assert total.item() == pytest.approx(arrays["pre/loss_total"].item(), rel=1e-4)
    total.backward()
    params = dict(reference.named_parameters())
    for name, gradient in group("pre/grad/").items():
        assert torch.allclose(params[name].grad, gradient, rtol=1e-3, atol=1e-4), name
    norm = sum(param.grad.double().square().sum() for param in params.values() if param.grad is not None).sqrt()
    assert norm.item() == pytest.approx(arrays["pre/grad_global_l2"].item(), rel=1e-4)


@pytest.mark.golden
def test_losses_over_all_pixels_are_the_references(reference, arrays, pictures):
    predictions = {name: arrays[f"pre/pred_{name}"] for name in ("rgb", "depth", "semseg", "norm_rgb")}
    errors = {
        "rgb": squared_errors(predictions["rgb"], pictures["rgb"]),
        "depth": absolute_errors(predictions["depth"], pictures["depth"]),
        "semseg": class_errors(predictions["semseg"], pictures["semseg"]),
        "norm_rgb": squared_errors(predictions["norm_rgb"], standardized_patches(pictures["rgb"], 16)),
    }
    for name, error in errors.items():
        everywhere = torch.ones_like(error, dtype=torch.bool)
        assert masked_loss(error, everywhere).item() == pytest.approx(arrays[f"pre/loss_unmasked_{name}"].item(), rel=1e-4)


@pytest.mark.golden
def test_shrunk_class_embeddings_are_the_references(arrays, group):
    adapter = ClassAdapter(semantic(10, embedding=8, interpolated=True), 16, 32, (4, 4))
    adapter.load_state_dict(group("sem_interp/sd/"))
    assert close(adapter(arrays["in/semseg"]), arrays["sem_interp/tokens"])


@pytest.mark.golden
def test_names_and_shapes_are_those_of_the_published_checkpoint(golden):
    model = paper_size("base")
    expected = json.loads((golden / "multimae_full_keys.json").read_text())
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == expected


def paper_size(name):
    with torch.device("meta"):
        modalities = [RGB, DEPTH_MAP, semantic(133)]
        return Autoencoder(modalities, modalities, SIZES[name], DecoderSize(), 16, (14, 14))


def counted(model, trained=True):
    return sum(param.numel() for param in model.parameters() if param.requires_grad or not trained)


@pytest.mark.parametrize(("size", "all_of_them", "trained"), [("base", 98_569_360, 97_917_072), ("large", 316_762_256, 315_959_440)])
def test_numbers_of_parameters_are_the_papers(size, all_of_them, trained):
    model = paper_size(size)
    assert counted(model, trained=False) == all_of_them
    assert counted(model) == trained


def test_numbers_of_parameters_of_each_part_are_the_papers():
    model = paper_size("base")
    assert counted(model.encoder) == 85_054_464
    assert {name: counted(adapter) for name, adapter in model.input_adapters.items()} == {
        "rgb": 590_592,
        "depth": 197_376,
        "semseg": 795_712,
    }
    assert {name: counted(decoder) for name, decoder in model.output_adapters.items()} == {
        "rgb": 2_765_056,
        "depth": 2_633_472,
        "semseg": 3_114_576,
        "norm_rgb": 2_765_056,
    }
    assert model.global_tokens.numel() == 768


def inputs(n=2, side=64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {
        "rgb": torch.randn(n, 3, side, side, generator=rng),
        "depth": torch.randn(n, 1, side, side, generator=rng),
        "semseg": torch.randint(10, (n, side // 4, side // 4), generator=rng),
    }


def some_visible(n=2, k=8, total=48):
    return torch.stack([torch.randperm(total, generator=torch.Generator().manual_seed(i))[:k] for i in range(n)])


def test_what_is_masked_is_not_looked_at(autoencoder):
    given, visible = inputs(), some_visible()
    before = autoencoder(given, visible)
    masked = masks_of(visible, spans_of(autoencoder.tokens(given)))
    changed = given | {"rgb": torch.where(spread(masked["rgb"], (4, 4), 16)[:, None], 7.0, given["rgb"])}
    after = autoencoder(changed, visible)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_visible_is_looked_at_by_every_decoder(autoencoder):
    given, visible = inputs(), some_visible()
    before = autoencoder(given, visible)
    after = autoencoder({name: values + 1 if name == "rgb" else values for name, values in given.items()}, visible)
    assert not any(torch.allclose(before[name], after[name]) for name in before)


def test_the_order_of_visible_patches_does_not_matter(autoencoder):
    given, visible = inputs(), some_visible()
    before, after = autoencoder(given, visible), autoencoder(given, visible.flip(1))
    assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)


def test_a_modality_that_is_not_given_is_as_one_of_which_nothing_is_visible(autoencoder):
    given = inputs()
    alone = autoencoder({"rgb": given["rgb"]})
    masked = autoencoder(given, torch.arange(16).expand(2, -1))
    assert all(torch.allclose(alone[name], masked[name], atol=1e-5) for name in alone)


def test_an_example_does_not_depend_on_the_others_of_its_batch(autoencoder):
    given, visible = inputs(3), some_visible(3)
    together = autoencoder(given, visible)
    alone = autoencoder({name: values[1:2] for name, values in given.items()}, visible[1:2])
    assert all(torch.allclose(together[name][1:2], alone[name], atol=1e-5) for name in together)


def test_only_the_decoders_that_are_asked_for_answer(autoencoder):
    assert list(autoencoder(inputs(), some_visible(), ["depth"])) == ["depth"]


def test_predictions_have_the_size_of_inputs_of_any_size(autoencoder):
    given = {"rgb": torch.randn(1, 3, 64, 96), "semseg": torch.randint(10, (1, 16, 24))}
    shapes = {name: tuple(found.shape) for name, found in autoencoder(given).items()}
    assert shapes == {"rgb": (1, 3, 64, 96), "depth": (1, 1, 64, 96), "semseg": (1, 10, 16, 24), "norm_rgb": (1, 3, 64, 96)}


def test_nothing_known_is_the_mean(autoencoder):
    given = inputs()
    unknown = {"depth": torch.full_like(given["depth"], torch.nan)}
    found, zero = autoencoder(unknown), autoencoder({"depth": torch.zeros_like(given["depth"])})
    assert all(torch.equal(found[name], zero[name]) for name in found)


def test_unknown_classes_have_no_embedding_without_padding_and_the_paddings_with():
    plain, padded = (ClassAdapter(semantic(3, embedding=8, padded=padded), 16, 32, (2, 2)) for padded in (False, True))
    ids = torch.full((1, 8, 8), 255)
    with torch.no_grad():
        plain.class_emb.weight.fill_(5.0)
        padded.class_emb.weight[3] = 0.0
        padded.proj.load_state_dict(plain.proj.state_dict())
    assert torch.equal(plain(ids), padded(ids))
    with torch.no_grad():
        padded.class_emb.weight[3] = 1.0
    assert not torch.allclose(plain(ids), padded(ids))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"rgb": torch.zeros(1, 3, 60, 64)}, "rgb is 60 x 64, which patches of 16 x 16 values do not fill"),
        ({"rgb": torch.zeros(1, 3, 64, 64), "depth": torch.zeros(1, 1, 32, 32)}, "rgb 4 x 4, depth 2 x 2; give maps of the picture's size"),
        ({"thermal": torch.zeros(1, 1, 64, 64)}, "no modality 'thermal', only rgb, depth, semseg"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(autoencoder, given, reason):
    with pytest.raises(DataError, match=reason):
        autoencoder(given)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ExperimentError, match="3 heads and a width of 32"):
        Size(32, 2, 3)
    with pytest.raises(ExperimentError, match="patches of 6 pixels cannot hold values of 4"):
        semantic(5).cell(6)
    with pytest.raises(ExperimentError, match="'classes' and 'cross-entropy' go together"):
        Modality(name="edges", field="edges", channels=2, kind="classes", loss="l1")


def test_weights_begin_as_published():
    modalities = [RGB, DEPTH_MAP, semantic(50)]
    model = Autoencoder(modalities, modalities, Size(128, 2, 4), DecoderSize(64, 1, 4), 16, (4, 4))
    initialized(model, torch.Generator().manual_seed(0))
    state = model.state_dict()

    def bounded(name, inputs, outputs):
        bound = (6 / (inputs + outputs)) ** 0.5
        largest = state[name].abs().max().item()
        return 0.98 * bound < largest <= bound

    assert bounded("encoder.0.attn.qkv.weight", 128, 128)  # each of the three by itself
    assert bounded("encoder.0.mlp.fc1.weight", 128, 512)
    assert bounded("output_adapters.rgb.decoder.kv.weight", 64, 64)
    assert bounded("input_adapters.rgb.proj.weight", 3 * 16 * 16, 128)
    assert bounded("output_adapters.rgb.out_proj.weight", 64, 768)
    assert not state["output_adapters.rgb.out_proj.bias"].any()
    assert not state["output_adapters.depth.mask_token"].any()
    for name in ("input_adapters.semseg.class_emb.weight", "global_tokens", "output_adapters.rgb.task_embeddings.depth"):
        assert 0.01 < state[name].std().item() < 0.03, name
    assert {name for name, param in model.named_parameters() if not param.requires_grad} == {n for n in state if n.endswith("pos_emb")}


def test_the_decoder_of_standardized_patches_is_one_of_rgb(autoencoder):
    assert autoencoder.output_adapters[NORM_RGB].name == "rgb"
    without = Autoencoder([RGB], [DEPTH_MAP], Size(32, 1, 4), DecoderSize(16, 1, 4), 16, (2, 2))
    assert list(without.output_adapters) == ["depth"]


def test_attention_is_torchs_own_and_computed_nowhere_else(autoencoder, monkeypatch):
    calls = []
    computed = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **more: calls.append(1) or computed(*args, **more)
    )
    autoencoder(inputs(), some_visible())
    blocks, decoders, after_cross_attention = 2, 4, 2
    assert len(calls) == blocks + decoders * (1 + after_cross_attention)
