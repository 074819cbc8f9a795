"""Grad-CAM: where words look when they say that a picture matches, and where a picture looks when its text is like it.

b = examples, n = tokens of a text, g = rows, and columns, of patches.

Source: Align before Fuse, arXiv 2107.07651, appendix; what it leaves open from its public implementation.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedvision.albef.bert import Attend, Bert, Mask
from fedvision.albef.model import Contrastive


class Watched(NamedTuple):
    """Attention, and the gradient of a score with respect to it."""

    attention: Float[Tensor, "b heads queries keys"]
    gradient: Float[Tensor, "b heads queries keys"]


class _Kept:
    """Keeps the attention that it is shown, as a leaf of the gradient's graph."""

    attention: Tensor

    def __call__(self, attention: Tensor) -> Tensor:
        self.attention = attention.detach().requires_grad_()
        return self.attention


def relevance(watched: Watched) -> Float[Tensor, "b queries keys"]:
    """The attention times the gradient where that is positive, the mean over heads."""
    return (watched.attention * watched.gradient.relu()).mean(1)


def over_words(watched: Watched, mask: Mask) -> Float[Tensor, "b n g g"]:
    """Where each word looks: ``relevance`` of the patches, without the class token; 0 for padding.

    Args:
        watched: words' attention to an image's tokens.
        mask: where there are words.
    """
    return _square(relevance(watched)[..., 1:] * mask[..., None])


def over_text(maps: Float[Tensor, "b n g g"]) -> Float[Tensor, "b g g"]:
    """Where a text looks: the mean over its words, padding too."""
    return maps.mean(1)


def of_classification_token(watched: Watched) -> Float[Tensor, "b g g"]:
    """Where the class token of a picture looks: ``relevance`` of the patches for it."""
    return _square(relevance(watched)[:, 0, 1:])


def _square(patches: Float[Tensor, "*n patches"]) -> Float[Tensor, "*n g g"]:
    side = math.isqrt(patches.shape[-1])
    return patches.unflatten(-1, (side, side))  # type: ignore[no-any-return]


# ---- watching a network ---------------------------------------------------------------------------------------------


@contextmanager
def watching(attend: Attend) -> Iterator[_Kept]:
    """Show the attention of a layer of words."""
    attend.watch = kept = _Kept()
    try:
        yield kept
    finally:
        attend.watch = None


@contextmanager
def watching_pictures(attend: nn.Module) -> Iterator[_Kept]:
    """Show the attention of a block of the image encoder, which is then computed step by step."""
    kept, fused = _Kept(), attend.fused_attn
    hook = attend.attn_drop.register_forward_hook(lambda module, inputs, output: kept(output))  # type: ignore[union-attr, operator]
    attend.fused_attn = False  # type: ignore[assignment]
    try:
        yield kept
    finally:
        attend.fused_attn = fused
        hook.remove()


def looked_at(bert: Bert, layer: int) -> Attend:
    """The attention of a layer to what it looks at.

    Args:
        bert: a text network.
        layer: counted from 0, those that read words alone too.
    """
    return bert.layers[layer].crossattention.self


def match(network: Contrastive, images: Float[Tensor, "b c h w"], ids: Int[Tensor, "b n"], mask: Mask, layer: int) -> Watched:
    """Words' attention to the image in one layer, and the gradient of the logit that the pair matches.

    It may be called in any mode of gradients, and leaves the network as it was.

    Args:
        network: in evaluation mode.
        images: as it expects them.
        ids: of the texts' tokens.
        mask: where there are tokens.
        layer: of the text network, one that looks at images, counted from 0.
    """
    bert = network.reader(network.text_encoder)

    def score(images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            tokens, words = network.visual_encoder(images), bert.read(ids, mask)
        return network.itm_head(bert.fuse(words, mask, [tokens])[:, 0])[:, 1].sum()  # type: ignore[no-any-return]

    with watching(looked_at(bert, layer)) as kept:
        return _watched(kept, score, images, ids, mask)


def similarity(network: Contrastive, images: Float[Tensor, "b c h w"], ids: Int[Tensor, "b n"], mask: Mask, block: int) -> Watched:
    """A picture's attention to itself in one block, and the gradient of the similarity to its text; otherwise as ``match``.

    Args:
        network: in evaluation mode.
        images: as it expects them.
        ids: of the texts' tokens.
        mask: where there are tokens.
        block: of the image encoder, counted from 0.
    """

    def score(images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        seen = network.encoded(images, ids, mask)
        return ((seen.image * seen.text).sum(1) / network.temp).sum()

    with watching_pictures(network.visual_encoder.blocks[block].attn) as kept:
        return _watched(kept, score, images, ids, mask)


def _watched(kept: _Kept, score: Callable[..., Tensor], *inputs: Tensor) -> Watched:
    with torch.inference_mode(False), torch.enable_grad():
        total = score(*(values.clone() for values in inputs))
        (gradient,) = torch.autograd.grad(total, [kept.attention])
    return Watched(kept.attention.detach(), gradient)
