"""ALBEF in a federation: silos keep copies and queues of their own, on every engine and through a restart."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import run
from fedvision.arrays import unpack
from fedvision.errors import RunError
from fedvision.wordpiece import WordPiece
from server.checkpoint import Checkpoint

SMALL = {
    "rounds": 2,
    "tensorboard": False,
    "data.examples": 60,
    "data.test_examples": 12,
    "learner.queue": 16,
    "learner.dropout": 0.1,
    "strategy.epochs": 1,
    "strategy.batch_size": 8,
}


def trained(here, **changes):
    given = {key: changes.pop(key) for key in ("resume", "on_round") if key in changes}
    return run("albef-silos", {**SMALL, **changes}, draw=False, out=here, **given)


def kept(done):
    return Checkpoint.load(done.path / "checkpoint.safetensors").clients


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*subprocess.*:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_engines_give_the_same_bits_and_silos_keep_the_same(here):
    runs = [trained(here / name, **{"engine.name": name}) for name in ("in-process", "ray")]
    one, other = (load_file(done.path / "model.safetensors") for done in runs)
    assert same(one, other)
    ours, theirs = map(kept, runs)
    assert len(ours) == 4
    for client in ours:
        assert same(unpack(ours[client]["private"]), unpack(theirs[client]["private"]))


def test_what_travels_is_without_copies_and_queues_and_silos_differ_in_them(here):
    done = trained(here / "run")
    model = load_file(done.path / "model.safetensors")
    assert model.keys() >= {"temp", "vision_proj.weight", "itm_head.bias"}
    assert not [name for name in model if "queue" in name or name.split(".")[0].endswith("_m")]
    first, second = (unpack(kept(done)[client]["private"]) for client in list(kept(done))[:2])
    assert not torch.equal(first["image_queue"], second["image_queue"])
    assert not torch.equal(first["vision_proj_m.weight"], second["vision_proj_m.weight"])


def test_copies_travel_if_they_are_shared(here):
    model = load_file(trained(here / "run", **{"learner.copies": "shared", "rounds": 1}).path / "model.safetensors")
    assert "vision_proj_m.weight" in model and "image_queue" not in model


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(here):
    whole = trained(here / "whole", checkpoint_every=1)

    def stop(row):
        if row["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(here / "run", on_round=stop, checkpoint_every=1)
    resumed = trained(here / "run", resume=True, checkpoint_every=1)
    assert same(*(load_file(done.path / "model.safetensors") for done in (whole, resumed)))


@pytest.mark.parametrize("strategy", ["fedsgd", "geometric", "fedprox", "scaffold", "fedmedian"])
def test_strategies_of_every_kind_train_it(here, strategy):
    steps = {} if strategy in ("fedsgd", "geometric") else {"steps": 1, "batch_size": 8}
    kept = {key: value for key, value in SMALL.items() if not key.startswith("strategy.")}
    done = run("albef-silos", {**kept, "rounds": 1, "strategy": {"name": strategy, **steps}}, draw=False, out=here / "run")
    assert np.isfinite(done.rounds["test_loss"]).all()


def test_a_run_with_another_vocabulary_is_another_run(here):
    words = list(WordPiece.of_file("scenes").words)
    file = here / "vocab.txt"
    file.write_text("\n".join(words))
    own = {"learner.vocabulary": str(file), "rounds": 1}
    trained(here / "run", **own)
    file.write_text("\n".join([*words[:-2], words[-1], words[-2]]))
    with pytest.raises(RunError, match="holds a run of another"):
        trained(here / "run", resume=True, **own)
