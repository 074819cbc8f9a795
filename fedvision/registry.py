"""Registries: short names for the classes that an experiment file may name."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fedvision.errors import ExperimentError
from fedvision.settings import nearest

T = TypeVar("T", bound=Callable[..., Any])


@dataclass
class Registry:
    """Names for classes of one kind.

    A class enters with the decorator ``@registry("name")`` in any module of ``package``;
    one that lives elsewhere is named ``"package.module:Class"`` in the experiment file and needs no entry.

    Attributes:
        kind: what is registered, for messages ("strategy").
        package: whose modules are searched ("strategies").
        adapter: dotted name of a function that makes dotted classes of other projects fit; None: they fit.
    """

    kind: str
    package: str
    adapter: str | None = None
    entries: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def __call__(self, name: str) -> Callable[[T], T]:
        """Register a class or function under ``name``."""

        def enter(target: T) -> T:
            if name in self.entries and self.entries[name].__qualname__ != target.__qualname__:
                raise ExperimentError(f"the {self.kind} name {name!r} is taken by {self.entries[name]!r}; choose another")
            self.entries[name] = target
            return target

        return enter

    def names(self) -> list[str]:
        """Every registered name, sorted."""
        self._import_package()
        return sorted(self.entries)

    def find(self, name: str) -> Callable[..., Any]:
        """The class called ``name``.

        Raises:
            ExperimentError: unknown name, or a dotted name that cannot be imported.
        """
        if ":" in name:
            target = self._import_dotted(name)
            return target if self.adapter is None else self._import_dotted(self.adapter)(target)  # type: ignore[no-any-return]
        if name not in self.entries:
            self._import_package()
        if name not in self.entries:
            raise ExperimentError(f"unknown {self.kind} {name!r}; {nearest(name, self.names())}, or 'package.module:Name'")
        return self.entries[name]

    def summary(self, name: str) -> str:
        """The first line of the docstring of ``name``."""
        return (self.find(name).__doc__ or "").strip().split("\n")[0]

    def _import_package(self) -> None:
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")

    def _import_dotted(self, name: str) -> Callable[..., Any]:
        module, _, attribute = name.partition(":")
        try:
            target = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ExperimentError(f"{self.kind} {name!r} cannot be imported: {error}; write 'package.module:Name'") from error
        if not callable(target):
            raise ExperimentError(f"{self.kind} {name!r} is {target!r}, which is neither a class nor a function; name one")
        return target  # type: ignore[no-any-return]


strategies = Registry("strategy", "strategies", adapter="strategies.foreign:adapted")
learners = Registry("learner", "fedvision.learners")
datasets = Registry("data set", "fedvision.data")
partitions = Registry("partition", "fedvision.data")
engines = Registry("engine", "fedvision.grids")
