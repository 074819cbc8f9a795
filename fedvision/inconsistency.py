"""The inconsistency score of two silos: how far one's loss can move where the other cannot tell the difference.

    max_{|L_A(w) - L_A(w*)| <= epsilon}  |L_B(w) - L_A(w*)|        and the same with A and B exchanged

A level set of a network's loss cannot be searched exhaustively. From w* a gradient search climbs within it: along the
gradient of L_B, projected on the tangent of the level set once its border is reached, and back inside by Newton's
method. So the score is a lower bound of the true maximum; more steps and more starts tighten it, and only scores that
were found with the same of both compare.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fedvision.arrays import Named
from fedvision.data import Examples
from fedvision.errors import ExperimentError, RunError
from fedvision.evaluation import BATCH, load
from fedvision.learners.learner import Learner
from fedvision.seeds import generator, global_generators

Risk = Callable[[Tensor], tuple[float, Tensor]]
"""All trainable parameters as one vector [d] -> a silo's loss there, and its gradient [d]."""

BORDER = 1e-3
"""Within this share of epsilon of its border, the level set is taken to end."""

MARGIN = 1e-6
"""How far inside the border, as a share of epsilon, Newton's method aims: it may not end outside by rounding."""

CORRECTIONS = 8
"""Newton's steps back into the level set; what is still outside then is a step too far."""

FIRST, SHORTEST = 0.01, 1e-8
"""How long the first step is, and below what length a search ends; as a share of |w|, or absolute where |w| < 1."""

LONGER, SHORTER = 1.5, 0.3
"""How the length of a step changes after one that improved, and one that did not."""


@dataclass(frozen=True)
class Inconsistency:
    """How inconsistent two silos are at a model w*; in units of the loss.

    Attributes:
        within_a: the largest |L_B(w) - L_A(w*)| found where L_A is within epsilon of L_A(w*).
        within_b: the largest |L_A(w) - L_B(w*)| found where L_B is within epsilon of L_B(w*).
    """

    within_a: float
    within_b: float

    @property
    def score(self) -> float:
        """The larger of both."""
        return max(self.within_a, self.within_b)


def inconsistency(
    learner: Learner, model: nn.Module, arrays: Named, a: Examples, b: Examples, *, epsilon: float, steps: int = 100, starts: int = 1
) -> Inconsistency:
    """The inconsistency score of two silos at a model; the same at every call.

    Args:
        learner: whose loss is measured, in evaluation mode at the end of the training.
        model: of that learner; it stays as it is.
        arrays: w*, the model's parameters and buffers.
        a: one silo's examples.
        b: the other's.
        epsilon: how much a loss may differ from its value at w* to be taken for the same; above 0.
        steps: of each search, at least 0; there are four for each start.
        starts: how many searches begin from differently disturbed models, at least 1.

    Raises:
        ExperimentError: ``epsilon`` is not above 0.
        RunError: a loss at w* is not finite.

    Source: FedILC, arXiv 2205.09305; Parascandolo et al., arXiv 2009.00329, section 2.1.
    Differs: found by a gradient search, a lower bound. It follows a path from w*, as the latter paper demands that the
        level set be connected to w*, but does not check that no step leaps over a gap.
    """
    if not epsilon > 0:
        raise ExperimentError(f"epsilon = {epsilon}: expected a number > 0")
    model = copy.deepcopy(model).double()
    load(model, arrays)
    model.eval()
    risk_a, risk_b = risk(learner, model, a), risk(learner, model, b)
    w = parameters_to_vector(_trainable(model)).detach()
    for name, of_silo in (("first", risk_a), ("second", risk_b)):
        if not torch.tensor(of_silo(w)[0]).isfinite():
            raise RunError(f"the {name} silo's loss is {of_silo(w)[0]}; give a model whose training did not diverge")
    return Inconsistency(farthest(risk_a, risk_b, w, epsilon, steps, starts), farthest(risk_b, risk_a, w, epsilon, steps, starts))


