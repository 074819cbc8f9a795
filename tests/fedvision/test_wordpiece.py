"""WordPiece: cutting against a naive reading of the rule, cleaning, files that are wrong, vocabularies that are trained."""

import json
import pickle
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedvision.errors import ExperimentError
from fedvision.wordpiece import SPECIAL, WordPiece, bundled, cleaned_caption, cleaned_question, trained, words_of

PIECES = WordPiece((*SPECIAL, "a", "b", "ab", "##a", "##b", "##ba", "ring", "##s", ",", "café", "cafe", "中"))

short_words = st.dictionaries(st.text("abc", min_size=1, max_size=6), st.integers(1, 9), min_size=1, max_size=12)


def naively_cut(word, words):
    """The longest piece that fits first; all of the word unknown if none does."""
    pieces, start = [], 0
    while start < len(word):
        for stop in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:stop]
            if piece in words:
                break
        else:
            return ["[UNK]"]
        pieces.append(piece)
        start = stop
    return pieces


# ---- texts as tokens ------------------------------------------------------------------------------------------------


@given(st.lists(st.text("abc", min_size=1, max_size=7), max_size=4))
def test_words_are_cut_greedily(words):
    ids = PIECES([" ".join(words)], 100).ids[0].tolist()
    assert [PIECES.words[number] for number in ids] == ["[CLS]", *(piece for word in words for piece in naively_cut(word, PIECES.words))]


def test_texts_begin_with_cls_and_end_without_sep_unless_asked():
    ids, mask = PIECES(["ring a", "rings a a", ""], 10)
    assert ids.tolist() == [[2, 11, 5, 0, 0], [2, 11, 12, 5, 5], [2, 0, 0, 0, 0]]
    assert mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5, [True] + [False] * 4]
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool
    ended = PIECES(["ring a", ""], 10, ended=True)
    assert ended.ids.tolist() == [[2, 11, 5, 3], [2, 3, 0, 0]]
    assert torch.equal(ended.mask, ended.ids != PIECES.pad)


def test_long_texts_are_cut_off_but_keep_their_end():
    assert PIECES(["a b a b a b"], 4).ids.tolist() == [[2, 5, 6, 5]]
    assert PIECES(["a b a b a b"], 4, ended=True).ids.tolist() == [[2, 5, 6, 3]]
    assert PIECES(["a"], 1).ids.tolist() == [[2]]
    for longest, ended in ((0, False), (1, True)):
        with pytest.raises(ExperimentError, match="leave no place for"):
            PIECES(["a"], longest, ended=ended)


def test_no_texts_make_an_empty_batch():
    ids, mask = PIECES([], 5)
    assert ids.shape == mask.shape == (0, 0) and ids.dtype == torch.int64 and mask.dtype == torch.bool


def test_basic_tokenization_is_berts():
    assert words_of("Ein CAFÉ,中文 a\tb\x00") == ["ein", "cafe", ",", "中", "文", "a", "b"]
    assert PIECES(["CAFÉ,中"], 9).ids[0, 1:].tolist() == [PIECES.words.index(word) for word in ("cafe", ",", "中")]


def test_a_text_cannot_say_a_special_token():
    assert PIECES(["[MASK] [PAD] [SEP]"], 30).ids[0, 1:].eq(PIECES.unknown).all()


def test_words_of_more_than_a_hundred_characters_are_unknown():
    assert PIECES(["a" * 100], 200).ids.shape == (1, 101)
    assert PIECES(["a" * 101], 200).ids.tolist() == [[2, 1]]


def test_tokens_read_as_text_again():
    ids = PIECES(["Rings, a rings abba", "x"], 20, ended=True).ids
    assert [PIECES.text(row) for row in ids] == ["rings , a rings abba", "[UNK]"]
    assert PIECES.text([2, 4, 12, 5]) == "[MASK]s a"


def test_special_tokens_are_found_wherever_they_are():
    other = WordPiece(("a", "[MASK]", "[SEP]", "[UNK]", "[PAD]", "[CLS]"))
    assert (other.pad, other.unknown, other.begin, other.end, other.mask, other.size) == (4, 3, 5, 2, 1, 6)
    assert other(["a q", "a"], 9).ids.tolist() == [[5, 0, 3], [5, 0, 4]]


def test_equal_vocabularies_are_equal_and_can_be_sent():
    PIECES(["a"], 5)
    again = pickle.loads(pickle.dumps(PIECES))
    assert again == PIECES and hash(again) == hash(PIECES) and again(["ring"], 5).ids.tolist() == [[2, 11]]
    assert WordPiece(PIECES.words, "elsewhere") == PIECES != WordPiece((*PIECES.words, "more"))


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["\n".join(PIECES.words), "\n".join(PIECES.words) + "\n", "\r\n".join(PIECES.words) + "\r\n"])
def test_a_file_has_one_token_a_line(tmp_path, content):
    file = tmp_path / "vocab.txt"
    file.write_bytes(content.encode())
    assert WordPiece.of_file(str(file)) == PIECES


def test_unusual_white_space_is_a_token(tmp_path):
    words = (*SPECIAL, "\u2028", "\x85", "a")
    (tmp_path / "vocab.txt").write_bytes("\n".join(words).encode())
    assert WordPiece.of_file(str(tmp_path / "vocab.txt")).words == words


def test_a_json_list_is_a_vocabulary_too(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps(PIECES.words))
    assert WordPiece.of_file(str(tmp_path / "vocab.json")) == PIECES


