"""Real silos fail, one after the other: the run goes on, with the bits of a run in which whoever failed was not asked."""

import json
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flwr.app import Error

from benchmarks import run
from benchmarks.deploy import keys
from benchmarks.deploy.topology import Namespaces, bring_up, processes
from fedvision.arrays import config_of
from fedvision.grids.local import CLIENT_RAISED, Answer, Desk
from server.record import read_rows

pytestmark = [pytest.mark.slow, pytest.mark.silos]

THREE = {"participants": [0, 1, 2], "learner.hidden": [8], "tensorboard": False, "strategy.batch_size": 64}


class Federation:
    """A coordinator and three silos that run; see ``federation``."""

    def __init__(self, topology, folder, scratch):
        self.topology, self.folder, self.scratch = topology, folder, scratch
        self._threads = ThreadPoolExecutor(1)

    def begin(self, settings, *words, out):
        """Start ``fedvision deploy run`` beside the test; its outcome is a future."""
        asked = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        line = ["fedvision", "deploy", "run", "quickstart", *asked, "--out", str(self.scratch / out), *words]
        return self._threads.submit(self.topology.command, *line)

    def rows(self):
        """Of the only run so far that has any."""
        return [row for path in (self.folder / "runs").glob("*/rounds.jsonl") for row in read_rows(path)]

    def reach(self, number, going):
        """Wait until a round has begun."""
        while len(self.rows()) < number:
            assert not going.done(), going.result().stdout + going.result().stderr
            time.sleep(0.2)

    def bits(self, out):
        return (self.scratch / out / "model.safetensors").read_bytes()

    def kill(self, name):
        """End a service at once, and all processes that it has started."""
        os.killpg(self.topology._running[name].pid, signal.SIGKILL)

    def start_until_it_stays(self, name):
        """Start a service as its restart policy does."""
        self.topology.launch(name)
        while self.topology.ended(name, 5) is not None:
            self.topology.launch(name)


@pytest.fixture
def federation(tmp_path, monkeypatch, request):
    """A coordinator and three silos; in network namespaces if the test asks for them."""
    kind = getattr(request, "param", "loopback")
    if kind == Namespaces.kind and not Namespaces.available():
        pytest.skip("network namespaces need Linux, the program `ip` and the rights of root")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "faults"))
    made = keys.Federation.make(tmp_path / "federation", [], 3, 30)
    with processes(made.folder, kind) as topology:
        bring_up(topology)
        yield Federation(topology, made.folder, tmp_path)


@pytest.fixture
def undisturbed(tmp_path, monkeypatch, no_figures):
    """The bits of a run in this process, in which some clients do not answer in some rounds."""

    def bits(settings, missing=()):
        honest = Desk.answer

        def answer(self, message, state):
            place = (config_of(message.content)["server-round"], message.metadata.dst_node_id)
            if place in missing and not message.metadata.message_type.startswith("evaluate"):
                return Answer(Error(CLIENT_RAISED, "absent"), state)
            return honest(self, message, state)

        with monkeypatch.context() as patch:
            patch.setattr(Desk, "answer", answer)
            return (run("quickstart", settings, out=tmp_path / "undisturbed").path / "model.safetensors").read_bytes()

    return bits


def failed(rows):
    """Who failed, by round."""
    return {(row["round"], int(failure.split()[1].rstrip(":"))) for row in rows for failure in row["failed"]}


def test_clients_that_raise_send_nan_or_die_are_named_and_leave_no_trace(federation, undisturbed):
    faults = ["silo0 1 raise", "silo1 2 nan", "silo2 3 kill"]
    settings = THREE | {"rounds": 4, "evaluate_every": 4}
    going = federation.begin(settings | {"strategy.name": "faulty:FaultyScaffold", "strategy.faults": faults}, out="there")
    done = going.result()
    assert done.returncode == 3, done.stdout + done.stderr
    reasons = {row["round"]: row["failed"] for row in federation.rows()}
    assert reasons[0] == reasons[4] == []
    [raised], [nan], [died] = reasons[1], reasons[2], reasons[3]
    assert raised == "client 0: RunError: ValueError; what it says may tell of the silo's data, and is in the silo's log only"
    assert nan.startswith("client 1: array ") and nan.endswith("holds NaN or infinite values")
    assert died == "client 2: ClientApp stopped responding."
    assert "Jane Doe" in federation.topology.log("silo0").read_text()
    assert "Jane Doe" not in done.stdout + done.stderr
    assert federation.bits("there") == undisturbed(settings | {"strategy.name": "scaffold"}, {(1, 0), (2, 1), (3, 2)})


