"""The accountant as a value, against opacus and against integrals of our own; clipping and noise against naive loops."""

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from flwr.common.serde import ProtoRecordDict, recorddict_from_proto, recorddict_to_proto
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.integrate import quad

from fedvision.errors import ExperimentError
from fedvision.privacy import RECORD, Ledger, OperatingSystem, Privacy, Seeded, clipped_sum, clipping_factors

STEPS = [(1.1, 0.05, 30), (0.9, 0.05, 20), (0.9, 0.1, 10)]


@pytest.mark.parametrize(("name", "kind"), [("rdp", RDPAccountant), ("prv", PRVAccountant)])
def test_epsilon_is_that_of_opacus_own_accountant_after_the_same_steps(name, kind):
    theirs, ours = kind(), Ledger()
    for noise, rate, steps in STEPS:
        for _ in range(steps):
            theirs.step(noise_multiplier=noise, sample_rate=rate)
            ours = ours.spent(noise, rate, 1)
    assert ours.entries == tuple(STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ours.epsilon(1e-4, name) == pytest.approx(theirs.get_epsilon(delta=1e-4), rel=1e-9)


def renyi_by_integral(noise: float, rate: float, order: float) -> float:
    """log E_{x ~ P}[(Q/P)^order] / (order - 1) of P = N(0, s^2) and Q = (1 - q) P + q N(1, s^2), by quadrature."""

    def integrand(x: float) -> float:
        ratio = np.logaddexp(np.log1p(-rate) if rate < 1 else -np.inf, np.log(rate) + (2 * x - 1) / (2 * noise**2))
        return math.exp(order * ratio - x**2 / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))

    value, _ = quad(integrand, -20 * noise, order + 20 * noise, limit=400, epsabs=0, epsrel=1e-11)
    return math.log(value) / (order - 1)


@pytest.mark.parametrize(("noise", "rate", "steps"), [(1.3, 0.2, 40), (4.0, 1.0, 20), (2.0, 0.5, 10), (1.0, 0.2, 8)])
def test_epsilon_is_that_of_an_independent_integral_over_the_sampled_gaussian(noise, rate, steps):
    delta, orders = 1e-3, [*(1 + tenth / 10 for tenth in range(5, 100)), *range(12, 30)]
    bounds = [steps * renyi_by_integral(noise, rate, a) + math.log1p(-1 / a) - (math.log(delta) + math.log(a)) / (a - 1) for a in orders]
    ours = Ledger().spent(noise, rate, steps).epsilon(delta, "rdp")
    assert ours == pytest.approx(min(bounds), rel=1e-4)


def test_prv_is_tighter_than_rdp_and_not_below_the_exact_epsilon_of_the_gaussian():
    ledger, delta = Ledger().spent(5.0, 1.0, 25), 1e-3

    def exact_delta(epsilon: float) -> float:  # Balle and Wang, arXiv 1805.06530, theorem 8; 25 Gaussians of 5 are one of 1
        cdf = torch.special.ndtr(torch.tensor([0.5 - epsilon, -0.5 - epsilon], dtype=torch.float64)).tolist()
        return cdf[0] - math.exp(epsilon) * cdf[1]

    tight, loose = ledger.epsilon(delta, "prv"), ledger.epsilon(delta, "rdp")
    assert tight < loose
    assert exact_delta(tight) < delta < exact_delta(tight - 0.05)


def test_a_ledger_comes_back_from_a_state_and_goes_on():
    state = RecordDict()
    assert Ledger.of(state) == Ledger()
    ledger = Ledger().spent(1.0, 0.5, 2).spent(2.0, 0.5, 1)
    state[RECORD] = ledger.record()
    assert Ledger.of(state) == ledger
    assert Ledger.of(state).spent(2.0, 0.5, 3).entries[-1] == (2.0, 0.5, 4)


