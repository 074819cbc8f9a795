"""Published weights of ALBEF: what networks of every kind take of them, and what is told of the rest."""

import logging
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fedvision.albef.answering import Answering
from fedvision.albef.assignment import Assignment
from fedvision.albef.bert import TextSize
from fedvision.albef.judge import Entailment, PairReasoning
from fedvision.albef.model import Pretraining
from fedvision.albef.retrieval import Retrieval
from fedvision.albef.vision import VisionSize, resized_positions
from fedvision.albef.weights import initialized_from, initialized_from_text, initialized_from_vision
from fedvision.checkpoints import read
from fedvision.errors import ExperimentError
from fedvision.multimae.modalities import RGB
from fedvision.multimae.model import Size, Trunk
from fedvision.multimae.transformer import initialized
from fedvision.seeds import generator, global_generators

KINDS = ("pretrain", "retrieval", "ve", "nlvr", "nlvr_ta", "vqa")
HEADS = {"retrieval": (), "ve": ("cls_head",), "nlvr": ("cls_head",), "nlvr_ta": ("ta_head",), "vqa": ()}


@pytest.fixture
def built(vision, text):
    """Makes a network of a kind; of different seeds, no two arrays are the same, nor is a copy as what it follows."""
    paired = replace(text, layers=6, paired=True)
    kinds = {
        "pretrain": lambda rng: Pretraining(vision, text, 16, 16, rng),
        "retrieval": lambda rng: Retrieval(vision, text, 16, 16, rng),
        "ve": lambda rng: Entailment(vision, text, rng),
        "nlvr": lambda rng: PairReasoning(vision, paired, rng),
        "nlvr_ta": lambda rng: Assignment(vision, paired, 16, rng),
        "vqa": lambda rng: Answering(vision, text, rng),
    }

    def of(kind, seed=0):
        rng = generator(seed, kind)
        model = kinds[kind](rng)
        for param in model.parameters():
            param.data.add_(torch.rand(param.shape, generator=rng), alpha=0.1)
        return model

    return of


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def published(state, path):
    """A file as training code leaves it."""
    torch.save({"model": state, "optimizer": {"state": {}}, "lr_scheduler": {"t": 3}, "config": {"alpha": 0.4}, "epoch": 29}, path)
    return path


def names_of(parts, state):
    return {name for name in state if name.split(".")[0] in parts}


# ---- ALBEF's files --------------------------------------------------------------------------------------------------


@pytest.mark.golden
def test_what_retrieval_lacks_of_pre_training_and_leaves_out_is_what_the_reference_says(built, group, golden, tmp_path):
    with np.load(golden / "albef_tiny.npz") as file:
        missing, unexpected = file["ret/load_missing"].tolist(), file["ret/load_unexpected"].tolist()
    model = built("retrieval")
    report = initialized_from(model, published(group("pre/sd/"), tmp_path / "file.pth"))
    assert (list(report.fit.missing), list(report.fit.unexpected)) == (missing, unexpected)
    found, expected = copied(model), group("ret/sd/")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items() if "queue" not in name and name != "temp")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_network_takes_all_of_its_own_kind(built, tmp_path, kind, ending):
    model, given = built(kind), copied(built(kind, 1))
    if ending == "pth":
        published(given, tmp_path / "file.pth")
    else:
        save_file({name: tensor.clone() for name, tensor in given.items()}, tmp_path / "file.safetensors")
    report = initialized_from(model, tmp_path / f"file.{ending}")
    assert same(copied(model), given)
    assert report.fit and not (report.new or report.left_out or report.copied or report.resized)


def expected_of(name, given):
    """Under which name of pre-training an array of a fine-tuned network is, by the published rules, written out."""
    if name.startswith("text_encoder"):
        part, rest = name.split(".", 1)
        for layer, other in (("2", "2"), ("3", "2"), ("4", "3"), ("5", "3")) if given == "pairs" else ():
            if rest.startswith(f"encoder.layer.{layer}."):
                return f"{part}.bert.encoder.layer.{other}.{rest.split('.', 3)[3]}"
        return f"{part}.bert.{rest}"
    if name.startswith("text_decoder"):
        encoder = name.replace("text_decoder", "text_encoder")
        return encoder.replace(".layer.1.", ".layer.3.").replace(".layer.0.", ".layer.2.")
    return name


