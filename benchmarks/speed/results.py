"""The numbers of a measurement, what they are compared with, and the targets."""

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from os import cpu_count
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed.aggregation import ARITHMETIC, GEOMETRIC, READING
from benchmarks.speed.methods import FLOWER, FLOWER_ONE_THREAD, IN_PROCESS, PLAIN, PLAIN_TWO, RAY_TWO

PAIRS = {IN_PROCESS: PLAIN, PLAIN_TWO: PLAIN, RAY_TWO: PLAIN_TWO}
"""Which method is compared with which."""


@dataclass(frozen=True)
class Point:
    """One point of the scaling: a job run alone in a fresh process.

    Attributes:
        clients: how many there are.
        cohort: how many train in a round.
        started: seconds from the call to being ready for the first round.
        round: median seconds of a round.
        peak: bytes.
    """

    clients: int
    cohort: int
    started: float
    round: float
    peak: int


@dataclass
class Results:
    """Everything that was measured.

    Attributes:
        machine: what it was measured on.
        settings: how often, and with what options.
        skipped: method -> why it was not measured.
        rounds: job -> method -> repeat -> seconds of each round.
        whole: job -> method -> the summary of the job run alone (see ``measure.Whole``).
        differences: job -> method -> relative difference of its weights from the plain loop's after the first rounds.
        population: scaling in the number of clients, the cohort fixed.
        cohorts: scaling in the cohort, the number of clients fixed.
        aggregation: threads -> method -> seconds of each repeat.
    """

    machine: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    rounds: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    whole: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    differences: dict[str, dict[str, float]] = field(default_factory=dict)
    population: list[Point] = field(default_factory=list)
    cohorts: list[Point] = field(default_factory=list)
    aggregation: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write all numbers as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Results":
        """The results of a file that ``save`` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        points = {name: [Point(**point) for point in values[name]] for name in ("population", "cohorts")}
        return cls(**values | points)

    def flower(self, job: str) -> str | None:
        """The faster of Flower's settings on a job."""
        found = self.rounds.get(job, {})
        measured = [name for name in (FLOWER, FLOWER_ONE_THREAD) if found.get(name)]
        return min(measured, key=lambda name: median(medians(found[name])), default=None)

    def ratio(self, job: str, method: str | None, reference: str | None) -> "Ratio | None":
        """How many times as long a method takes as another, repeat by repeat; None if either was not measured."""
        found = self.rounds.get(job, {})
        if not found.get(method or "") or not found.get(reference or ""):
            return None
        return Ratio.of(medians(found[method or ""]), medians(found[reference or ""]))


