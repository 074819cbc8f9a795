import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from torch.nn import functional as F

from benchmarks import run
from fedvision.arrays import pack, unpack
from fedvision.data import Examples, FederatedData, Spec
from fedvision.learners.classifier import Classifier
from fedvision.seeds import generator
from fedvision.silo import Silo
from strategies.fedsgd import FedSGD

PLAIN = {"name": "SGD", "lr": 1.0}


def stepped(strategy, grid, arrays: dict, gradients: list[dict], examples: list[int] | None = None) -> dict:
    """The global arrays after a round in which clients answer these gradients."""
    messages = list(strategy.configure_train(1, pack(arrays), ConfigRecord(), grid))
    counts = examples or [1] * len(gradients)
    answers = [
        Message(RecordDict({"gradient": pack(gradient), "metrics": MetricRecord({"num-examples": n, "train_loss": 0.0})}), reply_to=message)
        for message, gradient, n in zip(messages, gradients, counts, strict=False)
    ]
    return unpack(strategy.aggregate_train(1, answers)[0])


def test_the_server_steps_along_the_mean_gradient(grid):
    arrays = {"w": torch.tensor([1.0, 1.0])}
    gradients = [{"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([1.0, -2.0])}]
    assert stepped(FedSGD(server_optimizer=PLAIN), grid, arrays, gradients)["w"].tolist() == [-1.0, 2.0]
    weighted = FedSGD(server_optimizer=PLAIN, weight_by="examples")
    assert stepped(weighted, grid, arrays, gradients, [3, 1])["w"].tolist() == [-1.5, 1.5]
    assert arrays["w"].tolist() == [1.0, 1.0]


def test_what_has_no_gradient_stays_as_it_is(grid):
    arrays = {"w": torch.tensor([1.0]), "frozen": torch.tensor([7.0])}
    after = stepped(FedSGD(server_optimizer=PLAIN), grid, arrays, [{"w": torch.tensor([1.0])}])
    assert (after["w"].item(), after["frozen"].item()) == (0.0, 7.0)


def test_buffers_become_their_mean(grid):
    strategy = FedSGD(server_optimizer=PLAIN)
    arrays = {"w": torch.zeros(1), "running": torch.zeros(1), "count": torch.tensor(0)}
    messages = list(strategy.configure_train(1, pack(arrays), ConfigRecord(), grid))
    answers = [
        Message(
            RecordDict({
                "gradient": pack({"w": torch.zeros(1)}),
                "buffers": pack({"running": torch.tensor([value]), "count": torch.tensor(3)}),
                "metrics": MetricRecord({"num-examples": 1}),
            }),
            reply_to=message,
        )
        for message, value in zip(messages, (1.0, 4.0), strict=False)
    ]  # fmt: skip
    after = unpack(strategy.aggregate_train(1, answers)[0])
    assert after["running"].item() == 2.5 and after["count"] == 3


def test_the_server_optimizer_is_torchs_own_with_its_memory(grid):
    table = {"name": "Adam", "lr": 0.1, "weight_decay": 0.5}
    strategy, params = FedSGD(server_optimizer=table), torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    expected = torch.optim.Adam([params], lr=0.1, weight_decay=0.5)
    arrays = {"w": params.detach().clone()}
    for step in range(5):
        gradients = [torch.randn(2, generator=generator(step, client)) for client in range(2)]
        arrays = stepped(strategy, grid, arrays, [{"w": gradient} for gradient in gradients])
        params.grad = (gradients[0] + gradients[1]) / 2
        expected.step()
        assert torch.allclose(arrays["w"], params.detach(), atol=1e-6)


def test_federated_gradients_weighted_by_examples_are_the_central_gradient(federated):
    learner, strategy = Classifier(hidden=(5,)), FedSGD(weight_by="examples", chunk_size=5)
    model = learner.build(federated.spec, generator(0))
    arrays = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    total, sums = 0, dict.fromkeys(arrays, 0)
    for silo in (Silo(learner, model, arrays, federated.train[client]) for client in range(3)):
        for name, gradient in strategy.client_update(silo, RecordDict()).records["gradient"].items():
            sums[name] = sums[name] + gradient * len(silo.train)
        total += len(silo.train)
    everybody = federated.train.examples
    loss = F.binary_cross_entropy_with_logits(model(everybody.image)[:, 0], everybody.label.float())
    for (name, _), gradient in zip(model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
        assert torch.allclose(sums[name] / total, gradient, atol=1e-6)


def test_the_size_of_chunks_moves_last_bits_only():
    learner, examples = (
        Classifier(hidden=(5,)),
        Examples({"image": torch.rand(20, 3, generator=generator(0)), "label": torch.arange(20) % 2}),
    )
    model = learner.build(Spec((3,), 2), generator(0))
    arrays = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole, chunks = (FedSGD(chunk_size=size).client_update(Silo(learner, model, arrays, examples), RecordDict()) for size in (100, 3))
    assert chunks.metrics["train_loss"] == pytest.approx(whole.metrics["train_loss"], rel=1e-6)
    for name, gradient in whole.records["gradient"].items():
        assert torch.allclose(gradient, chunks.records["gradient"][name], atol=1e-7)


@pytest.mark.golden
def test_thirty_rounds_reproduce_the_reference_implementation(golden, tmp_path, no_figures):
    arrays = np.load(golden / "fedilc_digits.npz")
    data = FederatedData.from_arrays([(arrays[f"x{e}"], arrays[f"y{e}"]) for e in range(5)], test=(arrays["x_ood"], arrays["y_ood"]))
    initial = {name.removeprefix("init."): torch.from_numpy(arrays[name]) for name in arrays.files if name.startswith("init.")}
    done = run("quickstart", {"rounds": 30, "tensorboard": False}, data, initial, tmp_path / "run")
    trained = done.rounds.iloc[1:]
    assert trained["round"].tolist() == list(range(1, 31))
    np.testing.assert_allclose(trained["train_loss"], arrays["fedsgd/train"], rtol=1e-4)
    np.testing.assert_allclose(trained["test_loss"], arrays["fedsgd/ood"], rtol=1e-4)
