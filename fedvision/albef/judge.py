"""ALBEF's networks that judge a text by the picture, or the two pictures, that it is about."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedvision.albef.bert import Bert, Mask, TextSize, initialized
from fedvision.albef.model import COPY, Followed, check_widths
from fedvision.albef.vision import VisionSize, image_encoder
from fedvision.errors import ExperimentError
from fedvision.seeds import global_generators


class Judge(Followed):
    """Words look at pictures, and the first of them tells a class.

    Args:
        vision: size of the image encoder.
        text: size of the text network.
        rng: draws the weights.
        deviation: of the normal distribution that the text network's weights begin from.
        xavier: see ``image_encoder``.

    Attributes:
        classes: how many.
        pictures: how many a text is about.
    """

    followed = ("visual_encoder", "text_encoder", "cls_head")
    classes: ClassVar[int]
    pictures: ClassVar[int]
    visual_encoder: Any
    text_encoder: Any
    cls_head: Any

    def __init__(self, vision: VisionSize, text: TextSize, rng: torch.Generator, deviation: float = 0.02, xavier: bool = False) -> None:
        super().__init__()
        check_widths(vision, text)
        if text.paired != (self.pictures == 2):
            raise ExperimentError(f"layers that come in twos are for two pictures, this network judges texts about {self.pictures}")
        self.visual_encoder = image_encoder(vision, rng, xavier)
        with global_generators(rng):
            self.text_encoder = Bert(text)
            self.cls_head = nn.Sequential(nn.Linear(text.width, text.width), nn.ReLU(), nn.Linear(text.width, self.classes))
        initialized(self.text_encoder, rng, deviation)
        self.copied()

    def forward(self, pictures: Sequence[Float[Tensor, "b c h w"]], ids: Int[Tensor, "b n"], mask: Mask) -> Float[Tensor, "b classes"]:
        """Logits of the classes.

        Args:
            pictures: one batch, or two.
            ids: of the texts' tokens.
            mask: where there are tokens.
        """
        return self.judged(self.looked(pictures), ids, mask)

    @torch.no_grad()
    def teach(self, pictures: Sequence[Float[Tensor, "b c h w"]], ids: Int[Tensor, "b n"], mask: Mask) -> Float[Tensor, "b classes"]:
        """What the copies say."""
        return self.judged(self.looked(pictures, COPY), ids, mask, COPY)

    def looked(self, pictures: Sequence[Float[Tensor, "b c h w"]], suffix: str = "") -> Sequence[Float[Tensor, "b tokens width"]]:
        """Tokens of pictures.

        Args:
            pictures: one batch, or two.
            suffix: of the parts' names that do it: that of the copies, or none.
        """
        return getattr(self, f"visual_encoder{suffix}")(torch.cat(list(pictures))).chunk(len(pictures))  # type: ignore[no-any-return]

    def judged(
        self, tokens: Sequence[Float[Tensor, "b tokens width"]], ids: Int[Tensor, "b n"], mask: Mask, suffix: str = ""
    ) -> Float[Tensor, "b classes"]:
        """Logits of the classes of texts, from ``looked``."""
        read, tell = getattr(self, f"text_encoder{suffix}"), getattr(self, f"cls_head{suffix}")
        return tell(read(ids, mask, tokens)[:, 0])  # type: ignore[no-any-return]


class Entailment(Judge):
    """What a picture says of a text: it contradicts it (0), leaves it open (1), or entails it (2)."""

    classes = 3
    pictures = 1


class PairReasoning(Judge):
    """Whether a text is true (1) of two pictures; the text network's layers that look at them come in twos."""

    classes = 2
    pictures = 2
