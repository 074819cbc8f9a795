from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.runs import run
from fedvision.arrays import pack
from fedvision.behavior import Behavior
from fedvision.data import FederatedData
from fedvision.errors import AggregationError, ExperimentError
from fedvision.experiment import Experiment
from fedvision.grids.in_process import InProcessGrid
from server.clock import ClockedGrid
from strategies.strategy import Update, reply

WORK = [100, 200, 400, 800]
"""Examples that each client pushes through its model."""


def working_app(asked: list[int]) -> ClientApp:
    """Clients that answer with 250 float32; client 3 fails in round 9."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        asked.append(client)
        if client == 3 and message.content["config"]["server-round"] == 9:
            raise ValueError("broken")
        update = Update({"gradient": {"w": torch.zeros(250)}}, {"train_loss": 1.0})
        return reply(message, update, 10, WORK[client])

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    return app


def messages(kind: str = "train", server_round: int = 1) -> list[Message]:
    content = RecordDict({"arrays": pack({"w": torch.zeros(500)}), "config": ConfigRecord({"server-round": server_round})})
    return [Message(content, dst_node_id=node, message_type=kind) for node in range(4)]


def exchange(behavior: Behavior, kind: str = "train", server_round: int = 1, seed: int = 0) -> tuple[list[int], ClockedGrid, list[int]]:
    asked: list[int] = []
    with InProcessGrid(working_app(asked), {}, 4) as grid:
        clocked = ClockedGrid(grid, behavior, seed)
        answered = [answer.metadata.src_node_id for answer in clocked.send_and_receive(messages(kind, server_round))]
    return answered, clocked, asked


def test_an_exchange_takes_as_long_as_its_slowest_client():
    answered, clock, _ = exchange(Behavior(seconds_per_example=0.01, bandwidth=1000.0, latency=0.5))
    assert answered == [0, 1, 2, 3]
    assert clock.seconds == pytest.approx(0.5 + 2000 / 1000 + 800 * 0.01 + 0.5 + 1000 / 1000)


def test_who_is_late_does_not_count_and_the_server_waits_until_the_deadline():
    answered, clock, asked = exchange(Behavior(seconds_per_example=0.01, deadline=3.0))
    assert answered == [0, 1]
    assert asked == [0, 1, 2, 3], "they worked in vain"
    assert (clock.late, clock.dropped, clock.seconds) == (2, 0, 3.0)


def test_who_drops_out_is_not_asked_and_without_a_deadline_nobody_waits_for_it():
    behavior = Behavior(seconds_per_example=0.01, dropout=0.5)
    answered, clock, asked = exchange(behavior)
    absent = [client for client in range(4) if behavior.drops_out(0, client, 1)]
    assert 0 < len(absent) < 4
    assert answered == asked == [client for client in range(4) if client not in absent]
    assert clock.dropped == len(absent)
    assert clock.seconds == pytest.approx(0.01 * max(WORK[client] for client in answered))


def test_everybody_evaluates_and_the_clock_stands_still():
    answered, clock, _ = exchange(Behavior(dropout=1.0, latency=9.0, deadline=1.0), "evaluate")
    assert answered == [0, 1, 2, 3]
    assert (clock.seconds, clock.dropped) == (0, 0)


def test_a_client_that_fails_is_still_told():
    answered, clock, _ = exchange(Behavior(seconds_per_example=0.01, deadline=5.0), server_round=9)
    assert answered == [0, 1, 2, 3]
    assert clock.seconds == pytest.approx(4.0)


def test_a_round_of_two_exchanges_takes_their_sum():
    with InProcessGrid(working_app([]), {}, 4) as grid:
        clock = ClockedGrid(grid, Behavior(seconds_per_example=0.01), 0)
        for _ in range(2):
            list(clock.send_and_receive(messages()))
        assert clock.seconds == pytest.approx(16.0)
        clock.reset()
        assert clock.seconds == 0


# ---- the distributions ----------------------------------------------------------------------------------------------


def test_slowdowns_are_lognormal_around_one_and_belong_to_the_client():
    behavior = Behavior(slowdown_spread=0.5)
    logarithms = np.log([behavior.slowdown(7, client, 1) for client in range(4000)])
    assert np.mean(logarithms) == pytest.approx(0, abs=0.03)
    assert np.std(logarithms) == pytest.approx(0.5, abs=0.02)
    assert behavior.slowdown(7, 3, 1) == behavior.slowdown(7, 3, 2) != behavior.slowdown(8, 3, 1)


def test_a_share_of_the_clients_is_slower_by_a_factor():
    slow = [Behavior(slow_fraction=0.25, slow_factor=6.0).slowdown(0, client, 1) for client in range(2000)]
    assert set(slow) == {1.0, 6.0}
    assert slow.count(6.0) / 2000 == pytest.approx(0.25, abs=0.03)


def test_jitter_varies_a_client_between_rounds():
    factors = [Behavior(jitter=0.3).slowdown(0, 5, server_round) for server_round in range(2000)]
    assert np.std(np.log(factors)) == pytest.approx(0.3, abs=0.02)


def test_clients_drop_out_as_often_as_they_should():
    drops = [Behavior(dropout=0.2).drops_out(0, client, server_round) for client in range(50) for server_round in range(50)]
    assert np.mean(drops) == pytest.approx(0.2, abs=0.03)


# ---- whole runs -----------------------------------------------------------------------------------------------------

STORMY = {"dropout": 0.3, "seconds_per_example": 0.1, "slowdown_spread": 0.5, "deadline": 3.0}


def test_a_run_records_the_clock_and_repeats_itself(
    federated: FederatedData, experiment: Callable[..., Experiment], tmp_path: Path, no_figures: None
):
    whole = experiment(rounds=8, strategy={"name": "fedavg", "batch_size": 4}, behavior=STORMY)
    first, second = (run(whole, data=federated, out=tmp_path / name).rounds.drop(columns="seconds") for name in "ab")
    assert first.equals(second)
    trained = first.iloc[1:]
    assert (trained["clients"] + trained["dropped"] + trained["late"] == 3).all()
    assert trained["dropped"].sum() > 0
    assert (trained["failures"] == 0).all()
    assert (trained["simulated_seconds"] <= 3).all()
    assert (trained["simulated_seconds"] > 0).all()


def test_clients_that_train_together_take_as_long_as_one_by_one(
    federated: FederatedData, experiment: Callable[..., Experiment], tmp_path: Path, no_figures: None
):
    whole = experiment(strategy={"name": "fedavg", "batch_size": 5, "epochs": 2}, behavior=STORMY)
    alone = run(whole, data=federated, out=tmp_path / "alone").rounds
    together = run(whole, {"engine.batch_clients": 3}, data=federated, out=tmp_path / "together").rounds
    assert alone["simulated_seconds"].equals(together["simulated_seconds"])


def test_a_round_in_which_nobody_is_in_time_leaves_the_model_as_it_is(
    federated: FederatedData, experiment: Callable[..., Experiment], tmp_path: Path, no_figures: None
):
    whole = experiment(rounds=2, strategy={"name": "fishr"}, behavior={"deadline": 1e-6})
    rounds = run(whole, data=federated, out=tmp_path / "run").rounds
    assert rounds["clients"].tolist() == [0, 0, 0]
    assert rounds["late"].tolist()[1:] == [3, 3]
    assert rounds["test_loss"].nunique() == 1


def test_an_answer_that_cannot_be_combined_is_no_matter_of_being_late(
    federated: FederatedData,
    experiment: Callable[..., Experiment],
    tmp_path: Path,
    no_figures: None,
    monkeypatch: pytest.MonkeyPatch,
):
    def broken(*arguments: object) -> None:
        raise AggregationError("arrays do not fit together")

    monkeypatch.setattr("strategies.fedavg.FedAvg.server_update", broken)
    always_one = {"seconds_per_example": 0.1, "deadline": 1.3}  # of clients with 8, 12 and 16 examples
    whole = experiment(rounds=2, strategy={"name": "fedavg", "batch_size": 4}, behavior=always_one)
    with pytest.raises(AggregationError, match="do not fit together"):
        run(whole, data=federated, out=tmp_path / "run")


def test_without_the_excuse_of_a_behavior_too_few_answers_stop_a_run(
    federated: FederatedData, experiment: Callable[..., Experiment], tmp_path: Path, no_figures: None
):
    whole = experiment(strategy={"name": "fedavg", "min_clients": 4}, behavior={"dropout": 0.0})
    with pytest.raises(AggregationError, match="3 clients are connected"):
        run(whole, data=federated, out=tmp_path / "run")


def test_behavior_is_part_of_the_experiment(experiment: Callable[..., Experiment]):
    plain, stormy = experiment(), experiment(behavior=STORMY)
    assert plain.fingerprint != stormy.fingerprint
    assert Experiment.parse(stormy.to_toml()) == stormy
    assert "behavior" not in plain.to_toml()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"droput": 0.1}, "behavior.droput: Behavior has no such setting; did you mean 'dropout'"),
        ({"dropout": 1.5}, "behavior.dropout = 1.5: expected number >= 0 and <= 1"),
        ({"deadline": 0}, "behavior.deadline = 0: expected number > 0"),
        (3, r"behavior: expected a table, as \[behavior\] dropout = 0.1; got 3"),
    ],
)
def test_a_wrong_behavior_is_refused(table: object, message: str, experiment: Callable[..., Experiment]):
    with pytest.raises(ExperimentError, match=message):
        experiment(behavior=table)
