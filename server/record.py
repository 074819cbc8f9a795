"""The record of a run: one line of JSON a round, and the same numbers for TensorBoard."""

import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from fedvision.files import unwritable, write_atomically
from server.folder import RunFolder


class RunRecord:
    """Appends rows to ``rounds.jsonl``, and to TensorBoard if wanted.

    Args:
        folder: of the run.
        last_round: rows of later rounds are dropped, since a resumed run computes them again; -1 drops all.
        tensorboard: whether to write TensorBoard events too.
    """

    def __init__(self, folder: RunFolder, last_round: int, tensorboard: bool) -> None:
        kept = [row for row in read_rows(folder.rounds) if row["round"] <= last_round]
        write_atomically(folder.rounds, lambda path: path.write_text("".join(_line(row) for row in kept)))
        self._path = folder.rounds
        try:
            self._file: TextIO = folder.rounds.open("a")
            self._events = Events(folder.tensorboard, last_round + 1) if tensorboard else None
        except OSError as error:
            raise unwritable(folder.path, error) from error

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one round; on disk before this returns."""
        try:
            self._file.write(_line(row))
            self._file.flush()
            if self._events is not None:
                self._events.append(row)
        except OSError as error:
            raise unwritable(self._path, error) from error

    def close(self) -> None:
        """Finish writing."""
        try:
            try:
                self._file.close()
            finally:
                if self._events is not None:
                    self._events.close()
        except OSError as error:
            raise unwritable(self._path, error) from error


class Events:
    """Writes a file of TensorBoard events.

    Not with torch's ``SummaryWriter``: its thread meets a full disk with a traceback and loses what it holds.

    Args:
        folder: of the event files; a resumed run adds one.
        first_round: events of this and later rounds in older files do not count.
    """

    def __init__(self, folder: Path, first_round: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter((folder / name).open("wb"))
        self._write(file_version="brain.Event:2")
        if first_round:
            self._write(step=first_round, session_log=SessionLog(status=SessionLog.START))
        self._writer.flush()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add the finite numbers of one round; on disk before this returns."""
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "round"}
        values = [self._summary.Value(tag=_tag(name), simple_value=value) for name, value in numbers.items() if math.isfinite(value)]
        self._write(step=row["round"], summary=self._summary(value=values))
        self._writer.flush()

    def close(self) -> None:
        """Finish writing."""
        self._writer.close()

    def _write(self, **content: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **content).SerializeToString())


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a ``rounds.jsonl``; a torn last line, left by a crash, is passed over."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                return
            if not isinstance(row, dict) or "round" not in row:
                return
            yield row


def _line(row: Mapping[str, Any]) -> str:
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _tag(name: str) -> str:
    part, _, metric = name.partition("_")
    return f"{part}/{metric}" if part in ("train", "validation", "test") and metric else f"round/{name}"
