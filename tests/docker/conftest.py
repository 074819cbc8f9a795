"""A federation of real processes in which things go wrong, and the run in one process that it must equal."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flwr.app import Error

from benchmarks import run
from benchmarks.deploy import keys
from benchmarks.deploy.demonstration import silos
from benchmarks.deploy.places import Loopback, Namespaces
from fedvision.arrays import config_of
from fedvision.grids.local import CLIENT_RAISED, Answer, Desk
from server.record import read_rows

THREE = {"participants": [0, 1, 2], "learner.hidden": [8], "tensorboard": False}

FAULTY = {"scaffold": "faulty:FaultyScaffold", "fishr-inter-geo": "faulty:FaultyFishr"}


class Federation:
    """A coordinator and three silos that run; see ``federation``."""

    def __init__(self, topology, folder, scratch):
        self.topology, self.folder, self.scratch = topology, folder, scratch
        self._threads, self._going = ThreadPoolExecutor(1), None

    def begin(self, strategy, rounds, *words, faults=(), **settings):
        """Start ``fedvision deploy run`` beside the test."""
        told = described(strategy, rounds, settings) | {"strategy.name": FAULTY[strategy], "strategy.faults": list(faults)}
        asked = [word for key, value in told.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        line = ["fedvision", "deploy", "run", "quickstart", *asked, "--out", str(self.scratch / "there"), *words]
        self._going = self._threads.submit(self.topology.command, *line)

    def ended(self, status):
        """How it ended, with this status."""
        done = self._going.result()
        assert done.returncode == status, done.stdout + done.stderr
        return done

    def rows(self):
        """Of the only run so far that has any."""
        return [row for path in (self.folder / "runs").glob("*/rounds.jsonl") for row in read_rows(path)]

    def failed(self):
        """Who failed, by round."""
        return {(row["round"], int(failure.split()[1].rstrip(":"))) for row in self.rows() for failure in row["failed"]}

    def await_(self, what):
        """Wait until something is so, while the run goes on."""
        while not what():
            assert not self._going.done(), f"the run ended early: {self._going.result()}"
            time.sleep(0.1)

    def await_round(self, number):
        """Wait until a round is recorded."""
        self.await_(lambda: any(row["round"] == number for row in self.rows()))

    def await_held(self, place):
        """Wait until a client holds an answer back, ``"silo1 2"``."""
        self.await_((self.scratch / "held" / place).exists)

    def release(self, place):
        """Let it send the answer, now or when it gets there."""
        (self.scratch / "held" / f"{place} released").touch()

    def bits(self):
        return (self.scratch / "there" / "model.safetensors").read_bytes()


def described(strategy, rounds, settings):
    """The experiment: silos are asked for nothing but training until the last round."""
    return THREE | {"strategy.name": strategy, "rounds": rounds, "evaluate_every": rounds} | settings


@pytest.fixture
def federation(tmp_path, monkeypatch, request):
    """A coordinator and three silos; in network namespaces if the test asks for them."""
    kind = getattr(request, "param", Loopback.kind)
    if kind == Namespaces.kind and not Namespaces.available():
        pytest.skip("network namespaces need Linux, the program `ip` and the rights of root")
    (tmp_path / "held").mkdir()
    monkeypatch.setenv("FEDVISION_HELD", str(tmp_path / "held"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "faults"))
    made = keys.Federation.make(tmp_path / "federation", [], 3, 30)
    with silos(made.folder, kind) as topology:
        yield Federation(topology, made.folder, tmp_path)


@pytest.fixture
def undisturbed(tmp_path, monkeypatch, no_figures):
    """The bits of a run in this process, in which some clients do not answer in some rounds."""

    def bits(strategy, rounds, missing=(), **settings):
        honest = Desk.answer

        def answer(self, message, state):
            place = (config_of(message.content)["server-round"], message.metadata.dst_node_id)
            if place in missing and not message.metadata.message_type.startswith("evaluate"):
                return Answer(Error(CLIENT_RAISED, "absent"), state)
            return honest(self, message, state)

        with monkeypatch.context() as patch:
            patch.setattr(Desk, "answer", answer)
            done = run("quickstart", described(strategy, rounds, settings), out=tmp_path / "undisturbed")
        return (done.path / "model.safetensors").read_bytes()

    return bits
