import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedvision.arrays import pack, unpack
from fedvision.errors import AggregationError
from fedvision.grids.in_process import InProcessGrid
from strategies.means import ArithmeticMean
from strategies.strategy import Failure, Inspection, Strategy, Update, WeightedMeans

MODEL = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(0.5), "steps": torch.tensor(3)}


@dataclass(kw_only=True)
class Mean(Strategy):
    """The mean of the clients' models; the clients are written by hand."""

    def client_update(self, silo, content):
        return Update({})

    def accumulators(self):
        return {"arrays": ArithmeticMean()}

    def server_update(self, arrays, aggregates):
        return aggregates["arrays"]


def answer(message: Message, arrays: dict, examples: float = 1, **metrics) -> Message:
    numbers = MetricRecord({"num-examples": examples, "train_loss": 1.0, **metrics})
    return Message(RecordDict({"arrays": pack(arrays), "metrics": numbers}), reply_to=message)


def shifted(by: float) -> dict:
    return {name: tensor + by if tensor.is_floating_point() else tensor + int(by) for name, tensor in MODEL.items()}


def started(strategy: Strategy, grid: InProcessGrid, number: int = 1) -> list[Message]:
    return list(strategy.configure_train(number, pack(MODEL), ConfigRecord(), grid))


def finished(strategy: Strategy, answers: Iterable[Message]) -> dict[str, torch.Tensor]:
    return unpack(strategy.aggregate_train(1, answers)[0])


# ---- cohorts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clients", "fraction", "least", "expected"),
    [
        (10, 1.0, 1, 10),
        (10, 0.5, 1, 5),
        (10, 0.01, 1, 1),
        (10, 0.24, 1, 2),
        (10, 0.1, 4, 4),
        (3, 0.5, 1, 2),
        (1, 0.1, 1, 1),
        (1000, 0.013, 1, 13),
    ],
)
def test_a_cohort_has_the_rounded_fraction_but_at_least_min_clients(clients, fraction, least, expected):
    strategy = Mean(fraction=fraction, min_clients=least)
    with InProcessGrid(ClientApp(), {}, clients) as grid:
        nodes = [message.metadata.dst_node_id for message in started(strategy, grid)]
    assert len(nodes) == len(set(nodes)) == expected
    assert nodes == sorted(nodes) == strategy.cohort


def test_cohorts_are_drawn_from_the_seed_and_the_round_alone(grid):
    def cohorts(seed: int) -> list[list[int]]:
        return [[m.metadata.dst_node_id for m in started(Mean(fraction=0.5, seed=seed), grid, number)] for number in range(1, 9)]

    assert cohorts(0) == cohorts(0)
    assert cohorts(0) != cohorts(1)
    assert len({tuple(cohort) for cohort in cohorts(0)}) > 1


def test_every_client_is_drawn_about_equally_often():
    counts = np.zeros(10)
    with InProcessGrid(ClientApp(), {}, 10) as grid:
        for number in range(1, 401):
            for message in started(Mean(fraction=0.3), grid, number):
                counts[message.metadata.dst_node_id] += 1
    # 400 rounds x 3 of 10: 120 each, with a standard deviation of about 9
    assert counts.sum() == 1200
    assert counts.min() > 80 and counts.max() < 160


def test_cohorts_do_not_depend_on_the_order_in_which_a_grid_lists_its_nodes(grid, monkeypatch):
    listed = [m.metadata.dst_node_id for m in started(Mean(fraction=0.5), grid)]
    monkeypatch.setattr(grid, "get_node_ids", lambda: [3, 1, 0, 2])
    assert [m.metadata.dst_node_id for m in started(Mean(fraction=0.5), grid)] == listed
    assert [m.metadata.dst_node_id for m in started(Mean(), grid)] == [0, 1, 2, 3]


def test_too_few_connected_clients_are_refused_before_anything_is_sent(grid):
    with pytest.raises(AggregationError, match=r"4 clients are connected, strategy.min_clients = 5; lower it or add clients"):
        started(Mean(min_clients=5), grid)


def test_evaluation_draws_a_cohort_of_its_own(grid):
    def evaluators(strategy: Strategy, number: int) -> list[int]:
        return [m.metadata.dst_node_id for m in strategy.configure_evaluate(number, pack(MODEL), ConfigRecord(), grid)]

    assert len(evaluators(Mean(fraction=0.5), 1)) == 2
    assert len(evaluators(Mean(fraction=0.5, fraction_evaluate=1.0), 1)) == 4
    strategy = Mean(fraction=0.5)
    trainers = [[m.metadata.dst_node_id for m in started(strategy, grid, number)] for number in range(1, 7)]
    assert [evaluators(strategy, number) for number in range(1, 7)] != trainers


