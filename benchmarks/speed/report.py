"""The report of a measurement, as Markdown."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median

from benchmarks.speed import aggregation, figures
from benchmarks.speed.jobs import JOBS
from benchmarks.speed.methods import IN_PROCESS, METHODS, PLAIN, PLAIN_TWO, RAY_ONE, RAY_TWO
from benchmarks.speed.results import Point, Results, Target, medians, targets
from fedvision.files import write_atomically

OURS = (IN_PROCESS, RAY_ONE, RAY_TWO)
ABSENT = "–"


def write(results: Results, folder: Path) -> list[Path]:
    """Write ``report.md``, ``results.json`` and the pictures; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = figures.draw(results, folder)
    text = markdown(results, pictures)
    write_atomically(folder / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
    write_atomically(folder / "results.json", results.save)
    return [folder / "report.md", folder / "results.json", *pictures]


def markdown(results: Results, pictures: Sequence[Path] = ()) -> str:
    """The whole report."""
    parts = [
        ["# Speed", "", *_preamble(results)],
        ["## Targets", "", *_targets(targets(results))],
        *(_job(results, job) for job in results.rounds),
        _whole(results),
        _scaling(results),
        _aggregation(results),
        [f"![{path.stem}]({path.name})" for path in pictures],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _preamble(results: Results) -> Iterator[str]:
    yield "; ".join(f"{name} {value}" for name, value in results.machine.items()) + "."
    yield ""
    yield "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in results.settings.items()) + "."
    yield ""
    yield (
        "All methods compute the same mathematics from the same weights on the same random data in memory. They take turns of a few "
        "rounds in every repeat; a ratio is one of two methods' median rounds in the same repeat, shown as the median over the repeats "
        "(least to most). What warms up is left out. Ratios below 1 mean faster; differences under 15% are noise."
    )
    for method, reason in results.skipped.items():
        yield f"\nNot measured: {METHODS[method].label if method in METHODS else method} ({reason})."


def _targets(found: Iterable[Target]) -> list[str]:
    rows = [[target.name, target.wanted, _number(target.value, target.unit), target.verdict] for target in found]
    return _table(["target", "wanted", "measured", ""], rows)


def _job(results: Results, job: str) -> list[str]:
    title = f": {JOBS[job].title}" if job in JOBS else ""
    found = results.rounds[job]
    rows = [_method(results, job, method) for method in METHODS if found.get(method)]
    headings = ["method", "ms a round", "to the plain loop", "to two processes", "Flower's to it", "difference of the weights"]
    return [f"## {job}{title}", "", *_described(job), *_table(headings, rows)]


def _described(job: str) -> list[str]:
    if job not in JOBS:
        return []
    j = JOBS[job]
    work = f"batches of {j.batch}" if j.batch else "one full gradient"
    return [f"{j.clients:,} clients, {j.cohort} a round, {j.examples:,} examples each, {work}.", ""]


def _method(results: Results, job: str, method: str) -> list[str]:
    best = results.flower(job) if method in OURS else None
    ratios = [results.ratio(job, method, PLAIN), results.ratio(job, method, PLAIN_TWO), results.ratio(job, best, method)]
    difference = results.differences.get(job, {}).get(method)
    return [
        METHODS[method].label,
        f"{1000 * median(medians(results.rounds[job][method])):.0f}",
        *(str(ratio) if ratio is not None else ABSENT for ratio in ratios),
        f"{difference:.0e}" if difference is not None else ABSENT,
    ]


def _whole(results: Results) -> list[str]:
    rows = [
        [
            job,
            METHODS[method].label,
            f"{run['seconds']:.1f}",
            f"{run['started']:.1f}",
            f"{run['peak'] / 1e6:,.0f}",
            f"{run['difference']:.0e}",
        ]
        for job, found in results.whole.items()
        for method, run in found.items()
    ]
    if not rows:
        return []
    about = (
        "From the start of a fresh process to its end. Memory is that of all of its processes at once; shared pages count once. "
        "After many rounds weights differ by more than rounding: a ReLU that rounding switches changes what follows."
    )
    return [
        "## Whole jobs",
        "",
        about,
        "",
        *_table(["job", "method", "seconds", "of them to start", "peak MB", "difference of the weights"], rows),
    ]


def _scaling(results: Results) -> list[str]:
    about = "Ours in process, each point in a fresh process. To start means from the call to being ready for the first round."
    parts = {"clients, two examples each": results.population, "clients a round of 1,000": results.cohorts}
    shown = [["", f"**By {name}**", "", *_points(points)] for name, points in parts.items() if points]
    return ["## Scaling", "", about, *(line for part in shown for line in part)] if shown else []


def _points(points: Iterable[Point]) -> list[str]:
    rows = [[f"{p.clients:,}", f"{p.cohort:,}", f"{p.started:.2f}", f"{1000 * p.round:.1f}", f"{p.peak / 1e6:,.0f}"] for p in points]
    return _table(["clients", "a round", "s to start", "ms a round", "peak MB"], rows)


def _aggregation(results: Results) -> list[str]:
    tables = [aggregation.markdown(times, f"{threads} thread(s)") for threads, times in results.aggregation.items()]
    return ["## Aggregation alone", "", "\n\n".join(tables)] if tables else []


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def _number(value: float | None, unit: str) -> str:
    return ABSENT if value is None else f"{value:.2f} {unit}"
