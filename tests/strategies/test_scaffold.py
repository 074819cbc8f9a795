"""SCAFFOLD equals a naive loop of the paper's algorithm 1 with option II."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedvision.arrays import unpack
from fedvision.data import Examples
from fedvision.errors import ExperimentError
from fedvision.learners.classifier import Classifier
from fedvision.models import MLP
from fedvision.seeds import generator
from strategies.fedavg import FedAvg
from strategies.scaffold import Scaffold

LR = 0.1
SGD = {"name": "SGD", "lr": LR}


class Toy(Classifier):
    """A tiny classifier in float64."""

    def build(self, spec=None, rng=None):
        with torch.random.fork_rng():
            torch.manual_seed(2)
            return MLP((1, 2, 3), (5,), 3).double()


class Normalized(Toy):
    """With BatchNorm."""

    def build(self, spec=None, rng=None):
        with torch.random.fork_rng():
            torch.manual_seed(2)
            model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
            return model.double()


def parts_of(*sizes):
    parts = []
    for silo, n in enumerate(sizes):
        rng = generator(3, "examples", silo)
        image = torch.randn(n, 1, 2, 3, generator=rng).double() * (1 + silo)
        parts.append(Examples({"image": image, "label": torch.randint(3, (n,), generator=rng)}))
    return parts


def naive_rounds(model, parts, cohorts, eta_g, batches_of):
    """Algorithm 1, option II: y <- y - eta_l (g(y) - c_i + c);  c_i+ <- c_i - c + (x - y) / (K eta_l)."""
    params = dict(model.named_parameters())
    c = {name: torch.zeros_like(param) for name, param in params.items()}
    own = [copy.deepcopy(c) for _ in parts]
    for cohort in cohorts:
        x = {name: param.detach().clone() for name, param in params.items()}
        changes_y, changes_c = [], []
        for i in cohort:
            model.load_state_dict(x)
            batches = batches_of(parts[i])
            for batch in batches:
                slopes = torch.autograd.grad(F.cross_entropy(model(batch.image), batch.label), list(params.values()))
                with torch.no_grad():
                    for (name, y), g in zip(params.items(), slopes, strict=True):
                        y.sub_(LR * (g - own[i][name] + c[name]))
            ended = {name: y.detach().clone() for name, y in params.items()}
            plus = {name: own[i][name] - c[name] + (x[name] - ended[name]) / (len(batches) * LR) for name in x}
            changes_y.append({name: ended[name] - x[name] for name in x})
            changes_c.append({name: plus[name] - own[i][name] for name in x})
            own[i] = plus
        size = len(cohort)
        model.load_state_dict({name: x[name] + eta_g * sum(change[name] for change in changes_y) / size for name in x})
        c = {name: c[name] + size / len(parts) * sum(change[name] for change in changes_c) / size for name in x}
    return {name: param.detach().clone() for name, param in params.items()}, c, own


def close(one, other):
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], rtol=1e-9, atol=1e-12) for name in other)


def played(federation, rounds):
    cohorts = []
    for number in range(1, rounds + 1):
        federation.round(number)
        cohorts.append(list(federation.strategy.cohort))
    return cohorts


@pytest.mark.parametrize("server_lr", [1.0, 0.7])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rounds_equal_those_of_a_naive_loop(federate, fraction, server_lr):
    learner, parts = Toy(), parts_of(7, 5, 9, 4)
    options = {"epochs": 2, "batch_size": 4, "shuffle": False, "client_optimizer": SGD}
    federation = federate(Scaffold(fraction=fraction, server_lr=server_lr, seed=2, **options), learner, learner.build(), parts)
    cohorts = played(federation, 4)
    if fraction < 1:
        assert any(set(one) != set(two) for one, two in pairwise(cohorts)), "the same clients in every round"
        assert any(set(one) & set(two) for one, two in pairwise(cohorts)), "no client takes part twice in a row"
    model, c, own = naive_rounds(learner.build(), parts, cohorts, server_lr, lambda part: 2 * list(part.batches(4)))
    assert close(federation.arrays, model)
    assert close(federation.strategy.state(), c)
    for client, state in federation.grid.client_states().items():
        assert close(unpack(state.array_records["control"]), own[client])


def test_a_given_number_of_steps_is_the_k_of_the_control_variates(federate):
    learner, parts = Toy(), parts_of(7, 5)
    strategy = Scaffold(steps=3, batch_size=4, shuffle=False, client_optimizer=SGD)
    federation = federate(strategy, learner, learner.build(), parts)
    model, c, _ = naive_rounds(learner.build(), parts, played(federation, 3), 1.0, lambda part: (2 * list(part.batches(4)))[:3])
    assert close(federation.arrays, model)
    assert close(federation.strategy.state(), c)


def test_the_first_round_is_fedavg_with_equal_clients(federate):
    learner, parts, options = Toy(), parts_of(7, 5), {"epochs": 2, "client_optimizer": SGD}
    one = federate(Scaffold(**options), learner, learner.build(), parts)
    other = federate(FedAvg(weight_by="clients", **options), learner, learner.build(), parts)
    one.round(1)
    other.round(1)
    assert close(one.arrays, other.arrays)
    one.round(2)
    other.round(2)
    assert not close(one.arrays, other.arrays)


def test_after_one_full_batch_step_the_controls_are_the_gradients(federate):
    learner, parts = Toy(), parts_of(7, 5)
    federation = federate(Scaffold(steps=1, batch_size=9, shuffle=False, client_optimizer=SGD), learner, learner.build(), parts)
    federation.round(1)
    model, gradients = learner.build(), []
    for client, part in enumerate(parts):
        slopes = torch.autograd.grad(F.cross_entropy(model(part.image), part.label), list(model.parameters()))
        gradients.append(dict(zip(dict(model.named_parameters()), slopes, strict=True)))
        assert close(unpack(federation.grid.client_states()[client].array_records["control"]), gradients[-1])
    assert close(federation.strategy.state(), {name: (gradients[0][name] + gradients[1][name]) / 2 for name in gradients[0]})


def test_the_mean_control_travels_down_once_there_is_one_and_only_changes_travel_up(federate):
    learner, parts = Toy(), parts_of(7, 5)
    federation = federate(Scaffold(client_optimizer=SGD), learner, learner.build(), parts)
    for number, down in ((1, {"arrays"}), (2, {"arrays", "control"})):
        federation.round(number)
        for message, answer in federation.messages:
            assert set(message.content.array_records) == down
            assert set(answer.content.array_records) == {"params", "control"}


def test_a_large_server_step_leaves_running_variances_to_the_mean(federate):
    learner, parts = Normalized(), parts_of(8, 8)
    strategy = Scaffold(server_lr=30.0, batch_size=4, client_optimizer={"name": "SGD", "lr": 1e-3})
    federation = federate(strategy, learner, learner.build(), parts)
    federation.round(1)
    for name in ("2.running_var", "2.running_mean"):
        mean = sum(answer["buffers"][name] for answer in federation.answers()) / 2
        assert torch.allclose(federation.arrays[name], mean, rtol=1e-12)


@pytest.mark.parametrize("optimizer", [{"name": "Adam", "lr": 0.1}, {"name": "SGD", "lr": 0.1, "momentum": 0.9}])
def test_other_optimizers_than_plain_descent_are_refused(optimizer):
    with pytest.raises(ExperimentError, match="scaffold needs plain SGD"):
        Scaffold(client_optimizer=optimizer)
