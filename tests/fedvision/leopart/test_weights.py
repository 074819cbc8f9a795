import pytest
import torch
from safetensors.torch import save_file

from fedvision.data.federated import Spec
from fedvision.errors import ExperimentError
from fedvision.learners.leopart import LeopartLearner
from fedvision.learners.multimae import MultiMAE
from fedvision.leopart.vision import scaled_positions
from fedvision.leopart.weights import initialized_from, to_leopart, to_timm
from fedvision.multimae.positions import sincos
from fedvision.seeds import generator

SPEC = Spec((3, 32, 32), 2)


def built(purpose="model", **settings):
    return LeopartLearner(**({"patch": 8} | settings)).build(SPEC, generator(0, purpose))


def transformer(model):
    return {name: tensor.clone() for name, tensor in to_timm(model.state_dict()).state.items()}


def same(state, module, names=None):
    own = module.state_dict()
    return all(torch.equal(state[name], own[name]) for name in (names or state))


def test_dinos_full_checkpoint_gives_both_networks_its_teachers_backbone(tmp_path):
    other = transformer(built("other"))
    student = {f"module.backbone.{name}": tensor + 1 for name, tensor in other.items()}
    teacher = {f"backbone.{name}": tensor for name, tensor in other.items()} | {"head.mlp.0.weight": torch.ones(3, 3)}
    torch.save({"student": student, "teacher": teacher, "epoch": 3}, tmp_path / "dino.pth")
    model = built(teacher_head="random")
    heads = [module.projection_head[0].weight.clone() for module in (model.model, model.teacher)]
    report = initialized_from(model, tmp_path / "dino.pth")
    assert report.layout == "DINO" and report.found == ("transformer", "norm") and report.new == ("projection_head", "prototypes")
    assert report.fit.unexpected == ("head.mlp.0.weight",)
    assert same(other, model.model) and same(other, model.teacher)
    assert torch.equal(model.model.projection_head[0].weight, heads[0]) and torch.equal(model.teacher.projection_head[0].weight, heads[1])


def test_timms_transformer_is_taken_without_its_classifier_and_with_other_positions(tmp_path):
    import timm

    theirs = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5, depth=3, embed_dim=64, num_heads=4, patch_size=8)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    model = built()
    report = initialized_from(model, tmp_path / "timm.pth")
    assert report.layout == "timm" and report.resized == ("pos_embed",)
    assert torch.equal(model.model.blocks[2].mlp.fc2.weight, theirs.blocks[2].mlp.fc2.weight)
    assert torch.allclose(model.model.pos_embed, scaled_positions(theirs.pos_embed, 4, 4))


def test_albefs_image_encoder_is_taken_and_not_its_copy(tmp_path):
    one, copy = (transformer(built(purpose)) for purpose in ("other", "copy"))
    named = {f"visual_encoder_m.{name}": tensor for name, tensor in copy.items()}
    named |= {f"visual_encoder.{name}": tensor for name, tensor in one.items()} | {"text_proj.weight": torch.ones(2, 2)}
    save_file(named, tmp_path / "model.safetensors")
    model = built()
    report = initialized_from(model, tmp_path / "model.safetensors")
    assert same(one, model.model) and same(one, model.teacher) and report.found == ("transformer", "norm")
    assert "text_proj.weight" in report.fit.unexpected


@pytest.mark.parametrize("positions", ["kept", "left out"])
def test_what_masked_pictures_have_taught_is_taken(tmp_path, positions):
    learner = MultiMAE(patch=8, inputs=("rgb",), outputs=("rgb",), decoder_heads=4, decoder_width=48)
    other = learner.build(SPEC, generator(0, "other"))
    state = other.state_dict() if positions == "kept" else {n: t for n, t in other.state_dict().items() if not n.endswith("pos_emb")}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    model = built()
    norm = model.model.norm.weight.clone()
    report = initialized_from(model, tmp_path / "model.safetensors")
    assert report.layout == "MultiMAE" and report.found == ("transformer",) and report.new == ("norm", "projection_head", "prototypes")
    assert torch.equal(model.model.blocks[1].attn.qkv.weight, other.encoder[1].attn.qkv.weight)
    assert torch.equal(model.model.pos_embed[:, 1:], sincos(4, 4, 64).flatten(2).mT) and torch.equal(model.model.norm.weight, norm)


