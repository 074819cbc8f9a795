"""The process of one method: ``python -m benchmarks.speed.child JOB METHOD ROUNDS TURN WEIGHTS``.

It writes a line of JSON when it is ready and one after each turn of so many rounds, and waits for a line of input before it goes
on. A turn of 0 rounds means one turn of all rounds, without waiting. The final weights are saved to a file.
"""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from safetensors.torch import save_file

from benchmarks.speed.jobs import Job
from benchmarks.speed.methods import METHODS


class Turns:
    """Times rounds, and lets other processes have their turn.

    Args:
        rounds: in a turn; 0: all.
        to: where lines of JSON go.
        resume: where a line says to go on.
    """

    def __init__(self, rounds: int, to: IO[str], resume: IO[str]) -> None:
        self._rounds, self._to, self._resume = rounds, to, resume
        self._seconds: list[float] = []
        self._began = 0.0

    def __call__(self, number: int) -> None:
        """The round ``number`` has ended; 0: everything is ready."""
        now = time.monotonic()
        if number == 0:
            self.tell(ready=now)
            self._wait()
        else:
            self._seconds.append(now - self._began)
        if len(self._seconds) == self._rounds > 0:
            self.tell(seconds=self._seconds)
            self._seconds = []
            self._wait()
        self._began = time.monotonic()

    def tell(self, **facts: Any) -> None:
        """Write one line."""
        self._to.write(json.dumps(facts) + "\n")
        self._to.flush()

    def rest(self) -> list[float]:
        """The seconds of the rounds that no line has told yet."""
        return self._seconds

    def _wait(self) -> None:
        if self._rounds and not self._resume.readline():
            sys.exit("the parent has gone")


def encoded(job: Job) -> str:
    """A job as text."""
    return json.dumps(asdict(job))


def decoded(text: str) -> Job:
    """The job of a text."""
    values = json.loads(text)
    return Job(**values | {"shape": tuple(values["shape"])})


def main(job: str, method: str, rounds: str, turn: str, weights: str) -> None:
    """Compute, and tell the parent."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to the log
    turns, computed = Turns(int(turn), told, sys.stdin), decoded(job)
    _ = computed.data
    turns.tell(began=time.monotonic())
    final = METHODS[method].run(computed, int(rounds), turns)
    if weights:
        save_file({name: tensor.detach().clone().contiguous() for name, tensor in final.items()}, Path(weights))
    turns.tell(finished=time.monotonic(), seconds=turns.rest())


if __name__ == "__main__":
    main(*sys.argv[1:])
