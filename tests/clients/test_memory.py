"""What a client keeps outlives its process, agrees with what the server counted, and is missed where it is lost."""

from itertools import count

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from clients.app import app as client_app
from clients.memory import Shelf
from fedvision.arrays import config_of, pack
from fedvision.assembly import Assembly, installed
from fedvision.errors import DataError, RunError
from fedvision.grids.in_process import InProcessGrid
from fedvision.grids.passing import PassingGrid
from fedvision.privacy import RECORD, Ledger
from server.folder import RunFolder
from server.record import read_rows
from server.rounds import Session
from strategies.memory import MEMORY

RUNS = count(720_000)

SCAFFOLD = {"strategy": {"name": "scaffold", "batch_size": 4}}
OWN_LAYER = {
    "strategy": {"name": "fedavg", "batch_size": 4},
    "learner": {"name": "classifier", "hidden": [6], "private": ["hidden1.*"]},
}
PRIVATE = {"strategy": {"name": "fedavg", "batch_size": 4}, "privacy": {"clipping_norm": 1.0, "noise_multiplier": 1.0, "delta": 0.01}}
FEDCURV = {"strategy": {"name": "fedcurv", "batch_size": 4}}
KINDS = [SCAFFOLD, OWN_LAYER, PRIVATE, FEDCURV]
NAMES = ["scaffold", "a layer of its own", "privacy", "fedcurv"]


class Restarted(PassingGrid):
    """Clients that are started anew for each message, as nodes whose processes were killed; with a folder each, or without.

    Args:
        grid: not entered yet, of the plain client app.
        folder: of all clients; None: what they kept is lost.
    """

    def __init__(self, run_id, clients, folder):
        def node(message, context):
            context.state.clear()
            if folder is not None:
                context.node_config["state"] = str(folder / f"silo{context.node_id}")
            return client_app(message, context)

        super().__init__(InProcessGrid(node, {"run-id": run_id}, clients))
        self.keeps = folder is not None


@pytest.fixture
def ran(experiment, federated, tmp_path):
    """Runs a session; returns its rows without their times, and the bits of its model if it has finished."""

    def run(changes, restarted=False, state=True, at="run", **arguments):
        assembly, run_id = Assembly.of(experiment(**changes), federated), next(RUNS)
        grid = InProcessGrid(client_app, {"run-id": run_id}, 3)
        if restarted:
            grid = Restarted(run_id, 3, tmp_path / "state" if state else None)
        folder = RunFolder(tmp_path / at)
        with installed(run_id, assembly), grid._grid if restarted else grid:
            Session(assembly, folder, "identity", **arguments).run(grid)
        return [row | {"seconds": 0} for row in read_rows(folder.rounds)], folder.model.read_bytes()

    return run


class Stopped(BaseException):
    """A test stops a run here."""


def stop_after(number):
    def on_round(row):
        if row["round"] == number:
            raise Stopped

    return on_round


@pytest.mark.parametrize("changes", KINDS, ids=NAMES)
def test_what_clients_keep_outlives_their_processes(ran, changes):
    assert ran(changes, at="here") == ran(changes, restarted=True, at="there")


@pytest.mark.parametrize("changes", [SCAFFOLD, OWN_LAYER, FEDCURV], ids=["scaffold", "a layer of its own", "fedcurv"])
def test_a_server_that_goes_back_to_a_checkpoint_finds_what_clients_kept_then(ran, changes):
    changes = changes | {"rounds": 5, "checkpoint_every": 2}
    with pytest.raises(Stopped):
        ran(changes, restarted=True, on_round=stop_after(3))
    assert ran(changes, restarted=True, resume=True) == ran(changes, at="undisturbed")


def test_what_was_spent_is_not_taken_back_when_the_server_goes_back(ran):
    changes = PRIVATE | {"rounds": 5, "checkpoint_every": 2}
    with pytest.raises(Stopped):
        ran(changes, restarted=True, on_round=stop_after(3))
    rows, model = ran(changes, restarted=True, resume=True)
    undisturbed, expected = ran(changes, at="undisturbed")
    assert model == expected  # round 3 is the same the second time, and yet it counts twice
    assert rows[3]["epsilon"] == undisturbed[4]["epsilon"]


def test_without_folders_a_run_is_not_resumed(ran):
    with pytest.raises(Stopped):
        ran(SCAFFOLD, restarted=True, on_round=stop_after(1))
    with pytest.raises(RunError, match="was lost with Flower's run; start again in another folder, and give each silo a folder"):
        ran(SCAFFOLD, restarted=True, state=False, resume=True)


@pytest.mark.parametrize("changes", KINDS, ids=NAMES)
def test_what_is_lost_is_missed(ran, changes):
    with pytest.raises(Exception, match="the server counted this client's answer of round 1, but what the client keeps is of round 0"):
        ran(changes, restarted=True, state=False)


