"""The learner of fine-tuning; its network, heads and losses are tested in tests/fedvision/multimae."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import run
from fedvision.data import Examples, Spec
from fedvision.data.scenes import scenes
from fedvision.errors import DataError, ExperimentError
from fedvision.experiment import Experiment
from fedvision.learners.check import check_learner
from fedvision.learners.multimae import MultiMAE
from fedvision.learners.multimae_finetune import MultiMAEFineTuning
from fedvision.metrics import total
from fedvision.multimae.tasks import TARGET
from fedvision.seeds import generator

NETWORK = {"patch": 8, "width": 16, "depth": 2, "heads": 2, "class_embedding": 4, "semantic_classes": 5}
SPEC = Spec((3, 32, 32), 4, ("image", "label", "depth", "semseg"))
PLAIN = {"mixup": 0.0, "cutmix": 0.0}


def tuning(task="classification", **settings):
    return MultiMAEFineTuning(task=task, **NETWORK | {"head_width": 64} | settings)


@pytest.fixture(scope="module")
def pool():
    fields = ("image", "label", "depth", "semseg")
    return scenes(examples=24, test_examples=20, size=32, classes=4, fields=fields, rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def batch(pool):
    return pool.train[:8].decoded()


def without(batch, field, there):
    return Examples({**batch.fields, f"has_{field}": torch.tensor(there)})


TASKS = [
    {"task": "classification"},
    {"task": "classification", "inputs": ("rgb", "depth"), "pooling": "global", "drop_path": 0.3},
    {"task": "classification", "inputs": ("semseg",), **PLAIN},
    {"task": "semseg"},
    {"task": "semseg", "inputs": ("depth",)},
    {"task": "semseg", "inputs": ("rgb", "depth"), "reads": ("rgb", "depth"), "zoom": (0.5, 2.0), "colors": (0.4, 0.4, 0.2, 0.1)},
    {"task": "semseg", "head_kind": "segmenter", "head_width": 16},
    {"task": "semseg", "head_kind": "dpt", "head_width": 8},
    {"task": "depth", "head_width": 8, "gray": 0.5},
    {"task": "depth", "head_kind": "convnext", "inputs": ("rgb", "semseg"), "depth_loss": "l1"},
]


@pytest.mark.parametrize("settings", TASKS, ids=lambda settings: "-".join(str(value) for value in settings.values()))
def test_it_keeps_the_contract(pool, settings):
    check_learner(tuning(**settings), pool.train[:6].decoded(), SPEC)


def test_photographs_keep_the_contract(pool):
    check_learner(tuning(randaugment="rand-m9-mstd0.5-inc1", crop_scale=(0.3, 1.0)), pool.train[:6].decoded(), SPEC)


def test_groups_decay_layer_by_layer():
    learner = tuning("semseg", layer_decay=0.5)
    model = learner.build(SPEC, generator(0, "model"))
    factors = {name: (group.lr_factor, group.decayed) for group in learner.groups(model) for name in group.names}
    assert factors.keys() == {name for name, param in model.named_parameters() if param.requires_grad}
    # two blocks: before them 0.5^3, then 0.5^2 and 0.5, the head 1
    assert factors["input_adapters.rgb.proj.weight"] == (0.125, True)
    assert factors["global_tokens"] == (0.125, False)
    assert factors["encoder.0.attn.qkv.weight"] == (0.25, True)
    assert factors["encoder.1.norm1.weight"] == (0.5, False)
    assert factors["encoder.1.mlp.fc1.bias"] == (0.5, False)
    assert factors["output_adapters.semseg.final_layer.weight"] == (1.0, True)


def test_it_begins_with_what_pre_training_has_learned(tmp_path):
    before = MultiMAE(**{**NETWORK, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}).build(SPEC, generator(7, "before"))
    save_file(before.state_dict(), tmp_path / "before.safetensors")
    learner = tuning("depth", inputs=("rgb", "semseg"), head_width=8, checkpoint=str(tmp_path / "before.safetensors"))
    model, own = learner.build(SPEC, generator(0, "model")).state_dict(), before.state_dict()
    for name in model:
        if name.startswith(("encoder.", "global_tokens", "input_adapters.rgb")):
            assert torch.equal(model[name], own[name]), name
    embeddings = model["input_adapters.semseg.class_emb.weight"]
    assert torch.equal(embeddings[:5], own["input_adapters.semseg.class_emb.weight"])
    assert not embeddings[5].any(), "the class of what is not known"


def test_the_command_tells_what_a_checkpoint_gave(tmp_path, fedvision, caplog):
    small = {**NETWORK, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    save_file(MultiMAE(**small).build(SPEC, generator(7, "before")).state_dict(), tmp_path / "before.safetensors")
    settings = {f"learner.{name}": value for name, value in NETWORK.items()} | {"learner.checkpoint": tmp_path / "before.safetensors"}
    settings |= {"rounds": 0, "data.examples": 24, "data.test_examples": 4}
    ended = fedvision("run", "multimae-finetune-tiny", *(f"--set={name}={value}" for name, value in settings.items()))
    assert ended.status == 0
    assert "inputs found: rgb; outputs that begin anew: semseg;" in caplog.text and "unexpected: input_adapters.depth" in caplog.text


def test_mixing_mixes_all_modalities_and_the_labels_alike(batch):
    learner = tuning(inputs=("rgb", "depth"), mixup=0.8, cutmix=0.0)
    model = learner.build(SPEC, generator(0, "model"))
    drawn = learner.draw(model, batch, slice(0, 8), generator(0, "view"))
    plain = learner.train_view(batch, generator(0, "view"))
    assert torch.allclose(drawn.fields[TARGET].sum(1), torch.ones(8))
    share = (drawn.fields["depth"][0] - plain.fields["depth"][7]) / (plain.fields["depth"][0] - plain.fields["depth"][7])
    share = share[share.isfinite()].median()
    for name in ("rgb", "depth"):
        expected = share * plain.fields[name][0] + (1 - share) * plain.fields[name][7]
        assert torch.allclose(drawn.fields[name][0], expected, atol=1e-4)


def test_a_picture_that_lacks_an_input_is_predicted_from_its_others_whatever_its_batch(batch):
    learner = tuning("semseg", inputs=("rgb", "depth"))
    model = learner.build(SPEC, generator(0, "model")).eval()
    given = without(batch, "depth", [True, False] * 4)
    with torch.inference_mode():
        mixed = learner.evaluate(model, given).result()
        apart = total(learner.evaluate(model, given[torch.arange(i, 8, 2)]) for i in (0, 1)).result()
        noise = Examples({**given.fields, "depth": torch.where(given.having("depth")[:, None, None, None], batch.fields["depth"], 9.0)})
        assert learner.evaluate(model, noise).result() == pytest.approx(mixed)
    assert mixed == pytest.approx(apart, rel=1e-4)


def test_what_is_not_known_of_a_target_counts_nowhere(batch):
    for task, field in (("semseg", "semseg"), ("depth", "depth")):
        learner = tuning(task, head_width=8 if task == "depth" else 64, drop_path=0.0, flip=0.0)
        model = learner.build(SPEC, generator(0, "model"))
        some = learner.loss(model, learner.train_view(without(batch, field, [True] * 3 + [False] * 5), generator(0, "v")), 0.0, None)
        alone = learner.loss(model, learner.train_view(batch[:3], generator(0, "v")), 0.0, None)
        assert torch.isclose(some.total, alone.total, rtol=1e-4)
        nothing = learner.train_view(without(batch, field, [False] * 8), generator(0, "v"))
        loss = learner.loss(model, nothing, 0.0, None).total
        assert loss == 0
        params = [param for param in model.parameters() if param.requires_grad]
        assert torch.autograd.grad(loss, params, allow_unused=True) == (None,) * len(params), "not even weight decay moves them"
        with torch.inference_mode():
            assert learner.evaluate(model.eval(), without(batch, field, [False] * 8)).result() == {}


def test_a_silo_without_targets_does_not_hold_the_others_back(tmp_path):
    silos = [["image", "semseg"], ["image"]]
    changes = {"rounds": 1, "data.examples": 40, "data.test_examples": 10, "partition.clients": 2, "modalities": {"silos": silos}}
    changes |= {"strategy.steps": 2, "strategy.batch_size": 8}
    both = run("multimae-finetune-tiny", changes, out=tmp_path / "both", draw=False)
    alone = run("multimae-finetune-tiny", {**changes, "participants": [0]}, out=tmp_path / "alone", draw=False)
    assert both.rounds["failures"].sum() == 0
    assert all(torch.allclose(both.state[name], alone.state[name], rtol=1e-5, atol=1e-7) for name in alone.state)


def test_it_learns_without_labels_unless_they_are_its_task():
    assert not tuning().learns_unlabeled
    assert tuning("semseg").learns_unlabeled


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"head_kind": "dpt"}, "learner.head_kind = 'dpt' is no head for learner.task = 'classification'; choose linear"),
        ({"task": "semseg", "reads": ("depth",)}, "learner.reads names 'depth', which is not among learner.inputs"),
        ({"task": "depth", "inputs": ("rgb", "depth")}, "learner.inputs names 'depth', whose field is what .*is to predict"),
        ({"task": "semseg", "randaugment": "rand-m9"}, "learner.randaugment moves pictures without their maps"),
        ({"inputs": ("rgb", "semseg")}, "learner.mixup and learner.cutmix cannot mix 'semseg'"),
        ({"task": "semseg", "zoom": (2.0, 1.0)}, "give the least factor first"),
        ({"inputs": ("thermal",)}, "learner.inputs = .*'thermal'"),
    ],
)
def test_wrong_settings_are_refused(settings, reason):
    with pytest.raises(ExperimentError, match=reason):
        tuning(**settings)


@pytest.mark.parametrize(
    ("spec", "settings", "reason"),
    [
        (Spec((3, 32, 32), 0), {}, "pictures of these data have no classes; choose 'semseg' or 'depth'"),
        (Spec((3, 32, 32), 4, ("image", "label")), {"task": "semseg"}, "the field 'semseg', which the data lack .*learner.task"),
        (Spec((3, 24, 24), 4), {"task": "depth", "head_width": 8}, "DPT head needs even numbers of patches, here are 3 x 3"),
        (SPEC, {"checkpoint": "nowhere.pth"}, "there is no checkpoint nowhere.pth"),
    ],
)
def test_data_that_do_not_fit_are_refused(spec, settings, reason):
    with pytest.raises(ExperimentError, match=reason):
        tuning(**settings).build(spec, generator(0, "model"))


def test_batches_that_do_not_fit_are_refused(batch):
    with pytest.raises(DataError, match="a batch has none of the modalities depth"):
        tuning("semseg", inputs=("depth",)).train_view(without(batch, "depth", [False] * 8), generator(0, "view"))
    with pytest.raises(DataError, match=r"holds the class \d, .*has 3 .*raise learner.semantic_classes"):
        tuning("semseg", semantic_classes=3).train_view(batch, generator(0, "view"))


def test_a_short_run_finds_more_than_the_background(tmp_path):
    """The specification's smoke test: 200 steps of the ConvNeXt head, beside the most frequent class everywhere."""
    changes = {"rounds": 2, "data.examples": 600, "data.test_examples": 100}
    done = run("multimae-finetune-tiny", changes, out=tmp_path / "run", draw=False)
    truth = done.experiment.load_data().test.fields["semseg"]
    background = (truth == 0).double().mean().item() / len(truth.unique())
    assert done.rounds["test_miou"].iloc[-1] > 1.3 * background
    assert done.rounds["test_miou"].iloc[0] < 1.3 * background


@pytest.mark.parametrize("name", ["multimae-finetune-imagenet", "multimae-ade20k", "multimae-nyu-depth"])
def test_the_papers_recipes_build_their_networks(name):
    learner = Experiment.load(name).build_learner()
    side = 224 if name == "multimae-finetune-imagenet" else int(Experiment.load(name).data.settings["size"])
    with torch.device("meta"):
        modalities = learner.of_data(Spec((3, side, side), 1000), [learner.known["rgb"]], "learner.inputs")
        assert learner._head(Spec((3, side, side), 1000)) is not None
    assert learner.size.width == 768 and modalities[0].channels == 3
    assert learner.sides(Spec((3, side, side), 1000)) == (side // 16, side // 16)
