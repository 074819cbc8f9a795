import itertools
import time

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from clients.app import app as client_app
from fedvision.arrays import metrics_of
from fedvision.errors import EngineError
from fedvision.grids import exchange, roster
from fedvision.grids.roster import Roster

SUPERLINK = 1


class FakeGrid(Grid):
    """Nodes with ids as Flower draws them, that answer in reverse; those of ``dead`` with an error in the SuperLink's name."""

    def __init__(self, nodes: dict[int, int], partitions: int | None = None) -> None:
        self.nodes, self.partitions = dict(nodes), len(nodes) if partitions is None else partitions
        self.dead: set[int] = set()
        self.asked: list[tuple[str, int]] = []
        self.waiting: list[Message] = []
        self.pulls, self.ids = 0, itertools.count(1)

    def set_run(self, run):
        self.its_run = run

    @property
    def run(self):
        return self.its_run

    def create_message(self, *arguments):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{next(self.ids)}"
            self.asked.append((message.metadata.message_type, message.metadata.dst_node_id))
        messages = list(messages)
        self.waiting += [message for message in messages if message.metadata.dst_node_id in self.nodes]
        return [message.metadata.message_id if message.metadata.dst_node_id in self.nodes else None for message in messages]

    def pull_messages(self, message_ids):
        self.pulls += 1
        answered = [self.waiting.pop()] if self.waiting else []  # the last first
        return [self.answer(message) for message in answered if message.metadata.message_id in message_ids]

    def send_and_receive(self, messages, *, timeout=None):
        ids = self.push_messages(messages)
        return [reply for _ in ids for reply in self.pull_messages(ids)]

    def answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if node in self.dead:
            reply = Message(Error(5, "Node Unavailable"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = SUPERLINK
            return reply
        config = {"partition-id": self.nodes[node], "num-partitions": self.partitions}
        if message.metadata.message_type == roster.ROLL_CALL:
            held = {name: value for name, value in config.items() if value >= 0}
            return client_app(message, Context(1, node, held, RecordDict(), {}))
        return Message(RecordDict({"metrics": MetricRecord({"partition": self.nodes[node]})}), reply_to=message)


NODES = {7281: 2, 90210: 0, 55: 1, 4242: 3}


@pytest.fixture(autouse=True)
def identity():
    kept = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 1, SUPERLINK
    yield
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = kept


def messages(*clients: int) -> list[Message]:
    return [Message(RecordDict({"config": ConfigRecord()}), dst_node_id=client, message_type="train") for client in clients]


def test_nodes_are_presented_by_their_partitions():
    assert list(Roster(FakeGrid(NODES), 4).get_node_ids()) == [0, 1, 2, 3]


def test_messages_reach_the_right_nodes_and_answers_come_in_partition_order():
    named = Roster(FakeGrid(NODES), 4)
    named.get_node_ids()
    answers = list(named.send_and_receive(iter(messages(3, 0, 2))))
    assert [answer.metadata.src_node_id for answer in answers] == [0, 2, 3]
    assert [metrics_of(answer.content)["partition"] for answer in answers] == [0, 2, 3]


def test_each_node_is_asked_once_however_many_rounds_there_are():
    grid = FakeGrid(NODES)
    named = Roster(grid, 4)
    for _ in range(5):
        list(named.send_and_receive(messages(*named.get_node_ids())))
    assert sum(kind == roster.ROLL_CALL for kind, _ in grid.asked) == 4


def test_an_answer_is_yielded_as_soon_as_those_before_it_have_come():
    grid = FakeGrid(NODES)
    named = Roster(grid, 4)
    named.get_node_ids()
    grid.pulls = 0
    answers = named.send_and_receive(messages(3, 2, 1, 0))  # the fake answers 0 first
    assert next(answers).metadata.src_node_id == 0
    assert grid.pulls == 1


def test_the_error_of_a_dead_node_bears_its_clients_name():
    grid = FakeGrid(NODES)
    named = Roster(grid, 4)
    named.get_node_ids()
    grid.dead = {55}
    answers = list(named.send_and_receive(messages(0, 1, 2, 3)))
    assert [answer.metadata.src_node_id for answer in answers] == [0, 1, 2, 3]
    assert [answer.has_error() for answer in answers] == [False, True, False, False]
    assert answers[1].error.reason == "Node Unavailable"


def test_a_node_that_left_is_an_error_reply_and_does_not_stop_the_round():
    grid = FakeGrid(NODES)
    named = Roster(grid, 4)
    named.get_node_ids()
    del grid.nodes[55]
    for _ in range(2):  # between two phases of a round; and in the next round, when it is known to have left
        answers = list(named.send_and_receive(messages(0, 1, 2, 3)))
        assert [(answer.metadata.src_node_id, answer.has_error()) for answer in answers] == [(0, False), (1, True), (2, False), (3, False)]
        assert answers[1].error.reason == "its node is not connected"
        assert list(named.get_node_ids()) == [0, 1, 2, 3]


def test_a_silo_that_comes_back_under_another_id_takes_its_place():
    grid = FakeGrid(NODES)
    named = Roster(grid, 4)
    named.get_node_ids()
    del grid.nodes[55]
    grid.nodes[99] = 1
    named.get_node_ids()
    [answer] = named.send_and_receive(messages(1))
    assert metrics_of(answer.content) == {"partition": 1}
    assert grid.asked[-1] == ("train", 99)


@pytest.mark.parametrize("partition", [1, 7])
def test_a_latecomer_that_is_set_up_wrongly_stops_nobody(partition, caplog):
    grid = FakeGrid(NODES)
    named = Roster(grid, 4, seconds=0.1, least=4)
    named.get_node_ids()
    grid.nodes[99] = partition  # which another node holds, or nobody can hold
    named.get_node_ids()
    answers = list(named.send_and_receive(messages(0, 1, 2, 3)))
    assert [metrics_of(answer.content)["partition"] for answer in answers] == [0, 1, 2, 3]


def test_a_run_begins_without_those_who_do_not_come_if_enough_do(caplog):
    grid = FakeGrid({7281: 2, 90210: 0}, partitions=4)
    named = Roster(grid, 4, seconds=0.2, least=2)
    assert list(named.get_node_ids()) == [0, 1, 2, 3]
    assert "2 of 4 clients came within 0.2 seconds, those of the partitions 1, 3 did not" in caplog.text
    assert [answer.has_error() for answer in named.send_and_receive(messages(0, 1, 2, 3))] == [False, True, False, True]


def test_a_round_waits_until_enough_are_back(monkeypatch):
    grid = FakeGrid(NODES)
    named = Roster(grid, 4, least=3)
    named.get_node_ids()
    gone = {node: grid.nodes.pop(node) for node in (55, 4242)}
    looks = itertools.count()
    monkeypatch.setattr(grid, "get_node_ids", lambda: list(grid.nodes | (gone if next(looks) >= 3 else {})))
    named.get_node_ids()
    assert next(looks) > 3


def test_a_node_that_was_dead_at_the_start_is_asked_again():
    grid = FakeGrid(NODES)
    grid.dead = {55}
    named = Roster(grid, 4)
    named.get_node_ids()
    assert [answer.has_error() for answer in named.send_and_receive(messages(0, 1))] == [False, True]
    grid.dead = set()
    named.get_node_ids()
    assert [answer.has_error() for answer in named.send_and_receive(messages(0, 1))] == [False, False]


def test_who_misses_the_deadline_is_an_error_and_its_answer_is_not_taken_for_a_later_one(monkeypatch):
    grid = FakeGrid(NODES)
    named = Roster(grid, 4, deadline=0.1)
    named.get_node_ids()
    slow = grid.pull_messages
    monkeypatch.setattr(grid, "pull_messages", lambda ids: [])
    first = list(named.send_and_receive(messages(0, 1)))
    assert [(answer.metadata.src_node_id, answer.error.reason) for answer in first] == [
        (0, "no answer in time"),
        (1, "no answer in time"),
    ]
    assert [message.metadata.ttl for message in grid.waiting] == [0.1, 0.1]
    monkeypatch.setattr(grid, "pull_messages", slow)
    [answer] = named.send_and_receive(messages(1))
    assert not answer.has_error()
    assert len(grid.waiting) == 2  # those of the first exchange, which nobody asks for any more


def test_an_exception_is_told_in_the_words_of_all_engines():
    class Raising(FakeGrid):
        def answer(self, message):
            if message.metadata.message_type == roster.ROLL_CALL:
                return super().answer(message)
            return Message(Error(2, f"<class 'fedvision.errors.DataError'>:<'{'no picture ' * 100}'>"), reply_to=message)

    named = Roster(Raising(NODES), 4)
    named.get_node_ids()
    [answer] = named.send_and_receive(messages(2))
    assert answer.error.reason.startswith("DataError: no picture no picture")
    assert len(answer.error.reason) < 600


@pytest.mark.parametrize(("config", "keeps"), [({"state": "/state"}, True), ({}, False)])
def test_whether_nodes_keep_what_clients_keep_is_known(config, keeps):
    class Keeping(FakeGrid):
        def answer(self, message):
            node = message.metadata.dst_node_id
            return client_app(message, Context(1, node, {"partition-id": self.nodes[node], **config}, RecordDict(), {}))

    assert Roster(Keeping(NODES), 4).keeps is keeps


def test_answers_that_do_not_come_in_time_are_left_out(monkeypatch):
    grid = FakeGrid(NODES)
    named = Roster(grid, 4)
    named.get_node_ids()
    monkeypatch.setattr(grid, "pull_messages", lambda ids: [])
    began = time.monotonic()
    assert list(named.send_and_receive(messages(0, 1), timeout=0.1)) == []
    assert time.monotonic() - began < 5


def test_pushed_messages_are_pulled_under_their_clients_names():
    named = Roster(FakeGrid(NODES), 4)
    named.get_node_ids()
    ids = list(named.push_messages(messages(2, 1)))
    pulled = [reply for _ in ids for reply in named.pull_messages(ids)]
    assert [reply.metadata.src_node_id for reply in pulled] == [1, 2]


def test_missing_nodes_are_counted_and_named():
    grid = FakeGrid({7281: 2, 90210: 0}, partitions=4)
    with pytest.raises(EngineError, match=r"2 of 4 clients came within 0\.2 seconds, those of the partitions 1, 3 did not"):
        Roster(grid, 4, seconds=0.2, least=3).get_node_ids()
    assert len(grid.asked) == 2


def test_a_simulation_of_another_size_is_refused_at_once():
    with pytest.raises(EngineError, match=r"the federation has 2 nodes, the experiment has 5 clients.*num-supernodes=5"):
        Roster(FakeGrid({11: 0, 12: 1}), 5).get_node_ids()


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ({11: 0, 12: 0}, r"nodes 11 and 12 both hold partition 0"),
        ({11: 0, 12: 7}, r"node 12 holds partition 7; start it with --node-config 'partition-id=N', N from 0 to 1"),
        ({11: 0, 12: -1}, r"node 12 holds no partition"),
    ],
)
def test_nodes_that_are_set_up_wrongly_are_named(nodes, said):
    with pytest.raises(EngineError, match=said):
        Roster(FakeGrid(nodes), 2).get_node_ids()


