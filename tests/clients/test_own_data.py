"""A silo that says itself what its data is, behind the ClientApp."""

from itertools import count

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from clients.app import app
from fedvision.arrays import pack
from fedvision.assembly import Assembly
from fedvision.experiment import Experiment
from fedvision.grids.in_process import InProcessGrid

RUNS = count(810_000)
SETTINGS = {"strategy.name": "fedavg", "learner.hidden": [8], "data": {"name": "digits"}, "partition": {"name": "iid", "clients": 3}}


@pytest.fixture
def answer(tmp_path):
    """Client 2's answer to an evaluation of the initial model on its training examples, if its silo.toml reads so."""

    def ask(silo: str) -> Message:
        (tmp_path / "silo.toml").write_text(silo)
        experiment = Experiment.load("quickstart", SETTINGS)

        def node(message, context):
            context.node_config["silo"] = str(tmp_path / "silo.toml")
            return app(message, context)

        config = {"run-id": next(RUNS), "experiment": experiment.to_toml(), "overrides": ""}
        content = RecordDict(
            {"arrays": pack(Assembly.of(experiment).initial), "config": ConfigRecord({"server-round": 0, "parts": "train"})}
        )
        with InProcessGrid(node, config, 3) as grid:
            [reply] = grid.send_and_receive([Message(content, dst_node_id=2, message_type="evaluate")])
        return reply

    return ask


def test_a_silo_evaluates_on_its_own_data(answer):
    whole = len(Experiment.load("quickstart", SETTINGS | {"partition": {"name": "iid", "clients": 1}}).load_data().train[0])
    assert answer('[data]\nname = "digits"\n').content["metrics"]["num-examples"] == whole
    assert answer("").content["metrics"]["num-examples"] == pytest.approx(whole / 3, abs=1)


def test_a_silo_whose_data_needs_another_model_says_so(answer):
    reason = answer('[data]\nname = "color-digits"\n').error.reason
    assert "do not fit the model" in reason
    assert "this silo's data has the shape (2, 14, 14) and 2 classes: mend its silo.toml" in reason
