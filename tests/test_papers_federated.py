"""DoubleMatch and USI in a federation: ten unequal clients, one without labels, one with a single example."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import run
from benchmarks.runs import Run
from fedvision.arrays import unpack
from fedvision.data import Examples, FederatedData
from fedvision.data.federated import Silos
from fedvision.errors import ExperimentError
from fedvision.experiment import Experiment
from fedvision.learners.doublematch import DoubleMatch
from server.checkpoint import Checkpoint

SKEWED = {"name": "dirichlet", "clients": 10, "alpha": 0.3}

DOUBLEMATCH = {
    "experiment": "doublematch-tiny",
    "labels": {"count": 60, "unlabeled_clients": 2},
    "learner.filters": 4,
    "learner.labeled_batch": 4,
    "strategy.batch_size": 16,
}

USI = {
    "experiment": "usi-tiny",
    "data.examples": 300,
    "data.test_examples": 200,
    "learner.widths": [8, 8],
    "learner.teacher.widths": [8, 16],
    "learner.teacher.steps": 30,
    "learner.teacher.data.examples": 300,
    "learner.average": "private",
    "strategy.epochs": 1,
}

LEARNERS = pytest.mark.parametrize("changes", [DOUBLEMATCH, USI], ids=["doublematch", "usi"])


def trained(here: Path, changes: dict, *, rounds: int = 2, **others) -> Run:
    named = {key: value for key, value in changes.items() if key != "experiment"}
    steps = {"strategy.steps": 3} if changes is DOUBLEMATCH else {}
    fixed = {"rounds": rounds, "evaluate_every": 1, "partition": SKEWED, "tensorboard": False}
    given = {key: others.pop(key) for key in ("data", "out", "resume", "on_round") if key in others}
    return run(changes["experiment"], {**fixed, **named, **steps, **others}, draw=False, **{"out": here / "run", **given})


def weights(done: Run) -> dict[str, torch.Tensor]:
    return load_file(done.path / "model.safetensors")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*subprocess.*:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@LEARNERS
def test_engines_give_the_same_bits(here, changes):
    runs = [trained(here, changes, out=here / name, **{"engine.name": name}) for name in ("in-process", "ray")]
    one, other = map(weights, runs)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    held = [Checkpoint.load(done.path / "checkpoint.safetensors").clients for done in runs]
    for client, state in held[0].items():
        first, second = (unpack(clients[client]["private"]) for clients in held)
        assert first and all(torch.equal(first[name], second[name]) for name in first), state


@pytest.mark.slow
@LEARNERS
def test_ten_unequal_clients_learn_over_the_rounds(here, changes):
    more = {"data.examples": 2000, "learner.widths": [8, 16, 32, 32], "learner.teacher.steps": 200, "strategy.epochs": 3}
    longer = {"strategy.steps": 10} if changes is DOUBLEMATCH else more
    done = trained(here, {**changes}, rounds=10, **longer)
    assert done.rounds["test_accuracy"].iloc[-1] > done.rounds["test_accuracy"].iloc[0] + 0.1
    assert done.rounds["failures"].sum() == 0


@LEARNERS
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(here, changes):
    whole = trained(here, changes, out=here / "whole")

    def stop(row):
        if row["round"] == 1:
            raise KeyboardInterrupt

    often = {"checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        trained(here, changes, on_round=stop, **often)
    one, other = weights(whole), weights(trained(here, changes, resume=True, **often))
    assert all(torch.equal(one[name], other[name]) for name in one)


@LEARNERS
@pytest.mark.parametrize("strategy", ["fedsgd", "geometric", "fedprox", "fedadam", "scaffold", "fedmedian"])
def test_strategies_of_every_kind_train_it(here, changes, strategy):
    kept = {key: value for key, value in changes.items() if key != "experiment" and not key.startswith("strategy.")}
    steps = {} if strategy in ("fedsgd", "geometric") else {"steps": 1}
    asked = {"rounds": 1, "tensorboard": False, "partition": {"name": "iid", "clients": 3}, "strategy": {"name": strategy, **steps}}
    done = run(changes["experiment"], {**kept, **asked}, out=here / "run", draw=False)
    assert np.isfinite(done.rounds["test_loss"]).all()


def few(experiment: str, changes: dict) -> FederatedData:
    """The experiment's data in three clients, the last of which has one example."""
    named = {key: value for key, value in changes.items() if key != "experiment"}
    data = Experiment.load(experiment, {**named, "partition": {"name": "iid", "clients": 3}}).load_data()
    parts = [data.train[0], data.train[1], data.train[2][:1]]
    return FederatedData(data.name, Silos.of(parts), None, data.test, data.classes)


def test_a_client_of_one_example_takes_part(here):
    done = trained(here, DOUBLEMATCH, data=few("doublematch-tiny", DOUBLEMATCH), out=here / "one")
    assert done.rounds["failures"].sum() == 0
    done = trained(here, USI, data=few("usi-tiny", USI), out=here / "other")
    assert done.rounds["failures"].sum() == 0


def test_the_server_trains_on_its_own_labels(here):
    changes = {**DOUBLEMATCH, "labels": {"count": 20, "at": "server"}, "strategy.client_optimizer.keep": True}
    whole = trained(here, changes, out=here / "whole", checkpoint_every=1)
    assert whole.rounds["server_loss"].iloc[1:].notna().all()
    kept = Checkpoint.load(whole.path / "checkpoint.safetensors").server
    assert set(kept) == {"private", "optimizer", "heard"}
    rates = unpack(kept["private"])["rates"]
    fresh = DoubleMatch(scales=1, filters=2, repeat=1).build(Experiment.load("doublematch-tiny").load_data().spec, torch.Generator()).rates
    assert not torch.equal(rates, fresh), "the server's probes have moved its rates"

    def stop(row):
        if row["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(here, changes, on_round=stop, checkpoint_every=1)
    resumed = trained(here, changes, resume=True, checkpoint_every=1)
    one, other = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_server_without_local_steps_cannot_train(here):
    with pytest.raises(ExperimentError, match="strategy fedsgd has no local steps that the server could take on its own labels"):
        run("doublematch-tiny", {"strategy": {"name": "fedsgd"}}, out=here / "run")


@pytest.mark.parametrize("strategy", ["fedcurv", "fishr-inter-geo"])
def test_a_strategy_of_per_example_gradients_is_refused_where_there_are_none(here, strategy):
    with pytest.raises(ExperimentError, match=f"strategy {strategy} needs the gradient of each example, and the loss"):
        run("doublematch-tiny", {"strategy": {"name": strategy}, "labels.at": "clients"}, out=here / "run")


def test_a_learner_never_sees_a_label_that_is_hidden():
    data = Experiment.load("doublematch-tiny").load_data()
    assert isinstance(data.train.examples, Examples) and data.train.examples.label.max() == -1


def test_published_networks_have_the_published_sizes():
    published = {"cifar10": 1_486_154, "cifar100": 23_671_748, "svhn": 1_486_154, "stl10": 5_999_562}
    classes = {"cifar100": 100}
    from fedvision.data import Spec

    for name, count in published.items():
        learner = Experiment.load(f"doublematch-{name}").build_learner()
        model = learner.build(Spec((3, 96, 96) if name == "stl10" else (3, 32, 32), classes.get(name, 10)), torch.Generator())
        assert sum(param.numel() for param in model.parameters() if param.requires_grad) == count, name
