"""Real silos fail: the run goes on, with the bits of a run in which whoever failed was not asked."""

import time

import pytest

from benchmarks.deploy.places import Namespaces

pytestmark = [pytest.mark.slow, pytest.mark.silos]


def test_clients_that_raise_send_nan_or_die_are_named_and_leave_no_trace(federation, undisturbed):
    federation.begin("scaffold", 4, faults=["silo0 1 raise", "silo1 2 nan", "silo2 3 kill"])
    done = federation.ended(3)
    reasons = {row["round"]: row["failed"] for row in federation.rows()}
    assert reasons[0] == reasons[4] == []
    [raised], [nan], [died] = reasons[1], reasons[2], reasons[3]
    assert raised == "client 0: RunError: ValueError; what it says may tell of the silo's data, and is in the silo's log only"
    assert nan.startswith("client 1: array ") and nan.endswith("holds NaN or infinite values")
    assert died == "client 2: ClientApp stopped responding."
    assert "Jane Doe" in federation.topology.log("silo0").read_text()
    assert "Jane Doe" not in done.stdout + done.stderr
    assert federation.bits() == undisturbed("scaffold", 4, {(1, 0), (2, 1), (3, 2)})


def test_a_silo_that_leaves_for_good_between_two_phases_leaves_no_trace(federation, undisturbed):
    federation.begin("fishr-inter-geo", 2, faults=["silo1 1 hold"])
    federation.await_held("silo1 1")
    federation.topology.kill("silo1")
    federation.ended(3)
    reasons = {row["round"]: row["failed"] for row in federation.rows()}
    assert len(reasons[1]) == 1 and reasons[1][0].startswith("client 1: ")
    assert "client 1: its node is not connected" in reasons[2]
    assert federation.bits() == undisturbed("fishr-inter-geo", 2, {(1, 1), (2, 1)})


def test_a_silo_that_is_killed_and_started_again_goes_on_with_what_it_kept(federation, undisturbed):
    federation.begin("scaffold", 4, faults=["silo1 2 hold", "silo0 3 hold"])
    federation.await_held("silo1 2")
    federation.topology.kill("silo1")
    federation.release("silo1 2")
    federation.topology.revive("silo1")
    assert "305" in federation.topology.log("silo1").read_text()  # the coordinator has refused it for a while
    federation.await_held("silo0 3")
    federation.await_(lambda: federation.topology.command("fedvision", "deploy", "status").stdout.count("online") == 3)
    federation.release("silo0 3")
    federation.ended(3)
    missed = federation.failed()
    assert {(2, 1)} <= missed <= {(2, 1), (3, 1)}  # in round 3 it may be back
    assert federation.rows()[-1]["clients"] == 3
    assert federation.bits() == undisturbed("scaffold", 4, missed)


def test_a_silo_that_is_too_late_counts_as_lost_until_it_has_answered(federation, undisturbed):
    federation.begin("scaffold", 4, faults=["silo1 2 hold"], **{"engine.deadline": 90})
    federation.await_held("silo1 2")
    federation.await_round(2)
    federation.release("silo1 2")
    federation.ended(3)
    missed = federation.failed()
    assert (2, 1) in missed and federation.rows()[-1]["clients"] == 3
    assert federation.bits() == undisturbed("scaffold", 4, missed)


def link(federation, state):
    """Cut a silo's network, ``down``, or join it again, ``up``."""
    device = federation.topology.command("ls", "/sys/class/net", service="silo1").stdout.split()
    [device] = [name for name in device if name.startswith("eth")]
    done = federation.topology.command("ip", "link", "set", device, state, service="silo1")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("federation", [Namespaces.kind], indirect=True)
def test_an_answer_that_finds_no_network_for_a_quarter_of_a_minute_is_not_lost(federation, undisturbed):
    federation.begin("scaffold", 2, faults=["silo1 1 hold"])
    federation.await_held("silo1 1")
    link(federation, "down")
    federation.release("silo1 1")
    time.sleep(15)
    link(federation, "up")
    federation.ended(0)
    assert federation.bits() == undisturbed("scaffold", 2)


@pytest.mark.parametrize("federation", [Namespaces.kind], indirect=True)
def test_a_message_that_a_cut_network_has_swallowed_is_sent_again(federation, undisturbed):
    federation.begin("scaffold", 2, faults=["silo0 1 hold"])
    federation.await_held("silo0 1")
    federation.await_(
        lambda: federation.topology.log("silo1").read_text().count("Sent successfully") == 3
    )  # roll call, evaluation, round 1
    link(federation, "down")
    federation.release("silo0 1")
    time.sleep(15)  # in which silo1 asks for round 2, and may be given it in vain
    link(federation, "up")
    federation.ended(0)
    assert federation.bits() == undisturbed("scaffold", 2)
