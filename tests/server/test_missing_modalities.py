"""Silos that lack a modality, from the experiment file to the model: what they leave out, and how it goes on after a restart."""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from benchmarks import run
from benchmarks.runs import Run
from fedvision.data.examples import DEPTH
from fedvision.errors import EngineError
from fedvision.experiment import Experiment
from fedvision.learners.learner import Learner, Loss
from fedvision.metrics import Metrics
from fedvision.registry import learners
from fedvision.seeds import global_generators


class TwoTasks(nn.Module):
    """Classes, and the mean depth of a picture."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(3 * 16 * 16, 4)
        self.classifier, self.depth = nn.Linear(4, classes), nn.Linear(4, 1)

    def forward(self, x):
        h = self.hidden(x.flatten(1)).relu()
        return self.classifier(h), self.depth(h)[:, 0]


@learners("test-two-tasks")
@dataclass(frozen=True, kw_only=True)
class TwoTasksLearner(Learner):
    """Learns depth from those examples of a batch that have it; a batch without any says nothing of it."""

    def build(self, spec, rng):
        with global_generators(rng):
            return TwoTasks(spec.classes)

    def loss(self, model, batch, progress, rng):
        classes, depth = model(batch.image)
        total, here = F.cross_entropy(classes, batch.label), batch.having(DEPTH)
        if here.any():
            total = total + (depth - batch.fields[DEPTH].mean((1, 2, 3)))[here].square().mean()
        return Loss(total)

    def evaluate(self, model, batch):
        classes, depth = model(batch.image)
        error = (depth - batch.fields[DEPTH].mean((1, 2, 3))).square()
        return Metrics.of_batch({"loss": F.cross_entropy(classes, batch.label, reduction="sum"), "depth": error.sum()}, len(batch))


TABLES = {
    "name": "lacking",
    "rounds": 4,
    "tensorboard": False,
    "data": {"name": "scenes", "examples": 80, "test_examples": 20, "size": 16, "fields": ["image", "label", "depth"]},
    "partition": {"name": "iid", "clients": 4},
    "modalities": {"silos": [["image"], ["image", "depth"]]},
    "learner": {"name": "test-two-tasks"},
    "strategy": {"name": "fedavg", "batch_size": 8, "client_optimizer": {"name": "AdamW", "lr": 0.01, "weight_decay": 0.5}},
}
DEPTH_BYTES = 4 * (4 + 1)


def trained(here, *, on_round=lambda row: None, resume=False, **changed) -> Run:
    return run(Experiment.from_tables({**TABLES, **changed}), out=here, draw=False, on_round=on_round, resume=resume)


def weights(done: Run) -> dict[str, torch.Tensor]:
    return load_file(done.path / "model.safetensors")


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "fedsgd", "fedmedian"])
def test_silos_send_what_they_trained(here, strategy):
    done = trained(here / "some", strategy={"name": strategy})
    whole = sum(tensor.nbytes for tensor in weights(done).values())
    absent = 0 if strategy == "fedmedian" else 2 * DEPTH_BYTES
    assert done.rounds["bytes_up"].iloc[1:].tolist() == [4 * whole - absent] * 4
    assert done.rounds["bytes_down"].iloc[1:].tolist() == [4 * whole] * 4
    assert done.rounds["failures"].sum() == 0


def test_a_resumed_run_ends_with_the_same_bits(here):
    def stop(row):
        if row["round"] == 2:
            raise KeyboardInterrupt

    for strategy in ("fedadam", "fedsgd"):
        whole = trained(here / strategy / "whole", strategy={"name": strategy})
        with pytest.raises(KeyboardInterrupt):
            trained(here / strategy / "parts", strategy={"name": strategy}, on_round=stop)
        resumed = trained(here / strategy / "parts", strategy={"name": strategy}, resume=True)
        one, other = weights(whole), weights(resumed)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_clients_whose_loss_looks_at_what_they_have_do_not_train_together(here):
    with pytest.raises(EngineError, match=r"set engine\.batch_clients = 1"):
        trained(here, engine={"name": "in-process", "batch_clients": 2})
