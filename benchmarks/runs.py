"""Running one experiment, from Python."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from flwr.app import Context, RecordDict
from torch import Tensor

from benchmarks import figures, galleries
from clients.app import app as client_app
from clients.batching import check_batchable
from fedvision import registry
from fedvision.arrays import Named
from fedvision.assembly import Assembly, installed
from fedvision.data import FederatedData
from fedvision.errors import EngineError, RunError
from fedvision.experiment import Experiment
from fedvision.files import is_temporary
from fedvision.grids.runtime import Runtime
from fedvision.trees import load_weights
from server.app import app as server_app
from server.app import prepared
from server.checkpoint import Checkpoint
from server.folder import RunFolder
from server.manifest import closing, describe, identity_of
from server.record import read_rows
from server.rounds import ANOTHER, COLUMNS, Row, Session, complete

_run_ids = count(1)

if not logging.getLogger().isEnabledFor(logging.DEBUG):
    logging.getLogger("flwr").setLevel(logging.WARNING)  # its strategies tell every step


@dataclass(frozen=True)
class Run:
    """A run, read from its folder.

    Attributes:
        path: the run's folder.
    """

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """The run that a folder holds.

        Raises:
            RunError: it holds none.
        """
        if not RunFolder(Path(path)).started:
            raise RunError(f"{path} holds no run; give the folder that `fedvision run` printed")
        return cls(Path(path))

    @cached_property
    def rounds(self) -> pd.DataFrame:
        """One row a round, round 0 being the initial model; see ``docs/tour.md`` for the columns."""
        rows = [complete(row) for row in read_rows(RunFolder(self.path).rounds)]
        return pd.DataFrame(rows, columns=list(dict.fromkeys([*COLUMNS, *(key for row in rows for key in row)])))

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The final model's state dict."""
        return load_weights(RunFolder(self.path).model)

    @cached_property
    def experiment(self) -> Experiment:
        """The resolved experiment."""
        return Experiment.load(RunFolder(self.path).experiment)

    @property
    def arrays(self) -> Named | None:
        """The shared arrays of the final model, or before there is one, of the last checkpoint; None if there is neither."""
        folder = RunFolder(self.path)
        if self.finished:
            return self.state
        return Checkpoint.load(folder.checkpoint).arrays if folder.checkpoint.exists() else None

    def rebuilt(self, data: FederatedData | None = None, device: str | None = None) -> Assembly:
        """The parts of the run, built anew; the model is as it was before the run.

        Args:
            data: what the run was given instead of the data set that its experiment names.
            device: where to compute, if not where the run did.

        Raises:
            RunError: other data than the run's.
        """
        elsewhere = {} if device is None else {"engine.device": device}
        assembly = Assembly.of(Experiment.load(RunFolder(self.path).experiment, elsewhere), data)
        digest = self.manifest.get("data", {}).get("digest")
        if assembly.data.digest != digest:
            made = f"the run in {self.path} was made with other data ({digest}) than this ({assembly.data.digest})"
            raise RunError(f"{made}; give that, from Python as `data`")
        return assembly

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return RunFolder(self.path).finished

    @property
    def manifest(self) -> dict[str, Any]:
        """What ran where."""
        return RunFolder(self.path).read_manifest()


def run(
    experiment: str | Path | Experiment,
    overrides: Mapping[str, Any] | None = None,
    data: FederatedData | None = None,
    initial: Mapping[str, Tensor] | str | Path | None = None,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    draw: bool = True,
    on_round: Callable[[Row], None] = lambda row: None,
) -> Run:
    """Run an experiment from beginning to end.

    Args:
        experiment: a TOML file, the name of a bundled experiment, or an ``Experiment``.
        overrides: values by dotted key, e.g. ``{"rounds": 5, "strategy.fraction": 0.5}``.
        data: used instead of the data set that the experiment names.
        initial: a state dict, or the path of a safetensors file, to start from instead of a fresh model.
        out: the run's folder; ``runs/<name>-<fingerprint>`` (numbered, if that is taken) if not given.
        resume: go on with the run that ``out`` holds; a finished one is returned as it is.
        draw: whether to make the run's pictures.
        on_round: called with each row as it is recorded.

    Raises:
        FedVisionError: a wrong experiment, data that does not fit, too few usable answers, a full disk, ...
    """
    experiment = Experiment.load(experiment, overrides)
    _check_travels(experiment, data=data, initial=initial)
    weights = load_weights(Path(initial)) if isinstance(initial, str | Path) else initial
    assembly = Assembly.of(experiment, data)
    if experiment.batch_clients > 1:
        check_batchable(assembly)
    identity = identity_of(assembly, weights)
    folder = _folder(experiment, identity, out, resume)
    if folder.finished:
        for row in read_rows(folder.rounds):
            on_round(row)
        return Run(folder.path)
    describe(folder, assembly, identity)
    with threads(experiment.threads), closing(folder):
        _execute(Session(assembly, folder, identity, weights, resume, on_round))
        if draw:
            figures.of_run(folder, assembly.data, galleries.of_learner(assembly, load_weights(folder.model)))
    return Run(folder.path)


