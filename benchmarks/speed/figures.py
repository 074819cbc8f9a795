"""The pictures of a measurement."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.figures import COLORS, save
from benchmarks.speed.methods import METHODS, PLAIN
from benchmarks.speed.results import Point, Ratio, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw what was measured."""
    drawn = {"ratios": ratios(results), "scaling": scaling(results)}
    return [save(figure, folder / f"{name}.png") for name, figure in drawn.items() if figure is not None]


def ratios(results: Results) -> "Figure | None":
    """Time per round of each method over that of the plain loop, a group of bars a job, with the spread over the repeats."""
    jobs = [job for job in results.rounds if results.rounds[job].get(PLAIN)]
    methods = [name for name in METHODS if any(results.rounds[job].get(name) for job in jobs)]
    if not jobs:
        return None
    figure, axes = _figure(2.5 + 2.2 * len(jobs), 3.6)
    width = 0.85 / len(methods)
    for i, name in enumerate(methods):
        found = [(at, ratio) for at, job in enumerate(jobs) if (ratio := results.ratio(job, name, PLAIN)) is not None]
        at = np.array([at for at, _ in found]) + (i + 0.5) * width - 0.425
        heights = [ratio.median for _, ratio in found]
        axes.bar(at, heights, width, yerr=_spread([ratio for _, ratio in found]), label=METHODS[name].label, color=COLORS[i % len(COLORS)])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(yscale="log", ylabel="time a round / plain loop's, log scale", xticks=range(len(jobs)), xticklabels=jobs)
    axes.legend(frameon=False, fontsize=8, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    return figure


def scaling(results: Results) -> "Figure | None":
    """A round, the start and the memory by the number of clients."""
    if len(results.population) < 2:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    clients = [point.clients for point in results.population]
    values = {"a round, ms": _column(results.population, "round", 1e3), "start, s": _column(results.population, "started", 1)}
    values["peak memory, MB"] = _column(results.population, "peak", 1e-6)
    for axes, color, (label, column) in zip(panels, COLORS, values.items(), strict=False):
        axes.plot(clients, column, marker="o", color=color)
        axes.set(xscale="log", xlabel="clients, 100 of them a round", ylabel=label, ylim=(0, 1.2 * max(column)))
        axes.grid(alpha=0.3)
    return figure


def _column(points: Sequence[Point], name: str, scale: float) -> list[float]:
    return [scale * float(getattr(point, name)) for point in points]


def _spread(found: Sequence[Ratio]) -> list[list[float]]:
    """Error bars from the least to the most, below and above the medians."""
    return [[ratio.median - ratio.least for ratio in found], [ratio.most - ratio.median for ratio in found]]


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes
