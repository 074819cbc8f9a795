"""What follows one of Flower's runs, without Flower."""

import json
import subprocess

import pytest

from fedvision.errors import EngineError
from fedvision.grids import flower
from fedvision.grids.flower import Submission

SILENT = json.dumps({"success": False, "error-message": "Using SuperLink: silos\n\nConnection to the SuperLink is unavailable."})
RUNNING, COMPLETED = (json.dumps({"runs": [{"run-id": "5", "status": status}]}) for status in ("running", "finished:completed"))


@pytest.fixture
def submitted(tmp_path, monkeypatch):
    """A run whose status is asked for, and what Flower's command line answers, one after the other."""

    def make(*answers: str, log: str = "Successfully started run 5\n") -> Submission:
        left = iter(answers)
        (tmp_path / "flower.log").write_text(log)
        submission = Submission("silos", {}, tmp_path)
        monkeypatch.setattr(submission, "_command", lambda *words: subprocess.CompletedProcess(words, 0, next(left), ""))
        return submission

    return make


def test_a_superlink_that_is_started_again_does_not_end_what_follows_the_run(submitted, caplog):
    run = submitted(RUNNING, SILENT, SILENT, RUNNING, COMPLETED)
    assert [run._finished() for _ in range(5)] == [False, False, False, False, True]
    assert caplog.text.count("Connection to the SuperLink is unavailable") == 2


def test_a_superlink_that_stays_away_does(submitted, monkeypatch):
    monkeypatch.setattr(flower, "PATIENCE_SECONDS", 2 * flower.STATUS_SECONDS)
    run = submitted(*[SILENT] * 3)
    assert not run._finished() and not run._finished()
    with pytest.raises(EngineError, match="does not tell of run 5, but says: Using SuperLink: silos Connection"):
        run._finished()


def test_patience_begins_anew_with_each_answer(submitted, monkeypatch):
    monkeypatch.setattr(flower, "PATIENCE_SECONDS", 2 * flower.STATUS_SECONDS)
    run = submitted(SILENT, SILENT, RUNNING, SILENT, SILENT, COMPLETED)
    assert [run._finished() for _ in range(6)] == [False] * 5 + [True]


def test_a_run_that_did_not_begin_is_an_error_at_once(submitted):
    with pytest.raises(EngineError, match="`flwr run` on the connection 'silos' failed: refused"):
        submitted(log="refused\n")._finished()