def test_messages_carry_the_arrays_the_round_and_what_the_caller_configures(grid):
    message = next(iter(Mean().configure_train(7, pack(MODEL), ConfigRecord({"progress": 0.25}), grid)))
    assert dict(message.content["config"]) == {"progress": 0.25, "server-round": 7}
    assert unpack(message.content["arrays"])["w"].data_ptr() == MODEL["w"].data_ptr()
    assert message.metadata.message_type == "train"


# ---- aggregation ----------------------------------------------------------------------------------------------------


def test_clients_count_equally_or_by_examples(grid):
    def aggregated(weight_by: str) -> dict[str, torch.Tensor]:
        strategy = Mean(weight_by=weight_by)
        first, second, *_ = started(strategy, grid)
        return finished(strategy, [answer(first, shifted(0), 30), answer(second, shifted(4), 10)])

    assert aggregated("clients")["w"].tolist() == [3.0, 4.0]
    assert aggregated("examples")["w"].tolist() == [2.0, 3.0]
    assert aggregated("examples")["steps"] == 4 and aggregated("examples")["steps"].dtype == torch.int64


def test_metrics_are_averaged_as_the_arrays_are_and_examples_summed(grid):
    strategy = Mean(weight_by="examples")
    first, second, *_ = started(strategy, grid)
    _, metrics = strategy.aggregate_train(1, [answer(first, MODEL, 30, extra=1.0), answer(second, MODEL, 10, extra=5.0)])
    assert dict(metrics) == {"num-examples": 40, "train_loss": 1.0, "extra": 2.0}


def test_a_metric_that_only_some_clients_report_is_the_mean_of_those():
    means = WeightedMeans()
    means.add({"num-examples": 3, "a": 1.0}, 3)
    means.add({"num-examples": 1, "a": 2.0, "b": 7.0}, 1)
    assert means.result() == {"num-examples": 4, "a": 1.25, "b": 7.0}


def test_clients_without_weight_do_not_divide_by_zero():
    means = WeightedMeans()
    means.add({"num-examples": 0, "a": 1.0}, 0.0)
    assert means.result() == {"num-examples": 0.0}


def test_failures_of_a_round_are_forgotten_in_the_next(grid):
    strategy = Mean()
    first, second, *_ = started(strategy, grid)
    finished(strategy, [answer(first, MODEL), Message(Error(2, "MemoryError: no memory"), reply_to=second)])
    assert strategy.failures == [Failure(1, "MemoryError: no memory")]
    assert str(strategy.failures[0]) == "client 1: MemoryError: no memory"
    started(strategy, grid, 2)
    assert strategy.failures == []


def test_an_error_without_a_reason_is_noted_by_its_code(grid):
    strategy = Mean()
    first, second, *_ = started(strategy, grid)
    finished(strategy, [answer(first, MODEL), Message(Error(7), reply_to=second)])
    assert strategy.failures == [Failure(1, "error 7")]


def test_a_client_whose_first_answer_was_refused_may_answer_again(grid):
    strategy = Mean()
    first, *_ = started(strategy, grid)
    odd = MODEL | {"w": torch.tensor([math.nan, 1.0])}
    finished(strategy, [answer(first, odd), answer(first, shifted(1))])
    assert strategy.failures == [Failure(0, "array 'w' holds NaN or infinite values")]
    assert strategy.answered == 1


def test_too_few_usable_answers_name_the_round_and_the_reasons(grid):
    strategy = Mean(min_clients=2)
    first, second, *_ = started(strategy, grid)
    answers = [answer(first, MODEL), Message(Error(2, "MemoryError: no memory"), reply_to=second)]
    with pytest.raises(
        AggregationError, match=r"round 1: 1 usable answers, strategy.min_clients = 2. client 1: MemoryError: no memory. Mend"
    ):
        finished(strategy, answers)


def test_a_round_without_answers_says_so(grid):
    strategy = Mean()
    started(strategy, grid)
    with pytest.raises(AggregationError, match="no client answered"):
        finished(strategy, [])


def test_evaluations_are_averaged_over_the_clients_that_evaluated_something(grid):
    strategy = Mean(weight_by="examples")
    asked = list(strategy.configure_evaluate(1, pack(MODEL), ConfigRecord(), grid))
    numbers = [{"num-examples": 3, "validation_loss": 1.0}, {"num-examples": 1, "validation_loss": 5.0}, {"num-examples": 0}]
    answers = [Message(RecordDict({"metrics": MetricRecord(n)}), reply_to=message) for n, message in zip(numbers, asked, strict=False)]
    answers.append(Message(Error(2, "lost"), reply_to=asked[3]))
    assert dict(strategy.aggregate_evaluate(1, answers)) == {"num-examples": 4, "validation_loss": 2.0}
    assert strategy.failures == [Failure(3, "lost")]


