import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedvision.seeds import generator, global_generators
from fedvision.stepping import Descent, steps_down

SGD = {"name": "SGD", "lr": 0.1}


class Plain(nn.Sequential):
    """Linear layers, one without a bias, on inputs with two leading dimensions."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))


class Tied(nn.Module):
    """One layer called twice, one weight used by two layers, one that the loss looks at besides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.twice, self.seen = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.twice(self.twice(self.second(self.first(x))).tanh())
        return self.seen(h) * self.seen.weight.norm()


class Inner(nn.Module):
    """Differentiates within its forward pass, as a gradient penalty does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        h = self.layer(x).tanh()
        (slope,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
        return self.head(h) + slope.square().sum()


def steps(model: nn.Module, number: int = 4) -> dict[str, torch.Tensor]:
    """The parameters after steps of torch's SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=SGD["lr"])
    for batch in range(number):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return dict(model.named_parameters())


def loss(model: nn.Module, batch: int) -> torch.Tensor:
    rng = generator(0, "batch", batch)
    x = torch.rand(2, 4, 6, generator=rng, dtype=torch.float64)
    return F.cross_entropy(model(x).flatten(0, 1), torch.arange(8) % 3)


@pytest.mark.parametrize("kind", [Plain, Tied, Inner])
def test_steps_are_those_of_torchs_sgd(kind: type[nn.Module]):
    with global_generators(generator(0, "model")):
        ours, torchs = kind().double(), kind().double()
    torchs.load_state_dict(ours.state_dict())
    step = steps_down(SGD, list(ours.parameters()))
    for batch in range(4):
        step(lambda batch=batch: loss(ours, batch))
    for name, param in steps(torchs).items():
        torch.testing.assert_close(dict(ours.named_parameters())[name], param, rtol=1e-12, atol=1e-14)


def test_layers_move_during_the_backward_pass_and_so_without_a_gradient_of_their_own(monkeypatch: pytest.MonkeyPatch):
    left: list[int] = []
    monkeypatch.setattr("fedvision.optimizers.plain_sgd", lambda params, gradients, lr: left.extend(g is not None for g in gradients))
    model = Plain().double()
    Descent(list(model.parameters()), 0.1).step(lambda: loss(model, 0))
    assert left == [False] * 5


def test_a_frozen_layer_stays_where_it_is():
    model = Plain().double()
    model[0].requires_grad_(False)
    before = [param.detach().clone() for param in model.parameters()]
    steps_down(SGD, [param for param in model.parameters() if param.requires_grad])(lambda: loss(model, 0))
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert moved == [False, False, True, True, True]


def test_other_optimizers_step_as_they_do():
    ours, torchs = Plain().double(), Plain().double()
    torchs.load_state_dict(ours.state_dict())
    step = steps_down({"name": "SGD", "lr": 0.1, "momentum": 0.9}, list(ours.parameters()))
    optimizer = torch.optim.SGD(torchs.parameters(), lr=0.1, momentum=0.9)
    for batch in range(3):
        step(lambda batch=batch: loss(ours, batch))
        optimizer.zero_grad()
        loss(torchs, batch).backward()
        optimizer.step()
    for one, other in zip(ours.parameters(), torchs.parameters(), strict=True):
        assert torch.equal(one, other)
