"""DoubleMatch: semi-supervised classification with pseudo-labels and self-supervised similarity of embeddings.

A labeled batch x with labels y and an unlabeled one, of which a weak and a strong view are taken, go through the network at
once. p is what a classifier predicts, z the embedding of a weak view, v that of a strong view and h a linear head:

    l = l_l(p(x), y) + w_p l_p + w_s l_s(h(v), z)

Source: arXiv 2205.05575, equations 1 to 5, and its public implementation.
"""

from collections.abc import Iterable
from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

Similarity = Literal["cosine", "mse", "softmax"]


def supervised_loss(logits: Float[Tensor, "b classes"], labels: Int[Tensor, "b"]) -> Float[Tensor, ""]:
    """l_l: mean cross-entropy of labeled examples; 0 where there is none."""
    return F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)


def confident(weak: Float[Tensor, "n classes"], threshold: float) -> Bool[Tensor, "n"]:
    """Where the prediction on the weak view has at least probability ``threshold``.

    Differs: "at least" as in the reference; the paper's mask is of those above it.
    """
    return weak.detach().softmax(1).amax(1) >= threshold


def pseudo_label_loss(weak: Float[Tensor, "n classes"], strong: Float[Tensor, "n classes"], threshold: float) -> Float[Tensor, ""]:
    """l_p: cross-entropy of the strong view against the class that the weak view says, where it is confident.

    It is a mean over all n, the others counting 0. No gradient reaches the weak view.

    Args:
        weak: logits.
        strong: logits.
        threshold: in [0, 1].
    """
    losses = F.cross_entropy(strong, weak.detach().argmax(1), reduction="none")
    return (losses * confident(weak, threshold)).mean()


def cosine_loss(projected: Float[Tensor, "n d"], target: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """l_s: one less the mean cosine between h(v) and z, in [0, 2]; no gradient reaches z.

    Differs: the 1, as in the reference; the paper's is -cos, with the same gradients.
    """
    return 1 - (F.normalize(projected, eps=1e-6) * F.normalize(target.detach(), eps=1e-6)).sum(1).mean()


def squared_loss(projected: Float[Tensor, "n d"], target: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """l_s of the ablation: mean over examples and features of (h(v) - z)^2, neither normalized; no gradient reaches z."""
    return F.mse_loss(projected, target.detach())


def softmax_loss(projected: Float[Tensor, "n d"], target: Float[Tensor, "n d"], temperature: float) -> Float[Tensor, ""]:
    """l_s of the ablation: mean cross-entropy of softmax(h(v)) against softmax(z / temperature); no gradient reaches z.

    Differs: the temperature divides only z, as in the reference.
    """
    return F.cross_entropy(projected, (target.detach() / temperature).softmax(1))


def similarity_loss(
    kind: Similarity, projected: Float[Tensor, "n d"], target: Float[Tensor, "n d"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """l_s, of one of three kinds; ``temperature`` is for ``softmax`` alone."""
    if kind == "softmax":
        return softmax_loss(projected, target, temperature)
    return cosine_loss(projected, target) if kind == "cosine" else squared_loss(projected, target)


def kernels(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The kernels of convolutions and linear layers, which weight decay pulls to 0; then the other parameters, which it does not.

    Differs: the paper's formula decays all parameters, the reference these.
    """
    both: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in parameters:
        both[parameter.ndim < 2].append(parameter)
    return both
