"""By whom the jobs are computed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from benchmarks.speed.jobs import Job
from fedvision import registry

Run = Callable[[Job, int, Callable[[int], None]], dict[str, Tensor]]
"""Computes so many rounds of a job, tells the number of each as it ends (0: ready to begin), returns the final weights."""


@dataclass(frozen=True)
class Method:
    """A way to compute a job.

    Attributes:
        label: for tables.
        run: does it.
        waits: whether it may stay alive while others compute; Flower's simulation polls, and would disturb them.
        engine: ours that it needs.
    """

    label: str
    run: Run
    waits: bool = True
    engine: str | None = None

    @property
    def missing(self) -> str | None:
        """Why it cannot be measured here, if so."""
        if self.engine is None or self.engine in registry.engines.names():
            return None
        return f"there is no engine {self.engine!r} here"


def ours(job: Job, rounds: int, on_round: Callable[[int], None], engine: dict[str, Any]) -> dict[str, Tensor]:
    """Our own engine."""
    from benchmarks.runs import run

    with TemporaryDirectory(prefix="speed-") as folder:
        experiment = job.experiment(rounds, engine)
        done = run(experiment, data=job.data, out=Path(folder) / "run", draw=False, on_round=lambda row: on_round(row["round"]))
        return done.state


def plain(job: Job, rounds: int, on_round: Callable[[int], None]) -> dict[str, Tensor]:
    """The plain loop in one process."""
    from benchmarks.speed.plain import one_process

    return one_process(job, rounds, on_round)


def plain_two(job: Job, rounds: int, on_round: Callable[[int], None]) -> dict[str, Tensor]:
    """The plain loop in two processes."""
    from benchmarks.speed.plain import several_processes

    return several_processes(job, rounds, on_round, workers=2)


def flower(job: Job, rounds: int, on_round: Callable[[int], None], threads: int | None) -> dict[str, Tensor]:
    """Flower's simulation."""
    from benchmarks.speed.flower import simulate

    return simulate(job, rounds, on_round, threads)


PLAIN, PLAIN_TWO, IN_PROCESS, RAY_ONE, RAY_TWO = "plain", "plain-2", "in-process", "ray-1", "ray-2"
FLOWER, FLOWER_ONE_THREAD = "flower", "flower-1-thread"

METHODS = {
    PLAIN: Method("plain loop", plain),
    PLAIN_TWO: Method("plain loop, two processes", plain_two),
    IN_PROCESS: Method("ours, in process", partial(ours, engine={"name": "in-process"})),
    RAY_ONE: Method("ours, Ray, one worker", partial(ours, engine={"name": "ray", "workers": 1}), engine="ray"),
    RAY_TWO: Method("ours, Ray, two workers", partial(ours, engine={"name": "ray", "workers": 2}), engine="ray"),
    FLOWER: Method("Flower's simulation", partial(flower, threads=None), waits=False),
    FLOWER_ONE_THREAD: Method("Flower's simulation, one thread a client", partial(flower, threads=1), waits=False),
}
