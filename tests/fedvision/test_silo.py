from dataclasses import dataclass
from itertools import chain

import pytest
import torch
from flwr.app import MetricRecord
from torch import Tensor, nn
from torch.nn import functional as F

from fedvision.data import Examples, Spec
from fedvision.learners.classifier import Classifier
from fedvision.learners.learner import Learner, Loss
from fedvision.metrics import Metrics
from fedvision.seeds import generator
from fedvision.silo import Silo

SPEC = Spec((3,), 2)
CLASSIFIER = Classifier(hidden=(4,))
EXAMPLES = Examples({"image": torch.rand(10, 3, generator=generator(0)), "label": torch.arange(10) % 2, "number": torch.arange(10)})


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def silo() -> Silo:
    model = CLASSIFIER.build(SPEC, generator(0))
    return Silo(CLASSIFIER, model, copied(model), EXAMPLES, rng=generator(1))


@dataclass(frozen=True, kw_only=True)
class Made(Learner):
    """A model from a function, trained to output little."""

    make: object

    def build(self, spec, rng):
        return self.make()

    def loss(self, model, batch, progress, rng):
        return Loss(model(batch.image).square().mean())

    def evaluate(self, model, batch):
        return Metrics(len(batch), {})


def made(make) -> Silo:
    learner = Made(make=make)
    model = learner.build(SPEC, generator(0))
    return Silo(learner, model, copied(model), EXAMPLES)


class TwoBiases(nn.Module):
    """Two parameters enter the model in one and the same sum, so autograd may hand out one tensor for both."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x + (self.a + self.b)


class Summed(nn.Module):
    """The gradient of a sum is one number, seen from everywhere."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.a.sum().expand(len(x))


