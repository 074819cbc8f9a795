"""A run's model as a file that others read."""

import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from benchmarks import run
from benchmarks.export import export
from benchmarks.runs import Run
from fedvision.checkpoints import Fit, read
from fedvision.errors import RunError
from fedvision.seeds import generator, global_generators
from server.folder import RunFolder

LIGHT = {
    "rounds": 1, "tensorboard": False, "strategy.steps": 2, "data.examples": 32, "data.test_examples": 4,
    "learner.width": 16, "learner.depth": 2, "learner.heads": 2, "learner.decoder_width": 16, "learner.decoder_heads": 2,
}  # fmt: skip


def vit():
    """The vision transformer of timm that the runs' encoder is."""
    with global_generators(generator(0)):
        return VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The folder of a short run of pre-training."""
    return run("multimae-tiny", LIGHT, out=tmp_path_factory.mktemp("runs") / "pretrained", draw=False).path


@pytest.fixture
def model(pretrained):
    done = Run.open(pretrained)
    return done.rebuilt().loaded(done.state)


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_in_multimaes_layout_it_is_whole_and_has_its_positions(pretrained, model, tmp_path, ending):
    out = tmp_path / "folder" / f"weights.{ending}"
    assert not export(pretrained, out).dropped
    assert Fit.of(read(out), model)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in read(out).items())
    if ending == "pth":
        assert list(torch.load(out, weights_only=True)) == ["model"]


def test_in_timms_layout_timm_takes_it_and_computes_the_same(pretrained, model, tmp_path):
    written = export(pretrained, tmp_path / "vit.safetensors", "timm")
    other = vit().eval()
    keys = other.load_state_dict(load_file(tmp_path / "vit.safetensors"), strict=False)
    assert set(keys.missing_keys) == {"norm.weight", "norm.bias", "head.weight", "head.bias"} and not keys.unexpected_keys
    images = torch.rand(2, 3, 32, 32, generator=generator(0))
    with torch.no_grad():
        tokens = model.encoded(model.tokens({"rgb": images})["rgb"])
        features = other.forward_features(images)
        expected = other.norm(torch.cat([tokens[:, -1:], tokens[:, :-1]], dim=1))
    assert torch.allclose(features, expected, rtol=1e-4, atol=1e-5)
    assert any("depth" in name for name in written.dropped)


def test_timms_own_loader_reads_the_file(pretrained, tmp_path):
    export(pretrained, tmp_path / "vit.pth", "timm")
    other = vit()
    timm.models.load_checkpoint(other, tmp_path / "vit.pth", strict=False)
    assert torch.equal(other.cls_token, Run.open(pretrained).state["global_tokens"])


@pytest.mark.parametrize("layout", ["multimae", "timm"])
def test_what_was_exported_is_a_checkpoint_for_a_run(pretrained, model, tmp_path, layout):
    export(pretrained, tmp_path / "weights.safetensors", layout)
    further = run(
        "multimae-tiny",
        LIGHT | {"rounds": 0, "learner.checkpoint": str(tmp_path / "weights.safetensors")},
        out=tmp_path / "run",
        draw=False,
    )
    for name, tensor in further.state.items():
        taken = layout == "multimae" or name.startswith(("encoder.", "global_tokens", "input_adapters.rgb."))
        assert torch.equal(tensor, model.state_dict()[name]) or not taken, name


def test_the_model_of_a_run_on_others_positions_has_them(pretrained, tmp_path):
    state = read(RunFolder(pretrained).model)
    positions = {"input_adapters.rgb.pos_emb": torch.rand(1, 16, 4, 4, generator=generator(0))}
    save_file(state | positions, tmp_path / "learned.safetensors")
    settings = LIGHT | {"rounds": 0, "learner.checkpoint": str(tmp_path / "learned.safetensors")}
    export(run("multimae-tiny", settings, out=tmp_path / "run", draw=False).path, tmp_path / "out.safetensors")
    assert torch.equal(read(tmp_path / "out.safetensors")["input_adapters.rgb.pos_emb"], positions["input_adapters.rgb.pos_emb"])


def test_the_command_tells_what_is_left_out(pretrained, fedvision, here):
    ended = fedvision("export", pretrained, "--layout", "timm", "--out", "vit.safetensors")
    assert (ended.status, ended.err) == (0, "")
    assert "28 arrays in timm's layout: vit.safetensors" in ended.out
    assert "without input_adapters.depth, input_adapters.semseg, output_adapters.depth" in ended.out
    again = fedvision("export", pretrained, "--out", "vit.safetensors")
    assert again.status == 1 and "vit.safetensors is there already; choose another name" in again.err


def test_of_an_unfinished_run_the_checkpoint_is_written(pretrained, tmp_path):
    folder = RunFolder(shutil.copytree(pretrained, tmp_path / "stopped"))
    folder.write_manifest(folder.read_manifest() | {"status": "interrupted"})
    folder.model.unlink()
    export(folder.path, tmp_path / "out.safetensors")
    assert torch.equal(read(tmp_path / "out.safetensors")["global_tokens"], Run.open(pretrained).state["global_tokens"])
    folder.checkpoint.unlink()
    with pytest.raises(RunError, match="has no model yet, neither a final one nor a checkpoint"):
        export(folder.path, tmp_path / "other.safetensors")


def test_other_learners_models_and_other_endings_are_refused(pretrained, here, tmp_path):
    done = run("mine.toml", out="out", draw=False)
    with pytest.raises(RunError, match="learner classifier has no model that other programs know by its names"):
        export(done.path, tmp_path / "out.safetensors")
    with pytest.raises(RunError, match=r"ends in \.onnx; choose a name that ends in"):
        export(pretrained, tmp_path / "out.onnx")
    with pytest.raises(RunError, match="holds no run"):
        export(tmp_path / "nothing", tmp_path / "out.pth")
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".safetensors", ".onnx", ".pth")]


# ---- ALBEF ----------------------------------------------------------------------------------------------------------

SHORT = {
    "rounds": 1, "tensorboard": False, "strategy.steps": 2, "strategy.batch_size": 8, "data.examples": 32, "data.test_examples": 8,
    "learner.queue": 16, "learner.features": 16, "learner.reranked": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """The folder of a short run of ALBEF."""
    return run("albef-tiny", SHORT, out=tmp_path_factory.mktemp("runs") / "aligned", draw=False).path


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_albefs_model_is_written_whole_and_its_copies_are_where_the_parts_are(aligned, fedvision, here, ending):
    ended = fedvision("export", aligned, "--out", f"weights.{ending}")
    assert (ended.status, ended.err) == (0, "") and f"arrays in albef's layout: weights.{ending}" in ended.out
    done = Run.open(aligned)
    model, written = done.rebuilt().loaded(done.state), read(here / f"weights.{ending}")
    assert Fit.of(written, model)
    assert all(torch.equal(tensor, written[name]) for name, tensor in done.state.items())
    assert torch.equal(written["text_encoder.bert.embeddings.position_ids"], torch.arange(64)[None])
    for name, tensor in written.items():
        assert "_m." not in name or torch.equal(tensor, written[name.replace("_m.", ".")]), name
    if ending == "pth":
        assert list(torch.load(here / "weights.pth", weights_only=True)) == ["model"]


@pytest.mark.parametrize("file", ["exported", "its own"])
def test_a_run_begins_with_what_a_run_has_left(aligned, tmp_path, file):
    path = RunFolder(aligned).model
    if file == "exported":
        path = tmp_path / "weights.pth"
        export(aligned, path)
    further = run("albef-tiny", SHORT | {"rounds": 0, "learner.checkpoint": str(path)}, out=tmp_path / "run", draw=False)
    assert further.state.keys() == Run.open(aligned).state.keys()
    assert all(torch.equal(tensor, further.state[name]) for name, tensor in Run.open(aligned).state.items())


def test_albefs_image_encoder_is_a_vision_transformer_of_timm(aligned, tmp_path):
    written = export(aligned, tmp_path / "vit.pth", "timm")
    with global_generators(generator(0)):
        other = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=3).eval()
    keys = other.load_state_dict(torch.load(tmp_path / "vit.pth", weights_only=True)["model"], strict=False)
    assert set(keys.missing_keys) == {"head.weight", "head.bias"} and not keys.unexpected_keys
    done = Run.open(aligned)
    model, images = done.rebuilt().loaded(done.state), torch.rand(2, 3, 32, 32, generator=generator(0))
    with torch.no_grad():
        assert torch.allclose(other.forward_features(images), model.visual_encoder(images), rtol=1e-4, atol=1e-5)
    assert "itm_head.weight" in written.dropped


def test_encoders_begin_with_a_vision_transformer_and_a_bert_of_their_own(aligned, tmp_path):
    export(aligned, tmp_path / "vit.safetensors", "timm")
    state = Run.open(aligned).state
    words = {name.removeprefix("text_encoder."): tensor for name, tensor in state.items() if name.startswith("text_encoder.")}
    save_file({name: tensor for name, tensor in words.items() if ".crossattention." not in name}, tmp_path / "bert.safetensors")
    files = {"learner.vision_checkpoint": "vit.safetensors", "learner.text_checkpoint": "bert.safetensors"}
    settings = SHORT | {"rounds": 0} | {name: str(tmp_path / file) for name, file in files.items()}
    further = run("albef-tiny", settings, out=tmp_path / "run", draw=False)
    built = {name for name in state if ".crossattention." in name or not name.startswith(("visual_encoder.", "text_encoder."))}
    assert all(torch.equal(further.state[name], state[name]) for name in state.keys() - built)
    assert not any(torch.equal(further.state[name], state[name]) for name in built if name.endswith("weight") and state[name].ndim > 1)


def test_a_layout_of_another_paper_is_refused(aligned, pretrained, tmp_path):
    with pytest.raises(RunError, match="the model of learner albef has no layout multimae; choose albef or timm"):
        export(aligned, tmp_path / "out.pth", "multimae")
    with pytest.raises(RunError, match="the model of learner multimae has no layout albef; choose multimae or timm"):
        export(pretrained, tmp_path / "out.pth", "albef")


# ---- Leopart --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The folder of a short run of Leopart."""
    short = {"rounds": 1, "tensorboard": False, "strategy.steps": 2, "strategy.batch_size": 4, "data.examples": 16, "data.test_examples": 4}
    return run("leopart-tiny", short, out=tmp_path_factory.mktemp("runs") / "parts", draw=False).path


