"""The networks: a trunk that encodes tokens of any modalities, and the autoencoder that predicts what it was not shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedvision.errors import DataError, ExperimentError
from fedvision.multimae.adapters import PatchAdapter, input_adapter
from fedvision.multimae.decoders import DecoderSize, SpatialDecoder
from fedvision.multimae.modalities import RGB_NAME, Modality
from fedvision.multimae.transformer import block

NORM_RGB = "norm_rgb"
"""The further decoder whose target is rgb with every patch standardized."""


@dataclass(frozen=True)
class Size:
    """Of a transformer.

    Attributes:
        width: of a token, a multiple of 4 and of ``heads``.
        depth: number of blocks.
        heads: of each.
    """

    width: int
    depth: int
    heads: int

    def __post_init__(self) -> None:
        if self.width % 4 or self.width % self.heads:
            raise ExperimentError(f"{self.heads} heads and a width of {self.width}: choose a width that 4 and the heads divide")


SIZES = {"tiny": Size(64, 3, 4), "base": Size(768, 12, 12), "large": Size(1024, 24, 16)}
"""Encoders by name: of small runs, and the paper's ViT-B and ViT-L."""


class Trunk(nn.Module):
    """What all networks of MultiMAE share: adapters of modalities, global tokens, an encoder without a last normalization.

    Args:
        modalities: that it can take.
        size: of the encoder.
        patch: pixels a side.
        grid: rows and columns of patches that positions are made for; inputs of other sizes get interpolated ones.
        global_tokens: that come after those of the patches, without a position.
        drop_path: rate of stochastic depth in the last block, growing linearly from 0 in the first.
    """

    def __init__(
        self,
        modalities: Sequence[Modality],
        size: Size,
        patch: int,
        grid: tuple[int, int],
        global_tokens: int = 1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.modalities = {modality.name: modality for modality in modalities}
        self.patch, self.width = patch, size.width
        self.global_tokens = nn.Parameter(torch.zeros(1, global_tokens, size.width))
        self.input_adapters = nn.ModuleDict({m.name: input_adapter(m, patch, size.width, grid) for m in modalities})
        rates = (drop_path * block / max(size.depth - 1, 1) for block in range(size.depth))
        self.encoder = nn.Sequential(*(block(size.width, size.heads, drop_path=rate) for rate in rates))

    def tokens(self, inputs: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "b n width"]]:
        """Tokens of each modality that is given, one a patch, row by row.

        Raises:
            DataError: sizes that are no multiple of the patch, or that do not belong together.
        """
        self.grid(inputs)
        adapters: Mapping[str, PatchAdapter] = self.input_adapters  # type: ignore[assignment]
        return {name: adapters[name](values) for name, values in inputs.items()}

    def encoded(self, tokens: Float[Tensor, "b n width"]) -> Float[Tensor, "b m width"]:
        """The tokens after the last block, the global ones at the end."""
        return self.encoder(self._begun(tokens))  # type: ignore[no-any-return]

    def tapped(self, tokens: Float[Tensor, "b n width"], blocks: Sequence[int]) -> list[Float[Tensor, "b m width"]]:
        """The tokens after each of some blocks, counted from 0."""
        x, after = self._begun(tokens), {}
        for number, layer in enumerate(self.encoder):
            x = layer(x)
            if number in blocks:
                after[number] = x
        return [after[number] for number in blocks]

    def grid(self, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
        """Rows and columns of patches of these inputs.

        Raises:
            DataError: sizes that are no multiple of the patch, or that do not belong together.
        """
        grids = {name: self._grid(name, values) for name, values in inputs.items()}
        if len(set(grids.values())) != 1:
            found = ", ".join(f"{name} {rows} x {columns}" for name, (rows, columns) in grids.items()) or "nothing"
            raise DataError(f"the modalities do not cover the same patches: {found}; give maps of the picture's size")
        return next(iter(grids.values()))

    def _grid(self, name: str, values: Tensor) -> tuple[int, int]:
        if name not in self.modalities:
            raise DataError(f"the network has no modality {name!r}, only {', '.join(self.modalities)}; give those")
        cell, (height, width) = self.modalities[name].cell(self.patch), values.shape[-2:]
        if height % cell or width % cell:
            fact = f"{name} is {height} x {width}, which patches of {cell} x {cell} values do not fill"
            raise DataError(f"{fact}; choose a size that the patch divides")
        return height // cell, width // cell

    def _begun(self, tokens: Float[Tensor, "b n width"]) -> Float[Tensor, "b m width"]:
        return torch.cat([tokens, self.global_tokens.expand(len(tokens), -1, -1)], dim=1)


class Autoencoder(Trunk):
    """The network of pre-training: from the visible patches of some modalities to all patches of all.

    Args:
        modalities: that it takes.
        outputs: that it predicts.
        size: of the encoder.
        decoder: of each decoder.
        patch: pixels a side.
        grid: rows and columns of patches that positions are made for.
        normalized_rgb: whether a further decoder predicts rgb with each patch standardized.
        global_tokens: of the encoder.
    """

    def __init__(
        self,
        modalities: Sequence[Modality],
        outputs: Sequence[Modality],
        size: Size,
        decoder: DecoderSize,
        patch: int,
        grid: tuple[int, int],
        normalized_rgb: bool = True,
        global_tokens: int = 1,
    ) -> None:
        super().__init__(modalities, size, patch, grid, global_tokens)
        predicted = {modality.name: modality for modality in outputs}
        if normalized_rgb and RGB_NAME in predicted:
            predicted[NORM_RGB] = predicted[RGB_NAME]
        shape = (size.width, decoder, patch, grid)
        decoders = {name: SpatialDecoder(modality, self.modalities, *shape) for name, modality in predicted.items()}
        self.output_adapters = nn.ModuleDict(decoders)

    def forward(
        self, inputs: Mapping[str, Tensor], visible: Int[Tensor, "b k"] | None = None, outputs: Sequence[str] | None = None
    ) -> dict[str, Float[Tensor, "b channels h w"]]:
        """Predictions by name.

        Args:
            inputs: by modality, as the network sees them: values [b, channels, h, w], NaN where unknown; classes [b, h, w], 255.
            visible: which patches the encoder sees: indices into those of all inputs, in their order; all if not given.
            outputs: which decoders; all if not given.
        """
        tokens, grid = self.tokens(inputs), self.grid(inputs)
        together = torch.cat(list(tokens.values()), dim=1)
        if visible is None:
            visible = torch.arange(together.shape[1], device=together.device).expand(len(together), -1)
        seen = together.gather(1, visible[..., None].expand(-1, -1, self.width))
        encoded, spans = self.encoded(seen), spans_of(tokens)
        wanted = self.output_adapters if outputs is None else outputs
        return {name: self.output_adapters[name](encoded, visible, spans, grid) for name in wanted}


def spans_of(tokens: Mapping[str, Tensor]) -> dict[str, slice]:
    """Where each modality's tokens [b, n, width] are once they are put one after the other."""
    ends = accumulate((values.shape[1] for values in tokens.values()), initial=0)
    return {name: slice(*span) for name, span in zip(tokens, pairwise(ends), strict=True)}
