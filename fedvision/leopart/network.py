"""Leopart's network: a vision transformer, a head for the vectors of its patches, and prototypes that these are compared with.

Letters in shapes: b = pictures, k = prototypes.
"""

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fedvision import ema
from fedvision.leopart.vision import VisionSize, VisionTransformer, initialized

HEADS = ("projection_head.", "prototypes.")
"""What the names of arrays begin with that a vision transformer has not."""


class Seen(NamedTuple):
    """What the network says of crops, of which several stand behind one another in the order of the crops.

    Attributes:
        tokens: of the patches, after the last normalization; one tensor for the crops of each size.
        embeddings: of all patches: crop by crop, picture by picture, row by row; of length 1.
        scores: how much each is like each prototype.
    """

    tokens: list[Float[Tensor, "b patches width"]]
    embeddings: Float[Tensor, "all features"]
    scores: Float[Tensor, "all k"]


class Guidance(NamedTuple):
    """What a teacher says of crops.

    Attributes:
        embeddings: of the patches, of length 1.
        scores: how much each is like each of the teacher's prototypes.
        attention: of the class token, see ``Observed``.
    """

    embeddings: Float[Tensor, "crops patches features"]
    scores: Float[Tensor, "crops patches k"]
    attention: Float[Tensor, "crops heads patches"]


