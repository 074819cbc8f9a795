"""An experiment: one TOML file, typed and checked before anything starts.

>>> experiment = Experiment.parse('''
... name = "tiny"
... rounds = 3
... data = { name = "digits" }
... partition = { name = "iid", clients = 2 }
... learner = { name = "classifier", model = "mlp" }
... strategy = { name = "fedavg" }
... ''')
>>> experiment.strategy.settings["epochs"]
1
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tomli_w

from fedvision import registry, seeds, settings
from fedvision.behavior import Behavior
from fedvision.data.federated import FederatedData
from fedvision.data.labels import Labels
from fedvision.data.modalities import Modalities
from fedvision.data.pool import DEALT, Pool, deal
from fedvision.errors import DataError, ExperimentError
from fedvision.learners.learner import Learner
from fedvision.privacy import Privacy
from fedvision.settings import Count, Fraction, Natural

NOT_IN_FINGERPRINT = ("engine", "checkpoint_every", "tensorboard")
"""What may change without changing a number in the results."""


@dataclass(frozen=True)
class Component:
    """A table that names a class: the class's registered or dotted name, and its resolved arguments."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """How a table of the file becomes a component: where its names are registered, what the caller supplies."""

    registry: registry.Registry
    supplied: frozenset[str] = frozenset()

    def resolve(self, table: Mapping[str, Any], where: str) -> Component:
        """The component of ``table``, its settings checked against the signature of the class it names."""
        if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
            raise ExperimentError(f'{where}: expected a table with a name, as [{where}] name = "..."; got {table!r}')
        target = self.registry.find(table["name"])
        given = {key: value for key, value in table.items() if key != "name"}
        return Component(table["name"], settings.resolve(target, given, where, without=self.supplied))


COMPONENTS = {
    "data": Kind(registry.datasets, frozenset({"rng"})),
    "partition": Kind(registry.partitions, DEALT),
    "learner": Kind(registry.learners),
    "strategy": Kind(registry.strategies, frozenset({"seed"})),
    "engine": Kind(registry.engines, frozenset({"client_app", "run_config", "clients"})),
}


