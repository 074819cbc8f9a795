"""The network of fine-tuning: all patches of the modalities that there are, and heads."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedvision.data.examples import IGNORED
from fedvision.multimae.heads import Encoded, Head
from fedvision.multimae.losses import known
from fedvision.multimae.modalities import Modality
from fedvision.multimae.model import Size, Trunk, spans_of

CLS_HEAD, SEMSEG_HEAD, DEPTH_HEAD = "cls", "semseg", "depth"
"""The names of heads in published checkpoints."""


class MultiViT(Trunk):
    """The trunk of MultiMAE, of which nothing is masked, and heads of it.

    An example of which nothing is known of some modality is encoded without its patches, unless a head reads them, for which an
    unknown value is the mean one. What is predicted for an example thus does not depend on what the others of its batch have.

    Args:
        modalities: that it takes.
        heads: by name, as ``cls``, ``semseg`` or ``depth``.
        size: of the encoder.
        patch: pixels a side.
        grid: rows and columns of patches that positions are made for; inputs of other sizes get interpolated ones.
        global_tokens: that come after those of the patches.
        drop_path: rate of stochastic depth in the last block, growing linearly from 0 in the first.

    Source: arXiv 2204.01678, section 3.4 and appendix.
    """

    def __init__(
        self,
        modalities: Sequence[Modality],
        heads: Mapping[str, Head],
        size: Size,
        patch: int,
        grid: tuple[int, int],
        global_tokens: int = 1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(modalities, size, patch, grid, global_tokens, drop_path)
        self.output_adapters = nn.ModuleDict(heads)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "b channels ..."]]:
        """What each head predicts.

        Args:
            inputs: by modality, as the network sees them: values [b, channels, h, w], NaN where unknown; classes [b, h, w], 255.

        Raises:
            DataError: nothing, unknown modalities, or sizes that do not fit together.
        """
        grid = self.grid(inputs)
        given = {**inputs, **{name: self._unknown(name, grid, inputs) for name in self._read if name not in inputs}}
        groups = self._groups(given)
        if len(groups) == 1:
            return self._predicted({name: given[name] for name in groups[0][0]}, grid)
        parts = [self._predicted({name: given[name][index] for name in names}, grid) for names, index in groups]
        back = torch.cat([index for _, index in groups]).argsort()
        return {name: torch.cat([part[name] for part in parts])[back] for name in self.output_adapters}

    def _predicted(self, inputs: Mapping[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
        """What each head predicts from the patches of all these."""
        tokens = self.tokens(inputs)
        heads: Mapping[str, Head] = self.output_adapters  # type: ignore[assignment]
        wanted = sorted({tap for head in heads.values() for tap in self._taps(head)})
        layers = dict(zip(wanted, self.tapped(torch.cat(list(tokens.values()), dim=1), wanted), strict=True))
        spans, size = spans_of(tokens), (grid[0] * self.patch, grid[1] * self.patch)
        return {name: head(Encoded([layers[tap] for tap in self._taps(head)], spans, grid, size)) for name, head in heads.items()}

    def _taps(self, head: Head) -> tuple[int, ...]:
        return head.taps or (len(self.encoder) - 1,)

    @property
    def _read(self) -> list[str]:
        """The modalities that some head reads, in their order."""
        read = {name for head in self.output_adapters.values() for name in head.reads}  # type: ignore[union-attr]
        return [name for name in self.modalities if name in read]

    def _unknown(self, name: str, grid: tuple[int, int], like: Mapping[str, Tensor]) -> Tensor:
        """Values of a modality of which nothing is known."""
        modality, any_of_them = self.modalities[name], next(iter(like.values()))
        sides = [side * modality.cell(self.patch) for side in grid]
        if modality.kind == "classes":
            return torch.full((len(any_of_them), *sides), IGNORED, device=any_of_them.device)
        return torch.full((len(any_of_them), modality.channels, *sides), torch.nan, device=any_of_them.device)

    def _groups(self, inputs: Mapping[str, Tensor]) -> list[tuple[list[str], Int[Tensor, "_"]]]:
        """The examples whose patches are of the same modalities: these, and the examples' indices."""
        there = torch.stack([known(values).flatten(1).any(1) for values in inputs.values()], dim=1)
        there = there | ~there.any(1, keepdim=True) | torch.tensor([name in self._read for name in inputs], device=there.device)
        patterns, which = there.unique(dim=0, return_inverse=True)
        named = [[name for name, shown in zip(inputs, pattern, strict=True) if shown] for pattern in patterns.tolist()]
        return [(names, (which == number).nonzero()[:, 0]) for number, names in enumerate(named)]
