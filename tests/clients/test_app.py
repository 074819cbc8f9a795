from itertools import count

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from clients.app import app as client_app
from fedvision.arrays import pack, unpack
from fedvision.assembly import Assembly, installed
from fedvision.grids.in_process import InProcessGrid
from fedvision.learners.classifier import Classifier

RUNS = count(99_000)


@pytest.fixture
def asked(experiment, federated):
    """Sends one message to one client of the initial model; returns its answer's content."""

    def ask(client: int, kind: str = "train", changes: dict | None = None, **config) -> RecordDict:
        assembly, run_id = Assembly.of(experiment(**(changes or {})), federated), next(RUNS)
        content = RecordDict({"arrays": pack(assembly.initial), "config": ConfigRecord({"server-round": 1, **config})})
        with installed(run_id, assembly), InProcessGrid(client_app, {"run-id": run_id}, 3) as grid:
            [answer] = grid.send_and_receive([Message(content, dst_node_id=client, message_type=kind)])
        assert not answer.has_error(), answer.error
        return answer.content

    return ask


LOCAL = {"strategy": {"name": "fedavg", "batch_size": 4}}


def test_an_answer_has_the_strategys_records_and_the_number_of_examples(asked):
    content = asked(1)
    assert set(content) == {"gradient", "metrics", "work"}
    assert content["metrics"]["num-examples"] == 12 and content["metrics"]["train_loss"] > 0


def test_an_answer_depends_on_seed_round_and_client_alone(asked):
    def trained(client: int = 0, **how) -> torch.Tensor:
        changes = LOCAL | {"seed": how.pop("seed", 0)}
        return unpack(asked(client, changes=changes, **how)["arrays"])["hidden1.weight"]

    first = trained()
    assert torch.equal(first, trained())
    with torch.random.fork_rng(devices=[]):
        torch.rand(3)
        assert torch.equal(first, trained())
    for other in ({"server-round": 2}, {"client": 1}, {"seed": 1}):
        assert not torch.equal(first, trained(**other))


def test_a_loss_is_told_the_progress_and_the_global_generators_are_lent(asked, monkeypatch):
    told, honest = [], Classifier.loss

    def listening(self, model, batch, progress, rng):
        told.append((progress, torch.rand(1).item()))
        return honest(self, model, batch, progress, rng)

    monkeypatch.setattr(Classifier, "loss", listening)
    before = torch.get_rng_state()
    asked(0, progress=0.25)
    asked(0, progress=0.25)
    asked(0)
    assert [progress for progress, _ in told] == [0.25, 0.25, 0.0]
    assert told[0] == told[1]  # dropout would repeat
    assert torch.equal(before, torch.get_rng_state())


def test_a_client_evaluates_the_parts_that_it_is_asked_for(asked):
    both, one, none = asked(2, "evaluate", parts="train validation"), asked(2, "evaluate"), asked(2, "evaluate", parts="future")
    assert {"train_loss", "validation_loss"} <= set(both["metrics"]) and both["metrics"]["num-examples"] == 16 + 6
    assert "train_loss" not in one["metrics"] and one["metrics"]["num-examples"] == 6
    assert dict(none["metrics"]) == {"num-examples": 0}


def test_evaluation_leaves_no_trace_in_the_training(experiment, federated):
    assembly = Assembly.of(experiment(**LOCAL), federated)

    def answers(*kinds: str) -> list[torch.Tensor]:
        run_id = next(RUNS)
        config = ConfigRecord({"server-round": 1})
        messages = [RecordDict({"arrays": pack(assembly.initial), "config": config}) for _ in kinds]
        with installed(run_id, assembly), InProcessGrid(client_app, {"run-id": run_id}, 3) as grid:
            sent = zip(messages, kinds, strict=True)
            replies = [next(grid.send_and_receive([Message(content, dst_node_id=0, message_type=kind)])) for content, kind in sent]
        return [unpack(reply.content["arrays"])["hidden1.weight"] for reply in replies if "arrays" in reply.content]

    [alone] = answers("train")
    assert all(torch.equal(alone, other) for other in answers("evaluate", "train", "evaluate", "train"))
