"""What the learners share that compare pictures with captions: features, queues, and how well the two find each other."""

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedvision.albef.model import Contrastive
from fedvision.albef.ranking import recalls, shortlisted
from fedvision.data.examples import CAPTION, Examples
from fedvision.data.federated import Spec
from fedvision.data.texts import decode_texts
from fedvision.learners.image_text import BATCH, ImageText, first_texts, texts_of
from fedvision.learners.learner import Holding
from fedvision.settings import Count, Natural, Positive
from fedvision.wordpiece import Tokens, cleaned_caption

Network = TypeVar("Network", bound=Contrastive)


@dataclass(frozen=True, kw_only=True)
class Aligned(ImageText):
    """A learner whose features of pictures and of captions are compared, and whose pairs are judged.

    Attributes:
        features: numbers of the vectors that are compared; the size's if not given.
        queue: of such vectors that each silo remembers of its last pictures, and as many of texts; the oldest give way, whatever the
            batch's size.
        temperature: that similarities are divided by, to begin with; it is learned.
        reranked: how many candidates of each picture and each text evaluation ranks anew by whether they match; 0: none.
    """

    needed: ClassVar[tuple[str, ...]] = (CAPTION,)
    features: Count | None = None
    queue: Count | None = None
    temperature: Positive = 0.07
    reranked: Natural = 0

    def built(self, network: type[Network], spec: Spec, rng: torch.Generator) -> Network:
        """The networks, their copies and the queues, with the weights of the files that the settings name.

        Raises:
            ExperimentError: data that are no pictures; sizes that do not fit; a vocabulary or checkpoint that does not.
        """
        vision, text = self.vision_size(spec), self.text_size()
        features, queue = self.features or self.size.features, self.queue or self.size.queue
        return self.begun(network(vision, text, features, queue, rng, self.temperature, self.deviation, self.xavier))

    def holding(self, name: str) -> Holding:
        """Queues stay: they hold features of the silo's own examples, and an average of them means nothing."""
        return "private" if "queue" in name else super().holding(name)

    def first_tokens(self, batch: Examples) -> Tokens:
        """The first caption of each picture."""
        texts = first_texts(texts_of(batch, CAPTION))
        return Tokens(*(values.to(batch.device) for values in self.tokens([cleaned_caption(text) for text in texts])))

    def found(self, model: Contrastive, examples: Examples) -> dict[str, float]:
        """How well pictures and all of their captions find each other among all (``recalls``), in evaluation mode.

        With ``reranked``, and after the most similar ones were judged, under names that begin with ``reranked``.
        """
        images, features = zip(*(self._pictured(model, batch) for batch in examples.batches(BATCH)), strict=True)
        texts, owners = all_texts(examples.fields[CAPTION])
        ids, mask = (values.to(examples.device) for values in self.tokens([cleaned_caption(text) for text in texts]))
        pairs = zip(ids.split(BATCH), mask.split(BATCH), strict=True)
        words = torch.cat([model.reader(model.text_encoder).read(*pair) for pair in pairs])
        similar = torch.cat(features) @ model.text_feature(words).mT
        found = recalls(similar, similar.mT, owners)
        if not self.reranked:
            return found
        judged = Judged(model, torch.cat(images), words, mask)
        to_texts = shortlisted(similar, self.reranked, judged)
        to_images = shortlisted(similar.mT, self.reranked, lambda text, image: judged(image, text))
        return found | {f"reranked_{name}": share for name, share in recalls(to_texts, to_images, owners).items()}

    def _pictured(self, model: Contrastive, batch: Examples) -> tuple[Tensor, Tensor]:
        """Tokens and features of pictures."""
        tokens = model.visual_encoder(self.views(batch.decoded().image))
        return tokens, model.image_feature(tokens)


@dataclass(frozen=True, eq=False)
class Judged:
    """Called with numbers of images and of texts [pairs], how well each two match: the logit of class 1 [pairs]."""

    model: Contrastive
    images: Tensor
    texts: Tensor
    mask: Tensor

    def __call__(self, image: Int[Tensor, "pairs"], text: Int[Tensor, "pairs"]) -> Float[Tensor, "pairs"]:
        """See the class."""
        fused = self.model.reader(self.model.text_encoder).fuse(self.texts[text], self.mask[text], [self.images[image]])
        return self.model.itm_head(fused[:, 0])[:, 1]  # type: ignore[no-any-return]


def all_texts(texts: Int[Tensor, "n wordings length"]) -> tuple[list[str], Int[Tensor, "texts"]]:
    """All texts of all examples, an empty one for an example without any, and whose each is."""
    listed = [some or [""] for some in decode_texts(texts)]
    return [text for some in listed for text in some], torch.repeat_interleave(torch.tensor([len(some) for some in listed]))