@pytest.mark.parametrize("kind", ["retrieval", "ve", "nlvr", "nlvr_ta", "vqa"])
def test_networks_of_tasks_take_what_they_have_of_pre_training(built, tmp_path, kind):
    model, given = built(kind), copied(built("pretrain", 1))
    before = copied(model)
    report = initialized_from(model, published(given, tmp_path / "file.pth"))
    heads = HEADS[kind] + tuple(f"{head}_m" for head in HEADS[kind])
    for name, tensor in copied(model).items():
        if name.split(".")[0] in heads:
            assert torch.equal(tensor, before[name.replace("_m.", ".")]), name  # as built, and its copy as it
        elif name != "idx_queue":
            assert torch.equal(tensor, given[expected_of(name, "pairs" if kind.startswith("nlvr") else "")]), name
    assert set(report.new) == {*HEADS[kind], *({"idx_queue"} if kind == "retrieval" else ())}
    assert set(report.fit.missing) == names_of((*heads, "idx_queue"), before)
    assert "itm_head" in report.found or "itm_head" in report.left_out


def test_layers_in_twos_share_keys_and_values_and_nothing_else_after_loading(built, tmp_path):
    model = built("nlvr")
    initialized_from(model, published(copied(built("pretrain", 1)), tmp_path / "file.pth"))
    first, second = (layer.crossattention.self for layer in model.text_encoder.layers[2:4])
    assert first.key.weight is second.key.weight and first.query.weight is not second.query.weight
    assert torch.equal(first.query.weight, second.query.weight)


@pytest.mark.parametrize(
    ("given", "kind", "copies"),
    [
        ("pretrain", "pretrain", ("visual_encoder_m", "vision_proj_m", "text_encoder_m", "text_proj_m")),
        ("pretrain", "vqa", ("visual_encoder_m", "text_encoder_m", "text_decoder_m")),
        ("retrieval", "retrieval", ("visual_encoder_m", "vision_proj_m", "text_encoder_m", "text_proj_m")),
        ("nlvr_ta", "nlvr", ("visual_encoder_m", "text_encoder_m", "cls_head_m")),
    ],
)
def test_of_a_stripped_file_copies_begin_at_what_they_follow(built, tmp_path, given, kind, copies):
    model, state = built(kind), copied(built(given, 1))
    stripped = {name: t for name, t in state.items() if "_m." not in name and "queue" not in name and "position_ids" not in name}
    before = copied(model)
    report = initialized_from(model, published(stripped, tmp_path / "file.pth"))
    found = copied(model)
    assert report.copied and set(report.copied) == set(copies)
    for name, tensor in found.items():
        if "_m." in name:
            assert torch.equal(tensor, found[name.replace("_m.", ".")]), name
        elif "queue" in name:
            assert torch.equal(tensor, before[name]), name
        elif name in stripped:
            assert torch.equal(tensor, stripped[name]), name
    assert {name for name in report.new if "queue" in name} == {name for name in before if "queue" in name}


def test_a_task_begins_with_the_weights_of_another(built, tmp_path):
    model, given = built("ve"), copied(built("retrieval", 1))
    report = initialized_from(model, published(given, tmp_path / "file.pth"))
    assert report.new == ("cls_head",) and report.copied == ("cls_head_m",)
    assert {"temp", "itm_head", "vision_proj", "image_queue", "idx_queue"} <= set(report.left_out)
    answering = built("vqa")
    report = initialized_from(answering, published(given, tmp_path / "file.pth"))
    assert report.new == ("text_decoder.cls",)
    other = "text_decoder.bert.encoder.layer.1.output.dense.weight"
    assert torch.equal(copied(answering)[other], given["text_encoder.encoder.layer.3.output.dense.weight"])
    back = built("pretrain", 2)
    report = initialized_from(back, published(copied(built("vqa", 3)), tmp_path / "file.pth"))
    assert "text_encoder.cls" in report.new and "text_decoder" in report.left_out
    tied = back.state_dict(keep_vars=True)
    assert tied["text_encoder.cls.predictions.decoder.weight"] is tied["text_encoder.bert.embeddings.word_embeddings.weight"]