def risk(learner: Learner, model: nn.Module, examples: Examples) -> Risk:
    """The mean loss over ``examples`` in float64, as a deterministic function of a model's trainable parameters.

    The training view of the examples is drawn once, and whatever the loss draws is the same at every call.
    """
    widened = Examples({name: values.double() if values.is_floating_point() else values for name, values in examples.fields.items()})
    view, params = learner.train_view(widened, generator(0, "inconsistency", "view")), _trainable(model)

    def value_and_gradient(w: Tensor) -> tuple[float, Tensor]:
        vector_to_parameters(w, params)
        value, slope, rng = 0.0, torch.zeros_like(w), generator(0, "inconsistency", "loss")
        with global_generators(rng):
            for batch in view.batches(BATCH):
                loss = learner.loss(model, batch, 1.0, rng).total * (len(batch) / len(view))
                value += loss.item()
                slope += parameters_to_vector(torch.autograd.grad(loss, params, materialize_grads=True))
        return value, slope

    return value_and_gradient


def farthest(inside: Risk, outside: Risk, w: Tensor, epsilon: float, steps: int, starts: int) -> float:
    """The largest |L_B - L_A(w*)| found in the level set of L_A: L_B is searched both upwards and downwards.

    Args:
        inside: L_A.
        outside: L_B.
        w: w*, [d].
        epsilon: half the height of the level set.
        steps: of each search.
        starts: how many disturbances of w* to search from.
    """
    anchor = inside(w)[0]
    found = [abs(outside(w)[0] - anchor)]
    for start in range(starts):
        disturbed = _disturbed(inside, w, anchor, epsilon, start)
        found += [climb(inside, outside, disturbed, anchor, epsilon, steps, sign) for sign in (1, -1)]
    return max(found)


def climb(inside: Risk, outside: Risk, w: Tensor, anchor: float, epsilon: float, steps: int, sign: int) -> float:
    """The largest sign * (L_B - anchor) on a way upwards from ``w``, which lies in |L_A - anchor| <= epsilon."""
    (level, normal), (value, slope) = inside(w), outside(w)
    best, length = sign * (value - anchor), FIRST * max(float(w.norm()), 1.0)
    for _ in range(steps):
        direction = tangential(sign * slope, normal, (level - anchor) / epsilon)
        if not direction.norm() > 0 or length < SHORTEST * max(float(w.norm()), 1.0):
            break
        candidate, there = corrected(inside, w + length * direction / direction.norm(), anchor, epsilon)
        value, slope_there = outside(candidate) if there else (torch.nan, slope)
        if there and sign * (value - anchor) > best:
            w, (level, normal), slope, best, length = candidate, there, slope_there, sign * (value - anchor), length * LONGER
        else:
            length *= SHORTER
    return best


def tangential(direction: Tensor, normal: Tensor, height: float) -> Tensor:
    """``direction`` [d], less its part along ``normal`` [d] where that would leave the level set.

    Args:
        direction: the way upwards.
        normal: the gradient of the loss whose level set it is.
        height: where between the level set's borders, -1 and 1.
    """
    outward = direction @ normal * (1 if height > 0 else -1)
    if abs(height) < 1 - BORDER or outward <= 0:
        return direction
    return direction - (direction @ normal / (normal @ normal)) * normal


def corrected(inside: Risk, w: Tensor, anchor: float, epsilon: float) -> tuple[Tensor, tuple[float, Tensor] | None]:
    """``w`` moved back into |L_A - anchor| <= epsilon along the gradient of L_A.

    Returns:
        The point, and L_A and its gradient there; None if Newton's method does not get there.
    """
    for _ in range(CORRECTIONS):
        level, normal = inside(w)
        excess, steepness = level - anchor, float(normal @ normal)
        if abs(excess) <= epsilon:
            return w, (level, normal)
        if not 0 < steepness < torch.inf:
            break
        border = epsilon * (1 - MARGIN) * (1 if excess > 0 else -1)
        w = w - (excess - border) / steepness * normal
    return w, None


def _disturbed(inside: Risk, w: Tensor, anchor: float, epsilon: float, start: int) -> Tensor:
    """The model w* moved a little in a random direction, out of a place where L_B may be flat, within the level set."""
    noise = torch.randn(len(w), generator=generator(0, "inconsistency", "start", start), dtype=w.dtype).to(w.device)
    length = FIRST * max(float(w.norm()), 1.0)
    for _ in range(40):
        moved: Tensor = w + length * noise / noise.norm()
        if abs(inside(moved)[0] - anchor) <= epsilon / 2:
            return moved
        length *= SHORTER
    return w


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]