def _execute(session: Session) -> None:
    """Carry a session over the engine that its experiment names."""
    experiment, clients = session.assembly.experiment, session.assembly.data.num_clients
    engine = registry.engines.find(experiment.engine.name)
    if _is_runtime(engine):
        _follow(engine(**experiment.engine.settings), session)
        return
    run_id = next(_run_ids)
    run_config = {"run-id": run_id, "experiment": str(session.folder.experiment), "overrides": ""}
    with ExitStack() as stack:
        stack.enter_context(installed(run_id, session.assembly))
        stack.enter_context(prepared(run_id, session))
        grid = stack.enter_context(engine(client_app, run_config, clients, **experiment.engine.settings))
        server_app(grid, Context(run_id, 0, {}, RecordDict(), run_config))  # type: ignore[arg-type]


def _is_runtime(engine: Any) -> bool:
    return isinstance(engine, type) and issubclass(engine, Runtime)


def _follow(runtime: Runtime, session: Session) -> None:
    """Have a run done elsewhere, and tell its rows as they are recorded."""
    file, told, size = session.folder.rounds, -1, -1
    with contextlib.closing(runtime.follow(session.assembly.experiment, session.assembly.data.num_clients, session.folder.path)) as news:
        for _ in chain(news, [None]):
            grown = file.stat().st_size if file.exists() else -1
            for row in read_rows(file) if grown != size else ():
                if row["round"] > told:
                    told = row["round"]
                    session.on_round(row)
            size = grown


def _check_travels(experiment: Experiment, **given: Any) -> None:
    """Refuse what cannot be sent to where the experiment's engine runs it."""
    engine = registry.engines.find(experiment.engine.name)
    if not _is_runtime(engine):
        return
    engine(**experiment.engine.settings).check(experiment)
    for name, value in given.items():
        if value is not None:
            stays = f"`{name}` was given here and does not travel with engine.name = {experiment.engine.name!r}"
            raise EngineError(f"{stays}; name it in the experiment, or use engine.name = 'in-process'")


def _folder(experiment: Experiment, identity: str, out: str | Path | None, resume: bool) -> RunFolder:
    """The folder to run in: the one asked for, or the first of the default names that fits."""
    if out is not None:
        folder = RunFolder(Path(out))
        if folder.started:
            _check_resumable(folder, identity, resume)
        elif folder.path.exists() and not folder.path.is_dir():
            raise RunError(f"{folder.path} is a file; choose a folder with --out")
        elif folder.path.exists() and not all(is_temporary(path) for path in folder.path.iterdir()):
            raise RunError(f"{folder.path} is not empty and holds no run; choose another folder with --out")
        return folder
    base, taken = Path("runs") / f"{experiment.name}-{experiment.fingerprint}", None
    for number in count(1):
        folder = RunFolder(base if number == 1 else base.with_name(f"{base.name}-{number}"))
        if not folder.path.exists():
            return taken if resume and taken is not None else folder
        if folder.started and folder.read_manifest().get("identity") == identity:
            taken = folder
    raise AssertionError("unreachable")


def _check_resumable(folder: RunFolder, identity: str, resume: bool) -> None:
    if folder.read_manifest().get("identity") != identity:
        raise RunError(f"{folder.path} holds a run of {ANOTHER}; choose another folder with --out")
    if not resume:
        state = "a finished run" if folder.finished else "an unfinished run"
        raise RunError(f"{folder.path} holds {state} of this experiment; go on with --resume, or choose another folder with --out")


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Compute with ``number`` CPU threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