def test_a_head_of_other_classes_begins_anew(built, tmp_path):
    model, given = built("ve"), copied(built("ve", 1))
    for name in ("cls_head.2.weight", "cls_head.2.bias", "cls_head_m.2.weight", "cls_head_m.2.bias"):
        given[name] = given[name][:2].clone()
    before = copied(model)
    report = initialized_from(model, published(given, tmp_path / "file.pth"))
    assert report.new == ("cls_head",) and set(report.left_out) == {"cls_head", "cls_head_m"}
    found = copied(model)
    assert torch.equal(found["cls_head.0.weight"], before["cls_head.0.weight"])
    assert torch.equal(found["cls_head_m.2.weight"], before["cls_head.2.weight"])


def test_queues_of_another_length_begin_anew(built, vision, text, tmp_path):
    model = Pretraining(vision, text, 16, 8, generator(0, "model"))
    before, given = copied(model), copied(built("pretrain", 1))
    report = initialized_from(model, published(given, tmp_path / "file.pth"))
    found = copied(model)
    assert set(report.new) == {"image_queue", "text_queue", "queue_ptr"} == set(report.left_out)
    assert all(torch.equal(found[name], before[name] if "queue" in name else given[name]) for name in found)


def test_a_network_without_copies_leaves_those_of_the_file(built, tmp_path):
    model, given = built("ve"), copied(built("ve", 1))
    for name in model.followed:
        delattr(model, f"{name}_m")
    report = initialized_from(model, published(given, tmp_path / "file.pth"))
    assert all(torch.equal(tensor, given[name]) for name, tensor in copied(model).items())
    assert not report.copied and {"visual_encoder_m", "text_encoder_m", "cls_head_m"} <= set(report.left_out)


def network(seed=0, queue=8, **changes):
    """A small network of pre-training."""
    text = {"vocabulary": 50, "width": 32, "heads": 4, "perceptron": 64, "layers": 4, "fusion": 2, "positions": 12, "context": 32}
    sides = {name: changes.pop(name) for name in ("side", "patch", "channels", "depth") if name in changes}
    vision = VisionSize(**{"side": 32, "patch": 8, "width": 32, "depth": 2, "heads": 4} | sides)
    features = changes.pop("features", 16)
    return Pretraining(vision, TextSize(**text | changes), features, queue, generator(seed, "model"), deviation=0.2)


def test_the_model_of_a_run_has_what_is_shared(tmp_path):
    model, given = network(), copied(network(1))
    shared = {name: t.clone() for name, t in given.items() if "_m." not in name and "queue" not in name and "position_ids" not in name}
    save_file(shared, tmp_path / "model.safetensors")
    report = initialized_from(model, tmp_path / "model.safetensors")
    assert set(report.new) == {"image_queue", "text_queue", "queue_ptr"}
    found = copied(model)
    assert all(torch.equal(found[name], tensor) for name, tensor in shared.items())
    assert torch.equal(found["text_proj_m.weight"], shared["text_proj.weight"])


def test_what_is_found_new_and_left_out_is_logged(tmp_path, caplog):
    state = {name: tensor for name, tensor in copied(network(1)).items() if not name.startswith("vision_proj")}
    with caplog.at_level(logging.INFO):
        report = initialized_from(network(), published(state | {"extra.weight": torch.ones(2)}, tmp_path / "file.pth"))
    assert f"{tmp_path / 'file.pth'} (ALBEF): found: " in caplog.text and str(report) in caplog.text
    assert "begin anew: vision_proj; left out: extra; begin as what they follow: vision_proj_m" in caplog.text


