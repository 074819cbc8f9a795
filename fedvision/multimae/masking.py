"""Which patches the encoder sees: so many of all modalities together, shared out among them by a Dirichlet draw."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedvision.errors import DataError

Masks = dict[str, Bool[Tensor, "b n"]]
"""Of each modality, which patches are masked."""


def wished(shares: Float[Tensor, "b t"], noises: Sequence[Float[Tensor, "b _"]], visible: int) -> Bool[Tensor, "b n"]:
    """Which patches of all modalities would be visible if each modality had round(share x visible) of them, chosen at random.

    Args:
        shares: of each modality; rows sum to 1.
        noises: in [0, 1), one a patch of each modality.
        visible: how many are to be visible; rounding may miss it by a few.
    """
    counts = (shares * visible).round().long()
    # a random permutation's values are as good as its places
    return torch.cat([noise.argsort(1) < count[:, None] for noise, count in zip(noises, counts.unbind(1), strict=True)], dim=1)


def kept(wish: Bool[Tensor, "b n"], noise: Float[Tensor, "b n"], visible: int) -> Int[Tensor, "b k"]:
    """Exactly ``visible`` patches in random order: those that are wished for, less some or with some more, at random.

    Args:
        wish: from ``wished``.
        noise: in [0, 1), one a patch; infinite where a patch must not be chosen.
        visible: how many.
    """
    return torch.where(wish, noise, 1 + noise).argsort(1)[:, :visible]


def masks_of(visible: Int[Tensor, "b k"], spans: Mapping[str, slice]) -> Masks:
    """The masks that visible patches leave, by modality."""
    total = max(span.stop for span in spans.values())
    masked = torch.ones(len(visible), total, dtype=torch.bool, device=visible.device)
    masked = masked.scatter(1, visible, torch.zeros_like(visible, dtype=torch.bool))
    return {name: masked[:, span] for name, span in spans.items()}


def visible_of(masks: Masks) -> Int[Tensor, "b k"]:
    """The visible patches of masks of your own: what ``Autoencoder`` takes. The inverse of ``masks_of``.

    Args:
        masks: of every input, in their order; each example shows as many patches as the others, at least one.

    Raises:
        DataError: examples that show different numbers of patches, or none.
    """
    shown = ~torch.cat(list(masks.values()), dim=1)
    counts = shown.sum(1)
    if counts.unique().numel() != 1 or not counts[0]:
        fact = f"examples of these masks show {', '.join(map(str, counts.tolist()[:10]))} patches"
        raise DataError(f"{fact}; mask so many of each that all show the same number, or give the examples one by one")
    return shown.nonzero()[:, 1].reshape(len(shown), -1)


def dirichlet(present: Bool[Tensor, "b t"], alpha: float, rng: np.random.Generator, subsets: bool = False) -> Float[Tensor, "b t"]:
    """Each row's shares of the modalities that it has, from a symmetric Dirichlet distribution; 0 for the others.

    Args:
        present: which modalities each example has, at least one.
        alpha: concentration, above 0: small ones favor single modalities, large ones equal shares.
        rng: for the draws.
        subsets: whether a non-empty subset of an example's modalities is drawn first, all alike, to share among.

    Source: arXiv 2204.01678, section 3.2; ``subsets`` from its public implementation. Differs: a modality that is not in the
        subset has share 0, where there it has a concentration of 1e-5.
    """
    pattern = present.numpy()
    if subsets:
        pattern = _subset(pattern, rng)
    shares = np.zeros(pattern.shape)
    for held in np.unique(pattern, axis=0):
        rows = np.flatnonzero((pattern == held).all(1))
        shares[np.ix_(rows, np.flatnonzero(held))] = rng.dirichlet([alpha] * int(held.sum()), len(rows))
    return torch.from_numpy(shares)


def drawn(
    counts: Mapping[str, int],
    present: Bool[Tensor, "b t"],
    visible: int,
    alpha: float,
    rng: torch.Generator,
    subsets: bool = False,
) -> Int[Tensor, "b k"]:
    """Visible patches of a batch, as indices into the patches of all modalities, one modality after the other.

    Args:
        counts: patches of each modality.
        present: which modalities each example has; patches of the others are never visible.
        visible: how many patches each example shows.
        alpha: concentration of the Dirichlet distribution.
        rng: for all draws, on the CPU.
        subsets: see ``dirichlet``.

    Raises:
        DataError: an example has fewer patches.

    Source: arXiv 2204.01678, section 3.2.
    """
    sizes = torch.tensor(list(counts.values()))
    least = int((present * sizes).sum(1).min())
    if least < visible:
        fact = f"{visible} patches are to be visible, and an example has {least}"
        raise DataError(f"{fact} (modalities: {', '.join(counts)}); lower learner.visible, or the patch")
    seed = int(torch.randint(2**62, (), generator=rng))
    shares = dirichlet(present, alpha, np.random.default_rng(seed), subsets)
    noises = [torch.rand(len(present), count, generator=rng) for count in counts.values()]
    there = present.repeat_interleave(sizes, dim=1)
    noise = torch.rand(there.shape, generator=rng).masked_fill(~there, torch.inf)
    return kept(wished(shares, noises, visible) & there, noise, visible)


def _subset(present: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random non-empty subset of each row's modalities."""
    chosen = np.zeros_like(present)
    empty = np.arange(len(present))
    while len(empty):
        chosen[empty] = present[empty] & (rng.random((len(empty), present.shape[1])) < 0.5)
        empty = empty[~chosen[empty].any(1)]
    return chosen
