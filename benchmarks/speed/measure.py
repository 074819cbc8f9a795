"""Measuring: methods take turns round by round, or run alone from start to stop."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import load_file
from torch import Tensor

import benchmarks
from benchmarks.speed.child import encoded
from benchmarks.speed.jobs import Job
from benchmarks.speed.memory import MARK, Family, Meter
from benchmarks.speed.methods import METHODS, PLAIN
from fedvision.errors import EngineError

Say = Callable[[str], None]

FRESH_TURN = 3
"""Rounds a turn, at most, of a method that is started afresh for each: it warms up as many times."""

RAY = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
"""Ray's workers, Flower's and ours, run at the priority of everybody else. By default they step back, and starve beside other work."""


@dataclass(frozen=True)
class Whole:
    """A job run alone, in a fresh process.

    Attributes:
        seconds: from the start of the process to its end, imports and making the data included.
        started: seconds from having the data and the imports of this package to being ready for the first round.
        peak: bytes, of all of its processes at once.
        rounds: seconds of each.
        difference: of the final weights from the plain loop's, relative; NaN if they were not compared.
    """

    seconds: float
    started: float
    peak: int
    rounds: list[float]
    difference: float = math.nan

    @property
    def summary(self) -> dict[str, float]:
        """All but the rounds."""
        return {name: value for name, value in asdict(self).items() if name != "rounds"}


class Child:
    """A method's process, seen from its parent.

    Args:
        name: of what it computes.
        process: started with pipes.
        family: it and its descendants.
        log: what it printed.
    """

    def __init__(self, name: str, process: subprocess.Popen[str], family: Family, log: Path) -> None:
        self.name, self.process, self.family, self._log = name, process, family, log

    def hear(self) -> dict[str, Any]:
        """The next line that it tells.

        Raises:
            EngineError: it ended without a word.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = self._log.read_text(errors="replace")[-3000:]
            raise EngineError(f"the process of {self.name} ended with status {self.process.wait()}; its last words:\n{tail}")
        return json.loads(line)  # type: ignore[no-any-return]

    def go_on(self) -> None:
        """Let it have its next turn."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; who listens to it will hear why
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def turn(self) -> list[float]:
        """The seconds of each round of its next turn."""
        self.go_on()
        return list(self.hear()["seconds"])


@contextmanager
def child(job: Job, method: str, rounds: int, turn: int = 0, weights: Path | str = "") -> Iterator[Child]:
    """A method's process within the block; nothing of it is left afterwards."""
    family = uuid4().hex
    here = str(Path(benchmarks.__file__).parent.parent)
    line = [sys.executable, "-m", "benchmarks.speed.child", encoded(job), method, str(rounds), str(turn), str(weights)]
    with TemporaryDirectory(prefix="speed-", ignore_cleanup_errors=True) as folder:
        paths = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        environment = os.environ | RAY | {MARK: family, "RAY_TMPDIR": folder, "PYTHONPATH": paths}
        log = Path(folder) / "log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=here
            )
            try:
                yield Child(f"{job.name}, {method}", process, Family(family), log)
                process.wait(timeout=60)
            finally:
                Family(family).kill()
                process.communicate()


def alone(job: Job, method: str, rounds: int, weights: Path | str = "") -> Whole:
    """Run a whole job in a fresh process, and watch its memory."""
    start = time.monotonic()
    with child(job, method, rounds, weights=weights) as own, Meter(own.family) as meter:
        began, ready, end = own.hear(), own.hear(), own.hear()
        own.process.wait(timeout=60)
        seconds = time.monotonic() - start
    return Whole(seconds, ready["ready"] - began["began"], meter.peak, list(end["seconds"]))


@contextmanager
def ready(job: Job, method: str, repeats: int, turn: int) -> Iterator[Child]:
    """A method's process that is ready and has had a turn to warm up; it can take ``repeats`` turns and is then over."""
    with child(job, method, (repeats + 1) * turn + 1, turn) as own:
        own.hear()  # began
        own.hear()  # ready
        own.turn()
        yield own
        own.go_on()  # the last round evaluates and saves, and does not count
        with suppress(EngineError):  # then a turn has failed before, and said so
            own.hear()


def by_turns(job: Job, methods: Sequence[str], repeats: int, turn: int, say: Say) -> dict[str, list[list[float]]]:
    """Seconds of each round, by method and repeat.

    In every repeat each method has a turn of some rounds, in an order that moves on. Those that can wait live through all repeats
    and wait for their turns; the others are started afresh for each. A method that fails is told of and left out.
    """
    found: dict[str, list[list[float]]] = {method: [] for method in methods}
    with ExitStack() as stack:
        waiting: dict[str, Child] = {}
        for name in filter(lambda name: METHODS[name].waits, methods):
            with _told(f"{job.name}, {name}", say):
                waiting[name] = stack.enter_context(ready(job, name, repeats, turn))
        for repeat in range(repeats):
            for name in [*methods[repeat % len(methods) :], *methods[: repeat % len(methods)]]:
                with _told(f"{job.name}, {name}", say):
                    found[name].append(_turn(job, name, turn, waiting))
                    say(f"{job.name}, repeat {repeat + 1} of {repeats}, {name}: {1000 * median(found[name][-1]):.0f} ms a round")
    return {name: turns for name, turns in found.items() if len(turns) == repeats}


def _turn(job: Job, method: str, turn: int, waiting: Mapping[str, Child]) -> list[float]:
    if method in waiting:
        return waiting[method].turn()
    if METHODS[method].waits:
        raise EngineError("it did not start")
    return once(job, method, min(turn, FRESH_TURN))


@contextmanager
def _told(what: str, say: Say) -> Iterator[None]:
    """One method's failure costs no other its numbers."""
    try:
        yield
    except EngineError as error:
        say(f"{what} failed: {error}")


def once(job: Job, method: str, turn: int) -> list[float]:
    """Seconds of each round of one turn in a fresh process that has warmed up."""
    with ready(job, method, 1, turn) as own:
        return own.turn()


def wholes(job: Job, methods: Sequence[str], rounds: int, say: Say) -> dict[str, Whole]:
    """The whole job by each method in turn, the final weights compared with the plain loop's; a method that fails is left out."""
    found: dict[str, Whole] = {}
    with TemporaryDirectory(prefix="speed-") as folder:
        files = {method: Path(folder) / f"{method}.safetensors" for method in dict.fromkeys([PLAIN, *methods])}
        for method, file in files.items():
            with _told(f"{job.name}, {method}", say):
                whole = alone(job, method, rounds, file)
                found[method] = replace(whole, difference=difference(load_file(file), load_file(files[PLAIN])))
                say(f"{job.name}, {rounds} round(s) alone, {method}: {whole.seconds:.1f} s, {whole.peak / 1e6:,.0f} MB")
    return {method: whole for method, whole in found.items() if method in methods}


def difference(weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """The largest ``|w - r| / |r|`` of an array, in Euclidean norms."""
    if weights.keys() != reference.keys():
        raise EngineError(f"one method's arrays are {sorted(weights)}, the other's {sorted(reference)}")
    norm = torch.linalg.vector_norm
    return max(float(norm(weights[name] - array) / norm(array).clamp_min(1e-12)) for name, array in reference.items())
