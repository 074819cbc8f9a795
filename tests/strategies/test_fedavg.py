from itertools import chain

import pytest
import torch
from flwr.app import RecordDict
from torch import nn

from fedvision.data import Examples, Spec
from fedvision.errors import ExperimentError
from fedvision.learners.classifier import Classifier
from fedvision.seeds import generator
from fedvision.silo import Silo
from strategies.fedavg import FedAvg
from strategies.fedsgd import FedSGD

SPEC = Spec((3,), 2)
LEARNER = Classifier(hidden=(4,))
EXAMPLES = Examples({"image": torch.rand(10, 3, generator=generator(0)), "label": torch.arange(10) % 2, "number": torch.arange(10)})


def silo(**changes) -> Silo:
    model = LEARNER.build(SPEC, generator(0))
    arrays = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return Silo(LEARNER, model, arrays, EXAMPLES, rng=generator(1), **changes)


def visited(strategy: FedAvg) -> list[list[int]]:
    return [batch.fields["number"].tolist() for batch in strategy.local_batches(silo())]


def test_an_epoch_visits_every_example_once_in_a_new_order():
    batches = visited(FedAvg(epochs=2, batch_size=4))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    first, second = list(chain.from_iterable(batches[:3])), list(chain.from_iterable(batches[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second != list(range(10))


def test_unshuffled_epochs_keep_the_order_of_the_data():
    assert visited(FedAvg(batch_size=4, shuffle=False)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_steps_replace_epochs_and_go_on_into_the_next():
    assert visited(FedAvg(steps=2, epochs=5, batch_size=4, shuffle=False)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert visited(FedAvg(steps=4, batch_size=4, shuffle=False)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]


def test_clients_train_as_a_plain_torch_loop_does():
    expected = LEARNER.build(SPEC, generator(0))
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(2):
        for start in (0, 4, 8):
            x, y = EXAMPLES.image[start : start + 4], EXAMPLES.label[start : start + 4].float()
            loss = nn.functional.binary_cross_entropy_with_logits(expected(x)[:, 0], y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += [loss.item()] * len(x)
    strategy = FedAvg(epochs=2, batch_size=4, shuffle=False, client_optimizer={"name": "SGD", "lr": 0.1, "momentum": 0.9})
    update = strategy.client_update(silo(), RecordDict())
    assert update.metrics["train_loss"] == pytest.approx(sum(losses) / len(losses))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(update.records["arrays"][name], tensor)


def test_one_full_batch_step_is_fedsgd():
    local = FedAvg(steps=1, batch_size=100, client_optimizer={"name": "SGD", "lr": 1.0}).client_update(silo(), RecordDict())
    gradient = FedSGD().client_update(silo(), RecordDict()).records["gradient"]
    for name, start in silo().params.items():
        assert torch.allclose(start - local.records["arrays"][name], gradient[name], atol=1e-6)


def test_the_local_optimizer_starts_afresh_in_every_round():
    strategy = FedAvg(client_optimizer={"name": "Adam", "lr": 0.1})
    first, again = (strategy.client_update(silo(), RecordDict()).records["arrays"] for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_clients_count_by_their_examples():
    assert FedAvg().weight_by == "examples"


def test_an_unknown_client_optimizer_is_refused_at_once():
    with pytest.raises(ExperimentError, match="unknown optimizer 'SDG'"):
        FedAvg(client_optimizer={"name": "SDG"})
