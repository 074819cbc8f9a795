"""Optimizers named in a table: any class of ``torch.optim`` with its own arguments."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any

import torch
from flwr.app import ArrayRecord, RecordDict
from pydantic import AfterValidator
from torch import Tensor

from fedvision import schedules, settings
from fedvision.arrays import array_records, pack, unpack
from fedvision.errors import ExperimentError
from fedvision.learners.learner import Group

SGD_LR = 1e-3
"""Torch's default."""

NOT_IN_A_TABLE = frozenset({"params"})

STEPPING = frozenset({"schedule", "decay_schedule", "keep"})
"""What a client's table says besides the optimizer and its arguments."""

MEMORY = "optimizer"
"""The record of a client's state in which its optimizer's memory is kept."""


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


def checked_for_clients(table: dict[str, Any]) -> dict[str, Any]:
    """``table`` if ``checked`` lets it pass without what ``Stepper`` takes besides, and that is right too.

    Raises:
        ExperimentError: as ``checked``; a schedule that does not exist, a ``keep`` that is not true or false.
    """
    checked({key: value for key, value in table.items() if key not in STEPPING})
    schedules.factor(table.get("schedule"))
    schedules.factor(table.get("decay_schedule"))
    if "decay_schedule" in table and not table.get("weight_decay"):
        raise ExperimentError(f"optimizer {table['name']} has a decay_schedule and no weight_decay; give the one that it is times")
    if not isinstance(table.get("keep", False), bool):
        raise ExperimentError(f"optimizer {table['name']}: keep = {table['keep']!r}: expected true or false")
    return table


Optimizer = Annotated[dict[str, Any], AfterValidator(checked)]
"""A table such as ``{name = "Adam", lr = 3e-4, weight_decay = 1e-2}``."""

ClientOptimizer = Annotated[dict[str, Any], AfterValidator(checked_for_clients)]
"""The same, and ``schedule`` and ``decay_schedule``, tables of ``fedvision.schedules`` that say what the rate and ``weight_decay`` are
times, and ``keep``: whether its memory lasts from round to round."""


def build(table: dict[str, Any], params: Iterable[Tensor | tuple[Group, Sequence[Tensor]]]) -> torch.optim.Optimizer:
    """The optimizer of ``table`` over ``params``: tensors, or pairs of a ``Group`` and its tensors.

    Raises:
        ExperimentError: unknown optimizer, or a value that it refuses.
    """
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items() if key != "name"}
    try:
        groups = [_of_group(*each, table) if isinstance(each, tuple) else each for each in params]
        return _kind(table)(groups, **arguments)  # type: ignore[no-any-return]
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise ExperimentError(f"optimizer {table}: {error}") from error


class Stepper:
    """What moves parameters along gradients, in place.

    Plain SGD takes its steps itself, for all parameters at once and to the same bits: a client of few batches notices
    what it costs to make an optimizer, and a process the seconds that torch takes over its first.

    Args:
        table: a ``ClientOptimizer``.
        params: what is moved, by name.
        groups: how the learner wants them told apart; empty for not at all.
        state: where the optimizer's memory is, and is left by ``end``, if ``table`` says to keep it.

    Raises:
        ExperimentError: the optimizer refuses a value of ``table``.
    """

    def __init__(
        self, table: dict[str, Any], params: Mapping[str, Tensor], groups: Sequence[Group] = (), state: RecordDict | None = None
    ) -> None:
        self._params, self._factor = list(params.values()), schedules.factor(table.get("schedule"))
        self._decay = schedules.factor(table["decay_schedule"]) if "decay_schedule" in table else None
        self._state = state if table.get("keep") else None
        own = {key: value for key, value in table.items() if key not in STEPPING}
        self._lr = own.get("lr", SGD_LR)
        simple = is_plain_sgd(own) and all(group.lr_factor == 1 for group in groups)
        self._optimizer = None if simple else build(own, _grouped(params, groups))
        self._rates = [] if self._optimizer is None else [group["lr"] for group in self._optimizer.param_groups]
        self._decays = [] if self._optimizer is None else [group.get("weight_decay", 0.0) for group in self._optimizer.param_groups]
        if self._optimizer is not None and self._state is not None:
            _recall(self._optimizer, self._state)

    def __call__(self, gradients: Sequence[Tensor | None], progress: float = 0.0) -> None:
        """One step along a gradient for each parameter, None for one that has none, at a time of the training in [0, 1]."""
        factor = self._factor(progress)
        if self._optimizer is None:
            _descend(self._params, gradients, self._lr * factor)
            return
        for param, gradient in zip(self._params, gradients, strict=True):
            param.grad = gradient
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        if self._decay is not None:
            for group, decay in zip(self._optimizer.param_groups, self._decays, strict=True):
                group["weight_decay"] = decay * self._decay(progress)
        self._optimizer.step()

    def end(self) -> None:
        """Leave the memory where it was, if it is to be kept."""
        if self._optimizer is not None and self._state is not None:
            self._state[MEMORY] = _memory(self._optimizer)


def _grouped(params: Mapping[str, Tensor], groups: Sequence[Group]) -> list[Any]:
    """Parameters as torch's optimizers take them; those in no group are a group of their own."""
    if not groups:
        return list(params.values())
    named = {name for group in groups for name in group.names}
    rest = Group([name for name in params if name not in named])
    return [(group, [params[name] for name in group.names if name in params]) for group in (*groups, rest)]


def reorder(state: RecordDict, params: Mapping[str, Tensor], groups: Sequence[Group], name: str, order: Tensor) -> None:
    """Put what a kept memory remembers of the rows of a parameter in another order; nothing, if it is no parameter or nothing is kept.

    Args:
        state: in which ``Stepper`` has left it.
        params: what it moved, by name.
        groups: as it was told.
        name: of the parameter, or of another array.
        order: which row belongs in each place.
    """
    if name not in params or MEMORY not in state:
        return
    grouped = [each for group in groups for each in group.names if each in params]
    number = [*grouped, *(each for each in params if each not in set(grouped))].index(name)
    remembered = unpack(array_records(state)[MEMORY])
    rows = {key: value for key, value in remembered.items() if key.startswith(f"{number}/") and value.shape == params[name].shape}
    state[MEMORY] = pack(remembered | {key: value[order.to(value.device)] for key, value in rows.items()})


def _memory(optimizer: torch.optim.Optimizer) -> ArrayRecord:
    """What an optimizer remembers of each parameter."""
    remembered: dict[str, Tensor] = {}
    for number, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor | int | float):
                remembered[f"{number}/{key}"] = torch.as_tensor(value).detach().clone()
            elif value is not None:
                kind = type(optimizer).__name__
                raise ExperimentError(f"the memory of {kind} holds a {type(value).__name__} ({key}) and cannot be kept; set keep = false")
    return pack(remembered)


def _recall(optimizer: torch.optim.Optimizer, state: RecordDict) -> None:
    entries: dict[int, dict[str, Tensor]] = {}
    for name, value in unpack(array_records(state)[MEMORY]).items() if MEMORY in state else ():
        number, _, key = name.partition("/")
        entries.setdefault(int(number), {})[key] = value.clone()
    if entries:
        optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def _of_group(group: Group, params: Sequence[Tensor], table: Mapping[str, Any]) -> dict[str, Any]:
    """A group as torch takes it."""
    options: dict[str, Any] = {} if group.decayed else {"weight_decay": 0.0}
    if group.lr_factor != 1:
        options["lr"] = table.get("lr", SGD_LR) * group.lr_factor
    return {"params": params, **options}


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
    step = Stepper(table, {"param": param})
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
