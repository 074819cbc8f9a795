"""The Ray grid. One Ray serves most tests; those of starting and stopping have their own."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import ray
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.runs import run
from clients import app as clients_app
from fedvision.arrays import pack, unpack
from fedvision.data import FederatedData
from fedvision.errors import EngineError
from fedvision.experiment import Experiment
from fedvision.grids import ray_session
from fedvision.grids.ray_grid import WORKER_DIED, RayGrid, _cause
from server.record import read_rows

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    # Ray drops the handles of processes that it has started
    pytest.mark.filterwarnings("ignore:.*subprocess.*:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def shared_ray() -> Iterator[None]:
    """A Ray that is there already; a grid uses it and leaves it running."""
    with ray_session.session(None, 2):
        yield


def messages(*nodes: int, round_number: int = 1, content: RecordDict | None = None) -> list[Message]:
    config = ConfigRecord({"server-round": round_number})
    content = RecordDict({"config": config}) if content is None else content
    return [Message(content, dst_node_id=node, message_type="train") for node in nodes]


def app_of(answer: Callable[[int, Message, Context], MetricRecord]) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        return Message(RecordDict({"metrics": answer(client, message, context)}), reply_to=message)

    return app


def counting(client: int, message: Message, context: Context) -> MetricRecord:
    """Counts how often a client was asked; client 2 fails each time, after it has counted."""
    times = int(context.state["memory"]["times"]) + 1 if "memory" in context.state else 1
    context.state["memory"] = MetricRecord({"times": times})
    if client == 2:
        raise ValueError("no such file")
    return MetricRecord({"client": client, "times": times, "process": os.getpid()})


def meeting(client: int, message: Message, context: Context) -> MetricRecord:
    """As ``counting``, once two processes have come to the folder: none can answer for all before another is up."""
    folder = Path(str(context.run_config["folder"]))
    (folder / str(os.getpid())).touch()
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2:
        if time.monotonic() > deadline:
            raise TimeoutError("no other process came")
        time.sleep(0.01)
    return counting(client, message, context)


# ---- answers --------------------------------------------------------------------------------------------------------


def test_answers_come_in_partition_order_from_several_processes_and_a_client_that_raises_is_one_of_them(tmp_path: Path):
    with RayGrid(app_of(meeting), {"folder": str(tmp_path)}, 9, workers=2, clients_per_task=1) as grid:
        answers = list(grid.send_and_receive(messages(8, 3, 2, 1, 7, 0, 5)))
    assert [answer.metadata.src_node_id for answer in answers] == [0, 1, 2, 3, 5, 7, 8]
    assert [answer.has_error() for answer in answers] == [False, False, True, False, False, False, False]
    assert answers[2].error.reason == "ValueError: no such file"
    processes = {answer.content["metrics"]["process"] for answer in answers if answer.has_content()}
    assert len(processes) == 2
    assert os.getpid() not in processes


def test_what_clients_keep_stays_with_the_grid_and_one_that_fails_keeps_what_it_kept():
    with RayGrid(app_of(counting), {}, 4, workers=1) as grid:
        for _ in range(2):
            list(grid.send_and_receive(messages(0, 1, 2)))
        states = grid.client_states()
    assert {client: state["memory"]["times"] for client, state in states.items()} == {0: 2, 1: 2}
    with RayGrid(app_of(counting), {}, 4, workers=2) as grid:
        grid.load_client_states(states)
        assert next(iter(grid.send_and_receive(messages(1)))).content["metrics"]["times"] == 3


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6, dtype=torch.int64).reshape(2, 3),
        torch.tensor(7, dtype=torch.int32),
        torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        torch.empty(0, 4),
        torch.rand(3, 4, dtype=torch.float64).t(),
        torch.tensor([True, False]),
    ],
    ids=lambda tensor: f"{tensor.dtype} {list(tensor.shape)}",
)
def test_tensors_cross_unchanged(tensor: torch.Tensor):
    ray_session.share_tensors(ray)
    received = ray.get(ray.put(tensor))
    assert received.dtype == tensor.dtype
    assert received.shape == tensor.shape
    assert torch.equal(received, tensor)


def test_what_arrives_in_a_worker_lies_in_shared_memory_and_is_not_copied():
    def where(client: int, message: Message, context: Context) -> MetricRecord:
        address = unpack(message.content["arrays"])["w"].data_ptr()
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        spans = [([int(end, 16) for end in fields[0].split("-")], fields[1]) for fields in maps]
        rights = next(rights for (low, high), rights in spans if low <= address < high)
        return MetricRecord({"shared": int("s" in rights)})

    content = RecordDict({"arrays": pack({"w": torch.zeros(500_000)})})
    with RayGrid(app_of(where), {}, 2, workers=1) as grid:
        [answer] = grid.send_and_receive(messages(0, content=content))
    assert answer.content["metrics"]["shared"] == 1


def test_only_so_many_answers_wait_to_be_read(tmp_path: Path):
    def touch(client: int, message: Message, context: Context) -> MetricRecord:
        (Path(str(context.run_config["folder"])) / str(client)).touch()
        return MetricRecord({"client": client})

    with RayGrid(app_of(touch), {"folder": str(tmp_path)}, 40, workers=1, clients_per_task=2) as grid:
        answers = iter(grid.send_and_receive(messages(*range(40))))
        next(answers)
        time.sleep(1)
        begun = len(list(tmp_path.iterdir()))
        assert len(list(answers)) == 39
    assert begun <= 2 * 4, "no more than the task being read and three that wait"


# ---- workers that die -----------------------------------------------------------------------------------------------


def test_a_client_over_which_workers_die_again_and_again_is_named_with_the_cause_and_the_others_answer():
    def deadly(client: int, message: Message, context: Context) -> MetricRecord:
        if client == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if client == 4:
            sys.exit(5)
        return MetricRecord({"client": client})

    with RayGrid(app_of(deadly), {}, 6, workers=2, clients_per_task=3) as grid:
        answers = list(grid.send_and_receive(messages(*range(6))))
    failed = {answer.metadata.src_node_id: answer.error for answer in answers if answer.has_error()}
    assert set(failed) == {3, 4}
    assert {error.code for error in failed.values()} == {WORKER_DIED}
    assert "killed, or crashed" in failed[3].reason
    assert "ended by itself" in failed[4].reason
    assert [answer.content["metrics"]["client"] for answer in answers if answer.has_content()] == [0, 1, 2, 5]


def test_a_worker_killed_in_every_round_changes_no_bit(
    federated: FederatedData,
    experiment: Callable[..., Experiment],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_figures: None,
):
    flags = tmp_path / "flags"
    flags.mkdir()
    undisturbed = clients_app.train
    deadly = ClientApp()
    deadly.evaluate()(clients_app.evaluation)

    @deadly.train()
    def train(message: Message, context: Context) -> Message:
        flag = flags / str(message.content["config"]["server-round"])
        if context.node_config["partition-id"] == 1 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return undisturbed(message, context)

    whole = experiment(rounds=10, strategy={"name": "scaffold", "batch_size": 4}, evaluate_every=10)
    expected = run(whole, data=federated, out=tmp_path / "expected")
    monkeypatch.setattr("benchmarks.runs.client_app", deadly)
    found = run(whole, {"engine.name": "ray", "engine.workers": 2}, data=federated, out=tmp_path / "found")
    assert len(list(flags.iterdir())) == 10
    assert all(torch.equal(found.state[name], tensor) for name, tensor in expected.state.items())
    assert found.rounds["failures"].sum() == 0


def test_a_long_message_of_rays_comes_to_a_few_words():
    assert _cause(RuntimeError("Task was killed due to the node running\nlow on memory. More text")) == "the machine ran out of memory"
    assert _cause(RuntimeError("")) == "RuntimeError"


# ---- engines agree --------------------------------------------------------------------------------------------------

AGREEING = [
    {"name": "fedavg", "batch_size": 4, "fraction": 0.6},
    {"name": "fishr-inter-geo", "penalty_weight": 0.5},
    {"name": "scaffold", "batch_size": 4},
    {"name": "fedmedian", "batch_size": 4},
    {"name": "flwr.serverapp.strategy:FedAvg", "batch_size": 4},
]


@pytest.mark.parametrize(
    ("strategy", "workers"),
    [*((table, 2) for table in AGREEING), *((table, 1) for table in AGREEING[:3])],
    ids=lambda value: value["name"] if isinstance(value, dict) else f"{value} workers",
)
def test_engines_agree(
    strategy: dict, workers: int, federated: FederatedData, experiment: Callable[..., Experiment], tmp_path: Path, no_figures: None
):
    whole = experiment(strategy=strategy)
    expected = run(whole, data=federated, out=tmp_path / "in-process")
    found = run(whole, {"engine.name": "ray", "engine.workers": workers}, data=federated, out=tmp_path / "ray")
    assert all(torch.equal(found.state[name], tensor) for name, tensor in expected.state.items())
    rows, others = ([{**row, "seconds": 0} for row in read_rows(one.path / "rounds.jsonl")] for one in (expected, found))
    assert rows == others


# ---- starting, stopping, wrong settings -----------------------------------------------------------------------------


def test_a_device_that_ray_would_hide_is_refused():
    with pytest.raises(EngineError, match="gpus_per_worker = 0 hides"):
        RayGrid(ClientApp(), {}, 1, device="cuda")


def test_more_workers_than_there_is_room_for_are_refused():
    with pytest.raises(EngineError, match=r"1000 worker\(s\) of 1 CPUs .* do not fit"), RayGrid(ClientApp(), {}, 1, workers=1000):
        pass
    with pytest.raises(EngineError, match="do not fit"), RayGrid(ClientApp(), {}, 1, gpus_per_worker=900):
        pass


def test_without_a_number_there_are_as_many_workers_as_there_is_room_for():
    cpus = ray.cluster_resources()["CPU"]
    with RayGrid(app_of(counting), {}, 1, cpus_per_worker=cpus / 2) as grid:
        assert len(grid._pool) == 2


def leftovers(mark: str) -> list[str]:
    """The command lines of processes whose environment holds ``mark``."""
    left = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes() and (folder / "cmdline").read_bytes():
                left.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return left


@pytest.fixture
def own_temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go; nobody else's, as other tests run beside, and of a name that is short enough for sockets."""
    with TemporaryDirectory(prefix="own", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.mark.parametrize("ending", ["success", "failure", "Ctrl-C"])
def test_nothing_is_left_behind(ending: str, spawned: Callable, rows_reach: Callable, here: Path, own_temporary: Path):
    rounds = {"success": 1, "failure": 2, "Ctrl-C": 100_000}[ending]
    options = ["--set", "engine.name=ray", "--set", "engine.workers=1", "--set", f"rounds={rounds}"]
    if ending == "failure":
        (here / "broken.py").write_text(
            "from strategies.fedsgd import FedSGD\nclass Broken(FedSGD):\n    def server_update(*_):\n        1 / 0\n"
        )
        options += ["--set", "strategy.name=broken:Broken"]
    process = spawned("run", "mine.toml", *options, "--out", "out")
    if ending == "Ctrl-C":
        rows_reach(process, here / "out", 2)
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == {"success": 0, "failure": 1, "Ctrl-C": 130}[ending], out + err
    deadline = time.monotonic() + 20
    while leftovers(str(own_temporary)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert leftovers(str(own_temporary)) == []
    assert [path for path in own_temporary.iterdir() if not path.name.startswith("torchinductor_")] == []  # which torch keeps


def test_no_cluster_at_an_address_is_one_line(fedvision: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    ended = fedvision("run", "mine.toml", "--set", "engine.name=ray", "--set", "engine.address=127.0.0.1:1")
    assert ended.status == 1
    assert "no Ray cluster answers at engine.address = '127.0.0.1:1'" in ended.err
    assert "ray start --head" in ended.err