def test_positions_of_another_grid_are_interpolated(tmp_path):
    model, given = network(side=48), copied(network(1))
    report = initialized_from(model, published(given, tmp_path / "file.pth"))
    for name in ("visual_encoder.pos_embed", "visual_encoder_m.pos_embed"):
        assert torch.equal(copied(model)[name], resized_positions(given[name], 6))
    assert report.resized == ("visual_encoder.pos_embed", "visual_encoder_m.pos_embed")


@pytest.mark.golden
def test_interpolated_positions_are_those_of_the_reference(group, agree):
    given = group("posinterp/")
    agree(resized_positions(given["src"], 6), given["dst_grid6"])
    assert resized_positions(given["src"], 4) is given["src"]


def test_of_more_positions_of_words_the_first_are_taken(tmp_path):
    model, given = network(), copied(network(1, positions=20))
    report = initialized_from(model, published(given, tmp_path / "file.pth"))
    name = "text_encoder.bert.embeddings.position_embeddings.weight"
    assert torch.equal(copied(model)[name], given[name][:12]) and name in report.resized


# ---- files that do not fit ------------------------------------------------------------------------------------------

WORDS = r"text_encoder\.bert\.embeddings\.word_embeddings\.weight"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"vocabulary": 60}, rf"file\.pth has {WORDS} of shape \[60, 32\], the network \[50, 32\]; choose the vocabulary .* of 60 tokens"),
        ({"positions": 9}, r"position_embeddings\.weight of shape \[9, 32\], the network \[12, 32\]; choose texts of 9 tokens at most"),
        (
            {"patch": 4},
            r"patch_embed\.proj\.weight of shape \[32, 3, 4, 4\], the network \[32, 3, 8, 8\]; choose the patch and the channels",
        ),
        ({"channels": 1}, r"patch_embed\.proj\.weight of shape \[32, 1, 8, 8\], the network \[32, 3, 8, 8\]; .* the channels"),
        ({"features": 8}, r"vision_proj\.weight of shape \[8, 32\], the network \[16, 32\]; choose 8 features"),
        ({"width": 40}, rf"{WORDS} of shape \[50, 40\], the network \[50, 32\]; choose the widths"),
        ({"perceptron": 96}, r"dense\.weight of shape \[96, 32\], the network \[64, 32\]; choose the widths"),
        ({"depth": 3}, r"has 24 arrays that the network has no place for, such as visual_encoder\.blocks\.2\.norm1\.weight; .* as deep"),
        ({"depth": 1}, r"lacks 24 arrays of the network, such as visual_encoder\.blocks\.1\.norm1\.weight; .* as deep"),
        ({"layers": 5}, r"no place for, such as text_encoder\.bert\.encoder\.layer\.4\.attention.* as many layers"),
        ({"layers": 3}, r"lacks .* such as text_encoder\.bert\.encoder\.layer\.3\.attention.* as many layers"),
        ({"fusion": 3}, r"lacks 20 arrays of the network, such as text_encoder\.bert\.encoder\.layer\.2\.crossattention"),
        ({"fusion": 1}, r"has 20 arrays .*, such as text_encoder\.bert\.encoder\.layer\.1\.crossattention"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_size_is_refused_and_changes_nothing(other, message, tmp_path):
    model = network()
    before = copied(model)
    published(copied(network(1, **other)), tmp_path / "file.pth")
    with pytest.raises(ExperimentError, match=message):
        initialized_from(model, tmp_path / "file.pth")
    assert same(copied(model), before)


def test_layers_are_doubled_for_pairs_alone(built, tmp_path):
    six = copied(built("nlvr", 1))
    with pytest.raises(ExperimentError, match=r"no place for, such as text_encoder\.encoder\.layer\.4\."):
        initialized_from(built("ve"), published(six, tmp_path / "file.pth"))
    unpaired = network(layers=6)
    with pytest.raises(ExperimentError, match=r"lacks .* such as text_encoder\.bert\.encoder\.layer\.4\."):
        initialized_from(unpaired, published(copied(network(1)), tmp_path / "file.pth"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("text_encoder.bert.encoder.layer.3.output.dense.bias"),
            r"lacks 1 arrays .*layer\.3\.output\.dense\.bias",
        ),
        (lambda state: state.pop("itm_head.bias"), r"lacks 1 arrays of the network, such as itm_head\.bias"),
        (lambda state: state.pop("visual_encoder_m.norm.bias"), r"lacks 1 arrays of the network, such as visual_encoder_m\.norm\.bias"),
        (lambda state: state.update({"visual_encoder.blocks.0.ls1.gamma": torch.ones(32)}), r"no place for, .*blocks\.0\.ls1\.gamma"),
        (lambda state: state["text_proj.bias"].fill_(torch.inf), r"has text_proj\.bias with values that are not finite; get it anew"),
    ],
    ids=["bias lost", "half a head", "half a copy", "layer scale", "infinite"],
)
def test_a_part_is_never_loaded_in_part(change, message, tmp_path):
    model, given = network(), copied(network(1))
    before = copied(model)
    change(given)
    with pytest.raises(ExperimentError, match=message):
        initialized_from(model, published(given, tmp_path / "file.pth"))
    assert same(copied(model), before)


