"""A silo that says itself what its data is, behind the ClientApp."""

from collections.abc import Mapping
from itertools import count
from types import MappingProxyType

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from PIL import Image

from clients.app import app
from fedvision.arrays import pack
from fedvision.assembly import Assembly
from fedvision.experiment import Experiment
from fedvision.grids.in_process import InProcessGrid
from fedvision.privacy import Ledger, Privacy

RUNS = count(810_000)
SETTINGS = {"strategy.name": "fedavg", "learner.hidden": [8], "data": {"name": "digits"}, "partition": {"name": "iid", "clients": 3}}


@pytest.fixture
def answer(tmp_path):
    """Client 2's answer, if its silo.toml reads so, to an evaluation of the initial model on its training examples, or to rounds."""

    def ask(silo: str, changes: Mapping[str, object] = MappingProxyType({}), rounds: int = 0) -> Message:
        (tmp_path / "silo.toml").write_text(silo)
        experiment = Experiment.load("quickstart", SETTINGS | dict(changes))

        def node(message, context):
            context.node_config["silo"] = str(tmp_path / "silo.toml")
            return app(message, context)

        config = {"run-id": next(RUNS), "experiment": experiment.to_toml(), "overrides": ""}
        arrays = pack(Assembly.of(experiment).initial)
        with InProcessGrid(node, config, 3) as grid:
            for number in range(1, rounds + 1) if rounds else [0]:
                content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": number, "parts": "train"})})
                [reply] = grid.send_and_receive([Message(content, dst_node_id=2, message_type="train" if rounds else "evaluate")])
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


PRIVATE = {"data": {"name": "scenes", "size": 16, "classes": 2, "examples": 24, "test_examples": 4}, "strategy.batch_size": 3, "rounds": 4}
LIMITS = {"unit": "example", "clipping_norm": 1.0, "target_epsilon": 2.0, "delta": 0.05}


@pytest.fixture
def pictures(tmp_path):
    """A silo.toml about a folder of twelve pictures in two classes, nine of them for training."""
    for number in range(12):
        file = tmp_path / "pictures" / ("train" if number < 9 else "test") / ("ab"[number % 2]) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (20 * number, 0, 99)).save(file)
    return f'[data]\nname = "image-folder"\nroot = "{tmp_path}/pictures"\nsize = 16\n'


def test_under_privacy_only_the_silos_own_examples_are_judged_and_accounted_for(answer, pictures, monkeypatch):
    judged, honest = [], Privacy.noise
    monkeypatch.setattr(Privacy, "noise", lambda self, rate, steps: judged.append((rate, steps)) or honest(self, rate, steps))
    experiment = PRIVATE | {f"privacy.{key}": value for key, value in LIMITS.items()}
    reply = answer(pictures, experiment, rounds=3)
    assert not reply.has_error(), reply.error
    stand_in = (3 / 8, 4 * 3)  # the experiment's data, which the server judges
    assert set(judged) == {stand_in, (3 / 9, 4 * 3)}
    noise = Privacy(**LIMITS).noise(3 / 9, 4 * 3)
    assert reply.content["metrics"]["epsilon"] == pytest.approx(Ledger(((noise, 3 / 9, 3 * 3),)).epsilon(0.05, "rdp"))


def test_a_delta_that_is_too_large_for_the_silos_own_examples_is_refused_there(answer, pictures):
    experiment = PRIVATE | {f"privacy.{key}": value for key, value in (LIMITS | {"delta": 0.12}).items()}
    reason = answer(pictures, experiment, rounds=1).error.reason
    assert "a client has 9 examples, and delta must be below 1 / 9" in reason
