"""What travels, what stays in the silo, and what never changes."""

from dataclasses import dataclass

import pytest
import torch
from flwr.app import RecordDict
from torch import nn

from fedvision.data import Spec
from fedvision.errors import ExperimentError
from fedvision.holdings import Holdings
from fedvision.learners.classifier import Classifier
from fedvision.models import MLP
from fedvision.seeds import generator

SPEC = Spec((3,), 3)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


@dataclass(frozen=True, kw_only=True)
class Remembering(Classifier):
    """Its second hidden layer is private and begins as a copy of what is shared; its classifier never changes."""

    def holding(self, name):
        if name.startswith("classifier"):
            return "constant"
        return "private" if name.startswith("hidden2") else super().holding(name)

    def begin(self, model):
        model.hidden2.weight.copy_(model.hidden1.weight)


def half(arrays):
    return {name: torch.full_like(tensor, 0.5) for name, tensor in arrays.items()}


def test_everything_travels_unless_a_learner_says_otherwise():
    learner = Classifier(hidden=(2,))
    model = learner.build(SPEC, generator(0))
    holdings = Holdings.of(learner, model)
    assert list(holdings.shared) == list(model.state_dict()) and not holdings.private


def test_loading_copies_every_array():
    learner, model = Classifier(), MLP((3,), (2,), 1)
    arrays = half(model.state_dict())
    held = Holdings.of(learner, model).load(model, arrays)
    arrays["hidden1.weight"].zero_()
    assert all(param.eq(0.5).all() and param.requires_grad for param in model.parameters())
    assert held["hidden1.weight"].data_ptr() == model.hidden1.weight.data_ptr()


def test_what_stays_is_kept_in_the_state_of_its_silo_and_the_rest_is_that_of_the_server():
    learner = Classifier(hidden=(2, 2), private=("hidden2.*",))
    model = learner.build(SPEC, generator(0))
    holdings, one, other = Holdings.of(learner, model), RecordDict(), RecordDict()
    assert set(holdings.private) == {"hidden2.weight", "hidden2.bias"}
    begun = model.hidden2.weight.detach().clone()
    for state, value in ((one, 1.0), (other, 2.0)):
        holdings.load(model, half(holdings.shared), state)
        assert torch.equal(model.hidden2.weight, begun) and model.hidden1.weight.eq(0.5).all()
        nn.init.constant_(model.hidden2.weight, value)
        holdings.keep(model, state)
    nn.init.zeros_(model.hidden2.weight)
    for state, value in ((one, 1.0), (other, 2.0)):
        holdings.load(model, half(holdings.shared), state)
        assert model.hidden2.weight.eq(value).all()
    holdings.load(model, holdings.shared)  # as the server does
    assert torch.equal(model.hidden2.weight, begun)


def test_a_silo_that_keeps_nothing_yet_begins_at_what_it_is_sent_and_constants_are_left_alone():
    learner = Remembering(hidden=(3, 3))
    model = learner.build(SPEC, generator(0))
    holdings, state = Holdings.of(learner, model), RecordDict()
    constant = model.classifier.weight.detach().clone()
    holdings.load(model, half(holdings.shared), state)
    assert model.hidden2.weight.eq(0.5).all() and torch.equal(model.classifier.weight, constant)
    assert set(holdings.shared) == {"hidden1.weight", "hidden1.bias"}
    holdings.keep(model, state)
    holdings.load(model, {name: torch.zeros_like(tensor) for name, tensor in holdings.shared.items()}, state)
    assert model.hidden2.weight.eq(0.5).all(), "what is kept is not begun again"


def test_trained_parameters_that_stay_are_named():
    learner = Classifier(hidden=(2,), private=("classifier.weight",))
    model = learner.build(SPEC, generator(0))
    assert Holdings.of(learner, model).keeps_trained(model) == ["classifier.weight"]


def test_a_tied_array_travels_once_and_is_exported_under_all_its_names():
    model = Tied()
    holdings = Holdings.of(Classifier(), model)
    assert set(holdings.shared) == {"first.weight", "first.bias", "second.bias"} and holdings.tied == {"second.weight": "first.weight"}
    assert holdings.exported(holdings.shared).keys() == model.state_dict().keys()
    holdings.load(model, half(holdings.shared))
    assert model.second.weight.eq(0.5).all()


@pytest.mark.parametrize(
    ("private", "reason"),
    [(("hiden*",), r"no array of the model matches 'hiden\*'; its arrays are hidden1.weight, "), (("*",), "leaves nothing to share")],
)
def test_patterns_that_make_no_sense_are_refused(private, reason):
    learner = Classifier(hidden=(2,), private=private)
    with pytest.raises(ExperimentError, match=reason):
        Holdings.of(learner, learner.build(SPEC, generator(0)))
