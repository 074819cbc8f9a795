"""Each wrong input ends in one clear message without a traceback and a status that is not 0; nothing is lost."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from benchmarks import Run, run
from fedvision.errors import RunError
from fedvision.trees import save_tensors
from server.record import read_rows

BAD_DATA = """
import math

import numpy as np
from fedvision.data import FederatedData

good, bad = ([[0.0], [1.0]], [0, 1]), ([[math.nan], [1.0]], [0, 1])

def one_empty():
    return FederatedData.from_arrays([good, (np.zeros((0, 1)), [])], test=good)

def all_nan():
    return FederatedData.from_arrays([bad, bad], test=good)

def breaks():
    raise KeyError("sensor 7")
"""

WRONG = {
    "an unknown experiment": (
        ["quickstat"],
        "no experiment 'quickstat': neither a file nor a bundled experiment; did you mean 'quickstart'?",
    ),
    "a misspelt key": (["mine.toml", "--set", "ruonds=3"], "mine.toml: ruonds: no such key; did you mean 'rounds'?"),
    "a misspelt setting": (
        ["mine.toml", "--set", "strategy.fractoin=0.5"],
        "mine.toml: strategy.fractoin: FedSGD has no such setting; did you mean 'fraction'?",
    ),
    "a wrong type": (["mine.toml", "--set", "rounds=many"], "experiment.rounds = 'many': expected whole number >= 0"),
    "a value out of range": (["mine.toml", "--set", "strategy.fraction=1.5"], "strategy.fraction = 1.5: expected number > 0 and <= 1"),
    "an unknown strategy": (["mine.toml", "--set", "strategy.name=fedsdg"], "unknown strategy 'fedsdg'; did you mean 'fedsgd'?"),
    "an unknown learner": (["mine.toml", "--set", "learner.name=x"], "unknown learner 'x'"),
    "an unknown model": (["mine.toml", "--set", "learner.model=mpl"], "unknown learner.model 'mpl'"),
    "an unknown data set": (["mine.toml", "--set", "data.name=digit"], "unknown data set 'digit'; did you mean 'digits'?"),
    "a module that is not there": (["mine.toml", "--set", "data.name=nowhere:data"], "data set 'nowhere:data' cannot be imported"),
    "no TOML": (["broken.toml"], "broken.toml: not valid TOML"),
    "an override without a value": (["mine.toml", "--set", "rounds"], "--set 'rounds': expected key=value"),
    "an unknown optimizer": (["mine.toml", "--set", "strategy.server_optimizer.name=Adm"], "unknown optimizer 'Adm'; did you mean 'Adam'?"),
    "a refused learning rate": (["mine.toml", "--set", "strategy.server_optimizer.lr=-1"], "Invalid learning rate: -1"),
    "a device that is not there": (["mine.toml", "--set", "engine.device=cuda:99"], "engine.device = 'cuda:99' cannot be used"),
    "no device at all": (["mine.toml", "--set", "engine.device=toaster"], "engine.device = 'toaster' cannot be used"),
    "too many clients for the data": (["mine.toml", "--set", "partition.clients=2000"], "clients = 2000 is more than the"),
    "more clients wanted than there are": (
        ["mine.toml", "--set", "strategy.min_clients=4"],
        "3 clients are connected, strategy.min_clients = 4",
    ),
    "a model for images on vectors": (["mine.toml", "--set", "learner.model=cnn"], "learner.hidden = [6]: the cnn has three convolutions"),
    "images that are too small": (["mine.toml", "--set", "learner.model=cnn", "--set", "learner.hidden=[8, 8, 8]"], "at least 14x14"),
    "a client without examples": (["mine.toml", "--set", "data.name=bad_data:one_empty"], "hold no training example"),
    "nothing but NaN clients": (["mine.toml", "--set", "data.name=bad_data:all_nan"], "round 1: 0 usable answers"),
    "data that break": (["mine.toml", "--set", "data.name=bad_data:breaks"], "sensor 7"),
    "weights that are not there": (["mine.toml", "--initial", "absent.safetensors"], "absent.safetensors: not a readable safetensors file"),
    "weights that are no weights": (["mine.toml", "--initial", "mine.toml"], "mine.toml: not a readable safetensors file"),
    "weights of another model": (["mine.toml", "--initial", "other.safetensors"], "initial weights do not fit the model"),
    "a folder of something else": (["mine.toml", "--out", "full"], "full is not empty and holds no run; choose another folder with --out"),
    "a folder that is a file": (["mine.toml", "--out", "mine.toml"], "mine.toml is a file"),
    "a folder within a file": (["mine.toml", "--out", "mine.toml/run"], "cannot be written"),
}


@pytest.fixture
def inputs(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (here / "broken.toml").write_text("rounds = = 3")
    (here / "bad_data.py").write_text(BAD_DATA)
    (here / "full").mkdir()
    (here / "full" / "notes.txt").write_text("mine")
    save_tensors(here / "other.safetensors", {"w": torch.zeros(1)})
    monkeypatch.syspath_prepend(here)
    return here


@pytest.mark.parametrize("what", WRONG)
def test_one_clear_message(inputs, fedvision, what):
    arguments, message = WRONG[what]
    before = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()}
    ended = fedvision("run", *arguments)
    assert ended.status == 1
    assert ended.err.startswith("error: ") and ended.err.count("\nerror: ") == 0
    assert message in ended.err
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("arguments", [["rnu"], ["run"], ["run", "mine.toml", "--fast"], ["list", "x", "y"]])
def test_a_wrong_command_line_is_explained(fedvision, arguments):
    ended = fedvision(*arguments)
    assert ended.status == 2
    assert "Usage:" in ended.err and "Error" in ended.err


def test_a_kind_that_cannot_be_listed_is_explained(fedvision):
    ended = fedvision("list", "strategy")
    assert ended.status == 1 and "did you mean 'strategies'?" in ended.err


# ---- folders and checkpoints ----------------------------------------------------------------------------------------


class Stopped(BaseException):
    """A test stops a run here, as Ctrl-C would."""


@pytest.fixture
def stopped(here: Path, no_figures) -> Path:
    """A folder whose run was stopped in round 2 of 3."""

    def on_round(row):
        if row["round"] == 2:
            raise Stopped

    with pytest.raises(Stopped):
        run("mine.toml", out="stopped", on_round=on_round)
    return here / "stopped"


def test_an_unfinished_run_is_not_overwritten(fedvision, stopped):
    ended = fedvision("run", "mine.toml", "--out", "stopped")
    assert ended.status == 1
    assert "stopped holds an unfinished run of this experiment; go on with --resume, or choose another folder" in ended.err


@pytest.mark.parametrize("change", [["--set", "seed=1"], ["--set", "strategy.name=geometric"], ["--set", "rounds=9"]])
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_the_folder_of_another_experiment_is_refused_and_left_alone(fedvision, stopped, change, resume):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    ended = fedvision("run", "mine.toml", *change, "--out", "stopped", *resume)
    assert ended.status == 1
    assert "stopped holds a run of another experiment, data or initial weights; choose another folder with --out" in ended.err
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def garbled(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[8:200] = bytes(192)
    file.write_bytes(bytes(data))


def replaced_by_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replaced_by_a_model(file: Path) -> None:
    save_tensors(file, {"hidden1.weight": torch.zeros(6, 64)})


@pytest.mark.parametrize(
    "spoil", [truncated, emptied, garbled, replaced_by_a_folder, replaced_by_a_model], ids=lambda spoil: spoil.__name__
)
def test_a_damaged_checkpoint_is_refused_and_nothing_else_is_lost(fedvision, stopped, spoil):
    file, rows = stopped / "checkpoint.safetensors", (stopped / "rounds.jsonl").read_bytes()
    backup = file.read_bytes()
    spoil(file)
    ended = fedvision("run", "mine.toml", "--out", "stopped", "--resume")
    assert ended.status == 1
    assert "checkpoint.safetensors: not a readable checkpoint" in ended.err and "restore the file from a copy" in ended.err
    assert (stopped / "rounds.jsonl").read_bytes() == rows
    if file.is_dir():
        file.rmdir()
    file.write_bytes(backup)
    assert fedvision("run", "mine.toml", "--out", "stopped", "--resume").status == 0


def test_a_damaged_manifest_is_refused(fedvision, stopped):
    (stopped / "manifest.json").write_text("{")
    ended = fedvision("run", "mine.toml", "--out", "stopped", "--resume")
    assert ended.status == 1 and "manifest.json: cannot be read" in ended.err


def test_a_checkpoint_of_another_run_in_the_right_folder_is_refused(fedvision, stopped, here):
    run("mine.toml", {"seed": 5}, out="other")
    (here / "other" / "checkpoint.safetensors").replace(stopped / "checkpoint.safetensors")
    ended = fedvision("run", "mine.toml", "--out", "stopped", "--resume")
    assert ended.status == 1 and "holds a run of another experiment" in ended.err


# ---- a full disk ----------------------------------------------------------------------------------------------------


@contextmanager
def full_from(kilobytes: int) -> Iterator[None]:
    """Files cannot grow beyond so many kilobytes: the system refuses to write more, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("settings", "kilobytes", "rows"),
    [
        ({"rounds": 60}, 12, 20),  # the rows no longer fit
        ({"rounds": 4, "learner.hidden": [200]}, 32, 1),  # the checkpoint does not fit
        ({"rounds": 60, "tensorboard": True}, 12, 10),  # the events no longer fit
    ],
    ids=["rows", "checkpoint", "events"],
)
def test_a_full_disk_stops_the_run_and_nothing_is_lost(here, fedvision, no_figures, settings, kilobytes, rows):
    written = [f"--set={key}={str(value).lower()}" for key, value in settings.items()]
    with full_from(kilobytes):
        ended = fedvision("run", "mine.toml", *written, "--out", "full")
    assert ended.status == 1
    assert ended.err.startswith("error: full") and ended.err.count("\n") == 1
    assert "cannot be written" in ended.err and "free space or choose another folder, then go on with --resume" in ended.err
    assert len(list(read_rows(here / "full" / "rounds.jsonl"))) >= rows
    assert not list((here / "full").glob(".*.part"))
    assert fedvision("run", "mine.toml", *written, "--out", "full", "--resume").status == 0
    whole = run("mine.toml", settings, out="whole")
    assert (here / "full" / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()
    assert Run(here / "full").rounds.drop(columns="seconds").equals(whole.rounds.drop(columns="seconds"))


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")]
)
@pytest.mark.parametrize("failing", [0, 2])
def test_a_disk_that_fills_up_while_a_checkpoint_is_written_keeps_the_one_before(here, no_figures, monkeypatch, error, failing):
    from fedvision import trees

    honest, written = trees.save_file, []

    def full(tensors, path, metadata):
        written.append(path)
        if len(written) == failing + 1:
            path.write_bytes(b"half")
            raise error
        honest(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr("fedvision.trees.save_file", full)
        with pytest.raises(RunError, match=r"checkpoint.safetensors: cannot be written .*No space left on device"):
            run("mine.toml", out="full")
    done, whole = run("mine.toml", out="full", resume=True), run("mine.toml", out="whole")
    assert (done.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()
    assert done.rounds.drop(columns="seconds").equals(whole.rounds.drop(columns="seconds"))


def test_a_folder_that_must_not_be_written_to_is_an_error_of_ours(here, no_figures, monkeypatch):
    # as root every folder can be written to, so the system's refusal is played
    def refused(self, *arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(RunError, match="Permission denied"):
        run("mine.toml", out="locked")