@dataclass(frozen=True)
class Ratio:
    """A ratio over the repeats: the median, and the spread from least to most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float], references: Sequence[float]) -> "Ratio":
        """Of values to the references of the same repeats."""
        ratios = [value / reference for value, reference in zip(values, references, strict=True)]
        return cls(median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


def medians(repeats: Sequence[Sequence[float]]) -> list[float]:
    """The median round of each repeat."""
    return [median(rounds) for rounds in repeats]


@dataclass(frozen=True)
class Target:
    """What the project wants of its speed.

    Attributes:
        name: what is compared.
        value: measured; None: not measured.
        bound: wanted.
        higher: whether at least the bound is wanted, not at most.
        unit: of both.
    """

    name: str
    value: float | None
    bound: float
    higher: bool = False
    unit: str = "x"

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.value is not None and (self.value >= self.bound if self.higher else self.value <= self.bound)

    @property
    def verdict(self) -> str:
        """Met, or missed by how much of the bound."""
        if self.value is None:
            return "not measured"
        if self.met:
            return "met"
        return f"missed by {abs(self.value / self.bound - 1):.0%}"

    @property
    def wanted(self) -> str:
        """The bound in words."""
        return f"{'at least' if self.higher else 'at most'} {self.bound:g} {self.unit}"


FASTER_THAN_FLOWER = {"J1": 8.0, "J2": 2.5, "J3": 1.8}


def targets(results: Results) -> list[Target]:
    """All targets of the project, with what was measured."""
    return [*_speed(results), *_memory(results), *_population(results), *_aggregation(results)]


def _speed(results: Results) -> list[Target]:
    flower = [
        Target(f"{job}: Flower's simulation / our Ray engine", _median(results.ratio(job, results.flower(job), RAY_TWO)), bound, True)
        for job, bound in FASTER_THAN_FLOWER.items()
    ]
    bounds = {"our Ray engine, two workers / plain loop, two processes": (RAY_TWO, PLAIN_TWO, 1.15)}
    bounds["in process / plain loop"] = (IN_PROCESS, PLAIN, 1.10)
    plain = [
        Target(f"{job}: {name}", _median(results.ratio(job, method, reference)), bound)
        for name, (method, reference, bound) in bounds.items()
        for job in FASTER_THAN_FLOWER
    ]
    return [*flower, *plain]


def _memory(results: Results) -> list[Target]:
    found = results.whole.get("J1", {})
    flower = [found[name]["peak"] for name in (FLOWER, FLOWER_ONE_THREAD) if name in found]
    own = found.get(RAY_TWO)
    share = own["peak"] / min(flower) if own and flower else None
    growth = _growth([point.peak for point in results.cohorts])
    return [
        Target("J1: peak memory of our Ray engine / of Flower's simulation", share, 0.5),
        Target("in process: growth of peak memory with the cohort", growth, 10, unit="%"),
    ]


def _population(results: Results) -> list[Target]:
    points = {point.clients: point for point in results.population}
    many, few = points.get(100_000), points.get(1000)
    slower = 100 * (many.round / few.round - 1) if many and few else None
    return [
        Target("100,000 clients: start", many.started if many else None, 5, unit="s"),
        Target("100,000 clients: a round against one of 1,000 clients", slower, 10, unit="% more"),
    ]


def _aggregation(results: Results) -> list[Target]:
    bounds = {ARITHMETIC: 2.0, GEOMETRIC: 15.0}
    return [Target(f"{name} / reading its inputs once", _slowest(results.aggregation, name), bound) for name, bound in bounds.items()]


def _slowest(times: Mapping[str, Mapping[str, Sequence[float]]], name: str) -> float | None:
    """The ratio to reading with the number of threads where it is worst."""
    return max((Ratio.of(found[name], found[READING]).median for found in times.values() if found.get(name)), default=None)


def _growth(peaks: Sequence[int]) -> float | None:
    """From the first to the largest, in percent."""
    return 100 * (max(peaks) / peaks[0] - 1) if len(peaks) > 1 else None


def _median(ratio: Ratio | None) -> float | None:
    return None if ratio is None else ratio.median


def machine() -> dict[str, str]:
    """What this is measured on."""
    cpu, memory = Path("/proc/cpuinfo").read_text(), Path("/proc/meminfo").read_text()
    model = re.search(r"^model name\s*:\s*(.+)$", cpu, re.MULTILINE)
    total = re.search(r"^MemTotal:\s+(\d+) kB", memory, re.MULTILINE)
    versions = {name: metadata.version(name) for name in ("torch", "flwr", "ray", "numpy")}
    return {
        "CPU": model.group(1) if model else platform.machine(),
        "cores": str(cpu_count()),
        "cache": ", ".join(_caches()) or "unknown",
        "RAM": f"{int(total.group(1)) / 2**20:.0f} GiB" if total else "unknown",
        "Python": platform.python_version(),
        **versions,
    }


def _caches() -> list[str]:
    """The caches of the first core, nearest first."""
    found = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    kinds = [(cache / "level", cache / "type", cache / "size") for cache in found]
    return [f"L{level.read_text().strip()} {kind.read_text().strip().lower()} {size.read_text().strip()}" for level, kind, size in kinds]
