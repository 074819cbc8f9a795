"""The pictures of a run, drawn at its end and anew."""

import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import galleries, run
from benchmarks.pictures import redraw
from benchmarks.runs import Run
from fedvision.errors import RunError
from server.folder import RunFolder

USUAL = ["curves.png", "examples.png", "partition.png"]

SHOWY = """
from dataclasses import dataclass

import numpy as np
import torch

from fedvision.gallery import Gallery
from fedvision.learners.classifier import Classifier


@dataclass(frozen=True, kw_only=True)
class Showy(Classifier):
    \"\"\"A classifier that shows what it takes the first examples for.\"\"\"

    def pictures(self, model, examples):
        assert not model.training and not torch.is_grad_enabled()
        shades = model(examples.image).softmax(1).mul(255).byte().cpu().numpy()
        rows = [[np.full((2, 2, 3), shade, np.uint8) for shade in row] for row in shades]
        return {"beliefs": Gallery([str(i) for i in range(len(rows))], [str(i) for i in range(shades.shape[1])], rows)}
"""


@pytest.fixture
def showy(here, monkeypatch):
    """A current folder whose ``mine.toml`` names a learner with pictures."""
    (here / "showy.py").write_text(SHOWY)
    monkeypatch.syspath_prepend(here)
    text = (here / "mine.toml").read_text()
    (here / "mine.toml").write_text(text.replace('name = "classifier"', 'name = "showy:Showy"'))
    yield here
    sys.modules.pop("showy", None)


def drawn(folder):
    return sorted(path.name for path in (folder / "figures").iterdir())


def test_a_run_draws_its_learners_pictures_and_the_command_draws_the_same_anew(showy, fedvision):
    folder = run("mine.toml", out="out").path
    assert drawn(folder) == ["beliefs.png", *USUAL]
    pixels = {path.name: np.asarray(Image.open(path)) for path in (folder / "figures").iterdir()}
    for path in (folder / "figures").iterdir():
        path.unlink()
    ended = fedvision("figures", "out")
    assert (ended.status, ended.err) == (0, "")
    assert sorted(ended.out.splitlines()) == sorted(f"picture: out/figures/{name}" for name in pixels)
    for name, before in pixels.items():
        assert np.array_equal(np.asarray(Image.open(folder / "figures" / name)), before), name


def test_a_learner_without_pictures_is_told_in_a_line(here, fedvision, no_figures):
    run("mine.toml", out="out")
    ended = fedvision("figures", "out")
    assert ended.status == 0
    assert ended.out.splitlines()[0] == "learner classifier has no pictures of its own"


def test_of_an_unfinished_run_the_checkpoints_model_is_shown(showy, fedvision):
    whole = np.asarray(Image.open(run("mine.toml", out="whole").path / "figures" / "beliefs.png"))

    def stop(row):
        if row["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("mine.toml", out="out", on_round=stop)
    ended = fedvision("figures", "out")
    assert ended.status == 0
    assert "the run has not finished (status: interrupted); shown is what there is" in ended.out
    assert drawn(showy / "out") == ["beliefs.png", *USUAL]
    assert not np.array_equal(np.asarray(Image.open(showy / "out" / "figures" / "beliefs.png")), whole)


def test_of_a_run_without_a_model_the_data_are_shown(showy, fedvision):
    folder = RunFolder(run("mine.toml", out="out", draw=False).path)
    folder.write_manifest(folder.read_manifest() | {"status": "running"})
    for path in (folder.model, folder.checkpoint, folder.rounds):
        path.unlink()
    ended = fedvision("figures", "out")
    assert ended.status == 0
    assert "there is no model yet, neither a final one nor a checkpoint: no pictures of the learner" in ended.out
    assert drawn(folder.path) == ["examples.png", "partition.png"]


def test_a_folder_that_is_no_run_is_refused(here, fedvision):
    ended = fedvision("figures", ".")
    assert ended.status == 1
    assert "holds no run; give the folder that `fedvision run` printed" in ended.err


def test_a_damaged_model_is_refused(showy, fedvision):
    RunFolder(run("mine.toml", out="out", draw=False).path).model.write_bytes(b"nothing")
    ended = fedvision("figures", "out")
    assert ended.status == 1
    assert "model.safetensors: not a readable safetensors file" in ended.err


def test_a_run_on_other_data_needs_them(showy, experiment, federated):
    done = run("mine.toml", data=federated, out="out", draw=False)
    with pytest.raises(RunError, match=r"was made with other data .* give that, from Python as `data`"):
        redraw(done.path)
    assert "beliefs.png" in [file.name for file in redraw(done.path, data=federated).files]


def test_another_device_may_draw(showy, fedvision):
    run("mine.toml", out="out", draw=False)
    assert fedvision("figures", "out", "--device", "cpu").status == 0
    ended = fedvision("figures", "out", "--device", "toaster")
    assert ended.status == 1 and "engine.device = 'toaster' cannot be used" in ended.err


# ---- ALBEF ----------------------------------------------------------------------------------------------------------

SMALL = {
    "rounds": 1, "data.examples": 80, "data.test_examples": 80, "strategy.steps": 1, "strategy.batch_size": 4, "learner.reranked": 0,
}  # fmt: skip


def test_albef_shows_where_words_look_what_is_masked_and_what_belongs_together(here, fedvision):
    folder = run("albef-tiny", SMALL, out="out", draw=False).path
    ended = fedvision("figures", "out")
    assert (ended.status, ended.err) == (0, "")
    names = ["masked-words.png", "nearest-images.png", "nearest-texts.png", "words-on-images.png"]
    assert set(names) < set(drawn(folder)) and len(drawn(folder)) == len(names) + len(USUAL)
    assert all(np.asarray(Image.open(folder / "figures" / name)).std() > 10 for name in names)
    opened = Run.open(folder)
    shown = galleries.of_learner(opened.rebuilt(), opened.arrays)
    assert shown["nearest-images"].caption.startswith("Of 64 pictures")