@pytest.mark.parametrize("token", SPECIAL)
def test_a_missing_special_token_is_named_with_the_file(tmp_path, token):
    (tmp_path / "vocab.txt").write_text("\n".join(word for word in PIECES.words if word != token))
    with pytest.raises(ExperimentError) as error:
        WordPiece.of_file(str(tmp_path / "vocab.txt"))
    assert f"vocab.txt has no {token}; add {token}, or give a vocabulary as BERT's vocab.txt" in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", "\n".join((*SPECIAL, "a", "b", "a")).encode(), r"vocab\.txt has the token 'a' twice, in places 6 and 8; remove one"),
        ("vocab.txt", "\n".join((*SPECIAL, "", "b")).encode(), r"line 6 of .*vocab\.txt is empty; remove it"),
        ("vocab.txt", b"[PAD]\n\xff\xfe", r"vocab\.txt is not UTF-8 .*; save it as UTF-8"),
        ("vocab.txt", b"", r"vocab\.txt has no \[PAD\]|is empty"),
        ("vocab.json", b"[1, 2]", r"vocab\.json is no JSON list of tokens; give one"),
        ("vocab.json", b"{", r"vocab\.json is not JSON"),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ExperimentError, match=message):
        WordPiece.of_file(str(tmp_path / name))


def test_a_file_that_is_missing_is_answered_with_the_bundled_ones(tmp_path):
    with pytest.raises(ExperimentError, match=r"no vocabulary 'scene': neither a file nor a bundled one; .*did you mean 'scenes'\?"):
        WordPiece.of_file("scene")


@pytest.mark.parametrize("name", bundled())
def test_bundled_vocabularies_are_found_by_name(name):
    assert WordPiece.of_file(name).pad == 0


# ---- cleaning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("A dog, a cat.", "a dog a cat"),
        ('It\'s "(1*2)#3:4;5~6!?"', "its 123456"),
        ("T-shirt and/or <person>", "t shirt and or person"),
        ("  many \n\n spaces\there \n", "many spaces\there"),
        ("a - b", "a b"),
        ("", ""),
        ("...", ""),
    ],
)
def test_captions_are_cleaned(text, clean):
    assert cleaned_caption(text) == clean


def test_captions_have_thirty_words_at_most():
    words = [f"w{i}" for i in range(40)]
    assert cleaned_caption(" ".join(words)) == " ".join(words[:30])
    assert cleaned_caption(" ".join(words), words=3) == "w0 w1 w2"
    assert cleaned_question(" ".join(words)) == " ".join(words[:30])
    assert cleaned_question(" ".join(words), words=50) == " ".join(words)


def test_questions_keep_their_white_space_but_the_last():
    assert cleaned_question(" Is it - a/c?  ") == " is it   a c"
    assert cleaned_question("What is <person>?", words=2) == "what is"
    assert cleaned_question("one  two three", words=2) == "one "


# ---- making a vocabulary --------------------------------------------------------------------------------------------


def naively_trained(counts, room):
    """All stages, each from scratch; the pieces of the last that has room."""
    words = {word: [word[0], *("##" + letter for letter in word[1:])] for word in counts}
    fitting = set()
    while True:
        pieces = {piece for word in words.values() for piece in word if len(piece.removeprefix("##")) > 1}
        fitting = pieces if len(pieces) <= room else fitting
        pairs = Counter()
        for word, cut in words.items():
            for pair in pairwise(cut):
                pairs[pair] += counts[word]
        if not pairs:
            return fitting
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for cut in words.values():
            place = 0
            while place + 1 < len(cut):
                if (cut[place], cut[place + 1]) == best:
                    cut[place : place + 2] = [best[0] + best[1][2:]]
                place += 1


@given(short_words, st.integers(0, 15))
def test_pieces_are_those_of_a_naive_training(counts, room):
    letters = sorted(set("".join(counts)))
    tokens = trained(counts, 5 + 2 * len(letters) + room)
    assert tokens[: 5 + 2 * len(letters)] == (*SPECIAL, *letters, *(f"##{letter}" for letter in letters))
    pieces = tokens[5 + 2 * len(letters) :]
    assert set(pieces) == naively_trained(counts, room) and len(pieces) == len(set(pieces)) <= room


@given(short_words, st.integers(0, 15))
def test_no_word_that_was_counted_is_unknown(counts, room):
    tokens = trained(counts, 11 + room)
    pieces = WordPiece(tokens)
    assert not (pieces([" ".join(counts)], 1000).ids == pieces.unknown).any()


def test_with_room_enough_every_word_is_one_token():
    counts = {"ring": 5, "rings": 2, "string": 2, "a": 9, ",": 1}
    tokens = trained(counts, 1000)
    assert set(counts) <= set(tokens)
    assert len(tokens) == 5 + 2 * 8 + 3  # eight characters, three words that are more than one


def test_training_does_not_depend_on_the_order_of_the_counts():
    counts = dict.fromkeys(("abc", "bcd", "cde", "dea", "eab", "abd"), 2)
    assert trained(counts, 19) == trained(dict(reversed(counts.items())), 19)
    assert len(trained(counts, 19)) == 19


def test_a_vocabulary_too_small_for_its_characters_is_refused():
    with pytest.raises(ExperimentError, match=r"of 10 tokens has no place for the 3 characters .*; choose at least 11"):
        trained({"abc": 1}, 10)
