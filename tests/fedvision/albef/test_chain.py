"""What one task of ALBEF has learned is what another begins with."""

import pytest
import torch
from safetensors.torch import save_file

from fedvision.data.federated import Spec
from fedvision.registry import learners
from fedvision.seeds import generator

TINY = {"patch": 8, "xavier": True, "deviation": 0.1}
SPEC = Spec((3, 32, 32), 2)


def built(name, **settings):
    return learners.find(name)(**(TINY | settings)).build(SPEC, generator(len(settings), name))


def written(model, folder):
    """A file as a run's: without copies and queues, and what is tied once."""
    state = model.state_dict()
    travels = {name: value for name, value in state.items() if "queue" not in name and not name.split(".")[0].endswith("_m")}
    path = folder / "model.safetensors"
    save_file({name: value.clone() for name, value in travels.items()}, path)
    return str(path)


def same(one, other, names):
    state, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(state[name], theirs[other_name]) for name, other_name in names.items())


@pytest.mark.parametrize("name", ["albef-retrieval", "albef-ve", "albef-nlvr2", "albef-vqa", "albef-assignment"])
def test_tasks_begin_with_what_pre_training_has_learned(name, tmp_path):
    before = built("albef")
    model = built(name, checkpoint=written(before, tmp_path))
    text = "text_encoder.bert.encoder.layer"
    paired = name in ("albef-nlvr2", "albef-assignment")
    names = {
        "visual_encoder.blocks.1.mlp.fc1.weight": "visual_encoder.blocks.1.mlp.fc1.weight",
        "text_encoder.encoder.layer.1.output.dense.weight": f"{text}.1.output.dense.weight",
        "text_encoder.encoder.layer.2.crossattention.self.key.weight": f"{text}.2.crossattention.self.key.weight",
        "text_encoder.encoder.layer.3.crossattention.self.query.weight": f"{text}.{2 if paired else 3}.crossattention.self.query.weight",
    }
    if paired:
        names["text_encoder.encoder.layer.5.intermediate.dense.weight"] = f"{text}.3.intermediate.dense.weight"
    if name == "albef-vqa":
        names["text_decoder.bert.encoder.layer.1.crossattention.self.value.weight"] = f"{text}.3.crossattention.self.value.weight"
        names["text_decoder.cls.predictions.bias"] = "text_encoder.cls.predictions.bias"
    assert same(model, before, names)
    if name != "albef-assignment":
        assert same(model, model, {"visual_encoder_m.norm.weight": "visual_encoder.norm.weight"})


def test_pairs_begin_with_what_text_assignment_has_learned(tmp_path):
    before = built("albef-assignment")
    model = built("albef-nlvr2", checkpoint=written(before, tmp_path))
    shared = [name for name in before.state_dict() if name.startswith(("visual_encoder.", "text_encoder."))]
    assert len(shared) > 100
    assert same(model, before, {name: name for name in shared})
    copies = {name.replace("text_encoder.", "text_encoder_m.", 1): name for name in shared if name.startswith("text_encoder.")}
    assert same(model, before, copies)
