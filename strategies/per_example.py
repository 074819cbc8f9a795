"""Statistics of per-example gradients, without keeping one gradient per example."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedvision.data import Examples

ExampleLoss = Callable[[Callable[..., Any], Examples], Tensor]
"""(a model, or what is called like it; a batch) -> the mean loss over the batch."""

Moments = dict[str, tuple[Tensor, Tensor]]
"""For each parameter, the sum over examples of its per-example gradients, and of their squares."""


def moments(loss: ExampleLoss, model: nn.Module, layers: Sequence[nn.Module], batch: Examples) -> Moments:
    """Moments of the per-example gradients of all parameters of ``layers`` on a batch, by their names in the model.

    They stay differentiable with respect to every parameter of the model, also those outside ``layers``.

    Args:
        loss: must be a mean of independent per-example losses (no BatchNorm in training mode).
        layers: modules within ``model``. If all are linear layers that are called once, on one row an example,
            their gradients follow in closed form from one pass; else ``torch.func`` computes them one by one.
        batch: n examples.
    """
    params = [param for layer in layers for param in layer.parameters()]
    names = {param: name for name, param in model.named_parameters()}
    if all(type(layer) is nn.Linear for layer in layers) and len(set(params)) == len(params):
        with _taped(layers) as tape:
            total = loss(model, batch) * len(batch)
        if all(len(tape[layer]) == 1 and tape[layer][0].has_rows(len(batch)) for layer in layers):
            return _linear_moments(total, {layer: tape[layer][0] for layer in layers}, names)
    return _general_moments(loss, model, {names[param]: param for param in params}, batch)


def linear_moments(
    inputs: Float[Tensor, "n d"], derivatives: Float[Tensor, "n k"]
) -> tuple[tuple[Float[Tensor, "k d"], Float[Tensor, "k d"]], tuple[Float[Tensor, "k"], Float[Tensor, "k"]]]:
    """Moments for one linear layer, whose per-example gradients are outer products.

    With features h_i (rows of ``inputs``) and derivatives r_i = d loss_i / d z_i (rows of ``derivatives``), the
    weight's gradient is r_i h_i^T and the bias's r_i, so that

        sum_i r_i h_i^T = R^T H        sum_i (r_i h_i^T)^2 = (R^2)^T H^2

    Returns:
        (sum, sum of squares) for the weight, and for the bias.
    """
    r, h = derivatives, inputs
    return (r.T @ h, r.square().T @ h.square()), (r.sum(0), r.square().sum(0))


@dataclass(frozen=True)
class _Call:
    """One call of a layer: what went in, what came out, and how often either had been written to by then."""

    inputs: Tensor
    output: Tensor
    written: tuple[int, int]

    def has_rows(self, examples: int) -> bool:
        """Whether the layer saw one row an example, and no row or output was overwritten since (``ReLU(inplace=True)``)."""
        matrix = self.inputs.ndim == 2 and len(self.inputs) == examples
        return matrix and self.written == (self.inputs._version, self.output._version)


@contextmanager
def _taped(layers: Sequence[nn.Module]) -> Iterator[dict[nn.Module, list[_Call]]]:
    """Record every call of the layers within the block."""
    tape: dict[nn.Module, list[_Call]] = {layer: [] for layer in layers}

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        tape[layer].append(_Call(inputs[0], output, (inputs[0]._version, output._version)))

    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield tape
    finally:
        for hook in hooks:
            hook.remove()


def _linear_moments(total: Tensor, calls: Mapping[nn.Module, _Call], names: Mapping[nn.Parameter, str]) -> Moments:
    derivatives = torch.autograd.grad(total, [call.output for call in calls.values()], create_graph=True)
    result: Moments = {}
    for (layer, call), derivative in zip(calls.items(), derivatives, strict=True):
        of_params = zip(layer.parameters(), linear_moments(call.inputs, derivative), strict=False)  # there may be no bias
        result |= {names[param]: of_param for param, of_param in of_params}
    return result


def _general_moments(loss: ExampleLoss, model: nn.Module, chosen: Mapping[str, Tensor], batch: Examples) -> Moments:
    params = dict(model.named_parameters())

    def loss_of_one(chosen: dict[str, Tensor], fields: dict[str, Tensor]) -> Tensor:
        def called(*inputs: Any, **options: Any) -> Any:
            return functional_call(model, {**params, **chosen}, inputs, options)

        return loss(called, Examples({name: value.unsqueeze(0) for name, value in fields.items()}))

    gradients = vmap(grad(loss_of_one), in_dims=(None, 0), randomness="different")(dict(chosen), dict(batch.fields))
    return {name: (gradient.sum(0), gradient.square().sum(0)) for name, gradient in gradients.items()}
