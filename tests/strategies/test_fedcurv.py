"""FedCurv equals a naive loop in which every client sees all others' parameters and Fisher information."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from torch import nn
from torch.nn import functional as F

from fedvision.arrays import pack, unpack
from fedvision.data import Examples
from fedvision.learners.classifier import Classifier
from fedvision.models import CNN, MLP
from fedvision.seeds import generator
from fedvision.silo import Silo
from strategies.fedavg import FedAvg
from strategies.fedcurv import FedCurv, fisher, penalty

LR = 0.1


class Normalized(nn.Module):
    """A model whose BatchNorm would mix examples in training mode, and whose Dropout would draw."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5))
        self.classifier = nn.Linear(4, 3)

    def forward(self, x):
        return self.classifier(self.body(x))


MODELS = {
    "mlp": lambda: MLP((1, 6, 6), (5,), 3),
    "cnn": lambda: CNN((1, 14, 14), (8, 8, 8), 3),
    "normalized": Normalized,
    "logistic regression": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3)),
}


@dataclass(frozen=True, kw_only=True)
class Toy(Classifier):
    """A tiny classifier in float64."""

    kind: str = "mlp"

    def build(self, spec=None, rng=None):
        with torch.random.fork_rng():
            torch.manual_seed(2)
            return MODELS[self.kind]().double()


def parts_of(sizes, kind="mlp"):
    side, parts = 14 if kind == "cnn" else 6, []
    for silo, n in enumerate(sizes):
        rng = generator(3, "examples", silo)
        image = torch.randn(n, 1, side, side, generator=rng).double() * (1 + silo)
        parts.append(Examples({"image": image, "label": torch.randint(3, (n,), generator=rng)}))
    return parts


def nll(model, part):
    return F.cross_entropy(model(part.image), part.label)


def silo_of(learner, part, arrays=None, state=None):
    model = learner.build()
    return Silo(learner, model, dict(model.state_dict()) if arrays is None else arrays, part, state)


def looped_fisher(model, part):
    """The mean of squared gradients, one example after the other."""
    total = {name: torch.zeros_like(param) for name, param in model.named_parameters()}
    for i in range(len(part)):
        gradients = torch.autograd.grad(nll(model, part[i : i + 1]), list(model.parameters()))
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += gradient**2 / len(part)
    return total


def vector(named):
    return torch.cat([named[name].detach().reshape(-1) for name in sorted(named)])


def drawn(like, seed):
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.rand(tensor.shape, generator=rng, dtype=tensor.dtype) for name, tensor in like.items()}


# ---- the Fisher information --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [64, 3])
@pytest.mark.parametrize("kind", list(MODELS))
def test_the_fisher_information_is_the_mean_of_squared_gradients_of_single_examples(kind, chunk_size):
    learner, part = Toy(kind=kind), parts_of((7,), kind)[0]
    silo = silo_of(learner, part)
    expected, found = looped_fisher(learner.build().eval(), part), fisher(silo, chunk_size)
    assert found.keys() == expected.keys() == silo.params.keys()
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-14), name
        assert not found[name].requires_grad


def test_the_fisher_information_leaves_model_buffers_and_mode_as_they_were():
    silo = silo_of(Toy(kind="normalized"), parts_of((7,))[0])
    before = silo.arrays()
    fisher(silo, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in silo.arrays().items())
    assert silo.model.training


def test_frozen_layers_have_no_fisher_information():
    silo = silo_of(Toy(), parts_of((7,))[0])
    silo.model.hidden1.requires_grad_(False)
    found, expected = fisher(silo, 64), looped_fisher(Toy().build(), silo.train)
    assert set(found) == {"classifier.weight", "classifier.bias"}
    assert all(torch.allclose(found[name], expected[name], rtol=1e-9) for name in found)


# ---- the penalty ---------------------------------------------------------------------------------------------------------


