"""Published weights: MultiMAE's own layout, and that of timm's vision transformers and of MAE, read, fitted to a network, written back.

In the layout of MultiMAE's checkpoints a state dict has ``global_tokens``, ``input_adapters.<modality>.*``, ``encoder.<block>.*`` and
``output_adapters.<name>.*``; it is that of our networks. In timm's it has ``cls_token``, ``pos_embed``, ``patch_embed.proj.*``,
``blocks.<block>.*`` and, what MultiMAE has not, a last normalization and a classifier.

Source: the names and shapes of the checkpoints that belong to arXiv 2204.01678, arXiv 2111.06377 and timm.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedvision import checkpoints
from fedvision.checkpoints import Converted, Fit, Shape, check_finite, listed
from fedvision.errors import ExperimentError
from fedvision.multimae.modalities import RGB_NAME, Modality
from fedvision.multimae.model import Trunk
from fedvision.multimae.positions import by_place, resized, sincos

Layout = Literal["multimae", "timm"]
State = dict[str, Tensor]

GLOBAL, POSITIONS, EMBEDDING = "global_tokens", "pos_emb", "class_emb.weight"
INPUTS, OUTPUTS, ENCODER = "input_adapters.", "output_adapters.", "encoder."

TIMM_PARTS = {"blocks.": ENCODER, "patch_embed.proj.": f"{INPUTS}{RGB_NAME}.proj."}
"""What timm's names begin with, and ours."""

TIMM_ONLY = ("norm.", "fc_norm.", "head.", "decoder_", "mask_token")
"""What a vision transformer or MAE has and MultiMAE's trunk has not: the last normalization, the classifier, MAE's decoder."""

log = logging.getLogger(__name__)


# ---- layouts --------------------------------------------------------------------------------------------------------


def layout_of(state: Mapping[str, Tensor], where: str = "the checkpoint") -> Layout:
    """In which layout a state dict is.

    Raises:
        ExperimentError: in neither.
    """
    begins: dict[Layout, str] = {"multimae": ENCODER, "timm": "blocks."}
    for layout, begin in begins.items():
        if any(name.startswith(begin) for name in state):
            return layout
    found = ", ".join(list(state)[:5])
    raise ExperimentError(f"{where} holds {found}, ..., neither MultiMAE's names (encoder.0...) nor timm's (blocks.0...); convert it first")


def from_timm(state: Mapping[str, Tensor], grid: tuple[int, int] | None = None, where: str = "the checkpoint") -> Converted:
    """A vision transformer of timm, or MAE's, as a trunk that takes rgb.

    The class token, with its position added, becomes the global token; without a class token there is none. Names that are not
    known stay as they are.

    Args:
        state: in timm's names.
        grid: rows and columns of its positions; a square if not given.
        where: for messages.

    Raises:
        ExperimentError: positions that are missing, or that fill no such grid.
    """
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(TIMM_ONLY)}
    dropped = tuple(name for name in state if name not in kept)
    token, positions = kept.pop("cls_token", None), kept.pop("pos_embed", None)
    if positions is None:
        raise ExperimentError(f"{where} has no pos_embed, the positions of a vision transformer; give a ViT's or MAE's checkpoint")
    own, places = _split_positions(positions, token is not None, grid, where)
    converted = {_renamed(name, TIMM_PARTS): tensor for name, tensor in kept.items()}
    if token is not None:
        converted[GLOBAL] = token + own
    converted[f"{INPUTS}{RGB_NAME}.{POSITIONS}"] = places
    return Converted(converted, dropped)


def to_timm(state: Mapping[str, Tensor], where: str = "the model", grid: tuple[int, int] | None = None) -> Converted:
    """A trunk that takes rgb as a vision transformer of timm, without its last normalization and its classifier.

    The global token becomes the class token, whose position is 0.

    Args:
        state: in MultiMAE's names.
        where: for messages.
        grid: rows and columns of the positions if the state has none, as that of a run, where they never changed.

    Raises:
        ExperimentError: it takes no rgb, or has other than one global token.
    """
    rgb, back = f"{INPUTS}{RGB_NAME}.", {ours: theirs for theirs, ours in TIMM_PARTS.items()}
    token, positions = state.get(GLOBAL), state.get(f"{rgb}{POSITIONS}")
    if positions is None and grid is not None and f"{rgb}proj.weight" in state:
        positions = sincos(*grid, len(state[f"{rgb}proj.weight"]))
    if positions is None:
        raise ExperimentError(f"{where} has no positions of {RGB_NAME}, which timm's layout needs; choose the layout multimae")
    if token is None or token.shape[1] != 1:
        count = 0 if token is None else token.shape[1]
        raise ExperimentError(f"{where} has {count} global tokens, timm's layout has one class token; choose the layout multimae")
    converted = {"cls_token": token, "pos_embed": torch.cat([torch.zeros_like(positions[:, :, 0, :1].mT), by_place(positions)], dim=1)}
    converted |= {_renamed(name, back): tensor for name, tensor in state.items() if name.startswith(tuple(back))}
    used = (GLOBAL, f"{rgb}{POSITIONS}")
    return Converted(converted, tuple(name for name in state if name not in used and not name.startswith(tuple(back))))