VALUES: Mapping[str, tuple[type, str]] = {
    "behavior": (Behavior, "dropout = 0.1"),
    "labels": (Labels, "count = 40"),
    "modalities": (Modalities, 'silos = [["image"], ["image", "depth"]]'),
    "privacy": (Privacy, "target_epsilon = 3.0"),
}
"""Tables that are values of their own: their class, and an example of a setting."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Which learner is trained on which partition with which strategy, over which grid.

    Attributes:
        name: of the experiment; its run folder is ``runs/<name>-<fingerprint>``.
        seed: every random number of the run derives from it.
        rounds: how many rounds to train; 0 only evaluates the initial model.
        data: the data set.
        partition: how its examples are dealt to clients; of no effect on a data set that comes dealt.
        learner: what a client learns.
        strategy: how the clients' answers become the next global model.
        engine: who carries the messages.
        validation_fraction: share of its examples that each client keeps for validation, where the data set
            brings no validation set of its own.
        evaluate_every: rounds between evaluations; the last round is always evaluated.
        checkpoint_every: rounds between checkpoints; the last round always has one.
        threads: CPU threads per client; part of the experiment, since a sum's last bits depend on it.
        tensorboard: whether to write TensorBoard events.
        behavior: how slow and unreliable clients are, simulated; if not given, all answer at once.
        labels: which training labels learners may see, for semi-supervised learning; all if not given.
        modalities: which fields each client's examples have; all if not given.
        privacy: what of the training examples, or of the clients, must not show, and how strongly; nothing if not given.
        participants: numbers of the clients that take part; all if not given. ``[0]``: a silo that learns alone.
    """

    name: str
    rounds: Natural
    data: Component
    learner: Component
    strategy: Component
    partition: Component = Component("environment", {"environments_per_client": 1})
    engine: Component = Component("in-process")
    seed: Natural = 0
    validation_fraction: Fraction = 0.0
    evaluate_every: Count = 1
    checkpoint_every: Count = 1
    threads: Count = 1
    tensorboard: bool = True
    behavior: Behavior | None = None
    labels: Labels | None = None
    modalities: Modalities | None = None
    privacy: Privacy | None = None
    participants: tuple[Natural, ...] | None = None

    @classmethod
    def load(cls, experiment: "str | Path | Experiment", overrides: Mapping[str, Any] | None = None) -> "Experiment":
        """The experiment of a file, of a bundled name, or an experiment itself, with ``overrides`` applied.

        Args:
            experiment: a path to a TOML file, the name of a bundled experiment, or an ``Experiment``.
            overrides: values by dotted key, e.g. ``{"strategy.fraction": 0.1, "rounds": 5}``.

        Raises:
            ExperimentError: no such file, no TOML, an unknown key, or a value that does not fit.
        """
        if isinstance(experiment, Experiment):
            return cls.from_tables(overridden(experiment.tables(), overrides or {}), experiment.name)
        path = locate(experiment)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ExperimentError(f"{path}: cannot be read: {error}") from error
        return cls.parse(text, overrides, source=str(experiment))

    @classmethod
    def parse(cls, text: str, overrides: Mapping[str, Any] | None = None, source: str = "experiment") -> "Experiment":
        """The experiment that ``text`` (TOML) describes."""
        try:
            tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ExperimentError(f"{source}: not valid TOML: {error}") from error
        return cls.from_tables(overridden(tables, overrides or {}), source)

    @classmethod
    def from_tables(cls, tables: Mapping[str, Any], source: str = "experiment") -> "Experiment":
        """The experiment of nested tables, every value checked."""
        known = {f.name for f in fields(cls)}
        try:
            for key in tables:
                if key not in known:
                    raise ExperimentError(f"{key}: no such key; {settings.nearest(key, sorted(known))}")
            plain = {key: value for key, value in tables.items() if key not in (*COMPONENTS, *VALUES)}
            checked = settings.resolve(cls, plain, "experiment", without=frozenset((*COMPONENTS, *VALUES)))
            checked |= {key: _of_table(key, tables[key]) for key in VALUES if key in tables}
            missing = [key for key in ("data", "learner", "strategy") if key not in tables]
            if missing:
                raise ExperimentError(f'[{missing[0]}] is missing; add a table such as [{missing[0]}] name = "..."')
            engine = tables.get("engine", {})
            given = {"partition": {"name": "environment"}, **tables}
            given["engine"] = {"name": "in-process", **engine} if isinstance(engine, Mapping) else engine
            parts = {key: COMPONENTS[key].resolve(given[key], key) for key in COMPONENTS}
        except ExperimentError as error:
            raise ExperimentError(f"{source}: {error}") from error.__cause__
        return cls(**{**checked, **parts})

    def tables(self) -> dict[str, Any]:
        """The resolved experiment as nested tables, every default written out."""
        tables: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Component):
                value = {"name": value.name, **value.settings}
            tables[f.name] = asdict(value) if f.name in VALUES and value is not None else value
        plain = {key: value for key, value in tables.items() if not isinstance(value, dict)}
        return _table(plain | {key: value for key, value in tables.items() if isinstance(value, dict)})

    def to_toml(self) -> str:
        """The resolved experiment as a TOML file that loads to an equal experiment."""
        return tomli_w.dumps(self.tables())

    @property
    def fingerprint(self) -> str:
        """Eight hex digits that depend on everything that can change a result."""
        identity = {key: value for key, value in self.tables().items() if key not in NOT_IN_FINGERPRINT}
        if self.device != "cpu":
            identity["device"] = self.device
        if self.batch_clients > 1:
            identity["batch_clients"] = self.batch_clients
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def device(self) -> str:
        """Where clients compute; a device of another kind rounds otherwise."""
        return str(self.engine.settings.get("device", "cpu"))

    @property
    def batch_clients(self) -> int:
        """How many clients train in one go; sums over stacked clients round otherwise."""
        return int(self.engine.settings.get("batch_clients", 1))

    def load_data(self) -> FederatedData:
        """The clients' data: the data set, dealt by the partition, less the labels and fields that clients lack."""
        load = registry.datasets.find(self.data.name)
        arguments = dict(self.data.settings)
        if "rng" in settings.parameters(load):
            arguments["rng"] = seeds.numpy_generator(self.seed, "data")
        source = load(**arguments)
        if not isinstance(source, Pool | FederatedData):
            raise DataError(f"data set {self.data.name!r} returned {type(source).__name__}; return a Pool or FederatedData")
        data = self._labeled(source)
        if self.modalities is not None:
            data = self.modalities.hidden(data)
        return data if self.participants is None else data.only(self.participants)

    def _labeled(self, source: Pool | FederatedData) -> FederatedData:
        """The clients' data, labels hidden as ``labels`` says."""
        if self.labels is None:
            return self._dealt(source)
        labels = replace(self.labels, fold=self.labels.fold or self.seed + 1)
        if isinstance(source, Pool):
            marked: Pool | FederatedData = replace(source, train=labels.marked(source.train))
        else:
            marked = replace(source, train=replace(source.train, examples=labels.marked(source.train.examples)))
        return labels.hidden(self._dealt(marked))

    def _dealt(self, source: Pool | FederatedData) -> FederatedData:
        if isinstance(source, FederatedData):
            return source
        partition = registry.partitions.find(self.partition.name)
        rng = seeds.numpy_generator(self.seed, "partition")
        return deal(self.data.name, source, partition, self.partition.settings, self.validation_fraction, rng)

    def build_learner(self) -> Learner:
        """The learner, from its table."""
        return _build(registry.learners.find(self.learner.name), self.learner.settings, "learner")  # type: ignore[no-any-return]

    def build_strategy(self) -> Any:
        """The strategy, from its table; Flower's ``Strategy``."""
        target = registry.strategies.find(self.strategy.name)
        supplied = {"seed": self.seed} if "seed" in settings.parameters(target) else {}
        return _build(target, {**self.strategy.settings, **supplied}, "strategy")