def test_other_files_are_refused(tmp_path):
    torch.save({"bert.embeddings.word_embeddings.weight": torch.ones(50, 32)}, tmp_path / "file.pth")
    with pytest.raises(ExperimentError, match=r"file\.pth holds bert\..*, not ALBEF's names .* BERT for learner\.text_checkpoint"):
        initialized_from(network(), tmp_path / "file.pth")
    torch.save({"model": copied(network()), "hook": partial(print, "boo")}, tmp_path / "file.pth")
    with pytest.raises(ExperimentError, match="which loading would run"):
        initialized_from(network(), tmp_path / "file.pth")
    with pytest.raises(ExperimentError, match="there is no checkpoint"):
        initialized_from(network(), tmp_path / "nothing.pth")


def test_a_file_cut_short_is_refused(tmp_path):
    path = published(copied(network()), tmp_path / "file.pth")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ExperimentError, match=r"file\.pth cannot be read .*; get it anew"):
        initialized_from(network(), path)


# ---- vision transformers --------------------------------------------------------------------------------------------


def vit(seed=0, **options):
    """A small vision transformer of timm, in evaluation mode."""
    with global_generators(generator(seed)):
        settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
        model = VisionTransformer(**settings | options)
        for param in model.parameters():
            param.data.add_(torch.rand(param.shape), alpha=0.1)
    return model.eval()


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_vision_transformer_computes_the_same_as_the_image_encoder_that_began_with_it(tmp_path, wrapped):
    model, other = network().eval(), vit()
    before = copied(model)
    torch.save({"model": other.state_dict()} if wrapped else other.state_dict(), tmp_path / "deit.pth")
    report = initialized_from_vision(model, tmp_path / "deit.pth")
    images = torch.rand(2, 3, 32, 32, generator=generator(0))
    with torch.no_grad():
        assert torch.allclose(model.visual_encoder(images), other.forward_features(images), rtol=1e-4, atol=1e-5)
        assert torch.equal(model.visual_encoder(images), model.visual_encoder_m(images))
    assert report.layout == "vision transformer" and report.found == ("visual_encoder", "visual_encoder.norm")
    assert report.copied == ("visual_encoder_m",) and not report.new
    assert all(torch.equal(tensor, before[name]) for name, tensor in copied(model).items() if not name.startswith("visual_encoder"))


def test_a_vision_transformer_of_another_grid_is_interpolated(tmp_path):
    model, given = network(side=48), vit().state_dict()
    torch.save(given, tmp_path / "deit.pth")
    initialized_from_vision(model, tmp_path / "deit.pth")
    assert torch.equal(copied(model)["visual_encoder.pos_embed"], resized_positions(given["pos_embed"], 6))


