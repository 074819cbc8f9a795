"""What a strategy's clients keep from one round to the next, so that it agrees with what the server counted.

A client may have done its work, and have changed what it keeps, and its answer be lost or refused. It is told with the next message of
which round its latest counted answer was, and takes back what came after.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from fedvision.arrays import config_of
from fedvision.errors import RunError

MEMORY, BEFORE = "memory", "before/"
"""The record that says in which round a client's state came to be; what the names of records begin with that it replaced."""


@contextmanager
def agreed(state: RecordDict, names: Sequence[str], config: Mapping[str, Any], client: int, training: bool) -> Iterator[None]:
    """A block in which a client answers; before it, what the client keeps is made to agree with what the server counted.

    Args:
        state: what the client keeps.
        names: of the records in it that a strategy keeps, its ``client_memory``.
        config: of the server's message; if it says nothing of counted answers, nothing happens.
        client: whose answer it is.
        training: whether what is kept changes with the answer.

    Raises:
        RunError: the server counted an answer of which nothing is kept here.
    """
    heard = dict(zip(config.get("cohort", ()), config.get("heard", ()), strict=True)).get(client)
    if heard is None:
        yield
        return
    agree(state, names, heard)
    before = {name: state[name] for name in names if name in state}
    yield
    if training:
        for name in names:
            state.pop(BEFORE + name, None)
        state.update({BEFORE + name: record for name, record in before.items()})
        state[MEMORY] = ConfigRecord({"round": int(config["server-round"])})


def agree(state: RecordDict, names: Sequence[str], heard: int) -> None:
    """Make what a client keeps that of its latest answer which the server counted.

    Args:
        state: what it keeps; records that came to be with an answer that was not counted are taken back.
        names: of the records that a strategy keeps.
        heard: the round of the latest answer that the server counted; 0: none.

    Raises:
        RunError: the server counted an answer of which nothing is kept here.
    """
    kept = int(config_of(state, MEMORY).get("round", 0))
    if kept < heard:
        lost = f"the server counted this client's answer of round {heard}, but what the client keeps is of round {kept}: it was lost"
        raise RunError(f"{lost} with its process; give the silo a folder of its own with state = in its node-config, and start again")
    if kept > heard:
        for name in names:
            state.pop(name, None)
            if BEFORE + name in state:
                state[name] = state.pop(BEFORE + name)
        state[MEMORY] = ConfigRecord({"round": heard})
