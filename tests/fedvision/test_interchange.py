import itertools

import pytest
import torch
from flwr.app import RecordDict
from torch.nn import functional as F

from fedvision.data.federated import Spec
from fedvision.interchange import arrange, matched
from fedvision.learners.leopart import LeopartLearner
from fedvision.seeds import generator

SPEC = Spec((3, 32, 32), 2)


def test_rows_are_matched_by_the_best_of_all_orders():
    rows, others = (torch.randn(5, 3, generator=generator(0, which)) for which in ("rows", "others"))
    cosines = F.normalize(others, dim=1) @ F.normalize(rows, dim=1).T
    best = max(itertools.permutations(range(5)), key=lambda order: sum(cosines[place, row] for place, row in enumerate(order)))
    assert matched(rows, others).tolist() == list(best)


def test_rows_in_another_order_are_put_back_with_what_goes_with_them():
    learner = LeopartLearner(patch=8)
    model = learner.build(SPEC, generator(0, "model"))
    sent = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    order = torch.randperm(16, generator=generator(0, "order"))
    with torch.no_grad():
        model.teacher.prototypes.weight.copy_(torch.arange(16.0)[:, None].expand(-1, 32))
        for weight in (model.model.prototypes.weight, model.teacher.prototypes.weight):
            weight.copy_(weight[order])
    arrange(learner, model, sent, RecordDict())
    assert torch.equal(model.model.prototypes.weight, sent["model.prototypes.weight"])
    assert model.teacher.prototypes.weight[:, 0].tolist() == list(range(16))


def test_a_learner_without_such_rows_is_left_alone():
    from fedvision.learners.classifier import Classifier

    model = Classifier().build(SPEC, generator(0, "model"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arrange(Classifier(), model, {}, RecordDict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_how_long_rows_are_does_not_matter(scale):
    rows = torch.eye(4)[[2, 0, 3, 1]] * scale
    assert matched(rows, torch.eye(4)).tolist() == [1, 3, 0, 2]
