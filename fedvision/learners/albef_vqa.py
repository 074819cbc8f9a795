"""ALBEF fine-tuned to answer questions about pictures.

Source: Align before Fuse, arXiv 2107.07651, section 5; what the paper leaves open from what its public implementation does.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedvision.albef.answering import Answering, Answers, answering_loss, following, telling_losses
from fedvision.data.examples import ANSWER, ANSWER_WEIGHT, IMAGE, QUESTION, Examples
from fedvision.data.federated import Spec
from fedvision.errors import ExperimentError
from fedvision.learners.about_pictures import AboutPictures, Judged, at, drawn_places, in_parts, listed, present, told
from fedvision.learners.image_text import IDS, WORDS, texts_of
from fedvision.learners.learner import Loss
from fedvision.registry import learners
from fedvision.seeds import global_generators
from fedvision.settings import Count
from fedvision.wordpiece import Tokens, cleaned_question

ANSWER_IDS, ANSWER_WORDS = "answer_ids", "answer_words"
"""The fields of a batch that hold the answers to its questions: tokens, int64 [n, answers, length], and where there is one."""

TAUGHT = "taught"
"""That which holds the last vectors of what the copies say of them, [n, answers, length - 1, width]."""

SCENES = "scenes"
"""The name of the list of answers that drawn scenes have."""


def vote_accuracy(share: Float[Tensor, "*n"], people: int) -> Float[Tensor, "*n"]:
    """How right an answer is that a share of people gave.

    Of fewer than four people it is that share. Of more it is min(n / 3, 1), where n of all but one of them gave it, averaged over who
    is left out: of ten people 0, 0.3, 0.6, 0.9 and 1 for none to four.

    >>> vote_accuracy(torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]), 10).tolist()
    [0.0, 0.30000001192092896, 0.6000000238418579, 0.8999999761581421, 1.0]

    Source: the official evaluation of VQA, arXiv 1505.00468, section 3.
    """
    if people < 4:
        return share
    n = (share * people).round()
    return (n * ((n - 1) / 3).clamp(max=1) + (people - n) * (n / 3).clamp(max=1)) / people


@learners("albef-vqa")
@dataclass(frozen=True, kw_only=True)
class ALBEFAnswering(AboutPictures):
    """Fine-tuning of ALBEF to answer questions: a decoder tells answers, of a list the likeliest is chosen.

    Attributes:
        answers: the answers to choose from: a JSON file that holds a list of texts, or ``scenes``, those of drawn scenes.
        shortlist: of them, so many are told to the end, those whose first token is likeliest.
        people: who answered each question; of VQA 10, whose accuracy is then the official one.

    Source: arXiv 2107.07651, section 5. The other half of the recipe belongs to the strategy: AdamW with rate 2e-5 and weight decay
        0.02 for 8 epochs, schedule ``staircase-cosine``.
    Differs: a pass shows each picture once, not once a question; float32 throughout.
    """

    needed = (QUESTION, ANSWER, ANSWER_WEIGHT)
    texts = QUESTION
    answers: str = SCENES
    shortlist: Count = 128
    people: Count = 1

    def build(self, spec: Spec, rng: torch.Generator) -> Answering:
        """The network and its copies.

        Raises:
            ExperimentError: data that are no pictures or lack a field; sizes that do not fit; a vocabulary or checkpoint that does not;
                a list of answers that cannot be read.
        """
        self.choices  # noqa: B018 (a list that cannot be read is found out before anything is built)
        return self.begun(Answering(self.vision_size(spec), self.text_size(), rng, None, self.deviation, self.xavier))

    def cleaned(self, text: str) -> str:
        """As questions are."""
        return cleaned_question(text)

    @cached_property
    def choices(self) -> tuple[str, ...]:
        """The answers to choose from.

        Raises:
            ExperimentError: no such list.
        """
        if self.answers == SCENES:
            from fedvision.data.scenes.questions import ANSWERS

            return ANSWERS
        return answers_of(Path(self.answers))

    # ---- batches -------------------------------------------------------------------------------------------------

    def train_view(self, batch: Examples, rng: torch.Generator) -> Examples:
        """Pictures as the network sees them, a question each, and all of its answers."""
        questions = texts_of(batch, QUESTION)
        places = drawn_places(present(questions), rng)
        ids, mask = self.tokenized(listed(at(questions, places)), batch.device)
        answers, weights = at(texts_of(batch, ANSWER), places), at(batch.fields[ANSWER_WEIGHT], places)
        told = self._answers(listed(answers.flatten(0, 1)), batch.device)
        shape = (*weights.shape, -1)
        seen = {IMAGE: self.seen(batch, rng)[0], IDS: ids, WORDS: mask, ANSWER_WEIGHT: weights}
        return Examples({**seen, ANSWER_IDS: told.ids.view(shape), ANSWER_WORDS: told.mask.view(shape)})

    def _answers(self, texts: list[str], device: torch.device) -> Tokens:
        ids, mask = self.tokens(texts, ended=True)
        return Tokens(ids.to(device), mask.to(device))

    def draw(self, model: nn.Module, train: Examples, index: slice | Tensor, rng: torch.Generator) -> Examples:
        """The training view, and what the copies say of the answers."""
        view = self.train_view(self.drawn(train, index), rng)
        answers, counted = _given(view)
        if not self.alpha:
            return view
        assert isinstance(model, Answering)
        with global_generators(rng):
            hidden = model.teach(view.fields[IMAGE], view.fields[IDS], view.fields[WORDS], answers)
        taught = hidden.new_zeros(*counted.shape, *hidden.shape[1:])
        taught[counted] = hidden
        return Examples({**view.fields, TAUGHT: taught})

    # ---- loss ----------------------------------------------------------------------------------------------------

    def loss(self, model: Callable[..., Any], batch: Examples, progress: float, rng: torch.Generator) -> Loss:
        """The mean over questions of the weighted sum of what their answers cost; a question without any costs nothing."""
        fields = batch.fields
        answers, counted = _given(batch)
        taught = fields[TAUGHT][counted] if TAUGHT in batch else None
        said = model(fields[IMAGE], fields[IDS], fields[WORDS], answers, taught)
        costs = telling_losses(said.own, following(answers.ids, answers.mask), said.taught, self.alpha_at(progress))
        return Loss(answering_loss(costs, fields[ANSWER_WEIGHT][counted], len(batch)))

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def judged(self, model: nn.Module, batch: Examples, pictures: Examples) -> Judged:
        """See ``AboutPictures``."""
        assert isinstance(model, Answering)
        texts, owner, place = told(batch, QUESTION)
        if not texts:
            return Judged(torch.zeros(0), torch.zeros(0), owner)
        tokens, (ids, mask) = model.visual_encoder(self.seen(pictures)[0]), self.tokenized(texts, batch.device)
        answers, weights = texts_of(batch, ANSWER)[owner, place], batch.fields[ANSWER_WEIGHT][owner, place]
        choices = self._answers(list(self.choices), batch.device)
        costs, right = [], []
        for who, some, there, given, weight in in_parts(owner, ids, mask, answers, weights):
            states = model.text_encoder(some, there, [tokens[who]])
            best = model.ranked(states, there, *choices, self.shortlist).answers[:, 0]
            right.append(self._right(best.tolist(), given, weight))
            costs.append(self._costs(model, states, there, given, weight))
        return Judged(torch.cat(costs), torch.cat(right), owner)

    def _right(self, best: list[int], given: Tensor, weights: Tensor) -> Tensor:
        """How right answers to questions are."""
        counted = zip(best, _listed_answers(given, weights), strict=True)
        shares = torch.tensor([dict(answers).get(self.choices[choice], 0.0) for choice, answers in counted])
        return vote_accuracy(shares, self.people)

    def _costs(self, model: Answering, states: Tensor, mask: Tensor, given: Tensor, weights: Tensor) -> Tensor:
        """The weighted sums of what the answers to questions cost."""
        question, place = (weights > 0).nonzero().unbind(1)
        costs = states.new_zeros(len(states))
        if not len(question):
            return costs
        answers = Answers(*self._answers(listed(given[question, place]), states.device), question)
        return costs.index_add(0, question, -weights[question, place] * model.likelihood(states, mask, answers))

    def constant(self, examples: Examples) -> float:
        """See ``AboutPictures``."""
        _, owner, place = told(examples, QUESTION)
        votes: dict[str, float] = {}
        for answers in _listed_answers(texts_of(examples, ANSWER)[owner, place], examples.fields[ANSWER_WEIGHT][owner, place]):
            for answer, share in answers:
                votes[answer] = votes.get(answer, 0.0) + float(vote_accuracy(torch.tensor(share), self.people))
        return max((votes.get(choice, 0.0) for choice in self.choices), default=0.0) / max(len(owner), 1)


def _given(batch: Examples) -> tuple[Answers, Tensor]:
    """The answers to the questions of a batch, and where they are, bool [n, answers]; the first of the first if there is none."""
    counted = batch.fields[ANSWER_WEIGHT] > 0
    if not counted.any():
        counted = torch.zeros_like(counted).index_fill(0, torch.zeros(1, dtype=torch.int64, device=counted.device), True)
    question = counted.nonzero()[:, 0]
    return Answers(batch.fields[ANSWER_IDS][counted], batch.fields[ANSWER_WORDS][counted], question), counted


def _listed_answers(answers: Tensor, weights: Tensor) -> list[list[tuple[str, float]]]:
    """The answers to each question, and their weights."""
    rows = zip(answers, weights.tolist(), strict=True)
    return [[(text, weight) for text, weight in zip(listed(some), counts, strict=True) if weight > 0] for some, counts in rows]


def answers_of(path: Path) -> tuple[str, ...]:
    """The texts that a JSON file lists.

    Raises:
        ExperimentError: a file that cannot be read, or that holds no list of different texts.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fact = f"learner.answers = {str(path)!r} cannot be read ({error})"
        raise ExperimentError(f"{fact}; give a JSON file that holds a list of answers, or 'scenes'") from error
    if not isinstance(found, list) or not found or not all(isinstance(text, str) and text for text in found):
        raise ExperimentError(f'{path} holds no list of texts; write it as ["yes", "no", ...]')
    if len(set(found)) < len(found):
        twice = next(text for text in found if found.count(text) > 1)
        raise ExperimentError(f"{path} lists the answer {twice!r} twice; remove one of them")
    return tuple(found)
