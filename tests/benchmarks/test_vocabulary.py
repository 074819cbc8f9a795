"""The vocabulary of a federation: rare words stay in their silo, what is kept is what enough silos report."""

import json

import pytest
import torch

from benchmarks.display import first_texts
from benchmarks.vocabulary import counted, vocabulary, write
from fedvision.data.examples import Examples
from fedvision.data.federated import FederatedData, Silos
from fedvision.data.texts import encode_texts
from fedvision.errors import ExperimentError, RunError
from fedvision.wordpiece import SPECIAL, WordPiece


def silo(*captions, **fields):
    n = len(captions)
    image = {"image": torch.zeros(n, 1, 2, 2), "label": torch.zeros(n, dtype=torch.int64)}
    codes = encode_texts(captions)
    padded = torch.nn.functional.pad(codes, (0, 40 - codes.shape[2], 0, 2 - codes.shape[1]))
    return Examples(image | {"caption": padded} | fields)


def federation(*silos):
    return FederatedData("small", Silos.of(silos), None, silos[0], 2)


TWO = federation(
    silo(["a red ring", "the ring ring"], ["A RING!"], ["xavier's ring"], ["a box"]),
    silo(["ring"], ["a ring of zoe"], ["red zoe"], ["a zoe"]),
)


def test_a_word_counts_once_an_example_in_all_texts():
    assert counted(TWO.train[0]) == {"a": 3, "red": 1, "ring": 3, "the": 1, "!": 1, "xavier": 1, "'": 1, "s": 1, "xaviers": 1, "box": 1}


def test_all_fields_of_texts_are_counted():
    answers = encode_texts([["yes", "no"], ["maybe", "yes"]])[:, :, None]
    counts = counted(silo(["x"], ["x"], question=encode_texts([["is it"], ["is he"]]), answer=answers))
    assert counts == {"x": 2, "is": 2, "it": 1, "he": 1, "yes": 2, "no": 1, "maybe": 1}


def test_only_words_that_are_frequent_in_enough_silos_are_used():
    made = vocabulary(TWO, size=100, least=2, silos=2)
    assert made.counts == {"a": 5, "ring": 5}
    assert not {"zoe", "z", "##z", "x", "red"} & set(made.tokens)  # frequent in one silo only, or rare in all
    assert vocabulary(TWO, 100, least=2, silos=1).counts == {"a": 5, "ring": 5, "zoe": 3}
    assert vocabulary(TWO, 100, least=1, silos=2).counts == {"a": 5, "red": 2, "ring": 5}


def test_silos_that_lack_the_texts_report_nothing():
    lacking = silo([""], [""], has_caption=torch.tensor([False, False]))
    whole = silo(["a"], ["a"], has_caption=torch.tensor([True, True]))
    assert vocabulary(federation(whole, lacking), 20, least=1, silos=1).counts == {"a": 2}


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (TWO, {"size": 100, "least": 1, "silos": 3}, "3 silos are to report a word, but there are 2"),
        (TWO, {"size": 100, "least": 4, "silos": 2}, r"no word that 4 examples hold in each of 2 silos; .*--least"),
        (TWO, {"size": 5, "least": 1, "silos": 2}, "a vocabulary of 5 tokens has no place"),
    ],
)
def test_settings_that_leave_nothing_are_refused(data, settings, message):
    with pytest.raises(ExperimentError, match=message):
        vocabulary(data, **settings)


def test_data_without_texts_are_refused(federated):
    with pytest.raises(ExperimentError, match="has no texts, only image, label; name one of caption, question"):
        vocabulary(federated, 100, 1, 1)


def test_what_is_written_is_read_again_and_never_overwritten(tmp_path):
    for name in ("vocab.txt", "vocab.json"):
        made = write(TWO, 100, 1, 1, tmp_path / name)
        assert WordPiece.of_file(str(tmp_path / name)).words == made.tokens
        with pytest.raises(RunError, match="is there already"):
            write(TWO, 100, 1, 1, tmp_path / name)
    assert json.loads((tmp_path / "vocab.json").read_text())[:5] == list(SPECIAL)


SCENES = """
name = "words"
rounds = 1
[data]
name = "scenes"
examples = 80
test_examples = 10
size = 16
fields = ["image", "label", "caption"]
domains = 2
[partition]
name = "environment"
[learner]
name = "classifier"
[strategy]
name = "fedavg"
"""


def test_the_command_makes_one_of_an_experiment(fedvision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.toml").write_text(SCENES)
    ended = fedvision("vocabulary", "words.toml", "--size", "60", "--least", "3", "--out", "vocab.txt")
    assert ended.status == 0, ended.err
    assert "words that at least 2 of the silos report: vocab.txt" in ended.out and "cut into pieces" in ended.out
    assert WordPiece.of_file("vocab.txt").size <= 60
    again = fedvision("vocabulary", "words.toml", "--size", "60", "--out", "vocab.txt")
    assert again.status == 1 and "vocab.txt is there already" in again.err
    assert (
        "has no texts" in fedvision("vocabulary", "words.toml", "--set", 'data.fields=["image", "label"]', "--size", "60", "--out", "x").err
    )


def test_the_card_of_data_with_texts_shows_the_first_of_them(fedvision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.toml").write_text(SCENES)
    ended = fedvision("data", "words.toml", "--set", 'data.fields=["image", "label", "caption", "question", "answer"]')
    lines = {line.split(": ")[0]: line.split(": ", 1)[1].split(" | ") for line in ended.out.splitlines() if " | " in line}
    assert len(lines["caption"]) == 5 and len(lines["question"]) == len(lines["answer"]) == 4
    assert all(question.endswith("?") for question in lines["question"])


def test_examples_that_lack_texts_show_none():
    lacking = silo([""], ["a ring"], ["b"], has_caption=torch.tensor([False, True, True]))
    assert first_texts(lacking) == {"caption": ["a ring"]}
    assert first_texts(silo([""], [""], has_caption=torch.tensor([False, False]))) == {}
