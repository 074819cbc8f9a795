"""The inconsistency score reaches the known maximum of one quadratic within a level set of another, and never more."""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import nn

from fedvision.data import Examples
from fedvision.errors import ExperimentError, RunError
from fedvision.inconsistency import Inconsistency, Local, Region, climb, farthest, inconsistency, risk, tangential
from fedvision.learners.classifier import Classifier
from fedvision.learners.learner import Learner, Loss
from fedvision.models import MLP
from fedvision.seeds import generator


class Point(nn.Module):
    """A model that is one vector."""

    def __init__(self, d):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(d))
        self.dropout = nn.Dropout(0.5)


@dataclass(frozen=True, kw_only=True)
class Quadratic(Learner):
    """L(w) = mean over examples of 1/2 sum_k curvature_k (w_k - image_k)^2 + offset."""

    def build(self, spec, rng):
        return Point(spec.image_shape[0])

    def loss(self, model, batch, progress, rng):
        assert not model.training
        bowl = 0.5 * (batch.fields["curvature"] * (model.w - batch.image) ** 2).sum(1) + batch.fields["offset"]
        return Loss(bowl.mean())

    def evaluate(self, model, batch):
        raise NotImplementedError


def silo(center, curvature=1.0, offset=0.0):
    """A silo of one example, whose loss is a bowl around ``center``."""
    center = torch.as_tensor(center, dtype=torch.float64)
    curvature = torch.as_tensor(curvature, dtype=torch.float64).expand(center.shape)
    fields = {
        "image": center[None],
        "label": torch.zeros(1).long(),
        "curvature": curvature[None].clone(),
        "offset": torch.tensor([offset]).double(),
    }
    return Examples(fields)


def found(at, a, b, epsilon, **options):
    at = torch.as_tensor(at, dtype=torch.float64)
    options = {"steps": 300, "radius": math.inf, **options}
    return inconsistency(Quadratic(), Point(len(at)), {"w": at}, a, b, epsilon=epsilon, **options)


def reaches(value, expected, rel=1e-3):
    """A lower bound of the true maximum, and near to it."""
    assert value <= expected * (1 + 1e-9), f"{value} is more than is possible, {expected}"
    assert value == pytest.approx(expected, rel=rel)


# ---- known maxima -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1e-6, 0.01, 0.5, 20.0])
@pytest.mark.parametrize("shift", [0.3, 2.0])
def test_the_farthest_point_of_a_ball(epsilon, shift):
    """Around its minimum A's level set is a ball of radius r = sqrt(2 epsilon); B's bowl is highest at its far side."""
    b, r = torch.tensor([shift, -shift, 0.5 * shift]), math.sqrt(2 * epsilon)
    score = found([0, 0, 0], silo([0, 0, 0]), silo(b, 4.0, offset=0.7), epsilon)
    reaches(score.within_a, 4 / 2 * (b.norm().item() + r) ** 2 + 0.7)


def test_the_lowest_point_of_a_ball():
    """Where B's loss lies below A's, its lowest point counts: |L_B(w) - L_A(w*)| looks either way."""
    epsilon, b = 0.08, torch.tensor([2.0, 0.0])
    score = found([0, 0], silo([0, 0]), silo(b, offset=-9.0), epsilon)
    reaches(score.within_a, 9 - 0.5 * (2 - 0.4) ** 2)


def test_the_lowest_point_may_lie_inside():
    score = found([0, 0], silo([0, 0]), silo([0.3, 0], offset=-9.0), epsilon=0.5)
    reaches(score.within_a, 9.0)


@pytest.mark.parametrize("epsilon", [0.01, 0.3])
def test_away_from_its_minimum_the_level_set_is_a_shell(epsilon):
    at, b = torch.tensor([3.0, 4.0]), torch.tensor([-1.0, 0.0])
    outer = math.sqrt(25 + 2 * epsilon)
    score = found(at, silo([0, 0]), silo(b, 2.0), epsilon)
    reaches(score.within_a, 2 / 2 * (1 + outer) ** 2 - 12.5)


def test_an_ellipsoid_is_a_ball_in_other_coordinates():
    """With u_k = sqrt(a_k) w_k both bowls of curvature a are round."""
    curvature, b, epsilon = torch.tensor([1.0, 4.0, 0.25]), torch.tensor([0.5, 1.0, -2.0]), 0.2
    shift = (curvature.sqrt() * b).norm().item()
    score = found([0, 0, 0], silo([0, 0, 0], curvature), silo(b, curvature), epsilon)
    reaches(score.within_a, 0.5 * (shift + math.sqrt(2 * epsilon)) ** 2)


