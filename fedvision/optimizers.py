"""Optimizers named in a table: any class of ``torch.optim`` with its own arguments."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from torch import Tensor

from fedvision import settings
from fedvision.errors import ExperimentError

SGD_LR = 1e-3
"""Torch's default."""

NOT_IN_A_TABLE = frozenset({"params"})


def checked(table: dict[str, Any]) -> dict[str, Any]:
    """``table`` if it names an optimizer and only settings that this optimizer has.

    Raises:
        ExperimentError: unknown optimizer, unknown or missing setting, or a value that the optimizer refuses.
    """
    arguments = settings.parameters(_kind(table), NOT_IN_A_TABLE)
    for key in table:
        if key != "name" and key not in arguments:
            raise ExperimentError(f"optimizer {table['name']} has no setting {key!r}; {settings.nearest(key, sorted(arguments))}")
    absent = [key for key, value in table.items() if isinstance(value, float) and math.isnan(value)]
    if absent:
        raise ExperimentError(f"optimizer {table}: {absent[0]} is not a number")
    if not is_plain_sgd(table):
        build(table, [torch.zeros(1, 1, requires_grad=True)])
    return table


Optimizer = Annotated[dict[str, Any], AfterValidator(checked)]
"""A table such as ``{name = "Adam", lr = 3e-4, weight_decay = 1e-2}``."""


def build(table: dict[str, Any], params: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The optimizer of ``table`` over ``params``.

    Raises:
        ExperimentError: unknown optimizer, or a value that it refuses.
    """
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items() if key != "name"}
    try:
        return _kind(table)(list(params), **arguments)  # type: ignore[no-any-return]
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise ExperimentError(f"optimizer {table}: {error}") from error


def stepper(table: dict[str, Any], params: Sequence[Tensor]) -> Callable[[Sequence[Tensor | None]], None]:
    """What moves ``params`` along gradients, in place: one for each of them, None for one that has none.

    Plain SGD takes its steps itself, for all parameters at once and to the same bits: a client of few batches notices
    what it costs to make an optimizer, and a process the seconds that torch takes over its first.
    """
    if is_plain_sgd(table):
        lr = table.get("lr", SGD_LR)
        return lambda gradients: _descend(params, gradients, lr)
    optimizer = build(table, params)

    def step(gradients: Sequence[Tensor | None]) -> None:
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        optimizer.step()

    return step


def is_plain_sgd(table: Mapping[str, Any]) -> bool:
    """Whether a table is gradient descent with a learning rate, 0 or more, and nothing else."""
    return table["name"] == "SGD" and table.keys() <= {"name", "lr"} and isinstance(lr := table.get("lr", SGD_LR), int | float) and lr >= 0


def is_element_wise(table: Mapping[str, Any]) -> bool:
    """Whether each element of a parameter moves by its own gradients alone, whatever else is in the tensor.

    Found out by trying: two small matrices take three steps on their own, and stacked in one tensor.

    >>> is_element_wise({"name": "Adam", "lr": 0.1}), is_element_wise({"name": "Adafactor", "lr": 0.1})
    (True, False)
    """
    return is_plain_sgd(table) or _tried(json.dumps(table, sort_keys=True))


@cache
def _tried(table: str) -> bool:
    ramp = torch.linspace(-1, 1, 12).reshape(3, 4)
    both = torch.stack([ramp, 100 * ramp.flip(0)])
    try:
        apart = torch.stack([_three_steps(json.loads(table), one) for one in both])
        together = _three_steps(json.loads(table), both)
    except (ExperimentError, TypeError, RuntimeError):  # it takes matrices only, or calls for a closure, or for sparse gradients
        return False
    return torch.allclose(apart, together, rtol=1e-6, atol=0)


def _three_steps(table: dict[str, Any], start: Tensor) -> Tensor:
    param = start.clone().requires_grad_()
    step = stepper(table, [param])
    for number in range(1, 4):
        step([number * start.cos()])
    return param.detach()


@torch.no_grad()
def _descend(params: Sequence[Tensor], gradients: Sequence[Tensor | None], lr: float) -> None:
    moved = [(param, gradient) for param, gradient in zip(params, gradients, strict=True) if gradient is not None]
    if moved:
        torch._foreach_add_([param for param, _ in moved], [gradient for _, gradient in moved], alpha=-lr)


def _kind(table: dict[str, Any]) -> Any:
    known = _known()
    name = table.get("name")
    if name not in known:
        raise ExperimentError(f"unknown optimizer {name!r}; {settings.nearest(str(name), sorted(known))}")
    return known[name]


@cache
def _known() -> dict[str, type[torch.optim.Optimizer]]:
    classes = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    return {name: kind for name, kind in classes.items() if issubclass(kind, torch.optim.Optimizer) and name != "Optimizer"}
