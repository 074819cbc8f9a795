"""Decoders: how the tokens that the encoder saw become a prediction of one whole modality."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedvision.multimae.modalities import Modality
from fedvision.multimae.positions import by_place, resized, sincos
from fedvision.multimae.transformer import CrossAttention, LayerNorm, block, perceptron

Spans = Mapping[str, slice]
"""Where the tokens of each input modality are among all tokens."""


@dataclass(frozen=True)
class DecoderSize:
    """Of a decoder.

    Attributes:
        width: of a token, a multiple of 4 and of ``heads``.
        depth: number of blocks after the cross-attention.
        heads: of every attention.
    """

    width: int = 256
    depth: int = 2
    heads: int = 8


class SpatialDecoder(nn.Module):
    """The decoder of one modality: its tokens, or mask tokens in their stead, look at what was encoded.

    Args:
        modality: that it predicts.
        inputs: names of the modalities that it may look at.
        encoded: width of the encoder's tokens.
        size: of its own.
        patch: pixels a side.
        grid: rows and columns that positions are made for; others are interpolated, bilinearly.

    Source: arXiv 2204.01678, section 3.3. Differs: as in its public implementation, queries are not added to what they gather.
    """

    def __init__(
        self, modality: Modality, inputs: Collection[str], encoded: int, size: DecoderSize, patch: int, grid: tuple[int, int]
    ) -> None:
        super().__init__()
        self.name, self.channels, self.cell = modality.name, modality.channels, modality.cell(patch)
        width, heads = size.width, size.heads
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_emb = nn.Parameter(sincos(*grid, width), requires_grad=False)
        self.task_embeddings = nn.ParameterDict({name: torch.zeros(1, 1, width) for name in inputs})
        self.proj_context = nn.Linear(encoded, width)
        self.query_norm, self.context_norm, self.out_norm = LayerNorm(width), LayerNorm(width), LayerNorm(width)
        self.decoder, self.mlp = CrossAttention(width, heads), perceptron(width)
        self.decoder_transformer = nn.Sequential(*(block(width, heads) for _ in range(size.depth)))
        self.out_proj = nn.Linear(width, self.channels * self.cell**2)

    def forward(
        self, encoded: Float[Tensor, "b m encoded"], visible: Int[Tensor, "b k"], spans: Spans, grid: tuple[int, int]
    ) -> Float[Tensor, "b channels h w"]:
        """The prediction of every patch, visible or not.

        Args:
            encoded: the encoder's tokens: those of the visible patches, then the global ones.
            visible: which of all patches they are.
            spans: of the modalities that were given.
            grid: rows and columns of patches.
        """
        queries, context = self.looking(encoded, visible, spans, grid)
        x = self.decoder(self.query_norm(queries), self.context_norm(context))
        x = x + self.mlp(self.out_norm(x))
        return self._folded(self.out_proj(self.decoder_transformer(x)), grid)

    def looking(
        self, encoded: Float[Tensor, "b m encoded"], visible: Int[Tensor, "b k"], spans: Spans, grid: tuple[int, int]
    ) -> tuple[Float[Tensor, "b n width"], Float[Tensor, "b m width"]]:
        """Queries, one a patch of the own modality, and the context that they look at, both not normalized yet."""
        places = by_place(resized(self.pos_emb, grid, "bilinear"))
        own = places + self.task_embeddings[self.name] if self.name in self.task_embeddings else places
        marks = torch.cat([self._marked(places, name) for name in spans], dim=1)
        patches, context = self.proj_context(encoded).tensor_split([visible.shape[1]], dim=1)
        index = visible[..., None].expand(-1, -1, patches.shape[2])
        seen = patches + marks.expand(len(visible), -1, -1).gather(1, index)
        if self.name in spans:
            everywhere = (self.mask_token + marks).expand(len(visible), -1, -1).scatter(1, index, seen)
            queries = everywhere[:, spans[self.name]]
        else:
            queries = (self.mask_token + own).expand(len(visible), -1, -1)
        return queries, torch.cat([seen, context], dim=1)

    def _marked(self, places: Float[Tensor, "1 n width"], name: str) -> Float[Tensor, "1 n width"]:
        """Positions with the embedding of an input modality, if there is one."""
        return places + self.task_embeddings[name] if name in self.task_embeddings else places

    def _folded(self, patches: Float[Tensor, "b n values"], grid: tuple[int, int]) -> Float[Tensor, "b channels h w"]:
        parts = patches.unflatten(2, (self.channels, self.cell, self.cell)).unflatten(1, grid)
        return parts.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # type: ignore[no-any-return]
