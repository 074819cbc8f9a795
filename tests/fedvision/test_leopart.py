import logging
import math

import pytest
import torch

from fedvision.data.examples import IMAGE, LABEL, SEMSEG, Examples
from fedvision.data.federated import Spec
from fedvision.errors import ExperimentError
from fedvision.holdings import Holdings
from fedvision.learners.check import check_learner
from fedvision.learners.learner import Loss
from fedvision.learners.leopart import ASSIGNED, COUNTED, DRAWN, FRESH, GLOBAL_CROPS, LOCAL_CROPS, UNIFORM_STEPS, LeopartLearner
from fedvision.leopart.foreground import foreground
from fedvision.leopart.judging import judged, judging_of
from fedvision.seeds import generator
from fedvision.silo import Silo

SPEC = Spec((3, 32, 32), 2)
TINY = {"patch": 8, "mask": "all", "drop_path": 0.0}


def pictures(n=6, channels=3, side=32):
    images = torch.rand(n, channels, side, side, generator=generator(0, "images"))
    return Examples({IMAGE: images, LABEL: torch.full((n,), -1)})


def learner(**settings):
    return LeopartLearner(**(TINY | settings))


def built(own, spec=SPEC):
    return own.build(spec, generator(0, "model"))


def drawn(own, model, n=4, purpose="view"):
    return own.draw(model, pictures(), slice(0, n), generator(0, purpose))


def loss_of(own, model, batch):
    return own.loss(model, batch, 0.5, generator(0, "loss"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mask": "foreground", "drop_path": 0.1, "queue": 30},
        {"mask": "background", "copies": "shared", "teacher_head": "random"},
        {"taught": False, "queue": 20, "local_crops": 0, "patch": 16},
        {"local_size": 32, "resolution": 48, "epsilon": 0.001, "jittered": 0.0, "gray": 0.0, "blurred": 0.0},
    ],
)
def test_leopart_is_a_learner(settings):
    check_learner(learner(**settings), pictures(), SPEC)


@pytest.mark.parametrize("channels", [1, 4])
def test_pictures_may_have_other_channels(channels):
    check_learner(learner(), pictures(channels=channels), Spec((channels, 32, 32), 2))


# ---- batches and steps ----------------------------------------------------------------------------------------------


def test_a_batch_has_crops_and_what_the_teacher_says_of_them():
    own = learner(mask="foreground", queue=25, local_size=16)
    fields = drawn(own, built(own)).fields
    assert fields[GLOBAL_CROPS].shape == (4, 2, 3, 32, 32) and fields[LOCAL_CROPS].shape == (4, 4, 3, 16, 16)
    assert fields[ASSIGNED].shape == (4, 2, 16, 16) and torch.allclose(fields[ASSIGNED].sum(-1), torch.ones(4, 2, 16))
    assert fields[COUNTED].shape == (4, 2, 6, 7, 7) and fields[FRESH].shape == (4, 2, 7, 32)
    assert (fields[FRESH].any(-1).sum((0, 2)) <= 25).all()


def test_crops_have_the_sizes_of_the_paper_where_pictures_do():
    crops = LeopartLearner()._crops(224)
    assert (crops.global_size, crops.local_size) == (224, 96)
    assert (LeopartLearner()._crops(256).global_size, LeopartLearner(patch=8)._crops(70).global_size) == (256, 64)


