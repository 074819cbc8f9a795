"""The record of a run: one line of JSON a round, and the same numbers for TensorBoard."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from server.folder import RunFolder, unwritable, write_atomically


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
            self._events = _event_writer(folder.tensorboard, last_round + 1) if tensorboard else None
        except OSError as error:
            raise unwritable(folder.path, error) from error

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one round; on disk before this returns."""
        try:
            self._file.write(_line(row))
            self._file.flush()
        except OSError as error:
            raise unwritable(self._path, error) from error
        if self._events is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name != "round" and math.isfinite(value):
                    self._events.add_scalar(_tag(name), value, row["round"])
            self._events.flush()

    def close(self) -> None:
        """Finish writing."""
        try:
            self._file.close()
        except OSError as error:
            raise unwritable(self._path, error) from error
        if self._events is not None:
            self._events.close()


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a ``rounds.jsonl``; a torn last line, left by a crash, is passed over."""
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


def _line(row: Mapping[str, Any]) -> str:
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _tag(name: str) -> str:
    part, _, metric = name.partition("_")
    return f"{part}/{metric}" if part in ("train", "validation", "test") and metric else f"round/{name}"


def _event_writer(path: Path, first_round: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(path), purge_step=first_round or None)