def test_at_a_common_minimum_the_steepest_ratio_of_curvatures_counts():
    """Both gradients vanish at w*; epsilon times the largest generalized eigenvalue can be gained."""
    one, other = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.0, 6.0, 1.0])
    score = found([1, -1, 2], silo([1, -1, 2], one), silo([1, -1, 2], other), epsilon=0.1)
    reaches(score.within_a, 0.1 * 3)
    reaches(score.within_b, 0.1 * 1)
    assert score.score == score.within_a


def test_a_grid_around_the_border_finds_no_more():
    at, epsilon = [0.4, -0.2], 0.15
    a, b = silo([0.0, 0.3], [1.0, 3.0]), silo([1.0, -1.0], [2.0, 0.5])
    score = found(at, a, b, epsilon)
    axis = torch.linspace(-2, 2, 1501, dtype=torch.float64)
    w = torch.cartesian_prod(axis, axis)

    def value(examples, w):
        return 0.5 * (examples.fields["curvature"] * (w - examples.image) ** 2).sum(1)

    here = value(a, torch.tensor([at]).double())
    inside = (value(a, w) - here).abs() <= epsilon
    assert score.within_a == pytest.approx((value(b, w[inside]) - here).abs().max().item(), rel=5e-3)


def test_several_examples_count_by_their_mean():
    """The mean of two bowls is a bowl around their middle, lifted by their spread."""
    pair = [silo([1.0, 0.0]), silo([3.0, 0.0])]
    both = Examples({name: torch.cat([part.fields[name] for part in pair]) for name in pair[0].fields})
    alone = found([0, 0], silo([0, 0]), silo([2.0, 0.0], offset=0.5), 0.1)
    together = found([0, 0], silo([0, 0]), both, 0.1)
    assert together.within_a == pytest.approx(alone.within_a, rel=1e-6)


@pytest.mark.parametrize("radius", [0.01, 0.2])
def test_the_search_stays_in_a_ball(radius):
    """Smaller than A's level set, so that its own far side is the farthest."""
    b = vec(0.3, -0.4)
    score = found([0, 0], silo([0, 0]), silo(b, 4.0), epsilon=5.0, radius=radius)
    reaches(score.within_a, 4 / 2 * (0.5 + radius) ** 2)


def test_the_radius_is_a_share_of_the_models_norm():
    at = torch.tensor([30.0, 40.0])
    score = found(at, silo([0, 0], 1e-6), silo([0, 0]), epsilon=5.0, radius=0.1)
    reaches(score.within_a, 0.5 * 55**2 - 0.5 * 1e-6 * 50**2)


def test_where_level_set_and_ball_meet_is_a_corner():
    """A does not see the second axis: its level set is a strip |w_1| <= r, cut by the ball |w| <= R."""
    r, reach, center = 0.3, 1.0, vec(0.2, 0.3)
    score = found([0, 0], silo([0, 0], [1.0, 0.0]), silo(center, [2.0, 1.0]), epsilon=r**2 / 2, radius=reach)
    height = math.sqrt(reach**2 - r**2)
    reaches(score.within_a, (r + 0.2) ** 2 + 0.5 * (height + 0.3) ** 2, rel=2e-3)


def test_without_a_ball_a_loss_that_the_other_does_not_see_grows_without_end():
    a, b = silo([0, 0], [1.0, 0.0]), silo([0, 0], [0.0, 1.0])
    few, many = (found([0, 0], a, b, 0.1, steps=steps).within_a for steps in (20, 40))
    assert many > 1000 * few


# ---- properties ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1e-8, 1e-4, 0.1])
def test_identical_silos_differ_by_epsilon_at_most(epsilon):
    same = silo([0.5, -0.5], [1.0, 2.0])
    score = found([0.3, 0.3], same, same, epsilon)
    assert 0 < score.score <= epsilon
    assert score.score == pytest.approx(epsilon, rel=1e-3)


def test_without_a_search_only_the_model_itself_is_looked_at():
    assert found([0, 0], silo([0, 0]), silo([2.0, 0]), 1e-9, steps=0, starts=0) == Inconsistency(2.0, 2.0)
    assert found([0.3, 0.3], silo([0, 0]), silo([0, 0]), 1e-9, steps=0, starts=0).score == 0


@pytest.mark.parametrize("at", [[0.0, 0.0], [0.7, -0.4]])
def test_the_score_grows_with_epsilon(at):
    a, b = silo([0, 0], [1.0, 3.0]), silo([1.0, 0.5], [2.0, 0.5])
    scores = [found(at, a, b, epsilon) for epsilon in (1e-4, 1e-2, 0.1, 1.0)]
    for smaller, larger in pairwise(scores):
        assert smaller.within_a < larger.within_a
        assert smaller.within_b < larger.within_b


def test_the_score_is_symmetric():
    a, b = silo([0, 0, 1], [1.0, 3.0, 2.0]), silo([1.0, 0.5, 0], [2.0, 0.5, 1.0], offset=0.2)
    one, other = found([0.1, 0.2, 0.3], a, b, 0.05), found([0.1, 0.2, 0.3], b, a, 0.05)
    assert (one.within_a, one.within_b) == (other.within_b, other.within_a)
    assert one.score == other.score == max(one.within_a, one.within_b)


