"""WordPiece: texts as numbers of pieces of words, from a vocabulary of BERT's kind; how captions are cleaned; how a vocabulary is made.

A vocabulary is a list of pieces, each known by its place in it. A piece that begins with ``##`` goes on with a word; a word is cut
greedily, the longest piece that fits first, and is [UNK] as a whole if that fails.

Source: Wu et al. 2016 (arXiv 1609.08144), section 4.1; Devlin et al. 2019 (BERT) for basic tokenization and special tokens.
"""

import heapq
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from fedvision.errors import ExperimentError
from fedvision.settings import nearest

PAD, UNKNOWN, BEGIN, END, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"

SPECIAL = (PAD, UNKNOWN, BEGIN, END, MASK)
"""What every vocabulary must have: padding, a word that cannot be cut, begin and end of a text, a hidden piece."""

LONGEST_WORD = 100
"""A word of more characters is [UNK], as with BERT."""


class Tokens(NamedTuple):
    """Texts as numbers, all padded to the longest of them.

    Attributes:
        ids: rows of the vocabulary.
        mask: where there is a token, not padding.
    """

    ids: Int64[Tensor, "n length"]
    mask: Bool[Tensor, "n length"]


@dataclass(frozen=True)
class WordPiece:
    """A tokenizer: two with the same words are equal.

    Texts are lower-cased, lose their accents, and are split at spaces, at punctuation and around Chinese characters before they are cut.
    What a text says never is a special token: a caption that holds the characters ``[MASK]`` hides nothing.

    Attributes:
        words: the vocabulary; the number of a token is its place.
        source: where it is from, for messages.

    Raises:
        ExperimentError: a special token is missing, or a token stands there twice.

    Example:
        >>> pieces = WordPiece(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "ring", "##s"))
        >>> pieces(["A ring", "rings, a ring"], longest=5).ids.tolist()
        [[2, 5, 6, 0, 0], [2, 6, 7, 1, 5]]
        >>> pieces.text([2, 6, 7, 5, 3, 0])
        'rings a'
    """

    words: tuple[str, ...]
    source: str = "the vocabulary"

    def __post_init__(self) -> None:
        for token in SPECIAL:
            if token not in self._numbers:
                remedy = f"add {token}, or give a vocabulary as BERT's vocab.txt"
                raise ExperimentError(f"{self.source} has no {token}; {remedy} ({', '.join(SPECIAL)} must be there)")
        if len(self._numbers) < len(self.words):
            twice = next(word for word, times in Counter(self.words).items() if times > 1)
            places = [place for place, word in enumerate(self.words, 1) if word == twice]
            fact = f"{self.source} has the token {twice!r} twice, in places {places[0]} and {places[1]}"
            raise ExperimentError(f"{fact}; remove one of them (the later ones move up)")

    @classmethod
    def of_file(cls, name_or_path: str) -> "WordPiece":
        """The tokenizer of a file such as BERT's ``vocab.txt``, or of a vocabulary that comes with FedVision.

        Args:
            name_or_path: a file of one token a line in UTF-8, or of a JSON list of tokens if its name ends in ``.json``; or the name of
                a bundled one (``bundled``), such as ``scenes``.

        Raises:
            ExperimentError: no such file, one that is no text, an empty line, a token that is missing or there twice.
        """
        path = Path(name_or_path)
        if not path.is_file():
            known = bundled()
            if name_or_path not in known:
                fact = f"no vocabulary {name_or_path!r}: neither a file nor a bundled one"
                raise ExperimentError(f"{fact}; give the path of a file of one token a line; {nearest(name_or_path, list(known))}")
            path = known[name_or_path]
        return cls(_listed(path) if path.suffix == ".json" else _lines(path), str(name_or_path))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WordPiece) and self.words == other.words

    def __hash__(self) -> int:
        return self._hash

    def __call__(self, texts: Sequence[str], longest: int, *, ended: bool = False) -> Tokens:
        """Texts as [CLS] w1 ... wn, with a [SEP] at the end or without, padded to the longest of them.

        An empty text is [CLS] alone. No texts give no columns.

        Args:
            texts: any; clean them first where that is wanted.
            longest: tokens of a text at most, special ones included; what is beyond is cut off, but never the [SEP].
            ended: whether [SEP] ends each text.

        Raises:
            ExperimentError: ``longest`` leaves no place for the special tokens.

        Source: ALBEF, whose reference ends texts without [SEP], but the answers that its decoder learns.
        """
        own = 1 + ended
        if longest < own:
            raise ExperimentError(f"{longest} tokens a text leave no place for {BEGIN}{f' and {END}' if ended else ''}; choose more")
        last = [self.end] if ended else []
        rows = [[self.begin, *self._cut(text)[: longest - own], *last] for text in texts]
        length = max(map(len, rows), default=0)
        ids = torch.tensor([row + [self.pad] * (length - len(row)) for row in rows], dtype=torch.int64).reshape(len(rows), length)
        mask = torch.arange(length) < torch.tensor([len(row) for row in rows], dtype=torch.int64)[:, None]
        return Tokens(ids, mask)

    def text(self, ids: Sequence[int] | Int64[Tensor, "length"]) -> str:
        """Tokens as words again, without [PAD], [CLS] and [SEP]; [MASK] and [UNK] are shown."""
        left_out = {self.pad, self.begin, self.end}
        numbers = ids.tolist() if isinstance(ids, Tensor) else ids
        return " ".join(self.words[number] for number in numbers if number not in left_out).replace(" ##", "")

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return len(self.words)

    @property
    def pad(self) -> int:
        """The number of [PAD]."""
        return self._numbers[PAD]

    @property
    def unknown(self) -> int:
        """The number of [UNK]."""
        return self._numbers[UNKNOWN]

    @property
    def begin(self) -> int:
        """The number of [CLS]."""
        return self._numbers[BEGIN]

    @property
    def end(self) -> int:
        """The number of [SEP]."""
        return self._numbers[END]

    @property
    def mask(self) -> int:
        """The number of [MASK]."""
        return self._numbers[MASK]

    def _cut(self, text: str) -> list[int]:
        """The pieces of a text, by number; text by text, since the library's batches start threads of their own."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}

    @cached_property
    def _hash(self) -> int:
        return hash(self.words)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        model = models.WordPiece(vocab=self._numbers, unk_token=UNKNOWN, max_input_chars_per_word=LONGEST_WORD)
        tokenizer = Tokenizer(model)
        tokenizer.normalizer, tokenizer.pre_tokenizer = _basic()
        return tokenizer


def bundled() -> dict[str, Path]:
    """The vocabularies that come with FedVision, by name; in JSON, since Flower's bundles take no other text."""
    spec = find_spec("fedvision")
    folders = [Path(folder) / "vocabularies" for folder in (spec and spec.submodule_search_locations) or ()]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.json"))}