def test_a_silo_that_leaves_between_two_phases_leaves_no_trace(federation, undisturbed):
    settings = THREE | {"rounds": 2, "evaluate_every": 2}
    del settings["strategy.batch_size"]
    going = federation.begin(settings | {"strategy.name": "faulty:FaultyFishr", "strategy.faults": ["silo1 1 raise"]}, out="there")
    done = going.result()
    assert done.returncode == 3, done.stdout + done.stderr
    assert failed(federation.rows()) == {(1, 1)}
    assert federation.bits("there") == undisturbed(settings | {"strategy.name": "fishr-inter-geo"}, {(1, 1)})


def test_a_silo_that_is_killed_and_started_again_goes_on_with_what_it_kept(federation, undisturbed):
    settings = THREE | {"rounds": 5, "evaluate_every": 5, "strategy.name": "scaffold"}
    going = federation.begin(settings, out="there")
    federation.reach(2, going)
    federation.kill("silo1")
    federation.start_until_it_stays("silo1")
    done = going.result()
    assert done.returncode == 3, done.stdout + done.stderr
    rows = federation.rows()
    assert rows[-1]["round"] == 5 and not rows[-1]["failed"]
    missed = failed(rows)
    assert missed and {client for _, client in missed} == {1}
    assert federation.bits("there") == undisturbed(settings, missed)


def test_a_superlink_that_is_killed_and_started_again_goes_on_with_the_run(federation, undisturbed):
    settings = THREE | {"rounds": 4, "evaluate_every": 4, "strategy.name": "scaffold"}
    going = federation.begin(settings, out="there")
    federation.reach(2, going)
    federation.kill("superlink")
    time.sleep(10)
    federation.topology.start("superlink")
    done = going.result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert federation.bits("there") == undisturbed(settings)


def test_a_server_app_that_is_killed_is_resumed_from_its_checkpoint(federation, undisturbed):
    settings = THREE | {"rounds": 5, "evaluate_every": 5, "checkpoint_every": 2, "strategy.name": "scaffold"}
    going = federation.begin(settings, out="there")
    federation.reach(4, going)
    link = federation.topology.address("control:8000", "superexec")
    subprocess.run(["pkill", "-KILL", "-f", f"flwr-serverapp.*{link}"], check=True)
    ended = going.result()
    assert ended.returncode == 1 and "go on with --resume" in ended.stderr, ended.stdout + ended.stderr
    resumed = federation.begin(settings, "--resume", out="there").result()
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert [row["round"] for row in federation.rows()] == [0, 1, 2, 3, 4, 5]
    assert federation.bits("there") == undisturbed(settings)


@pytest.mark.parametrize("federation", [Namespaces.kind], indirect=True)
def test_a_network_that_is_cut_for_a_quarter_of_a_minute_loses_nothing(federation, undisturbed):
    settings = THREE | {"rounds": 3, "evaluate_every": 3, "strategy.name": "scaffold"}
    going = federation.begin(settings, out="there")
    federation.reach(2, going)
    *_, space = federation.topology.places.prefix(federation.topology._known["silo1"])
    [device] = subprocess.run(
        f"ip -n {space} -o link show type veth | cut -d' ' -f2 | cut -d@ -f1", shell=True, capture_output=True, text=True, check=True
    ).stdout.split()
    subprocess.run(["ip", "-n", space, "link", "set", device, "down"], check=True)
    time.sleep(15)
    subprocess.run(["ip", "-n", space, "link", "set", device, "up"], check=True)
    done = going.result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert federation.bits("there") == undisturbed(settings)
