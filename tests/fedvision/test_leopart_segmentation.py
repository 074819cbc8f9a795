"""The learner that judges Leopart with labels; its heads are tested in tests/fedvision/leopart."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from benchmarks import run
from fedvision.data import Examples, Spec
from fedvision.data.scenes import scenes
from fedvision.errors import DataError, ExperimentError
from fedvision.experiment import Experiment
from fedvision.holdings import Holdings
from fedvision.learners.check import check_learner
from fedvision.learners.leopart_segmentation import LeopartSegmentation, reduced
from fedvision.multimae.tasks import TARGET
from fedvision.seeds import generator

NETWORK = {"patch": 8, "width": 16, "depth": 2, "heads": 2, "semantic_classes": 5, "side": 12}
SPEC = Spec((3, 32, 32), 4, ("image", "label", "semseg"))


def segmentation(**settings):
    return LeopartSegmentation(**NETWORK | settings)


@pytest.fixture(scope="module")
def pool():
    fields = ("image", "label", "semseg")
    return scenes(examples=24, test_examples=20, size=32, classes=4, fields=fields, rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def batch(pool):
    return pool.train[:8].decoded()


def changed(batch, **fields):
    return Examples({**batch.fields, **fields})


@pytest.mark.parametrize(
    "settings",
    [{}, {"head_kind": "fcn", "head_width": 8}, {"frozen": False, "drop_path": 0.3}, {"resolution": 48, "crop_scale": (1.0, 1.0)}],
    ids=lambda settings: "-".join(map(str, settings)) or "plain",
)
def test_it_keeps_the_contract(pool, settings):
    check_learner(segmentation(**settings), pool.train[:6].decoded(), SPEC)


def test_every_pixel_of_a_scene_has_one_class(pool):
    ids = pool.test.fields["semseg"]
    assert ids.shape == (20, 32, 32) and ids.dtype == torch.uint8 and int(ids.max()) <= 4


# ---- views ----------------------------------------------------------------------------------------------------------


def test_maps_are_moved_as_their_pictures_are(batch):
    ids = batch.fields["semseg"]
    colored = changed(batch, image=(ids[:, None].expand(-1, 3, -1, -1).float() / 5).contiguous())
    view = segmentation(side=32, crop_scale=(0.3, 0.6)).train_view(colored, generator(0, "view"))
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    seen = 5 * (view.image * std + mean)[:, 0]
    agree = (seen - view.fields[TARGET].float()).abs() < 0.5
    assert agree.float().mean() > 0.93, "all but the edges, which are blurred"
    assert not torch.equal(view.fields[TARGET], ids)


def test_without_moves_a_view_is_the_normalized_picture(batch):
    learner = segmentation(side=32, crop_scale=(1.0, 1.0), flip=0.0)
    view = learner.train_view(batch, generator(0, "view"))
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose(view.image, (batch.image - mean) / std)
    assert torch.equal(view.fields[TARGET], batch.fields["semseg"])
    mirrored = segmentation(side=32, crop_scale=(1.0, 1.0), flip=1.0).train_view(batch, generator(0, "view"))
    assert torch.equal(mirrored.image, view.image.flip(-1)) and torch.equal(mirrored.fields[TARGET], view.fields[TARGET].flip(-1))


@pytest.mark.parametrize("side", [5, 12, 32, 40])
def test_labels_are_reduced_to_the_nearest_pixel(batch, side):
    ids = batch.fields["semseg"]
    naive = [[[int(one[i * 32 // side, j * 32 // side]) for j in range(side)] for i in range(side)] for one in ids]
    assert reduced(ids, side).tolist() == naive


# ---- loss and metrics -----------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_the_pixels_that_count(batch):
    learner = segmentation()
    model = learner.build(SPEC, generator(0, "model"))
    ids = batch.fields["semseg"].clone()
    ids[0], ids[1, :16] = 255, 255
    view = learner.train_view(changed(batch, semseg=ids), generator(0, "view"))
    target = view.fields[TARGET].long()
    scores = F.interpolate(model.backbone.tokens(view.image)[:, 1:].mT.unflatten(2, (4, 4)), (12, 12), mode="bilinear")
    scores = F.conv2d(scores, model.head.conv_seg.weight, model.head.conv_seg.bias).log_softmax(1)
    costs = [-scores[n, target[n, i, j], i, j] for n in range(8) for i in range(12) for j in range(12) if target[n, i, j] != 255]
    assert len(costs) < 8 * 144
    found = learner.loss(model, view, 0.0, generator(0, "loss")).total
    assert torch.allclose(found, torch.stack(costs).mean(), atol=1e-5)


def test_a_batch_without_labels_teaches_nothing(batch):
    learner = segmentation()
    model = learner.build(SPEC, generator(0, "model"))
    unknown = changed(batch, semseg=torch.full_like(batch.fields["semseg"], 255))
    lacking = Examples({"image": batch.image, "label": batch.label})
    for examples in (unknown, lacking):
        loss = learner.loss(model, learner.train_view(examples, generator(0, "view")), 0.0, generator(0, "loss")).total
        slopes = torch.autograd.grad(loss, list(model.head.parameters()), allow_unused=True)
        assert loss == 0 and slopes == (None, None)
        assert learner.evaluate(model, examples).count == 0


def test_metrics_count_every_pixel_of_the_maps(batch):
    learner = segmentation(resolution=48)
    model = learner.build(SPEC, generator(0, "model")).eval()
    ids = batch.fields["semseg"].clone()
    ids[:, :8], ids[0] = 255, 255
    with torch.inference_mode():
        found = learner.evaluate(model, changed(batch, semseg=ids))
    table = found.confusions[""]
    assert found.count == 7 and table.sum() == 7 * 24 * 32
    assert table.sum(1).tolist() == torch.bincount(ids[ids != 255].long(), minlength=5).tolist()
    unions = table.sum(0) + table.sum(1) - table.diagonal()
    assert found.result()["miou"] == pytest.approx((table.diagonal() / np.maximum(unions, 1))[unions > 0].mean())


def test_maps_that_do_not_fit_are_refused(batch):
    learner, ids = segmentation(), batch.fields["semseg"].clone()
    ids[2, 3, 3] = 9
    with pytest.raises(DataError, match=r"holds the class 9, beyond 0..4 and 255; raise learner.semantic_classes"):
        learner.train_view(changed(batch, semseg=ids), generator(0, "view"))
    with pytest.raises(DataError, match=r"maps of \[16, 32\] do not lie on images of \[32, 32\]"):
        learner.train_view(changed(batch, semseg=ids[:, :16]), generator(0, "view"))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ExperimentError, match="at most 255"):
        segmentation(semantic_classes=256)
    with pytest.raises(ExperimentError, match=r"learner.patch = 8 does not divide images of 32 x 30"):
        segmentation().build(Spec((3, 32, 30), 4), generator(0, "model"))
    with pytest.raises(ExperimentError, match=r"have shape \(7,\)"):
        segmentation().build(Spec((7,), 4), generator(0, "model"))


# ---- federations ----------------------------------------------------------------------------------------------------


def test_a_frozen_transformer_does_not_travel():
    for frozen in (True, False):
        learner = segmentation(frozen=frozen)
        held = Holdings.of(learner, learner.build(SPEC, generator(0, "model")))
        assert not held.private
        assert (set(held.shared) == {"head.conv_seg.weight", "head.conv_seg.bias"}) == frozen


def test_it_begins_with_a_checkpoint_and_is_another_run_with_another(tmp_path):
    file = tmp_path / "before.safetensors"
    learner = segmentation(checkpoint=str(file), resolution=48)
    digests = []
    for seed in (7, 8):
        before = segmentation().build(SPEC, generator(seed, "before")).backbone.state_dict()
        save_file(before, file)
        model = learner.build(SPEC, generator(0, "model"))
        assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
        digests.append(learner.digest)
    assert digests[0] != digests[1] and segmentation().digest == ""


def small(**changes):
    """The bundled experiment in seconds."""
    learner = {f"learner.{key}": value for key, value in NETWORK.items()}
    return learner | {"rounds": 2, "data.examples": 96, "data.test_examples": 16, "data.size": 32, "strategy.epochs": 2} | changes


def test_silos_train_a_head_together_and_the_transformer_stays(tmp_path):
    done = run("leopart-linear-tiny", small(**{"partition.clients": 3}), out=tmp_path / "run", draw=False)
    assert done.rounds["failures"].sum() == 0
    assert done.rounds["test_loss"].iloc[-1] < done.rounds["test_loss"].iloc[0]
    assert set(done.state) == {"head.conv_seg.weight", "head.conv_seg.bias"}


def test_it_judges_what_a_run_of_leopart_has_learned(tmp_path):
    few = {"rounds": 1, "data.examples": 24, "data.test_examples": 4, "strategy.steps": 2}
    before = run("leopart-tiny", few, out=tmp_path / "before", draw=False)
    file = tmp_path / "before" / "model.safetensors"
    after = run("leopart-linear-tiny", few | {"learner.checkpoint": str(file)}, out=tmp_path / "after", draw=False)
    built = after.experiment.build_learner().build(Spec((3, 64, 64), 4), generator(0, "model"))
    for name, value in built.backbone.state_dict().items():
        assert torch.equal(value, before.state[f"model.{name}"]), name
    assert after.rounds["failures"].sum() == 0


def test_fine_tuned_it_beats_background_everywhere(tmp_path):
    optimizer = {"name": "AdamW", "lr": 3e-3, "keep": True}
    changes = small(**{"data.examples": 400, "data.test_examples": 100, "learner.width": 64, "learner.frozen": False})
    changes |= {"strategy.client_optimizer": optimizer, "rounds": 3, "strategy.epochs": 4, "data.objects": [1, 1]}
    done = run("leopart-linear-tiny", changes, out=tmp_path / "run", draw=False)
    truth = done.experiment.load_data().test.fields["semseg"]
    background = (truth == 0).double().mean().item() / len(truth.unique())
    assert done.rounds["test_miou"].iloc[-1] > 1.3 * background > done.rounds["test_miou"].iloc[0]


@pytest.mark.parametrize(("name", "batches"), [("leopart-linear-voc", 8_085), ("leopart-fcn-voc", 8_269_845)])
def test_the_papers_recipes_build_their_networks(name, batches):
    experiment = Experiment.load(name)
    learner = experiment.build_learner()
    with torch.device("meta"):
        size = learner.size(Spec((3, 448, 448), 20))
        head = learner._head(size.width, generator(0, "head"))
    assert (size.side, size.patch, size.width, size.depth, size.heads, learner.side) == (448, 16, 384, 12, 6, 100)
    assert sum(param.numel() for param in head.parameters()) == batches
