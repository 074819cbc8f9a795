"""ALBEF fine-tuned to judge sentences: what a picture says of them, or whether they are true of two pictures.

Source: Align before Fuse, arXiv 2107.07651, section 5; what the paper leaves open from what its public implementation does.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedvision.albef import losses
from fedvision.albef.bert import TextSize
from fedvision.albef.judge import Entailment, Judge, PairReasoning
from fedvision.data.examples import HYPOTHESIS, IMAGE, SECOND_IMAGE, STATEMENT, TRUTH, VERDICT, Examples
from fedvision.data.federated import Spec
from fedvision.learners.about_pictures import AboutPictures, Judged, at, drawn_places, in_parts, listed, present, told
from fedvision.learners.image_text import IDS, WORDS, texts_of
from fedvision.learners.learner import Loss
from fedvision.registry import learners
from fedvision.seeds import global_generators
from fedvision.wordpiece import cleaned_caption

TAUGHT = "taught"
"""The field of a batch that holds what the copies say of it, logits [n, classes]."""


@dataclass(frozen=True, kw_only=True)
class Judging(AboutPictures):
    """A learner of sentences of which each has one of a few verdicts."""

    verdicts: ClassVar[str]
    """The field that holds them; -1 where there is no sentence."""

    network: ClassVar[type[Judge]]

    def build(self, spec: Spec, rng: torch.Generator) -> Judge:
        """The network and its copies.

        Raises:
            ExperimentError: data that are no pictures or lack a field; sizes that do not fit; a vocabulary or checkpoint that does not.
        """
        return self.begun(self.network(self.vision_size(spec), self.text_size(), rng, self.deviation, self.xavier))

    def cleaned(self, text: str) -> str:
        """As captions are."""
        return cleaned_caption(text)

    # ---- batches -------------------------------------------------------------------------------------------------

    def train_view(self, batch: Examples, rng: torch.Generator) -> Examples:
        """Pictures as the network sees them, a sentence each, and its verdict."""
        texts = texts_of(batch, self.texts)
        places = drawn_places(present(texts), rng)
        ids, mask = self.tokenized(listed(at(texts, places)), batch.device)
        pictures = dict(zip(self.looked_at, self.seen(batch, rng), strict=True))
        return Examples({**pictures, IDS: ids, WORDS: mask, self.verdicts: at(batch.fields[self.verdicts], places)})

    def draw(self, model: nn.Module, train: Examples, index: slice | Tensor, rng: torch.Generator) -> Examples:
        """The training view, and what the copies say of it."""
        view = self.train_view(self.drawn(train, index), rng)
        if not self.alpha:
            return view
        assert isinstance(model, Judge)
        with global_generators(rng):
            taught = model.teach(self._pictures(view), view.fields[IDS], view.fields[WORDS])
        return Examples({**view.fields, TAUGHT: taught})

    def _pictures(self, view: Examples) -> list[Tensor]:
        return [view.fields[name] for name in self.looked_at]

    # ---- loss ----------------------------------------------------------------------------------------------------

    def loss(self, model: Callable[..., Any], batch: Examples, progress: float, rng: torch.Generator) -> Loss:
        """``class_loss`` of the sentences whose verdict is known; 0 if that of none is."""
        verdicts = batch.fields[self.verdicts]
        logits, known = model(self._pictures(batch), batch.fields[IDS], batch.fields[WORDS]), verdicts >= 0
        if not known.any():
            return Loss(0.0 * logits.sum())
        taught = batch.fields[TAUGHT][known] if TAUGHT in batch else None
        return Loss(losses.class_loss(logits[known], verdicts[known], taught, self.alpha_at(progress)))

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def judged(self, model: nn.Module, batch: Examples, pictures: Examples) -> Judged:
        """See ``AboutPictures``."""
        assert isinstance(model, Judge)
        texts, owner, place = told(batch, self.texts)
        verdicts = batch.fields[self.verdicts][owner, place]
        if not texts:
            return Judged(torch.zeros(0), torch.zeros(0), owner)
        tokens, (ids, mask) = model.looked(self.seen(pictures)), self.tokenized(texts, batch.device)
        parts = in_parts(owner, ids, mask)
        logits = torch.cat([model.judged([each[who] for each in tokens], some, there) for who, some, there in parts])
        return Judged(F.cross_entropy(logits, verdicts, reduction="none"), (logits.argmax(1) == verdicts).double(), owner)

    def constant(self, examples: Examples) -> float:
        """See ``AboutPictures``."""
        verdicts = examples.fields[self.verdicts]
        known = verdicts[verdicts >= 0]
        return float(known.bincount().max() / len(known)) if len(known) else 0.0


@learners("albef-ve")
@dataclass(frozen=True, kw_only=True)
class ALBEFEntailment(Judging):
    """Fine-tuning of ALBEF to say whether a picture contradicts a sentence, leaves it open, or entails it (SNLI-VE).

    Source: arXiv 2107.07651, section 5. The other half of the recipe belongs to the strategy: AdamW with rate 2e-5 and weight decay
        0.02 for 5 epochs, schedule ``staircase-cosine``.
    Differs: a pass shows each picture once, not once a sentence; float32 throughout.
    """

    needed = (HYPOTHESIS, VERDICT)
    texts = HYPOTHESIS
    verdicts = VERDICT
    network = Entailment


@learners("albef-nlvr2")
@dataclass(frozen=True, kw_only=True)
class ALBEFPairReasoning(Judging):
    """Fine-tuning of ALBEF to say whether a sentence is true of two pictures (NLVR2).

    Each layer that looks at pictures is there twice, for the left one and for the right one, with the same keys and values.

    Source: arXiv 2107.07651, section 5 and appendix. The other half of the recipe belongs to the strategy: AdamW with rate 2e-5 and
        weight decay 0.02 for 10 epochs, schedule ``staircase-cosine``, after ``albef-assignment``.
    Differs: the copies begin at the network that was loaded, see ``fedvision.albef.weights``; a pass shows each pair once, not once a
        sentence; float32 throughout.
    """

    needed = (SECOND_IMAGE, STATEMENT, TRUTH)
    texts = STATEMENT
    verdicts = TRUTH
    network = PairReasoning

    @property
    def looked_at(self) -> tuple[str, ...]:
        """The left one, the right one."""
        return (IMAGE, SECOND_IMAGE)

    def text_size(self) -> TextSize:
        """With layers in twos."""
        return paired(super().text_size())


def paired(size: TextSize) -> TextSize:
    """A text network whose layers that look at pictures are there twice."""
    return replace(size, layers=2 * size.layers - size.fusion, paired=True)
