"""How our in-process engine grows: with the number of clients, and with the number that trains in a round."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

from benchmarks.speed.jobs import MANY_SMALL, Job
from benchmarks.speed.measure import Whole, alone
from benchmarks.speed.methods import IN_PROCESS
from benchmarks.speed.results import Point

Measure = Callable[[Job, str, int], Whole]

POPULATIONS = (100, 1000, 10_000, 100_000)
COHORTS = (10, 100, 1000)
TINY = replace(MANY_SMALL, name="tiny", title="two examples a client", examples=2)
"""The job of the populations: so little work that what a round costs beside it shows."""


def populations(sizes: Sequence[int], rounds: int, repeats: int, measure: Measure = alone) -> list[Point]:
    """100 clients a round out of ever more."""
    return points([replace(TINY, clients=clients) for clients in sizes], rounds, repeats, measure)


def cohorts(sizes: Sequence[int], rounds: int, measure: Measure = alone) -> list[Point]:
    """Ever more clients a round out of 1,000."""
    return points([replace(MANY_SMALL, cohort=cohort) for cohort in sizes], rounds, 1, measure)


def points(jobs: Sequence[Job], rounds: int, repeats: int, measure: Measure) -> list[Point]:
    """One point a job: the medians over repeats in which the jobs take turns."""
    runs = [[measure(job, IN_PROCESS, rounds + 2) for job in jobs] for _ in range(repeats)]
    return [point(job, [repeat[i] for repeat in runs]) for i, job in enumerate(jobs)]


def point(job: Job, runs: Sequence[Whole]) -> Point:
    """The point of some runs of a job; their first round warms up and their last one evaluates, so neither counts."""
    started, seconds = median(run.started for run in runs), median(median(run.rounds[1:-1]) for run in runs)
    return Point(job.clients, job.cohort, started, seconds, max(run.peak for run in runs))
