"""Client-level privacy at the server: cohorts, clipped changes and noise against a naive loop."""

import math

import pytest
import torch

from fedvision.errors import ExperimentError
from fedvision.privacy import Privacy
from fedvision.registry import strategies
from strategies.fedavg import FedAvg
from strategies.private import Guard

ARRAYS = {"w": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0]), "steps": torch.tensor(7)}
ASKED = Privacy(unit="client", clipping_norm=0.5, noise_multiplier=0.0, delta=1e-3)


def guard(rate: float = 1.0, noise: float = 0.0, norm: float = 0.5) -> Guard:
    return Guard(Privacy(unit="client", clipping_norm=norm, noise_multiplier=noise, delta=1e-3), noise, rate, frozenset({"w", "b"}), 3)


def test_a_change_is_clipped_over_all_parameters_together_and_other_arrays_are_left_out():
    sent = {"w": torch.tensor([[4.0, 2.0]]), "b": torch.tensor([7.0]), "steps": torch.tensor(9)}
    clipped = guard().clipped({"arrays": sent, "buffers": {"steps": sent["steps"]}}, ARRAYS)
    assert clipped.keys() == {"arrays"} and clipped["arrays"].keys() == {"w", "b"}
    assert torch.allclose(clipped["arrays"]["w"], torch.tensor([[1.3, 2.0]]))  # (3, 0, 4) of length 5 becomes (0.3, 0, 0.4)
    assert torch.allclose(clipped["arrays"]["b"], torch.tensor([3.4]))


def test_what_an_answer_leaves_out_is_no_change():
    clipped = guard().clipped({"arrays": {"b": torch.tensor([3.1])}}, ARRAYS)["arrays"]
    assert torch.equal(clipped["w"], ARRAYS["w"]) and torch.allclose(clipped["b"], torch.tensor([3.1]))


def test_the_sum_is_over_the_expected_cohort_whoever_came():
    means = {"arrays": {"w": ARRAYS["w"] + 1, "b": ARRAYS["b"] - 2}}
    released = guard(rate=0.5).released(means, ARRAYS, answers=3, population=10, server_round=1)["arrays"]
    assert torch.allclose(released["w"], ARRAYS["w"] + 0.6) and torch.allclose(released["b"], ARRAYS["b"] - 1.2)


def test_one_client_more_moves_the_noiseless_release_by_at_most_the_clipping_norm():
    own, rng = guard(), torch.Generator().manual_seed(1)
    answers = [
        {"arrays": {name: ARRAYS[name] + 9 * torch.randn(ARRAYS[name].shape, generator=rng) for name in ("w", "b")}} for _ in range(5)
    ]

    def released(some):
        clipped = [own.clipped(answer, ARRAYS)["arrays"] for answer in some]
        means = {name: torch.stack([one[name] for one in clipped]).mean(0) for name in ("w", "b")}
        moved = own.released({"arrays": means}, ARRAYS, len(some), 5, 1)["arrays"]
        return 5 * torch.cat([moved[name].flatten() for name in ("w", "b")])

    assert 0.49 < (released(answers) - released(answers[1:])).norm() < 0.5001


def test_an_empty_round_is_noise_alone_of_the_right_size():
    arrays = {"w": torch.zeros(20_000)}
    own = Guard(ASKED, 2.0, 0.5, frozenset({"w"}), 3)
    released = own.released({"arrays": {}}, arrays, answers=0, population=8, server_round=1)["arrays"]["w"]
    assert float(released.std()) == pytest.approx(2.0 * 0.5 / 4, rel=0.03)
    again = own.released({"arrays": {}}, arrays, answers=0, population=8, server_round=2)["arrays"]["w"]
    assert not torch.equal(released, again)


def test_cohorts_are_drawn_client_by_client():
    drawn = [guard(rate=0.3).cohort(range(50), number) for number in range(1, 101)]
    sizes = [len(cohort) for cohort in drawn]
    assert sum(sizes) / 100 == pytest.approx(15, abs=1) and len(set(sizes)) > 5
    assert guard(rate=1.0).cohort([4, 7], 1) == [4, 7]
    assert guard(rate=0.3).cohort(range(50), 5) == drawn[4]


@pytest.mark.parametrize("name", strategies.names())
def test_every_strategy_of_the_house_says_what_privacy_covers(name):
    half = strategies.find(name).client_update
    covered = {"fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi"}
    assert ("client" in half.protects) == (name in covered)
    assert ("example" in half.protects) == (name in covered | {"scaffold", "fedmedian", "trimmed-mean", "krum"})
    assert half.protects == {"example", "client"} or half.unprotected


def test_a_strategy_that_overrides_the_mean_is_refused_though_its_clients_are_fedavgs():
    class Summing(FedAvg):
        def accumulators(self):
            from strategies.means import Sum

            return {"arrays": Sum()}

    with pytest.raises(ExperimentError, match="Summing makes something else than a mean of the clients' 'arrays'"):
        Summing().protect(ASKED, 3, {"w"})


def test_the_noise_for_a_target_is_planned_over_all_rounds():
    strategy = FedAvg(fraction=0.2)
    strategy.protect(Privacy(unit="client", clipping_norm=1.0, target_epsilon=3.0, delta=1e-3), 50, {"w"})
    assert strategy.guard.noise_multiplier == pytest.approx(strategy.guard.privacy.noise(0.2, 50)) and math.isfinite(strategy.guard.rate)