def test_a_strategy_that_asks_for_statistics_must_say_which():
    with pytest.raises(AggregationError, match="Mean asks its clients for no statistics"):
        Mean().client_statistics(None, RecordDict())


# ---- inspection -----------------------------------------------------------------------------------------------------


def content(records: dict[str, dict[str, torch.Tensor]]) -> RecordDict:
    return RecordDict({name: pack(arrays) for name, arrays in records.items()})


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ({"arrays": MODEL}, None),
        ({"arrays": MODEL, "buffers": {"steps": torch.tensor(4)}}, None),
        ({}, "the answer has the records [], expected ['arrays']"),
        ({"gradient": MODEL}, "the answer has the records ['gradient'], expected ['arrays']"),
        ({"arrays": MODEL, "more": MODEL}, "the answer has the records ['arrays', 'more'], expected ['arrays']"),
        ({"arrays": MODEL | {"w": torch.zeros(3)}}, "array 'w' is float32 [3], expected float32 [2]"),
        ({"arrays": MODEL | {"w": torch.zeros(2, 1)}}, "array 'w' is float32 [2, 1], expected float32 [2]"),
        ({"arrays": MODEL | {"b": torch.zeros(1)}}, "array 'b' is float32 [1], expected float32 []"),
        ({"arrays": MODEL | {"w": torch.zeros(2, dtype=torch.float64)}}, "array 'w' is float64 [2], expected float32 [2]"),
        ({"arrays": MODEL | {"steps": torch.tensor(3.0)}}, "array 'steps' is float32 [], expected int64 []"),
        ({"arrays": {"w": MODEL["w"]}}, "array 'b' is missing, expected float32 []"),
        ({"arrays": MODEL | {"intruder": torch.zeros(1)}}, "array 'intruder' is not an array of the model"),
        ({"arrays": MODEL | {"w": torch.tensor([math.inf, 0])}}, "array 'w' holds NaN or infinite values"),
        ({"arrays": MODEL | {"b": torch.tensor(math.nan)}}, "array 'b' holds NaN or infinite values"),
        ({"arrays": MODEL, "buffers": {"b": torch.tensor(math.nan)}}, "array 'b' holds NaN or infinite values"),
    ],
)
def test_an_answer_is_refused_for_a_reason(records, reason):
    assert Inspection(MODEL, frozenset({"arrays"})).fault(content(records)) == reason


def test_the_first_good_answer_fixes_what_the_model_does_not():
    inspection = Inspection(MODEL, frozenset({"gradient", "own"}))
    gradient = {"w": torch.zeros(2)}
    assert inspection.fault(content({"gradient": gradient, "own": {"x": torch.tensor([math.nan])}})) is not None
    assert inspection.fault(content({"gradient": gradient, "own": {"x": torch.zeros(4)}})) is None
    assert (
        inspection.fault(content({"gradient": gradient, "own": {"x": torch.zeros(5)}})) == "array 'x' is float32 [5], expected float32 [4]"
    )
    assert inspection.fault(content({"gradient": gradient, "own": {}})) == "array 'x' is missing, expected float32 [4]"
    assert "'b' is float32 [], expected none" in inspection.fault(
        content({"gradient": {**gradient, "b": MODEL["b"]}, "own": {"x": torch.zeros(4)}})
    )
    assert inspection.fault(content({"gradient": gradient, "own": {"x": torch.ones(4)}})) is None


def test_bytes_that_are_no_array_are_refused():
    def record(data: bytes, dtype: str = "float32") -> RecordDict:
        return RecordDict({"arrays": ArrayRecord({"w": Array(dtype, (2,), "numpy.ndarray", data)})})

    for data in (b"", b"rubbish", b"PK\x03\x04rubbish", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'", pack(MODEL)["w"].data[:-3]):
        assert "cannot be read" in Inspection(MODEL, frozenset({"arrays"})).fault(record(data))


def test_what_an_array_claims_to_be_does_not_count():
    record = pack(MODEL)
    record["w"] = Array("float32", (2,), "numpy.ndarray", pack({"x": torch.zeros(7)})["x"].data)
    fault = Inspection(MODEL, frozenset({"arrays"})).fault(RecordDict({"arrays": record}))
    assert fault == "array 'w' is float32 [7], expected float32 [2]"