def test_nodes_that_fail_the_roll_call_stop_the_start_if_too_few_are_left():
    grid = FakeGrid(NODES)
    grid.dead = {4242}
    with pytest.raises(EngineError, match="node 4242 did not say which partition it holds: Node Unavailable"):
        Roster(grid, 4, least=4).get_node_ids()


def test_what_clients_kept_elsewhere_is_refused():
    with pytest.raises(EngineError, match="what 2 clients keep between rounds"):
        Roster(FakeGrid(NODES), 4).load_client_states({0: RecordDict(), 1: RecordDict()})


def test_the_rest_is_passed_on():
    grid = FakeGrid(NODES)
    named = Roster(grid, 4)
    named.set_run(Run.create_empty(5))
    assert named.run.run_id == grid.its_run.run_id == 5
    assert named.create_message(RecordDict({"config": ConfigRecord()}), "train", 3, "g").metadata.dst_node_id == 3


# ---- what is lost on the way ----------------------------------------------------------------------------------------


class Silos(FakeGrid):
    """Real silos, which keep what clients keep, take one message after the other, and may lose some.

    Attributes:
        lost: how many more messages of training, or answers to them, to lose at each node.
        busy: how many more looks the first message of a node takes.
    """

    def __init__(self, nodes, lost=None, busy=None):
        super().__init__(nodes)
        self.lost, self.busy = lost or {}, busy or {}

    def pull_messages(self, message_ids):
        self.pulls += 1
        first = {message.metadata.dst_node_id: message for message in reversed(self.waiting)}
        replies = []
        for node, message in first.items():
            if self.busy.get(node, 0):
                self.busy[node] -= 1
                continue
            self.waiting.remove(message)
            if message.metadata.message_type == "train" and self.lost.get(node, 0):
                self.lost[node] -= 1
                continue
            replies.append(self.answer(message))
        return replies

    def answer(self, message):
        node = message.metadata.dst_node_id
        if message.metadata.message_type == roster.ROLL_CALL:
            return client_app(message, Context(1, node, {"partition-id": self.nodes[node], "state": "/state"}, RecordDict(), {}))
        return super().answer(message)

    def trained(self, node):
        return self.asked.count(("train", node))


