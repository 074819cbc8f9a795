"""What many tests share: a federation of three clients with a few random images, and an experiment on it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import pytest
import torch
from flwr.clientapp import ClientApp

from fedvision.data import FederatedData
from fedvision.experiment import Experiment
from fedvision.grids.in_process import InProcessGrid

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Last bits depend on the number of threads, and several workers share few cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the project."""
    return ROOT


@pytest.fixture(scope="session")
def golden(root: Path) -> Path:
    """The folder of the reference implementations' arrays, beside the project."""
    folder = root.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip(f"no reference arrays: {folder} is absent")
    return folder


@pytest.fixture(scope="session")
def federated() -> FederatedData:
    """Three clients with 8, 12 and 16 images [2, 4, 4] of two classes, that a model can tell apart."""
    rng = torch.Generator().manual_seed(0)

    def part(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        label = torch.arange(n) % 2
        return torch.rand(n, 2, 4, 4, generator=rng) + 0.5 * label[:, None, None, None], label

    return FederatedData.from_arrays([part(8), part(12), part(16)], [part(4), part(4), part(6)], test=part(20), name="tiny")


@pytest.fixture
def experiment() -> Callable[..., Experiment]:
    """Makes an experiment of three rounds; keyword arguments replace tables, ``a__b`` stands for the key ``a.b``."""

    def make(**changes: Any) -> Experiment:
        tables = {
            "name": "tiny",
            "rounds": 3,
            "tensorboard": False,
            "data": {"name": "digits"},
            "partition": {"name": "iid", "clients": 3},
            "learner": {"name": "classifier", "hidden": [6]},
            "strategy": {"name": "fedsgd", "server_optimizer": {"name": "Adam", "lr": 0.01}},
        }
        whole = {key: value for key, value in changes.items() if "__" not in key}
        overrides = {key.replace("__", "."): value for key, value in changes.items() if "__" in key}
        return Experiment.load(Experiment.from_tables(tables | whole), overrides)

    return make


@pytest.fixture
def grid() -> Iterator[InProcessGrid]:
    """An entered grid of four clients that know no message, for making messages and answers by hand."""
    with InProcessGrid(ClientApp(), {}, 4) as entered:
        yield entered


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw nothing, which saves most of their time."""
    monkeypatch.setattr("benchmarks.figures.of_run", lambda folder, data: [])