def test_without_its_last_normalization_that_begins_anew(tmp_path):
    model = network()
    before = copied(model)
    given = vit(global_pool="avg").state_dict()
    torch.save(given | {"decoder_pos_embed": torch.ones(1, 17, 8), "mask_token": torch.ones(1, 1, 8)}, tmp_path / "mae.pth")
    report = initialized_from_vision(model, tmp_path / "mae.pth")
    assert report.new == ("visual_encoder.norm",)
    assert torch.equal(copied(model)["visual_encoder.norm.weight"], before["visual_encoder.norm.weight"])
    assert torch.equal(copied(model)["visual_encoder.cls_token"], given["cls_token"])


def test_multimaes_encoder_is_a_vision_transformer_too(tmp_path):
    trunk, model = initialized(Trunk((RGB,), Size(32, 2, 4), 8, (4, 4)), generator(1)), network()
    torch.save({"model": trunk.state_dict()}, tmp_path / "multimae.pth")
    report = initialized_from_vision(model, tmp_path / "multimae.pth")
    assert report.new == ("visual_encoder.norm",)
    assert torch.equal(copied(model)["visual_encoder.blocks.1.attn.qkv.weight"], trunk.state_dict()["encoder.1.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: vit(depth=3), r"no place for, such as visual_encoder\.blocks\.2\.norm1\.weight; .* as deep"),
        (lambda: vit(embed_dim=48), r"of shape \[1, 1, 48\], the network \[1, 1, 32\]; choose the widths"),
        (lambda: vit(init_values=1e-5), r"no place for, such as visual_encoder\.blocks\.0\.ls1\.gamma"),
        (lambda: vit(img_size=(16, 32)), r"deit\.pth: 9 positions are not those of a class token and a square"),
        (lambda: vit(class_token=False, global_pool="avg"), r"deit\.pth: 16 positions are not those of a class token and a square"),
        (lambda: nn.Linear(2, 2), r"deit\.pth holds weight, bias"),
    ],
    ids=["deeper", "wider", "layer scale", "rectangle", "no class token", "something else"],
)
def test_other_vision_transformers_are_refused(other, message, tmp_path):
    model = network()
    before = copied(model)
    torch.save(other().state_dict(), tmp_path / "deit.pth")
    with pytest.raises(ExperimentError, match=message):
        initialized_from_vision(model, tmp_path / "deit.pth")
    assert same(copied(model), before)


# ---- BERT -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bert():
    """Makes one of Hugging Face's BERTs, in evaluation mode, of the size of the text network."""
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 12}

    def made(kind, **changes):
        config = transformers.BertConfig(**size | {"num_hidden_layers": 4, "initializer_range": 0.2} | changes)
        with global_generators(generator(0, "bert")):
            return getattr(transformers, kind)(config).eval()

    return made


def texts():
    """Token ids, the second text shorter than the first, and where there are any."""
    ids = torch.randint(1, 50, (2, 6), generator=generator(0, "texts"))
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    return ids * mask, mask


def old(state):
    """A file of the first years."""
    named = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in state.items()}
    return {name.replace("LayerNorm.bias", "LayerNorm.beta"): tensor for name, tensor in named.items()}


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "BertForPreTraining", "old", "safetensors"])
def test_bert_computes_the_same_as_the_text_network_that_began_with_it(bert, tmp_path, kind):
    model, other = network().eval(), bert(kind if kind.startswith("Bert") else "BertForPreTraining")
    before, path = copied(model), tmp_path / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    if kind == "safetensors":
        other.save_pretrained(tmp_path, safe_serialization=True)  # which leaves out what is there under another name
    else:
        torch.save(old(other.state_dict()) if kind == "old" else other.state_dict(), path)
    report = initialized_from_text(model, path)
    ids, mask = texts()
    with torch.no_grad():
        words = model.text_encoder.bert(ids, mask, [])
        expected = (other if kind == "BertModel" else other.bert)(ids, mask.long()).last_hidden_state
        assert torch.allclose(words[mask], expected[mask], rtol=1e-4, atol=1e-4)
        if kind != "BertModel":
            logits = other.cls.predictions(expected)
            assert torch.allclose(model.text_encoder.words(words)[mask], logits[mask], rtol=1e-4, atol=1e-3)
    assert ("text_encoder.cls" in report.new) == (kind == "BertModel")
    assert "text_encoder.crossattention" in report.new and report.copied == ("text_encoder_m",)
    found = copied(model)
    for name, tensor in found.items():
        if ".crossattention." in name and "_m." not in name:
            assert torch.equal(tensor, before[name]), name
        elif name.startswith("text_encoder_m."):
            assert torch.equal(tensor, found[name.replace("_m.", ".")]), name
        elif not name.startswith("text_encoder"):
            assert torch.equal(tensor, before[name]), name


