"""What the tests of the bench share: a small suite, written to a file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedvision.experiment import merged

EXPERIMENT = {
    "name": "small",
    "rounds": 2,
    "data": {"name": "digits"},
    "partition": {"name": "iid", "clients": 3},
    "learner": {"name": "classifier", "hidden": [8]},
    "strategy": {"name": "fedsgd"},
}


@pytest.fixture(scope="session")
def write_suite(tmp_path_factory) -> Callable[..., Path]:
    """Writes a suite of fedsgd and fedavg on one small experiment with two seeds; takes changes by dotted key."""

    def write(changes: Mapping[str, Any] | None = None) -> Path:
        folder = tmp_path_factory.mktemp("suite")
        (folder / "experiment.toml").write_text(tomli_w.dumps(EXPERIMENT))
        tables = {
            "name": "small",
            "title": "A small suite",
            "seeds": 2,
            "strategies": {
                "fedsgd": {"label": "FedSGD", "strategy": {"name": "fedsgd"}},
                "fedavg": {"label": "FedAvg", "strategy": {"name": "fedavg"}},
            },
            "experiments": {"digits": {"experiment": str(folder / "experiment.toml"), "title": "Digits"}},
            "tables": [{"title": "Table 1", "metric": "test_loss"}],
        }
        file = folder / "suite.toml"
        file.write_text(tomli_w.dumps(merged(tables, changes or {})))
        return file

    return write
