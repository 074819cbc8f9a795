"""ALBEF's network that answers questions about pictures: a decoder tells answers word by word, or ranks given ones.

b = questions, a = answers, each to one of the questions, k = answers on a shortlist, n = tokens. An answer begins with the token that
texts begin with, and ends with one that ends it.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fedvision.albef.bert import Bert, Mask, TextSize, WordModel, initialized
from fedvision.albef.losses import UNSELECTED
from fedvision.albef.model import Followed, check_widths
from fedvision.albef.vision import VisionSize, image_encoder
from fedvision.seeds import global_generators

AT_ONCE = 256
"""So many answers are told at once when many are ranked: what is predicted of their tokens takes memory."""


# ---- losses ---------------------------------------------------------------------------------------------------------


def following(ids: Int[Tensor, "a n"], mask: Mask) -> Int[Tensor, "a n-1"]:
    """The token that follows each but the last; ``UNSELECTED`` where it is padding.

    >>> following(torch.tensor([[1, 7, 2], [1, 2, 0]]), torch.tensor([[True, True, True], [True, True, False]])).tolist()
    [[7, 2], [2, -100]]
    """
    return ids[:, 1:].masked_fill(~mask[:, 1:], UNSELECTED)


def telling_losses(
    logits: Float[Tensor, "a m vocabulary"], targets: Int[Tensor, "a m"], taught: Float[Tensor, "a m vocabulary"] | None, alpha: float
) -> Float[Tensor, "a"]:
    """Of each answer the sum over its tokens of (1 - alpha) cross-entropy + alpha soft cross-entropy with a teacher's prediction.

    Args:
        logits: of the tokens.
        targets: what they are; ``UNSELECTED`` counts nothing.
        taught: the teacher's logits; None: labels alone.
        alpha: weight of the teacher, in [0, 1].
    """
    hard = F.cross_entropy(logits.mT, targets, ignore_index=UNSELECTED, reduction="none")
    if taught is None:
        return hard.sum(1)
    soft = -(taught.softmax(2) * logits.log_softmax(2)).sum(2).masked_fill(targets == UNSELECTED, 0.0)
    return ((1 - alpha) * hard + alpha * soft).sum(1)


def answering_loss(losses: Float[Tensor, "a"], weights: Float[Tensor, "a"], questions: int) -> Float[Tensor, ""]:
    """1/b sum_j w_j l_j, over all answers to b questions."""
    return (weights * losses).sum() / questions


# ---- the network ----------------------------------------------------------------------------------------------------


class Answers(NamedTuple):
    """Answers to the questions of a batch.

    Attributes:
        ids: of their tokens.
        mask: where there are tokens.
        question: the index of the question that each answers.
    """

    ids: Int[Tensor, "a n"]
    mask: Mask
    question: Int[Tensor, "a"]


class Told(NamedTuple):
    """Logits of the tokens of answers, and what the copies say of them; None: they were not asked."""

    own: Float[Tensor, "a m vocabulary"]
    taught: Float[Tensor, "a m vocabulary"] | None


class Ranked(NamedTuple):
    """For each question a shortlist of given answers, the best first.

    Attributes:
        answers: their indices.
        probabilities: of each among the shortlist, sums of rows are 1.
    """

    answers: Int[Tensor, "b k"]
    probabilities: Float[Tensor, "b k"]


class Answering(Followed):
    """An encoder of pictures, one of questions that look at them, and a decoder of answers that look at the questions.

    Args:
        vision: size of the image encoder.
        text: size of the text network that reads questions.
        rng: draws the weights.
        layers: of the decoder; as many as the text network has that look at pictures if not given.
        deviation: of the normal distribution that the text networks' weights begin from.
        xavier: see ``image_encoder``.
    """

    followed = ("visual_encoder", "text_encoder", "text_decoder")
    visual_encoder: Any
    text_encoder: Any
    text_decoder: Any
    visual_encoder_m: Any
    text_encoder_m: Any
    text_decoder_m: Any

    def __init__(
        self,
        vision: VisionSize,
        text: TextSize,
        rng: torch.Generator,
        layers: int | None = None,
        deviation: float = 0.02,
        xavier: bool = False,
    ) -> None:
        super().__init__()
        check_widths(vision, text)
        self.visual_encoder = image_encoder(vision, rng, xavier)
        decoder = replace(text, layers=layers or text.layers - text.fusion, fusion=0, context=text.width)
        with global_generators(rng):
            self.text_encoder, self.text_decoder = Bert(text), WordModel(decoder)
        for network in (self.text_encoder, self.text_decoder):
            initialized(network, rng, deviation)
        self.copied()

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        ids: Int[Tensor, "b n"],
        mask: Mask,
        answers: Answers,
        taught: Float[Tensor, "a m width"] | None = None,
    ) -> Told:
        """Logits of what follows each token of the answers but the last.

        Args:
            images: as the network expects them.
            ids: of the questions' tokens.
            mask: where there are tokens.
            answers: to be told.
            taught: from ``teach``.
        """
        hidden = _told(self.text_decoder, answers, self.asked(images, ids, mask), mask)
        return Told(self.text_decoder.words(hidden), None if taught is None else self._taught_words(taught))

    @torch.no_grad()
    def teach(self, images: Float[Tensor, "b c h w"], ids: Int[Tensor, "b n"], mask: Mask, answers: Answers) -> Float[Tensor, "a m width"]:
        """The last vectors of what the copies say."""
        states = self.text_encoder_m(ids, mask, [self.visual_encoder_m(images)])
        return _told(self.text_decoder_m, answers, states, mask)

    @torch.no_grad()
    def _taught_words(self, hidden: Float[Tensor, "a m width"]) -> Float[Tensor, "a m vocabulary"]:
        return self.text_decoder_m.words(hidden)  # type: ignore[no-any-return]

    def asked(self, images: Float[Tensor, "b c h w"], ids: Int[Tensor, "b n"], mask: Mask) -> Float[Tensor, "b n width"]:
        """The questions' tokens after they have looked at the pictures."""
        return self.text_encoder(ids, mask, [self.visual_encoder(images)])  # type: ignore[no-any-return]

    def ranked(self, states: Float[Tensor, "b n width"], mask: Mask, ids: Int[Tensor, "a m"], ids_mask: Mask, shortlist: int) -> Ranked:
        """The best of given answers, to each question.

        Those whose first token is likeliest come on a shortlist; the score of these is log p(first token) + log p(all tokens), in
        which the first is counted twice.

        Args:
            states: from ``asked``.
            mask: of the questions.
            ids: of the answers' tokens.
            ids_mask: where there are tokens.
            shortlist: how many answers; all if there are fewer.
        """
        k = min(shortlist, len(ids))
        begun = _logits(self.text_decoder, ids[:1, :1].expand(len(states), 1), ids_mask[:1, :1].expand(len(states), 1), states, mask)
        first, chosen = begun[:, 0].log_softmax(1)[:, ids[:, 1]].topk(k, dim=1)
        pairs = torch.stack([torch.arange(len(states), device=ids.device).repeat_interleave(k), chosen.flatten()], 1)
        told = [self.likelihood(states, mask, Answers(ids[a], ids_mask[a], q)) for q, a in (part.T for part in pairs.split(AT_ONCE))]
        scores, order = (first + torch.cat(told).view(-1, k)).sort(1, descending=True)
        return Ranked(chosen.gather(1, order), scores.softmax(1))

    def likelihood(self, states: Float[Tensor, "b n width"], mask: Mask, answers: Answers) -> Float[Tensor, "a"]:
        """Of whole answers log p.

        Args:
            states: from ``asked``.
            mask: of the questions.
            answers: to be told.
        """
        logits = self.text_decoder.words(_told(self.text_decoder, answers, states, mask))
        return -telling_losses(logits, following(answers.ids, answers.mask), None, 0.0)


def _told(decoder: WordModel, answers: Answers, states: Tensor, mask: Tensor) -> Tensor:
    """Vectors of each token of the answers but the last."""
    asked = answers.question
    return decoder.bert.told(answers.ids[:, :-1], answers.mask[:, :-1], [states[asked]], mask[asked])


def _logits(decoder: WordModel, ids: Tensor, mask: Tensor, states: Tensor, states_mask: Tensor) -> Tensor:
    return decoder.words(decoder.bert.told(ids, mask, [states], states_mask))
