"""Whole steps of training against the reference's arrays."""

import pytest
import torch

from fedvision.data.examples import Examples
from fedvision.learners.leopart import GLOBAL_CROPS, UNIFORM_STEPS, LeopartLearner
from fedvision.leopart.foreground import blurred, heaviest, without_specks
from fedvision.optimizers import Stepper
from fedvision.seeds import generator

pytestmark = pytest.mark.golden

TOTAL = 20
"""Steps that the schedules are made for."""

OPTIMIZER = {
    "name": "AdamW",
    "lr": 1e-3,
    "weight_decay": 0.04,
    "schedule": {"name": "cosine"},
    "decay_schedule": {"name": "cosine", "final": 12.5},
}
SETTINGS = {"patch": 16, "prototypes": 10, "features": 16, "momentum": 0.9, "drop_path": 0.0}


def crops_of(arrays):
    """The reference's batch."""
    large, small = (torch.stack([arrays[f"crop{i}"] for i in pair], 1) for pair in ((0, 1), (2, 3)))
    boxes = {"of_global": arrays["box_gc"], "of_crop": arrays["box_all"]}
    return {GLOBAL_CROPS: large, "local_crops": small, **boxes}


def trained(learner, model, arrays, steps, orders=None, each=lambda step: None):
    """Steps as a silo takes them; losses, rates, decays, and the gradients of the first."""
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    stepper = Stepper(OPTIMIZER, params, learner.groups(model))
    losses, rates, decays, first, orders = [], [], [], {}, iter(orders or ())
    for step in range(steps):
        view = crops_of(arrays)
        said = learner.said(model, Examples(view), lambda patches: patches[next(orders)])
        batch = Examples({**view, **said, UNIFORM_STEPS: torch.zeros(3, dtype=torch.int64)})
        loss = learner.loss(model, batch, step / TOTAL, generator(0, "loss"))
        gradients = torch.autograd.grad(loss.total, list(params.values()), allow_unused=True)
        first = first or dict(zip(params, gradients, strict=True))
        learner.precede(model, batch, loss, step / TOTAL)
        stepper(gradients, step / TOTAL)
        losses.append(loss.total.item())
        rates.append([group["lr"] for group in stepper._optimizer.param_groups][:4])
        decays.append([group["weight_decay"] for group in stepper._optimizer.param_groups][:4])
        each(step)
    return losses, rates, decays, first


@pytest.mark.parametrize(
    ("tag", "settings"),
    [
        ("all_", {"mask": "all"}),
        ("fg_", {"mask": "foreground"}),
        ("bg_", {"mask": "background"}),
        ("not_", {"mask": "all", "taught": False}),
    ],
)
def test_losses_gradients_and_weights_after_steps_are_the_references(tag, settings, group, arrays, reference, agree):
    wanted = group(tag)
    learner, model = LeopartLearner(**SETTINGS, **settings), reference()
    if not learner.taught:
        model.teacher = None
    losses, rates, decays, first = trained(learner, model, arrays, 3)
    assert losses == pytest.approx(wanted["losses"].tolist(), abs=1e-5)
    assert torch.allclose(torch.tensor(rates, dtype=torch.float64), wanted["lrs"], rtol=1e-6, atol=0)
    assert torch.allclose(torch.tensor(decays, dtype=torch.float64), wanted["wds"], rtol=1e-6, atol=0)
    for name, gradient in wanted.items():
        if name.startswith("grad0/"):
            agree(first[f"model.{name.removeprefix('grad0/')}"], gradient, name)
    agree_after(model, wanted, agree)


def agree_after(model, wanted, agree):
    """The weights after some steps, but for biases of keys: no loss depends on them, and AdamW makes steps of rounding errors."""
    state = model.state_dict()
    for name in wanted:
        if name.startswith("after/"):
            pair = state[name.removeprefix("after/")], wanted[name]
            if name.endswith("qkv.bias"):
                pair = (torch.cat([values.chunk(3)[i] for i in (0, 2)]) for values in pair)
            agree(*pair, name, atol=1e-4)


def test_the_queue_is_the_references(group, arrays, reference, agree):
    wanted = group("q_")
    learner, model = LeopartLearner(**SETTINGS, mask="all", queue=60, remembered=10), reference(60)
    orders = [wanted[f"perm{i}"] for i in range(sum(name.startswith("perm") for name in wanted))]
    losses, *_ = trained(
        learner, model, arrays, 4, orders, lambda step: agree(model.queue, wanted[f"queue_after_step{step}"], f"queue {step}", atol=1e-4)
    )
    assert losses == pytest.approx(wanted["losses"].tolist(), abs=1e-4)
    agree_after(model, wanted, agree)


def test_masks_of_the_foreground_are_the_references(arrays, agree):
    attention = arrays["attn_in"][:, 0]
    agree(blurred(attention), arrays["attn_blur"][:, 0])
    for mass, name in ((0.6, "attn_mask_060"), (0.65, "attn_mask_065")):
        found = without_specks(heaviest(blurred(attention), mass))
        assert torch.equal(found, arrays[name][:, 0].bool()), name


def test_the_teachers_attention_and_masks_in_training_are_the_references(arrays, reference, agree):
    learner, model = LeopartLearner(**SETTINGS), reference()
    crops = crops_of(arrays)[GLOBAL_CROPS]
    together = crops.transpose(0, 1).flatten(0, 1)  # the reference has the pictures of a crop together
    attention = model.teacher.guidance(together).attention
    agree(attention, arrays["fg_teacher_attn"])
    masks = learner.masks(attention.unflatten(0, (2, 3)).transpose(0, 1), (4, 4))
    assert torch.equal(masks.transpose(0, 1).flatten(0, 1), arrays["fg_mask"][:, 0].bool())


def test_momentum_and_decay_follow_the_references_cosines(arrays):
    learner = LeopartLearner(momentum=0.9)
    found = [learner.momentum_at(step / TOTAL) for step in range(TOTAL)]
    assert found == pytest.approx(arrays["sched_mom"].tolist(), abs=1e-7)
    stepper = Stepper(OPTIMIZER, {"param": torch.zeros(2, 2, requires_grad=True)})
    decays = []
    for step in range(TOTAL):
        stepper([torch.zeros(2, 2)], step / TOTAL)
        decays.append(stepper._optimizer.param_groups[0]["weight_decay"])
    assert decays == pytest.approx(arrays["sched_wd"].tolist(), abs=1e-7)


def test_parameter_groups_are_the_references(arrays, reference):
    model = reference()
    params = dict(model.named_parameters())
    groups = LeopartLearner(**SETTINGS).groups(model)
    assert [len(group.names) for group in groups] == arrays["param_group_counts"].tolist()
    assert [sum(params[name].numel() for name in group.names) for group in groups] == arrays["param_group_sizes"].tolist()
    assert [(group.lr_factor, group.decayed) for group in groups] == [(1, True), (1, False), (10, True), (10, False)]