def bundled() -> dict[str, Path]:
    """The experiments that come with FedVision, by name."""
    spec = find_spec("benchmarks")
    folders = [Path(folder) / "experiments" for folder in (spec and spec.submodule_search_locations) or ()]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}


def locate(experiment: str | Path) -> Path:
    """The file of an experiment given by path or bundled name."""
    path = Path(experiment)
    if path.is_file():
        return path
    known = bundled()
    if str(experiment) in known:
        return known[str(experiment)]
    hint = settings.nearest(str(experiment), list(known))
    raise ExperimentError(f"no experiment {str(experiment)!r}: neither a file nor a bundled experiment; {hint}")


def overridden(tables: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of an experiment with ``overrides`` applied.

    A table whose class is replaced, as by ``strategy.name``, keeps those of its settings that the new class has too.
    """
    kept = dict(tables)
    for key, kind in COMPONENTS.items():
        table, name = tables.get(key), overrides.get(f"{key}.name")
        if isinstance(table, Mapping) and isinstance(name, str) and name != table.get("name"):
            known = settings.parameters(kind.registry.find(name), kind.supplied)
            kept[key] = {setting: value for setting, value in table.items() if setting in known}
    return merged(kept, overrides)


def merged(tables: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``tables`` with the value at each dotted key of ``overrides`` replaced."""
    result = {key: merged(value, {}) if isinstance(value, Mapping) else value for key, value in tables.items()}
    for dotted, value in overrides.items():
        *path, last = dotted.split(".")
        table = result
        for key in path:
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise ExperimentError(f"override {dotted!r}: {key!r} is a value, not a table; use the keys of the experiment file")
        table[last] = value
    return result


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """``["a.b=1", ...]`` as a mapping; values in TOML's grammar, a bare word standing for text.

    >>> parse_overrides(["rounds=3", "strategy.name=fedavg", "learner.hidden=[8, 8]"])
    {'rounds': 3, 'strategy.name': 'fedavg', 'learner.hidden': [8, 8]}
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise ExperimentError(f"--set {assignment!r}: expected key=value, as in --set strategy.fraction=0.5")
        overrides[key.strip()] = _toml_value(value.strip(), assignment)
    return overrides


def _toml_value(text: str, assignment: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if re.fullmatch(r"[A-Za-z_./~][\w./~:-]*|[\w.-]+:\d+", text):
            return text
        raise ExperimentError(f"--set {assignment!r}: {text!r} is not a TOML value ({error}); quote text, as in 'key=\"a b\"'") from error


def _of_table(key: str, table: Any) -> Any:
    """The value that a table of plain settings describes."""
    kind, such_as = VALUES[key]
    if not isinstance(table, Mapping):
        raise ExperimentError(f"{key}: expected a table, as [{key}] {such_as}; got {table!r}")
    return kind(**settings.resolve(kind, table, key))


def _build(target: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> Any:
    try:
        return target(**arguments)
    except (TypeError, ValueError) as error:
        raise ExperimentError(f"[{where}] {target.__name__}: {error}") from error


def _table(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` as TOML has them: no None, lists for tuples."""
    return {key: _value(value) for key, value in values.items() if value is not None}


def _value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _table(value)
    return [_value(item) for item in value] if isinstance(value, list | tuple) else value