class Partly(nn.Module):
    """A frozen parameter, one that is not used, a buffer, and a buffer that is not kept."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("kept", torch.zeros(1))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, x):
        return x * self.used * self.frozen


def test_the_gradient_is_autograds_whatever_the_batches(silo):
    loss = F.binary_cross_entropy_with_logits(silo.model(EXAMPLES.image)[:, 0], EXAMPLES.label.float())
    expected = torch.autograd.grad(loss, list(silo.params.values()))
    for size in (1, 3, 10, 100):
        value, gradient = silo.gradient(silo.batches(size, shuffle=False))
        assert value == pytest.approx(loss.item(), rel=1e-6)
        for name, slope in zip(silo.params, expected, strict=True):
            assert torch.allclose(gradient[name], slope, atol=1e-7)


@pytest.mark.parametrize("size", [4, 10])
@pytest.mark.parametrize("make", [TwoBiases, Summed])
def test_gradients_that_share_memory_are_right(make, size):
    silo = made(make)
    loss = silo.model(EXAMPLES.image).square().mean()
    expected = torch.autograd.grad(loss, list(silo.params.values()))
    _, gradient = silo.gradient(silo.batches(size, shuffle=False))
    for name, slope in zip(silo.params, expected, strict=True):
        assert torch.allclose(gradient[name], slope, rtol=1e-5)


def test_frozen_parameters_have_no_gradient_and_unused_ones_zero():
    silo = made(Partly)
    _, gradient = silo.gradient(silo.batches(4))
    assert set(silo.params) == set(gradient) == {"used", "unused"}
    assert torch.equal(gradient["unused"], torch.zeros(2)) and gradient["used"].any()


def test_what_a_client_shares_is_a_copy():
    silo = made(Partly)
    arrays, buffers = silo.arrays(), silo.buffers()
    assert set(arrays) == {"used", "unused", "frozen", "kept"} and set(buffers) == {"frozen", "kept"}
    with torch.no_grad():
        silo.model.used.fill_(7)
        silo.model.kept.fill_(7)
    assert arrays["used"].eq(1).all() and buffers["kept"].item() == 0
    assert not any(tensor.requires_grad for tensor in arrays.values())


def test_a_client_loads_the_global_arrays_and_leaves_them_alone():
    model = CLASSIFIER.build(SPEC, generator(0))
    arrays = {name: torch.full_like(tensor, 0.1) for name, tensor in model.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in arrays.items()}
    model.eval()
    silo = Silo(CLASSIFIER, model, arrays, EXAMPLES)
    assert model.training
    silo.descend(silo.batches(4), {"name": "SGD", "lr": 1.0})
    assert all(torch.equal(arrays[name], before[name]) for name in arrays)
    assert not torch.equal(model.classifier.weight, arrays["classifier.weight"])


def test_one_client_after_the_other_may_use_the_same_model():
    model = CLASSIFIER.build(SPEC, generator(0))
    arrays = copied(model)

    def work() -> dict[str, Tensor]:
        silo = Silo(CLASSIFIER, model, arrays, EXAMPLES, rng=generator(5))
        silo.descend(silo.batches(4), {"name": "Adam", "lr": 0.1})
        return silo.arrays()

    first, second = work(), work()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_batches_visit_every_example_once(silo):
    for shuffle in (True, False):
        batches = [batch.fields["number"].tolist() for batch in silo.batches(4, shuffle)]
        assert [len(batch) for batch in batches] == [4, 4, 2]
        visited = list(chain.from_iterable(batches))
        assert sorted(visited) == list(range(10))
        assert (visited == list(range(10))) == (not shuffle)


def test_the_order_of_examples_is_drawn_from_the_silos_generator():
    def order(seed: int) -> list[int]:
        model = CLASSIFIER.build(SPEC, generator(0))
        silo = Silo(CLASSIFIER, model, copied(model), EXAMPLES, rng=generator(seed))
        return [n for batch in silo.batches(4) for n in batch.fields["number"].tolist()]

    assert order(0) == order(0) != order(1)


def test_batches_are_the_learners_views():
    @dataclass(frozen=True, kw_only=True)
    class Noisy(Classifier):
        """Adds noise."""

        def train_view(self, batch, rng):
            return Examples({**batch.fields, "image": batch.image + torch.rand(batch.image.shape, generator=rng)})

    learner = Noisy(hidden=(4,))
    model = learner.build(SPEC, generator(0))
    silo = Silo(learner, model, copied(model), EXAMPLES, rng=generator(1))
    first, second = (torch.cat([batch.image for batch in silo.batches(4, shuffle=False)]) for _ in range(2))
    assert not torch.equal(first, second) and (first >= EXAMPLES.image).all()


def test_the_penalty_moves_the_model_but_is_not_reported(silo):
    pull = 5.0

    def penalty() -> Tensor:
        return pull * torch.stack([param.square().sum() for param in silo.params.values()]).sum()

    start = silo.arrays()
    loss, gradient = silo.gradient(silo.batches(10, shuffle=False))
    reported = silo.descend(silo.batches(10, shuffle=False), {"name": "SGD", "lr": 0.1}, penalty)
    assert reported == pytest.approx(loss)
    for name, param in silo.params.items():
        assert torch.allclose(param, start[name] - 0.1 * (gradient[name] + 2 * pull * start[name]), atol=1e-6)


def test_the_reported_loss_is_a_mean_over_examples(silo):
    loss, _ = silo.gradient(silo.batches(10, shuffle=False))
    assert silo.descend(silo.batches(4, shuffle=False), {"name": "SGD", "lr": 0.0}) == pytest.approx(loss)


def test_no_batches_are_no_loss(silo):
    before = silo.arrays()
    assert silo.descend([], {"name": "SGD", "lr": 1.0}) == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in silo.arrays().items())


def test_a_client_has_a_state_and_a_generator_even_if_none_is_given():
    model = CLASSIFIER.build(SPEC, generator(0))
    one, other = (Silo(CLASSIFIER, model, copied(model), EXAMPLES) for _ in range(2))
    one.state["memory"] = MetricRecord({"x": 1})
    assert "memory" not in other.state
    assert torch.equal(torch.rand(2, generator=one.rng), torch.rand(2, generator=other.rng))


def test_what_precedes_a_step_sees_the_weights_that_the_loss_was_of_and_the_gradient_stays():
    seen = []

    class Halving(Made):
        def precede(self, model, batch, loss, progress):
            seen.append((model.a.detach().clone(), loss.total.item()))
            model.a.mul_(0.5)

        def follow(self, model, batch, progress):
            seen.append(model.a.detach().clone())

    learner = Halving(make=Summed)
    model = learner.build(SPEC, generator(0))
    silo = Silo(learner, model, copied(model), EXAMPLES)
    silo.descend(silo.batches(10), {"name": "SGD", "lr": 0.1})
    (before, loss), after = seen
    assert torch.equal(before, torch.ones(3)) and loss == pytest.approx(9.0)
    assert torch.allclose(after, torch.full((3,), 0.5 - 0.1 * 6.0))  # the slope of (sum of a)^2 at 3, from the halves
    seen.clear()
    silo.gradient(silo.batches(4, shuffle=False))
    assert len(seen) == 2  # once, however many batches


def test_the_named_parts_of_the_loss_are_means_per_example():
    @dataclass(frozen=True, kw_only=True)
    class Parts(Made):
        def loss(self, model, batch, progress, rng):
            total = model(batch.image).square().mean()
            return Loss(total, {"number": batch.fields["number"].double().mean()})

    learner = Parts(make=lambda: nn.Linear(3, 1))
    model = learner.make()
    silo = Silo(learner, model, copied(model), EXAMPLES, rng=generator(1))
    assert silo.loss_parts() == {}
    silo.gradient(silo.batches(4, shuffle=False))  # batches of 4, 4 and 2
    assert silo.loss_parts() == {"number": pytest.approx(4.5)}