def _split_positions(
    positions: Float[Tensor, "1 rows width"], token: bool, grid: tuple[int, int] | None, where: str
) -> tuple[Tensor, Float[Tensor, "1 width rows columns"]]:
    """The class token's position (0 where it has none), and the patches' by row and column."""
    rows = positions.shape[1]
    side = math.isqrt(rows)
    rows_columns = grid or (side, side)
    own = rows - math.prod(rows_columns)
    if own not in ((0, 1) if token else (0,)):
        expected = "a square" if grid is None else f"{grid[0]} x {grid[1]}"
        extra = " and at most one class token" if token else ""
        raise ExperimentError(f"{where} has {rows} positions, not those of {expected} of patches{extra}; give a checkpoint that has")
    first = positions[:, :own] if own else torch.zeros_like(positions[:, :1])
    return first, positions[:, own:].transpose(1, 2).unflatten(2, rows_columns).contiguous()


def _renamed(name: str, beginnings: Mapping[str, str]) -> str:
    for begin, other in beginnings.items():
        if name.startswith(begin):
            return other + name.removeprefix(begin)
    return name


# ---- fitting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What of a checkpoint a network began with.

    Attributes:
        where: the checkpoint.
        layout: that it was in.
        fit: names that the network has and the checkpoint has not, which begin as the network was built; names that the checkpoint
            has and the network has not, which were left out.
        modalities: inputs that were found.
        new: inputs that the checkpoint does not know.
        outputs: decoders that were found.
        new_outputs: decoders or heads that the checkpoint does not know; all of them if they were not asked for.
        resized: positions that were interpolated to another grid.
    """

    where: str
    layout: Layout
    fit: Fit
    modalities: tuple[str, ...]
    new: tuple[str, ...]
    outputs: tuple[str, ...]
    new_outputs: tuple[str, ...]
    resized: tuple[str, ...]

    def __str__(self) -> str:
        parts = {
            "inputs found": self.modalities,
            "inputs that begin anew": self.new,
            "outputs found": self.outputs,
            "outputs that begin anew": self.new_outputs,
            "positions interpolated": self.resized,
        }
        return f"{self.where} ({self.layout}'s layout): the encoder; {listed(parts)}; {self.fit}"


def initialized_from(model: Trunk, path: str | Path, decoders: bool = False, grid: tuple[int, int] | None = None) -> Report:
    """Give a network the weights of a file: the encoder, the global tokens, and the adapters of the modalities that both have.

    Positions are interpolated where the grids differ; a file without any, such as a run's ``model.safetensors``, leaves the network
    its own, sines and cosines. (`fedvision export` writes a run's model with its positions, which matters if the run itself began with
    others, as timm's.) Where the network has a further class for what is not known and the file has not, its embedding is 0. What
    the file does not have begins as the network was built, which the report says, and the log.

    Args:
        model: overwritten, unless the file does not fit.
        path: MultiMAE's checkpoint, timm's, MAE's, or the model of a run; see ``checkpoints.read``.
        decoders: whether to go on with pre-training: decoders are taken too. If not, all ``output_adapters`` are left out.
        grid: rows and columns of the positions in timm's layout; a square if not given.

    Raises:
        ExperimentError: a file that cannot be read; an encoder of another size; adapters that both have and that differ; arrays that
            neither layout knows. The network is as it was.
    """
    where, state = str(path), checkpoints.read(path)
    layout = layout_of(state, where)
    converted = from_timm(state, grid, where) if layout == "timm" else Converted(state, ())
    return take(model, converted.state, where, decoders=decoders, layout=layout, dropped=converted.dropped)


def take(
    model: Trunk, state: Mapping[str, Tensor], where: str, *, decoders: bool, layout: Layout = "multimae", dropped: Iterable[str] = ()
) -> Report:
    """``initialized_from``, of a state dict in MultiMAE's layout.

    Args:
        model: overwritten, unless the weights do not fit.
        state: the weights.
        where: they are from, for messages.
        decoders: whether they are taken too.
        layout: that they were in, for the report.
        dropped: names that were left out already, for the report.

    Raises:
        ExperimentError: see there.
    """
    own = model.state_dict()
    wanted = (INPUTS, OUTPUTS) if decoders else (INPUTS,)
    left_out = [name for name in state if _adapter(name) and not (name.startswith(wanted) and _adapter(name) in _adapters(own))]
    given = {name: tensor for name, tensor in state.items() if name not in left_out}
    fitted = padded(resized_positions(given, own), model.modalities.values())
    fit = Fit.of(fitted, model)
    _check_fits(fit, {_adapter(name) for name in fitted}, where)
    check_finite(fitted, where)
    model.load_state_dict(fitted, strict=False)
    moved = [name for name in given if name.endswith(POSITIONS) and given[name].shape != fitted[name].shape]
    return _told(where, layout, fitted, own, moved, Fit(fit.missing, (*fit.unexpected, *left_out, *dropped), {}))


def resized_positions(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> State:
    """The weights, with positions on the grids of ``own``: those of inputs interpolated bicubically, of decoders bilinearly."""
    changed = dict(state)
    for name, positions in state.items():
        if name.endswith(POSITIONS) and name in own and positions.shape[:2] == own[name].shape[:2]:
            rows, columns = own[name].shape[2:]
            changed[name] = resized(positions.float(), (rows, columns), "bicubic" if name.startswith(INPUTS) else "bilinear")
    return changed


def padded(state: Mapping[str, Tensor], modalities: Iterable[Modality]) -> State:
    """The weights, with a row of zeros after a modality's embeddings where it is padded and they are not yet."""
    changed = dict(state)
    for modality in modalities:
        name = f"{INPUTS}{modality.name}.{EMBEDDING}"
        if modality.padded and name in state and len(state[name]) == modality.channels:
            changed[name] = torch.cat([state[name], torch.zeros_like(state[name][:1])])
    return changed


def _check_fits(fit: Fit, found: set[str], where: str) -> None:
    """Refuse a part of the encoder, or of an adapter that both have.

    Raises:
        ExperimentError: with file, name, shapes and remedy.
    """
    parts = [name for name in fit.missing if name.startswith(ENCODER) or _adapter(name) in found - {""}]
    without, further = (tuple(name for name in names if not _may_be_missing(name)) for names in (parts, fit.unexpected))
    Fit(without, further, fit.misshapen).check(where, _remedy, "as deep, with the same adapters")


def _may_be_missing(name: str) -> bool:
    """Positions, which the network has of its own, and what decoders know of modalities that only one side has."""
    return name.endswith(f".{POSITIONS}") or ".task_embeddings." in name


def _remedy(name: str, theirs: Shape, ours: Shape) -> str:
    """What to change so that an array has the shape that it has in the checkpoint."""
    if name.startswith(OUTPUTS):
        return "choose decoders of the size that they have there, or a file without output_adapters"
    if name.endswith(EMBEDDING):
        return f"choose {theirs[0]} classes with embeddings of {theirs[1]}, or give the modality another name"
    if ".proj." in name and name.startswith(INPUTS) and theirs[:1] == ours[:1]:
        return "choose the patch, the channels and the stride that this modality has there, or give it another name"
    return "choose the encoder's width, and the number of global tokens, that they are there"


def _told(where: str, layout: Layout, found: Mapping[str, Tensor], own: Mapping[str, Tensor], resized: Sequence[str], fit: Fit) -> Report:
    theirs, ours = _adapters(found), _adapters(own)

    def named(part: str, there: bool) -> tuple[str, ...]:
        return tuple(adapter.removeprefix(part) for adapter in ours if adapter.startswith(part) and (adapter in theirs) == there)

    inputs, outputs = ((named(part, True), named(part, False)) for part in (INPUTS, OUTPUTS))
    report = Report(where, layout, fit, *inputs, *outputs, resized=tuple(resized))
    log.log(logging.WARNING if report.new else logging.INFO, "%s", report)
    return report


def _adapter(name: str) -> str:
    """The adapter that an array belongs to, such as ``input_adapters.rgb``; empty if it belongs to none."""
    return ".".join(name.split(".")[:2]) if name.startswith((INPUTS, OUTPUTS)) else ""


def _adapters(state: Iterable[str]) -> list[str]:
    return [adapter for adapter in dict.fromkeys(map(_adapter, state)) if adapter]
