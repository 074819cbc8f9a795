"""BERT as ALBEF has it: its first layers read the words, its last ones look at a picture, or at two.

Layers normalize last. Names and shapes are those of published checkpoints.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fedvision.errors import ExperimentError

EPSILON = 1e-12
"""Of the layer normalizations; vision transformers have another."""

Watch = Callable[[Float[Tensor, "b heads queries keys"]], Float[Tensor, "b heads queries keys"]]
"""Is shown the attention, after the softmax; what it returns is used."""

Mask = Bool[Tensor, "b n"]
"""Where there is a token, not padding."""


@dataclass(frozen=True)
class TextSize:
    """The size of a text network; the defaults are those of ALBEF's.

    Attributes:
        vocabulary: number of tokens.
        width: of a token's vector, a multiple of ``heads``.
        heads: of the attention.
        perceptron: width inside the layers' perceptrons.
        layers: number of them all.
        fusion: the first layer that looks at pictures, counted from 0; as many layers read words alone.
        positions: the longest text in tokens.
        context: width of what is looked at.
        dropout: rate, of vectors and of attention.
        padding: the token that stands for nothing.
        paired: whether layers that look at pictures come in twos, each two with the same keys and values.
    """

    vocabulary: int = 30522
    width: int = 768
    heads: int = 12
    perceptron: int = 3072
    layers: int = 12
    fusion: int = 6
    positions: int = 512
    context: int = 768
    dropout: float = 0.1
    padding: int = 0
    paired: bool = False

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ExperimentError(f"a text network of width {self.width} cannot have {self.heads} heads; choose a number that divides it")
        if not 0 <= self.fusion <= self.layers:
            raise ExperimentError(f"of {self.layers} layers of a text network the {self.fusion} first read words alone; choose fewer")


class Attend(nn.Module):
    """What each query gathers from a context.

    Args:
        width: of the queries, a multiple of ``heads``.
        heads: of the attention.
        context: width of what is looked at.
        dropout: rate.
    """

    def __init__(self, width: int, heads: int, context: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(context, width), nn.Linear(context, width)
        self.watch: Watch | None = None

    def forward(
        self, hidden: Float[Tensor, "b n width"], context: Float[Tensor, "b m other"], seen: Bool[Tensor, "b 1 q m"] | None
    ) -> Float[Tensor, "b n width"]:
        """Of each query, what it gathers from where it may look."""
        pairs = ((self.query, hidden), (self.key, context), (self.value, context))
        q, k, v = (linear(values).unflatten(2, (self.heads, -1)).transpose(1, 2) for linear, values in pairs)
        rate = self.dropout if self.training else 0.0
        if self.watch is None:
            gathered = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=rate)
        else:
            gathered = F.dropout(self.watch(attention(q, k, seen)), rate) @ v
        return gathered.transpose(1, 2).flatten(2)  # type: ignore[no-any-return]


def attention(
    q: Float[Tensor, "b heads n d"], k: Float[Tensor, "b heads m d"], seen: Bool[Tensor, "b 1 q m"] | None
) -> Float[Tensor, "b heads n m"]:
    """softmax(q k^T / sqrt(d)), over where a query may look."""
    scores: Tensor = q @ k.mT / math.sqrt(q.shape[-1])
    return (scores if seen is None else scores.masked_fill(~seen, -torch.inf)).softmax(-1)


class Residual(nn.Module):
    """A linear layer whose result is added to what was there before, then normalized."""

    def __init__(self, inputs: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.dense, self.LayerNorm = nn.Linear(inputs, width), nn.LayerNorm(width, eps=EPSILON)

    def forward(self, hidden: Float[Tensor, "b n inputs"], before: Float[Tensor, "b n width"]) -> Float[Tensor, "b n width"]:
        """LayerNorm(before + dropout(dense(hidden)))."""
        return self.LayerNorm(before + F.dropout(self.dense(hidden), self.dropout, self.training))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Attention with what comes after it."""

    def __init__(self, size: TextSize, context: int) -> None:
        super().__init__()
        self.self = Attend(size.width, size.heads, context, size.dropout)
        self.output = Residual(size.width, size.width, size.dropout)

    def forward(self, hidden: Tensor, context: Tensor, seen: Tensor | None) -> Tensor:
        """As ``Attend``, added and normalized."""
        return self.output(self.self(hidden, context, seen), hidden)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Words look at words, then perhaps at a context, then a perceptron; each is added and normalized."""

    def __init__(self, size: TextSize, looks: bool) -> None:
        super().__init__()
        self.attention = Attention(size, size.width)
        if looks:
            self.crossattention = Attention(size, size.context)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(size.width, size.perceptron)})
        self.output = Residual(size.perceptron, size.width, size.dropout)

    def forward(self, hidden: Tensor, seen: Tensor, context: Tensor | None, context_seen: Tensor | None) -> Tensor:
        """The words' vectors after this layer [b, n, width]."""
        hidden = self.attention(hidden, hidden, seen)
        if context is not None:
            hidden = self.crossattention(hidden, context, context_seen)
        return self.output(F.gelu(self.intermediate["dense"](hidden)), hidden)  # type: ignore[no-any-return]


