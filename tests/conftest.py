"""What many tests share: a federation of three clients with a few random images, an experiment on it, the command line."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.clientapp import ClientApp
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# How long an example takes depends on what else the machine does.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# Their annotations, shapes included, are checked at every call. Not those that run while check_learner watches the global
# generators: beartype draws from Python's to pick the item of a list or dict that it looks at.
SHAPED = ["strategies.per_example", "strategies.robust"]
install_import_hook(SHAPED, "beartype.beartype")

from benchmarks import cli
from fedvision.data import FederatedData
from fedvision.experiment import Experiment
from fedvision.grids.in_process import InProcessGrid

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Last bits depend on the number of threads, and several workers share few cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is cached on disk, by subprocesses too, is forgotten after the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDVISION_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


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
    monkeypatch.setattr("benchmarks.figures.of_run", lambda *arguments: [])


# ---- the command line -----------------------------------------------------------------------------------------------

TINY = """\
# A tiny experiment of the tests.
name = "mine"
rounds = 3
tensorboard = false
data = { name = "digits" }
partition = { name = "iid", clients = 3 }
learner = { name = "classifier", hidden = [6] }
strategy = { name = "fedsgd" }
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder that holds ``mine.toml`` and nothing else; wide terminal lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "mine.toml").write_text(TINY)
    return tmp_path


@pytest.fixture
def fedvision(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ended]]:
    """The command line in this process: arguments -> how it ended. It never shows a traceback."""
    handler = signal.getsignal(signal.SIGTERM)

    def command(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["fedvision", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.out + shown.err or "--debug" in arguments
        return Ended(int(stop.value.code or 0), shown.out, shown.err)

    yield command
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def spawned(here: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """The command line in a process of its own, which ends with the test."""
    processes: list[subprocess.Popen[str]] = []

    def command(*arguments: object, **options: Any) -> subprocess.Popen[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", "fedvision", *map(str, arguments)]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, cwd=here, env=environment, **options))
        return processes[-1]

    yield command
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def rows_reach() -> Callable[[subprocess.Popen[str], Path, int], None]:
    """Wait until a run's record has so many rows."""

    def wait(process: subprocess.Popen[str], folder: Path, rows: int) -> None:
        file = folder / "rounds.jsonl"
        while not file.exists() or file.read_bytes().count(b"\n") < rows:
            assert process.poll() is None, f"the run ended early: {process.communicate()}"
            time.sleep(0.005)

    return wait
