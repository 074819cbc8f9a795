"""Checkpoints that others published: read without unpickling code, made flat, and loaded with a report of what does not fit."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedvision.errors import ExperimentError

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where training code keeps weights inside a checkpoint, averaged ones first."""

PREFIXES = ("_orig_mod.", "module.", "_orig_mod.")
"""What ``torch.compile`` and DataParallel put before every name, in either order."""

SHOWN = 3
"""Names in a message, at most."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Fit:
    """How the weights of a checkpoint fit a model.

    Attributes:
        missing: names that the model has and the checkpoint has not; counters of BatchNorm, which no result needs, aside.
        unexpected: names that the checkpoint has and the model has not.
        misshapen: names of both, with the shapes in the checkpoint and in the model.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: Mapping[str, tuple[Shape, Shape]]

    @classmethod
    def of(cls, state: Mapping[str, Tensor], model: nn.Module) -> "Fit":
        """Compare without loading."""
        own = model.state_dict()
        shapes = {name: (tuple(state[name].shape), tuple(own[name].shape)) for name in own if name in state}
        return cls(
            tuple(name for name in own if name not in state and not name.endswith("num_batches_tracked")),
            tuple(name for name in state if name not in own),
            {name: pair for name, pair in shapes.items() if pair[0] != pair[1]},
        )

    def __bool__(self) -> bool:
        """Whether everything fits."""
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        shapes = [f"{name} {list(theirs)} instead of {list(ours)}" for name, (theirs, ours) in self.misshapen.items()]
        named = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": shapes}
        return "; ".join(f"{len(names)} {what}: {_first(names)}" for what, names in named.items() if names) or "everything fits"

    def check(self, where: str, remedy: Callable[[str, Shape, Shape], str], size: str) -> None:
        """Refuse weights that do not fit a network.

        Args:
            where: they are from, for messages.
            remedy: what to do about an array, given its name, its shape in the checkpoint, and its shape in the network.
            size: what has to be as it is there, for messages about arrays that one side has not.

        Raises:
            ExperimentError: with file, name, shapes and remedy.
        """
        if self.misshapen:
            name, (theirs, ours) = next(iter(self.misshapen.items()))
            fact = f"{where} has {name} of shape {list(theirs)}, the network {list(ours)}"
            raise ExperimentError(f"{fact}; {remedy(name, theirs, ours)}")
        if self.missing:
            fact = f"{where} lacks {len(self.missing)} arrays of the network, such as {self.missing[0]}"
            raise ExperimentError(f"{fact}; choose the network that it was made with: {size}")
        if self.unexpected:
            fact = f"{where} has {len(self.unexpected)} arrays that the network has no place for, such as {self.unexpected[0]}"
            raise ExperimentError(f"{fact}; choose the network that it was made with: {size}, and no other architecture")


class Converted(NamedTuple):
    """A state dict in another layout, and the names of what has no place there."""

    state: dict[str, Tensor]
    dropped: tuple[str, ...]


def read(path: str | Path, wrappers: Sequence[str] = WRAPPERS) -> dict[str, Tensor]:
    """The weights in a file of safetensors or of ``torch.save``, as a flat dictionary on the CPU.

    Args:
        path: a name ending in ``.safetensors``, or of any file that ``torch.load(weights_only=True)`` reads; settings kept in
            an ``argparse.Namespace`` beside the weights do no harm, other classes are refused.
        wrappers: see ``flat``.

    Raises:
        ExperimentError: no such file, one that is damaged or would run code, or one without weights.
    """
    path = Path(path)
    if not path.is_file():
        fact = f"{path} is a folder, no checkpoint" if path.is_dir() else f"there is no checkpoint {path}"
        raise ExperimentError(f"{fact}; give the path of a file, such as a run's model.safetensors")
    if path.suffix == ".safetensors":
        return flat(_opened(path), wrappers, str(path))
    return flat(_unpickled(path), wrappers, str(path))


def flat(checkpoint: Any, wrappers: Sequence[str] = WRAPPERS, where: str = "the checkpoint") -> dict[str, Tensor]:
    """The weights of a checkpoint: taken out of the first wrapper that it has, without the names' prefixes.

    Args:
        checkpoint: a state dict, or a dictionary that holds one under one of ``wrappers``.
        wrappers: names to look under, best first.
        where: for messages.

    Raises:
        ExperimentError: there is no tensor in it.
    """
    inside = next((checkpoint[key] for key in wrappers if _holds_weights(checkpoint, key)), checkpoint)
    weights = {_bare(name): value for name, value in _items(inside) if isinstance(value, Tensor)}
    if not weights:
        found = ", ".join(map(str, list(checkpoint)[:10])) if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        raise ExperimentError(f"{where} holds no weights, but {found or 'nothing'}; expected tensors, or them under {', '.join(wrappers)}")
    return weights


def load(model: nn.Module, state: Mapping[str, Tensor], where: str = "the checkpoint") -> None:
    """Give a model all weights of a flat checkpoint.

    Raises:
        ExperimentError: a weight is missing, superfluous, or of another shape; the model is as it was.
    """
    fit = Fit.of(state, model)
    if not fit:
        raise ExperimentError(f"{where} does not fit {type(model).__name__}: {fit}; choose the model and the classes that it was made with")
    model.load_state_dict(state, strict=False)


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are infinite or not a number.

    Raises:
        ExperimentError: with file and name.
    """
    odd = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if odd:
        raise ExperimentError(f"{where} has {odd[0]} with values that are not finite; get it anew, or take an earlier one")


def listed(parts: Mapping[str, Sequence[str]]) -> str:
    """Names under what they have in common, for reports; nothing of what no name has.

    >>> listed({"found": ("encoder", "head"), "left out": ()})
    'found: encoder, head'
    """
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)


def _opened(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ExperimentError(f"{path} cannot be read as safetensors ({error}); get it anew") from error


def _unpickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind, depending on what is in the file
        foreign = _foreign(path)
        if foreign:
            needs = f"needs {_first(foreign)}, which loading would run"
            raise ExperimentError(f"{path} {needs}; save its weights alone, as safetensors") from error
        raise ExperimentError(f"{path} cannot be read as a file of torch.save ({type(error).__name__}); get it anew") from error


def _foreign(path: Path) -> list[str]:
    """The classes and functions that a file names and that are not known to be harmless."""
    try:
        return [name for name in torch.serialization.get_unsafe_globals_in_checkpoint(path) if name != "argparse.Namespace"]
    except Exception:
        return []


def _holds_weights(checkpoint: Any, key: str) -> bool:
    return isinstance(checkpoint, Mapping) and any(isinstance(value, Tensor) for _, value in _items(checkpoint.get(key)))


def _items(found: Any) -> list[tuple[str, Any]]:
    return [(str(name), value) for name, value in found.items()] if isinstance(found, Mapping) else []


def _bare(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
