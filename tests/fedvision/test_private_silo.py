"""A client under example-level privacy: what it sends is bounded in each example, and is plain training where nothing is clipped."""

import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from flwr.common.serde import ProtoRecordDict, recorddict_from_proto, recorddict_to_proto
from opacus.accountants import PRVAccountant, RDPAccountant
from torch import nn

from fedvision.data import FederatedData, Spec
from fedvision.learners.classifier import Classifier
from fedvision.learners.learner import Loss, mean_over_examples
from fedvision.privacy import Ledger, Privacy
from fedvision.private_silo import PerExample, PrivateSilo, incompatible, mixing, viewed
from fedvision.seeds import generator
from fedvision.silo import Silo

SGD = {"name": "SGD", "lr": 0.5}
CLEAR = Privacy(clipping_norm=math.inf, noise_multiplier=0.0, delta=1e-3)
SMALL = {
    "mlp": (Classifier(hidden=(6,)), (1, 4, 4)),
    "cnn": (Classifier(model="cnn", hidden=(8, 8, 8)), (3, 16, 16)),
    "resnet": (Classifier(model="test_resnet", normalization="group"), (3, 32, 32)),  # whose blocks write over what layers return
}


def made(kind: str, examples: int = 7):
    learner, shape = SMALL[kind]
    rng = generator(5)
    pairs = [(torch.rand(examples, *shape, generator=rng), torch.arange(examples) % 3) for _ in range(2)]
    data = FederatedData.from_arrays(train=pairs[1:], test=pairs[0], classes=3)
    model = learner.build(data.spec, generator(0))
    return learner, model, data.train[0], {name: tensor.clone() for name, tensor in model.state_dict().items()}


def naive(learner, model, examples, norm):
    """The sum of gradients of one example after the other, each clipped."""
    params = [param for param in model.parameters() if param.requires_grad]
    sums = [torch.zeros_like(param) for param in params]
    for i in range(len(examples)):
        gradients = torch.autograd.grad(learner.loss(model, examples[i : i + 1], 0.0, generator(0)).total, params)
        length = torch.stack([gradient.norm() for gradient in gradients]).norm()
        for total, gradient in zip(sums, gradients, strict=True):
            total.add_(gradient * min(1.0, float(norm / length)))
    return sums


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("clipping", ["explicit", "ghost"])
@pytest.mark.parametrize("norm", [0.1, math.inf])
def test_both_ways_of_clipping_give_the_sum_of_a_loop_over_examples(kind, clipping, norm):
    learner, model, examples, _ = made(kind)
    model.train()
    before = set(model.state_dict())
    with PerExample(model, clipping) as per_example:
        sums = per_example.clipped_sum(lambda: learner.loss(model, examples, 0.0, generator(0)).total, len(examples), norm)
    assert all(
        torch.allclose(one, other, rtol=1e-3, atol=1e-4) for one, other in zip(sums, naive(learner, model, examples, norm), strict=True)
    )
    assert set(model.state_dict()) == before and all(param.grad is None for param in model.parameters())
    assert not any(hasattr(param, "grad_sample") for param in model.parameters())


def test_ghost_clipping_is_chosen_where_every_layer_has_norms():
    assert PerExample(made("mlp")[1]).ghost
    assert not PerExample(made("cnn")[1]).ghost


@pytest.mark.parametrize("kind", SMALL)
def test_without_clipping_and_noise_it_is_plain_training_on_all_examples(kind):
    learner, model, examples, arrays = made(kind)
    plain = Silo(learner, model, arrays, examples, rng=generator(1))
    slow = {"name": "SGD", "lr": 0.01}
    plain.descend(plain.batches(len(examples), epochs=3), slow)
    expected = plain.arrays()
    silo = PrivateSilo(learner, model, arrays, examples, rng=generator(1), privacy=CLEAR, rounds=1)
    silo.descend(silo.batches(len(examples), epochs=3), slow)
    assert all(torch.allclose(tensor, expected[name], rtol=1e-3, atol=1e-4) for name, tensor in silo.arrays().items())
    assert not any(torch.equal(tensor, arrays[name]) for name, tensor in silo.arrays().items() if name.startswith("classifier"))


def test_a_penalty_is_added_unclipped():
    learner, model, examples, arrays = made("mlp")

    def penalty():
        return 100 * model.classifier.weight.sum()

    tight = Privacy(clipping_norm=1e-6, noise_multiplier=0.0, delta=1e-3)
    silo = PrivateSilo(learner, model, arrays, examples, rng=generator(1), privacy=tight, rounds=1)
    silo.descend(silo.batches(len(examples)), SGD, penalty)
    assert torch.allclose(silo.arrays()["classifier.weight"], arrays["classifier.weight"] - 50, atol=1e-3)


