"""Your own questions about pictures, from JSON as ALBEF's or as VQA's own."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedvision.data.annotations import Record, check_there, divided, encoded, filled, grouped, in_parts, listed, read_json, records
from fedvision.data.examples import ANSWER, ANSWER_WEIGHT, IMAGE, LABEL, QUESTION, Examples
from fedvision.data.pictures import existing, read_images
from fedvision.data.pool import Pool
from fedvision.errors import DataError
from fedvision.registry import datasets
from fedvision.settings import Count, Fraction

GENOME_WEIGHT = 0.5
"""How much the answers of Visual Genome count, which one person gave."""

KIND = "a list of {image, question, answer, ...} as ALBEF's, or VQA's own file of questions with data.answers"


@dataclass(frozen=True)
class Asked:
    """A question and its different answers, each with its weight, the weightiest first."""

    text: str
    answers: Mapping[str, float]


@datasets("vqa")
def vqa(
    *,
    root: str,
    annotations: tuple[str, ...] = ("vqa_train.json",),
    test_annotations: tuple[str, ...] = (),
    answers: tuple[str, ...] = (),
    images: str = "images",
    genome_images: str | None = None,
    test_fraction: Fraction = 0.2,
    size: Count = 224,
    questions: Count = 8,
    most_answers: Count = 10,
    rng: np.random.Generator,
) -> Pool:
    """Your questions about pictures, from JSON as ALBEF's lists for VQA and Visual Genome, or as VQA's own files.

    Fields: ``image``, all of a picture, stretched to a square; ``question``, ``answer``, ``answer_weight`` (``fedvision.data.examples``);
    ``label``, -1. A record of ALBEF's is ``{image, question, answer: [...], dataset}``: an answer weighs as large a share as it has of
    all answers to the question; that of a record whose ``dataset`` is ``vg`` weighs 0.5. A picture with more questions is there again.

    Args:
        root: folder that the other paths start from.
        annotations: the JSON files to train on: ALBEF's lists, or VQA's questions, whose ``answers`` must be named.
        test_annotations: those of the test set, whose questions may lack answers; not given: a random share of the pictures is it.
        answers: VQA's own files of annotations, with the answers to its questions.
        images: folder that holds the pictures; VQA's own are ``train2014/COCO_train2014_000000000009.jpg`` and so on in it.
        genome_images: folder of those of Visual Genome; not given: ``images``.
        test_fraction: share of the test set where no file says what it is; strictly between 0 and 1.
        size: of the pictures in pixels.
        questions: of an example.
        most_answers: different ones to a question; rarer ones are left out.
        rng: draws the test set.

    Raises:
        DataError: a missing file or picture, JSON of another kind, a question without an answer to train on.
    """
    folder = existing(Path(root), "set data.root")
    if not annotations:
        raise DataError("vqa.annotations names no file; name the JSON files to train on")
    known = _answers([folder / name for name in answers])
    reading = Reading(folder / images, folder / (genome_images or images), known, most_answers)
    train = reading.asked([folder / name for name in annotations], "data.annotations")
    if test_annotations:
        test = reading.asked([folder / name for name in test_annotations], "data.test_annotations", unanswered=True)
    else:
        train, test = divided(train, test_fraction, ", ".join(annotations), rng)
    return Pool(_examples(train, size, questions), _examples(test, size, questions), classes=0)


@dataclass(frozen=True)
class Reading:
    """How files become questions.

    Attributes:
        images: folder of the pictures.
        genome: folder of Visual Genome's.
        answers: of VQA's own files, by the question's id.
        most: different answers that are kept.
    """

    images: Path
    genome: Path
    answers: Mapping[Any, Sequence[str]]
    most: int

    def asked(self, files: Sequence[Path], setting: str, unanswered: bool = False) -> dict[Path, list[Asked]]:
        """The questions of files by picture."""
        pairs = []
        for file in files:
            found = self._questions(file, setting, unanswered)
            check_there([picture for picture, _ in found], str(file), "data.images")
            pairs += found
        return grouped(pairs)

    def _questions(self, file: Path, setting: str, unanswered: bool) -> list[tuple[Path, Asked]]:
        content = read_json(file, setting)
        own = isinstance(content, dict) and "questions" in content
        some = listed(content, str(file), KIND, "questions" if own else None)
        of_one = self._of_vqa if own else self._of_albef
        subset = str(content.get("data_subtype", "")) if own else ""
        found = [of_one(record, subset) for record in some]
        for record, (_, asked) in zip(some, found, strict=True):
            if not asked.answers and not unanswered:
                raise DataError(f"{record.where} has no answer; add one, or name VQA's annotations in data.answers")
        return found

    def _of_albef(self, record: Record, subset: str) -> tuple[Path, Asked]:
        genome = record.values.get("dataset") == "vg"
        given = record.texts("answer") if "answer" in record.values else []
        answers = dict.fromkeys(given[:1], GENOME_WEIGHT) if genome else shares(given, self.most)
        return (self.genome if genome else self.images) / record.text("image"), Asked(record.text("question"), answers)

    def _of_vqa(self, record: Record, subset: str) -> tuple[Path, Asked]:
        number = record.value("image_id")
        if not isinstance(number, int):
            raise DataError(f"{record.where} has 'image_id' = {number!r}; give a whole number, as VQA's files do")
        answers = shares(self.answers.get(record.key("question_id"), ()), self.most)
        return self.images / subset / f"COCO_{subset}_{number:012d}.jpg", Asked(record.text("question"), answers)


def shares(answers: Sequence[str], most: int) -> dict[str, float]:
    """The share that each different answer has of all, of the most frequent ones; the first of equals first.

    >>> shares(["two", "2", "two", "two"], most=10)
    {'two': 0.75, '2': 0.25}
    """
    return {answer: times / len(answers) for answer, times in Counter(answers).most_common(most)}


def _answers(files: Sequence[Path]) -> dict[Any, list[str]]:
    """All answers to each question of VQA's annotations."""
    found = {}
    for file in files:
        for record in records(file, "data.answers", "VQA's own file of annotations", "annotations"):
            given = listed(record.value("answers"), f"{record.where}, 'answers'", "a list of {answer, ...}")
            found[record.key("question_id")] = [one.text("answer") for one in given]
    return found


def _examples(asked: Mapping[Path, Sequence[Asked]], size: int, questions: int) -> Examples:
    parts = in_parts(asked, questions)
    number = max((len(some) for _, some in parts), default=0)
    most = max([1, *(len(question.answers) for _, some in parts for question in some)])
    answers = [[list(question.answers) for question in some] + [[]] * (number - len(some)) for _, some in parts]
    codes = encoded([some for each in answers for some in each], most)
    weights = [[[*question.answers.values(), *[0.0] * (most - len(question.answers))] for question in some] for _, some in parts]
    return Examples(
        {
            IMAGE: read_images([picture for picture, _ in parts], size, fit="stretch"),
            QUESTION: encoded([[question.text for question in some] for _, some in parts], number),
            ANSWER: codes.reshape(len(parts), number, *codes.shape[1:]),
            ANSWER_WEIGHT: filled(weights, number, [0.0] * most).to(torch.float32),
            LABEL: torch.full((len(parts),), -1),
        }
    )
