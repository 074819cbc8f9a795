"""Runtimes: engines that run server and clients elsewhere, so that this process has no grid."""

from abc import ABC, abstractmethod
from collections.abc import Generator
from pathlib import Path

from fedvision.experiment import Experiment


class Runtime(ABC):
    """An engine that carries out a whole run in other processes; a ``Grid`` carries only its messages."""

    @abstractmethod
    def check(self, experiment: Experiment) -> None:
        """Refuse an experiment that needs what is only here.

        Raises:
            EngineError: it does.
        """

    @abstractmethod
    def follow(self, experiment: Experiment, clients: int, folder: Path) -> Generator[None, None, None]:
        """Start a run and follow it; closing the generator stops the run.

        Args:
            experiment: what to run.
            clients: the number of partitions.
            folder: where the run's files are, or are brought: complete when the generator ends.

        Yields:
            None, a few times a second, when there may be new rows in ``folder``.

        Raises:
            EngineError: the run cannot start, or failed; with the cause.
        """