def sent(kind, examples, norm, *, noise=0.0, clipping="auto", steps=1, learner=None):
    """By how much one answer of all of these examples moves the model, all parameters together; every step takes all examples."""
    own, shape = SMALL[kind]
    model = (learner or own).build(Spec(shape, 3), generator(0))
    arrays = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    privacy = Privacy(clipping_norm=norm, noise_multiplier=noise, delta=1e-3, clipping=clipping)
    silo = PrivateSilo(learner or own, model, arrays, examples, rng=generator(1), privacy=privacy, rounds=1)
    silo.descend(silo.batches(len(examples), steps=steps), SGD)
    return torch.cat([(tensor - arrays[name]).flatten() for name, tensor in silo.arrays().items()])


def with_and_without(kind, which):
    """Twelve examples of which one is an outlier, and mislabeled; and the eleven others."""
    _, model, examples, _ = made(kind, examples=12)
    examples.fields["image"][which] *= 1000
    examples.fields["label"][which] = model(examples.image[which : which + 1]).argmin()
    return examples, examples[torch.tensor([i for i in range(12) if i != which])]


@pytest.mark.parametrize(("kind", "clipping"), [("mlp", "explicit"), ("mlp", "ghost"), ("cnn", "explicit"), ("resnet", "explicit")])
@pytest.mark.parametrize("norm", [0.05, 0.5])
@pytest.mark.parametrize("which", [0, 7])
def test_membership_of_one_example_moves_what_is_sent_by_at_most_the_clipping_norm(kind, clipping, norm, which):
    examples, without = with_and_without(kind, which)
    # the update is lr / (expected batch) times the sum of clipped gradients; compare the sums
    sums = 12 * sent(kind, examples, norm, clipping=clipping), 11 * sent(kind, without, norm, clipping=clipping)
    assert 0.9 * norm < (sums[0] - sums[1]).norm() / SGD["lr"] <= norm * 1.0005


@dataclass(frozen=True, kw_only=True)
class Slope(Classifier):
    """Its gradients are those of any weights, so that they add up over steps."""

    @mean_over_examples
    def loss(self, model, batch, progress, rng):
        return Loss(model(batch.image).sum(1).mean())


def test_over_steps_whose_gradients_do_not_follow_the_weights_membership_adds_up_step_by_step():
    """Elsewhere the bound is one of each step from the same weights: the accountant composes them, their sum has no such bound."""
    examples, without = with_and_without("mlp", 3)
    sums = [len(some) * sent("mlp", some, 0.5, steps=4, learner=Slope(hidden=())) / SGD["lr"] for some in (examples, without)]
    assert (sums[0] - sums[1]).norm() == pytest.approx(4 * 0.5, rel=1e-4)


@pytest.mark.parametrize("clipping", ["explicit", "ghost"])
def test_the_noise_is_of_the_sensitivity_whatever_the_examples_are(clipping):
    examples, others = with_and_without("cnn", 2)[0], made("cnn", examples=12)[2]
    noise = [
        sent("cnn", some, 0.5, noise=3.0, clipping=clipping) - sent("cnn", some, 0.5, clipping=clipping) for some in (examples, others)
    ]
    assert torch.allclose(*noise, atol=1e-5)
    assert float(noise[0].std()) == pytest.approx(SGD["lr"] * 3.0 * 0.5 / 12, rel=0.05)


@pytest.mark.parametrize("drawn", [1, 4, 7])
def test_a_sum_is_divided_by_the_expected_number_of_examples_however_many_were_drawn(drawn):
    learner, model, examples, arrays = made("mlp", examples=40)
    expected = [total / 4 for total in naive(learner, model, examples[:drawn], 0.3)]
    privacy = Privacy(clipping_norm=0.3, noise_multiplier=0.0, delta=1e-3)
    silo = PrivateSilo(learner, model, arrays, examples, rng=generator(1), privacy=privacy, rounds=1)
    list(silo.batches(4))
    silo.descend([examples[:drawn]], SGD)
    moved = [(arrays[name] - tensor) / SGD["lr"] for name, tensor in silo.arrays().items()]
    assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-5) for one, other in zip(moved, expected, strict=True))