def test_more_steps_and_more_starts_never_find_less():
    a, b = silo([0, 0], [1.0, 30.0]), silo([0.1, 0.0], [5.0, 1.0])
    by_steps = [found([0, 0], a, b, 0.3, steps=steps).within_a for steps in (0, 1, 3, 10, 30, 100)]
    assert by_steps == sorted(by_steps)
    assert by_steps[0] < by_steps[-1]
    by_starts = [found([0, 0], a, b, 0.3, steps=5, starts=starts).within_a for starts in (1, 2, 4)]
    assert by_starts == sorted(by_starts)


def test_far_silos_are_less_consistent_than_near_ones():
    scores = [found([0, 0], silo([0, 0]), silo([shift, 0]), 0.1).score for shift in (0.0, 0.5, 1.0, 2.0)]
    assert scores == sorted(scores)
    assert scores[0] < scores[1]


# ---- the parts of the search ----------------------------------------------------------------------------------------------


def test_a_direction_through_a_wall_becomes_tangential():
    direction, wall = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0])
    assert tangential(direction, []).tolist() == [1, 1]
    assert tangential(direction, [wall]).tolist() == [0, 1]
    assert tangential(direction, [-wall]).tolist() == [1, 1], "away from the wall"
    assert tangential(direction, [torch.zeros(2)]).tolist() == [1, 1]


def test_a_direction_into_a_corner_runs_along_both_walls():
    direction = torch.tensor([1.0, 1.0, 1.0])
    oblique = torch.tensor([1.0, 1.0, 0.0])
    assert tangential(direction, [torch.tensor([3.0, 0.0, 0.0]), oblique]).tolist() == pytest.approx([0, 0, 1], abs=1e-6)
    assert tangential(direction, [oblique, oblique]).tolist() == pytest.approx([0, 0, 1], abs=1e-6)


def bowl(w):
    return Local(0.5 * float(w @ w), w.clone())


def vec(*values):
    return torch.tensor(values, dtype=torch.float64)


def region_of(level=0.0, epsilon=0.5, radius=math.inf, center=(0.0, 0.0)):
    return Region(bowl, vec(*center), level, epsilon, radius)


def test_newtons_method_leads_back_into_the_level_set():
    w, here = region_of().entered(vec(5, 0))
    assert here.value == 0.5 * float(w @ w) <= 0.5
    assert w.tolist() == pytest.approx([1, 0], rel=1e-3)
    _, here = region_of(level=8.0).entered(vec(3, 0))
    assert 7.5 <= here.value <= 8.5


def test_a_point_of_the_region_stays_where_it_is():
    w, here = region_of().entered(vec(0.5, 0.5))
    assert w.tolist() == [0.5, 0.5]
    assert here.value == 0.25


def test_a_point_beyond_the_ball_is_drawn_onto_it():
    w, _ = region_of(radius=0.1, center=(0.2, 0.0)).entered(vec(0.2, 0.5))
    assert w.tolist() == pytest.approx([0.2, 0.1])


def test_where_there_is_no_slope_there_is_no_way_back():
    assert Region(lambda w: Local(9.0, torch.zeros_like(w)), vec(0, 0), 0.0, 0.5, math.inf).entered(vec(1, 1)) is None


def test_walls_are_at_the_borders_and_face_outwards():
    region = region_of(level=8.0, epsilon=0.5, radius=1.0, center=(4.0, 0.0))
    for w, expected in (((4, 0), []), ((math.sqrt(17), 0), [[1, 0]]), ((math.sqrt(15), 0), [[-1, 0]]), ((4, -1), [[4, -1], [0, -1]])):
        walls = [(wall / wall.norm()).tolist() for wall in region.walls(vec(*w), bowl(vec(*w)))]
        assert walls == [pytest.approx([x / math.hypot(*pair) for x in pair]) for pair in expected]


def slope_along_x(w):
    return Local(float(w[0]), vec(1, 0))


def test_every_point_that_counts_lies_in_the_region():
    seen = []

    def other(w):
        seen.append(w)
        return slope_along_x(w)

    best = climb(region_of(radius=0.9), other, vec(0, 0.1), 100, 1)
    assert best == pytest.approx(0.9, rel=1e-3)
    assert all(w.norm() <= 0.9 * (1 + 1e-12) for w in seen)
    seen.clear()
    assert climb(region_of(), other, vec(0, 0.1), 100, 1) == pytest.approx(1, rel=1e-3)
    assert all(0.5 * w @ w <= 0.5 for w in seen)