def _lines(path: Path) -> tuple[str, ...]:
    """The tokens of a file of one a line; only line feeds end a line, since some tokens are unusual white space."""
    words = [line.removesuffix("\r") for line in _read(path).split("\n")]
    if words[-1] == "":
        words.pop()
    if "" in words:
        raise ExperimentError(f"line {words.index('') + 1} of {path} is empty; remove it, if no token is meant (the later ones move up)")
    return tuple(words)


def _listed(path: Path) -> tuple[str, ...]:
    """The tokens of a file of a JSON list."""
    text = _read(path)
    try:
        words = json.loads(text)
    except ValueError as error:
        raise ExperimentError(f"{path} is not JSON ({error}); give a list of tokens, or a file of one token a line as vocab.txt") from error
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise ExperimentError(f"{path} is no JSON list of tokens; give one, or a file of one token a line as vocab.txt")
    return tuple(words)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ExperimentError(f"{path} cannot be read ({error}); give a file of one token a line") from error
    except UnicodeDecodeError as error:
        raise ExperimentError(f"{path} is not UTF-8 ({error}); save it as UTF-8, one token a line") from error


@cache
def _basic() -> tuple[normalizers.Normalizer, pre_tokenizers.PreTokenizer]:
    """BERT's basic tokenization."""
    normalizer = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=True, lowercase=True)
    return normalizer, pre_tokenizers.BertPreTokenizer()


def words_of(text: str) -> list[str]:
    """The words that a text is split into before they are cut: in lower case, without accents, punctuation apart.

    >>> words_of("A café's mid-sized cup")
    ['a', 'cafe', "'", 's', 'mid', '-', 'sized', 'cup']
    """
    normalizer, splitter = _basic()
    return [word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]


# ---- cleaning -------------------------------------------------------------------------------------------------------

_DELETED, _SPACED = re.compile(r"[,.'!?\"()*#:;~]"), re.compile(r"[-/]")


def cleaned_caption(text: str, words: int = 30) -> str:
    """A caption in lower case without punctuation, of its first words only.

    Args:
        text: the caption.
        words: so many are kept.

    Source: ALBEF's reference: , . ' ! ? " ( ) * # : ; ~ are deleted, - and / become spaces, <person> becomes person.

    Example:
        >>> cleaned_caption("A man's T-shirt,  <person> (red/blue)!")
        'a mans t shirt person red blue'
    """
    plain = _without_punctuation(text).replace("<person>", "person")
    return " ".join(re.sub(r"\s{2,}", " ", plain).strip().split(" ")[:words])


def cleaned_question(text: str, words: int = 30) -> str:
    """A question, cleaned as captions are, but white space stays as it is, and so does what stands before it.

    Args:
        text: the question.
        words: so many are kept; ALBEF keeps 30 in training and 50 in the test.

    Source: ALBEF's reference. Two spaces in a row have an empty word between them, which counts.

    Example:
        >>> cleaned_question(" Is it A/C  or not? ")
        ' is it a c  or not'
    """
    return " ".join(_without_punctuation(text).rstrip().split(" ")[:words])


def _without_punctuation(text: str) -> str:
    return _SPACED.sub(" ", _DELETED.sub("", text.lower()))


