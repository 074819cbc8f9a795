"""What the learners of pictures and words share: the networks' sizes, views, tokens, and the slowly moving copies."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import ClassVar, Literal, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from fedvision.albef.bert import TextSize
from fedvision.albef.model import COPY, Followed
from fedvision.albef.views import Views
from fedvision.albef.vision import VisionSize
from fedvision.albef.weights import initialized_from, initialized_from_text, initialized_from_vision
from fedvision.data.examples import Examples
from fedvision.data.federated import Spec
from fedvision.data.texts import decode_texts
from fedvision.errors import DataError, ExperimentError
from fedvision.learners.learner import Group, Holding, Learner
from fedvision.settings import Count, Fraction, Positive, PositiveFraction
from fedvision.wordpiece import Tokens, WordPiece

IDS, WORDS = "ids", "words"
"""The fields of a batch that hold its texts: tokens, int64 [n, length], and where there is one, bool [n, length]."""

BATCH = 256
"""Pictures, and texts, that are looked at together where all are compared."""


Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Size:
    """The sizes of the networks.

    Attributes:
        vision: of the image encoder; side, patch and channels are the data's.
        text: of the text network; the vocabulary is the tokenizer's.
        features: numbers of the vectors that images and texts are compared by.
        queue: of such vectors that are remembered.
    """

    vision: VisionSize
    text: TextSize
    features: int
    queue: int


SIZES: Mapping[str, Size] = {
    "tiny": Size(
        VisionSize(width=64, depth=2, heads=4),
        TextSize(width=64, heads=4, perceptron=128, layers=4, fusion=2, positions=64, context=64),
        features=32,
        queue=256,
    ),
    "base": Size(VisionSize(), TextSize(), features=256, queue=65536),
}


@dataclass(frozen=True, kw_only=True)
class ImageText(Learner):
    """A learner of pictures and words, with a vision transformer, a text network, and slowly moving copies that teach.

    Attributes:
        networks: their size, by name; ``base`` is as published.
        patch: pixels a side.
        resolution: pixels a side that pictures are resized to; their own if not given.
        vocabulary: of the tokenizer: a file as BERT's ``vocab.txt``, or the name of one that comes with FedVision.
        longest: tokens of a text; what is beyond is cut off.
        dropout: rate of the text network, its copy too.
        deviation: of the normal distribution that the text network's weights begin from.
        xavier: whether the image encoder's weights begin by Xavier's rule instead of with deviation 0.02; narrow networks need it.
        momentum: of the copies: ``copy <- momentum copy + (1 - momentum) network`` after each step.
        copies: whether each silo keeps copies of its own, or they travel and are averaged too.
        alpha: weight of what the copies teach, beside the labels; in [0, 1].
        ramp: share of the training in which alpha rises from 0; 0: it does not.
        crop_scale: area of a random crop, least and most, as a fraction of the picture's; [1, 1]: none.
        flip: probability that left and right change places, whatever the words say.
        randaugment: whether two random changes follow, each with probability 1/2.
        checkpoint: file of weights to begin with: ALBEF's, or a run's ``model.safetensors``.
        vision_checkpoint: file of a vision transformer's weights, DeiT's or timm's.
        text_checkpoint: file of BERT's weights.
    """

    learns_unlabeled = True
    needed: ClassVar[tuple[str, ...]] = ()
    """The fields that the data must have, besides pictures."""

    networks: Literal["tiny", "base"] = "tiny"
    patch: Count = 16
    resolution: Count | None = None
    vocabulary: str = "scenes"
    longest: Count = 25
    dropout: Fraction = 0.1
    deviation: Positive = 0.02
    xavier: bool = False
    momentum: Fraction = 0.995
    copies: Literal["private", "shared"] = "private"
    alpha: Fraction = 0.4
    ramp: Fraction = 0.0
    crop_scale: tuple[PositiveFraction, PositiveFraction] = (1.0, 1.0)
    flip: Fraction = 0.0
    randaugment: bool = False
    checkpoint: str | None = None
    vision_checkpoint: str | None = None
    text_checkpoint: str | None = None

    # ---- what the settings say -------------------------------------------------------------------------------------

    @cached_property
    def pieces(self) -> WordPiece:
        """The tokenizer."""
        return WordPiece.of_file(self.vocabulary)

    @property
    def digest(self) -> str:
        """Of the vocabulary."""
        return blake2b("\n".join(self.pieces.words).encode(), digest_size=8).hexdigest()

    @property
    def size(self) -> Size:
        """Of the networks."""
        return SIZES[self.networks]

    @property
    def views(self) -> Views:
        """Of pictures."""
        return Views(resolution=self.resolution, crop_scale=self.crop_scale, flip=self.flip, randaugment=self.randaugment)

    def vision_size(self, spec: Spec) -> VisionSize:
        """Of the image encoder for these data.

        Raises:
            ExperimentError: data that are no square pictures, or lack a field; a patch that does not divide them.
        """
        if len(spec.image_shape) != 3:
            fact = f"learners of pictures and words need images, the inputs have shape {spec.image_shape}"
            raise ExperimentError(f"{fact}; choose other data")
        check_fields(spec, self.needed)
        channels, height, width = spec.image_shape
        if self.resolution is None and height != width:
            raise ExperimentError(f"pictures of {height} x {width} are no squares; have them resized with learner.resolution")
        return replace(self.size.vision, side=self.resolution or height, patch=self.patch, channels=channels)

    def text_size(self) -> TextSize:
        """Of the text network for these words.

        Raises:
            ExperimentError: texts that may be longer than the network has positions.
        """
        size = replace(self.size.text, vocabulary=self.pieces.size, dropout=self.dropout, padding=self.pieces.pad)
        if self.longest > size.positions:
            raise ExperimentError(f"learner.longest = {self.longest}: the text network has {size.positions} positions; choose fewer tokens")
        return size

    def begun(self, model: Network) -> Network:
        """The network with the weights of the files that the settings name, those of ALBEF last.

        Raises:
            ExperimentError: a file that cannot be read, or that does not fit.
        """
        files = ((initialized_from_vision, self.vision_checkpoint), (initialized_from_text, self.text_checkpoint))
        for take, path in (*files, (initialized_from, self.checkpoint)):
            if path is not None:
                take(model, path)
        return model

    def alpha_at(self, progress: float) -> float:
        """The weight of what the copies teach."""
        return self.alpha if progress >= self.ramp else self.alpha * progress / self.ramp

    # ---- words -----------------------------------------------------------------------------------------------------

    def tokens(self, texts: list[str], *, ended: bool = False) -> Tokens:
        """Texts as numbers."""
        return self.pieces(texts, self.longest, ended=ended)

    # ---- steps and state -------------------------------------------------------------------------------------------

    def groups(self, model: nn.Module) -> Sequence[Group]:
        """Biases and whatever else has one dimension do not decay."""
        trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
        spared = [name for name, param in trained.items() if param.ndim == 1]
        return [Group([name for name in trained if name not in set(spared)]), Group(spared, decayed=False)]

    def holding(self, name: str) -> Holding:
        """Copies, and whatever else is private; the numbers of positions never change."""
        if name.endswith("position_ids"):
            return "constant"
        if self.copies == "private" and name.split(".", 1)[0].endswith(COPY):
            return "private"
        return super().holding(name)

    def begin(self, model: nn.Module) -> None:
        """The copies begin at the network."""
        if self.copies == "private" and isinstance(model, Followed) and model.has_copies:
            model.follow(0.0)


def check_fields(spec: Spec, names: Iterable[str]) -> None:
    """Refuse data that say which fields they have, and lack one of these.

    Raises:
        ExperimentError: such data.
    """
    for name in names:
        if spec.fields and name not in spec.fields:
            fact = f"the data lack the field {name!r} ({', '.join(spec.fields)})"
            raise ExperimentError(f"{fact}; add it to data.fields, or choose data that have it")


def drawn_texts(texts: Int[Tensor, "n wordings length"], rng: torch.Generator) -> list[str]:
    """One text of each example's at random; an empty one where it has none."""
    counts = (texts != 0).any(2).sum(1)
    chance = torch.rand(len(texts), generator=rng).to(texts.device)
    return _decoded(texts[torch.arange(len(texts), device=texts.device), (chance * counts).long()])


def first_texts(texts: Int[Tensor, "n wordings length"]) -> list[str]:
    """The first text of each example; an empty one where it has none."""
    return _decoded(texts[:, 0])


def _decoded(texts: Int[Tensor, "n length"]) -> list[str]:
    return [text[0] if text else "" for text in decode_texts(texts[:, None])]


def texts_of(examples: Examples, field: str) -> Tensor:
    """The texts of examples, uint8 [n, wordings, length].

    Raises:
        DataError: there are none.
    """
    if field not in examples:
        raise DataError(f"a batch has no {field!r}, but {', '.join(examples.fields)}; give every silo that field")
    return examples.fields[field]
