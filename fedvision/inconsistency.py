"""The inconsistency score of two silos: how far one's loss can move where the other cannot tell the difference.

    max_{|L_A(w) - L_A(w*)| <= epsilon}  |L_B(w) - L_A(w*)|        and the same with A and B exchanged

A network's level sets reach to infinity, and so does this maximum: far away there is always a model that A cannot tell
from w* and that B cannot use. So w is confined to a ball around w*. Within level set and ball a gradient search climbs
from w*: along the gradient of L_B, less what would lead through the border, and back inside by Newton's method. What it
finds is a lower bound of the maximum. More steps and more starts tighten it; only scores that were found with the same
settings compare.
"""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fedvision.arrays import Named
from fedvision.data import Examples
from fedvision.errors import ExperimentError, RunError
from fedvision.evaluation import BATCH
from fedvision.holdings import Holdings
from fedvision.learners.learner import Learner
from fedvision.seeds import generator, global_generators


class Local(NamedTuple):
    """A loss at one point, and its gradient [d] there."""

    value: float
    slope: Tensor


Risk = Callable[[Tensor], Local]
"""A silo's loss as a function of all trainable parameters in one vector [d]."""

BORDER = 1e-3
"""Within this share of epsilon or radius from a border, a region is taken to end: steps rarely land on it exactly."""

MARGIN = 1e-6
"""How far inside the border of the level set, as a share of epsilon, Newton's method aims, in spite of rounding."""

CORRECTIONS = 8
"""Newton's steps back into the level set; what is still outside then was a step too far."""

FIRST, SHORTEST = 0.01, 1e-8
"""How long the first step is, and below what length a search ends; as shares of |w*|, or of 1 where |w*| is less."""

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
    learner: Learner,
    model: nn.Module,
    arrays: Named,
    a: Examples,
    b: Examples,
    *,
    epsilon: float,
    radius: float = 0.1,
    steps: int = 100,
    starts: int = 1,
) -> Inconsistency:
    """The inconsistency score of two silos at a model; the same at every call.

    Args:
        learner: whose loss is measured, in evaluation mode at the end of the training.
        model: of that learner; it stays as it is.
        arrays: w*, the model's parameters and buffers.
        a: one silo's examples.
        b: the other's.
        epsilon: how much a loss may differ from its value at w* to be taken for the same; above 0.
        radius: how far from w* to look, as a share of |w*| (or of 1, where |w*| is less); above 0, infinite for anywhere.
        steps: of each search; there are four for each start.
        starts: how many differently disturbed models to search from.

    Raises:
        ExperimentError: ``epsilon`` or ``radius`` is not above 0.
        RunError: a loss at w* is not finite.

    Source: FedILC, arXiv 2205.09305; Parascandolo et al., arXiv 2009.00329, section 2.1.
    Differs: within a ball, and a lower bound. The search follows a path from w*, as the latter paper asks the level set
        to be connected to w*, but does not check that no step leaps over a gap.
    """
    for name, setting in (("epsilon", epsilon), ("radius", radius)):
        if not setting > 0:
            raise ExperimentError(f"{name} = {setting}: expected a number > 0")
    model = copy.deepcopy(model).double()
    Holdings.of(learner, model).load(model, arrays)
    model.eval()
    risk_a, risk_b = risk(learner, model, a), risk(learner, model, b)
    w = parameters_to_vector(_trainable(model)).detach()
    at_a, at_b = risk_a(w).value, risk_b(w).value
    if not math.isfinite(at_a + at_b):
        raise RunError(f"the silos' losses are {at_a} and {at_b}; give a model whose training did not diverge")
    reach = radius * _scale(w)
    within_a, within_b = Region(risk_a, w, at_a, epsilon, reach), Region(risk_b, w, at_b, epsilon, reach)
    return Inconsistency(farthest(within_a, risk_b, steps, starts), farthest(within_b, risk_a, steps, starts))


