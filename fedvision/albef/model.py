"""ALBEF's networks: an image encoder and a text encoder whose features are compared, and words that look at the image.

Names and shapes of weights are those of the published checkpoints; parts whose names end in ``_m`` follow those without it.
"""

import copy
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fedvision import ema
from fedvision.albef.bert import Bert, Mask, TextSize, WordModel, initialized
from fedvision.albef.losses import Negatives
from fedvision.albef.vision import VisionSize, image_encoder
from fedvision.errors import ExperimentError
from fedvision.seeds import global_generators

TEMPERATURES = (0.001, 0.5)
"""The least and the most that pre-training allows."""

COPY = "_m"
"""What the names of slowly moving copies end with."""

Choose = Callable[[Tensor | None, Tensor | None], tuple[Negatives, Negatives]]
"""From the similarities of a batch, images to texts and texts to images [b, b], divided by the temperature (None if they are not
compared): for texts an image each that does not match, and for images a text each."""


class Followed(nn.Module):
    """A network of which some parts have a slowly moving copy, called as they are with ``_m`` behind.

    Attributes:
        followed: names of the parts.
    """

    followed: ClassVar[tuple[str, ...]]

    def copied(self) -> None:
        """Make the copies; they are not trained."""
        for name in self.followed:
            setattr(self, f"{name}{COPY}", copy.deepcopy(getattr(self, name)).requires_grad_(False))

    @property
    def has_copies(self) -> bool:
        """Whether there are copies."""
        return hasattr(self, f"{self.followed[0]}{COPY}")

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the copies' weights: ``copy <- decay copy + (1 - decay) part``; 0: put them where the parts are."""
        for name in self.followed:
            ema.follow(getattr(self, f"{name}{COPY}"), getattr(self, name), decay)


def check_widths(vision: VisionSize, text: TextSize) -> None:
    """Refuse a text network that looks at tokens of another width than the images' are.

    Raises:
        ExperimentError: such sizes.
    """
    if text.context != vision.width:
        raise ExperimentError(f"the text network looks at tokens of width {text.context}, the images' have {vision.width}; make them equal")


class Features(NamedTuple):
    """What the two encoders say of a batch: all tokens, and a vector of length 1 for each image and each text."""

    images: Float[Tensor, "b tokens width"]
    texts: Float[Tensor, "b n width"]
    image: Float[Tensor, "b features"]
    text: Float[Tensor, "b features"]


class Taught(NamedTuple):
    """What the slowly moving copies say of a batch: its features, and, of masked words, the last vectors."""

    image: Float[Tensor, "b features"]
    text: Float[Tensor, "b features"]
    words: Float[Tensor, "b n width"] | None


class Similarities(NamedTuple):
    """Of each image to all texts and of each text to all images, those of the batch first, divided by the temperature [b, b + queue]."""

    image_to_text: Float[Tensor, "b c"]
    text_to_image: Float[Tensor, "b c"]


class Seen(NamedTuple):
    """What the losses are computed from.

    Attributes:
        own: similarities of the batch's features; None if they are not compared.
        taught: those of the features that the copies gave it.
        matches: logits of pairs, those that match first, as many as examples.
        words: logits of the words that are to be predicted; None if none ever is.
        taught_words: the copies' logits of them.
    """

    own: Similarities | None
    taught: Similarities | None
    matches: Float[Tensor, "pairs 2"]
    words: Float[Tensor, "words vocabulary"] | None = None
    taught_words: Float[Tensor, "words vocabulary"] | None = None


