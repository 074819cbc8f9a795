"""Optimizers named in a table: any class of ``torch.optim`` with its own arguments."""

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from torch import Tensor

from fedvision import settings
from fedvision.errors import ExperimentError

NOT_IN_A_TABLE = frozenset({"params"})


def checked(table: dict[str, Any]) -> dict[str, Any]:
    """``table`` if it names an optimizer and only settings that this optimizer has.

    Raises:
        ExperimentError: unknown optimizer, unknown or missing setting.
    """
    known = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)}
    name = table.get("name")
    if name not in known:
        raise ExperimentError(f"unknown optimizer {name!r}; {settings.nearest(str(name), sorted(set(known) - {'Optimizer'}))}")
    arguments = settings.parameters(known[name], NOT_IN_A_TABLE)
    for key in table:
        if key != "name" and key not in arguments:
            raise ExperimentError(f"optimizer {name} has no setting {key!r}; {settings.nearest(key, sorted(arguments))}")
    return table


Optimizer = Annotated[dict[str, Any], AfterValidator(checked)]
"""A table such as ``{name = "Adam", lr = 3e-4, weight_decay = 1e-2}``."""


def build(table: dict[str, Any], params: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The optimizer of ``table`` over ``params``.

    Raises:
        ExperimentError: a value that the optimizer refuses.
    """
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items() if key != "name"}
    try:
        return getattr(torch.optim, checked(table)["name"])(list(params), **arguments)  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        raise ExperimentError(f"optimizer {table}: {error}") from error
