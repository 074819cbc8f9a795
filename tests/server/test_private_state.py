"""What silos keep between rounds: training goes on as if it had never stopped, on every engine, and after a restart."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from flwr.app import RecordDict
from safetensors.torch import load_file
from torch.nn import functional as F

from benchmarks import run
from benchmarks.runs import Run
from fedvision.arrays import unpack
from fedvision.data import FederatedData
from fedvision.ema import Averaged
from fedvision.errors import EngineError, ExperimentError
from fedvision.experiment import Experiment
from fedvision.learners.classifier import Classifier
from fedvision.learners.learner import Group, Loss
from fedvision.registry import learners
from fedvision.seeds import generator
from server.checkpoint import Checkpoint

OPTIMIZER = {"name": "SGD", "lr": 0.2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "keep": True}
SCHEDULE = {"name": "gamma-cosine", "gamma": 1.0}


@learners("test-averaging")
@dataclass(frozen=True, kw_only=True)
class Averaging(Classifier):
    """A classifier with a moving average of its weights, which stays in the silo."""

    def build(self, spec, rng):
        return Averaged(super().build(spec, rng))

    def loss(self, model, batch, progress, rng):
        return Loss(F.cross_entropy(model(batch.image), batch.label))

    def holding(self, name):
        return "private" if name.startswith("average") else super().holding(name)

    def groups(self, model):
        return [Group([name for name, _ in model.named_parameters() if name.endswith("bias")], decayed=False)]

    def follow(self, model, batch, progress):
        model.follow(0.9)

    def begin(self, model):
        model.begin()

    def head(self, model):
        return None


def data(clients: int) -> FederatedData:
    rng = generator(7)
    pairs = [(torch.rand(12, 1, 4, 4, generator=rng), torch.randint(3, (12,), generator=rng)) for _ in range(clients + 1)]
    return FederatedData.from_arrays(train=pairs[1:], test=pairs[0], classes=3)


def trained(data: FederatedData, here: Path, *, on_round=lambda row: None, resume: bool = False, **changed) -> Run:
    strategy = {"name": "fedavg", "batch_size": 5, "shuffle": False, "client_optimizer": OPTIMIZER}
    learner = {"name": "test-averaging", "hidden": [4]}
    tables = {"name": "kept", "rounds": 4, "tensorboard": False, "data": {"name": "digits"}, "learner": learner, "strategy": strategy}
    experiment = Experiment.from_tables({**tables, **changed})
    return run(experiment, data=data, out=here / "run", draw=False, on_round=on_round, resume=resume)


def kept(done: Run, client: int, record: str) -> dict[str, torch.Tensor]:
    return unpack(Checkpoint.load(done.path / "checkpoint.safetensors").clients[client][record])


def test_one_client_trains_on_as_if_there_were_no_rounds(here):
    strategy = {"name": "fedavg", "batch_size": 5, "shuffle": False, "client_optimizer": {**OPTIMIZER, "schedule": SCHEDULE}}
    done = trained(data(1), here, strategy=strategy, rounds=3)
    learner, examples = Averaging(hidden=(4,)), data(1).train[0]
    model = learner.build(data(1).spec, generator(0, "model")).train()
    bias = [param for name, param in model.network.named_parameters() if name.endswith("bias")]
    rest = [param for name, param in model.network.named_parameters() if not name.endswith("bias")]
    optimizer = torch.optim.SGD([{"params": bias, "weight_decay": 0.0}, {"params": rest}], 0.2, 0.9, nesterov=True, weight_decay=0.01)
    batches = [examples[start : start + 5] for start in (0, 5, 10)]
    for number, batch in enumerate(batches * 3):
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * torch.tensor(torch.pi / 2 * number / 9, dtype=torch.float64).cos().item()
        optimizer.zero_grad()
        F.cross_entropy(model(batch.image), batch.label).backward()
        optimizer.step()
        model.follow(0.9)
    weights = load_file(done.path / "model.safetensors")
    assert all(torch.allclose(weights[f"network.{name}"], tensor, atol=1e-7) for name, tensor in model.network.state_dict().items())
    assert not any(name.startswith("average") for name in weights)
    averages = kept(done, 0, "private")
    assert all(torch.allclose(averages[f"average.{name}"], tensor, atol=1e-7) for name, tensor in model.average.state_dict().items())


def test_a_resumed_run_ends_with_the_same_bits(here):
    whole = trained(data(3), here / "whole")

    def stop(row):
        if row["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(data(3), here / "parts", on_round=stop)
    resumed = trained(data(3), here / "parts", resume=True)
    one, other = (load_file(done.path / "model.safetensors") for done in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*subprocess.*:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_engines_agree_on_heads_and_momenta_of_each_silo(here):
    learner = {"name": "classifier", "hidden": [4], "private": ["classifier.*"]}
    engines = ({"name": "in-process"}, {"name": "ray", "workers": 2})
    runs = [trained(data(3), here / engine["name"], learner=learner, engine=engine) for engine in engines]
    one, other = (load_file(done.path / "model.safetensors") for done in runs)
    assert one.keys() == {"hidden1.weight", "hidden1.bias"}
    assert all(torch.equal(one[name], other[name]) for name in one)
    for client in range(3):
        for record in ("private", "optimizer"):
            first, second = (kept(done, client, record) for done in runs)
            assert first and all(torch.equal(first[name], second[name]) for name in first)


def test_private_parameters_need_local_steps(here):
    learner = {"name": "classifier", "hidden": [4], "private": ["classifier.*"]}
    with pytest.raises(ExperimentError, match=r"'classifier.weight' stay with the clients, who take no steps with strategy fedsgd"):
        trained(data(2), here, learner=learner, strategy={"name": "fedsgd"})


def test_the_average_follows_gradients_too(here):
    done = trained(data(2), here, strategy={"name": "fedsgd"})
    assert len(Checkpoint.load(done.path / "checkpoint.safetensors").clients) == 2


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (
            {"learner": {"name": "test-averaging", "hidden": [4]}},
            "clients of learner test-averaging must answer one by one",
        ),
        ({"learner": {"name": "classifier", "hidden": [4]}}, "client_optimizer has a schedule or keeps its memory"),
    ],
)
def test_clients_that_keep_something_are_not_stacked(here, changed, reason):
    with pytest.raises(EngineError, match=reason):
        trained(data(2), here, engine={"name": "in-process", "batch_clients": 2}, **changed)


def test_a_module_may_be_private_in_every_learner(here):
    learner = {"name": "classifier", "model": "cnn", "hidden": [8, 8, 8], "private": ["norm*"]}
    pairs = [(torch.rand(6, 3, 16, 16), torch.arange(6) % 3) for _ in range(3)]
    held = FederatedData.from_arrays(train=pairs[1:], test=pairs[0])
    done = trained(held, here, learner=learner, rounds=1)
    assert not any("norm" in name for name in load_file(done.path / "model.safetensors"))
    assert done.rounds["test_loss"].notna().all()


def test_a_run_whose_clients_have_kept_nothing_yet_goes_on(here):
    asked = {"strategy": {"name": "scaffold", "batch_size": 5}, "learner": {"name": "classifier", "hidden": [4]}}

    def stop(row):
        if row["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(data(2), here, on_round=stop, **asked)
    file = here / "run" / "checkpoint.safetensors"
    replace(Checkpoint.load(file), clients={}, server=RecordDict()).save(file)  # as if every client had dropped out
    assert len(trained(data(2), here, resume=True, **asked).rounds) == 5
