"""Moments of per-example gradients equal those of a loop over the examples, for every kind of layer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedvision.data import Examples
from fedvision.models import CNN, MLP
from strategies import per_example
from strategies.per_example import linear_moments, moments


class Tokens(nn.Module):
    """[n, 1, 4, 4] -> four tokens of four features -> logits; with parameters of its own and attention."""

    def __init__(self, classes=3):
        super().__init__()
        self.position = nn.Parameter(torch.randn(4, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.classifier = nn.Linear(4, classes)

    def forward(self, x):
        h = x.flatten(1).unflatten(1, (4, 4)) + self.position
        return self.classifier(self.attention(h, h, h)[0]).mean(1)


class Twice(nn.Module):
    """One linear layer called twice."""

    def __init__(self):
        super().__init__()
        self.hidden, self.classifier = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.classifier(self.hidden(self.hidden(x.flatten(1)).tanh()))


class Tied(nn.Module):
    """Two linear layers that share their weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.classifier = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.classifier(self.second(self.first(x.flatten(1)).tanh()).tanh())


class LinearRoot(nn.Linear):
    """A model that is itself a linear layer."""

    def forward(self, x):
        return super().forward(x.flatten(1))


MODELS = {
    "mlp": lambda: MLP((1, 4, 4), (5, 4), 3),
    "binary mlp": lambda: MLP((1, 4, 4), (5,), 1),
    "no bias": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)),
    "relu in place": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)),
    "linear after an in-place change": lambda: nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(16, 3)),
    "logistic regression": lambda: LinearRoot(16, 3),
    "called twice": Twice,
    "tied": Tied,
    "tokens and attention": Tokens,
    "layer norm": lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3)),
    "parametrized": lambda: nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(16, 3))),
}
CNN_MODEL = {"cnn": lambda: CNN((1, 14, 14), (8, 8, 8), 3)}


def loss(model, batch):
    logits = model(batch.image)
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], batch.label.to(logits.dtype) % 2)
    return F.cross_entropy(logits, batch.label)


def build(name):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return {**MODELS, **CNN_MODEL}[name]().double()


def examples(name, n=5):
    rng = torch.Generator().manual_seed(1)
    side = 14 if name == "cnn" else 4
    return Examples({"image": torch.randn(n, 1, side, side, generator=rng).double(), "label": torch.randint(3, (n,), generator=rng)})


def owners(model):
    return [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]


def looped(model, batch):
    """Sums of per-example gradients and of their squares, one example after the other; differentiable."""
    params = dict(model.named_parameters())
    sums = {name: (torch.zeros_like(param), torch.zeros_like(param)) for name, param in params.items()}
    for i in range(len(batch)):
        gradients = torch.autograd.grad(loss(model, batch[i : i + 1]), list(params.values()), create_graph=True)
        for name, gradient in zip(params, gradients, strict=True):
            sums[name] = sums[name][0] + gradient, sums[name][1] + gradient**2
    return sums


def close(one, other):
    return torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [*MODELS, *CNN_MODEL])
def test_moments_equal_those_of_a_loop_over_the_examples(name):
    model, batch = build(name), examples(name)
    expected, found = looped(model, batch), moments(loss, model, owners(model), batch)
    assert found.keys() == expected.keys()
    for param, (total, squares) in expected.items():
        assert close(found[param][0], total), param
        assert close(found[param][1], squares), param
        assert squares.abs().max() > 0, f"{param} is not tested"


@pytest.mark.parametrize("name", [*MODELS, *CNN_MODEL])
def test_moments_are_differentiable_with_respect_to_every_parameter(name):
    model, batch = build(name), examples(name)
    params = list(model.parameters())

    def slopes(sums):
        rng = torch.Generator().manual_seed(5)
        scalar = torch.zeros((), dtype=torch.float64)
        for param in sorted(sums):
            for part in sums[param]:
                scalar = scalar + (torch.randn(part.shape, generator=rng, dtype=torch.float64) * part).sum()
        return torch.autograd.grad(scalar, params, materialize_grads=True)

    expected = slopes(looped(model, batch))
    assert all(map(close, slopes(moments(loss, model, owners(model), batch)), expected))
    assert all(slope.abs().max() > 0 for slope in expected[:-1])


