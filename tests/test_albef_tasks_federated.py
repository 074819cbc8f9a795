"""ALBEF's tasks in a federation: silos learn together, and one task begins with what another has left."""

import pytest
from safetensors.torch import load_file

from benchmarks import run

SMALL = {
    "rounds": 1,
    "tensorboard": False,
    "data.examples": 48,
    "data.test_examples": 16,
    "partition.clients": 3,
    "strategy.steps": 2,
    "strategy.batch_size": 8,
}
BESIDE = {
    "albef-retrieval-tiny": {"test_text_recall@1", "test_reranked_image_recall@5", "test_grounding_accuracy", "test_central_accuracy"},
    "albef-vqa-tiny": {"test_accuracy", "test_blind_accuracy", "test_constant_accuracy"},
    "albef-ve-tiny": {"test_accuracy", "test_blind_accuracy", "test_constant_accuracy"},
    "albef-nlvr2-tiny": {"test_accuracy", "test_blind_accuracy", "test_constant_accuracy"},
}


@pytest.mark.parametrize("name", BESIDE)
def test_silos_learn_a_task_together(name, here):
    done = run(name, SMALL, draw=False, out=here / "run")
    assert set(done.rounds.columns) >= BESIDE[name]
    assert done.rounds["clients"].iloc[-1] == 3
    assert not [key for key in load_file(done.path / "model.safetensors") if key.split(".")[0].endswith("_m") or "queue" in key]


def test_a_task_begins_with_the_run_of_another(here):
    first = run("albef-ve-tiny", SMALL, draw=False, out=here / "first")
    begun = {**SMALL, "rounds": 0, "learner.checkpoint": str(first.path / "model.safetensors")}
    second = run("albef-nlvr2-tiny", begun, draw=False, out=here / "second")
    one, other = (load_file(done.path / "model.safetensors") for done in (first, second))
    assert (one["visual_encoder.norm.weight"] == other["visual_encoder.norm.weight"]).all()
