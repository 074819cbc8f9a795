from flwr.app import Context, RecordDict

from benchmarks import run
from clients.app import app as client_app
from fedvision.grids.in_process import InProcessGrid
from server.app import app as server_app
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
