"""Pictures of what a network makes of pictures and words: where words look, which word is masked, what belongs together.

What the slowly moving copies teach, of masked words and of what belongs together, is shown as they see it.

Source: after figures 2, 4, 5 and 6 of arXiv 2107.07651.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from fedvision.albef import gradcam
from fedvision.albef.bert import TextSize
from fedvision.albef.model import Pretraining
from fedvision.gallery import Gallery, Picture, enlarged
from fedvision.wordpiece import WordPiece

Color = tuple[int, int, int]
"""Red, green and blue in 0 ... 255."""

VEIL = 0.5
"""How much of a picture its map covers."""

ACROSS = 6
"""Words of a text in one row; longer ones go on in the next."""

BEST = 5
"""Candidates that are shown of many."""

RIGHT = "\N{CHECK MARK}"
"""Marks what is true."""


# ---- drawing --------------------------------------------------------------------------------------------------------


def overlay(picture: Picture, heat: Float[Tensor, "rows columns"]) -> Picture:
    """A picture in gray behind a map of what matters: bright where that is most, dark where there is nothing or less.

    Args:
        picture: as large as it is to be shown; small ones are ``enlarged`` first, or the map is as coarse as their pixels.
        heat: of the whole picture, of any size; interpolated bicubically.
    """
    from matplotlib import colormaps

    whole = F.interpolate(heat[None, None].float().cpu(), picture.shape[:2], mode="bicubic", align_corners=False)[0, 0].clamp(min=0)
    share = (whole / whole.max().clamp(min=1e-12)).nan_to_num(0.0).numpy()
    mixed = VEIL * 255 * colormaps["inferno"](share)[..., :3] + (1 - VEIL) * picture.mean(2, keepdims=True)
    return np.asarray(mixed.round().astype(np.uint8))


def boxed(picture: Picture, box: Sequence[float], color: Color, thickness: int = 3) -> Picture:
    """A picture with the frame of a box.

    Args:
        picture: as large as it is to be shown.
        box: left, top, width and height in pixels of this picture, times ``enlargement`` if it was enlarged; cut to whole pixels
            and to the picture.
        color: of the frame.
        thickness: of the frame, which is inside the box, in pixels.
    """
    left, top, width, height = box
    rows, columns = (_pixels(*ends) for ends in ((top, top + height, picture.shape[0]), (left, left + width, picture.shape[1])))
    inside = tuple(slice(pixels.start + thickness, max(pixels.stop - thickness, 0)) for pixels in (rows, columns))
    framed = picture.copy()
    framed[rows, columns] = color
    framed[inside] = picture[inside]
    return framed


def _pixels(first: float, end: float, side: int) -> slice:
    """Whole pixels of a side."""
    return slice(*(min(max(round(edge), 0), side) for edge in (first, end)))


# ---- where words look -----------------------------------------------------------------------------------------------


class Looks(NamedTuple):
    """Where the words of a text look.

    Attributes:
        title: of the row.
        picture: that they look at, as large as it is to be shown.
        note: what stands under it.
        words: one by one.
        maps: of each word, what matters of the picture.
        whole: the same of the text.
    """

    title: str
    picture: Picture
    note: str
    words: Sequence[str]
    maps: Float[Tensor, "words rows columns"]
    whole: Float[Tensor, "rows columns"]


def where_words_look(looks: Sequence[Looks], caption: str) -> Gallery:
    """A picture with the map of its text, then one with the map of each word, which stands below; long texts take several rows.

    Below each word stands, too, how much of all words' maps together is its own.

    Args:
        looks: of several pictures.
        caption: of the gallery.
    """
    across = min(max(len(one.words) for one in looks), ACROSS)
    columns = ["picture", "whole text", *["word by word"][:across], *[""] * (across - 1)]
    titles, rows, notes = [], [], []
    for one in looks:
        cells = [(one.picture, one.note), (overlay(one.picture, one.whole), ""), *_word_by_word(one)]
        for first in range(2, max(len(cells), 3), max(across, 1)):
            here = [*(cells[:2] if first == 2 else [(None, "")] * 2), *cells[first : first + across]]
            here += [(None, "")] * (len(columns) - len(here))
            titles.append(one.title if first == 2 else "")
            rows.append([picture for picture, _ in here])
            notes.append([note for _, note in here])
    return Gallery(titles, columns, rows, caption, notes)


def _word_by_word(one: Looks) -> list[tuple[Picture | None, str]]:
    sums = one.maps.sum((1, 2))
    shares = (sums / sums.sum().clamp(min=1e-12)).tolist()
    return [
        (overlay(one.picture, heat), f"{word}\n{_percent(share)}") for word, heat, share in zip(one.words, one.maps, shares, strict=True)
    ]


def layer_of_words(size: TextSize) -> int:
    """The layer whose attention is shown: the third that looks at pictures, but never the last, where only the text as a whole looks.

    >>> layer_of_words(TextSize()), layer_of_words(TextSize(layers=4, fusion=2))
    (8, 2)
    """
    return max(min(size.fusion + 2, size.layers - 2), size.fusion)


def whole_words(pieces: Sequence[str]) -> list[tuple[str, slice]]:
    """Words, and which of the pieces each is made of.

    >>> whole_words(["a", "hour", "##glass"])
    [('a', slice(0, 1, None)), ('hourglass', slice(1, 3, None))]
    """
    starts = [i for i, piece in enumerate(pieces) if i == 0 or not piece.startswith("##")]
    spans = [slice(*ends) for ends in pairwise([*starts, len(pieces)])]
    return [("".join(piece.removeprefix("##") for piece in pieces[span]), span) for span in spans]


# ---- what a network is shown ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """Pictures with a caption each, and the network that looks at them.

    Attributes:
        network: in evaluation mode.
        pieces: the tokenizer.
        pictures: as they are shown.
        images: the same, as the network expects them.
        ids: of the captions' tokens, that of the beginning first.
        mask: where there are tokens.
    """

    network: Pretraining
    pieces: WordPiece
    pictures: Sequence[Picture]
    images: Float[Tensor, "n c h w"]
    ids: Int[Tensor, "n length"]
    mask: Bool[Tensor, "n length"]

    @property
    def texts(self) -> list[str]:
        """The captions, as the network reads them."""
        return [self.pieces.text(row) for row in self.ids]

    def words(self, number: int) -> list[tuple[str, slice]]:
        """The words of a caption, and which of its tokens each is made of."""
        tokens = self.ids[number, self.mask[number]].tolist()[1:]
        words = whole_words([self.pieces.words[token] for token in tokens])
        return [(word, slice(span.start + 1, span.stop + 1)) for word, span in words]

    @cached_property
    def similarities(self) -> Float[Tensor, "n n"]:
        """Of all pictures to all captions, as the copies see both, divided by the temperature."""
        seen = self.network.encoded_slowly(self.images, self.ids, self.mask)
        return seen.image @ seen.text.mT / self.network.temp  # type: ignore[no-any-return]


def galleries(subject: Subject, probes: Collection[int], compared: bool) -> dict[str, Gallery]:
    """The pictures of pre-training.

    Args:
        subject: what is shown.
        probes: tokens that are masked rather than others.
        compared: whether the network learns to compare features.
    """
    drawn = {"words-on-images": words_on_images(subject), "masked-words": masked_words(subject, probes)}
    if compared:
        drawn |= {"nearest-texts": nearest_texts(subject), "nearest-images": nearest_images(subject)}
    return {name: gallery for name, gallery in drawn.items() if gallery is not None}


def words_on_images(subject: Subject, shown: int = 4) -> Gallery:
    """Where the words of the first captions look when the network says whether they match.

    Source: figures 4 and 6, Grad-CAM of the attention in the third layer that looks at pictures.
    """
    network, own = subject.network, (subject.images[:shown], subject.ids[:shown], subject.mask[:shown])
    bert = network.reader(network.text_encoder)
    maps = gradcam.over_words(gradcam.match(network, *own, layer_of_words(bert.size)), own[2])
    looks = []
    for number, (match, each, whole) in enumerate(zip(matching(network, *own).tolist(), maps, gradcam.over_text(maps), strict=True)):
        words = subject.words(number)
        by_word = torch.stack([each[span].sum(0) for _, span in words]) if words else each[:0]
        picture = enlarged(subject.pictures[number])
        looks.append(Looks(f"{number}", picture, f"match {_percent(match)}", [word for word, _ in words], by_word, whole))
    caption = (
        "Where each word of the caption looks when the network says whether the two match: attention times gradient (Grad-CAM), each map "
        "up to its own largest value. Below the picture: the probability that they match; below a word: its share of the words' maps."
    )
    return where_words_look(looks, caption)


def matching(network: Pretraining, images: Tensor, ids: Tensor, mask: Tensor) -> Float[Tensor, "n"]:
    """The probability that each picture and its text match."""
    hidden = network.reader(network.text_encoder)(ids, mask, [network.visual_encoder(images)])
    return network.itm_head(hidden[:, 0]).softmax(1)[:, 1]  # type: ignore[no-any-return]


# ---- masked words ---------------------------------------------------------------------------------------------------


def masked_words(subject: Subject, probes: Collection[int], shown: int = 6) -> Gallery | None:
    """What a masked word is taken for, looking at its picture and at that of half the examples further on; None without any word.

    Source: figure 2, the most likely words of the pseudo-targets.
    """
    places = {number: place for number in range(len(subject.ids)) if (place := masked_place(subject, number, probes)) is not None}
    numbers = list(places)[:shown]
    if not numbers:
        return None
    at = torch.arange(len(numbers)), torch.tensor([places[number] for number in numbers])
    ids = subject.ids[numbers].clone()
    truths = ids[at].tolist()
    ids[at] = subject.pieces.mask
    looks = _masked_looks(subject, numbers)
    rows, notes = [], []
    for looked, slowly in looks.values():
        chances = word_chances(subject.network, subject.images[looked], ids, subject.mask[numbers], slowly)[at]
        rows.append([subject.pictures[number] for number in looked])
        notes.append([_best_words(subject.pieces, row, truth) for row, truth in zip(chances, truths, strict=True)])
    caption = (
        "One word of each caption is masked: what the slowly moving copies take it for, looking at its picture, or at another one; "
        f"{RIGHT}: the word it was.{' Last, what the network itself takes it for.' if NETWORK in looks else ''}"
    )
    return Gallery(list(looks), [subject.pieces.text(row) for row in ids], rows, caption, notes)


NETWORK = "network"
"""The row of the network itself."""


def _masked_looks(subject: Subject, numbers: Sequence[int]) -> dict[str, tuple[Sequence[int], bool]]:
    """By row: which pictures are looked at, and whether by the copies; by the network, too, if they differ."""
    every = len(subject.ids)
    looks: dict[str, tuple[Sequence[int], bool]] = {"its picture": (numbers, True)}
    if every > 1:
        looks["another picture"] = [(number + every // 2) % every for number in numbers], True
    return looks if _copies_are_alike(subject.network) else {**looks, NETWORK: (numbers, False)}


def _copies_are_alike(network: Pretraining) -> bool:
    """Whether the copies are as the network is."""
    parts = [(getattr(network, name), getattr(network, f"{name}_m")) for name in network.followed]
    return all(torch.equal(*pair) for one, other in parts for pair in zip(one.parameters(), other.parameters(), strict=True))


def masked_place(subject: Subject, number: int, probes: Collection[int]) -> int | None:
    """Where a caption is masked: its first probe, else the word that is in the fewest captions, the first of those; None without words.

    Only words of one token are masked.
    """
    starts: list[int] = [span.start for _, span in subject.words(number) if span.stop - span.start == 1]
    tokens = {place: int(subject.ids[number, place]) for place in starts}
    asked = [place for place, token in tokens.items() if token in probes]
    if asked or not tokens:
        return asked[0] if asked else None
    captions = {place: int((subject.ids == token).any(1).sum()) for place, token in tokens.items()}
    return min((held, place) for place, held in captions.items())[1]


def word_chances(network: Pretraining, images: Tensor, ids: Tensor, mask: Tensor, slowly: bool) -> Float[Tensor, "n length vocabulary"]:
    """The probabilities of all tokens at each place, by the network or by its copies."""
    look, read = (network.visual_encoder_m, network.text_encoder_m) if slowly else (network.visual_encoder, network.text_encoder)
    return read.words(read.bert(ids, mask, [look(images)])).softmax(-1)  # type: ignore[no-any-return]


def _best_words(pieces: WordPiece, chances: Float[Tensor, "vocabulary"], truth: int) -> str:
    """The likeliest tokens; the true one is named even if it is none of them."""
    best = chances.topk(min(BEST, len(chances))).indices.tolist()
    named = best if truth in best else [*best, truth]
    return "\n".join(f"{pieces.words[token]} {_percent(chances[token], token == truth)}" for token in named)


# ---- what belongs together ------------------------------------------------------------------------------------------


def nearest_texts(subject: Subject, shown: int = 5) -> Gallery:
    """The captions that the copies find most like some pictures.

    Source: figure 2, the most likely texts of an image's pseudo-targets.
    """
    texts = list(dict.fromkeys(subject.texts))
    chances = subject.similarities[:, [subject.texts.index(text) for text in texts]].softmax(1)
    rows, notes = [], []
    for number, row in enumerate(chances[:shown]):
        best = row.topk(min(BEST, len(row))).indices.tolist()
        rows.append([subject.pictures[number], *[None] * len(best)])
        notes.append(["", *(f"{texts[i]}\n{_percent(row[i], texts[i] == subject.texts[number])}" for i in best)])
    caption = (
        f"Of {len(texts)} captions, those that the slowly moving copies find most like each picture, with the probabilities that "
        f"they teach; {RIGHT}: its own caption."
    )
    return _ranking("picture", rows, notes, caption)


def nearest_images(subject: Subject, shown: int = 5) -> Gallery:
    """The pictures that the copies find most like some captions."""
    texts = list(dict.fromkeys(subject.texts))[:shown]
    chances = subject.similarities[:, [subject.texts.index(text) for text in texts]].T.softmax(1)
    rows, notes = [], []
    for text, row in zip(texts, chances, strict=True):
        best = row.topk(min(BEST, len(row))).indices.tolist()
        rows.append([None, *(subject.pictures[i] for i in best)])
        notes.append([text, *(_percent(row[i], subject.texts[i] == text) for i in best)])
    caption = (
        f"Of {len(subject.texts)} pictures, those that the slowly moving copies find most like each caption, with the probabilities "
        f"that they teach; {RIGHT}: a picture with this caption."
    )
    return _ranking("caption", rows, notes, caption)


def _ranking(asked: str, rows: Sequence[Sequence[Picture | None]], notes: Sequence[Sequence[str]], caption: str) -> Gallery:
    ranks = [f"{rank}" for rank in range(1, len(rows[0]))]
    return Gallery([f"{number}" for number in range(len(rows))], [asked, *ranks], rows, caption, notes)


def _percent(probability: float | Tensor, right: bool = False) -> str:
    """A probability or a share, marked if what it is of is right.

    >>> _percent(0.934, True)
    '93% ✓'
    """
    share = "<1%" if 0 < probability < 0.005 else f"{float(probability):.0%}"
    return f"{share} {RIGHT}" if right else share