def test_only_what_a_checkpoint_may_need_stays_on_disk(ran, tmp_path):
    ran(SCAFFOLD | {"rounds": 8, "checkpoint_every": 3}, restarted=True)
    [folder] = (tmp_path / "state" / "silo0").iterdir()
    assert folder.name.startswith("tiny-") and folder.name.endswith("-client0")
    assert [path.name for path in sorted(folder.iterdir())] == [f"{number:08d}-1-fit.safetensors" for number in (6, 7, 8)]


def test_clients_that_keep_nothing_write_nothing(ran, tmp_path):
    ran({}, restarted=True)
    assert not (tmp_path / "state").exists()


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_a_state_of_a_round_that_did_not_come_to_be_is_passed_over(tmp_path):
    shelf = Shelf(tmp_path, every=10)
    for number in (1, 2, 3):
        shelf.put(RecordDict({"mark": ConfigRecord({"n": number}), RECORD: Ledger(((1.0, 0.5, number),)).record()}), number, "fit")
    state = RecordDict({"other": ConfigRecord({"n": 7})})
    shelf.take(state, 2, "fit")
    assert config_of(state, "mark")["n"] == 1 and "other" not in state
    assert Ledger.of(state).entries == ((1.0, 0.5, 3),)
    shelf.put(state, 2, "fit")
    shelf.take(state, 9, "evaluate")
    assert config_of(state, "mark")["n"] == 1


def test_a_second_phase_goes_on_from_the_first(tmp_path):
    shelf = Shelf(tmp_path, every=1)
    shelf.put(RecordDict({"mark": ConfigRecord({"n": 1})}), 4, "statistics")
    state = RecordDict()
    shelf.take(state, 4, "fit")
    assert config_of(state, "mark")["n"] == 1
    shelf.take(state, 4, "statistics")
    assert not state


def test_a_damaged_file_is_named(tmp_path):
    shelf = Shelf(tmp_path, every=1)
    shelf.put(RecordDict(), 1, "fit")
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(RunError, match=rf"{file}: not readable .*; restore it from a copy, or remove the folder"):
        shelf.take(RecordDict(), 2, "fit")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/own/.*: cannot be written"):
        Shelf(tmp_path / "file" / "own", every=1).put(RecordDict(), 1, "fit")


# ---- errors that may tell of data -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "told", "untold"),
    [
        (DataError("/data/Jane Doe.png cannot be read"), "RunError: DataError; what it says may tell of the silo's data", "Jane"),
        (KeyError("Jane Doe"), "RunError: KeyError; what it says", "Jane"),
        (RunError("the weights do not fit"), "RunError: the weights do not fit", "may tell"),
    ],
)
def test_errors_that_may_tell_of_a_silos_own_data_stay_there(experiment, federated, tmp_path, monkeypatch, error, told, untold):
    (tmp_path / "silo.toml").write_text("")

    def fails(*arguments):
        raise error

    def node(message, context):
        context.node_config["silo"] = str(tmp_path / "silo.toml")
        return client_app(message, context)

    monkeypatch.setattr("clients.app.Silo", fails)
    assembly, run_id = Assembly.of(experiment(), federated), next(RUNS)
    content = RecordDict({"arrays": pack(assembly.initial), "config": ConfigRecord({"server-round": 1})})
    with installed(run_id, assembly), InProcessGrid(node, {"run-id": run_id}, 3) as grid:
        [answer] = grid.send_and_receive([Message(content, dst_node_id=0, message_type="train")])
    assert answer.error.reason.startswith(told) and untold not in answer.error.reason


def test_the_mark_is_kept_where_something_is_kept(experiment, federated):
    assembly, run_id = Assembly.of(experiment(**SCAFFOLD), federated), next(RUNS)
    config = ConfigRecord({"server-round": 4, "cohort": [0, 2], "heard": [0, 0]})
    content = RecordDict({"arrays": pack(assembly.initial), "config": config})
    with installed(run_id, assembly), InProcessGrid(client_app, {"run-id": run_id}, 3) as grid:
        list(grid.send_and_receive([Message(content, dst_node_id=2, message_type="train")]))
        assert config_of(grid.client_states()[2], MEMORY) == {"round": 4}


def test_under_client_level_privacy_no_message_tells_who_is_in_a_cohort(experiment, federated):
    def told(**changes):
        assembly = Assembly.of(experiment(**(OWN_LAYER | changes)), federated)
        with InProcessGrid(client_app, {"run-id": next(RUNS)}, 3) as grid:
            messages = assembly.strategy.configure_train(1, pack(assembly.initial), ConfigRecord(), grid)
        return {key for message in messages for key in config_of(message.content)}

    privacy = {"unit": "client", "clipping_norm": 1.0, "noise_multiplier": 1.0, "delta": 0.1}
    assert {"cohort", "heard"} <= told()
    assert told(privacy=privacy, strategy={"name": "fedavg", "weight_by": "clients"}) == {"server-round"}