def test_a_step_normalizes_prototypes_and_moves_the_teacher_to_where_the_network_was_before_it():
    own = learner(momentum=0.75)
    model = built(own)
    with torch.no_grad():
        model.model.prototypes.weight *= 3
        model.model.norm.bias += 1
    silo = Silo(own, model, dict(Holdings.of(own, model).shared), pictures(), rng=generator(0, "fit"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.model.norm.bias += 1
    silo.descend(silo.batches(6, steps=1), {"name": "SGD", "lr": 1e-2})
    after = model.state_dict()
    moved = 0.75 * before["teacher.norm.bias"] + 0.25 * (before["model.norm.bias"] + 1)
    assert torch.allclose(after["teacher.norm.bias"], moved)
    unit = torch.nn.functional.normalize(before["model.prototypes.weight"], dim=1)
    taught = torch.nn.functional.normalize(before["teacher.prototypes.weight"], dim=1)
    assert torch.allclose(after["teacher.prototypes.weight"], 0.75 * taught + 0.25 * unit, atol=1e-6)
    step = after["model.prototypes.weight"] - unit
    assert 0 < step.norm() < 0.2 * unit.norm()


def test_momentum_rises_along_a_cosine():
    own = learner(momentum=0.9)
    assert [own.momentum_at(progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx([0.9, 0.95, 1.0])


def test_a_queue_fills_and_then_takes_part():
    own = learner(queue=60, remembered=10)
    model, full = built(own), []
    for step in range(3):
        batch = drawn(own, model, purpose=f"view {step}")
        full.append(model.full)
        own.precede(model, batch, Loss(torch.tensor(0.0)), 0.0)
    assert full == [[False, False], [False, False], [True, True]]
    with_queue = own.said(model, batch, lambda patches: patches)[ASSIGNED]
    model.queue[:, -1] = 0  # no longer full
    assert (own.said(model, batch, lambda patches: patches)[ASSIGNED] - with_queue).abs().max() > 1e-3


def test_a_queue_takes_fewer_patches_where_too_few_count():
    own = learner(mask="foreground", mass=0.01, queue=40, remembered=10)
    model = built(own)
    batch = drawn(own, model)
    there = batch.fields[FRESH].any(-1).sum((0, 2))
    assert (there < 40).all()
    own.precede(model, batch, Loss(torch.tensor(0.0)), 0.0)
    assert model.queue.any(-1).sum(1).tolist() == there.tolist() and model.full == [False, False]


@pytest.mark.parametrize("mask", ["foreground", "background"])
def test_masks_that_count_nothing_teach_nothing_and_nothing_is_nan(mask):
    own = learner(mask=mask, mass=0.0 if mask == "foreground" else 1.0, queue=20)
    model = built(own)
    batch = drawn(own, model)
    assert not batch.fields[COUNTED].any() and not batch.fields[FRESH].any()
    loss = loss_of(own, model, batch)
    loss.total.backward()
    assert loss.total == 0 and all(param.grad.isfinite().all() for param in model.parameters() if param.grad is not None)
    own.precede(model, batch, loss, 0.0)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_foreground_and_background_are_all_there_is():
    attention = torch.rand(4, 2, 4, 16, generator=generator(0)).softmax(-1)
    front, back = (learner(mask=mask).masks(attention, (4, 4)) for mask in ("foreground", "background"))
    assert torch.equal(front, ~back) and learner().masks(attention, (4, 4)) is None


def test_without_a_teacher_the_network_makes_the_assignments():
    own = learner(taught=False)
    model = built(own)
    assert model.teacher is None and model.guide is model.model
    assert not [name for name in model.state_dict() if name.startswith("teacher")]
    assert loss_of(own, model, drawn(own, model)).total > 0


# ---- a collapse -----------------------------------------------------------------------------------------------------


def test_a_collapse_is_told_of_once_and_counted(caplog):
    own = learner()
    model = built(own)
    with torch.no_grad():
        model.model.projection_head[4].weight.zero_()
        model.model.projection_head[4].bias.fill_(1.0)  # all patches alike
        model.model.prototypes.weight.copy_(model.model.prototypes.weight[:1].expand(16, -1))
    caplog.set_level(logging.WARNING)
    shares = []
    for _ in range(22):
        batch = drawn(own, model)
        loss = loss_of(own, model, batch)
        assert loss.total.item() == pytest.approx(math.log(16), abs=1e-3)
        shares.append(loss.parts["collapsed"].item())
        own.precede(model, batch, loss, 0.0)
    assert shares == [0.0] * 20 + [1.0] * 2
    assert [record.message for record in caplog.records] == [
        "leopart has collapsed: for 20 steps predictions have been uniform, with the loss ln 16; "
        "begin with a checkpoint, or choose a lower rate in strategy.client_optimizer"
    ]
    own.precede(model, batch, Loss(torch.tensor(1.0)), 0.0)
    assert drawn(own, model).fields[UNIFORM_STEPS].tolist() == [0] * 4


def test_tokens_that_are_all_alike_are_seen():
    own = learner()
    model = built(own)
    assert loss_of(own, model, drawn(own, model)).parts["token_std"] > 0.1
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert loss_of(own, model, drawn(own, model)).parts["token_std"] == 0
    assert own.evaluate(model.eval(), pictures()).result()["token_std"] == 0


# ---- a federation ---------------------------------------------------------------------------------------------------


def test_teacher_and_queue_stay_in_the_silo_and_the_rest_travels():
    model = built(learner(queue=8))
    held = Holdings.of(learner(), model)
    assert {name.split(".")[0] for name in held.private} == {"teacher", "queue", "uniform_steps"}
    assert {name.split(".")[0] for name in held.shared} == {"model"}
    assert "model.prototypes.weight" in held.shared and "model.projection_head.0.weight" in held.shared
    shared = Holdings.of(learner(copies="shared"), model)
    assert set(shared.private) == {"queue", "uniform_steps"}


@pytest.mark.parametrize("head", ["copied", "random"])
def test_a_silos_teacher_begins_at_what_it_was_sent(head):
    own = learner(teacher_head=head)
    model = built(own)
    arrays = {name: tensor + 1 for name, tensor in Holdings.of(own, model).shared.items()}
    silo = Silo(own, model, arrays, pictures())
    assert torch.equal(silo.model.teacher.blocks[0].norm1.weight, silo.model.model.blocks[0].norm1.weight)
    assert torch.equal(silo.model.teacher.prototypes.weight, silo.model.model.prototypes.weight) == (head == "copied")


# ---- what is seen of pictures ---------------------------------------------------------------------------------------


def test_tokens_and_attention_are_of_the_patches_of_whole_pictures():
    own = learner()
    model = built(own).eval()
    with torch.inference_mode():
        tokens, attention = own.tokens(model, pictures().image), own.attention(model, pictures().image)
    assert tokens.shape == (6, 4, 4, 64) and attention.shape == (6, 4, 4, 4)
    alone = model.model.tokens(own.looked_at(pictures().image[2:3]))[0, 1:]
    assert torch.allclose(tokens[2].flatten(0, 1), alone, atol=1e-5)
    larger = learner(resolution=48)
    assert larger.tokens(model, pictures().image).shape == (6, 6, 6, 64)
    assert own.tokens(model, torch.zeros(2, 3, 38, 45)).shape == (2, 4, 5, 64)  # what no patch fills is squeezed in


# ---- what is found without labels -----------------------------------------------------------------------------------

FEW = {"clusters": [4], "seeds": 1, "restarts": 1, "size": 32, "foreground_clusters": 4, "community_clusters": 3, "community_seeds": 1}


def mapped(n=8):
    maps = torch.randint(3, (n, 32, 32), generator=generator(0, "maps"), dtype=torch.uint8)
    return Examples({**pictures(n).fields, SEMSEG: maps})


def test_a_test_set_with_maps_is_judged_as_its_tokens_and_its_attention_are():
    own, examples = learner(judging=FEW, semantic_classes=3, mass=0.5), mapped()
    model = built(own)
    looks = own.tokens(model, examples.image), foreground(own.attention(model, examples.image), 0.5)
    expected = judged(*looks, examples.fields[SEMSEG], 3, judging_of(FEW))
    assert dict(own.overall(model, examples)) == pytest.approx(expected) and "overclustering_4" in expected
    assert learner().overall(model, examples) == {}, "without the table nothing is judged"


def test_pictures_show_classes_and_foreground_of_some_of_the_pictures_that_are_clustered():
    own, examples = learner(judging=FEW, semantic_classes=3), mapped()
    shown = own.pictures(built(own), examples)
    assert {"classes-found", "foreground"} <= shown.keys()
    assert len(shown["foreground"].rows) == DRAWN < len(examples)
    assert learner().pictures(built(own), examples) == {}


def test_what_is_judged_needs_maps():
    with pytest.raises(ExperimentError, match=r"judging needs the field semseg, which the data lack; add it to data.fields"):
        built(learner(judging=FEW), Spec((3, 32, 32), 2, test_fields=(IMAGE, LABEL)))
    with pytest.raises(ExperimentError, match=r"learner.judging.clusers: .*did you mean 'clusters'"):
        judging_of({"clusers": [4]})


def test_training_lowers_the_loss():
    own = learner(local_size=16)
    model = built(own)
    before = own.evaluate(model.eval(), pictures()).result()["loss"]
    silo = Silo(own, model, dict(Holdings.of(own, model).shared), pictures(), rng=generator(0, "fit"))
    first = silo.descend(silo.batches(6, steps=3), {"name": "AdamW", "lr": 1e-3})
    last = silo.descend(silo.batches(6, steps=12), {"name": "AdamW", "lr": 1e-3})
    assert last < first and math.isfinite(before)


# ---- what does not fit ----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_with_a_remedy():
    with pytest.raises(ExperimentError, match=r"needs pictures, the inputs have shape \(3,\)"):
        built(learner(), Spec((3,), 2))
    with pytest.raises(ExperimentError, match="patch = 40 is larger than pictures of 32 pixels"):
        built(learner(patch=40))
    with pytest.raises(ExperimentError, match=r"does not divide learner\.global_size = 30; choose a multiple"):
        built(learner(global_size=30))
    with pytest.raises(ExperimentError, match=r"does not divide learner\.local_size = 20"):
        built(learner(local_size=20))
    with pytest.raises(ExperimentError, match="local_size = 40 is larger than the large crops' 32"):
        built(learner(local_size=40))
    with pytest.raises(ExperimentError, match=r"local_scale = \[0\.5, 0\.2\]; give the least first"):
        learner(local_scale=(0.5, 0.2))
    with pytest.raises(ExperimentError, match=r"hues by 0\.7"):
        learner(jitter=(0.8, 0.8, 0.8, 0.7))
    with pytest.raises(ExperimentError, match=r"patches of 8 pixels do not divide pictures of 30 x 30; .*resolution"):
        own = learner(resolution=30)
        own.tokens(built(own), pictures().image)
