"""Nobody joins who should not: each refusal ends the silo, or keeps it out, with a line that says why."""

import json
from datetime import UTC, datetime

import pytest

from benchmarks.deploy import keys
from benchmarks.deploy.checks import examine
from benchmarks.deploy.topology import processes
from fedvision.grids.local_superlink import last_words

pytestmark = [pytest.mark.slow, pytest.mark.silos]


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory):
    """A coordinator with TLS and node authentication, with which no silo is registered."""
    federation = keys.Federation.make(tmp_path_factory.mktemp("federation") / "folder", [], 3, 30)
    with processes(federation.folder) as topology:
        topology.start("superlink")
        yield federation, topology


def refused(topology, silo, **changes) -> str:
    """What a silo says that is started so; it must end."""
    topology.log(silo).unlink(missing_ok=True)
    topology.launch(silo, **changes)
    status = topology.ended(silo, 60)
    said = topology.log(silo).read_text()
    topology.stop(silo)
    assert status, f"{silo} was not refused: {last_words(topology.log(silo), 20)}"
    return said


def test_a_key_that_is_not_registered_is_refused(coordinator):
    assert "Failed to activate SuperNode" in refused(coordinator[1], "silo0")
    assert "No SuperNode found with the given public key" in coordinator[1].log("superlink").read_text()


def test_a_key_does_not_travel_in_plain_text(coordinator):
    said = refused(coordinator[1], "silo1", replace={"--root-certificates=/keys/ca.crt": "--insecure"})
    assert "SuperNode authentication requires a secure TLS connection" in said


def test_a_plain_text_silo_is_refused(coordinator):
    plain = {"--root-certificates=/keys/ca.crt": "--insecure", "--auth-supernode-private-key=/keys/node.key": None}
    topology = coordinator[1]
    topology.launch("silo1", replace=plain)
    while "Connection attempt failed" not in topology.log("silo1").read_text():
        assert topology.ended("silo1", 0.2) is None
    topology.stop("silo1")
    listed = topology.command("flwr", "supernode", "list", "silos", "--format", "json")
    assert json.loads(listed.stdout)["nodes"] == []


def test_a_silo_of_another_authority_refuses_the_coordinator(coordinator):
    federation, topology = coordinator
    (federation.silo(2) / "ca.crt").write_bytes(keys.authority(datetime.now(UTC)).certificate_pem)
    assert "CERTIFICATE_VERIFY_FAILED" in refused(topology, "silo2")
    [told] = [found for found in examine(federation.silo(2), "", topology.address("superlink:9092")) if not found.good]
    assert "its certificate is refused: unable to get local issuer certificate" in told.fact


def test_an_expired_certificate_is_refused(tmp_path):
    federation = keys.Federation.make(tmp_path / "federation", [], 3, -1)
    with processes(federation.folder) as topology:
        topology.start("superlink")
        assert "CERTIFICATE_VERIFY_FAILED: certificate has expired" in refused(topology, "silo0")
        [told] = [found for found in examine(federation.silo(0), "", topology.address("superlink:9092")) if not found.good]
        assert "its certificate is refused: certificate has expired" in told.fact
        registered = topology.command("flwr", "supernode", "list", "silos")
        assert registered.returncode == 1
