"""Speed beside accuracy: what is read, computed and written. Nothing here is timed."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.runs import run
from benchmarks.speed import backbones
from benchmarks.speed.backbones import Backbone, How, Row, accuracies, figure, frontier, markdown, measured, of_run, of_timm
from fedvision.errors import ExperimentError, RunError
from fedvision.seeds import generator

ROW = Row("a", 0.5, "run a", 10, (3, 32, 32), 100.0, 90.0, 110.0)
ABOUT = {"batch": 2, "threads": 1, "dtype": "float32", "device": "cpu"}
QUICK = How(batch=2, repeats=2)


def rows(**points):
    return [replace(ROW, name=name, images_a_second=speed, accuracy=accuracy) for name, (speed, accuracy) in points.items()]


def test_a_run_brings_its_network_and_its_accuracy(experiment, tmp_path, no_figures):
    done = run(experiment(rounds=1), out=tmp_path / "run")
    found = of_run(done.path)
    assert found.accuracy == done.rounds["test_accuracy"].iloc[-1] and found.image_shape == (1, 8, 8)
    assert all(torch.equal(tensor, done.state[name]) for name, tensor in found.network.state_dict().items())


def test_a_network_is_taken_out_of_what_its_learner_keeps_beside_it(tmp_path, no_figures):
    small = {"learner.filters": 2, "learner.scales": 1, "rounds": 0, "labels.at": "clients"}
    (row,) = measured([of_run(run("doublematch-tiny", small, out=tmp_path / "few").path)], QUICK)
    assert (row.name, row.image_shape) == ("few", (1, 8, 8)) and row.images_a_second > 0


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        of_run(tmp_path)


def test_a_timm_model_has_its_own_resolution_or_the_one_asked_for():
    assert of_timm("test_resnet").image_shape == (3, 160, 160)
    smaller = of_timm("test_vit", side=64)
    assert smaller.image_shape == (3, 64, 64) and smaller.accuracy is None
    assert smaller.network(torch.rand(1, 3, 64, 64, generator=generator(0))).shape == (1, 1000)


def test_an_unknown_model_is_refused():
    with pytest.raises(ExperimentError, match="unknown timm model 'resnet1O'"):
        of_timm("resnet1O")


@pytest.mark.parametrize(("name", "text"), [("a.csv", "name,accuracy\nx,0.5\ny,0.25\n"), ("a.json", '{"x": 0.5, "y": 0.25}')])
def test_accuracies_are_read_from_a_file(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert accuracies(tmp_path / name) == {"x": 0.5, "y": 0.25}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "model,top1\nx,0.5\n", "give a CSV file with the columns name and accuracy"),
        ("a.json", "[1]", "or a JSON object of numbers"),
        ("a.csv", "name,accuracy\nx,81.0\n", "write fractions"),
    ],
)
def test_accuracies_of_another_form_are_refused(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(RunError, match=message):
        accuracies(tmp_path / name)


def test_speed_is_images_a_second_of_the_median_pass(monkeypatch):
    clock = iter([0, 1, 0, 2, 0, 4, 0, 8])  # a pass that warms up, then three
    monkeypatch.setattr("benchmarks.speed.backbones.time.perf_counter", lambda: next(clock))
    [row] = measured([Backbone("x", torch.nn.Identity(), (3, 4, 4))], How(batch=8, repeats=3))
    assert (row.images_a_second, row.least, row.most) == (2, 1, 4)


def test_the_frontier_is_what_nothing_beats():
    found = frontier(rows(fast=(100, 0.5), slow=(10, 0.9), beaten=(5, 0.8), equal=(10, 0.7), middle=(50, 0.6)))
    assert [row.name for row in found] == ["fast", "middle", "slow"]


def test_the_table_is_sorted_by_speed_and_leaves_out_what_is_not_known():
    text = markdown(rows(slow=(10, None), fast=(1000, 0.5)), ABOUT)
    assert "| fast | 1,000.0 |" in text and text.index("fast") < text.index("slow")
    assert "| slow | 10.0 | 90.0 to 110.0 | – |" in text and "batch: 2" in text


def test_without_accuracies_there_is_no_picture():
    assert figure(rows(slow=(10, None)), ABOUT) is None


def test_the_command_writes_table_numbers_and_picture(tmp_path, capsys):
    (tmp_path / "known.csv").write_text("name,accuracy\ntest_resnet,0.5\n")
    line = ["--models", "test_resnet,test_vit", "--accuracies", str(tmp_path / "known.csv"), "--batch", "2", "--repeats", "1"]
    backbones.main([*line, "--out", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"backbones.md", "backbones.json", "backbones.png"}
    found = json.loads((tmp_path / "out" / "backbones.json").read_text())
    assert {row["name"]: row["accuracy"] for row in found["backbones"]} == {"test_resnet": 0.5, "test_vit": None}
    assert found["about"]["torch"] and found["about"]["dtype"] == "float32" and found["about"]["threads"] == 1
    assert "| test_resnet |" in capsys.readouterr().out


def test_a_command_without_networks_is_refused(capsys):
    with pytest.raises(SystemExit):
        backbones.main([])
    assert "give folders of runs, or --models" in capsys.readouterr().err