@pytest.mark.parametrize("times", [1, 2])
def test_a_message_or_an_answer_that_is_lost_is_sent_again(times, monkeypatch, caplog):
    monkeypatch.setattr(exchange, "SILENT_SECONDS", 0.02)
    grid = Silos(NODES, lost={55: times})
    named = Roster(grid, 4)
    named.get_node_ids()
    answers = list(named.send_and_receive(messages(0, 1, 2, 3)))
    assert [metrics_of(answer.content)["partition"] for answer in answers] == [0, 1, 2, 3]
    assert (grid.trained(55), grid.trained(7281)) == (1 + times, 1)
    assert caplog.text.count("client 1: its node is not at work, and has not answered") == times


def test_a_node_that_is_at_work_is_asked_once_however_long_it_takes(monkeypatch):
    monkeypatch.setattr(exchange, "SILENT_SECONDS", 0.02)
    grid = Silos(NODES, busy={55: 12})
    named = Roster(grid, 4)
    monkeypatch.setattr(roster, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(named, "_keeping", {0, 1, 2, 3})
    monkeypatch.setattr(named, "_nodes", {partition: node for node, partition in NODES.items()})
    answers = list(named.send_and_receive(messages(0, 1, 2, 3)))
    assert not any(answer.has_error() for answer in answers)
    assert grid.trained(55) == 1 and (roster.ROLL_CALL, 55) in grid.asked


def test_a_node_that_keeps_nothing_on_disk_is_never_asked_twice(monkeypatch):
    monkeypatch.setattr(exchange, "SILENT_SECONDS", 0.02)
    grid = Silos(NODES, lost={55: 1})
    named = Roster(grid, 4, deadline=0.3)
    monkeypatch.setattr(named, "_nodes", {partition: node for node, partition in NODES.items()})
    answers = list(named.send_and_receive(messages(1)))
    assert answers[0].error.reason == "no answer in time"
    assert grid.asked == [("train", 55)]


def test_the_deadline_holds_for_what_is_sent_again_too(monkeypatch):
    monkeypatch.setattr(exchange, "SILENT_SECONDS", 0.05)
    grid = Silos(NODES, lost={55: 100})
    named = Roster(grid, 4, deadline=0.5)
    named.get_node_ids()
    [answer] = named.send_and_receive(messages(1))
    assert answer.error.reason == "no answer in time"
    assert 2 <= grid.trained(55) < 12


# ---- versions -------------------------------------------------------------------------------------------------------


def test_a_node_with_other_versions_is_refused():
    class Behind(FakeGrid):
        def answer(self, message):
            reply = super().answer(message)
            if message.metadata.dst_node_id == 55:
                reply.content["config"]["versions"] = "flwr 1.38.0, torch 2.11.0"
            return reply

    with pytest.raises(EngineError, match=r"node 55 has flwr 1\.38\.0, torch 2\.11\.0, the coordinator has flwr .*; install the same"):
        Roster(Behind(NODES), 4).get_node_ids()
    assert "+" not in roster.versions()
