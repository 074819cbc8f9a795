"""FedProx equals local descent on F(w) + mu/2 ||w - w0||^2."""

import pytest
import torch
from torch.nn import functional as F

from fedvision.data import Examples
from fedvision.learners.classifier import Classifier
from fedvision.models import MLP
from fedvision.seeds import generator
from strategies.fedavg import FedAvg
from strategies.fedprox import FedProx, proximal


class Toy(Classifier):
    """A tiny classifier in float64."""

    def build(self, spec=None, rng=None):
        with torch.random.fork_rng():
            torch.manual_seed(2)
            return MLP((1, 2, 3), (5,), 3).double()


def parts_of(*sizes):
    parts = []
    for silo, n in enumerate(sizes):
        rng = generator(3, "examples", silo)
        image = torch.randn(n, 1, 2, 3, generator=rng).double()
        parts.append(Examples({"image": image, "label": torch.randint(3, (n,), generator=rng)}))
    return parts


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in other)


def naive_round(model, parts, mu, lr, epochs, batch_size):
    """Descent with the gradient of F plus mu (w - w0), then the mean weighted by examples."""
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    mean = {name: torch.zeros_like(param) for name, param in start.items()}
    for part in parts:
        model.load_state_dict(start)
        for _ in range(epochs):
            for batch in part.batches(batch_size):
                slopes = torch.autograd.grad(F.cross_entropy(model(batch.image), batch.label), list(model.parameters()))
                with torch.no_grad():
                    for (name, param), slope in zip(model.named_parameters(), slopes, strict=True):
                        param.sub_(lr * (slope + mu * (param - start[name])))
        for name, param in model.named_parameters():
            mean[name] += param.detach() * len(part) / sum(map(len, parts))
    model.load_state_dict(mean)


def test_the_proximal_term_by_hand():
    params = {"a": torch.tensor([1.0, 4.0], requires_grad=True), "b": torch.tensor([[2.0]], requires_grad=True)}
    anchor = {"a": torch.tensor([0.0, 2.0]), "b": torch.tensor([[5.0]])}
    value = proximal(params, anchor, 0.5)
    value.backward()
    assert value.item() == 0.5 / 2 * (1 + 4 + 9)
    assert params["a"].grad.tolist() == [0.5, 1.0]
    assert params["b"].grad.tolist() == [[-1.5]]


@pytest.mark.parametrize("mu", [0.01, 3.0])
def test_rounds_equal_those_of_a_naive_loop(federate, mu):
    learner, parts = Toy(), parts_of(7, 5, 9)
    strategy = FedProx(mu=mu, epochs=2, batch_size=4, shuffle=False, client_optimizer={"name": "SGD", "lr": 0.1})
    federation, model = federate(strategy, learner, learner.build(), parts), learner.build()
    for number in (1, 2, 3):
        federation.round(number)
        naive_round(model, parts, mu, 0.1, epochs=2, batch_size=4)
    for name, param in model.named_parameters():
        assert torch.allclose(federation.arrays[name], param, rtol=1e-10, atol=1e-13)


def test_mu_zero_gives_the_bits_of_fedavg(federate):
    learner, parts = Toy(), parts_of(7, 5)
    near, far = (federate(strategy, learner, learner.build(), parts) for strategy in (FedProx(mu=0.0, epochs=2), FedAvg(epochs=2)))
    for number in (1, 2):
        near.round(number)
        far.round(number)
    assert same(near.arrays, far.arrays)


def test_a_larger_mu_keeps_clients_nearer_to_the_global_model(federate):
    learner, parts, moved = Toy(), parts_of(7, 5), []
    for mu in (0.0, 1.0, 5.0):
        strategy = FedProx(mu=mu, epochs=5, batch_size=4, client_optimizer={"name": "SGD", "lr": 0.1})
        federation = federate(strategy, learner, learner.build(), parts)
        start = federation.arrays
        federation.round(1)
        moved.append(sum((federation.answers()[0]["arrays"][name] - start[name]).square().sum().item() for name in start))
    assert moved[0] > 1.2 * moved[1] > 1.2**2 * moved[2] > 0


def test_the_reported_loss_is_without_the_proximal_term(federate):
    learner, parts = Toy(), parts_of(7)
    strategy = FedProx(mu=100.0, steps=1, batch_size=7, shuffle=False)
    assert federate(strategy, learner, learner.build(), parts).round(1)["train_loss"] == pytest.approx(
        F.cross_entropy(learner.build()(parts[0].image), parts[0].label).item()
    )


def test_the_optimizer_of_the_clients_may_be_any(federate):
    learner, parts = Toy(), parts_of(7)
    strategy = FedProx(mu=2.0, steps=3, batch_size=7, shuffle=False, client_optimizer={"name": "Adam", "lr": 0.05})
    federation, model = federate(strategy, learner, learner.build(), parts), learner.build()
    federation.round(1)
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(parts[0].image), parts[0].label).backward()
        for name, param in model.named_parameters():
            param.grad += 2.0 * (param.detach() - start[name])
        optimizer.step()
    assert all(torch.allclose(federation.arrays[name], param, rtol=1e-9, atol=1e-12) for name, param in model.named_parameters())
