import pytest
import torch

from fedvision import optimizers
from fedvision.errors import ExperimentError

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
