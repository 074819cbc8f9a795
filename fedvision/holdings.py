"""What a silo keeps of a model, and what it shares."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from flwr.app import RecordDict
from torch import Tensor, nn

from fedvision.arrays import Named, array_records, pack, unpack
from fedvision.errors import ExperimentError
from fedvision.learners.learner import Learner

PRIVATE = "private"
"""The record of a client's state in which it keeps its private arrays."""


@dataclass(frozen=True)
class Holdings:
    """Which of a model's arrays travel, and which stay in the silo; those in neither never change.

    Attributes:
        learner: whose model it is.
        shared: the arrays that travel, as the initial model has them.
        private: those that stay, as a silo begins with them.
        tied: the name under which an array travels or stays, by each further name that it has.
    """

    learner: Learner
    shared: Named
    private: Named
    tied: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, learner: Learner, model: nn.Module) -> "Holdings":
        """Those of a freshly built model.

        Raises:
            ExperimentError: nothing travels, or ``learner.private`` has a pattern that no array matches.
        """
        state, tied = model.state_dict(), _tied(model)
        _check_patterns(learner, state)
        held: dict[str, dict[str, Tensor]] = {"shared": {}, "private": {}, "constant": {}}
        for name in state.keys() - tied.keys():
            held[learner.holding(name)][name] = state[name]
        if not held["shared"]:
            raise ExperimentError(f"learner.private = {list(learner.private)} leaves nothing to share; name fewer arrays")
        return cls(learner, _copies(state, held["shared"]), _copies(state, held["private"]), tied)

    @torch.no_grad()
    def load(self, model: nn.Module, arrays: Named, state: RecordDict | None = None) -> dict[str, Tensor]:
        """Make ``model`` that of a silo.

        Args:
            model: overwritten.
            arrays: the shared arrays.
            state: what the silo keeps; one that keeps nothing yet, as the server, begins anew.

        Returns:
            The model's own tensors of the shared arrays.
        """
        own = model.state_dict()
        held = array_records(state or RecordDict()).get(PRIVATE)
        _copy(own, self.shared, arrays)
        _copy(own, self.private, self.private if held is None else unpack(held))
        if self.private and held is None:
            self.learner.begin(model)
        return {name: own[name] for name in self.shared}

    def keep(self, model: nn.Module, state: RecordDict) -> None:
        """Remember the private arrays of ``model`` in what its silo keeps."""
        if self.private:
            own = model.state_dict()
            state[PRIVATE] = pack({name: own[name].detach().clone() for name in self.private})

    def exported(self, arrays: Named) -> dict[str, Tensor]:
        """Shared arrays under all of their names, as the model's state dict has them."""
        return {**arrays, **{other: arrays[name] for other, name in self.tied.items() if name in arrays}}

    def keeps_trained(self, model: nn.Module) -> list[str]:
        """The parameters that are trained and yet stay in the silo."""
        return [name for name, param in model.named_parameters() if param.requires_grad and name in self.private]


def _tied(model: nn.Module) -> dict[str, str]:
    """The first name of each tensor that has several, by the others."""
    first: dict[Tensor, str] = {}
    named = model.state_dict(keep_vars=True).items()
    return {name: first[tensor] for name, tensor in named if first.setdefault(tensor, name) != name}


def _copies(state: Named, names: Collection[str]) -> dict[str, Tensor]:
    """Contiguous copies, in the order of the state dict."""
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items() if name in names}


def _copy(own: Named, names: Collection[str], values: Named) -> None:
    if names:
        torch._foreach_copy_([own[name] for name in names], [values[name] for name in names])


def _check_patterns(learner: Learner, names: Collection[str]) -> None:
    for pattern in learner.private:
        if not any(fnmatchcase(name, pattern) for name in names):
            few = ", ".join(list(names)[:8])
            raise ExperimentError(f"learner.private: no array of the model matches {pattern!r}; its arrays are {few}, ...")
