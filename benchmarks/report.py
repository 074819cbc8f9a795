"""What a bench reports: tables with statistics, costs, figures; on the terminal, as Markdown, CSV and LaTeX."""

import math
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import figures
from benchmarks.bench import Results
from benchmarks.readings import READINGS, honest
from benchmarks.runs import Run
from benchmarks.statistics import Summary, summarize
from benchmarks.suite import Cell, Column, Report, Suite, Sweep
from fedvision.files import write_atomically
from server.folder import RunFolder
from server.rounds import ENVIRONMENT_ACCURACY

SIMULATED = "simulated_seconds"
"""The column of a round's seconds on the virtual clock, in runs whose experiment has a behavior."""

WIDE = 100
"""Columns that a terminal must have for the published numbers to be printed too; the files always have them."""
FEW = 2
"""So many runs at least make a band or an interval."""


@dataclass(frozen=True)
class Block:
    """A report on one experiment: for each row, a summary under each selection, and the published number; or why it is missing."""

    report: Report
    column: str
    title: str
    rows: dict[str, dict[str, Summary]]
    published: dict[str, tuple[float, float]]
    missing: dict[str, str]


class Rounds:
    """The tables of rounds of a bench's finished cells, each read once."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self._read: dict[Path, pd.DataFrame] = {}

    def __call__(self, cell: Cell) -> pd.DataFrame | None:
        """The rounds of a cell; None if it has not finished."""
        path = self._results.folder(cell)
        if path not in self._read:
            if not RunFolder(path).finished:
                return None
            rounds = Run(path).rounds
            self._read[path] = rounds.astype({name: float for name in rounds if rounds[name].isna().all()})  # None: never a number
        return self._read[path]

    def of(self, column: str, row: str, swept: tuple[str, float] | None = None) -> list[pd.DataFrame]:
        """The rounds of every finished seed of one spot of the suite."""
        cells = [cell for cell in self._results.suite.cells if (cell.column, cell.row, cell.swept) == (column, row, swept)]
        return [rounds for cell in cells if (rounds := self(cell)) is not None]


def blocks(suite: Suite, rounds: Rounds) -> Iterator[Block]:
    """Every table of the suite, experiment by experiment, where there is something to show."""
    for report in suite.tables:
        for column in report.columns or tuple(suite.experiments):
            if column not in suite.experiments:
                continue
            shown = [row for row in report.rows or tuple(suite.strategies) if row in suite.strategies]
            block = _block(report, column, suite.experiments[column], {row: rounds.of(column, row) for row in shown}, suite)
            if block.rows:
                yield block


def _block(report: Report, name: str, column: Column, tables: dict[str, list[pd.DataFrame]], suite: Suite) -> Block:
    seeds = suite.seeds
    rows: dict[str, dict[str, Summary]] = {}
    complete = {row: runs for row, runs in tables.items() if len(runs) == seeds}
    for reading in suite.readings:
        values = {
            row: tuple(report.scale * READINGS[reading].of(run, report.metric) for run in runs)
            for row, runs in complete.items()
            if all(report.metric in run for run in runs)
        }
        measured = {row: some for row, some in values.items() if some and all(map(math.isfinite, some))}
        for row, summary in summarize(measured, report.better == "lower").items() if measured else ():
            rows.setdefault(row, {})[reading] = summary
    published = {row: (mean, std) for row, (mean, std) in column.paper.get(report.metric, {}).items()}
    lost = {row: f"{_plural(seeds - len(runs), 'run')} missing" for row, runs in tables.items() if len(runs) < seeds}
    missing = {row: lost.get(row, "not a number in some run") for row in tables if row not in rows}
    return Block(report, name, column.title, rows, published, missing)


@dataclass(frozen=True)
class Cost:
    """What one row needs to reach an experiment's target, in the mean over the seeds that reach it; seconds are simulated."""

    row: str
    reached: int
    seeds: int
    rounds: float
    megabytes: float
    seconds: float


