"""Plain gradient descent in which linear layers take their step while the gradient is on its way back.

The gradient of a linear layer's weight is a product of two thin matrices. To write it out, read it again and add it to the
weight moves three times as much memory as to add the product to the weight at once; and small clients wait for memory.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fedvision import optimizers

Loss = Callable[[], Tensor]


def steps_down(table: dict[str, Any], params: Sequence[Tensor]) -> Callable[[Loss], None]:
    """What takes one step of an optimizer, in place, down a loss that is computed when it is called.

    Args:
        table: the optimizer's, as ``fedvision.optimizers`` has them.
        params: those to move.
    """
    if optimizers.is_plain_sgd(table):
        return Descent(params, table.get("lr", optimizers.SGD_LR)).step
    move = optimizers.stepper(table, params)
    return lambda loss: move(torch.autograd.grad(loss(), params, allow_unused=True))


class Descent:
    """Steps ``param -= lr * gradient`` on the parameters of a model, in place.

    A weight that the loss uses once, in a linear layer, and its bias, move during the backward pass; all others after it.

    Args:
        params: those to move.
        lr: the step size.
    """

    def __init__(self, params: Sequence[Tensor], lr: float) -> None:
        self.params, self.lr = list(params), lr
        self.watched = {id(param) for param in self.params}
        self.uses: Counter[int] = Counter()
        self.stepping = False

    def step(self, loss: Loss) -> None:
        """One step down the gradient of a loss."""
        self.uses.clear()
        with _Watch(self):
            value = loss()
        self.stepping = True
        try:
            gradients = torch.autograd.grad(value, self.params, allow_unused=True)
        finally:
            self.stepping = False
        optimizers.plain_sgd(self.params, gradients, self.lr)

    def moves(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether a layer may move now: the loss's own gradient is on its way, and nothing else needs the layer as it was."""
        return self.stepping and self.uses[id(weight)] == 1 and (bias is None or self.uses[id(bias)] == 1)


class _Watch(TorchFunctionMode):
    """Counts where parameters are used, and sends linear layers through ``_Linear``."""

    def __init__(self, descent: Descent) -> None:
        super().__init__()
        self._descent = descent

    def __torch_function__(self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        descent = self._descent
        for value in (*args, *(kwargs or {}).values()):
            if id(value) in descent.watched:
                descent.uses[id(value)] += 1
        if function is F.linear and len(args) == 3 and not kwargs and self._is_plain(*args):
            return _Linear.apply(*args, descent)
        return function(*args, **(kwargs or {}))

    def _is_plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether a layer is one of those to move, and has one type of number all through."""
        watched = self._descent.watched
        both = id(weight) in watched and (bias is None or id(bias) in watched)
        return both and x.dtype == weight.dtype and not torch.is_autocast_enabled(x.device.type)


class _Linear(torch.autograd.Function):
    """``x W^T + b``, whose backward pass moves W and b instead of returning their gradients, if it may."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, descent: Descent) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.descent = weight, bias, descent
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        weight, bias, descent = ctx.weight, ctx.bias, ctx.descent
        back = slope @ weight if ctx.needs_input_grad[0] else None
        rows, inputs = slope.reshape(-1, slope.shape[-1]), x.reshape(-1, x.shape[-1])
        if not descent.moves(weight, bias):
            return back, rows.T @ inputs, None if bias is None else rows.sum(0), None
        with torch.no_grad():
            weight.addmm_(rows.T, inputs, alpha=-descent.lr)
            if bias is not None:
                bias.add_(rows.sum(0), alpha=-descent.lr)
        return back, None, None, None
