import math

import pytest
import torch
from flwr.app import RecordDict

from fedvision import optimizers
from fedvision.errors import ExperimentError
from fedvision.learners.learner import Group

NAMES = sorted(set(optimizers._known()))


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_of_torch_can_be_named(name):
    table = {"name": name, "lr": 0.5}
    assert optimizers.checked(table) is table
    built = optimizers.build(table, [torch.zeros(2, 2, requires_grad=True)])
    assert type(built) is getattr(torch.optim, name)
    assert built.param_groups[0]["lr"] == 0.5


def test_lists_become_tuples():
    built = optimizers.build({"name": "Adam", "betas": [0.5, 0.9]}, [torch.zeros(1, requires_grad=True)])
    assert built.param_groups[0]["betas"] == (0.5, 0.9)


ELEMENT_WISE = {"Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"}


@pytest.mark.parametrize("name", sorted(optimizers._known()))
def test_torchs_optimizers_are_element_wise_but_for_four(name):
    assert optimizers.is_element_wise({"name": name, "lr": 0.1}) == (name in ELEMENT_WISE)


def test_momentum_and_weight_decay_leave_an_optimizer_element_wise():
    assert optimizers.is_element_wise({"name": "SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1})
    assert optimizers.is_element_wise({"name": "Adam", "lr": 0.1, "amsgrad": True, "betas": [0.5, 0.9]})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "unknown optimizer None; "),
        ({"name": "adam"}, "unknown optimizer 'adam'; did you mean 'Adam'?"),
        ({"name": "Optimizer"}, "unknown optimizer 'Optimizer'"),
        ({"name": "lr_scheduler"}, "unknown optimizer 'lr_scheduler'"),
        ({"name": "SGD", "lr": 0.1, "wieght_decay": 0.1}, "optimizer SGD has no setting 'wieght_decay'; did you mean 'weight_decay'?"),
        ({"name": "SGD", "params": []}, "optimizer SGD has no setting 'params'"),
        ({"name": "Adam", "lr": -1}, "Invalid learning rate: -1"),
        ({"name": "Adam", "lr": "fast"}, "optimizer {'name': 'Adam', 'lr': 'fast'}"),
        ({"name": "Adam", "betas": [0.9]}, "optimizer {'name': 'Adam', 'betas': [0.9]}"),
        ({"name": "SGD", "lr": float("nan")}, "lr is not a number"),
        ({"name": "SGD", "lr": 0.1, "nesterov": True}, "Nesterov momentum requires a momentum"),
    ],
)
def test_a_wrong_table_is_refused_before_anything_starts(table, message):
    with pytest.raises(ExperimentError) as caught:
        optimizers.checked(table)
    assert message in str(caught.value)


def moved(table, groups=(), state=None, steps=3):
    """Two parameters after steps along a gradient of ones, at progress 0, 1/steps, ..."""
    params = {name: torch.zeros(2, requires_grad=True) for name in ("weight", "bias")}
    step = optimizers.Stepper(table, params, groups, state)
    for number in range(steps):
        step([torch.ones(2), torch.ones(2)], number / steps)
    step.end()
    return {name: param[0].item() for name, param in params.items()}


def test_groups_have_rates_and_weight_decay_of_their_own():
    groups = [Group(["bias"], lr_factor=10.0, decayed=False)]
    for table in ({"name": "SGD", "lr": 0.1}, {"name": "SGD", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.5}):
        weight, plain = 0.0, 0.0
        for _ in range(3):
            weight -= 0.1 * (1 + table.get("weight_decay", 0.0) * weight)
            plain -= 1.0
        assert moved(table, groups) == pytest.approx({"weight": weight, "bias": plain})


def test_a_schedule_multiplies_the_rate_of_every_group():
    table = {"name": "SGD", "lr": 0.1, "schedule": {"name": "gamma-cosine", "gamma": 1.0}}
    sum_of_factors = sum(math.cos(math.pi / 2 * number / 3) for number in range(3))
    assert moved(table)["weight"] == pytest.approx(-0.1 * sum_of_factors)
    grouped = moved({**table, "momentum": 0.0}, [Group(["bias"], lr_factor=2.0)])
    assert grouped == pytest.approx({"weight": -0.1 * sum_of_factors, "bias": -0.2 * sum_of_factors})


def test_a_decay_schedule_multiplies_the_weight_decay_where_there_is_any():
    table = {"name": "SGD", "lr": 0.1, "weight_decay": 0.5, "decay_schedule": {"name": "cosine", "final": 3.0}}
    weight, groups = 0.0, [Group(["bias"], decayed=False)]
    for number in range(3):
        weight -= 0.1 * (1 + 0.5 * (3 - 2 * (1 + math.cos(math.pi * number / 3)) / 2) * weight)
    assert moved(table, groups) == pytest.approx({"weight": weight, "bias": -0.3})


def test_what_a_memory_holds_of_rows_is_put_in_their_order():
    groups, state = [Group(["bias"], lr_factor=2.0)], RecordDict()
    params = {name: torch.zeros(2, requires_grad=True) for name in ("weight", "bias")}
    step = optimizers.Stepper({"name": "SGD", "lr": 0.1, "momentum": 0.9, "keep": True}, params, groups, state)
    step([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])])
    step.end()
    optimizers.reorder(state, params, groups, "weight", torch.tensor([1, 0]))
    optimizers.reorder(state, params, groups, "a buffer", torch.tensor([1, 0]))
    again = optimizers.Stepper({"name": "SGD", "lr": 0.0, "momentum": 0.9, "keep": True}, params, groups, state)
    found = {name: again._optimizer.state[param]["momentum_buffer"].tolist() for name, param in params.items()}
    assert found == {"weight": [2.0, 1.0], "bias": [3.0, 4.0]}


@pytest.mark.parametrize("table", [{"name": "SGD", "lr": 0.1, "momentum": 0.9}, {"name": "AdamW", "lr": 0.1}])
def test_a_kept_memory_is_gone_on_with_and_another_starts_afresh(table):
    params = {"weight": torch.zeros(2, requires_grad=True)}
    through = optimizers.build(table, params.values())
    state = RecordDict()
    halves = {"weight": torch.zeros(2, requires_grad=True)}
    for _ in range(2):
        step = optimizers.Stepper({**table, "keep": True}, halves, state=state)
        for _ in range(3):
            gradient = torch.tensor([1.0, -2.0])
            params["weight"].grad = gradient
            through.step()
            step([gradient])
        step.end()
    assert torch.equal(params["weight"], halves["weight"]) and optimizers.MEMORY in state
    untouched = RecordDict()
    moved(table, state=untouched)
    assert not untouched


def test_a_memory_that_is_no_numbers_cannot_be_kept():
    class Odd:
        def state_dict(self):
            return {"state": {0: {"history": [1, 2]}}}

    with pytest.raises(ExperimentError, match=r"the memory of Odd holds a list \(history\) and cannot be kept; set keep = false"):
        optimizers._memory(Odd())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "SGD", "schedule": {"name": "sine"}}, "unknown schedule 'sine'"),
        ({"name": "SGD", "weight_decay": 0.1, "decay_schedule": {"name": "sine"}}, "unknown schedule 'sine'"),
        ({"name": "SGD", "decay_schedule": {"name": "cosine"}}, "has a decay_schedule and no weight_decay"),
        ({"name": "SGD", "keep": "yes"}, "keep = 'yes': expected true or false"),
    ],
)
def test_a_clients_table_is_checked(table, message):
    with pytest.raises(ExperimentError, match=message):
        optimizers.checked_for_clients(table)
