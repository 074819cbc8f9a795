import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedvision.arrays import pack, unpack
from strategies.geometric import Geometric


def direction(strategy: Geometric, grid, *gradients: list[float], examples: tuple[int, ...] = (1, 1, 1, 1)) -> list[float]:
    """What a server of plain SGD with lr 1 subtracts from the model when clients answer these gradients."""
    zeros = {"w": torch.zeros(len(gradients[0]))}
    messages = list(strategy.configure_train(1, pack(zeros), ConfigRecord(), grid))
    answers = [
        Message(RecordDict({"gradient": pack({"w": torch.tensor(g)}), "metrics": MetricRecord({"num-examples": n})}), reply_to=message)
        for message, g, n in zip(messages, gradients, examples, strict=False)
    ]
    return (-unpack(strategy.aggregate_train(1, answers)[0])["w"]).tolist()


def strategy(**settings) -> Geometric:
    return Geometric(server_optimizer={"name": "SGD", "lr": 1.0}, **settings)


def test_equal_signs_give_the_geometric_mean(grid):
    assert direction(strategy(), grid, [2.0, -1.0], [8.0, -9.0]) == pytest.approx([4.0, -3.0], rel=1e-5)


def test_unequal_signs_are_weighted_by_how_many_clients_have_them(grid):
    # three agree on a geometric mean of 4, one says -1: 3/4 * 4 - 1/4 * 1
    assert direction(strategy(), grid, [2.0], [8.0], [4.0], [-1.0]) == pytest.approx([2.75], rel=1e-5)


def test_clients_may_count_by_their_examples(grid):
    # exp((3 ln 16 + 1 ln 1) / 4) = 8
    assert direction(strategy(weight_by="examples"), grid, [16.0], [1.0], examples=(3, 1)) == pytest.approx([8.0], rel=1e-5)


def test_coordinates_on_which_clients_disagree_do_not_move(grid):
    gradients = [2.0, 2.0, 2.0], [8.0, 8.0, -8.0], [4.0, -1.0, -4.0], [4.0, -1.0, -4.0]
    masked = direction(strategy(agreement_threshold=0.5), grid, *gradients)
    free = direction(strategy(), grid, *gradients)
    assert masked[1] == 0 and free[1] != 0.0
    assert masked[0] == free[0] and masked[2] == free[2] != 0
    assert direction(strategy(agreement_threshold=0.75), grid, *gradients)[1:] == [0.0, 0.0]


def test_a_client_that_found_nothing_holds_the_others_back(grid):
    # an exact zero is a client on the negative side, at the floor of 1e-10
    [together] = direction(strategy(), grid, [1.0], [0.0])
    assert together == pytest.approx(0.5, rel=1e-4)
