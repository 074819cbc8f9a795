"""Text assignment, which prepares ALBEF for texts about two pictures: which of the two is the text of, or is it of neither.

b = pictures of a batch, each with a text.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fedvision.albef.bert import Bert, Mask, TextSize, initialized
from fedvision.albef.losses import negative_weights
from fedvision.albef.model import check_widths
from fedvision.albef.vision import VisionSize, image_encoder
from fedvision.errors import ExperimentError
from fedvision.seeds import global_generators

FIRST, SECOND, NEITHER = 0, 1, 2
"""Whose text it is."""

LEAST = 1e-20
"""The least weight of a picture that may be drawn."""


class Assigned(NamedTuple):
    """Two pictures for each text of a batch, by their indices, and whose text it is."""

    first: Int[Tensor, "b"]
    second: Int[Tensor, "b"]
    truth: Int[Tensor, "b"]


def assigned(neither: Bool[Tensor, "b"], second: Bool[Tensor, "b"], others: Int[Tensor, "b 2"]) -> Assigned:
    """Pictures as draws say.

    Args:
        neither: the texts that neither of their two pictures is to be of.
        second: of the rest, the texts whose own picture is the second one.
        others: for each text two other pictures; the first is the one beside its own.

    >>> assigned(torch.tensor([True, False]), torch.tensor([False, True]), torch.tensor([[1, 2], [0, 2]]))
    Assigned(first=tensor([1, 0]), second=tensor([2, 1]), truth=tensor([2, 1]))
    """
    own = torch.arange(len(neither), device=neither.device)
    first = torch.where(neither | second, others[:, 0], own)
    beside = torch.where(second, own, others[:, 0])
    truth = torch.where(neither, NEITHER, torch.where(second, SECOND, FIRST))
    return Assigned(first, torch.where(neither, others[:, 1], beside), truth)


def drawn_assignment(weights: Float[Tensor, "b b"], rng: torch.Generator) -> Assigned:
    """A third of the texts get neither their own picture, the rest their own first or second, as often.

    Args:
        weights: how likely each picture is drawn for each text, at least 0; never its own.
        rng: for all draws.

    Raises:
        ExperimentError: a batch of fewer than three, where there are no two other pictures.
    """
    b = len(weights)
    if b < 3:
        raise ExperimentError(f"text assignment needs two other pictures for each text, the batch has {b}; make batches larger")
    neither, second = torch.rand(b, generator=rng) <= 1 / 3, torch.rand(b, generator=rng) <= 1 / 2
    possible = weights.cpu().clamp(min=LEAST).fill_diagonal_(0.0)
    others = torch.multinomial(possible, 2, generator=rng)
    return assigned(*(draw.to(weights.device) for draw in (neither, second, others)))


class Assignment(nn.Module):
    """The network of text assignment: that of ``PairReasoning`` with another head, and projections that tell which pictures are alike.

    Args:
        vision: size of the image encoder.
        text: size of the text network, whose layers that look at pictures come in twos.
        features: numbers of a feature.
        rng: draws the weights.
        temperature: that similarities are divided by.
        deviation: of the normal distribution that the text network's weights begin from.
        xavier: see ``image_encoder``.

    ``temp`` and ``text_proj`` are kept for what comes after, and take no part.
    """

    visual_encoder: Any
    text_encoder: Any

    def __init__(
        self,
        vision: VisionSize,
        text: TextSize,
        features: int,
        rng: torch.Generator,
        temperature: float = 0.07,
        deviation: float = 0.02,
        xavier: bool = False,
    ) -> None:
        super().__init__()
        check_widths(vision, text)
        if not text.paired:
            raise ExperimentError("text assignment needs layers that come in twos; set TextSize.paired")
        self.temperature = temperature
        self.visual_encoder = image_encoder(vision, rng, xavier)
        with global_generators(rng):
            self.text_encoder = Bert(text)
            self.vision_proj, self.text_proj = nn.Linear(vision.width, features), nn.Linear(text.width, features)
            self.ta_head = nn.Linear(text.width, 3)
        initialized(self.text_encoder, rng, deviation)
        self.temp = nn.Parameter(torch.tensor(temperature))
        for unused in (self.temp, *self.vision_proj.parameters(), *self.text_proj.parameters()):
            unused.requires_grad_(False)

    def forward(
        self, images: Float[Tensor, "b c h w"], ids: Int[Tensor, "b n"], mask: Mask, choose: Callable[[Float[Tensor, "b b"]], Assigned]
    ) -> tuple[Float[Tensor, "b 3"], Int[Tensor, "b"]]:
        """Logits of whose text it is, and the truth.

        Args:
            images: as the network expects them.
            ids: of the texts' tokens.
            mask: where there are tokens.
            choose: from how likely each picture is drawn for each text, the pictures that each is shown.
        """
        tokens = self.visual_encoder(images)
        first, second, truth = choose(self._alike(tokens))
        fused = self.text_encoder(ids, mask, [tokens[first], tokens[second]])
        return self.ta_head(fused[:, 0]), truth

    @torch.no_grad()
    def _alike(self, tokens: Float[Tensor, "b tokens width"]) -> Float[Tensor, "b b"]:
        """Of each picture the softmax of its likeness to all, but 0 to itself."""
        feature = F.normalize(self.vision_proj(tokens[:, 0]), dim=-1)
        own = torch.eye(len(tokens), device=tokens.device).bool()
        return negative_weights(feature @ feature.mT / self.temperature, own)
