"""Text assignment, which prepares ALBEF for sentences about two pictures.

Source: Align before Fuse, arXiv 2107.07651, section 5 and appendix; what they leave open from what the public implementation does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedvision.albef.assignment import FIRST, NEITHER, SECOND, Assigned, Assignment, drawn_assignment
from fedvision.albef.bert import TextSize
from fedvision.data.examples import CAPTION, IMAGE, Examples
from fedvision.data.federated import Spec
from fedvision.learners.albef_judge import paired
from fedvision.learners.image_text import BATCH, IDS, WORDS, ImageText, drawn_texts, first_texts, texts_of
from fedvision.learners.learner import Loss
from fedvision.metrics import Metrics
from fedvision.registry import learners
from fedvision.settings import Count, Positive
from fedvision.wordpiece import Tokens, cleaned_caption

ENOUGH = 3
"""A batch needs so many pictures: a text's own and two others."""


@learners("albef-assignment")
@dataclass(frozen=True, kw_only=True)
class ALBEFAssignment(ImageText):
    """Pre-training of ALBEF for two pictures: whether a caption is that of the first, of the second, or of neither.

    Pictures that look like the caption's own are shown more often. Nothing moves slowly: there are no copies. Batches of fewer than
    three pictures teach nothing.

    Attributes:
        features: numbers of the vectors that pictures are compared by; the size's if not given.
        temperature: that similarities of pictures are divided by.

    Source: arXiv 2107.07651, appendix. The other half of the recipe belongs to the strategy: AdamW with rate 2e-5 and weight decay
        0.02 for an epoch, schedule ``staircase-cosine``.
    """

    needed = (CAPTION,)
    features: Count | None = None
    temperature: Positive = 0.07

    def build(self, spec: Spec, rng: torch.Generator) -> Assignment:
        """The network.

        Raises:
            ExperimentError: data that are no pictures or have no captions; sizes that do not fit; a vocabulary or checkpoint that does not.
        """
        features = self.features or self.size.features
        return self.begun(
            Assignment(self.vision_size(spec), self.text_size(), features, rng, self.temperature, self.deviation, self.xavier)
        )

    def text_size(self) -> TextSize:
        """With layers in twos."""
        return paired(super().text_size())

    def train_view(self, batch: Examples, rng: torch.Generator) -> Examples:
        """Pictures as the network sees them, and a caption each."""
        ids, mask = self._tokenized(drawn_texts(texts_of(batch, CAPTION), rng), batch.device)
        return Examples({IMAGE: self.views(batch.image, rng), IDS: ids, WORDS: mask})

    def _tokenized(self, texts: list[str], device: torch.device) -> Tokens:
        ids, mask = self.tokens([cleaned_caption(text) for text in texts])
        return Tokens(ids.to(device), mask.to(device))

    def loss(self, model: Callable[..., Any], batch: Examples, progress: float, rng: torch.Generator) -> Loss:
        """Cross-entropy of whose caption it is; 0 for a batch that is too small."""
        fields, enough = batch.fields, len(batch) >= ENOUGH
        choose = (lambda weights: drawn_assignment(weights, rng)) if enough else _first
        logits, truth = model(fields[IMAGE], fields[IDS], fields[WORDS], choose)
        return Loss(F.cross_entropy(logits, truth) if enough else 0.0 * logits.sum())

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, model: nn.Module, batch: Examples) -> Metrics:
        """The loss and the accuracy where each picture is shown first, then second, beside one that shows nothing."""
        assert isinstance(model, Assignment)
        tokens = model.visual_encoder(self.views(batch.image))
        ids, mask = self._first_tokens(batch)
        nothing = model.visual_encoder(torch.zeros_like(self.views(batch.image[:1]))).expand_as(tokens)
        costs, right = tokens.new_zeros(()), tokens.new_zeros(())
        for truth, pair in ((FIRST, [tokens, nothing]), (SECOND, [nothing, tokens])):
            logits = model.ta_head(model.text_encoder(ids, mask, pair)[:, 0])
            costs = costs + F.cross_entropy(logits, torch.full_like(ids[:, 0], truth), reduction="sum") / 2
            right = right + (logits.argmax(1) == truth).sum() / 2
        return Metrics.of_batch({"loss": costs, "accuracy": right}, len(batch))

    def overall(self, model: nn.Module, examples: Examples) -> Mapping[str, float]:
        """``assignment_accuracy``, where each caption's picture is the first, the second, and neither of two.

        The other pictures are those of a third, and of two thirds, of the examples further on.
        """
        assert isinstance(model, Assignment)
        if len(examples) < ENOUGH:
            return {}
        every = torch.arange(len(examples), device=examples.device)
        one, other = (every.roll(-step * (len(examples) // ENOUGH)) for step in (1, 2))
        tokens = torch.cat([model.visual_encoder(self.views(batch.decoded().image)) for batch in examples.batches(BATCH)])
        right = 0
        for part in every.split(BATCH):
            ids, mask = self._first_tokens(examples[part])
            for truth, first, second in ((FIRST, every, one), (SECOND, one, every), (NEITHER, one, other)):
                hidden = model.text_encoder(ids, mask, [tokens[first[part]], tokens[second[part]]])
                right += int((model.ta_head(hidden[:, 0]).argmax(1) == truth).sum())
        return {"assignment_accuracy": right / (3 * len(examples))}

    def _first_tokens(self, batch: Examples) -> Tokens:
        return self._tokenized(first_texts(texts_of(batch, CAPTION)), batch.device)


def _first(weights: Tensor) -> Assigned:
    """Every text with its own picture, twice."""
    own = torch.arange(len(weights), device=weights.device)
    return Assigned(own, own, torch.full_like(own, FIRST))
