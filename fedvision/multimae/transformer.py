"""Transformer blocks as MultiMAE has them, and how their weights begin."""

import math
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def block(width: int, heads: int, drop_path: float = 0.0) -> nn.Module:
    """A block that normalizes first: attention, then a perceptron four times as wide with GELU, each added to what it was given.

    Args:
        width: a multiple of ``heads``.
        heads: of the attention.
        drop_path: rate of stochastic depth.
    """
    from timm.models.vision_transformer import Block

    return Block(width, heads, qkv_bias=True, drop_path=drop_path, norm_layer=LayerNorm)  # type: ignore[arg-type]


def perceptron(width: int) -> nn.Module:
    """Two linear layers, four times as wide between them, with GELU."""
    from timm.layers.mlp import Mlp

    return Mlp(width, 4 * width)


class CrossAttention(nn.Module):
    """Attention of queries to a context of the same width.

    Args:
        width: a multiple of ``heads``.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, queries: Float[Tensor, "b n width"], context: Float[Tensor, "b m width"]) -> Float[Tensor, "b n width"]:
        """What each query gathers from the context."""
        q = self.q(queries).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        gathered = F.scaled_dot_product_attention(q, k, v)
        return self.proj(gathered.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


Network = TypeVar("Network", bound=nn.Module)


def initialized(model: Network, rng: torch.Generator) -> Network:
    """The model itself, every weight at its beginning.

    Linear layers and the projections of patches: uniform, by Xavier's rule, where the three (or two) matrices of ``qkv`` (``kv``)
    count each by itself; their biases 0. Embeddings of classes and tasks, and global tokens: normal of deviation 0.02. Mask tokens: 0.

    Source: the public implementation of arXiv 2204.01678 as its weights show: this comes last, and also over heads that
        begin otherwise in their own papers.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            _linear(name, module, rng)
        elif isinstance(module, nn.Conv2d) and ".proj" in f".{name}":
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1), generator=rng)
        elif isinstance(module, nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=0.02, generator=rng)
            _forget_padding(module)
    for name, param in model.named_parameters():
        if name.endswith(("global_tokens", "cls_emb")) or "task_embeddings" in name:
            nn.init.trunc_normal_(param, std=0.02, generator=rng)
        elif name.endswith("mask_token"):
            nn.init.zeros_(param)
    return model


def _linear(name: str, module: nn.Linear, rng: torch.Generator) -> None:
    outputs, inputs = module.weight.shape
    outputs //= 3 if name.endswith("qkv") else 2 if name.endswith("kv") else 1
    bound = math.sqrt(6 / (inputs + outputs))
    nn.init.uniform_(module.weight, -bound, bound, generator=rng)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _forget_padding(embedding: nn.Embedding) -> None:
    if embedding.padding_idx is not None:
        nn.init.zeros_(embedding.weight[embedding.padding_idx])