def costs(suite: Suite, rounds: Rounds) -> dict[str, list[Cost]]:
    """For each experiment with a target: rounds, megabytes both ways of all clients, and simulated seconds, until it is reached."""
    result: dict[str, list[Cost]] = {}
    for name, column in suite.experiments.items():
        if column.target is None:
            continue
        lower = column.target.metric.endswith("loss")
        for row in suite.strategies:
            hits = []
            for run in rounds.of(name, row):
                values = run.get(column.target.metric, pd.Series(dtype=float))
                reached = (values <= column.target.value) if lower else (values >= column.target.value)
                if reached.any():
                    until = run.loc[: reached.idxmax()]
                    seconds = until[SIMULATED].sum() if SIMULATED in until else math.nan
                    hits.append((len(until) - 1, (until["bytes_up"] + until["bytes_down"]).sum() / 1e6, seconds))
            means = np.mean(hits, axis=0).tolist() if hits else [math.nan] * 3
            result.setdefault(name, []).append(Cost(row, len(hits), suite.seeds, *means))
    return result


def write(results: Results) -> list[Path]:
    """Write ``report.md``, ``report.csv``, ``report.tex`` and the figures; returns their paths, pictures last."""
    rounds, suite = Rounds(results), results.suite
    found = list(blocks(suite, rounds))
    pictures = list(_figures(results, rounds))
    texts = {
        "report.md": markdown(results, found, costs(suite, rounds), pictures),
        "report.csv": csv(suite, found),
        "report.tex": latex(suite, found),
    }
    for name, text in texts.items():
        write_atomically(results.path / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))  # type: ignore[misc]
    return [*(results.path / name for name in texts), *pictures]


def print_tables(console: Console, results: Results) -> None:
    """Print the tables of a bench."""
    suite, rounds = results.suite, Rounds(results)
    for block in blocks(suite, rounds):
        table = Table(title=escape(f"{block.report.title}: {block.title}"), title_justify="left", title_style="bold")
        table.add_column(suite.rows_are, no_wrap=True)
        wide = bool(block.published) and console.width >= WIDE
        for heading in [*(["published"] if wide else []), *(READINGS[reading].heading for reading in suite.readings)]:
            table.add_column(heading, justify="right")
        for row, summaries in block.rows.items():
            cells = [_marked(summaries.get(reading), "[bold]", "[/]") for reading in suite.readings]
            published = [_published(block, row)] if wide else []
            table.add_row(escape(suite.strategies[row].label), *published, *cells)
        console.print(table)
        for line in _left_out(suite, block):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{_plural(suite.seeds, 'paired seed')}; mean ± std; best in bold; ≈ cannot be told apart from the best", highlight=False)
    for cell, reason in results.failures.items():
        console.print(f"[red]{escape(cell)}[/]: {escape(reason)}", soft_wrap=True)


def markdown(results: Results, found: list[Block], spent: dict[str, list[Cost]], pictures: list[Path]) -> str:
    """The whole report as Markdown."""
    suite = results.suite
    lines = [f"# {suite.title}", "", *_preamble(suite), ""]
    for block in found:
        lines += [f"## {block.report.title}: {block.title}", "", *_markdown_table(suite, block), ""]
    for column, entries in spent.items():
        lines += [f"## Cost: {suite.experiments[column].title}", "", *_cost_table(suite, column, entries), ""]
    if results.failures:
        lines += ["## Not computed, or not as asked", "", *(f"- `{cell}`: {reason}" for cell, reason in results.failures.items()), ""]
    lines += [f"![{path.stem}]({quote(path.relative_to(results.path).as_posix())})\n" for path in pictures]
    return "\n".join(lines).rstrip() + "\n"