def test_what_is_exported_is_read_again_and_goes_into_timm(tmp_path):
    import timm

    model = built("other")
    with torch.no_grad():
        model.teacher.norm.weight += 1
    save_file(to_leopart(model.state_dict()).state, tmp_path / "leopart.safetensors")
    begun = built()
    report = initialized_from(begun, tmp_path / "leopart.safetensors")
    assert report.layout == "leopart" and not report.new and "teacher" in report.found
    assert same(model.model.state_dict(), begun.model) and same(model.teacher.state_dict(), begun.teacher)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, depth=3, embed_dim=64, num_heads=4, patch_size=8)
    theirs.load_state_dict(transformer(model))


def test_a_teacher_in_the_file_never_overwrites_the_network(tmp_path):
    model = built("other")
    flat = {f"teacher.{name}": tensor + 1 for name, tensor in model.model.state_dict().items()}
    flat |= {f"model.{name}": tensor for name, tensor in model.model.state_dict().items()}
    torch.save({"state_dict": flat}, tmp_path / "last.ckpt")
    begun = built()
    initialized_from(begun, tmp_path / "last.ckpt")
    assert same(model.model.state_dict(), begun.model)
    assert torch.equal(begun.teacher.norm.weight, model.model.norm.weight + 1)


@pytest.mark.parametrize("begin", ["model.", "network.", ""])
def test_flat_files_are_read_whatever_their_first_word(tmp_path, begin):
    state = built("other").model.state_dict()
    torch.save({f"{begin}{name}": tensor for name, tensor in state.items()}, tmp_path / "leopart.pth")
    begun = built(teacher_head="random")
    initialized_from(begun, tmp_path / "leopart.pth")
    assert same(state, begun.model) and same(state, begun.teacher)


def test_what_does_not_fit_is_refused_and_nothing_changed(tmp_path):
    model = built()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def refused(match, change):
        state = built("other").model.state_dict()
        change(state)
        torch.save(state, tmp_path / "odd.pth")
        with pytest.raises(ExperimentError, match=match):
            initialized_from(model, tmp_path / "odd.pth")
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    refused("choose learner.prototypes = 3", lambda state: state.update({"prototypes.weight": torch.ones(3, 32)}))
    refused("learner.networks that it was made with", lambda state: state.update({"norm.weight": torch.ones(3)}))
    refused("learner.patch", lambda state: state.update({"patch_embed.proj.weight": torch.ones(64, 3, 16, 16)}))
    refused("lacks 1 arrays.*blocks.0.norm1.bias", lambda state: state.pop("blocks.0.norm1.bias"))
    refused("lacks 1 arrays.*projection_head.0.bias", lambda state: state.pop("projection_head.0.bias"))
    refused("no place for, such as blocks.7.norm1.bias", lambda state: state.update({"blocks.7.norm1.bias": torch.ones(64)}))
    refused("not finite", lambda state: state["norm.bias"].fill_(torch.nan))
    refused("12 positions are not those", lambda state: state.update({"pos_embed": torch.ones(1, 12, 64)}))
    refused("no cls_token", lambda state: state.pop("cls_token"))


def test_a_run_begins_with_the_weights_of_a_file(tmp_path):
    state = built("other").model.state_dict()
    torch.save(state, tmp_path / "weights.pth")
    begun = built(checkpoint=str(tmp_path / "weights.pth"))
    assert same(state, begun.model) and same(state, begun.teacher)
