"""A suite: which experiments are compared under which strategies or other settings, seeds and swept values, and what is reported."""

import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Len

from fedvision import registry, settings
from fedvision.errors import ExperimentError
from fedvision.experiment import Experiment, overridden
from fedvision.settings import Count

SUITES = Path(__file__).parent / "suites"

LEAN = {"tensorboard": False, "checkpoint_every": 25}
"""What every run of a suite does without, or does less often; it changes no number."""

Table = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the tables: one strategy, or one variant of whatever else is compared.

    Attributes:
        label: how the tables call it.
        strategy: what stands in the experiment's ``[strategy]`` table, ``name`` at least; the experiment's own if not given.
        set: overrides by dotted key; they come before the column's.
    """

    label: str
    strategy: Table | None = None
    set: Table = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One experiment of a suite.

    Attributes:
        experiment: a file, beside the suite's or in the current folder, or a bundled name.
        title: how the tables call it.
        set: overrides by dotted key.
        after: a column above this one, whose runs, of the same row and seed, come before, as pre-training; what rows and sweeps say is
            then said of the first of them alone, and their final weights are what this column's runs begin with.
        into: the setting that says which file to begin with.
        offer: strategy settings for every row whose strategy has them, such as the server's optimizer.
        real: the experiment on the real data that this one stands in for, used once ``data.root`` is set.
        real_set: overrides for that one; ``{root}`` stands for the folder.
        paper: metric -> row -> published (mean, standard deviation).
        target: what a run has to reach, for the cost table.
    """

    experiment: str
    title: str
    set: Table = field(default_factory=dict)
    after: str | None = None
    into: str = "learner.checkpoint"
    offer: Table = field(default_factory=dict)
    real: str | None = None
    real_set: Table = field(default_factory=dict)
    paper: dict[str, dict[str, Annotated[tuple[float, ...], Len(2, 2)]]] = field(default_factory=dict)
    target: "Target | None" = None