def test_batches_are_poisson_sampled_and_may_be_empty():
    learner, model, examples, arrays = made("mlp", examples=40)
    privacy = Privacy(clipping_norm=1.0, noise_multiplier=1.0, delta=1e-3)
    silo = PrivateSilo(learner, model, arrays, examples, rng=generator(1), privacy=privacy, rounds=1)
    sizes = [len(batch) for batch in silo.batches(2, steps=400)]
    assert min(sizes) == 0 and max(sizes) > 4 and abs(sum(sizes) / 400 - 2) < 0.3
    assert silo.work == 800  # as expected, not as drawn
    assert Ledger.of(silo.state).entries == ((1.0, 0.05, 400),)


def test_an_empty_batch_is_a_step_of_noise_alone():
    learner, model, examples, arrays = made("mlp")
    privacy = Privacy(clipping_norm=2.0, noise_multiplier=3.0, delta=1e-3)
    silo = PrivateSilo(learner, model, arrays, examples, rng=generator(1), privacy=privacy, rounds=1)
    list(silo.batches(7))
    silo.descend([examples[:0]], {"name": "SGD", "lr": 7.0})
    moved = torch.cat([(tensor - arrays[name]).flatten() for name, tensor in silo.arrays().items()])
    assert float(moved.std()) == pytest.approx(6.0, rel=0.15)  # lr / 7 times noise multiplier times clipping norm


def test_the_account_goes_on_in_what_the_client_keeps_and_nothing_else_is_told():
    learner, model, examples, arrays = made("mlp")
    privacy = Privacy(clipping_norm=1.0, noise_multiplier=2.0, delta=1e-3)
    first = PrivateSilo(learner, model, arrays, examples, rng=generator(1), privacy=privacy, rounds=2)
    loss = first.descend(first.batches(3, steps=5), SGD)
    second = PrivateSilo(learner, model, first.arrays(), examples, first.state, generator(2), privacy=privacy, rounds=2)
    second.descend(second.batches(3, steps=5), SGD)
    assert second.epsilon == Ledger(((2.0, 3 / 7, 10),)).epsilon(1e-3, "rdp") > first.epsilon
    assert math.isnan(loss) and second.loss_parts() == {} and second.untrained == frozenset()


@pytest.mark.parametrize(("accountant", "kind"), [("rdp", RDPAccountant), ("prv", PRVAccountant)])
def test_over_rounds_the_account_is_that_of_opacus_own_accountant_stepped_anew(accountant, kind):
    learner, model, examples, arrays = made("mlp")
    privacy = Privacy(clipping_norm=1.0, noise_multiplier=2.0, delta=1e-3, accountant=accountant)
    theirs, kept = kind(), b""
    for number, steps in enumerate((3, 1, 4)):
        state = recorddict_from_proto(ProtoRecordDict.FromString(kept))
        silo = PrivateSilo(learner, model, arrays, examples, state, generator(number), privacy=privacy, rounds=3)
        silo.descend(silo.batches(3, steps=steps), SGD)
        for _ in range(steps):
            theirs.step(noise_multiplier=2.0, sample_rate=3 / 7)
        kept = recorddict_to_proto(silo.state).SerializeToString()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert silo.epsilon == pytest.approx(theirs.get_epsilon(delta=1e-3), rel=1e-9)


def test_layers_that_mix_or_remember_are_named():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    assert "layer '1' (BatchNorm2d)" in incompatible(model)
    assert "layer '1' (MultiheadAttention) is refused by opacus" in incompatible(
        nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    )
    assert incompatible(nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4))) is None


class Centering(nn.Module):
    """What no list of layers knows: it takes off the mean of the batch."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(16, 3)

    def forward(self, x):
        rows = x.flatten(1)
        return self.classifier(rows - rows.mean(0))


def test_a_model_that_mixes_examples_in_secret_is_found_out():
    learner, model, examples, _ = made("mlp")
    assert mixing(learner, model, examples[:3], "auto") is None
    assert "of an example depends on what else is in its batch" in mixing(learner, Centering(), examples[:3], "auto")


@dataclass(frozen=True, kw_only=True)
class Mixed(Classifier):
    """Its views are blended with the rest of the batch."""

    def train_view(self, batch, rng):
        fields = dict(batch.fields)
        fields["image"] = (batch.image + batch.image.flip(0)) / 2
        return type(batch)(fields)


def test_no_example_is_in_the_view_of_another():
    _, _, examples, _ = made("mlp")
    view = viewed(Mixed(), examples, torch.tensor([0, 3]), generator(0))
    assert torch.equal(view.image, examples.image[[0, 3]])
