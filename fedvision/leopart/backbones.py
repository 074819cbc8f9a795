"""The vision transformer alone, of whatever file it is in: what Leopart is judged by, without head, prototypes and teacher."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fedvision import checkpoints
from fedvision.checkpoints import WRAPPERS, Fit, Shape, check_finite
from fedvision.errors import ExperimentError
from fedvision.leopart.vision import VisionSize, VisionTransformer

TOKEN, POSITIONS = "cls_token", "pos_embed"

PARTS = (TOKEN, POSITIONS, "patch_embed.", "blocks.", "norm.")
"""What the names of a vision transformer's arrays begin with."""

TEACHER = "teacher."
"""What stands before them where there is a better one."""


def transformer(size: VisionSize, rng: torch.Generator, drop_path: float = 0.0, checkpoint: str | Path | None = None) -> VisionTransformer:
    """A vision transformer of this size, with the weights of a file if there is one.

    Its positions are those of the file, for as many patches as they were learned for; other pictures get interpolated ones.

    Args:
        size: of everything; of the side, if there is no file.
        rng: draws the weights.
        drop_path: see ``VisionTransformer``.
        checkpoint: a file of DINO, of timm, of Leopart, or a run's ``model.safetensors``.

    Raises:
        ExperimentError: a file that cannot be read, or without a vision transformer of this size; values that are not finite.
    """
    if checkpoint is None:
        return VisionTransformer(size, rng, drop_path)
    where, state = str(checkpoint), weights_of(checkpoint)
    built = VisionTransformer(replace(size, side=_grid(state, where) * size.patch), rng, drop_path)
    Fit.of(state, built).check(where, _remedy, "as deep")
    check_finite(state, where)
    built.load_state_dict(state)
    return built


def weights_of(path: str | Path) -> dict[str, Tensor]:
    """The arrays of a file's vision transformer, by the names of timm's; the network's, where there is a teacher too.

    Raises:
        ExperimentError: a file that cannot be read, or without one.
    """
    state = checkpoints.read(path, ("teacher", *WRAPPERS))
    begins = [name.removesuffix(TOKEN) for name in state if name == TOKEN or name.endswith(f".{TOKEN}")]
    if not begins:
        found = ", ".join(list(state)[:5])
        fact = f"{path} holds {found}, ..., no {TOKEN}, which vision transformers have"
        raise ExperimentError(
            f"{fact}; give a file of DINO, timm or Leopart (a run whose transformer was frozen has written its head alone)"
        )
    begin = min(begins, key=lambda begin: (begin == TEACHER, len(begin)))
    inside = {name.removeprefix(begin): tensor for name, tensor in state.items() if name.startswith(begin)}
    return {name: tensor for name, tensor in inside.items() if name.startswith(PARTS)}


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
