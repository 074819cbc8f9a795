"""What the learners of texts about pictures share: which of a picture's texts is drawn, and how all of them are judged."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fedvision.albef.model import Followed
from fedvision.data.examples import IMAGE, SECOND_IMAGE, Examples
from fedvision.data.texts import decode_texts
from fedvision.learners.image_text import BATCH, ImageText, texts_of
from fedvision.metrics import Metrics, total
from fedvision.settings import Count
from fedvision.wordpiece import Tokens


class Judged(NamedTuple):
    """What was measured of texts, those of a picture one after the other.

    Attributes:
        costs: the loss of each.
        right: how right the answer to each is, in [0, 1].
        owner: whose each is.
    """

    costs: Float[Tensor, "texts"]
    right: Float[Tensor, "texts"]
    owner: Int[Tensor, "texts"]


@dataclass(frozen=True, kw_only=True)
class AboutPictures(ImageText):
    """A learner of texts that each picture, or pair of pictures, has some of, and of what is to be said of each.

    A pass shows every picture once, with ``texts_drawn`` of its texts, drawn anew each time; evaluation judges all texts. A picture
    without any teaches nothing.

    Attributes:
        texts_drawn: texts of each picture in a batch, which may be the same one.
        blind: whether evaluation also tells the accuracy where each text is judged by another picture, that of half the examples
            further on: what is right all the same is not seen.
    """

    texts: ClassVar[str]
    """The field that holds them."""

    texts_drawn: Count = 1
    blind: bool = False

    # ---- what each says ------------------------------------------------------------------------------------------

    @abstractmethod
    def cleaned(self, text: str) -> str:
        """A text as it is cut into tokens."""

    @abstractmethod
    def judged(self, model: nn.Module, batch: Examples, pictures: Examples) -> Judged:
        """What is said of all texts of a batch, looking at the pictures of another; without gradients."""

    @abstractmethod
    def constant(self, examples: Examples) -> float:
        """The accuracy of the one answer that is best, given to all."""

    # ---- batches -------------------------------------------------------------------------------------------------

    def drawn(self, train: Examples, index: slice | Tensor) -> Examples:
        """The examples whose turn it is, each as often as texts of it are drawn."""
        turn = torch.arange(len(train), device=train.device)[index]
        return train[turn.repeat_interleave(self.texts_drawn)].decoded()

    def tokenized(self, texts: list[str], device: torch.device) -> Tokens:
        """Texts as numbers, after they were cleaned."""
        ids, mask = self.tokens([self.cleaned(text) for text in texts])
        return Tokens(ids.to(device), mask.to(device))

    def seen(self, batch: Examples, rng: torch.Generator | None = None) -> list[Tensor]:
        """The pictures as the network sees them; of pairs the left ones and the right ones."""
        return [self.views(batch.fields[name], rng) for name in (IMAGE, SECOND_IMAGE) if name in self.looked_at]

    @property
    def looked_at(self) -> tuple[str, ...]:
        """The fields of pictures that texts are about."""
        return (IMAGE,)

    def follow(self, model: nn.Module, batch: Examples, progress: float) -> None:
        """The copies move."""
        assert isinstance(model, Followed)
        model.follow(self.momentum)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, model: nn.Module, batch: Examples) -> Metrics:
        """``accuracy`` over all texts; ``loss``, the mean over pictures of the mean loss of their texts."""
        return total(self._measured(self.judged(model, part, part), len(part)) for part in batch.batches(BATCH))

    @staticmethod
    def _measured(judged: Judged, pictures: int) -> Metrics:
        share = 1 / judged.owner.bincount(minlength=pictures).clamp(min=1)
        loss = (judged.costs.double() * share[judged.owner]).sum()
        right = (judged.right.double().sum(), torch.tensor(len(judged.right)))
        return Metrics.of_batch({"loss": loss}, pictures, shares={"accuracy": right})

    def overall(self, model: nn.Module, examples: Examples) -> Mapping[str, float]:
        """``constant_accuracy``, that of the best single answer to all; ``blind_accuracy``, see the attributes."""
        found = {"constant_accuracy": self.constant(examples)}
        if not self.blind:
            return found
        elsewhere = torch.arange(len(examples), device=examples.device).roll(len(examples) // 2)
        pairs = zip(examples.batches(BATCH), examples[elsewhere].batches(BATCH), strict=True)
        right = torch.cat([self.judged(model, here.decoded(), there.decoded()).right for here, there in pairs])
        return found | ({"blind_accuracy": float(right.double().mean())} if len(right) else {})


def present(texts: Int[Tensor, "n texts length"]) -> Bool[Tensor, "n texts"]:
    """Where there is a text."""
    return (texts != 0).any(-1)


def drawn_places(there: Bool[Tensor, "n places"], rng: torch.Generator) -> Int[Tensor, "n"]:
    """For each example one of the places where something is, all as likely; the first where nothing is."""
    chances = torch.rand(there.shape, generator=rng).to(there.device)
    return (chances * there).argmax(1)


def at(values: Tensor, places: Int[Tensor, "n"]) -> Tensor:
    """Of each example the value at its place."""
    return values[torch.arange(len(places), device=places.device), places]


def listed(texts: Int[Tensor, "n length"]) -> list[str]:
    """Texts of which each is one; empty ones too."""
    return [some[0] if some else "" for some in decode_texts(texts[:, None])]


def told(batch: Examples, field: str) -> tuple[list[str], Int[Tensor, "texts"], Int[Tensor, "texts"]]:
    """All texts of all examples, whose each is, and which of its."""
    texts = texts_of(batch, field)
    owner, place = present(texts).nonzero().unbind(1)
    return listed(texts[owner, place]), owner, place


def in_parts(*values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Values of texts, so many at a time."""
    return zip(*(each.split(BATCH) for each in values), strict=True)