@pytest.mark.parametrize("name", ["mlp", "binary mlp", "no bias"])
def test_linear_layers_need_one_pass_and_no_gradient_of_single_examples(name, monkeypatch):
    monkeypatch.delattr(per_example, "_general_moments")
    model, batch = build(name), examples(name)
    passes = []
    moments(lambda *args: passes.append(1) or loss(*args), model, owners(model), batch)
    assert len(passes) == 1


def test_the_head_of_any_model_with_a_linear_one_is_in_closed_form(monkeypatch):
    monkeypatch.delattr(per_example, "_general_moments")
    model, batch = build("cnn"), examples("cnn")
    found, expected = moments(loss, model, [model.classifier], batch), looped(model, batch)
    assert set(found) == {"classifier.weight", "classifier.bias"}
    assert all(close(found[name][part], expected[name][part]) for name in found for part in (0, 1))


def test_a_head_of_several_layers_has_the_moments_of_them_all():
    head = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    model, batch = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), head).double(), examples("mlp")
    found, expected = moments(loss, model, [head], batch), looped(model, batch)
    assert set(found) == {"3.0.weight", "3.0.bias", "3.2.weight", "3.2.bias"}
    assert all(close(found[name][part], expected[name][part]) for name in found for part in (0, 1))


def test_a_linear_head_with_other_parameters_than_its_weight_is_not_in_closed_form():
    """Weight normalization turns the weight into a function of two parameters, whose moments are asked for."""
    model, batch = build("parametrized"), examples("parametrized")
    found, expected = moments(loss, model, [model[1]], batch), looped(model, batch)
    assert set(found) == set(expected) == {"1.bias", "1.parametrizations.weight.original0", "1.parametrizations.weight.original1"}
    assert all(close(found[name][part], expected[name][part]) for name in found for part in (0, 1))


def test_the_moments_of_one_linear_layer_are_sums_of_outer_products():
    inputs, derivatives = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[2.0], [-1.0]])
    weight, bias = linear_moments(inputs, derivatives)
    assert weight[0].tolist() == [[2 - 3, 4 + 1]] and weight[1].tolist() == [[4 + 9, 16 + 1]]
    assert bias[0].tolist() == [1] and bias[1].tolist() == [5]


def test_moments_of_parts_add_up_to_those_of_the_whole():
    model, batch = build("mlp"), examples("mlp", n=7)
    whole = moments(loss, model, owners(model), batch)
    parts = [moments(loss, model, owners(model), part) for part in (batch[:3], batch[3:])]
    assert all(close(whole[name][k], parts[0][name][k] + parts[1][name][k]) for name in whole for k in (0, 1))


def test_no_hook_is_left_behind_even_if_the_loss_fails():
    model, batch = build("mlp"), examples("mlp")
    moments(loss, model, owners(model), batch)

    def failing(model, batch):
        loss(model, batch)
        raise FloatingPointError

    with pytest.raises(FloatingPointError):
        moments(failing, model, owners(model), batch)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_head_that_sees_two_rows_an_example_is_not_in_closed_form():
    """Sums of outer products over rows are not the sums of squares over examples then."""
    model, batch = (
        nn.Linear(3, 2),
        Examples({"image": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), "label": torch.arange(5) % 2}),
    )

    def two_views(model, batch):
        one, other = model(torch.cat([batch.image, 2 * batch.image + 1])).chunk(2)
        return (one.square() + (one * other)).sum(1).mean()

    expected = []
    for i in range(5):
        model.zero_grad()
        two_views(model, batch[i : i + 1]).backward()
        expected.append(model.weight.grad.clone())
    total, squares = moments(two_views, model, [model], batch)["weight"]
    torch.testing.assert_close(total, torch.stack(expected).sum(0))
    torch.testing.assert_close(squares, torch.stack(expected).square().sum(0))
