import weakref
from collections.abc import Callable

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from fedvision.arrays import pack
from fedvision.grids.in_process import InProcessGrid
from server.meter import MeteredGrid
from strategies.fedsgd import FedSGD


def counting_app(seen: list) -> ClientApp:
    """A client that notes its partition and counts how often it was asked; partition 2 fails."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = context.node_config["partition-id"]
        seen.append(client)
        times = int(context.state["memory"]["times"]) + 1 if "memory" in context.state else 1
        context.state["memory"] = MetricRecord({"times": times})
        if client == 2:
            raise MemoryError("out of memory")
        return Message(RecordDict({"metrics": MetricRecord({"client": client, "times": times})}), reply_to=message)

    return app


def messages(*nodes: int) -> list[Message]:
    return [Message(RecordDict({"config": ConfigRecord()}), dst_node_id=node, message_type="train") for node in nodes]


def test_answers_come_in_partition_order_whatever_the_order_of_the_messages():
    with InProcessGrid(counting_app([]), {}, 5) as grid:
        answers = list(grid.send_and_receive(messages(4, 0, 3, 1)))
    assert [answer.metadata.src_node_id for answer in answers] == [0, 1, 3, 4]
    assert [answer.content["metrics"]["client"] for answer in answers] == [0, 1, 3, 4]


def test_a_client_runs_only_when_its_answer_is_asked_for():
    seen: list[int] = []
    with InProcessGrid(counting_app(seen), {}, 5) as grid:
        answers = grid.send_and_receive(messages(0, 1, 3))
        assert seen == []
        next(answers)
        assert seen == [0]


def test_a_client_that_raises_is_an_error_reply_and_the_others_go_on():
    with InProcessGrid(counting_app([]), {}, 5) as grid:
        answers = list(grid.send_and_receive(messages(1, 2, 3)))
    assert [answer.has_error() for answer in answers] == [False, True, False]
    assert answers[1].error.reason == "MemoryError: out of memory"
    assert answers[1].metadata.src_node_id == 2


def test_clients_keep_their_state_between_messages_and_across_grids():
    with InProcessGrid(counting_app([]), {}, 5) as grid:
        list(grid.send_and_receive(messages(0, 1)))
        answers = list(grid.send_and_receive(messages(1)))
        states = grid.client_states()
    assert answers[0].content["metrics"]["times"] == 2
    assert {client: state["memory"]["times"] for client, state in states.items()} == {0: 1, 1: 2}
    with InProcessGrid(counting_app([]), {}, 5) as grid:
        grid.load_client_states(states)
        answers = list(grid.send_and_receive(messages(1)))
    assert answers[0].content["metrics"]["times"] == 3


def test_pushed_messages_are_answered_at_once_and_pulled_once():
    seen: list[int] = []
    with InProcessGrid(counting_app(seen), {}, 5) as grid:
        ids = list(grid.push_messages(messages(3, 1)))
        assert seen == [1, 3]
        pulled = list(grid.pull_messages(ids))
        assert [answer.metadata.reply_to_message_id for answer in pulled] == ids
        assert list(grid.pull_messages(ids)) == []


def test_messages_are_pushed_even_if_nobody_looks_at_their_ids():
    seen: list[int] = []
    with InProcessGrid(counting_app(seen), {}, 5) as grid:
        grid.push_messages(messages(0))
    assert seen == [0]


def test_nodes_are_the_partitions():
    assert list(InProcessGrid(ClientApp(), {}, 3).get_node_ids()) == [0, 1, 2]


def test_a_clients_context_names_its_partition_and_the_run():
    contexts = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        contexts.append(context)
        return Message(RecordDict(), reply_to=message)

    with InProcessGrid(app, {"run-id": 7, "experiment": "x.toml"}, 3) as grid:
        assert grid.run.run_id == 7
        list(grid.send_and_receive(messages(1)))
    assert contexts[0].node_config == {"partition-id": 1, "num-partitions": 3}
    assert contexts[0].run_config["experiment"] == "x.toml"
    assert contexts[0].run_id == 7


def test_flowers_task_identity_is_put_back():
    before = TaskIdentity._run_id
    with pytest.raises(KeyError), InProcessGrid(ClientApp(), {"run-id": 9}, 1):
        assert TaskIdentity.run_id == 9
        raise KeyError
    assert TaskIdentity._run_id == before


def test_at_most_one_answer_is_alive_at_any_time():
    # Each client looks, as it starts, for arrays of earlier answers: the server has folded and dropped them.
    alive: list[weakref.ref] = []
    found: list[int] = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        found.append(sum(ref() is not None for ref in alive))
        gradient = pack({"weight": torch.full((1000,), float(context.node_config["partition-id"]))})
        alive.append(weakref.ref(gradient["weight"]))
        metrics = MetricRecord({"num-examples": 1, "train_loss": 1.0})
        return Message(RecordDict({"gradient": gradient, "metrics": metrics}), reply_to=message)

    strategy = FedSGD(server_optimizer={"name": "SGD", "lr": 1.0})
    with InProcessGrid(app, {}, 20) as grid:
        metered = MeteredGrid(grid)
        sent = strategy.configure_train(1, pack({"weight": torch.zeros(1000)}), ConfigRecord(), metered)
        arrays, _ = strategy.aggregate_train(1, metered.send_and_receive(sent))
    assert strategy.answered == 20
    assert arrays["weight"].numpy()[0] == -9.5
    assert found == [0] * 20
    assert metered.bytes_up == 20 * 4000 == metered.bytes_down


def test_message_ids_are_unique():
    with InProcessGrid(counting_app([]), {}, 5) as grid:
        ids = [answer.metadata.reply_to_message_id for _ in range(2) for answer in grid.send_and_receive(messages(0, 1, 3))]
    assert len(set(ids)) == len(ids) == 6


class Batching(ClientApp):
    """It answers several clients at once, and notes who they were."""

    def __init__(self, seen: list) -> None:
        super().__init__()
        self.seen = seen

    def answer_together(self, messages: list[Message], contexts: list[Context]) -> list[Message]:
        self.seen.append([context.node_id for context in contexts])
        return [Message(RecordDict(), reply_to=message) for message in messages]


def batching(batch_clients: int, sent: Callable[[], list[Message]]) -> list[list[int]]:
    seen: list[list[int]] = []
    app = Batching(seen)
    app.train()(lambda message, context: seen.append([context.node_id]) or Message(RecordDict(), reply_to=message))
    app.evaluate()(lambda message, context: seen.append([context.node_id]) or Message(RecordDict(), reply_to=message))
    with InProcessGrid(app, {}, 9, batch_clients=batch_clients) as grid:
        sources = [answer.metadata.src_node_id for answer in grid.send_and_receive(sent())]
    assert sources == sorted(sources)
    return seen


def alike(*nodes: int, kind: str = "train") -> list[Message]:
    content = RecordDict({"config": ConfigRecord()})
    return [Message(content, dst_node_id=node, message_type=kind) for node in nodes]


def test_neighbors_that_are_sent_the_same_train_together():
    assert batching(3, lambda: alike(6, 0, 1, 5, 2, 4, 7)) == [[0, 1, 2], [4, 5, 6], [7]]
    assert batching(9, lambda: alike(0, 1, 2)) == [[0, 1, 2]]
    assert batching(1, lambda: alike(0, 1)) == [[0], [1]]


def test_those_that_are_sent_different_things_do_not():
    assert batching(3, lambda: alike(0, 1) + alike(2, 3)) == [[0, 1], [2, 3]]
    assert batching(3, lambda: messages(0, 1)) == [[0], [1]]


def test_only_training_is_done_together():
    assert batching(3, lambda: alike(0, 1, kind="evaluate")) == [[0], [1]]


def test_clients_train_together_only_when_an_answer_is_asked_for():
    seen: list[list[int]] = []
    with InProcessGrid(Batching(seen), {}, 9, batch_clients=2) as grid:
        answers = grid.send_and_receive(alike(0, 1, 2, 3))
        assert seen == []
        next(answers)
        assert seen == [[0, 1]]