def test_a_cliff_ends_no_search():
    """A loss that becomes NaN beyond a line is climbed up to it."""

    def cliff(w):
        return Local(math.nan, vec(1, 0)) if w[0] > 0.5 else slope_along_x(w)

    region = region_of(epsilon=2.0)
    assert climb(region, cliff, vec(0, 0), 200, 1) == pytest.approx(0.5, rel=1e-3)
    assert farthest(region, cliff, 200, 1) == pytest.approx(2, rel=1e-3), "downwards the way is free"


# ---- a network ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    """A small classifier trained on silo a and on its twin, and a silo whose labels are turned round."""
    rng = generator(0, "network")
    x = torch.randn(60, 1, 2, 3, generator=rng)
    y = (x[:, 0, 0, 0] > 0).long()
    learner, model = Classifier(), MLP((1, 2, 3), (8,), 1)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(0.5 * torch.randn(param.shape, generator=rng))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        learner.loss(model, Examples({"image": x, "label": y}), 0.0, rng).total.backward()
        optimizer.step()
    a, twin, turned = (Examples({"image": x[k::3], "label": y[k::3]}) for k in range(3))
    turned = Examples({"image": turned.image, "label": 1 - turned.label})
    return learner, model, a, twin, turned


def test_a_silo_that_contradicts_is_less_consistent_than_a_twin(network):
    learner, model, a, twin, turned = network
    arrays = dict(model.state_dict())
    near = inconsistency(learner, model, arrays, a, twin, epsilon=0.01, steps=30)
    far = inconsistency(learner, model, arrays, a, turned, epsilon=0.01, steps=30)
    assert far.score > 2 * near.score > 0


def test_in_a_ball_more_steps_and_a_larger_epsilon_settle(network):
    """Without a ball the score of a network grows with the number of steps; in it, it converges."""
    learner, model, a, twin, _ = network
    arrays = dict(model.state_dict())
    steps = [inconsistency(learner, model, arrays, a, twin, epsilon=0.01, steps=n).score for n in (10, 40, 80)]
    assert steps == sorted(steps)
    assert steps[2] < 1.05 * steps[1]
    heights = [inconsistency(learner, model, arrays, a, twin, epsilon=epsilon, steps=40).score for epsilon in (1e-3, 1e-2, 1e-1)]
    assert heights == sorted(heights)


def test_the_score_repeats_and_leaves_the_model_alone(network):
    learner, model, a, twin, _ = network
    model.train()
    before, arrays = copy.deepcopy(model.state_dict()), dict(model.state_dict())
    with torch.random.fork_rng():
        one = inconsistency(learner, model, arrays, a, twin, epsilon=0.01, steps=5)
        torch.manual_seed(99)
        state = torch.get_rng_state()
        two = inconsistency(learner, model, arrays, a, twin, epsilon=0.01, steps=5)
        assert torch.equal(torch.get_rng_state(), state)
    assert one == two
    assert model.training
    assert all(torch.equal(tensor, before[name]) and tensor.dtype == torch.float32 for name, tensor in model.state_dict().items())


def test_the_gradient_of_a_risk_is_that_of_the_mean_loss(network):
    learner, model, a, _, _ = network
    model = copy.deepcopy(model).double().eval()
    w = nn.utils.parameters_to_vector(model.parameters()).detach()
    logits = model(a.image.double())[:, 0]
    value, slope = risk(learner, model, a)(w)
    assert value == pytest.approx(nn.functional.binary_cross_entropy_with_logits(logits, a.label.double()).item(), rel=1e-12)
    rng, h = generator(1), 1e-6
    direction = torch.randn(len(w), generator=rng).double()
    ahead, behind = (risk(learner, model, a)(w + sign * h * direction).value for sign in (1, -1))
    assert (ahead - behind) / (2 * h) == pytest.approx((slope @ direction).item(), rel=1e-6)


def test_frozen_parameters_stay(network):
    learner, model, a, twin, _ = network
    model = copy.deepcopy(model)
    model.hidden1.requires_grad_(False)
    frozen = inconsistency(learner, model, dict(model.state_dict()), a, twin, epsilon=0.01, steps=20)
    free = inconsistency(learner, network[1], dict(model.state_dict()), a, twin, epsilon=0.01, steps=20)
    assert 0 < frozen.score != free.score


@pytest.mark.parametrize("setting", ["epsilon", "radius"])
@pytest.mark.parametrize("value", [0.0, -0.1, math.nan])
def test_a_region_of_no_size_is_refused(setting, value):
    with pytest.raises(ExperimentError, match=f"{setting} = .*: expected a number > 0"):
        found([0, 0], silo([0, 0]), silo([0, 0]), **{"epsilon": 0.1, setting: value})


def test_a_model_that_diverged_is_refused():
    with pytest.raises(RunError, match="losses are nan and nan"):
        found([math.nan, 0], silo([0, 0]), silo([0, 0]), 0.1)
