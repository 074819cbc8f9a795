import torch
from torch import nn

from fedvision.ema import Averaged, warmed_up


def network() -> nn.Module:
    torch.nn.init.ones_((made := nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))[0].weight)
    return made


def test_the_average_moves_towards_the_network_and_is_not_trained():
    both = Averaged(network())
    assert not any(param.requires_grad for param in both.average.parameters())
    with torch.no_grad():
        both.network[0].weight.fill_(3.0)
    both.follow(0.75)
    assert both.average[0].weight.eq(1.5).all() and both.network[0].weight.eq(3.0).all()
    both.begin()
    assert both.average[0].weight.eq(3.0).all()


def test_buffers_are_copied_or_averaged_and_counts_are_copied():
    for buffers, mean in (("copied", 4.0), ("averaged", 1.0)):
        both = Averaged(network())
        both.network[1].running_mean.fill_(4.0)
        both.network[1].num_batches_tracked.fill_(7)
        both.follow(0.75, buffers)
        assert both.average[1].running_mean.eq(mean).all() and both.average[1].num_batches_tracked == 7


def test_calling_it_is_calling_the_network():
    both, x = Averaged(nn.Linear(2, 1)), torch.ones(1, 2)
    assert torch.equal(both(x), both.network(x))


def test_a_warm_up_ends_at_the_decay():
    assert warmed_up(0.99, 0) == 0.1 and warmed_up(0.99, 10_000) == 0.99
