"""What a silo trains on, where the silo says so itself: a small file beside its data, which the server never sees."""

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedvision.data.federated import FederatedData, Silos
from fedvision.errors import DataError, ExperimentError
from fedvision.experiment import COMPONENTS, Component, Experiment
from fedvision.settings import Count, nearest, resolve

SILO = "silo"
"""The key of a node's configuration that names the file, as in ``--node-config 'partition-id=0 silo="/keys/silo.toml"'``."""


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """A silo's file: its data set, all of whose training examples are its own.

    Attributes:
        data: the data set, instead of the experiment's; None: the silo's share of that.
        classes: how many classes the federation knows, where this silo has examples of some only.
    """

    data: Component | None = None
    classes: Count | None = None

    @classmethod
    def load(cls, file: str | Path) -> "OwnData":
        """The file, checked.

        Raises:
            DataError: it cannot be read, or says what a silo does not decide.
        """
        try:
            tables = tomllib.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise DataError(f"{file}, in which this silo says what its data is, cannot be read: {error}; mend it") from error
        return cls.of(tables, str(file))

    @classmethod
    def of(cls, tables: dict[str, Any], source: str) -> "OwnData":
        """The silo's word in nested tables; see ``load``."""
        for key in tables:
            if key not in ("data", "classes"):
                raise DataError(f"{source}: {key}: a silo does not decide this; {nearest(key, ['data', 'classes'])}")
        try:
            plain = resolve(cls, {key: value for key, value in tables.items() if key != "data"}, "silo", without=frozenset({"data"}))
            data = COMPONENTS["data"].resolve(tables["data"], "data") if "data" in tables else None
        except ExperimentError as error:
            raise DataError(f"{source}: {error}") from error.__cause__
        return cls(data=data, **plain)

    def dealt(self, experiment: Experiment, client: int) -> FederatedData | None:
        """The data as the federation has it: the client holds all of it; those before it hold theirs elsewhere.

        Args:
            experiment: says which labels and fields learners see, and which share is held back for validation.
            client: which of the federation's clients this silo is.

        Returns:
            None if the silo names no data of its own.

        Raises:
            DataError: the data cannot be loaded, or has more classes than the file says.
        """
        if self.data is None:
            return None
        whole = Component("iid", {"clients": 1})
        held = replace(experiment, data=self.data, partition=whole, participants=None).load_data()
        if self.classes is not None and held.classes > self.classes:
            raise DataError(f"the silo's data has {held.classes} classes, classes = {self.classes}; say how many the federation knows")
        validation = None if held.validation is None else _preceded(held.validation, client)
        classes = self.classes or held.classes
        return replace(held, train=_preceded(held.train, client), validation=validation, classes=classes, elsewhere=True)


def _preceded(silos: Silos, client: int) -> Silos:
    """All examples as those of ``client``; each client before it has none."""
    return Silos(silos.examples, (0,) * (client + 1) + (len(silos.examples),))
