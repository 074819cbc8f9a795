import json
import math

import pytest

from fedvision.errors import RunError
from server.folder import RunFolder
from server.record import RunRecord, read_rows
from server.rounds import COLUMNS, complete


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def rows(folder: RunFolder) -> list[dict]:
    return list(read_rows(folder.rounds))


def recorded(folder: RunFolder, numbers: range, last_round: int = -1) -> None:
    record = RunRecord(folder, last_round, tensorboard=False)
    for number in numbers:
        record.append({"round": number, "train_loss": number / 2})
    record.close()


def test_rows_are_lines_of_json(folder):
    recorded(folder, range(3))
    assert [json.loads(line) for line in folder.rounds.read_text().splitlines()] == rows(folder)
    assert rows(folder)[2] == {"round": 2, "train_loss": 1.0}


def test_a_row_is_on_disk_before_the_next_round(folder):
    record = RunRecord(folder, -1, tensorboard=False)
    record.append({"round": 0})
    assert rows(folder) == [{"round": 0}]
    record.close()


def test_numbers_that_are_not_finite_become_null_and_then_nan(folder):
    record = RunRecord(folder, -1, tensorboard=False)
    record.append({"round": 0, "train_loss": math.nan, "test_loss": math.inf, "failed": []})
    record.close()
    assert rows(folder) == [{"round": 0, "train_loss": None, "test_loss": None, "failed": []}]


def test_rows_after_the_checkpoint_are_dropped_and_written_again(folder):
    recorded(folder, range(6))
    recorded(folder, range(4, 8), last_round=3)
    assert [row["round"] for row in rows(folder)] == list(range(8))


def test_a_new_run_starts_with_no_rows(folder):
    recorded(folder, range(6))
    recorded(folder, range(2))
    assert [row["round"] for row in rows(folder)] == [0, 1]


@pytest.mark.parametrize("tail", ['{"round": 2, "train_lo', "\x00\x00\x00\x00", '{"round"', "3", "null", "[]"])
def test_a_line_torn_by_a_crash_is_passed_over(folder, tail):
    recorded(folder, range(2))
    with folder.rounds.open("a") as file:
        file.write(tail)
    assert [row["round"] for row in rows(folder)] == [0, 1]
    recorded(folder, range(2, 4), last_round=1)
    assert [row["round"] for row in rows(folder)] == [0, 1, 2, 3]


def test_a_file_with_bytes_that_are_no_text_is_read_as_far_as_it_goes(folder):
    recorded(folder, range(2))
    with folder.rounds.open("ab") as file:
        file.write(b"\xff\xfe\xfd\n")
    assert [row["round"] for row in rows(folder)] == [0, 1]


def test_no_file_is_no_rows(folder):
    assert rows(folder) == []


def test_a_full_disk_is_an_error_of_ours(folder):
    folder.path.mkdir()
    folder.rounds.symlink_to("/dev/full")
    record = RunRecord.__new__(RunRecord)
    record._path, record._events = folder.rounds, None
    with folder.rounds.open("w") as file:
        record._file = file
        with pytest.raises(RunError, match=r"rounds.jsonl: cannot be written \(.*No space left"):
            record.append({"round": 0})
        with pytest.raises(RunError, match="cannot be written"):
            record.close()


def test_tensorboard_gets_the_same_numbers(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = RunRecord(folder, -1, tensorboard=True)
    record.append({"round": 0, "train_loss": math.nan, "test_loss": 2.0, "clients": 3, "failed": []})
    record.append({"round": 1, "train_loss": 1.5, "test_loss": 1.0, "clients": 3, "failed": []})
    record.close()
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "test/loss", "round/clients"}
    assert [(event.step, event.value) for event in events.Scalars("test/loss")] == [(0, 2.0), (1, 1.0)]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.5)]


def test_a_resumed_runs_events_replace_those_after_the_checkpoint(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for last_round, losses in ((-1, {0: 9.0, 1: 8.0, 2: 7.0}), (0, {1: 5.0, 2: 4.0})):
        record = RunRecord(folder, last_round, tensorboard=True)
        for number, loss in losses.items():
            record.append({"round": number, "test_loss": loss})
        record.close()
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("test/loss")] == [(0, 9.0), (1, 5.0), (2, 4.0)]


def test_every_row_of_a_table_has_every_column():
    row = complete({"round": 1, "train_loss": 0.5, "own": 3})
    assert set(row) == {*COLUMNS, "own"}
    assert row["train_loss"] == 0.5 and math.isnan(row["validation_loss"])