def test_the_penalty_is_the_explicit_sum_over_the_others_up_to_a_constant():
    template = dict(Toy().build().named_parameters())
    others = [(drawn(template, j), drawn(template, 10 + j)) for j in range(4)]  # w_j, I_j
    u = {name: sum(information[name] for _, information in others) for name in template}
    v = {name: sum(information[name] * at[name] for at, information in others) for name in template}

    def explicit(params):
        return sum((information[name] * (params[name] - at[name]) ** 2).sum() for at, information in others for name in params)

    differences = []
    for seed in (20, 21, 22):
        w = {name: tensor.requires_grad_() for name, tensor in drawn(template, seed).items()}
        found, expected = penalty(w, u, v), explicit(w)
        differences.append((expected - found).item())
        slopes, slopes_expected = (torch.autograd.grad(value, list(w.values())) for value in (found, expected))
        assert all(torch.allclose(one, other, rtol=1e-10, atol=1e-12) for one, other in zip(slopes, slopes_expected, strict=True))
    constant = sum((information[name] * at[name] ** 2).sum() for at, information in others for name in template)
    assert differences == pytest.approx([constant.item()] * 3, rel=1e-10)


def content_of(number, arrays, **sums):
    return RecordDict({"arrays": pack(arrays), "config": ConfigRecord({"server-round": number}), **{k: pack(v) for k, v in sums.items()}})


def test_the_own_share_is_subtracted():
    """A client alone in the previous round pays nothing: the sums are its own share."""
    learner, part = Toy(), parts_of((7,))[0]
    strategy = FedCurv(penalty_weight=50.0, steps=3, shuffle=False)
    first = silo_of(learner, part)
    update = strategy.client_update(first, content_of(1, first.arrays()))
    arrays = dict(update.records["arrays"])
    again = strategy.client_update(
        silo_of(learner, part, arrays, first.state), content_of(2, arrays, u=update.records["u"], v=update.records["v"])
    )
    plain = FedAvg(steps=3, shuffle=False).client_update(silo_of(learner, part, arrays), content_of(2, arrays))
    assert torch.allclose(vector(again.records["arrays"]), vector(plain.records["arrays"]), rtol=1e-9)


def test_who_skipped_the_previous_round_subtracts_nothing():
    learner, part = Toy(), parts_of((7,))[0]
    strategy = FedCurv(penalty_weight=5.0, steps=2, shuffle=False)
    first = silo_of(learner, part)
    update = strategy.client_update(first, content_of(1, first.arrays()))
    arrays, sums = dict(update.records["arrays"]), {"u": drawn(first.params, 5), "v": drawn(first.params, 6)}
    skipped = strategy.client_update(silo_of(learner, part, arrays, first.state), content_of(3, arrays, **sums))
    newcomer = strategy.client_update(silo_of(learner, part, arrays), content_of(3, arrays, **sums))
    assert torch.equal(vector(skipped.records["arrays"]), vector(newcomer.records["arrays"]))


def test_the_first_round_has_no_penalty(federate):
    learner, parts = Toy(), parts_of((7, 5))
    options = {"epochs": 2, "batch_size": 3, "shuffle": False}
    curved, plain = (
        federate(kind, learner, learner.build(), parts) for kind in (FedCurv(penalty_weight=9.0, **options), FedAvg(**options))
    )
    curved.round(1)
    plain.round(1)
    assert torch.equal(vector(curved.arrays), vector(plain.arrays))
    curved.round(2)
    plain.round(2)
    assert not torch.allclose(vector(curved.arrays), vector(plain.arrays), rtol=1e-3)


def test_penalty_weight_zero_is_fedavg(federate):
    learner, parts = Toy(), parts_of((7, 5))
    curved, plain = (federate(kind, learner, learner.build(), parts) for kind in (FedCurv(penalty_weight=0.0), FedAvg()))
    for number in (1, 2):
        curved.round(number)
        plain.round(number)
    assert torch.equal(vector(curved.arrays), vector(plain.arrays))


# ---- whole rounds --------------------------------------------------------------------------------------------------------