def test_leoparts_network_and_teacher_are_written_without_what_is_remembered(parts, fedvision, here):
    ended = fedvision("export", parts, "--out", "weights.safetensors", "--layout", "leopart")
    assert (ended.status, ended.err) == (0, "") and "arrays in leopart's layout: weights.safetensors" in ended.out
    written, state = load_file(here / "weights.safetensors"), Run.open(parts).state
    assert {name.split(".")[0] for name in written} == {"model", "teacher"}
    for name, tensor in written.items():
        assert torch.equal(tensor, state[name.replace("teacher.", "model.")]), name
    assert export(parts, here / "again.pth").dropped == ("queue", "uniform_steps")


def test_leoparts_transformer_is_timms(parts, tmp_path):
    written = export(parts, tmp_path / "vit.pth", "timm")
    with global_generators(generator(0)):
        other = VisionTransformer(img_size=64, patch_size=8, embed_dim=64, depth=3, num_heads=4, num_classes=0).eval()
    other.load_state_dict(written.state)
    assert "model.prototypes.weight" in written.dropped and "teacher.norm.weight" in written.dropped


@pytest.mark.parametrize("file", ["exported", "its own", "as timm has it"])
def test_a_run_of_leopart_begins_with_what_another_has_left(parts, tmp_path, file):
    path = RunFolder(parts).model
    if file != "its own":
        path = tmp_path / "weights.pth"
        export(parts, path, "timm" if file == "as timm has it" else None)
    short = {"rounds": 0, "tensorboard": False, "data.examples": 16, "data.test_examples": 4, "learner.checkpoint": str(path)}
    further = run("leopart-tiny", short, out=tmp_path / "run", draw=False).state
    for name, tensor in Run.open(parts).state.items():
        head = name.startswith(("model.projection_head", "model.prototypes"))
        assert torch.equal(tensor, further[name]) or (head and file == "as timm has it"), name
