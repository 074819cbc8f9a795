"""The coordinator crashes: the run goes on, or is resumed, and ends with the bits of an undisturbed one."""

import time

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.silos]

OUTAGE_SECONDS = 10


def test_a_superlink_that_is_killed_and_started_again_goes_on_with_the_run(federation, undisturbed):
    federation.begin("scaffold", 3, faults=["silo1 2 hold"])
    federation.await_held("silo1 2")
    federation.topology.kill("superlink")
    federation.release("silo1 2")
    time.sleep(OUTAGE_SECONDS)
    federation.topology.start("superlink")
    federation.ended(0)
    assert federation.bits() == undisturbed("scaffold", 3)


def test_a_server_app_that_is_killed_is_resumed_from_its_checkpoint(federation, undisturbed):
    federation.begin("scaffold", 4, faults=["silo1 4 hold"], checkpoint_every=2)
    federation.await_held("silo1 4")
    federation.topology.kill("superexec", "flwr-serverapp")
    federation.release("silo1 4")
    assert "go on with --resume" in federation.ended(1).stderr
    assert [row["round"] for row in federation.rows()] == [0, 1, 2, 3]
    federation.begin("scaffold", 4, "--resume", faults=["silo1 4 hold"], checkpoint_every=2)
    federation.ended(0)
    assert [row["round"] for row in federation.rows()] == [0, 1, 2, 3, 4]
    assert federation.bits() == undisturbed("scaffold", 4, checkpoint_every=2)


def test_a_coordinator_that_is_killed_whole_is_resumed_from_its_checkpoint(federation, undisturbed):
    federation.begin("scaffold", 3, faults=["silo1 3 hold"], checkpoint_every=1)
    federation.await_held("silo1 3")
    federation.topology.kill("superexec")
    federation.topology.kill("superlink")
    federation.release("silo1 3")
    time.sleep(OUTAGE_SECONDS)
    federation.topology.start("superlink", "superexec")
    assert "go on with --resume" in federation.ended(1).stderr
    federation.begin("scaffold", 3, "--resume", faults=["silo1 3 hold"], checkpoint_every=1)
    federation.ended(0)
    assert federation.bits() == undisturbed("scaffold", 3, checkpoint_every=1)
