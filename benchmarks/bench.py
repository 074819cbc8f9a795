"""Running a suite: every cell once, side by side on the cores, resumable, none lost when another fails."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

from benchmarks.suite import Cell, Suite
from fedvision.errors import FedVisionError
from fedvision.experiment import Experiment

ATTEMPTS = 2
"""How often a cell is tried whose worker process died."""

Progress = Callable[[str, int], None]
"""(cell's folder name, rounds done)"""


@dataclass(frozen=True)
class Results:
    """What a bench has computed.

    Attributes:
        suite: what was asked for.
        path: folder of the results.
        failures: cell folder name -> why it has no result.
    """

    suite: Suite
    path: Path
    failures: dict[str, str] = field(default_factory=dict)

    def folder(self, cell: Cell) -> Path:
        """The run folder of a cell."""
        return folder(self.path, cell.experiment)


def folder(path: Path, experiment: Experiment) -> Path:
    """Where the run of an experiment is kept: by name and fingerprint, so that equal cells are computed once."""
    return path / "runs" / f"{experiment.name}-{experiment.strategy.name.split(':')[-1]}-{experiment.fingerprint}"


def bench(suite: Suite, path: Path, jobs: int | None = None, on_progress: Progress = lambda name, rounds: None) -> Results:
    """Run what is missing of a suite.

    Args:
        suite: what to run.
        path: folder of the results; finished cells in it are kept, unfinished ones are resumed.
        jobs: how many cells run at a time, each on its experiment's number of threads; one a core if not given.
        on_progress: told how far each cell is.
    """
    wanted = {folder(path, cell.experiment): cell.experiment for cell in suite.cells}
    jobs = jobs or os.cpu_count() or 1
    failures: dict[str, str] = {}
    attempts = dict.fromkeys(wanted, 0)
    while left := [run for run, tries in attempts.items() if tries < ATTEMPTS]:
        with _workers(min(jobs, len(left)), on_progress) as submit:
            pending = {submit(wanted[run].to_toml(), run): run for run in left}
            for run, outcome in _outcomes(pending):
                attempts[run] = ATTEMPTS if outcome is not DIED else attempts[run] + 1
                failures.pop(run.name, None)
                if outcome is not None:
                    failures[run.name] = outcome
    return Results(suite, path, failures)


DIED = "its worker process died (killed, or out of memory); run the same command again, with fewer --jobs"


def _outcomes(pending: dict["Future[str | None]", Path]) -> Iterator[tuple[Path, str | None]]:
    """Each run as it ends, with what went wrong."""
    while pending:
        done, _ = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            run = pending.pop(future)
            try:
                yield run, future.result()
            except BrokenProcessPool:
                yield run, DIED


@contextmanager
def _workers(jobs: int, on_progress: Progress) -> Iterator[Callable[[str, Path], "Future[str | None]"]]:
    """A pool of worker processes; ended at once when the block is left early."""
    context = multiprocessing.get_context("spawn")
    news = context.Queue()
    pool = ProcessPoolExecutor(jobs, context, _begin, (news,))
    stop = _listening(news, on_progress)
    try:
        yield lambda toml, run: pool.submit(_run, toml, run)
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    finally:
        pool.shutdown(wait=True)
        stop()


def _listening(news: Any, on_progress: Progress) -> Callable[[], None]:
    """Hand the workers' news on, from a thread, until told to stop."""
    from threading import Event, Thread

    ended = Event()

    def listen() -> None:
        while True:
            try:
                on_progress(*news.get(timeout=0.1))
            except Empty:
                if ended.is_set():
                    return

    thread = Thread(target=listen, daemon=True)
    thread.start()

    def stop() -> None:
        ended.set()
        thread.join()

    return stop


_news: Any = None


def _begin(news: Any) -> None:
    """In a worker, once: leave Ctrl-C to the parent, keep quiet."""
    global _news  # noqa: PLW0603
    _news = news
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import logging

    logging.getLogger("flwr").setLevel(logging.WARNING)


def _run(toml: str, path: Path) -> str | None:
    """In a worker: run one cell; what went wrong, in words, or None."""
    from benchmarks.runs import run

    try:
        done = run(Experiment.parse(toml), out=path, resume=True, draw=False, on_round=lambda row: _news.put((path.name, row["round"])))
    except FedVisionError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    lost = int(done.rounds["failures"].sum())
    return f"{lost} answers of clients were lost or refused; see {path / 'rounds.jsonl'}" if lost else None