@dataclass(frozen=True, kw_only=True)
class Target:
    """A value of a metric to reach; ``fedvision bench`` reports the rounds and bytes it takes."""

    metric: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """One table: a metric of several experiments.

    Attributes:
        title: above the table.
        metric: a column of the rounds.
        columns: which experiments, all if none are named.
        rows: which strategies, all if none are named.
        scale: what the values are multiplied by, e.g. 1000.
        better: whether lower or higher is better.
    """

    title: str
    metric: str
    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    scale: float = 1.0
    better: Literal["lower", "higher"] = "lower"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One setting varied, everything else as in the suite.

    Attributes:
        title: of the figure.
        column: which experiment.
        rows: which strategies.
        key: dotted key of the setting.
        values: its values.
        metric: what is drawn.
        set: overrides for these runs, after the row's.
    """

    title: str
    column: str
    rows: tuple[str, ...]
    key: str
    values: tuple[int | float, ...]
    metric: str = "test_loss"
    set: Table = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One run of a suite; ``swept`` is the title and the value of the sweep that it belongs to, ``before`` the run it begins with."""

    column: str
    row: str
    seed: int
    swept: tuple[str, float] | None
    experiment: Experiment
    before: "Cell | None" = None

    @property
    def chain(self) -> "list[Cell]":
        """This run and all that come before it, the first first."""
        return [*(self.before.chain if self.before else []), self]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Experiments x strategies x seeds x swept values.

    Attributes:
        name: of the suite; its results are kept in ``bench/<name>``.
        title: above the report.
        seeds: how many seeds, 0, 1, ...; the same for every row, so that rows can be compared in pairs.
        strategies: the rows, by name.
        rows_are: what the tables call the rows: strategies, or methods, ...
        readings: how a run's curve becomes one number, a column of the tables each; sweeps draw the first.
        experiments: the columns, by name.
        tables: what is reported.
        sweeps: what is varied.
        quick: overrides of this suite's own keys for ``--quick``.
        overrides: for every experiment, by dotted key.
        home: folder of the suite's file.
        path: folder of the results.
    """

    name: str
    title: str
    seeds: Count
    strategies: dict[str, Row]
    experiments: dict[str, Column]
    tables: list[Report]
    rows_are: str = "strategy"
    readings: tuple[Literal["paper", "honest", "last", "early", "late"], ...] = ("paper", "honest", "last")
    sweeps: list[Sweep] = field(default_factory=list)
    quick: Table = field(default_factory=dict)
    overrides: Table = field(default_factory=dict)
    home: Path = Path()
    path: Path = Path("bench")

    @classmethod
    def load(cls, suite: str | Path, quick: bool = False, seeds: int | None = None, overrides: Mapping[str, Any] | None = None) -> "Suite":
        """A suite from a file or a bundled name.

        Args:
            suite: path of a TOML file, or the name of a bundled suite.
            quick: apply the suite's ``[quick]`` table.
            seeds: instead of the suite's own number.
            overrides: for every experiment, by dotted key; a strategy setting applies to the rows that have it.

        Raises:
            ExperimentError: no such suite, or something wrong in it.
        """
        path = locate(suite)
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ExperimentError(f"{path}: cannot be read as a suite: {error}") from error
        if quick:
            tables = _refined(tables, settings.check(tables.get("quick", {}), Table, f"{suite}.quick"))
        if seeds is not None:
            tables["seeds"] = seeds
        _check_parts(tables, str(suite))
        loaded = cls(**settings.resolve(cls, tables, str(suite), without=frozenset({"overrides", "home", "path"})))
        return replace(loaded, overrides=dict(overrides or {}), home=path.parent, path=Path("bench") / loaded.name)._checked()

    def only(self, names: Sequence[str]) -> "Suite":
        """This suite with only the rows and columns in ``names``; naming no row (or no column) keeps them all."""
        for name in names:
            if name not in (known := [*self.strategies, *self.experiments]):
                raise ExperimentError(f"--only {name}: no strategy or experiment of {self.name!r}; {settings.nearest(name, known)}")
        rows = {name: row for name, row in self.strategies.items() if name in names} or self.strategies
        wanted = set(names)
        for name, column in reversed(self.experiments.items()):
            wanted |= {column.after} if name in wanted and column.after else set()
        columns = {name: column for name, column in self.experiments.items() if name in wanted} or self.experiments
        return replace(self, strategies=rows, experiments=columns)

    @cached_property
    def cells(self) -> list[Cell]:
        """Every run that the suite needs; those of several seeds come seed by seed, so that all rows fill up together."""
        plan: list[tuple[str, str, tuple[Sweep, float] | None]]
        plan = [(column, row, None) for column in self.experiments for row in self.strategies]
        for sweep in self.sweeps:
            if sweep.column in self.experiments:
                plan += [(sweep.column, row, (sweep, value)) for row in sweep.rows if row in self.strategies for value in sweep.values]
        return [self._cell(*spot, seed) for seed in range(self.seeds) for spot in plan]

    def _cell(self, column: str, row: str, swept: tuple[Sweep, float] | None, seed: int) -> Cell:
        asked, variant = self.experiments[column], self.strategies[row]
        base, chosen = self._base(asked)
        everywhere = {key: value for key, value in self.overrides.items() if self._applies(key, asked, variant)}
        before = None
        if asked.after is not None:
            before = self._cell(asked.after, row, swept, seed)
            varied: Table = {asked.into: str(folder(self.path, before.experiment) / "model.safetensors")}
        else:
            known = self._settings(asked, variant)
            offered = {key: value for key, value in asked.offer.items() if key in known}
            base["strategy"] = {**base["strategy"], **offered} if variant.strategy is None else {**offered, **variant.strategy}
            varied = {**swept[0].set, swept[0].key: swept[1]} if swept else {}
            chosen = {**chosen, **variant.set}
        overrides = {"seed": seed, **LEAN, **chosen, **everywhere, **varied}
        experiment = Experiment.from_tables(overridden(base, overrides), f"{self.name}/{column}/{row}")
        return Cell(column, row, seed, (swept[0].title, swept[1]) if swept else None, experiment, before)

    def _base(self, column: Column) -> tuple[dict[str, Any], dict[str, Any]]:
        """The tables of a column's experiment, and the column's overrides; on real data once ``data.root`` says where."""
        root = self.overrides.get("data.root")
        if root is None or column.real is None:
            return self._load(column.experiment), column.set
        placed = {key: value.format(root=root) if isinstance(value, str) else value for key, value in column.real_set.items()}
        return self._load(column.real), placed

    def _load(self, experiment: str) -> dict[str, Any]:
        """The tables of an experiment, found beside the suite's file, in the current folder, or by its bundled name."""
        beside = self.home / experiment
        return Experiment.load(beside if beside.is_file() else experiment).tables()

    def _applies(self, key: str, column: Column, row: Row) -> bool:
        """Whether an override is for the runs of ``column`` and ``row``: a setting only where the strategy or the data set has it."""
        table, _, rest = key.partition(".")
        if table == "strategy":
            return rest.split(".")[0] in self._settings(column, row)
        if table == "data" and rest != "name":
            return rest in settings.parameters(registry.datasets.find(overridden(*self._base(column))["data"]["name"]))
        return True

    def _settings(self, column: Column, row: Row) -> set[str]:
        """Those of the strategy of a column and row."""
        own = row.strategy is None or column.after is not None
        return known_settings((self._base(column)[0]["strategy"] if own else row.strategy)["name"])  # type: ignore[index]

    def _checked(self) -> "Suite":
        for name, row in self.strategies.items():
            if row.strategy is not None:
                if not isinstance(row.strategy.get("name"), str):
                    raise ExperimentError(f'{self.name}.strategies.{name}.strategy has no name; write strategy = {{ name = "..." }}')
                registry.strategies.find(row.strategy["name"])
        for place, (name, column) in enumerate(self.experiments.items()):
            if column.after is not None:
                where = f"{self.name}.experiments.{name}.after"
                _known([column.after], self.experiments, f"{where}: column")
                if column.after not in list(self.experiments)[:place]:
                    raise ExperimentError(f"{where} = {column.after!r} does not stand above it; put the column first that comes first")
            if column.offer:
                offered = set().union(*(self._settings(column, row) for row in self.strategies.values()))
                _known(list(column.offer), sorted(offered), f"{self.name}.experiments.{name}.offer: setting")
            for metric, published in column.paper.items():
                _known(list(published), self.strategies, f"{self.name}.experiments.{name}.paper.{metric}: row")
        for report in self.tables:
            _known(report.columns, self.experiments, f"{self.name}.tables: column")
            _known(report.rows, self.strategies, f"{self.name}.tables: row")
        for sweep in self.sweeps:
            _known([sweep.column], self.experiments, f"{self.name}.sweeps: column")
            _known(sweep.rows, self.strategies, f"{self.name}.sweeps: row")
        self._check_overrides()
        return self

    def _check_overrides(self) -> None:
        if "seed" in self.overrides:
            raise ExperimentError("--set seed: a suite runs the seeds 0, 1, ...; say how many with --seeds")
        for key in self.overrides:
            taken = any(self._applies(key, column, row) for column in self.experiments.values() for row in self.strategies.values())
            if not taken and not (key == "data.root" and any(column.real for column in self.experiments.values())):
                kind = "strategies" if key.startswith("strategy") else "data sets"
                raise ExperimentError(f"--set {key}: none of the suite's {kind} has that setting")

    def within(self, path: Path) -> "Suite":
        """The same suite, its results in another folder."""
        return replace(self, path=path)


