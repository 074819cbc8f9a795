"""What the command line shows: progress, tables, cards."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import suite as suites
from benchmarks.bench import stages
from benchmarks.runs import Run
from benchmarks.suite import Suite
from fedvision import experiment as experiments
from fedvision import registry
from fedvision.data import FederatedData
from fedvision.data.card import card
from fedvision.data.examples import TEXTS, Examples
from fedvision.data.texts import decode_texts
from fedvision.errors import ExperimentError
from fedvision.experiment import Experiment
from fedvision.settings import nearest
from server.rounds import Row

SHOWN = {"train_loss": "train", "validation_loss": "validation", "test_loss": "test", "test_accuracy": "accuracy"}
MOST_CLIENTS = 20


@contextmanager
def of_rounds(console: Console, experiment: Experiment) -> Iterator[Callable[[Row], None]]:
    """Show a run's progress: live on a terminal, about ten quiet lines elsewhere."""
    with _progress(console, experiment.name, experiment.rounds) as show:
        yield lambda row: show(row["round"], numbers(row), bool(row["failures"]))


@contextmanager
def of_cells(console: Console, suite: Suite, path: Path) -> Iterator[Callable[[str, int], None]]:
    """Show a bench's progress, in rounds over all its runs: live on a terminal, about ten quiet lines elsewhere."""
    runs = {run.name: experiment.rounds for stage in stages(suite.within(path)) for run, experiment in stage.items()}
    done: dict[str, int] = {}
    with _progress(console, f"bench {suite.name}", sum(runs.values())) as show:

        def on_progress(run: str, rounds: int) -> None:
            done[run] = rounds
            finished = sum(done.get(name, -1) >= wanted for name, wanted in runs.items())
            show(sum(done.values()), f"{finished} of {len(runs)} runs finished", False)

        yield on_progress


@contextmanager
def of_maps(console: Console, pictures: int, kinds: int) -> Iterator[Callable[[str, int], None]]:
    """Show how many maps of so many kinds there are: live on a terminal, about ten quiet lines elsewhere."""
    done: dict[str, int] = {}
    with _progress(console, "maps", pictures * kinds) as show:

        def on_progress(kind: str, maps: int) -> None:
            done[kind] = maps
            show(sum(done.values()), kind, False)

        yield on_progress


@contextmanager
def _progress(console: Console, title: str, total: int) -> Iterator[Callable[[int, str, bool], None]]:
    """A bar with a note below it; without a terminal, the note after every tenth of the way or when it is urgent."""
    if not console.is_terminal:
        printed = -1

        def print_line(completed: int, note: str, urgent: bool) -> None:
            nonlocal printed
            if urgent or completed >= total or completed * 10 // max(total, 1) > printed:
                printed = completed * 10 // max(total, 1)
                console.print(f"{title} {completed}/{total}  {note}", soft_wrap=True, highlight=False)

        yield print_line
        return
    bar = Progress(TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    task = bar.add_task(title, total=total)
    with Live(Group(bar, ""), console=console, refresh_per_second=8) as live:

        def update(completed: int, note: str, urgent: bool) -> None:
            bar.update(task, completed=completed)
            live.update(Group(bar, f"  {note}"))

        yield update


def numbers(row: Row) -> str:
    """The losses, the accuracy and the clients of a round, in one short line."""
    parts = [f"{label} {row[name]:.4f}" for name, label in SHOWN.items() if isinstance(row.get(name), float)]
    if row["clients"] or row["failures"]:
        parts.append(f"{row['clients']} clients" + (f", [red]{row['failures']} failed[/]" if row["failures"] else ""))
    absent = [f"{row[kind]} {word}" for kind, word in (("dropped", "dropped out"), ("late", "late")) if row.get(kind)]
    if absent:
        parts.append(", ".join(absent))
    return "  ".join(parts)


def print_summary(console: Console, done: Run) -> None:
    """The first, best and last round of a run, and where its files are."""
    rounds = done.rounds
    table = Table(title=done.experiment.name, title_justify="left", title_style="bold")
    measured = [name for name in dict.fromkeys((*SHOWN, *rounds.columns)) if name in SHOWN or name.startswith("test_")]
    measured = [name for name in measured if name in rounds and rounds[name].notna().any()]
    picks = {"first": 0, "last": len(rounds) - 1}
    if rounds["test_loss"].notna().any():
        picks["best"] = int(rounds["test_loss"].argmin())
    ordered = sorted(picks.items(), key=lambda item: item[1])
    table.add_column("round")
    for label, index in ordered:
        table.add_column(f"{label}: {int(rounds.iloc[index]['round'])}", justify="right")
    for name in measured:
        values = [rounds.iloc[index][name] for _, index in ordered]
        table.add_row(name, *("-" if math.isnan(value) else f"{value:.4f}" for value in values))
    console.print(table)
    if "simulated_seconds" in rounds:
        absent = f"{rounds['dropped'].sum():.0f} times a client dropped out, {rounds['late'].sum():.0f} answers came too late"
        console.print(f"simulated wall-clock: {rounds['simulated_seconds'].sum():,.1f} s; {absent}")
    console.print(f"run folder: {done.path}  (pictures in {done.path / 'figures'})", soft_wrap=True, markup=False)


def named(runs: Sequence[Run]) -> dict[str, list[pd.DataFrame]]:
    """The tables of rounds of runs by name of their strategies, or of their folders where those repeat."""
    strategies = [run.experiment.strategy.name for run in runs]
    labels = strategies if len(set(strategies)) == len(runs) else [str(run.path) for run in runs]
    return {label: [run.rounds] for label, run in zip(labels, runs, strict=True)}


def failed_clients(done: Run) -> str:
    """The most frequent failures of a run, in words that rich prints as they are."""
    reasons = Counter(reason for failures in done.rounds["failed"] for reason in failures)
    return escape("; ".join(f"{reason} ({times} times)" for reason, times in reasons.most_common(5)))


def print_names(console: Console, kind: str | None) -> None:
    """Everything that an experiment file may name, or one kind of it.

    Raises:
        ExperimentError: no such kind.
    """
    kinds = {
        "experiments": {name: _comment(path) for name, path in experiments.bundled().items()},
        "suites": {name: _comment(path) for name, path in suites.bundled().items()},
        "strategies": _summaries(registry.strategies),
        "learners": _summaries(registry.learners),
        "data": _summaries(registry.datasets),
        "partitions": _summaries(registry.partitions),
        "engines": _summaries(registry.engines),
    }
    if kind is not None and kind not in kinds:
        raise ExperimentError(f"nothing of the kind {kind!r} to list; {nearest(kind, list(kinds))}")
    for title, names in kinds.items():
        if kind in (None, title):
            table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2))
            for name, summary in names.items():
                table.add_row(f"[cyan]{name}[/]", escape(summary))
            console.print(table, "")