def test_bert_goes_into_every_kind_of_network(built, bert, tmp_path):
    other = bert("BertForMaskedLM", vocab_size=100, max_position_embeddings=32)
    given = other.state_dict()
    torch.save(given, tmp_path / "pytorch_model.bin")
    for kind in KINDS:
        model = built(kind)
        report = initialized_from_text(model, tmp_path / "pytorch_model.bin")
        found = copied(model)
        begin = "text_encoder.bert." if kind == "pretrain" else "text_encoder."
        layers = (0, 1, 2, 2, 3, 3) if kind.startswith("nlvr") else (0, 1, 2, 3)
        for number, layer in enumerate(layers):
            for name in ("attention.self.key.weight", "attention.output.LayerNorm.bias", "output.dense.bias"):
                assert torch.equal(found[f"{begin}encoder.layer.{number}.{name}"], given[f"bert.encoder.layer.{layer}.{name}"])
        assert torch.equal(found[f"{begin}embeddings.word_embeddings.weight"], given["bert.embeddings.word_embeddings.weight"])
        assert "text_encoder.crossattention" in report.new and not [name for name in report.new if name.endswith("cls")]
        if kind == "vqa":
            for number in (0, 1):
                name = f"encoder.layer.{number}.output.dense.weight"
                assert torch.equal(found[f"text_decoder.bert.{name}"], given[f"bert.{name}"])
            assert torch.equal(found["text_decoder_m.cls.predictions.bias"], given["cls.predictions.bias"])


def test_of_berts_more_positions_the_first_are_taken(bert, tmp_path):
    given = bert("BertModel", max_position_embeddings=40).state_dict()
    torch.save(given, tmp_path / "pytorch_model.bin")
    model = network()
    initialized_from_text(model, tmp_path / "pytorch_model.bin")
    name = "embeddings.position_embeddings.weight"
    assert torch.equal(copied(model)[f"text_encoder.bert.{name}"], given[name][:12])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 70}, rf"{WORDS} of shape \[70, 32\], the network \[50, 32\]; choose the vocabulary .* of 70 tokens"),
        ({"num_hidden_layers": 5}, r"no place for, such as text_encoder\.bert\.encoder\.layer\.4\."),
        ({"num_hidden_layers": 3}, r"lacks 16 arrays of the network, such as text_encoder\.bert\.encoder\.layer\.3\."),
        ({"hidden_size": 64}, rf"{WORDS} of shape \[50, 64\], the network \[50, 32\]; choose the widths"),
    ],
)
def test_a_bert_of_another_size_is_refused(bert, changes, message, tmp_path):
    model = network()
    before = copied(model)
    torch.save(bert("BertModel", **changes).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ExperimentError, match=message):
        initialized_from_text(model, tmp_path / "pytorch_model.bin")
    assert same(copied(model), before)


def test_what_is_no_bert_is_refused(tmp_path):
    torch.save({"roberta.embeddings.word_embeddings.weight": torch.ones(50, 32)}, tmp_path / "file.bin")
    with pytest.raises(ExperimentError, match=r"file\.bin holds roberta\..*, not BERT's names"):
        initialized_from_text(network(), tmp_path / "file.bin")


def test_what_was_written_is_read_back(tmp_path):
    model, other = network(), network(1)
    torch.save({"model": other.state_dict()}, tmp_path / "weights.pth")
    assert initialized_from(model, tmp_path / "weights.pth").fit
    assert same(copied(model), copied(other)) and same(read(tmp_path / "weights.pth"), copied(other))
