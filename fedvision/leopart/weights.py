"""Weights that Leopart begins with: DINO's, those of timm's vision transformers, MultiMAE's and its own; and its weights as theirs.

All call a vision transformer's arrays alike, but put other words before the names. In DINO's files the weights of the network are
``backbone.*`` under ``teacher``, beside a head; in Leopart's they are ``model.*``, with ``projection_head.*`` and
``prototypes.weight``, and those of training have ``teacher.*`` too. MultiMAE's and MAE's have no last normalization.

Source: the names and shapes of the checkpoints that belong to arXiv 2104.14294, arXiv 2204.13101 and timm.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from fedvision import checkpoints
from fedvision.checkpoints import WRAPPERS, Converted, Fit, Shape, check_finite, listed
from fedvision.errors import ExperimentError
from fedvision.leopart.network import HEADS, Leopart
from fedvision.leopart.vision import scaled_positions
from fedvision.multimae import weights as multimae

Layout = Literal["leopart", "DINO", "timm", "MultiMAE"]
State = dict[str, Tensor]

NETWORK, TEACHER = "model.", "teacher."
TOKEN, POSITIONS = "cls_token", "pos_embed"

PARTS = ("transformer", "norm", "projection_head", "prototypes", "teacher")
"""What a file may have; each it has as a whole or not at all, and it must have the transformer."""

LEFT_OUT = ("head.", "head_dist.", "fc_norm.", "pre_logits.", "decoder_", "mask_token", "queue", "uniform_steps")
"""What others have and Leopart has not: classifiers, DINO's head, MAE's decoder; and what a silo remembers."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What of a checkpoint a network began with.

    Attributes:
        where: the checkpoint.
        layout: that it was in.
        fit: names that the network has and the checkpoint has not, which begin as the network was built; names that the checkpoint
            has and the network has not, which were left out.
        found: parts that were found: ``transformer``, its last ``norm``, ``projection_head``, ``prototypes``, ``teacher``.
        new: parts that the checkpoint does not know.
        resized: positions that were interpolated to another grid.
    """

    where: str
    layout: Layout
    fit: Fit
    found: tuple[str, ...]
    new: tuple[str, ...]
    resized: tuple[str, ...]

    def __str__(self) -> str:
        parts = {"found": self.found, "begin anew": self.new, "other positions": self.resized, "left out": self.fit.unexpected[:3]}
        return f"{self.where} ({self.layout}): {listed(parts)}"


class Opened(NamedTuple):
    """What a file holds.

    Attributes:
        state: its arrays.
        begin: what stands before the names of its vision transformer.
        layout: that it is in.
    """

    state: State
    begin: str
    layout: Layout


def opened(path: str | Path, side: int) -> Opened:
    """A file with a vision transformer.

    Args:
        path: see ``initialized_from``.
        side: rows and columns of the positions, where they are not in the file since they never changed.

    Raises:
        ExperimentError: a file that cannot be read, or without one.
    """
    where, state = str(path), checkpoints.read(path, ("teacher", *WRAPPERS))
    if any(name.startswith(multimae.INPUTS) for name in state):
        return Opened(multimae.to_timm(state, where, (side, side)).state, "", "MultiMAE")
    begin = _beginning(state, where)
    return Opened(state, begin, _layout(begin, without(begin, state)))


def without(begin: str, state: Mapping[str, Tensor]) -> State:
    """The arrays whose names begin so, by the rest of their names."""
    return {name.removeprefix(begin): tensor for name, tensor in state.items() if name.startswith(begin)}


def initialized_from(model: Leopart, path: str | Path) -> Report:
    """Give a network and its teacher the weights of a file.

    Positions are interpolated to another grid. What the file does not have, as a head, begins as it was built. The teacher gets its own
    weights if the file has all of them, and otherwise what the network gets; it never stands in for the network where both are there.
    All of it is in the report, and in the log.

    Args:
        model: overwritten, unless the file does not fit.
        path: a file of DINO, of timm, of Leopart, of MultiMAE, or the ``model.safetensors`` of a run of either; see ``checkpoints.read``.

    Raises:
        ExperimentError: a file that cannot be read; no vision transformer; one of another size; values that are not finite. The network is
            as it was.

    Differs: the public implementation's own recipe of loading overwrites the network by the teacher, if a file has both.
    """
    where, (state, begin, layout) = str(path), opened(path, _side(model))
    inside = without(begin, state)
    given, resized = _fitted(model, inside, where)
    outside = tuple(name for name in state if not name.startswith((begin, TEACHER)))
    fit = Fit.of(given, model.model)
    teacher = _teachers(model, state, where) if begin != TEACHER else {}
    model.model.load_state_dict(given, strict=False)
    if model.teacher is not None:
        model.teacher.load_state_dict(teacher or given, strict=False)
    left_out = tuple(name for name in inside if name not in given)
    found = {_part(name) for name in given} | ({"teacher"} if teacher else set())
    new = tuple(dict.fromkeys(_part(name) for name in fit.missing))
    parts = tuple(part for part in PARTS if part in found)
    report = Report(where, layout, Fit(fit.missing, (*left_out, *outside), {}), parts, new, resized)
    log.info("%s", report)
    return report


def to_leopart(state: Mapping[str, Tensor], where: str = "the model") -> Converted:
    """What a silo has as Leopart's training writes it: network and teacher, nothing that is remembered of pictures.

    Args:
        state: of ``Leopart``.
        where: for messages.
    """
    kept = {name: tensor for name, tensor in state.items() if name.startswith((NETWORK, TEACHER))}
    return Converted(kept, tuple(name for name in state if name not in kept))


def to_timm(state: Mapping[str, Tensor], where: str = "the model") -> Converted:
    """The network's transformer as timm's, without a classifier.

    Args:
        state: of ``Leopart``.
        where: for messages.
    """
    heads = tuple(f"{NETWORK}{head}" for head in HEADS)
    kept = {name: tensor for name, tensor in state.items() if name.startswith(NETWORK) and not name.startswith(heads)}
    return Converted(
        {name.removeprefix(NETWORK): tensor for name, tensor in kept.items()}, tuple(name for name in state if name not in kept)
    )


# ---- parts ----------------------------------------------------------------------------------------------------------


def _beginning(state: Mapping[str, Tensor], where: str) -> str:
    """What stands before the names of a vision transformer's arrays; a teacher's is the last to be taken.

    Raises:
        ExperimentError: there is none.
    """
    begins = [name.removesuffix(TOKEN) for name in state if name == TOKEN or name.endswith(f".{TOKEN}")]
    if not begins:
        found = ", ".join(list(state)[:5])
        raise ExperimentError(
            f"{where} holds {found}, ..., no {TOKEN}, which vision transformers have; give a file of DINO, timm, MultiMAE or Leopart "
            "(a run whose transformer was frozen has written its head alone)"
        )
    return min(begins, key=lambda begin: (begin == TEACHER, begin not in ("", NETWORK), len(begin)))


def _layout(begin: str, inside: Mapping[str, Tensor]) -> Layout:
    if any(name.startswith(HEADS) for name in inside):
        return "leopart"
    return "DINO" if begin == "backbone." else "timm"


def _fitted(model: Leopart, state: Mapping[str, Tensor], where: str) -> tuple[State, tuple[str, ...]]:
    """Weights that the network takes, and the names of positions that were interpolated.

    Raises:
        ExperimentError: they do not fit.
    """
    own, resized = model.model.state_dict(), ()
    given = {name: tensor for name, tensor in state.items() if not name.startswith(LEFT_OUT)}
    positions = given.get(POSITIONS)
    if positions is not None and positions.ndim == 3 and positions.shape[1] != own[POSITIONS].shape[1]:
        try:
            given[POSITIONS], resized = scaled_positions(positions.float(), *(_side(model),) * 2), (POSITIONS,)  # type: ignore[assignment]
        except ExperimentError as error:
            raise ExperimentError(f"{where}: {error}") from error
    fit = Fit.of(given, model.model)
    begun = {"transformer", *(_part(name) for name in given)}
    needed = tuple(name for name in fit.missing if _part(name) in begun)
    Fit(needed, fit.unexpected, fit.misshapen).check(where, _remedy, "as deep")
    check_finite(given, where)
    return given, resized


def _teachers(model: Leopart, state: Mapping[str, Tensor], where: str) -> State:
    """The teacher's weights, if the file has all of them."""
    theirs = without(TEACHER, state)
    return _fitted(model, theirs, where)[0] if theirs.keys() >= model.model.state_dict().keys() else {}


def _side(model: Leopart) -> int:
    """Rows and columns of the positions."""
    return math.isqrt(model.model.pos_embed.shape[1])


def _part(name: str) -> str:
    return name.split(".", maxsplit=1)[0] if name.startswith((*HEADS, "norm.")) else "transformer"


def _remedy(name: str, theirs: Shape, ours: Shape) -> str:
    """What to change so that an array has the shape that it has in the checkpoint."""
    if name.startswith("prototypes") and theirs[1:] == ours[1:]:
        return f"choose learner.prototypes = {theirs[0]}"
    if name.startswith(HEADS):
        return "choose the learner.networks and learner.features that it has there"
    if name.startswith("patch_embed") and theirs[:1] == ours[:1]:
        return "choose the learner.patch and the channels that it has there"
    return "choose the learner.networks that it was made with"
