"""The vision transformer alone, of whatever file it is in: what Leopart is judged by, without head, prototypes and teacher."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fedvision.checkpoints import Fit, Shape, check_finite
from fedvision.errors import ExperimentError
from fedvision.leopart.vision import VisionSize, VisionTransformer
from fedvision.leopart.weights import POSITIONS, TOKEN, opened, without

NORM = ("norm.weight", "norm.bias")
"""The last normalization, which MultiMAE's and MAE's transformers do not have."""

PARTS = (TOKEN, POSITIONS, "patch_embed.", "blocks.", *NORM)
"""What the names of a vision transformer's arrays begin with."""


def transformer(size: VisionSize, rng: torch.Generator, drop_path: float = 0.0, checkpoint: str | Path | None = None) -> VisionTransformer:
    """A vision transformer of this size, with the weights of a file if there is one.

    Its positions are those of the file, for as many patches as they were learned for; other pictures get interpolated ones.

    Args:
        size: of everything; of the side, if there is no file.
        rng: draws the weights.
        drop_path: see ``VisionTransformer``.
        checkpoint: a file of DINO, of timm, of MultiMAE, of Leopart, or the ``model.safetensors`` of a run.

    Raises:
        ExperimentError: a file that cannot be read, or without a vision transformer of this size; values that are not finite.
    """
    if checkpoint is None:
        return VisionTransformer(size, rng, drop_path)
    where, state = str(checkpoint), weights_of(checkpoint, size.side // size.patch)
    built = VisionTransformer(replace(size, side=_grid(state, where) * size.patch), rng, drop_path)
    fit = Fit.of(state, built)
    lost = tuple(name for name in fit.missing if not name.startswith(NORM)) if NORM[0] not in state else fit.missing
    Fit(lost, fit.unexpected, fit.misshapen).check(where, _remedy, "as deep")
    check_finite(state, where)
    built.load_state_dict(state, strict=False)
    return built


def weights_of(path: str | Path, side: int) -> dict[str, Tensor]:
    """The arrays of a file's vision transformer, by the names of timm's; the network's, where there is a teacher too.

    Args:
        path: see ``transformer``.
        side: rows and columns of the positions, where they are not in the file since they never changed.

    Raises:
        ExperimentError: a file that cannot be read, or without one.
    """
    state, begin, _ = opened(path, side)
    return {name: tensor for name, tensor in without(begin, state).items() if name.startswith(PARTS)}


def _grid(state: dict[str, Tensor], where: str) -> int:
    """Rows and columns of the patches that positions are for."""
    shape = tuple(state[POSITIONS].shape) if POSITIONS in state else ()
    side = math.isqrt(max(shape[1] - 1, 0)) if len(shape) == 3 else 0
    if not side or side**2 + 1 != shape[1]:
        raise ExperimentError(f"{where} has positions of shape {list(shape)}, not those of a class token and a square; give a ViT's file")
    return side


def _remedy(name: str, theirs: Shape, ours: Shape) -> str:
    """What to change so that an array has the shape that it has in the checkpoint."""
    if name.startswith("patch_embed") and theirs[:1] == ours[:1]:
        return "choose the learner.patch and the channels that it has there"
    return "choose the learner.networks that it was made with, or its learner.width and learner.depth"
