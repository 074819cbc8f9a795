"""Running a suite: every cell once, side by side on the cores, resumable, none lost when another fails."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from multiprocessing import connection
from pathlib import Path
from queue import Empty
from threading import Event, Thread
from typing import Any

from benchmarks.suite import Cell, Suite, folder
from fedvision.errors import FedVisionError
from fedvision.experiment import Experiment
from server.folder import RunFolder
from server.record import read_rows

DIED = "its worker process died twice (killed, or out of memory); run the same command again"

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


def bench(suite: Suite, path: Path, jobs: int | None = None, on_progress: Progress = lambda name, rounds: None) -> Results:
    """Run what is missing of a suite.

    A cell whose worker process dies is tried once more at the end, alone: it may have been killed, or been out of memory.

    Args:
        suite: what to run.
        path: folder of the results; finished cells in it are kept, unfinished ones are resumed.
        jobs: how many cells run at a time, each on its experiment's number of threads; one a core if not given.
        on_progress: told how far each cell is.
    """
    suite = suite.within(path)
    failures: dict[str, str] = {}
    for stage in stages(suite):
        failures |= _ran(stage, jobs or os.cpu_count() or 1, on_progress)
    return Results(suite, path, failures)


def stages(suite: Suite) -> list[dict[Path, Experiment]]:
    """What a suite runs, by run folder: first the runs that begin by themselves, then those that begin with them, and so on."""
    steps = zip_longest(*(cell.chain for cell in suite.cells))
    return [{folder(suite.path, cell.experiment): cell.experiment for cell in step if cell is not None} for step in steps]


def _ran(wanted: dict[Path, Experiment], jobs: int, on_progress: Progress) -> dict[str, str]:
    """Run what is missing of these; what went wrong, by folder name."""
    failures: dict[str, str] = {}
    fresh, suspects = deque(run for run in wanted if not RunFolder(run).finished), deque[Path]()
    for run in wanted.keys() - set(fresh):
        on_progress(run.name, wanted[run].rounds)
        failures |= _lost(run)
    for cells, side_by_side in ((fresh, jobs), (suspects, 1)):
        while cells:
            window = min(side_by_side, len(cells))
            with _workers(window, on_progress) as submit:
                for run, outcome in _outcomes(cells, window, lambda run: submit(wanted[run].to_toml(), run)):
                    if outcome is DIED and cells is fresh:
                        suspects.append(run)
                    elif outcome is not None:
                        failures[run.name] = outcome
    return failures


def _outcomes(cells: deque[Path], window: int, submit: Callable[[Path], "Future[str | None]"]) -> Iterator[tuple[Path, str | None]]:
    """Each run as it ends, with what went wrong.

    A worker that dies takes the cells with it that are running then, and nobody knows which of them is to blame; so no
    more than ``window`` are handed out at a time, and the rest stay in ``cells`` for the next pool.
    """
    pending: dict[Future[str | None], Path] = {}
    while True:
        with suppress(BrokenProcessPool):
            while cells and len(pending) < window:
                pending[submit(cells[0])] = cells[0]
                cells.popleft()
        if not pending:
            return
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
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
    """In a worker, once: leave Ctrl-C to the parent, never outlive it, keep quiet."""
    global _news  # noqa: PLW0603
    _news = news
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_follow_parent, daemon=True).start()
    import logging

    logging.getLogger("flwr").setLevel(logging.WARNING)


def _follow_parent() -> None:
    """End this process with its parent, even one that was killed: a bench that is started again writes to the same folders."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _run(toml: str, path: Path) -> str | None:
    """In a worker: run one cell; what went wrong, in words, or None."""
    from benchmarks.runs import run

    try:
        done = run(Experiment.parse(toml), out=path, resume=True, draw=False, on_round=lambda row: _news.put((path.name, row["round"])))
    except FedVisionError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return _lost(done.path).get(path.name)


def _lost(run: Path) -> dict[str, str]:
    """What a finished run did not do as asked, by its folder's name."""
    rounds = RunFolder(run).rounds
    lost = sum(row["failures"] for row in read_rows(rounds))
    return {run.name: f"{lost} answers of clients were lost or refused; see {rounds}"} if lost else {}
