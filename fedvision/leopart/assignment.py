"""Assigning patches to prototypes, so that all prototypes are used alike: Sinkhorn and Knopp's algorithm."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def balanced(scores: Float[Tensor, "n k"], epsilon: float, iterations: int) -> Float[Tensor, "n k"]:
    """How much of each vector belongs to each prototype; rows sum to 1, columns to about n / k.

    Q = exp(S / epsilon), then repeatedly: columns of Q are scaled to sum to 1/k, rows to sum to 1/n; rows at last to sum to 1.

    Args:
        scores: S, how much each vector is like each prototype.
        epsilon: how soft assignments are, above 0.
        iterations: how often; the more, the more evenly prototypes are used.

    Source: Cuturi, arXiv 1306.0895; SwAV, arXiv 2006.09882; arXiv 2204.13101, section 3.1.
    Differs: logarithms are scaled instead, which no epsilon overflows.
    """
    logs = scores / epsilon
    n, k = logs.shape
    logs = logs - logs.flatten().logsumexp(0)
    for _ in range(iterations):
        logs = logs - logs.logsumexp(0, keepdim=True) - math.log(k)
        logs = logs - logs.logsumexp(1, keepdim=True) - math.log(n)
    return logs.softmax(1)


def assigned(
    scores: Float[Tensor, "n k"], remembered: Float[Tensor, "m k"] | None, epsilon: float, iterations: int
) -> Float[Tensor, "n k"]:
    """``balanced`` assignments of vectors, among others that are remembered and come first."""
    together = scores if remembered is None else torch.cat([remembered, scores])
    return balanced(together, epsilon, iterations)[-len(scores) :]


def entropy(assignments: Float[Tensor, "*n k"]) -> Float[Tensor, ""]:
    """Mean entropy of assignments in nats: 0 if each belongs to one prototype, ln k if to all alike.

    >>> entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).item() * 2
    0.6931471824645996
    """
    return torch.special.entr(assignments).sum(-1).mean()  # type: ignore[no-any-return]
