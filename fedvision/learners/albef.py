"""ALBEF: pictures and their captions, side by side, then together.

An image encoder and the first layers of a text network give features that are compared, each picture with all texts and each text
with all pictures (ITC); the text network's other layers look at the picture, and say whether the two belong together (ITM) and which
words were masked (MLM). Slowly moving copies of the networks teach what labels do not say:

    l = l_itc + l_itm + l_mlm

Source: Align before Fuse, arXiv 2107.07651; what the paper leaves open from what its public implementation does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedvision.albef import losses
from fedvision.albef.losses import UNSELECTED, MaskedWords
from fedvision.albef.model import Choose, Pretraining, Taught
from fedvision.albef.pictures import Subject, galleries
from fedvision.albef.views import image_normalization
from fedvision.data.examples import CAPTION, IMAGE, Examples
from fedvision.data.federated import Spec
from fedvision.gallery import Gallery, painted
from fedvision.learners.aligned import Aligned
from fedvision.learners.image_text import BATCH, IDS, WORDS, drawn_texts, texts_of
from fedvision.learners.learner import Loss
from fedvision.metrics import Metrics
from fedvision.registry import learners
from fedvision.seeds import global_generators, own_generator
from fedvision.settings import Fraction
from fedvision.wordpiece import cleaned_caption

MASKED, TARGETS = "masked_ids", "targets"
"""The fields of a batch that hold its masked texts and what was masked of them, int64 [n, length]."""

TAUGHT = ("taught_image", "taught_text", "taught_words")
"""Those that hold what the copies say of it (``Taught``)."""

Taughts = Literal["itc", "mlm"]


@learners("albef")
@dataclass(frozen=True, kw_only=True)
class ALBEF(Aligned):
    """Pre-training on pictures and captions: align features, match pairs, predict masked words, with slowly moving teachers.

    A caption of several is drawn anew each time; it is cleaned, and an empty one is the token [CLS] alone, which has no word to
    predict. Of a batch of one picture no pair is left that does not match, and nothing is matched.

    Attributes:
        mask_probability: that a word is to be predicted.
        contrastive: whether features are compared.
        hard_negatives: whether pairs that do not match are drawn by how similar they look, or all as likely.
        distilled: which losses the copies teach: ``itc``, ``mlm``.
        probes: words, such as colors, that one must see to know: evaluation masks the first of them in each text and tells how often
            it is predicted, looking at its picture and at another one.

    Source: arXiv 2107.07651, section 3 and appendix; the defaults are the paper's, whose ``networks`` are ``base``. The other half
        of the recipe belongs to the strategy: AdamW with rate 1e-4 and weight decay 0.02, schedule ``staircase-cosine``.
    Differs: float32 throughout; a batch without masked words or without any pair that does not match has the loss 0 there, where
        the public implementation fails; a queue that is no multiple of the batch goes around.
    """

    shown = 64
    mask_probability: Fraction = 0.15
    contrastive: bool = True
    hard_negatives: bool = True
    distilled: tuple[Taughts, ...] = ("itc", "mlm")
    probes: tuple[str, ...] = ()

    def build(self, spec: Spec, rng: torch.Generator) -> Pretraining:
        """The networks, their copies and the queues.

        Raises:
            ExperimentError: data that are no pictures or have no captions; sizes that do not fit; a vocabulary or checkpoint that does not.
        """
        return self.built(Pretraining, spec, rng)

    # ---- batches -------------------------------------------------------------------------------------------------

    def train_view(self, batch: Examples, rng: torch.Generator) -> Examples:
        """Pictures as the network sees them, a caption each, and what of it is masked."""
        texts = drawn_texts(texts_of(batch, CAPTION), rng)
        ids, mask = (values.to(batch.device) for values in self.tokens([cleaned_caption(text) for text in texts]))
        masked = losses.masked_words(ids, self._kept, self.pieces.mask, self.pieces.size, self.mask_probability, rng)
        return Examples({IMAGE: self.views(batch.image, rng), IDS: ids, WORDS: mask, MASKED: masked.ids, TARGETS: masked.targets})

    def draw(self, model: nn.Module, train: Examples, index: slice | Tensor, rng: torch.Generator) -> Examples:
        """The training view, and what the copies say of it."""
        view = super().draw(model, train, index, rng)
        if not self.contrastive:
            return view
        assert isinstance(model, Pretraining)
        fields = view.fields
        masked = fields[MASKED] if "mlm" in self.distilled and self.alpha else None
        with global_generators(rng):
            taught = model.teach(fields[IMAGE], fields[IDS], fields[WORDS], masked)
        return Examples({**fields, **{name: value for name, value in zip(TAUGHT, taught, strict=True) if value is not None}})

    @property
    def _kept(self) -> tuple[int, int]:
        """The tokens that are never masked."""
        return self.pieces.pad, self.pieces.begin

    # ---- loss ----------------------------------------------------------------------------------------------------

    def loss(self, model: Callable[..., Any], batch: Examples, progress: float, rng: torch.Generator) -> Loss:
        """The sum of the losses of comparing, of matching and of predicting words; its parts, each by itself."""
        fields, alpha = batch.fields, self.alpha_at(progress)
        targets = fields[TARGETS]
        selected = targets != UNSELECTED
        taught = Taught(*(fields.get(name) for name in TAUGHT)) if self.contrastive else None  # type: ignore[arg-type]
        seen = model(fields[IMAGE], fields[IDS], fields[WORDS], self._chooser(batch, rng), taught, fields[MASKED], selected)
        parts = {}
        if seen.own is not None:
            positive = torch.eye(*seen.own[0].shape, dtype=torch.bool, device=batch.device)
            parts["itc"] = losses.alignment_loss(seen.own, seen.taught, positive, alpha if "itc" in self.distilled else 0.0)
        parts["itm"] = losses.matching_loss(seen.matches, len(batch))
        parts["mlm"] = losses.word_loss(seen.words, targets[selected], seen.taught_words, alpha)
        return Loss(torch.stack(list(parts.values())).sum(), parts)

    def _chooser(self, batch: Examples, rng: torch.Generator) -> Choose:
        """Draws pairs that do not match."""
        same = torch.eye(len(batch), dtype=torch.bool, device=batch.device)
        return partial(losses.negatives, same=same, rng=rng) if self.hard_negatives else lambda *_: losses.negatives(None, None, same, rng)

    # ---- state ---------------------------------------------------------------------------------------------------

    def follow(self, model: nn.Module, batch: Examples, progress: float) -> None:
        """The queues take in what the copies said, then the copies move."""
        assert isinstance(model, Pretraining)
        if self.contrastive:
            model.enqueue(batch.fields[TAUGHT[0]], batch.fields[TAUGHT[1]])
        model.keep_temperature()
        model.follow(self.momentum)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, model: nn.Module, batch: Examples) -> Metrics:
        """What masked words of the first caption cost, looking at the picture, and how often they are predicted.

        The masks are a picture's own, whatever batch it is in; ``loss`` is the mean over pictures of the sum over their words.
        """
        assert isinstance(model, Pretraining)
        ids, mask = self.first_tokens(batch)
        masked = self._own_masks(batch.image, ids, mask)
        logits, targets = _predicted(model, self.views(batch.image), masked, mask)
        costs, right = F.cross_entropy(logits, targets, reduction="none").sum(), (logits.argmax(1) == targets).sum()
        words = torch.tensor(len(targets))
        return Metrics.of_batch({"loss": costs}, len(batch), shares={"word_loss": (costs, words), "word_accuracy": (right, words)})

    def _own_masks(self, images: Tensor, ids: Tensor, mask: Tensor) -> MaskedWords:
        """Masks that depend on each picture alone, not on how long the texts beside its own are."""
        rows = [row[there][None] for row, there in zip(ids, mask, strict=True)]
        options = (self._kept, self.pieces.mask, self.pieces.size, self.mask_probability)
        each = [losses.masked_words(row, *options, own_generator(image)) for row, image in zip(rows, images, strict=True)]
        changed, targets = ids.clone(), torch.full_like(ids, UNSELECTED)
        changed[mask], targets[mask] = (torch.cat([one[i][0] for one in each]) for i in range(2))
        return MaskedWords(changed, targets)

    def overall(self, model: nn.Module, examples: Examples) -> Mapping[str, float]:
        """``found``; and how often probes are predicted, looking at their picture (``probe_accuracy``), at another (``blind_accuracy``)."""
        assert isinstance(model, Pretraining)
        return {**(self.found(model, examples) if self.contrastive or self.reranked else {}), **self._probed(model, examples)}

    def _probed(self, model: Pretraining, examples: Examples) -> dict[str, float]:
        """See ``overall``; the other picture is that of half the examples further on."""
        numbers = torch.tensor(sorted(self._probed_tokens))
        right, blind, words = 0, 0, 0
        elsewhere = torch.arange(len(examples)).roll(len(examples) // 2)
        for here, there in zip(examples.batches(BATCH), examples[elsewhere].batches(BATCH), strict=True):
            ids, mask = self.first_tokens(here)
            probed = torch.isin(ids, numbers.to(ids.device))
            probed &= probed.cumsum(1) == 1  # the first of each text
            masked = MaskedWords(torch.where(probed, self.pieces.mask, ids), torch.where(probed, ids, UNSELECTED))
            for images, seen in ((here.decoded().image, True), (there.decoded().image, False)):
                logits, targets = _predicted(model, self.views(images), masked, mask)
                hits = int((logits.argmax(1) == targets).sum())
                right, blind = right + hits * seen, blind + hits * (not seen)
            words += len(targets)
        return {"probe_accuracy": right / words, "blind_accuracy": blind / words} if words else {}

    def pictures(self, model: nn.Module, examples: Examples) -> Mapping[str, Gallery]:
        """Where words look, what masked words are taken for, and which captions and pictures are most alike."""
        assert isinstance(model, Pretraining)
        images, (ids, mask) = self.views(examples.image), self.first_tokens(examples)
        pictures = [painted(image) for image in image_normalization(images.shape[1]).undone(images)]
        return galleries(Subject(model, self.pieces, pictures, images, ids, mask), self._probed_tokens, self.contrastive)

    @property
    def _probed_tokens(self) -> frozenset[int]:
        """The tokens of the probes."""
        return frozenset(number for word in self.probes for number in self.tokens([word]).ids[0, 1:].tolist())


def _predicted(model: Pretraining, images: Tensor, masked: MaskedWords, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the words that were masked, and these."""
    selected = masked.targets != UNSELECTED
    hidden = model.text_encoder.bert(masked.ids, mask, [model.visual_encoder(images)])
    return model.text_encoder.words(hidden[selected]), masked.targets[selected]
