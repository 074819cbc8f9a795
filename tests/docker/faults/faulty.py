"""Strategies whose clients fail as they are told, in real silos only; the tests put this folder on the silos' Python path."""

import math
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedvision.arrays import config_of
from strategies.fishr import FishrInterGeo
from strategies.scaffold import Scaffold
from strategies.strategy import Update

HELD = "FEDVISION_HELD"
"""The environment variable with the folder in which a client that holds its answer back says so, and waits for leave."""


def silo_here() -> str:
    """Which silo's process this is."""
    return Path(os.environ.get("FLWR_HOME", "/nowhere/flower")).parent.name


@dataclass(kw_only=True)
class Faulty:
    """What goes wrong.

    Attributes:
        faults: ``"silo1 2 kill"``: in round 2 silo1's process kills itself; ``raise``: it raises; ``nan``: it sends NaN;
            ``hold``: it has its answer, and sends it when it is told to.
    """

    faults: Sequence[str] = ()

    def client_update(self, silo, content) -> Update:
        """The answer, unless something goes wrong."""
        here = f"{silo_here()} {config_of(content)['server-round']}"
        what = {place: kind for place, _, kind in (fault.rpartition(" ") for fault in self.faults)}.get(here)
        if what == "raise":
            raise ValueError("the scanner of Jane Doe is broken")
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        update = super().client_update(silo, content)
        if what == "hold":
            held(here)
        if what != "nan":
            return update
        spoilt = {name: {key: tensor * math.nan for key, tensor in arrays.items()} for name, arrays in update.records.items()}
        return replace(update, records=spoilt)


def held(here: str) -> None:
    """Say so, and wait."""
    folder = Path(os.environ[HELD])
    (folder / here).touch()
    while not (folder / f"{here} released").exists():
        time.sleep(0.1)


@dataclass(kw_only=True)
class FaultyScaffold(Faulty, Scaffold):
    """SCAFFOLD whose clients fail."""


@dataclass(kw_only=True)
class FaultyFishr(Faulty, FishrInterGeo):
    """Fishr whose clients fail in its second phase."""
