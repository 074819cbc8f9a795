"""How well images and texts find each other: shortlists, their second look, and recall.

i = images, t = texts, each of one image.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

UNSCORED = -100.0
"""The score of what is not on a shortlist."""

PLACES = (1, 5, 10)
"""Recall is told of so many first places."""

Score = Callable[[Int[Tensor, "pairs"], Int[Tensor, "pairs"]], Float[Tensor, "pairs"]]
"""From the rows and the columns of pairs, how well they match."""


def shortlisted(
    similarities: Float[Tensor, "rows columns"], length: int, score: Score, at_once: int = 256
) -> Float[Tensor, "rows columns"]:
    """A second score for the most similar columns of each row; ``UNSCORED`` for the others.

    Args:
        similarities: of features.
        length: of a shortlist; all columns if there are fewer.
        score: of pairs.
        at_once: pairs that are scored together.
    """
    columns = similarities.topk(min(length, similarities.shape[1]), dim=1).indices
    rows = torch.arange(len(columns), device=columns.device).repeat_interleave(columns.shape[1])
    pairs = zip(rows.split(at_once), columns.flatten().split(at_once), strict=True)
    scores = torch.cat([score(row, column) for row, column in pairs]).view(columns.shape)
    return torch.full_like(similarities, UNSCORED).scatter(1, columns, scores.to(similarities))


def text_ranks(scores: Float[Tensor, "i t"], image: Int[Tensor, "t"]) -> Int[Tensor, "i"]:
    """For each image the place, counted from 0, of the best of its texts among all.

    An equal score of another image's text comes first: what cannot be told apart is not found.

    Args:
        scores: of all pairs.
        image: whose each text is; each image has one at least.
    """
    own = torch.arange(len(scores), device=scores.device)[:, None] == image
    best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    return ((scores >= best) & ~own).sum(1)


def image_ranks(scores: Float[Tensor, "t i"], image: Int[Tensor, "t"]) -> Int[Tensor, "t"]:
    """For each text the place, counted from 0, of its image among all; an equal score of another image comes first.

    Args:
        scores: of all pairs.
        image: whose each text is.
    """
    return (scores >= scores.gather(1, image[:, None])).sum(1) - 1


def recalls(
    texts_found: Float[Tensor, "i t"], images_found: Float[Tensor, "t i"], image: Int[Tensor, "t"], places: Sequence[int] = PLACES
) -> dict[str, float]:
    """Shares, in [0, 1], of images with one of their texts, and of texts with their image, among the first places; and means.

    Args:
        texts_found: scores of all texts for each image.
        images_found: scores of all images for each text.
        image: whose each text is.
        places: how many.

    Returns:
        ``text_recall@k`` and ``image_recall@k``; ``text_recall`` and ``image_recall``, the means over all k, and ``recall``, the mean
        of these two.
    """
    ranks = {"text": text_ranks(texts_found, image), "image": image_ranks(images_found, image)}
    shares = {f"{what}_recall@{k}": float((rank < k).double().mean()) for what, rank in ranks.items() for k in places}
    means = {f"{what}_recall": sum(shares[f"{what}_recall@{k}"] for k in places) / len(places) for what in ranks}
    return {**shares, **means, "recall": (means["text_recall"] + means["image_recall"]) / 2}