# ---- making a vocabulary --------------------------------------------------------------------------------------------


def trained(counts: Mapping[str, int], size: int) -> tuple[str, ...]:
    """A vocabulary for words that are counted: their characters, and the pieces that most often make them up.

    Words begin as characters. Again and again, the two neighboring pieces that are most often side by side become one, of pairs as frequent
    as each other the first by alphabet. Of all stages of this, the last is kept whose vocabulary is small enough; pieces that only led to
    longer ones are not in it. So if there is room, every word is one token.

    Args:
        counts: words in lower case as ``words_of`` gives them, and how often each occurs.
        size: tokens at most, special ones and characters included.

    Returns:
        The special tokens, [PAD] first; every character of the words, and every one that does not begin a word; pieces, the most frequent
        first. No word of ``counts`` is unknown, unless it has more than ``LONGEST_WORD`` characters.

    Raises:
        ExperimentError: the special tokens and the characters alone are more than ``size``.

    Differs: the trainer of ``tokenizers`` breaks ties in another way each time, and the same words give another vocabulary.

    Example:
        >>> trained({"ring": 3, "rings": 2, "string": 1}, size=100)[-3:]
        ('ring', 'rings', 'string')
    """
    characters = sorted(set("".join(counts)))
    alphabet = [*characters, *(f"##{character}" for character in characters)]
    least = len(SPECIAL) + len(alphabet)
    if size < least:
        fact = f"a vocabulary of {size} tokens has no place for the {len(characters)} characters of its words, alone and within words"
        raise ExperimentError(f"{fact}, and the {len(SPECIAL)} special tokens; choose at least {least}")
    used = _pieces(counts, set(alphabet), size - least)
    return (*SPECIAL, *alphabet, *sorted(used, key=lambda piece: (-used[piece], piece)))


def _pieces(counts: Mapping[str, int], alphabet: set[str], room: int) -> dict[str, int]:
    """The pieces of the last stage that are at most ``room``, and how often each is used; without the alphabet's."""
    merging = Merging(counts)
    inside = {piece: times for piece, times in merging.used.items() if piece not in alphabet}
    fitting = dict(inside)
    changes: dict[str, int] = {}  # since the last stage that fits
    number = len(inside)
    while (pair := merging.most_frequent()) is not None:
        for piece in merging.merge(pair):
            if piece not in alphabet:
                changes[piece] = merging.used[piece]
                number += (merging.used[piece] > 0) - (inside.get(piece, 0) > 0)
                inside[piece] = merging.used[piece]
        if number <= room:
            fitting.update(changes)
            changes.clear()
    return {piece: times for piece, times in fitting.items() if times > 0}


class Merging:
    """Words as pieces, of which pairs are merged; it counts what is side by side as it goes.

    Attributes:
        used: how often each piece is in the words, each as often as it is counted.
    """

    def __init__(self, counts: Mapping[str, int]) -> None:
        self.used: Counter[str] = Counter()
        self._counts = [counts[word] for word in counts]
        self._words = [[word[0], *(f"##{character}" for character in word[1:])] for word in counts if word]
        self._pairs: Counter[tuple[str, str]] = Counter()
        self._where: dict[tuple[str, str], set[int]] = {}
        for index in range(len(self._words)):
            self._count(index, 1)
        self._queue = [(-times, pair) for pair, times in self._pairs.items()]
        heapq.heapify(self._queue)

    def most_frequent(self) -> tuple[str, str] | None:
        """The pair that is most often side by side, the first by alphabet of those; None if every word is one piece."""
        while self._queue:
            times, pair = self._queue[0]
            if -times == self._pairs[pair] and times < 0:
                return pair
            heapq.heappop(self._queue)  # outdated
        return None

    def merge(self, pair: tuple[str, str]) -> Iterable[str]:
        """Make one piece of a pair wherever it is; returns the pieces that are used more or less often now."""
        joined = pair[0] + pair[1].removeprefix("##")
        changed: set[tuple[str, str]] = set()
        for index in sorted(self._where[pair]):
            changed.update(pairwise(self._words[index]))
            self._count(index, -1)
            self._words[index] = _merged(self._words[index], pair, joined)
            self._count(index, 1)
            changed.update(pairwise(self._words[index]))
        for other in sorted(changed):
            if self._pairs[other] > 0:
                heapq.heappush(self._queue, (-self._pairs[other], other))
        return {*pair, joined}

    def _count(self, index: int, sign: int) -> None:
        word, times = self._words[index], sign * self._counts[index]
        for piece in word:
            self.used[piece] += times
        for pair in pairwise(word):
            self._pairs[pair] += times
            here = self._where.setdefault(pair, set())
            here.add(index) if sign > 0 else here.discard(index)


def _merged(word: Sequence[str], pair: tuple[str, str], joined: str) -> list[str]:
    """A word whose pairs of this kind are one piece each, from the left."""
    result: list[str] = []
    for piece in word:
        if result and (result[-1], piece) == pair:
            result[-1] = joined
        else:
            result.append(piece)
    return result