def csv(suite: Suite, found: list[Block]) -> str:
    """One line a table, experiment, strategy and selection, with every number."""
    records = [
        {
            "table": block.report.title,
            "metric": block.report.metric,
            "scale": block.report.scale,
            "experiment": block.column,
            "strategy": row,
            "selection": selection,
            "mean": summary.mean,
            "std": summary.std,
            "ci_low": summary.low,
            "ci_high": summary.high,
            "p_holm": summary.p,
            "best": summary.best,
            "tied_with_best": summary.tied,
            "published_mean": block.published.get(row, (math.nan, math.nan))[0],
            "published_std": block.published.get(row, (math.nan, math.nan))[1],
            **{f"seed{i}": value for i, value in enumerate(summary.values)},
        }
        for block in found
        for row, summaries in block.rows.items()
        for selection, summary in summaries.items()
    ]
    return pd.DataFrame(records).to_csv(index=False) if records else ""


def latex(suite: Suite, found: list[Block]) -> str:
    """One ``tabular`` a table; needs the package booktabs."""
    parts = []
    for block in found:
        columns = [*(["published"] if block.published else []), *suite.readings]
        lines = [
            f"% {block.report.title}: {block.title}",
            rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
            r"\toprule",
            " & ".join([suite.rows_are, *columns]) + r" \\",
            r"\midrule",
        ]
        for row, summaries in block.rows.items():
            cells = [_marked(summaries.get(reading), r"\textbf{", "}") for reading in suite.readings]
            published = [_published(block, row)] if block.published else []
            label = re.sub(r"([&%$#_{}])", r"\\\1", suite.strategies[row].label)
            lines.append(" & ".join([label, *published, *cells]) + r" \\")
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
    text = "\n\n".join(parts)
    return text.replace("±", r"$\pm$").replace("≈", r"$\approx$").replace("–", "--") + "\n"


def _preamble(suite: Suite) -> list[str]:
    return [
        f"{_plural(suite.seeds, 'paired seed')}: a seed fixes the data, their split and the initial weights for all rows alike.",
        "Mean ± standard deviation [95% bootstrap interval of the mean]. **Bold**: best mean. ≈: cannot be told apart from the best at the",
        "5% level (paired t-test, Holm-corrected within the column). The columns differ in what of a run's rounds is reported:",
        "; ".join(f"*{READINGS[reading].heading}* {READINGS[reading].meaning}" for reading in suite.readings) + ".",
        "*Published* numbers are the source's own, on its own data. MB are 10^6 bytes.",
        f"Computed on {platform.machine()}, torch {torch.__version__}, one thread a run.",
    ]


def _markdown_table(suite: Suite, block: Block) -> list[str]:
    headings = [suite.rows_are, *(["published"] if block.published else []), *(READINGS[reading].heading for reading in suite.readings)]
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    for row, summaries in block.rows.items():
        cells = [_marked(summaries.get(reading), "**", "**", interval=True) for reading in suite.readings]
        published = [_published(block, row)] if block.published else []
        lines.append("| " + " | ".join([suite.strategies[row].label, *published, *cells]) + " |")
    return [*lines, *_left_out(suite, block)]


def _left_out(suite: Suite, block: Block) -> list[str]:
    absent = [f"{suite.strategies[row].label} ({reason})" for row, reason in block.missing.items()]
    return ["", f"Left out: {', '.join(absent)}."] if absent else []


def _cost_table(suite: Suite, column: str, entries: list[Cost]) -> list[str]:
    target = suite.experiments[column].target
    assert target is not None, "only experiments with a target have costs"
    sign = "at most" if target.metric.endswith("loss") else "at least"
    clocked = any(math.isfinite(cost.seconds) for cost in entries)
    until = f"Until {target.metric.replace('_', ' ')} is {sign} {target.value:g}"
    lines = [
        f"{until}; megabytes are array data up and down, all clients together" + ("; seconds are simulated." if clocked else "."),
        "",
        f"| {suite.rows_are} | runs that reach it | rounds | MB |" + (" s |" if clocked else ""),
        "|---|---:|---:|---:|" + ("---:|" if clocked else ""),
    ]
    for cost in entries:
        numbers = [cost.rounds, cost.megabytes, *([cost.seconds] if clocked else [])]
        cells = " | ".join(f"{number:.1f}" if cost.reached else "–" for number in numbers)
        lines.append(f"| {suite.strategies[cost.row].label} | {cost.reached} of {cost.seeds} | {cells} |")
    return lines


