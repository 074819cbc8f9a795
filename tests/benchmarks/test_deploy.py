"""Keys, certificates and the compose file; nothing is started but the command line."""

import os
import stat
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from benchmarks.deploy import keys
from benchmarks.deploy.checks import certificates
from benchmarks.deploy.compose import COMPOSE, services
from benchmarks.deploy.demonstration import SILOS
from benchmarks.deploy.places import Loopback
from fedvision.errors import EngineError

NOW = datetime(2026, 5, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    return keys.Federation.make(tmp_path_factory.mktemp("keys") / "federation", ["hospital.example", "10.0.0.7"], 3, 90, NOW)


# ---- keys -----------------------------------------------------------------------------------------------------------


def test_only_their_owner_reads_secrets(federation):
    secret = {path.name: stat.S_IMODE(path.stat().st_mode) for path in federation.folder.rglob("*") if path.suffix in (".key", ".secret")}
    assert set(secret) == {"ca.key", "server.key", "superexec.secret", "node.key"}
    assert set(secret.values()) == {0o600}


def test_each_silo_has_a_key_of_its_own_and_nobody_elses(federation):
    pairs = {}
    for number in range(3):
        folder = federation.silo(number)
        assert sorted(path.name for path in folder.iterdir()) == ["ca.crt", "data", "node.key", "silo.toml", "state"]
        private = load_ssh_private_key((folder / "node.key").read_bytes(), None)
        public = load_ssh_public_key(keys.public_keys(federation.coordinator)[f"silo{number}"].read_bytes())
        assert private.public_key().public_numbers() == public.public_numbers()
        pairs[number] = public.public_numbers()
    assert len(set(pairs.values())) == 3


def test_keys_are_never_overwritten(fedvision, here):
    assert fedvision("deploy", "keys", "--out", "made").status == 0
    before = (here / "made" / "authority" / "ca.key").read_bytes()
    again = fedvision("deploy", "keys", "--out", "made")
    assert again.status == 1 and "never overwritten" in " ".join(again.err.split())
    assert (here / "made" / "authority" / "ca.key").read_bytes() == before


def test_a_certificate_is_renewed_without_the_silos(fedvision, here):
    assert fedvision("deploy", "keys", "--out", "made", "--name", "hospital.example").status == 0
    federation = keys.Federation(here / "made")
    before = {path: path.read_bytes() for path in federation.folder.rglob("*") if path.is_file()}
    later = datetime.now(UTC) + timedelta(days=500)
    assert not all(found.good for found in certificates(federation.coordinator, "hospital.example", later))
    assert fedvision("deploy", "renew", "made", "--days", 800, "--name", "10.0.0.9").status == 0
    for host in ("hospital.example", "10.0.0.9", "superlink"):
        assert all(found.good for found in certificates(federation.coordinator, host, later))
    changed = {path.name for path in federation.folder.rglob("*") if path.is_file() and path.read_bytes() != before.get(path)}
    assert changed == {"server.crt", "server.key"}
    assert stat.S_IMODE((federation.coordinator / "server.key").stat().st_mode) == 0o600


def test_a_silo_is_admitted_to_what_there_is(fedvision, here):
    assert fedvision("deploy", "keys", "--out", "made", "--silos", 2).status == 0
    before = {path: path.read_bytes() for path in (here / "made").rglob("*") if path.is_file()}
    admitted = fedvision("deploy", "admit", "made")
    assert admitted.status == 0 and "silo2: for this silo alone" in " ".join(admitted.out.split())
    assert sorted(keys.public_keys(here / "made" / "coordinator")) == ["silo0", "silo1", "silo2"]
    assert sorted(path.name for path in (here / "made" / "silo2").iterdir()) == ["ca.crt", "data", "node.key", "silo.toml", "state"]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_without_the_authority_nothing_is_signed(fedvision, here):
    assert fedvision("deploy", "keys", "--out", "made").status == 0
    (here / "made" / "authority" / "ca.key").unlink()
    for command in ("renew", "admit"):
        ended = fedvision("deploy", command, "made")
        assert ended.status == 1 and "the authority cannot sign" in " ".join(ended.err.split())


@pytest.mark.parametrize("host", ["hospital.example", "10.0.0.7", "superlink", "127.0.0.1"])
def test_the_certificate_has_the_names_of_the_coordinator(federation, host):
    assert all(found.good for found in certificates(federation.coordinator, host, NOW))


@pytest.mark.parametrize(
    ("host", "days", "told"),
    [
        ("elsewhere.example", 0, "but not elsewhere.example"),
        ("superlink", 91, "valid from 2026-04-30 23:55 to 2026-07-30"),
    ],
)
def test_a_certificate_that_is_wrong_says_why(federation, host, days, told):
    wrong = [found for found in certificates(federation.coordinator, host, NOW + timedelta(days=days)) if not found.good]
    assert len(wrong) == 1 and told in wrong[0].fact


def test_a_certificate_of_another_authority_is_found(federation, tmp_path):
    (tmp_path / "ca.crt").write_bytes(keys.authority(NOW).certificate_pem)
    (tmp_path / "server.crt").write_bytes((federation.coordinator / "server.crt").read_bytes())
    first = next(certificates(tmp_path, "superlink", NOW))
    assert not first.good and "not signed by the authority" in first.fact


def test_a_coordinator_that_does_not_answer_is_named(fedvision, federation):
    ended = fedvision("deploy", "check", "--keys", federation.silo(0), "--address", "127.0.0.1:9")
    assert ended.status == 1 and "127.0.0.1:9: not reached" in " ".join(ended.out.split())


# ---- the compose file -----------------------------------------------------------------------------------------------


@pytest.fixture
def known(federation):
    return services(COMPOSE, {"FEDVISION_FEDERATION": str(federation.folder)})


def test_there_are_as_many_silos_as_the_demonstration_makes(known):
    assert [name for name in known if name.startswith("silo")] == [f"silo{number}" for number in range(SILOS)]


def test_each_party_sees_its_own_folder(known, federation):
    assert known["silo1"].mounts["/keys"] == federation.silo(1)
    assert known["silo1"].mounts["/state"] == federation.silo(1) / "state"
    assert {known[name].mounts["/keys"] for name in ("superlink", "superexec", "cli")} == {federation.coordinator}


def test_silos_and_command_line_share_no_network(known):
    assert set(known["silo0"].names) == {"federation"}
    assert set(known["cli"].names) == set(known["superexec"].names) == {"coordinator"}
    assert known["superlink"].names == {"federation": ("superlink",), "coordinator": ("superlink", "control")}
    assert "--host=control" in known["superlink"].command


def test_the_compose_file_holds_no_secret():
    assert "PRIVATE" not in COMPOSE.read_text() and "password" not in COMPOSE.read_text().lower()


def test_on_loopback_each_port_of_each_service_has_its_own(known):
    places = Loopback(known)
    fleet = places.rewritten(known["silo0"], "--superlink=superlink:9092")
    assert fleet.split("=")[1] == places.rewritten(known["superlink"], "--fleet-api-address=0.0.0.0:9092").split("=")[1]
    assert places.rewritten(known["silo0"], "--port=9094") != places.rewritten(known["silo1"], "--port=9094")
    assert places.rewritten(known["superlink"], "--host=control") == "--host=127.0.0.1"


def test_a_compose_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(EngineError, match="run from a checkout"):
        services(tmp_path / "compose.yaml", os.environ)


# ---- demonstrations -------------------------------------------------------------------------------------------------


def test_containers_that_cannot_be_had_are_refused(fedvision, here, monkeypatch):
    monkeypatch.setenv("PATH", str(here))
    ended = fedvision("deploy", "demo", "mine.toml", "--places", "containers")
    assert ended.status == 1 and "containers need podman, podman-compose and the image fedvision:cpu" in " ".join(ended.err.split())
    assert not (here / "runs").exists()


def test_a_demonstration_overwrites_nothing(fedvision, here):
    (here / "taken").mkdir()
    (here / "taken" / "file").touch()
    ended = fedvision("deploy", "demo", "mine.toml", "--out", "taken")
    assert ended.status == 1 and "taken holds something" in " ".join(ended.err.split())


def test_a_demonstration_of_another_number_of_clients_is_refused_before_anything_starts(fedvision, here):
    ended = fedvision("deploy", "demo", "quickstart")
    assert ended.status == 1
    assert "there are 3 silos here, the experiment has 5 clients; set partition.clients = 3, or participants = [0, 1, 2]" in " ".join(
        ended.err.split()
    )
    assert not (here / "runs").exists()