NEXT_ROUND = """
import sys
from flwr.app import RecordDict
from flwr.common.serde import ProtoRecordDict, recorddict_from_proto, recorddict_to_proto
from fedvision.privacy import RECORD, Ledger
state = recorddict_from_proto(ProtoRecordDict.FromString(sys.stdin.buffer.read()))
state[RECORD] = Ledger.of(state).spent(0.9, 0.05, 20).spent(0.9, 0.1, 10).record()
sys.stdout.buffer.write(recorddict_to_proto(state).SerializeToString())
"""


def test_an_account_goes_on_in_another_process_and_costs_what_opacus_says():
    state = RecordDict({RECORD: Ledger().spent(1.1, 0.05, 30).record()})
    sent = recorddict_to_proto(state).SerializeToString()
    process = subprocess.run([sys.executable, "-c", NEXT_ROUND], input=sent, stdout=subprocess.PIPE, check=True)
    ledger = Ledger.of(recorddict_from_proto(ProtoRecordDict.FromString(process.stdout)))
    theirs = RDPAccountant()
    for noise, rate, steps in STEPS:
        for _ in range(steps):
            theirs.step(noise_multiplier=noise, sample_rate=rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ledger.epsilon(1e-4, "rdp") == pytest.approx(theirs.get_epsilon(delta=1e-4), rel=1e-9)


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_a_step_without_noise_costs_everything_and_no_step_nothing(accountant):
    assert Ledger().epsilon(1e-5, accountant) == 0
    assert Ledger().spent(1.0, 0.1, 5).spent(0.0, 0.1, 1).epsilon(1e-5, accountant) == math.inf


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_the_noise_for_a_target_spends_nearly_all_of_it(accountant):
    privacy = Privacy(target_epsilon=2.0, delta=1e-4, clipping_norm=1.0, accountant=accountant)
    spent = Ledger().spent(privacy.noise(0.1, 60), 0.1, 60).epsilon(1e-4, accountant)
    assert 1.9 < spent <= 2.0


def test_impossible_and_contradictory_budgets_are_refused():
    with pytest.raises(ExperimentError, match=r"target_epsilon = 1e-09 .* cannot be met in 10 steps .* allow more, or train less"):
        Privacy(target_epsilon=1e-9, delta=1e-12, clipping_norm=1.0).noise(1.0, 10)
    with pytest.raises(ExperimentError, match="give exactly one of the two"):
        Privacy(delta=1e-5, clipping_norm=1.0)
    with pytest.raises(ExperimentError, match="clipping_norm = inf needs noise without bound"):
        Privacy(delta=1e-5, clipping_norm=math.inf, noise_multiplier=1.0)


def test_clipping_is_that_of_a_loop_over_examples():
    rng = torch.Generator().manual_seed(3)
    parts = [torch.randn(5, 3, 2, generator=rng), torch.randn(5, 4, generator=rng)]
    sums = [torch.zeros(3, 2), torch.zeros(4)]
    for i in range(5):
        norm = math.sqrt(sum(float(part[i].square().sum()) for part in parts))
        for total, part in zip(sums, parts, strict=True):
            total.add_(part[i] * min(1.0, 2.0 / norm))
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(clipped_sum(parts, 2.0), sums, strict=True))
    assert torch.equal(clipping_factors(torch.tensor([0.0, 9.0]), math.inf), torch.ones(2))


@pytest.mark.parametrize("source", [Seeded(torch.Generator().manual_seed(0)), OperatingSystem()])
def test_noise_is_standard_normal_and_sampling_uniform(source):
    normal, uniform = source.gaussian(torch.empty(100, 400)), source.fractions(40_000)
    assert normal.shape == (100, 400) and normal.dtype == torch.float32
    assert abs(float(normal.mean())) < 0.03 and abs(float(normal.std()) - 1) < 0.03
    assert np.quantile(normal.numpy(), [0.025, 0.975]) == pytest.approx([-1.96, 1.96], abs=0.08)
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(float(uniform.mean()) - 0.5) < 0.02


def test_the_operating_systems_noise_is_never_the_same():
    assert not torch.equal(OperatingSystem().gaussian(torch.empty(8)), OperatingSystem().gaussian(torch.empty(8)))
