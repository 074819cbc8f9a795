"""The ServerApp: used unchanged by every engine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedvision.assembly import Assembly, assembly_of
from fedvision.errors import RunError
from fedvision.grids.flower import RUNS
from fedvision.grids.roster import Roster
from server.folder import RunFolder
from server.manifest import closing, describe, identity_of
from server.rounds import ANOTHER, Session

WAIT = "FEDVISION_WAIT"
"""The environment variable that says how many seconds such a ServerApp waits for its clients; 300 if not set."""

app = ServerApp()

_sessions: dict[int, Session] = {}


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the session that is prepared, or else the experiment that the run's configuration names."""
    if context.run_id in _sessions:
        _sessions[context.run_id].run(grid)
        return
    session = _default_session(context)
    with closing(session.folder):
        by_partition = hasattr(grid, "client_states")  # as grids of ours are
        session.run(grid if by_partition else _roster(grid, session.assembly))


@contextmanager
def prepared(run_id: int, session: Session) -> Iterator[None]:
    """Let the app of this process run ``session`` for the run ``run_id``."""
    _sessions[run_id] = session
    try:
        yield
    finally:
        del _sessions[run_id]


def _default_session(context: Context) -> Session:
    """The run in its usual folder; one that is there already is gone on with."""
    assembly = assembly_of(context.run_id, context.run_config)
    experiment = assembly.experiment
    folder = RunFolder(Path(os.environ.get(RUNS, "runs")).absolute() / f"{experiment.name}-{experiment.fingerprint}")
    identity = identity_of(assembly)
    held = folder.read_manifest() if folder.started else None
    if held is None:
        describe(folder, assembly, identity, ["flwr", "run"])  # this process's own command line holds a token
    elif held.get("identity") == identity:
        folder.write_manifest(held | {"status": "running"})
    else:
        raise RunError(f"{folder.path} holds a run of {ANOTHER}; move it away, or name another folder by {RUNS}")
    return Session(assembly, folder, identity, resume=True)


def _roster(grid: Grid, assembly: Assembly) -> Roster:
    """The clients of one of Flower's grids."""
    deadline = assembly.experiment.engine.settings.get("deadline")
    return Roster(grid, assembly.data.num_clients, _seconds(), assembly.strategy.min_clients, deadline)


def _seconds() -> float:
    given = os.environ.get(WAIT, "300")
    try:
        return float(given)
    except ValueError:
        raise RunError(f"{WAIT} = {given!r}: expected a number of seconds") from None
