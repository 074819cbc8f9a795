"""The compose file's coordinator and three silos, as processes: TLS, node keys, networks; the bits of the in-process engine."""

import subprocess

import pytest

from benchmarks import run
from benchmarks.deploy import keys
from benchmarks.deploy.topology import Loopback, Namespaces, bring_up, processes

pytestmark = [pytest.mark.slow, pytest.mark.silos]

THREE = {"rounds": 2, "participants": [0, 1, 2], "learner.hidden": [8], "tensorboard": False}


@pytest.fixture(scope="module")
def topology(tmp_path_factory):
    """Coordinator and silos: each in a network namespace where that is possible, else on loopback."""
    federation = keys.Federation.make(tmp_path_factory.mktemp("federation") / "folder", [], 3, 30)
    with processes(federation.folder, Namespaces.kind if Namespaces.available() else Loopback.kind) as topology:
        bring_up(topology)
        yield topology


@pytest.mark.parametrize("strategy", ["fedavg", "fishr-inter-geo"])
def test_silos_give_the_bits_of_one_process(topology, strategy, tmp_path, no_figures):
    settings = THREE | {"strategy.name": strategy}
    here = run("quickstart", settings, out=tmp_path / "here")
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={str(value).lower()}")]
    done = topology.command("fedvision", "deploy", "run", "quickstart", *words, "--out", str(tmp_path / "there"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "there" / "model.safetensors").read_bytes() == (here.path / "model.safetensors").read_bytes()


def test_the_coordinator_is_checked_and_shows_its_silos(topology):
    address = topology.address("superlink:9092", "silo0")
    checked = topology.command("fedvision", "deploy", "check", "--address", topology.address("control:9092"))
    assert checked.returncode == 0, checked.stdout + checked.stderr + address
    assert "3 registered, 3 online, 3 public keys" in checked.stdout
    assert topology.command("fedvision", "deploy", "status").stdout.count("online") == 3


def test_silos_reach_the_coordinator_only_where_they_may(topology):
    if topology.places.kind != Namespaces.kind:
        pytest.skip("on loopback everybody reaches everything; network namespaces need root")

    def reached(service: str, host: str, port: int) -> bool:
        code = f"import socket; socket.create_connection(({host!r}, {port}), timeout=2)"
        done: subprocess.CompletedProcess[str] = topology.command("python", "-c", code, service=service)
        return done.returncode == 0

    assert reached("silo0", "superlink", 9092)
    assert not reached("silo0", "superlink", 8000)
    assert not reached("silo0", "silo1", 9094)
    assert not reached("silo0", "192.0.2.1", 443)
    assert reached("superexec", "control", 8000)
