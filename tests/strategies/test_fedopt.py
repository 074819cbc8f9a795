"""FedAvgM, FedAdam and FedYogi equal loops over single numbers."""

import copy
import math

import pytest
import torch
from torch import nn

from fedvision.data import Examples
from fedvision.learners.classifier import Classifier
from fedvision.models import MLP
from fedvision.seeds import generator
from strategies.fedavg import FedAvg
from strategies.fedopt import FedAdam, FedAvgM, FedYogi

DELTAS = [0.5, -0.2, 0.0, 3.0, -0.001]


def played(strategy, deltas, start=1.0):
    """The global number after each round in which the clients' mean changes by delta."""
    x, seen = torch.tensor([start], dtype=torch.float64), []
    for delta in deltas:
        x = strategy.server_update({"w": x}, {"params": {"w": x + delta}})["w"]
        seen.append(x.item())
    return seen


def test_fedavgm_adds_up_changes_with_momentum():
    x, v, expected = 1.0, 0.0, []
    for delta in DELTAS:
        v = 0.8 * v + delta
        x = x + 0.5 * v
        expected.append(x)
    assert played(FedAvgM(server_lr=0.5, momentum=0.8), DELTAS) == pytest.approx(expected, rel=1e-12)


def test_fedadam_scales_the_mean_change_by_its_second_moment():
    x, m, v, expected = 1.0, 0.0, 0.0, []
    for delta in DELTAS:
        m = 0.7 * m + 0.3 * delta
        v = 0.9 * v + 0.1 * delta**2
        x = x + 0.05 * m / (math.sqrt(v) + 0.01)
        expected.append(x)
    assert played(FedAdam(server_lr=0.05, beta1=0.7, beta2=0.9, tau=0.01), DELTAS) == pytest.approx(expected, rel=1e-12)


def test_fedyogi_moves_its_second_moment_by_sign():
    x, m, v, expected = 1.0, 0.0, 0.0, []
    for delta in DELTAS:
        m = 0.7 * m + 0.3 * delta
        difference = v - delta**2
        v = v - 0.1 * delta**2 * ((difference > 0) - (difference < 0))
        x = x + 0.05 * m / (math.sqrt(v) + 0.01)
        expected.append(x)
    found = played(FedYogi(server_lr=0.05, beta1=0.7, beta2=0.9, tau=0.01), DELTAS)
    assert found == pytest.approx(expected, rel=1e-12)
    assert found != pytest.approx(played(FedAdam(server_lr=0.05, beta1=0.7, beta2=0.9, tau=0.01), DELTAS), rel=1e-3)


def test_the_first_adaptive_steps_are_about_as_large_whatever_the_change():
    for kind in (FedAdam, FedYogi):
        large, small = (played(kind(server_lr=0.1, tau=1e-9), [delta])[0] - 1 for delta in (100.0, 0.01))
        assert large == pytest.approx(small, rel=1e-6)


@pytest.mark.parametrize("kind", [FedAvgM, FedAdam, FedYogi])
def test_the_moments_are_the_state(kind):
    one, other = kind(), kind()
    head = played(one, DELTAS[:3])
    other.load_state(copy.deepcopy(one.state()))
    assert played(one, DELTAS[3:], head[-1]) == played(other, DELTAS[3:], head[-1]) != played(kind(), DELTAS[3:], head[-1])


class Toy(Classifier):
    """A tiny classifier in float64, with BatchNorm."""

    normalized = True

    def build(self, spec=None, rng=None):
        with torch.random.fork_rng():
            torch.manual_seed(2)
            if not self.normalized:
                return MLP((1, 2, 3), (5,), 3).double()
            return nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).double()


class Plain(Toy):
    """Without."""

    normalized = False


def parts_of(*sizes):
    parts = []
    for silo, n in enumerate(sizes):
        rng = generator(3, "examples", silo)
        image = 0.1 * torch.randn(n, 1, 2, 3, generator=rng).double()
        parts.append(Examples({"image": image, "label": torch.randint(3, (n,), generator=rng)}))
    return parts


def test_without_momentum_and_with_a_step_of_one_it_is_fedavg(federate):
    learner, parts = Plain(), parts_of(8, 5)
    one, other = (federate(strategy, learner, learner.build(), parts) for strategy in (FedAvgM(momentum=0.0), FedAvg()))
    for number in (1, 2, 3):
        one.round(number)
        other.round(number)
    assert all(torch.allclose(one.arrays[name], other.arrays[name], rtol=1e-12, atol=1e-14) for name in other.arrays)


@pytest.mark.parametrize("kind", [FedAvgM, FedAdam, FedYogi])
def test_buffers_are_averaged_and_never_stepped(federate, kind):
    """Momentum would carry BatchNorm's running variances, which fall from 1 to nearly 0 here, below 0."""
    learner, parts = Toy(), parts_of(8, 16)
    strategy = kind(server_lr=1.0, batch_size=4, shuffle=False, client_optimizer={"name": "SGD", "lr": 1e-3})
    federation = federate(strategy, learner, learner.build(), parts)
    for number in range(1, 16):
        federation.round(number)
        for name in ("2.running_var", "2.running_mean"):
            small, large = (answer["buffers"][name] for answer in federation.answers())
            assert torch.allclose(federation.arrays[name], (8 * small + 16 * large) / 24, rtol=1e-12)
        assert set(federation.answers()[0]) == {"params", "buffers"}
    assert federation.arrays["2.num_batches_tracked"].dtype == torch.int64
    assert (federation.arrays["2.running_var"] < 0.1).all(), "the test's variances do not fall"