def _marked(summary: Summary | None, bold: str, end: str, interval: bool = False) -> str:
    if summary is None:
        return "–"
    digits = 3 if abs(summary.mean) < 100 else 1
    text = f"{summary.mean:.{digits}f} ± {summary.std:.{digits}f}"
    if interval and len(summary.values) >= FEW:
        text += f" [{summary.low:.{digits}f}, {summary.high:.{digits}f}]"
    if summary.best:
        return f"{bold}{text}{end}"
    return f"≈ {text}" if summary.tied else text


def _published(block: Block, row: str) -> str:
    if row not in block.published:
        return "–"
    mean, std = block.published[row]
    return f"{mean:.3f} ± {std:.3f}"


def _figures(results: Results, rounds: Rounds) -> Iterator[Path]:
    suite, home = results.suite, results.path / "figures"
    for column in suite.experiments:
        about = [report for report in suite.tables if column in (report.columns or suite.experiments)]
        runs = {suite.strategies[row].label: rounds.of(column, row) for row in _rows_of(suite, about)}
        runs = {label: some for label, some in runs.items() if some}
        if not runs:
            continue
        metrics = figures.in_common(runs, [report.metric for report in about])
        yield figures.save(figures.comparison(runs, metrics, suite.experiments[column].title), home / f"{column}-curves.png")
        if all(SIMULATED in table for tables in runs.values() for table in tables):
            figure = figures.comparison(runs, metrics, suite.experiments[column].title, clock=SIMULATED)
            yield figures.save(figure, home / f"{column}-clock.png")
        environments = _environments(runs)
        if environments:
            yield figures.save(figures.environments(environments, suite.experiments[column].title), home / f"{column}-environments.png")
    for number, sweep in enumerate(suite.sweeps, 1):
        lines = _swept(suite, sweep, rounds)
        if lines:
            yield figures.save(figures.sweep(lines, sweep), home / f"sweep{number}-{sweep.key.split('.')[-1]}.png")


def _rows_of(suite: Suite, tables: list[Report]) -> list[str]:
    """The rows that some of these tables have, in the suite's order; all if there is no table."""
    named = {row for report in tables for row in report.rows or suite.strategies}
    return [row for row in suite.strategies if row in named or not tables]


def _environments(runs: dict[str, list[pd.DataFrame]]) -> dict[str, pd.DataFrame]:
    """Label -> accuracies, one row a seed and one column an environment, at the honest round."""
    result = {}
    for label, tables in runs.items():
        names = sorted((str(name) for name in tables[0] if ENVIRONMENT_ACCURACY.fullmatch(str(name))), key=_environment)
        if len(names) >= FEW:
            picked = [run.reindex(columns=names).iloc[honest(run) or -1] for run in tables]
            result[label] = pd.DataFrame(picked).rename(columns=lambda name: str(_environment(name)))
    return result


def _swept(suite: Suite, sweep: Sweep, rounds: Rounds) -> dict[str, pd.DataFrame]:
    """Label -> the metric by the suite's first reading, one row a seed and one column a swept value; of values with every seed."""
    result = {}
    if sweep.column not in suite.experiments:
        return {}
    for row in sweep.rows:
        tables = {value: rounds.of(sweep.column, row, (sweep.title, value)) for value in sweep.values} if row in suite.strategies else {}
        complete = {value: runs for value, runs in tables.items() if len(runs) == suite.seeds and all(sweep.metric in run for run in runs)}
        if complete:
            picked = {value: [READINGS[suite.readings[0]].of(run, sweep.metric) for run in runs] for value, runs in complete.items()}
            result[suite.strategies[row].label] = pd.DataFrame(picked)
    return result


def _environment(name: str) -> int:
    """The number of the environment whose accuracy a column holds."""
    return int(re.sub(r"\D", "", name))


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
