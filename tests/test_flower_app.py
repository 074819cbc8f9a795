"""The plain Flower app of docs/flower-app.md runs, with one strategy of ours and everything else its own."""

import sys

import pytest
import torch
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

from fedvision.grids.in_process import InProcessGrid


@pytest.fixture
def apps(root, monkeypatch):
    """Its ServerApp and ClientApp."""
    monkeypatch.syspath_prepend(root / "docs" / "examples" / "flower_app")
    from digits_app.client_app import app as client_app
    from digits_app.server_app import app as server_app

    yield server_app, client_app
    for name in [name for name in sys.modules if name.split(".")[0] == "digits_app"]:
        del sys.modules[name]


def trained(apps, out, rounds):
    """The model after some rounds with five clients."""
    server_app, client_app = apps
    config = {"clients": 5, "rounds": rounds, "lr": 0.01, "out": str(out)}
    with InProcessGrid(client_app, config, clients=5) as grid:
        server_app(grid, Context(1, 0, {}, RecordDict(), config))
    return load_file(out)


def test_it_learns(apps, tmp_path, capsys):
    trained(apps, tmp_path / "model.safetensors", 20)
    accuracy = float(capsys.readouterr().out.split("accuracy ")[-1].split()[0])
    assert accuracy > 0.7


def test_it_repeats(apps, tmp_path):
    first, second = (trained(apps, tmp_path / f"{name}.safetensors", 2) for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