class Contrastive(Followed):
    """Two encoders whose features are compared with those of a batch and of a queue, and a head that says whether a pair matches.

    Args:
        vision: size of the image encoder.
        text: size of the text network.
        features: numbers of a feature.
        queue: features that are remembered of images, and as many of texts.
        temperature: to begin with.
        rng: draws the weights and the queue.
        deviation: of the normal distribution that the text network's weights begin from.
        xavier: see ``image_encoder``.
    """

    followed = ("visual_encoder", "vision_proj", "text_encoder", "text_proj")
    visual_encoder: Any
    visual_encoder_m: Any
    text_encoder: Any
    text_encoder_m: Any
    vision_proj_m: Any
    text_proj_m: Any
    image_queue: Tensor
    text_queue: Tensor
    queue_ptr: Tensor

    def __init__(
        self,
        vision: VisionSize,
        text: TextSize,
        features: int,
        queue: int,
        rng: torch.Generator,
        temperature: float = 0.07,
        deviation: float = 0.02,
        xavier: bool = False,
    ) -> None:
        super().__init__()
        check_widths(vision, text)
        self.visual_encoder = image_encoder(vision, rng, xavier)
        with global_generators(rng):
            self.text_encoder = self._text_encoder(text)
            self.vision_proj, self.text_proj = nn.Linear(vision.width, features), nn.Linear(text.width, features)
            self.itm_head = nn.Linear(text.width, 2)
        initialized(self.text_encoder, rng, deviation)
        self.temp = nn.Parameter(torch.tensor(temperature))
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, F.normalize(torch.randn(features, queue, generator=rng), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        self.copied()

    @staticmethod
    def _text_encoder(size: TextSize) -> nn.Module:
        return Bert(size)

    @staticmethod
    def reader(encoder: nn.Module) -> Bert:
        """The text network within ``text_encoder``, or its copy."""
        return encoder.bert if isinstance(encoder, WordModel) else encoder  # type: ignore[return-value]

    # ---- features ------------------------------------------------------------------------------------------------

    def encoded(self, images: Float[Tensor, "b c h w"], ids: Int[Tensor, "b n"], mask: Mask) -> Features:
        """What the encoders say."""
        tokens, words = self.visual_encoder(images), self.reader(self.text_encoder).read(ids, mask)
        return Features(tokens, words, self.image_feature(tokens), self.text_feature(words))

    def image_feature(self, tokens: Float[Tensor, "b tokens width"]) -> Float[Tensor, "b features"]:
        """What images are compared by."""
        return _unit(self.vision_proj, tokens)

    def text_feature(self, words: Float[Tensor, "b n width"]) -> Float[Tensor, "b features"]:
        """What texts are compared by."""
        return _unit(self.text_proj, words)

    @torch.no_grad()
    def encoded_slowly(self, images: Float[Tensor, "b c h w"], ids: Int[Tensor, "b n"], mask: Mask) -> Features:
        """What their copies say."""
        tokens, words = self.visual_encoder_m(images), self.reader(self.text_encoder_m).read(ids, mask)
        return Features(tokens, words, _unit(self.vision_proj_m, tokens), _unit(self.text_proj_m, words))

    def similarities(self, image: Float[Tensor, "b features"], text: Float[Tensor, "b features"], taught: Taught) -> Similarities:
        """Of features to those that the copies gave this batch and, from the queue, earlier ones."""
        texts, images = torch.cat([taught.text.mT, self.text_queue], 1), torch.cat([taught.image.mT, self.image_queue], 1)
        return Similarities(image @ texts / self.temp, text @ images / self.temp)

    @torch.no_grad()
    def enqueue(self, image: Float[Tensor, "b features"], text: Float[Tensor, "b features"]) -> Int[Tensor, "kept"]:
        """Remember features in place of the oldest; of more than the queue holds the last. Returns the places."""
        kept = min(len(image), self.image_queue.shape[1])
        places = (self.queue_ptr + torch.arange(kept, device=self.queue_ptr.device)) % self.image_queue.shape[1]
        self.image_queue[:, places], self.text_queue[:, places] = image[-kept:].mT, text[-kept:].mT
        self.queue_ptr.copy_((self.queue_ptr + kept) % self.image_queue.shape[1])
        return places

    def compared(self, seen: Features, taught: Taught | None) -> tuple[Similarities | None, Similarities | None]:
        """Similarities of a batch, and those of what the copies say of it; none without that."""
        if taught is None:
            return None, None
        with torch.no_grad():
            advice = self.similarities(taught.image, taught.text, taught)
        return self.similarities(seen.image, seen.text, taught), advice

    # ---- pairs ---------------------------------------------------------------------------------------------------

    def matches(self, seen: Features, mask: Mask, negatives: tuple[Negatives, Negatives]) -> Float[Tensor, "pairs 2"]:
        """Logits of pairs that match, then of each text with an image that does not, then of each image with a text that does not.

        Args:
            seen: of the batch.
            mask: of its texts.
            negatives: for texts an image each, for images a text each.
        """
        every = torch.arange(len(mask), device=mask.device)
        (texts, others), (images, strangers) = negatives
        words, looks = torch.cat([every, texts, strangers]), torch.cat([every, others, images])
        fused = self.reader(self.text_encoder).fuse(seen.texts[words], mask[words], [seen.images[looks]])
        return self.itm_head(fused[:, 0])  # type: ignore[no-any-return]


def _unit(projection: nn.Module, tokens: Float[Tensor, "b n width"]) -> Float[Tensor, "b features"]:
    return F.normalize(projection(tokens[:, 0]), dim=-1)


class Pretraining(Contrastive):
    """The network that learns from images and their captions alone."""

    @staticmethod
    def _text_encoder(size: TextSize) -> nn.Module:
        return WordModel(size)

    @torch.no_grad()
    def teach(self, images: Float[Tensor, "b c h w"], ids: Int[Tensor, "b n"], mask: Mask, masked_ids: Int[Tensor, "b n"] | None) -> Taught:
        """What the copies say of a batch.

        Args:
            images: as the network expects them.
            ids: of the texts' tokens.
            mask: where there are tokens.
            masked_ids: the same texts with some words masked; None: nothing is said of these.
        """
        slow = self.encoded_slowly(images, ids, mask)
        words = None if masked_ids is None else self.text_encoder_m.bert(masked_ids, mask, [slow.images])
        return Taught(slow.image, slow.text, words)

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        ids: Int[Tensor, "b n"],
        mask: Mask,
        choose: Choose,
        taught: Taught | None,
        masked_ids: Int[Tensor, "b n"],
        selected: Bool[Tensor, "b n"],
    ) -> Seen:
        """What the losses of a batch are computed from.

        Args:
            images: as the network expects them.
            ids: of the texts' tokens.
            mask: where there are tokens.
            choose: pairs that do not match.
            taught: from ``teach``; None: features are not compared, and words have no teacher.
            masked_ids: the same texts with some words masked.
            selected: the places of words that are to be predicted.
        """
        seen = self.encoded(images, ids, mask)
        own, advice = self.compared(seen, taught)
        inside = (None, None) if own is None else tuple(each[:, : len(ids)] for each in own)
        matches = self.matches(seen, mask, choose(*inside))
        hidden = self.text_encoder.bert(masked_ids, mask, [seen.images])[selected]
        known = None if taught is None or taught.words is None else self._taught_words(taught.words[selected])
        return Seen(own, advice, matches, self.text_encoder.words(hidden), known)

    @torch.no_grad()
    def _taught_words(self, hidden: Float[Tensor, "words width"]) -> Float[Tensor, "words vocabulary"]:
        return self.text_encoder_m.words(hidden)  # type: ignore[no-any-return]

    @torch.no_grad()
    def keep_temperature(self) -> None:
        """Put the temperature between the least and the most that is allowed."""
        self.temp.clamp_(*TEMPERATURES)
