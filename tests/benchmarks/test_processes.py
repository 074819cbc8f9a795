"""Services as processes, of a compose file that needs no Flower: they crash with what they have started, and come back."""

import time

import pytest

from benchmarks.deploy import topology
from benchmarks.deploy.topology import processes
from fedvision.errors import EngineError
from fedvision.grids.local_superlink import runs, started_for

COMPOSE = """\
services:
  parent:
    command: [python, -c, "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"]
    tmpfs: ["/flower"]
    networks: [federation]
    healthcheck: {test: [CMD, python, -c, ""]}
  refused:
    command: [python, /program/refused.py, "${TRIES:-2}"]
    volumes: ["./program:/program"]
    tmpfs: ["/flower"]
    networks: [federation]
    healthcheck: {test: [CMD, python, -c, ""]}
"""

REFUSED = """\
import pathlib, sys, time
log = pathlib.Path(__file__).with_name("log")
with log.open("a") as file:
    file.write("tried ")
if len(log.read_text().split()) <= int(sys.argv[1]):
    sys.exit("not yet")
time.sleep(60)
"""


@pytest.fixture
def here(tmp_path):
    (tmp_path / "compose.yaml").write_text(COMPOSE)
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "refused.py").write_text(REFUSED)
    return tmp_path


def sleepers(running):
    return [process for process in started_for(running._home(running._known["parent"])) if runs(process, "sleep")]


def test_a_service_that_is_killed_leaves_no_process(here):
    with processes(here, file=here / "compose.yaml") as running:
        running.start("parent")
        while not sleepers(running):
            time.sleep(0.05)
        running.kill("parent")
        assert running.ended("parent", 0) == -9
        while sleepers(running):
            time.sleep(0.05)


def test_one_program_of_a_service_is_killed_alone(here):
    with processes(here, file=here / "compose.yaml") as running:
        running.start("parent")
        while not sleepers(running):
            time.sleep(0.05)
        running.kill("parent", "sleep")
        while sleepers(running):
            time.sleep(0.05)
        assert running.ended("parent", 0.1) is None


def test_a_service_is_started_until_it_stays(here, monkeypatch):
    monkeypatch.setattr(topology, "STAYS_SECONDS", 2)
    with processes(here, file=here / "compose.yaml") as running:
        running.revive("refused")
        assert running.ended("refused", 0.1) is None
    assert (here / "program" / "log").read_text().split() == ["tried"] * 3


def test_a_service_that_never_stays_is_given_up(here, monkeypatch):
    monkeypatch.setenv("TRIES", "1000")
    with processes(here, file=here / "compose.yaml") as running, pytest.raises(EngineError, match=r"refused ended .* again.*: not yet"):
        running.revive("refused", 0.5)
