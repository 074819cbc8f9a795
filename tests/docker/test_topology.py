"""The compose file's coordinator and three silos: TLS, node keys, networks; the bits of the in-process engine."""

import subprocess

import pytest

from benchmarks import run
from benchmarks.deploy import containers, keys
from benchmarks.deploy.demonstration import best, silos
from benchmarks.deploy.places import Loopback

pytestmark = [pytest.mark.slow, pytest.mark.silos]

THREE = {"rounds": 2, "participants": [0, 1, 2], "learner.hidden": [8], "tensorboard": False}


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    return keys.Federation.make(tmp_path_factory.mktemp("federation") / "folder", [], 3, 30)


@pytest.fixture(scope="module")
def topology(federation):
    """Coordinator and silos: in containers where podman and the image are, else each in a network namespace, else on loopback."""
    with silos(federation.folder, best()) as topology:
        yield topology


@pytest.mark.parametrize("strategy", ["fedavg", "fishr-inter-geo"])
def test_silos_give_the_bits_of_one_process(topology, federation, strategy, tmp_path, no_figures):
    settings = THREE | {"strategy.name": strategy}
    here = run("quickstart", settings, out=tmp_path / "here")
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={str(value).lower()}")]
    done = topology.command("fedvision", "deploy", "run", "quickstart", *words, "--out", f"/runs/{strategy}")
    assert done.returncode == 0, done.stdout + done.stderr
    there = federation.folder / "runs" / strategy
    assert (there / "model.safetensors").read_bytes() == (here.path / "model.safetensors").read_bytes()


def test_the_coordinator_is_checked_and_shows_its_silos(topology):
    checked = topology.command("fedvision", "deploy", "check", "--address", topology.address("control:9092"))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "3 registered, 3 online, 3 public keys" in checked.stdout
    assert topology.command("fedvision", "deploy", "status").stdout.count("online") == 3


def test_silos_reach_the_coordinator_only_where_they_may(topology):
    if topology.kind == Loopback.kind:
        pytest.skip("on loopback everybody reaches everything; network namespaces need root, containers podman and the image")

    def reached(service: str, host: str, port: int) -> bool:
        code = f"import socket; socket.create_connection(({host!r}, {port}), timeout=2)"
        done: subprocess.CompletedProcess[str] = topology.command("python", "-c", code, service=service)
        return done.returncode == 0

    assert reached("silo0", "superlink", 9092)
    assert not reached("silo0", "superlink", 8000)
    assert not reached("silo0", "silo1", 9094)
    assert not reached("silo0", "192.0.2.1", 443)
    assert reached("superexec", "control", 8000)


def test_nobody_in_a_container_is_root_or_writes_where_the_code_is(topology):
    if topology.kind != containers.KIND:
        pytest.skip("processes run as whoever starts them; containers need podman, podman-compose and the image (docker/podman.sh)")
    code = "import os; print(os.geteuid(), os.access('/app', os.W_OK), os.access('/keys', os.W_OK), os.path.exists('/keys/server.key'))"
    for service, has_the_servers_key in {"superlink": True, "silo0": False, "cli": True}.items():
        told = topology.command("python", "-c", code, service=service).stdout.split()
        assert told == [str(containers.USER), "False", "False", str(has_the_servers_key)], service