class Network(VisionTransformer):
    """A vision transformer, three linear layers with GELU in between for each patch, and prototypes; the class token has no part in it.

    Args:
        size: of the transformer.
        hidden: width of the head.
        features: numbers of a patch's vector that prototypes are compared with.
        prototypes: how many.
        rng: draws the weights.
        drop_path: see ``VisionTransformer``.
    """

    def __init__(self, size: VisionSize, hidden: int, features: int, prototypes: int, rng: torch.Generator, drop_path: float = 0.0) -> None:
        super().__init__(size, rng, drop_path)
        widths = (size.width, hidden, hidden, features)
        layers = [nn.utils.skip_init(nn.Linear, *pair) for pair in pairwise(widths)]
        self.projection_head = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        self.prototypes = nn.utils.skip_init(nn.Linear, features, prototypes, bias=False)
        for added in (self.projection_head, self.prototypes):
            initialized(added, rng)

    def projected(self, patches: Float[Tensor, "*n width"]) -> Float[Tensor, "*n features"]:
        """Vectors of length 1 that prototypes are compared with."""
        return F.normalize(self.projection_head(patches), dim=-1)

    def compared(self, embeddings: Float[Tensor, "*n features"], unit: bool = True) -> Float[Tensor, "*n k"]:
        """How much vectors are like the prototypes; with ``unit`` these have length 1, see ``unit_rows``."""
        return F.linear(embeddings, unit_rows(self.prototypes.weight) if unit else self.prototypes.weight)

    def forward(self, crops: Sequence[Float[Tensor, "b c h w"]], unit: bool = True) -> Seen:
        """What is said of crops; those beside each other of the same size go through the transformer together.

        Args:
            crops: of all pictures, one tensor a crop.
            unit: whether prototypes have length 1.
        """
        batches = [torch.cat(list(alike)) for _, alike in groupby(crops, lambda crop: crop.shape[-2:])]
        tokens = [self.tokens(batch)[:, 1:] for batch in batches]
        embeddings = self.projected(torch.cat([each.flatten(0, 1) for each in tokens]))
        return Seen(tokens, embeddings, self.compared(embeddings, unit))

    @torch.no_grad()
    def guidance(self, crops: Float[Tensor, "crops c h w"]) -> Guidance:
        """What a teacher of this kind says of crops of one size."""
        seen = self.observed(crops)
        embeddings = self.projected(seen.tokens[:, 1:])
        return Guidance(embeddings, self.compared(embeddings), seen.attention)

    @torch.no_grad()
    def normalize_prototypes(self) -> None:
        """Give each prototype length 1, in place."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))


def unit_rows(weight: Float[Tensor, "k features"]) -> Float[Tensor, "k features"]:
    """Rows of length 1, through which a gradient goes as if the parameter itself were these.

    So a step from normalized prototypes is computed without changing them before the loss is known: the parameter is normalized
    where it takes the step.
    """
    return F.normalize(weight, dim=1).detach() + (weight - weight.detach())


class Leopart(nn.Module):
    """What a silo has: the network that learns, its slowly moving copy that teaches, a queue of the copy's features for each global crop.

    Its state dict has ``model.*`` and ``teacher.*``, as the reference's has, ``queue`` and ``uniform_steps``.

    Args:
        size, hidden, features, prototypes, rng, drop_path: see ``Network``; the teacher never drops anything.
        queue: vectors remembered of each of the two global crops; 0: none.
        taught: whether there is a teacher.
        copied: whether the teacher's head and prototypes begin as the network's or with weights of their own. Its transformer begins
            as the network's in any case.
    """

    queue: Tensor
    uniform_steps: Tensor

    def __init__(
        self,
        size: VisionSize,
        hidden: int,
        features: int,
        prototypes: int,
        rng: torch.Generator,
        drop_path: float = 0.0,
        queue: int = 0,
        taught: bool = True,
        copied: bool = False,
    ) -> None:
        super().__init__()
        self.model = Network(size, hidden, features, prototypes, rng, drop_path)
        self.teacher = Network(size, hidden, features, prototypes, rng).requires_grad_(False) if taught else None
        self.copied = copied
        self.register_buffer("queue", torch.zeros(2, queue, features))
        self.register_buffer("uniform_steps", torch.zeros(1, dtype=torch.int64))
        self.begin()

    def forward(self, crops: Sequence[Float[Tensor, "b c h w"]]) -> Any:
        """What the network says, its prototypes normalized."""
        return self.model(crops)

    @torch.no_grad()
    def begin(self) -> None:
        """Put the teacher's transformer where the network's is, and its head and prototypes, if they are copied."""
        theirs = self.model.state_dict()
        for name, tensor in self.teacher.state_dict().items() if self.teacher is not None else ():
            if self.copied or not name.startswith(HEADS):
                tensor.copy_(theirs[name])

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Normalize the prototypes of both, then move the teacher: ``teacher <- momentum teacher + (1 - momentum) network``."""
        self.model.normalize_prototypes()
        if self.teacher is not None:
            self.teacher.normalize_prototypes()
            ema.follow(self.teacher, self.model, momentum)

    @property
    def guide(self) -> Network:
        """Who says what patches are assigned to: the teacher, or the network itself if there is none."""
        return self.model if self.teacher is None else self.teacher

    @property
    def full(self) -> list[bool]:
        """Of each queue, whether it is full; only then it is used."""
        return [bool(each[-1].any()) for each in self.queue] if self.queue.shape[1] else [False] * len(self.queue)

    @torch.no_grad()
    def remember(self, fresh: Float[Tensor, "2 n features"]) -> None:
        """Put vectors in front of the queues; the oldest give way. Rows of zeros stand for none."""
        for queue, new in zip(self.queue, fresh, strict=True):
            queue.copy_(torch.cat([new[new.any(1)], queue])[: len(queue)])

    @torch.no_grad()
    def remembered_scores(self, place: int) -> Float[Tensor, "remembered k"] | None:
        """How much what a queue remembers is like the network's prototypes; None until it is full."""
        return self.model.compared(self.queue[place]) if self.full[place] else None


def uniform_streak(steps: Int[Tensor, "1"], loss: Float[Tensor, ""], prototypes: int, margin: float = 0.01) -> Int[Tensor, "1"]:
    """In how many steps in a row the loss has been what uniform predictions cost, ln k, give or take ``margin``.

    >>> uniform_streak(torch.tensor([4]), torch.tensor(3.178), 24), uniform_streak(torch.tensor([4]), torch.tensor(2.5), 24)
    (tensor([5]), tensor([0]))
    """
    uniform = (loss - torch.tensor(float(prototypes)).log()).abs() < margin
    return torch.where(uniform, steps + 1, 0)