def print_card(console: Console, data: FederatedData) -> None:
    """The card of a partition: what each client holds, and how far its classes are from everybody's."""
    facts = card(data)
    table = Table(title=f"{data.name}: {data.num_clients} clients, {data.classes} classes", title_justify="left", title_style="bold")
    hidden = bool(facts.unlabeled.any())
    own = [*(["unlabeled"] if hidden else []), *(f"with {field}" for field in facts.held)]
    for heading in ("client", "train", *own, "validation", "examples per class", "TV", "JS (bits)"):
        table.add_column(heading, justify="left" if heading == "examples per class" else "right")
    for client in range(min(data.num_clients, MOST_CLIENTS)):
        classes = " ".join(str(n) for n in facts.counts[client]) if data.classes <= 20 else f"{(facts.counts[client] > 0).sum()} classes"
        divergences = (f"{facts.total_variation[client]:.3f}", f"{facts.jensen_shannon[client]:.3f}")
        of_these = [*([facts.unlabeled[client]] if hidden else []), *(counts[client] for counts in facts.held.values())]
        sizes = (facts.train[client], *of_these, facts.validation[client])
        table.add_row(str(client), *map(str, sizes), classes, *divergences)
    console.print(table)
    if data.num_clients > MOST_CLIENTS:
        console.print(f"... and {data.num_clients - MOST_CLIENTS} more clients")
    console.print(
        f"{facts.train.sum()} training, {facts.validation.sum()} validation, {len(data.test)} test examples "
        f"of shape {data.spec.image_shape}; sizes {facts.train.min()} to {facts.train.max()}"
    )
    for field, texts in first_texts(data.train.examples).items():
        console.print(f"{field}: {' | '.join(texts)}", soft_wrap=True, markup=False, highlight=False)
    if data.server is not None:
        console.print(f"the server trains on {len(data.server)} labeled examples of its own")
    if not facts.counts.any():
        console.print("no client has a label")
        return
    console.print(
        f"mean divergence from the global distribution of {'known ' if hidden else ''}labels: "
        f"total variation {facts.mean_total_variation:.3f}, Jensen-Shannon {facts.mean_jensen_shannon:.3f} bits"
    )


def first_texts(examples: Examples) -> dict[str, list[str]]:
    """The texts of the first example that has some, by field."""
    found = {}
    for field in TEXTS:
        some = examples[examples.having(field).nonzero()[:1, 0]] if field in examples else None
        if some is not None and len(some):
            found[field] = decode_texts(some.fields[field].flatten(1, -2))[0]
    return found


def _summaries(names: registry.Registry) -> dict[str, str]:
    return {name: names.summary(name) for name in names.names()}


def _comment(path: Path) -> str:
    """The first comment line of a TOML file."""
    first = path.read_text().split("\n", 1)[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