def folder(path: Path, experiment: Experiment) -> Path:
    """Where a bench in ``path`` keeps the run of an experiment: by name and fingerprint, so that equal cells are computed once."""
    return path / "runs" / f"{experiment.name}-{experiment.strategy.name.split(':')[-1]}-{experiment.fingerprint}"


def known_settings(strategy: str) -> set[str]:
    """The settings of a strategy by registered or dotted name."""
    return set(settings.parameters(registry.strategies.find(strategy)))


def bundled() -> dict[str, Path]:
    """The suites that come with FedVision, by name."""
    return {path.stem: path for path in sorted(SUITES.glob("*.toml"))}


def locate(suite: str | Path) -> Path:
    """The file of a suite given by path or bundled name."""
    if Path(suite).is_file():
        return Path(suite)
    if str(suite) in bundled():
        return bundled()[str(suite)]
    raise ExperimentError(f"no suite {str(suite)!r}: neither a file nor a bundled suite; {settings.nearest(str(suite), list(bundled()))}")


def _refined(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``table`` with ``changes`` laid over it, tables within tables likewise."""
    laid = {
        key: _refined(table[key], change) if isinstance(change, Mapping) and isinstance(table.get(key), Mapping) else change
        for key, change in changes.items()
    }
    return {**table, **laid}


def _check_parts(tables: Mapping[str, Any], where: str) -> None:
    """Check each row, column, table and sweep by itself, which finds the wrong key in it."""
    for key, kind in {"strategies": Row, "experiments": Column, "tables": Report, "sweeps": Sweep}.items():
        parts = tables.get(key)
        named = parts.items() if isinstance(parts, Mapping) else enumerate(parts, 1) if isinstance(parts, list) else ()
        for name, part in named:
            settings.resolve(kind, settings.check(part, Table, f"{where}.{key}.{name}"), f"{where}.{key}.{name}")


def _known(names: Sequence[str], known: Collection[str], where: str) -> None:
    for name in names:
        if name not in known:
            raise ExperimentError(f"{where} {name!r} is not in the suite; {settings.nearest(name, list(known))}")
