"""ALBEF fine-tuned to find captions for pictures and pictures for captions, or to find what words speak of in a picture.

Source: Align before Fuse, arXiv 2107.07651, sections 5 and 6; what the paper leaves open from what its public implementation does.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedvision.albef import gradcam, losses
from fedvision.albef.grounding import FOUND, box_scores, enlarged, most_central, overlaps
from fedvision.albef.model import Taught
from fedvision.albef.retrieval import Retrieval
from fedvision.data.examples import BOX, CAPTION, EXPRESSION, IMAGE, PROPOSALS, Examples
from fedvision.data.federated import Spec
from fedvision.learners.about_pictures import told
from fedvision.learners.aligned import Aligned
from fedvision.learners.image_text import BATCH, IDS, WORDS, check_fields, drawn_texts, first_texts, texts_of
from fedvision.learners.learner import Loss
from fedvision.metrics import Metrics, total
from fedvision.registry import learners
from fedvision.seeds import global_generators
from fedvision.settings import Count, Natural
from fedvision.wordpiece import Tokens, cleaned_caption

NUMBER, POSITIVE = "number", "positive"
"""The fields of a batch that hold the numbers of its pictures in their silo, int64 [n], and which candidates, those of the batch and
those of the queue, are of the same picture, bool [n, n + queue]."""

TAUGHT = ("taught_image", "taught_text")
"""Those that hold the features that the copies give it."""

AT_ONCE = 32
"""So many texts point at their pictures at once: gradients take memory."""

USUAL_LAYER = 8
"""Of twelve, counted from 0, the one whose attention points at boxes."""


@learners("albef-retrieval")
@dataclass(frozen=True, kw_only=True)
class ALBEFRetrieval(Aligned):
    """Fine-tuning of ALBEF to find texts for pictures and pictures for texts, where several texts belong to a picture.

    All texts of a picture in the batch and in the queue belong to it, and none of them is drawn as one that does not match. Pictures
    are numbered in each silo, since queues stay there. Of a batch of one picture alone no pair is left that does not match.

    Where the data have ``expression``, ``box`` and ``proposals``, evaluation also tells how often the proposal that a text's Grad-CAM
    points at overlaps its box by half (``grounding_accuracy``), beside that of the most central proposal (``central_accuracy``) and
    that of any (``guessed_accuracy``): nothing has learned from boxes.

    Attributes:
        trained_on: which texts: ``caption`` or ``expression``.
        texts_drawn: texts of each picture in a batch, which may be the same one.
        grounding: what points at boxes: words that look at a picture which they ``match``, or the class token of a picture that looks
            at itself, for its ``similarity`` to the text.
        grounding_layer: whose attention it is, counted from 0: of the text network, or of the image encoder; 8 if not given, or the
            last where there are fewer.

    Source: arXiv 2107.07651, sections 5 and 6 and appendix. The other half of the recipe belongs to the strategy: AdamW with rate 1e-5
        and weight decay 0.02, schedule ``staircase-cosine``.
    Differs: a pass shows each picture once, not once a caption; float32 throughout; a batch without any pair that does not match has
        the loss 0 there, and one whose softmax leaves nothing draws all as likely, where the public implementation fails; a queue that
        is no multiple of the batch goes around; a text that points nowhere gets the first proposal, not that of the picture before.
    """

    needed = ()
    trained_on: Literal["caption", "expression"] = "caption"
    texts_drawn: Count = 1
    grounding: Literal["match", "similarity"] = "match"
    grounding_layer: Natural | None = None

    def build(self, spec: Spec, rng: torch.Generator) -> Retrieval:
        """The networks, their copies and the queues.

        Raises:
            ExperimentError: data that are no pictures or have no such texts; sizes that do not fit; a vocabulary or checkpoint that does
                not.
        """
        check_fields(spec, [self.trained_on])
        return self.built(Retrieval, spec, rng)

    # ---- batches -------------------------------------------------------------------------------------------------

    def train_view(self, batch: Examples, rng: torch.Generator) -> Examples:
        """Pictures as the network sees them, and a text each."""
        ids, mask = self._tokenized(drawn_texts(texts_of(batch, self.trained_on), rng), batch.device)
        return Examples({IMAGE: self.views(batch.image, rng), IDS: ids, WORDS: mask})

    def draw(self, model: nn.Module, train: Examples, index: slice | Tensor, rng: torch.Generator) -> Examples:
        """The training view, what the copies say of it, and which candidates are of the same picture."""
        numbers = torch.arange(len(train), device=train.device)[index].repeat_interleave(self.texts_drawn)
        fields = self.train_view(train[numbers].decoded(), rng).fields
        assert isinstance(model, Retrieval)
        with global_generators(rng):
            taught = model.teach(fields[IMAGE], fields[IDS], fields[WORDS])
        features = dict(zip(TAUGHT, taught[:2], strict=True))
        return Examples({**fields, **features, NUMBER: numbers, POSITIVE: model.positive(numbers)})

    def _tokenized(self, texts: list[str], device: torch.device) -> Tokens:
        ids, mask = self.tokens([cleaned_caption(text) for text in texts])
        return Tokens(ids.to(device), mask.to(device))

    # ---- loss ----------------------------------------------------------------------------------------------------

    def loss(self, model: Callable[..., Any], batch: Examples, progress: float, rng: torch.Generator) -> Loss:
        """The sum of the losses of comparing and of matching; its parts, each by itself."""
        fields, positive = batch.fields, batch.fields[POSITIVE]
        choose = partial(losses.negatives, same=positive[:, : len(batch)], rng=rng)
        taught = Taught(fields[TAUGHT[0]], fields[TAUGHT[1]], None)
        seen = model(fields[IMAGE], fields[IDS], fields[WORDS], choose, taught)
        itc = losses.alignment_loss(seen.own, seen.taught, positive, self.alpha_at(progress))
        itm = losses.matching_loss(seen.matches, len(batch))
        return Loss(itc + itm, {"itc": itc, "itm": itm})

    def follow(self, model: nn.Module, batch: Examples, progress: float) -> None:
        """The queues take in what the copies said, then the copies move."""
        assert isinstance(model, Retrieval)
        model.remember(batch.fields[TAUGHT[0]], batch.fields[TAUGHT[1]], batch.fields[NUMBER])
        model.follow(self.momentum)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, model: nn.Module, batch: Examples) -> Metrics:
        """What it costs that pictures and their first texts match, ``loss``; and how texts point at boxes."""
        return total(self._measured(model, part) for part in batch.batches(BATCH))

    def _measured(self, model: nn.Module, batch: Examples) -> Metrics:
        assert isinstance(model, Retrieval)
        ids, mask = self._tokenized(first_texts(texts_of(batch, self.trained_on)), batch.device)
        fused = model.text_encoder(ids, mask, [model.visual_encoder(self.views(batch.image))])
        logits = model.itm_head(fused[:, 0])
        loss = F.cross_entropy(logits, torch.ones_like(ids[:, 0]), reduction="sum")
        return Metrics.of_batch({"loss": loss}, len(batch), shares=self._grounded(model, batch))

    def overall(self, model: nn.Module, examples: Examples) -> Mapping[str, float]:
        """How well pictures and captions find each other, see ``Aligned``; nothing where there are no captions."""
        assert isinstance(model, Retrieval)
        return self.found(model, examples) if CAPTION in examples else {}

    # ---- boxes ---------------------------------------------------------------------------------------------------

    def _grounded(self, model: Retrieval, batch: Examples) -> dict[str, tuple[Tensor, Tensor]]:
        """How many texts find their box, and of how many."""
        if any(name not in batch for name in (EXPRESSION, BOX, PROPOSALS)):
            return {}
        texts, owner, place = told(batch, EXPRESSION)
        boxes, proposals = batch.fields[BOX][owner, place], batch.fields[PROPOSALS][owner]
        there = ((boxes != 0).any(1) & (proposals != 0).any(2).any(1)).nonzero()[:, 0].tolist()
        found = {"grounding_accuracy": 0.0, "central_accuracy": 0.0, "guessed_accuracy": 0.0}
        if not there:
            return {}
        size = batch.image.shape[-2:]
        for i, pixels in zip(there, self._all_maps(model, batch.image, owner[there], [texts[i] for i in there]), strict=True):
            offered = proposals[i][(proposals[i] != 0).any(1)]
            right = (overlaps(offered, boxes[i]) >= FOUND).double()
            found["grounding_accuracy"] += float(right[box_scores(pixels, offered).argmax()])
            found["central_accuracy"] += float(right[most_central(offered, (size[0], size[1]))])
            found["guessed_accuracy"] += float(right.mean())
        return {name: (torch.tensor(hits), torch.tensor(len(there))) for name, hits in found.items()}

    def _all_maps(self, model: Retrieval, images: Tensor, owner: Tensor, texts: list[str]) -> Iterator[Tensor]:
        """``maps``, some at a time."""
        for part in torch.arange(len(texts)).split(AT_ONCE):
            yield from self.maps(model, images[owner[part]], [texts[i] for i in part.tolist()])

    def maps(self, model: Retrieval, images: Tensor, texts: list[str]) -> Tensor:
        """For each picture where its text points at [n, h, w], in evaluation mode.

        Args:
            model: from ``build``.
            images: as they are stored, decoded.
            texts: one each.
        """
        ids, mask = self._tokenized(texts, images.device)
        seen, layer = self.views(images), self.grounding_layer
        if self.grounding == "similarity":
            block = min(USUAL_LAYER, self.size.vision.depth - 1) if layer is None else layer
            maps = gradcam.of_classification_token(gradcam.similarity(model, seen, ids, mask, block))
        else:
            layer = min(USUAL_LAYER, self.size.text.layers - 1) if layer is None else layer
            maps = gradcam.over_text(gradcam.over_words(gradcam.match(model, seen, ids, mask, layer), mask))
        return enlarged(maps, (images.shape[-2], images.shape[-1]))
