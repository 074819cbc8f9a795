"""Leopart in a federation: silos keep teachers and queues of their own, on every engine and through a restart."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import run
from fedvision.arrays import unpack
from fedvision.errors import ExperimentError
from server.checkpoint import Checkpoint

SMALL = {
    "rounds": 2,
    "tensorboard": False,
    "data.examples": 48,
    "data.test_examples": 8,
    "data.size": 32,
    "learner.local_size": 16,
    "learner.queue": 64,
    "learner.drop_path": 0.1,
    "strategy.steps": 2,
    "strategy.batch_size": 6,
}


def trained(here, **changes):
    given = {key: changes.pop(key) for key in ("resume", "on_round") if key in changes}
    return run("leopart-silos", {**SMALL, **changes}, draw=False, out=here, **given)


def kept(done):
    return Checkpoint.load(done.path / "checkpoint.safetensors").clients


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*subprocess.*:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_engines_give_the_same_bits_and_silos_keep_the_same(here):
    runs = [trained(here / name, **{"engine.name": name, "strategy.arranged": True}) for name in ("in-process", "ray")]
    assert same(*(load_file(done.path / "model.safetensors") for done in runs))
    ours, theirs = map(kept, runs)
    assert len(ours) == 4
    for client in ours:
        assert same(unpack(ours[client]["private"]), unpack(theirs[client]["private"]))


def test_what_travels_is_the_network_and_silos_differ_in_what_they_keep(here):
    done = trained(here / "run")
    model = load_file(done.path / "model.safetensors")
    assert {name.split(".")[0] for name in model} == {"model"}
    first, second = (unpack(kept(done)[client]["private"]) for client in list(kept(done))[:2])
    assert first.keys() == second.keys() and first["queue"].any() and not torch.equal(first["queue"], second["queue"])
    assert not torch.equal(first["teacher.prototypes.weight"], second["teacher.prototypes.weight"])
    assert {"train_token_std", "train_assignment_entropy", "train_collapsed", "test_token_std"} <= set(done.rounds)


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(here):
    whole = trained(here / "whole", checkpoint_every=1)

    def stop(row):
        if row["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(here / "run", on_round=stop, checkpoint_every=1)
    resumed = trained(here / "run", resume=True, checkpoint_every=1)
    assert same(*(load_file(done.path / "model.safetensors") for done in (whole, resumed)))


@pytest.mark.parametrize("strategy", ["fedsgd", "geometric", "fedprox", "fedadam", "fedmedian", "scaffold"])
def test_strategies_of_every_kind_train_it(here, strategy):
    steps = {} if strategy in ("fedsgd", "geometric") else {"steps": 1, "batch_size": 6}
    steps |= {"arranged": True} if strategy in ("fedprox", "fedadam", "fedmedian") else {}
    kept = {key: value for key, value in SMALL.items() if not key.startswith("strategy.")}
    done = run("leopart-silos", {**kept, "rounds": 1, "strategy": {"name": strategy, **steps}}, draw=False, out=here / "run")
    assert np.isfinite(done.rounds["test_loss"]).all()


def test_silos_whose_prototypes_change_places_agree_if_they_are_arranged(here, monkeypatch):
    from fedvision import silo

    shuffled = silo.Silo.descend

    def descend(self, *arguments, **options):
        loss = shuffled(self, *arguments, **options)
        state = self.model.state_dict()
        for name in ("model.prototypes.weight", "teacher.prototypes.weight"):
            state[name].copy_(state[name].roll(int(self.rng.initial_seed() % 7), 0))
        return loss

    straight = trained(here / "straight", rounds=1)
    monkeypatch.setattr(silo.Silo, "descend", descend)
    mixed, arranged = (trained(here / str(chosen), rounds=1, **{"strategy.arranged": chosen}) for chosen in (False, True))
    plain, wild, tidy = (load_file(done.path / "model.safetensors") for done in (straight, mixed, arranged))
    assert torch.equal(tidy["model.prototypes.weight"], plain["model.prototypes.weight"])
    assert wild["model.prototypes.weight"].norm(dim=1).mean() < 0.8 * plain["model.prototypes.weight"].norm(dim=1).mean()
    ours, theirs = (unpack(next(iter(kept(done).values()))["private"]) for done in (straight, arranged))
    assert torch.equal(ours["teacher.prototypes.weight"], theirs["teacher.prototypes.weight"])


def test_scaffold_cannot_arrange_rows(here):
    with pytest.raises(ExperimentError, match=r"strategy\.arranged must be false"):
        run("leopart-silos", {**SMALL, "strategy": {"name": "scaffold", "arranged": True}}, draw=False, out=here / "run")