def risk(learner: Learner, model: nn.Module, examples: Examples) -> Risk:
    """The mean loss over ``examples`` in float64, as a deterministic function of a model's trainable parameters.

    The training view of the examples is drawn once, and whatever the loss draws is the same at every call.
    """
    drawn = learner.draw(model, examples, slice(0, len(examples)), generator(0, "inconsistency", "view"))
    view = Examples({name: values.double() if values.is_floating_point() else values for name, values in drawn.fields.items()})
    params = _trainable(model)

    def at(w: Tensor) -> Local:
        vector_to_parameters(w, params)
        value, slope, rng = 0.0, torch.zeros_like(w), generator(0, "inconsistency", "loss")
        with global_generators(rng):
            for batch in view.batches(BATCH):
                loss = learner.loss(model, batch, 1.0, rng).total * (len(batch) / len(view))
                value += loss.item()
                slope += parameters_to_vector(torch.autograd.grad(loss, params, materialize_grads=True))
        return Local(value, slope)

    return at


@dataclass(frozen=True)
class Region:
    """Where to look: the level set |L - L(w*)| <= epsilon of one silo, within a ball around w*.

    Attributes:
        risk: L.
        center: w*, [d].
        level: L(w*).
        epsilon: half the height of the level set.
        radius: of the ball.
    """

    risk: Risk
    center: Tensor
    level: float
    epsilon: float
    radius: float

    def entered(self, w: Tensor) -> tuple[Tensor, Local] | None:
        """``w`` moved into the region, and L there; None if Newton's method does not get it into the level set."""
        for _ in range(CORRECTIONS):
            w = self._clipped(w)
            here = self.risk(w)
            excess, steepness = here.value - self.level, float(here.slope @ here.slope)
            if abs(excess) <= self.epsilon:
                return w, here
            if not 0 < steepness < math.inf:
                return None
            w = w - (excess - math.copysign(self.epsilon * (1 - MARGIN), excess)) / steepness * here.slope
        return None

    def walls(self, w: Tensor, here: Local) -> list[Tensor]:
        """Outward normals [d] of the borders that ``w`` stands at."""
        excess, away = here.value - self.level, w - self.center
        walls = [math.copysign(1, excess) * here.slope] if abs(excess) >= (1 - BORDER) * self.epsilon else []
        return walls + ([away] if away.norm() >= (1 - BORDER) * self.radius else [])

    def disturbed(self, start: int) -> Tensor:
        """The center moved a little in a random direction, in case L is flat there; itself where it may not be moved."""
        noise = torch.randn(len(self.center), generator=generator(0, "inconsistency", "start", start), dtype=torch.float64)
        step: Tensor = noise.to(self.center.device) / noise.norm()
        length = min(FIRST * _scale(self.center), self.radius)
        while length > SHORTEST * _scale(self.center):
            if abs(self.risk(self.center + length * step).value - self.level) <= self.epsilon / 2:
                return self.center + length * step
            length *= SHORTER
        return self.center

    def _clipped(self, w: Tensor) -> Tensor:
        away = w - self.center
        distance = float(away.norm())
        return w if distance <= self.radius else self.center + self.radius / distance * away


def farthest(region: Region, other: Risk, steps: int, starts: int) -> float:
    """The largest |other's loss - L(w*)| found in a region; other's loss is searched both upwards and downwards."""
    found = [abs(other(region.center).value - region.level)]
    for start in range(starts):
        w = region.disturbed(start)
        found += [climb(region, other, w, steps, sign) for sign in (1, -1)]
    return max(found)


def climb(region: Region, other: Risk, w: Tensor, steps: int, sign: int) -> float:
    """The largest sign * (other's loss - L(w*)) on a way upwards from ``w``, which lies in the region."""
    here, there, length = region.risk(w), other(w), FIRST * _scale(region.center)
    for _ in range(steps):
        direction = tangential(sign * there.slope, region.walls(w, here))
        if not direction.norm() > 0 or length < SHORTEST * _scale(region.center):
            break
        entered = region.entered(w + length * direction / direction.norm())
        beyond = None if entered is None else other(entered[0])
        if entered is not None and beyond is not None and sign * beyond.value > sign * there.value:
            (w, here), there, length = entered, beyond, length * LONGER
        else:
            length *= SHORTER
    return sign * (there.value - region.level)


def tangential(direction: Tensor, walls: Iterable[Tensor]) -> Tensor:
    """``direction`` [d], less what would lead through any of the walls, given by their outward normals [d]."""
    kept: list[Tensor] = []
    for wall in walls:
        normal = wall - sum((wall @ unit * unit for unit in kept), start=torch.zeros_like(wall))
        if direction @ normal > 0:
            kept.append(normal / normal.norm())
            direction = direction - direction @ kept[-1] * kept[-1]
    return direction


def _scale(w: Tensor) -> float:
    return max(float(w.norm()), 1.0)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]
