"""The ServerApp: used unchanged by every engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedvision.assembly import assembly_of
from server.folder import RunFolder
from server.rounds import Session

app = ServerApp()

_sessions: dict[int, Session] = {}


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run's configuration names."""
    session = _sessions.get(context.run_id) or _default_session(context)
    session.run(grid)


@contextmanager
def prepared(run_id: int, session: Session) -> Iterator[None]:
    """Let the app of this process run ``session`` for the run ``run_id``."""
    _sessions[run_id] = session
    try:
        yield
    finally:
        del _sessions[run_id]


def _default_session(context: Context) -> Session:
    assembly = assembly_of(context.run_id, context.run_config)
    experiment = assembly.experiment
    folder = RunFolder(Path("runs") / f"{experiment.name}-{experiment.fingerprint}")
    return Session(assembly, folder, experiment.fingerprint, resume=True)
