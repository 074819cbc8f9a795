"""Input adapters: how the values of a modality become tokens."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedvision.data.examples import IGNORED
from fedvision.multimae.modalities import Modality
from fedvision.multimae.positions import by_place, resized, sincos


class PatchAdapter(nn.Module):
    """Tokens of continuous values: each patch projected, plus its position.

    Args:
        modality: whose they are.
        patch: pixels a side.
        width: of a token.
        grid: rows and columns that positions are made for; others are interpolated, bicubically.
    """

    mode = "bicubic"

    def __init__(self, modality: Modality, patch: int, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        cell = modality.cell(patch)
        self.proj: nn.Module = nn.Conv2d(modality.channels, width, cell, cell)
        self.pos_emb = nn.Parameter(sincos(*grid, width), requires_grad=False)

    def forward(self, values: Float[Tensor, "b channels h w"]) -> Float[Tensor, "b n width"]:
        """One token a patch, row by row; a value that is not known (NaN) counts as 0, the mean of standardized ones."""
        return self._placed(self.proj(values.nan_to_num(0.0)))

    def _placed(self, tokens: Float[Tensor, "b width rows columns"]) -> Float[Tensor, "b n width"]:
        rows, columns = tokens.shape[2:]
        return by_place(tokens) + by_place(resized(self.pos_emb, (rows, columns), self.mode))


class ClassAdapter(PatchAdapter):
    """Tokens of a map of classes: each class embedded, each patch of embeddings projected, plus its position.

    Args:
        modality: whose they are.
        patch: pixels a side.
        width: of a token.
        grid: rows and columns that positions are made for; others are interpolated, bilinearly.
    """

    mode = "bilinear"

    def __init__(self, modality: Modality, patch: int, width: int, grid: tuple[int, int]) -> None:
        super().__init__(modality, patch, width, grid)
        self.classes, cell = modality.channels, modality.cell(patch)
        options: dict[str, Any] = {"padding_idx": self.classes} if modality.padded else {}
        self.class_emb = nn.Embedding(self.classes + modality.padded, modality.embedding, **options)
        if modality.interpolated:
            self.proj = nn.Sequential(nn.Upsample(scale_factor=1 / cell, mode="bilinear"), nn.Conv2d(modality.embedding, width, 1))
        else:
            self.proj = nn.Conv2d(modality.embedding, width, cell, cell)

    def forward(self, ids: Int[Tensor, "b h w"]) -> Float[Tensor, "b n width"]:  # type: ignore[override]
        """One token a patch; where the class is not known (255), its embedding is the padding's, and 0 without one."""
        known = ids != IGNORED
        if self.class_emb.padding_idx is not None:
            embedded = self.class_emb(torch.where(known, ids, self.classes))
        else:
            embedded = self.class_emb(torch.where(known, ids, 0)) * known[..., None]
        return self._placed(self.proj(embedded.permute(0, 3, 1, 2)))


def input_adapter(modality: Modality, patch: int, width: int, grid: tuple[int, int]) -> PatchAdapter:
    """The adapter of a modality."""
    return (ClassAdapter if modality.kind == "classes" else PatchAdapter)(modality, patch, width, grid)
