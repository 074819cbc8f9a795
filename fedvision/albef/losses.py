"""ALBEF's losses: images and texts side by side, pairs that match or do not, and words that are masked.

b = examples of a batch, c = candidates: those of the batch first, then those of a queue. Similarities are divided by a temperature.

Source: Align before Fuse, arXiv 2107.07651, sections 3.2 and 3.3; what the paper leaves open from its public implementation.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

UNSELECTED = -100
"""The target of a token that is not to be predicted."""


# ---- images and texts, side by side (ITC) ---------------------------------------------------------------------------


def shared_out(positive: Bool[Tensor, "b c"]) -> Float[Tensor, "b c"]:
    """One, shared out equally among the candidates that belong to an example; each has one at least.

    >>> shared_out(torch.tensor([[True, False, True]])).tolist()
    [[0.5, 0.0, 0.5]]
    """
    return positive / positive.sum(1, keepdim=True)


def distilled(truth: Float[Tensor, "b c"], taught: Float[Tensor, "b c"], alpha: float) -> Float[Tensor, "b c"]:
    """What the labels say, y = alpha softmax(s') + (1 - alpha) y', softened by what a teacher finds similar.

    Args:
        truth: y', rows sum to 1.
        taught: the teacher's similarities s'.
        alpha: in [0, 1].

    Source: equation 6.
    """
    return alpha * taught.softmax(1) + (1 - alpha) * truth


def contrastive_loss(similarities: Float[Tensor, "b c"], targets: Float[Tensor, "b c"]) -> Float[Tensor, ""]:
    """1/b sum_i sum_j -y_ij log softmax(s_i)_j, of one direction; the loss is the mean of both.

    Source: equation 2; with soft targets it differs from the paper's divergence by what no weight changes.
    """
    return -(targets * similarities.log_softmax(1)).sum(1).mean()


def alignment_loss(
    own: tuple[Float[Tensor, "b c"], Float[Tensor, "b c"]],
    taught: tuple[Float[Tensor, "b c"], Float[Tensor, "b c"]],
    positive: Bool[Tensor, "b c"],
    alpha: float,
) -> Float[Tensor, ""]:
    """The mean of ``contrastive_loss`` of both directions, from images to texts and from texts to images.

    Args:
        own: similarities of each direction.
        taught: the teacher's.
        positive: the candidates that belong to each example, in both directions.
        alpha: weight of the teacher, in [0, 1].
    """
    truth = shared_out(positive)
    pairs = zip(own, taught, strict=True)
    return torch.stack([contrastive_loss(similar, distilled(truth, advice, alpha)) for similar, advice in pairs]).mean()


# ---- pairs that match or do not (ITM) -------------------------------------------------------------------------------


class Negatives(NamedTuple):
    """Pairs that do not match: example i of ``rows`` with what belongs to example j of ``others``."""

    rows: Int[Tensor, "m"]
    others: Int[Tensor, "m"]


def negative_weights(similarities: Float[Tensor, "b b"] | None, same: Bool[Tensor, "b b"]) -> Float[Tensor, "b b"]:
    """How likely each example's counterpart is drawn as one that does not match; rows need not sum to 1.

    Where the softmax leaves nothing to those that may be drawn, all of them are as likely; a row without any is 0.

    Args:
        similarities: of each with each; None: all as likely.
        same: those that do match, and must not be drawn.

    Differs: the public implementation fails where a row leaves nothing.
    """
    equal = (~same).float()
    if similarities is None:
        return equal
    weights = similarities.detach().softmax(1).masked_fill(same, 0.0)
    return torch.where(weights.sum(1, keepdim=True) > 0, weights, equal)


def drawn_negatives(weights: Float[Tensor, "b b"], rng: torch.Generator) -> Negatives:
    """One for each example, by weight; none for those that have no other to be drawn."""
    rows = weights.sum(1).nonzero()[:, 0]
    if not len(rows):
        return Negatives(rows, rows)
    return Negatives(rows, torch.multinomial(weights[rows].cpu(), 1, generator=rng)[:, 0].to(weights.device))


def negatives(
    to_texts: Float[Tensor, "b b"] | None, to_images: Float[Tensor, "b b"] | None, same: Bool[Tensor, "b b"], rng: torch.Generator
) -> tuple[Negatives, Negatives]:
    """For texts an image each that does not match, then for images a text each.

    Args:
        to_texts: similarities of images to texts; None: all as likely.
        to_images: of texts to images.
        same: those that match.
        rng: for the draws.
    """
    for_texts, for_images = (drawn_negatives(negative_weights(similar, same), rng) for similar in (to_images, to_texts))
    return for_texts, for_images


def matching_loss(logits: Float[Tensor, "pairs 2"], matching: int) -> Float[Tensor, ""]:
    """Mean cross-entropy of pairs of which the first ``matching`` match; class 1: they do. 0 where all match: nothing is told apart."""
    if len(logits) == matching:
        return logits.new_zeros(())
    return F.cross_entropy(logits, (torch.arange(len(logits), device=logits.device) < matching).long())


# ---- words that are masked (MLM) ------------------------------------------------------------------------------------


class MaskedWords(NamedTuple):
    """Texts of which some words are masked, and what these were: ``UNSELECTED`` at all other places."""

    ids: Int[Tensor, "b n"]
    targets: Int[Tensor, "b n"]


def masked_words(
    ids: Int[Tensor, "b n"], kept: Collection[int], mask: int, vocabulary: int, probability: float, rng: torch.Generator
) -> MaskedWords:
    """Select tokens; of these 80% become the mask, 10% any token, and 10% stay.

    Args:
        ids: of tokens.
        kept: tokens that are never selected: padding, and that of the beginning.
        mask: the token that masks.
        vocabulary: number of tokens.
        probability: that a token is selected.
        rng: for all draws; each is of the shape of ``ids``.
    """
    selected, blank, other = (torch.bernoulli(torch.full(ids.shape, p), generator=rng).bool() for p in (probability, 0.8, 0.5))
    randomly = torch.randint(vocabulary, ids.shape, generator=rng)
    draws = (draw.to(ids.device) for draw in (selected, blank, other, randomly))
    return replaced_words(ids, kept, mask, *draws)


def replaced_words(
    ids: Int[Tensor, "b n"],
    kept: Collection[int],
    mask: int,
    selected: Bool[Tensor, "b n"],
    blank: Bool[Tensor, "b n"],
    other: Bool[Tensor, "b n"],
    randomly: Int[Tensor, "b n"],
) -> MaskedWords:
    """Words masked as draws say.

    Args:
        ids: of tokens.
        kept: tokens that are never selected.
        mask: the token that masks.
        selected: which are to be predicted.
        blank: of these, which are masked.
        other: of the remaining ones, which become another token.
        randomly: that other token.
    """
    selected = selected & ~torch.isin(ids, torch.tensor(list(kept), device=ids.device))
    changed = torch.where(selected & blank, mask, ids)
    changed = torch.where(selected & ~blank & other, randomly, changed)
    return MaskedWords(changed, torch.where(selected, ids, UNSELECTED))


def word_loss(
    logits: Float[Tensor, "words vocabulary"], targets: Int[Tensor, "words"], taught: Float[Tensor, "words vocabulary"] | None, alpha: float
) -> Float[Tensor, ""]:
    """``class_loss`` of the words that are to be predicted; 0 without any.

    Args:
        logits: of these words.
        targets: what they were.
        taught: the teacher's logits; None: labels alone.
        alpha: weight of the teacher, in [0, 1].

    Source: equations 3 and 7.
    """
    return class_loss(logits, targets, taught, alpha) if len(targets) else logits.sum()


# ---- one of several classes -----------------------------------------------------------------------------------------


def class_loss(
    logits: Float[Tensor, "n c"], targets: Int[Tensor, "n"], taught: Float[Tensor, "n c"] | None, alpha: float
) -> Float[Tensor, ""]:
    """(1 - alpha) mean cross-entropy + alpha mean soft cross-entropy with a teacher's prediction.

    Args:
        logits: of the classes.
        targets: the true ones.
        taught: the teacher's logits; None: labels alone.
        alpha: weight of the teacher, in [0, 1].
    """
    hard = F.cross_entropy(logits, targets)
    return hard if taught is None else (1 - alpha) * hard + alpha * soft_cross_entropy(logits, taught)


def soft_cross_entropy(logits: Float[Tensor, "n c"], taught: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
    """1/n sum_i sum_c -softmax(t_i)_c log softmax(z_i)_c."""
    return -(taught.softmax(1) * logits.log_softmax(1)).sum(1).mean()
