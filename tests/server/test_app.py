from dataclasses import replace

import pytest
from flwr.app import Context, RecordDict

from benchmarks import run
from clients.app import app as client_app
from fedvision.errors import EngineError, RunError
from fedvision.grids.in_process import InProcessGrid
from server.app import app as server_app
from server.checkpoint import Checkpoint
from server.folder import RunFolder
from server.record import read_rows


def test_the_apps_need_nothing_but_flowers_run_configuration(here, no_figures):
    # as `flwr run` starts them: nobody has prepared anything in this process
    config = {"run-id": 88_001, "experiment": "mine.toml", "overrides": "rounds=2; learner.hidden=[4]"}
    with InProcessGrid(client_app, config, 3) as grid:
        server_app(grid, Context(88_001, 0, {}, RecordDict(), config))
    [folder] = (here / "runs").iterdir()
    expected = run("mine.toml", {"rounds": 2, "learner.hidden": [4]}, out="expected")
    assert folder.name == f"mine-{expected.experiment.fingerprint}"
    assert (folder / "model.safetensors").read_bytes() == (expected.path / "model.safetensors").read_bytes()
    rows = [row | {"seconds": 0} for row in read_rows(folder / "rounds.jsonl")]
    assert rows == [row | {"seconds": 0} for row in read_rows(expected.path / "rounds.jsonl")]


def as_flower_starts_it(run_id: int, overrides: str, clients: int = 3, names: type[InProcessGrid] = InProcessGrid) -> None:
    config = {"run-id": run_id, "experiment": "mine.toml", "overrides": overrides}
    with names(client_app, config, clients) as grid:
        server_app(grid, Context(run_id, 0, {}, RecordDict(), config))


class Nameless(InProcessGrid):
    """A grid that does not say that its nodes are partitions, as Flower's do not."""

    client_states = property()


def test_runs_are_kept_where_the_environment_says_with_a_manifest(here, monkeypatch):
    monkeypatch.setenv("FEDVISION_RUNS", str(here / "kept"))
    as_flower_starts_it(88_002, "rounds=1")
    [path] = (here / "kept").iterdir()
    manifest = RunFolder(path).read_manifest()
    assert manifest["status"] == "finished"
    assert manifest["command"] == ["flwr", "run"]  # its own command line holds a token
    assert manifest["data"]["clients"] == 3
    assert RunFolder(path).experiment.exists()


def test_a_failure_is_noted_and_the_same_command_goes_on(here, monkeypatch):
    monkeypatch.setattr("server.rounds.save_tensors", lambda *arguments: (_ for _ in ()).throw(RunError("the disk is full")))
    with pytest.raises(RunError):
        as_flower_starts_it(88_003, "rounds=1")
    [path] = (here / "runs").iterdir()
    assert RunFolder(path).read_manifest()["reason"] == "the disk is full"
    monkeypatch.undo()
    monkeypatch.chdir(here)
    as_flower_starts_it(88_004, "rounds=1")
    assert RunFolder(path).read_manifest()["status"] == "finished"
    assert len(list(read_rows(path / "rounds.jsonl"))) == 2


def test_a_folder_of_another_run_is_left_alone(here):
    as_flower_starts_it(88_005, "rounds=1")
    [path] = (here / "runs").iterdir()
    folder = RunFolder(path)
    folder.write_manifest(folder.read_manifest() | {"identity": "0" * 16})
    with pytest.raises(RunError, match="move it away, or name another folder by FEDVISION_RUNS"):
        as_flower_starts_it(88_006, "rounds=1")


def test_what_clients_kept_in_a_run_of_flowers_is_missed(here):
    as_flower_starts_it(88_007, "strategy.name=scaffold")
    [path] = (here / "runs").iterdir()
    folder = RunFolder(path)
    checkpoint = Checkpoint.load(folder.checkpoint)
    replace(checkpoint, round=1, clients=None).save(folder.checkpoint)  # as a grid of Flower's would have it
    with pytest.raises(RunError, match="was lost with Flower's run; start again in another folder"):
        as_flower_starts_it(88_008, "strategy.name=scaffold")


def test_the_wait_for_clients_is_a_number_of_seconds(here, monkeypatch):
    monkeypatch.setenv("FEDVISION_WAIT", "soon")
    with pytest.raises(RunError, match="FEDVISION_WAIT = 'soon': expected a number of seconds"):
        as_flower_starts_it(88_009, "rounds=1", names=Nameless)
    monkeypatch.setenv("FEDVISION_WAIT", "0.1")
    with pytest.raises(EngineError, match="the federation has 2 nodes, the experiment has 3 clients"):
        as_flower_starts_it(88_010, "rounds=1", clients=2, names=Nameless)