class Embeddings(nn.Module):
    """Vectors of tokens and of their positions, normalized."""

    position_ids: Tensor

    def __init__(self, size: TextSize) -> None:
        super().__init__()
        self.dropout = size.dropout
        self.word_embeddings = nn.Embedding(size.vocabulary, size.width, padding_idx=size.padding)
        self.position_embeddings = nn.Embedding(size.positions, size.width)
        self.token_type_embeddings = nn.Embedding(2, size.width)
        self.LayerNorm = nn.LayerNorm(size.width, eps=EPSILON)
        self.register_buffer("position_ids", torch.arange(size.positions)[None])

    def forward(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n width"]:
        """One vector a token; all are of the first type."""
        places = self.position_ids[:, : ids.shape[1]]
        vectors = self.word_embeddings(ids) + self.position_embeddings(places) + self.token_type_embeddings.weight[0]
        return F.dropout(self.LayerNorm(vectors), self.dropout, self.training)


class Bert(nn.Module):
    """A text network whose last layers may look at something.

    Args:
        size: of everything.
    """

    def __init__(self, size: TextSize) -> None:
        super().__init__()
        self.size = size
        self.embeddings = Embeddings(size)
        layers = [Layer(size, i >= size.fusion) for i in range(size.layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        for one, other in zip(layers[size.fusion :: 2], layers[size.fusion + 1 :: 2], strict=False) if size.paired else ():
            first, second = one.crossattention.self, other.crossattention.self
            second.key, second.value = first.key, first.value

    @property
    def layers(self) -> Sequence[Layer]:
        """All of them, in order."""
        return self.encoder["layer"]  # type: ignore[return-value]

    def read(self, ids: Int[Tensor, "b n"], mask: Mask) -> Float[Tensor, "b n width"]:
        """The words after the layers that read words alone."""
        return self._through(self.layers[: self.size.fusion], self.embeddings(ids), mask[:, None, None], (), None)

    def fuse(
        self, hidden: Float[Tensor, "b n width"], mask: Mask, contexts: Sequence[Float[Tensor, "b m context"]], seen: Mask | None = None
    ) -> Float[Tensor, "b n width"]:
        """The words after the layers that look at contexts, in turn.

        Args:
            hidden: from ``read``.
            mask: of the words.
            contexts: what the layers look at: one, or two of which the first, third, ... layer looks at the first.
            seen: where there is anything to look at; everywhere if not given.
        """
        looked = None if seen is None else seen[:, None, None]
        return self._through(self.layers[self.size.fusion :], hidden, mask[:, None, None], contexts, looked)

    def forward(
        self,
        ids: Int[Tensor, "b n"],
        mask: Mask,
        contexts: Sequence[Float[Tensor, "b m context"]],
        seen: Mask | None = None,
    ) -> Float[Tensor, "b n width"]:
        """The words after all layers."""
        return self.fuse(self.read(ids, mask), mask, contexts, seen)

    def told(
        self, ids: Int[Tensor, "b n"], mask: Mask, contexts: Sequence[Float[Tensor, "b m context"]], seen: Mask | None = None
    ) -> Float[Tensor, "b n width"]:
        """The words after all layers, where each word sees only itself and those before it; all layers look at contexts."""
        before = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        looked = None if seen is None else seen[:, None, None]
        return self._through(self.layers, self.embeddings(ids), before & mask[:, None, None], contexts, looked)

    @staticmethod
    def _through(layers: Sequence[Layer], hidden: Tensor, seen: Tensor, contexts: Sequence[Tensor], context_seen: Tensor | None) -> Tensor:
        for i, layer in enumerate(layers):
            hidden = layer(hidden, seen, contexts[i % len(contexts)] if contexts else None, context_seen)
        return hidden


class WordHead(nn.Module):
    """Which token stands at a place: a vector, compared with those of all tokens.

    Args:
        embeddings: whose tokens' vectors these are.
    """

    def __init__(self, embeddings: Embeddings) -> None:
        super().__init__()
        vocabulary, width = embeddings.word_embeddings.weight.shape
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.transform = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=EPSILON)})
        self.decoder = nn.Linear(width, vocabulary)
        self.decoder.weight, self.decoder.bias = embeddings.word_embeddings.weight, self.bias

    def forward(self, hidden: Float[Tensor, "*n width"]) -> Float[Tensor, "*n vocabulary"]:
        """Logits of all tokens at each place."""
        return self.decoder(self.transform["LayerNorm"](F.gelu(self.transform["dense"](hidden))))  # type: ignore[no-any-return]


class WordModel(nn.Module):
    """A text network with a head that says which token stands at a place."""

    def __init__(self, size: TextSize) -> None:
        super().__init__()
        self.bert = Bert(size)
        self.cls = nn.ModuleDict({"predictions": WordHead(self.bert.embeddings)})

    def words(self, hidden: Float[Tensor, "*n width"]) -> Float[Tensor, "*n vocabulary"]:
        """Logits of all tokens at each place."""
        return self.cls["predictions"](hidden)  # type: ignore[no-any-return]


def initialized(model: nn.Module, rng: torch.Generator, deviation: float) -> None:
    """Begin all linear layers and embeddings from a normal distribution, biases and padding from 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=deviation, generator=rng)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