def naive_rounds(model, parts, cohorts, weight, epochs, batch_size):
    """Every client sees the others' w_j and I_j of the previous round; plain descent."""
    previous = {}
    for cohort in cohorts:
        start = {name: param.detach().clone() for name, param in model.named_parameters()}
        ended = {}
        for s in cohort:
            model.load_state_dict(start)
            for _ in range(epochs):
                for batch in parts[s].batches(batch_size):
                    objective = nll(model, batch)
                    for j, (at, information) in previous.items():
                        for name, param in model.named_parameters():
                            if j != s:
                                objective = objective + weight * (information[name] * (param - at[name]) ** 2).sum()
                    slopes = torch.autograd.grad(objective, list(model.parameters()))
                    with torch.no_grad():
                        for param, slope in zip(model.parameters(), slopes, strict=True):
                            param.sub_(LR * slope)
            ended[s] = {name: param.detach().clone() for name, param in model.named_parameters()}, looped_fisher(model, parts[s])
        examples = sum(len(parts[s]) for s in cohort)
        model.load_state_dict({name: sum(len(parts[s]) * ended[s][0][name] for s in cohort) / examples for name in start})
        previous = ended
    return dict(model.named_parameters())


@pytest.mark.parametrize("fraction", [1.0, 0.6])
def test_rounds_equal_those_of_clients_that_see_each_others_information(federate, fraction):
    learner, parts = Toy(), parts_of((7, 5, 9, 4, 6))
    options = {"epochs": 2, "batch_size": 4, "shuffle": False, "client_optimizer": {"name": "SGD", "lr": LR}}
    federation = federate(FedCurv(penalty_weight=0.7, fraction=fraction, seed=1, **options), learner, learner.build(), parts)
    cohorts = []
    for number in (1, 2, 3, 4, 5):
        federation.round(number)
        cohorts.append(list(federation.strategy.cohort))
    if fraction < 1:
        assert any(set(one) & set(two) for one, two in pairwise(cohorts)), "nobody takes part twice in a row"
        assert any(set(one) & set(three) - set(two) for one, two, three in zip(cohorts, cohorts[1:], cohorts[2:], strict=False)), (
            "nobody skips"
        )
    expected = naive_rounds(learner.build(), parts, cohorts, 0.7, epochs=2, batch_size=4)
    assert torch.allclose(vector(federation.arrays), vector(expected), rtol=1e-9, atol=1e-12)
    without = naive_rounds(learner.build(), parts, cohorts, 0.0, epochs=2, batch_size=4)
    assert not torch.allclose(vector(without), vector(expected), rtol=1e-3)


def test_only_sums_travel_down_and_three_records_up(federate):
    learner, parts = Toy(), parts_of((7, 5))
    federation = federate(FedCurv(), learner, learner.build(), parts)
    federation.round(1)
    assert all(set(message.content.array_records) == {"arrays"} for message, _ in federation.messages)
    federation.round(2)
    for message, answer in federation.messages:
        assert set(message.content.array_records) == {"arrays", "u", "v"}
        assert set(answer.content.array_records) == {"arrays", "u", "v"}


def test_the_sums_are_over_clients_however_models_are_weighted(federate):
    learner, parts = Toy(), parts_of((7, 5, 9))
    for weight_by in ("examples", "clients"):
        federation = federate(FedCurv(weight_by=weight_by), learner, learner.build(), parts)
        federation.round(1)
        answers, sums = federation.answers(), federation.strategy.state()
        for record in ("u", "v"):
            assert torch.allclose(vector(sums[record]), sum(vector(answer[record]) for answer in answers), rtol=1e-12)
        for answer in answers:
            product = {name: answer["u"][name] * answer["arrays"][name] for name in answer["u"]}
            assert torch.allclose(vector(answer["v"]), vector(product), rtol=1e-12)


def test_batchnorm_models_train_with_fedcurv(federate):
    learner, parts = Toy(kind="normalized"), parts_of((8, 8))
    federation = federate(FedCurv(batch_size=4), learner, learner.build(), parts)
    for number in (1, 2):
        federation.round(number)
    assert torch.isfinite(vector({name: tensor for name, tensor in federation.arrays.items() if tensor.is_floating_point()})).all()
    state = unpack(federation.grid.client_states()[0].array_records["u"])
    assert any(tensor.abs().max() > 0 for tensor in state.values())
