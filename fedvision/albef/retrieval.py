"""ALBEF's network that finds texts for images and images for texts, where several texts may belong to one image."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedvision.albef.bert import Mask
from fedvision.albef.model import Choose, Contrastive, Seen, Taught

NOTHING = -100
"""The number of an image where a queue holds none yet."""


class Retrieval(Contrastive):
    """``Contrastive`` that also remembers which image each feature of the queue belongs to.

    Loaded from a network that did not, its queue belongs to no image.
    """

    idx_queue: Tensor

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register_buffer("idx_queue", torch.full((1, self.image_queue.shape[1]), NOTHING))

    @torch.no_grad()
    def teach(self, images: Float[Tensor, "b c h w"], ids: Int[Tensor, "b n"], mask: Mask) -> Taught:
        """What the copies say of a batch."""
        slow = self.encoded_slowly(images, ids, mask)
        return Taught(slow.image, slow.text, None)

    def forward(self, images: Float[Tensor, "b c h w"], ids: Int[Tensor, "b n"], mask: Mask, choose: Choose, taught: Taught | None) -> Seen:
        """What the losses of a batch are computed from.

        Args:
            images: as the network expects them.
            ids: of the texts' tokens.
            mask: where there are tokens.
            choose: pairs that do not match.
            taught: from ``teach``; None: features are not compared.
        """
        seen = self.encoded(images, ids, mask)
        own, advice = self.compared(seen, taught)
        inside = (None, None) if own is None else tuple(each[:, : len(ids)] for each in own)
        return Seen(own, advice, self.matches(seen, mask, choose(*inside)))

    def positive(self, numbers: Int[Tensor, "b"]) -> Bool[Tensor, "b c"]:
        """Which candidates, those of the batch and those of the queue, are of the same image.

        Args:
            numbers: of the batch's images, at least 0.
        """
        return numbers[:, None] == torch.cat([numbers, self.idx_queue[0]])

    @torch.no_grad()
    def remember(self, image: Float[Tensor, "b features"], text: Float[Tensor, "b features"], numbers: Int[Tensor, "b"]) -> None:
        """``enqueue`` features and the numbers of their images."""
        places = self.enqueue(image, text)
        self.idx_queue[0, places] = numbers[-len(places) :]
