import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from benchmarks import bench, cli, runs
from benchmarks.bench import DIED, Results
from benchmarks.suite import Cell, Suite
from server.folder import RunFolder

KRUM = {"label": "Krum", "strategy": {"name": "krum", "byzantine": 5}}
IMPOSSIBLE = "krum with byzantine = 5 needs at least 13 answers, got 3"
LONG = {"experiments.digits.set": {"rounds": 240, "checkpoint_every": 1}, "seeds": 1}
PATIENCE = 120
"""Seconds after which a process is thought to hang."""

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found in /proc")


def rounds(folder: Path) -> list[str]:
    """The recorded rounds of a run, as written."""
    file = RunFolder(folder).rounds
    return file.read_text().splitlines() if file.exists() else []


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """What is in a run's folder, and when it was written."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def assert_same_bits(folder: Path, other: Path) -> None:
    """Two runs have the same model, and the same rounds but for the time they took."""
    assert RunFolder(folder).model.read_bytes() == RunFolder(other).model.read_bytes()
    one, two = ([json.loads(row) | {"seconds": 0} for row in rounds(run)] for run in (folder, other))
    assert one == two != []


def cell_of(results: Results, row: str, seed: int = 0) -> Cell:
    return next(cell for cell in results.suite.cells if (cell.row, cell.seed) == (row, seed))


@pytest.fixture(scope="module")
def small(write_suite) -> Path:
    """A suite of two rows that work and one that cannot."""
    return write_suite({"strategies.krum": KRUM})


@pytest.fixture(scope="module")
def told() -> list[tuple[str, int]]:
    """What the first bench of ``results`` told of its progress."""
    return []


@pytest.fixture(scope="module")
def results(small, told, tmp_path_factory) -> Results:
    """The first bench of the small suite, two cells at a time."""
    return bench.bench(Suite.load(small), tmp_path_factory.mktemp("bench"), jobs=2, on_progress=lambda *news: told.append(news))


@pytest.fixture(scope="module")
def finished(results) -> dict[Path, dict[str, tuple[bytes, int]]]:
    """What the first bench left in the folders of the rows that work."""
    return {path: contents(path) for path in (results.folder(cell) for cell in results.suite.cells if cell.row != "krum")}


@pytest.fixture(scope="module")
def again(small, results, finished):
    """The command's outcome when it is called with one seed more, one cell at a time."""
    arguments = ["bench", str(small), "--out", str(results.path), "--jobs", "1", "--seeds", "3"]
    return CliRunner().invoke(cli.app, arguments)


@pytest.fixture(scope="module")
def whole(write_suite, tmp_path_factory) -> Path:
    """A long run that nobody disturbed."""
    (cell,) = Suite.load(write_suite(LONG)).only(["fedsgd"]).cells
    return runs.run(cell.experiment, out=tmp_path_factory.mktemp("whole") / "run", draw=False).path


def test_every_cell_is_computed_as_a_single_run_would(results, tmp_path):
    for row in ("fedsgd", "fedavg"):
        for seed in range(2):
            cell = cell_of(results, row, seed)
            assert RunFolder(results.folder(cell)).finished
            alone = runs.run(cell.experiment, out=tmp_path / f"{row}-{seed}", draw=False)
            assert_same_bits(results.folder(cell), alone.path)


def test_a_failing_cell_is_reported_and_loses_no_other(results):
    assert set(results.failures) == {results.folder(cell).name for cell in results.suite.cells if cell.row == "krum"}
    assert all(IMPOSSIBLE in reason for reason in results.failures.values())


def test_progress_is_told_round_by_round(results, told):
    for row in ("fedsgd", "fedavg"):
        name = results.folder(cell_of(results, row)).name
        assert [done for cell, done in told if cell == name] == [0, 1, 2]


def test_a_second_call_computes_nothing_anew(finished, again):
    assert finished
    for path, before in finished.items():
        assert contents(path) == before


def test_a_second_call_computes_what_is_missing_to_the_same_bits_with_any_number_of_jobs(results, again, small, tmp_path):
    more = Results(Suite.load(small, seeds=3), results.path)
    for row in ("fedsgd", "fedavg"):
        cell = cell_of(more, row, seed=2)
        alone = runs.run(cell.experiment, out=tmp_path / row, draw=False)
        assert_same_bits(more.folder(cell), alone.path)


def test_the_command_ends_with_status_3_and_the_reasons_when_a_cell_has_failed(again, results):
    assert again.exit_code == cli.CLIENTS_FAILED == 3
    assert IMPOSSIBLE in again.output
    report = (results.path / "report.md").read_text()
    assert "Left out: Krum (3 runs missing)." in report
    assert report.count(IMPOSSIBLE) == 3


def test_the_command_says_where_its_report_is(again, results):
    assert f"report: {results.path / 'report.md'}" in again.output
    assert f"picture: {results.path / 'figures' / 'digits-curves.png'}" in again.output


def test_a_cell_whose_worker_is_killed_goes_on_where_it_was(write_suite, whole, tmp_path):
    suite = Suite.load(write_suite(LONG)).only(["fedsgd"])
    folder, before = Results(suite, tmp_path).folder(suite.cells[0]), []

    def kill(name: str, done: int) -> None:
        if done == 10 and not before:
            before.extend(rounds(folder))
            for worker in multiprocessing.active_children():
                worker.kill()

    assert bench.bench(suite, tmp_path, jobs=1, on_progress=kill).failures == {}
    assert 10 < len(before) < 240
    assert rounds(folder)[: len(before) - 1] == before[:-1]
    assert_same_bits(folder, whole)


def test_a_cell_that_kills_its_worker_loses_no_other(write_suite, tmp_path):
    digits = Suite.load(write_suite()).experiments["digits"].experiment
    deadly = {"experiment": digits, "title": "Deadly", "set": {"data": {"name": "os:_exit", "status": 9}}}
    file = write_suite({"experiments": {"deadly": deadly, "digits": {"experiment": digits, "title": "Digits"}}, "seeds": 1})
    results = bench.bench(Suite.load(file).only(["fedsgd"]), tmp_path, jobs=1)
    dead, well = (results.folder(cell) for cell in results.suite.cells)
    assert results.failures == {dead.name: DIED}
    assert RunFolder(well).finished


def alive(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = file.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(its_group) == group and state != "Z":
            found.append(int(file.parent.name))
    return found


def until(condition: Callable[[], object]) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


@pytest.fixture
def start(root):
    """Starts ``fedvision bench`` as the leader of a process group; what is left of the group is killed after the test."""
    started = []

    def start(file: Path, out: Path, *options: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "fedvision", "bench", str(file), "--out", str(out), "--only", "fedsgd", *options]
        started.append(
            subprocess.Popen(command, cwd=root, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
        return started[-1]

    yield start
    for process in started:
        for left in alive(process.pid):
            os.kill(left, signal.SIGKILL)
        process.communicate()


@linux
@pytest.mark.slow
def test_a_killed_bench_leaves_no_worker_behind_and_goes_on_where_it_was(write_suite, start, whole, tmp_path):
    file = write_suite(LONG)
    suite = Suite.load(file).only(["fedsgd"])
    folder = Results(suite, tmp_path).folder(suite.cells[0])
    process = start(file, tmp_path, "--jobs", "1")
    until(lambda: len(rounds(folder)) > 10)
    assert len(alive(process.pid)) > 1
    process.kill()
    process.wait()
    until(lambda: not alive(process.pid))
    before = rounds(folder)
    assert not RunFolder(folder).finished
    assert bench.bench(suite, tmp_path, jobs=1).failures == {}
    assert rounds(folder)[: len(before) - 1] == before[:-1]
    assert_same_bits(folder, whole)


@linux
@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_keeps_what_they_computed(write_suite, start, tmp_path):
    file = write_suite({**LONG, "experiments.digits.set": {"rounds": 100_000}, "seeds": 2})
    suite = Suite.load(file).only(["fedsgd"])
    folders = [Results(suite, tmp_path).folder(cell) for cell in suite.cells]
    process = start(file, tmp_path, "--jobs", "2")
    until(lambda: all(len(rounds(folder)) > 2 for folder in folders))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == cli.INTERRUPTED == 130
    assert "Traceback" not in output
    until(lambda: not alive(process.pid))
    assert all(len(rounds(folder)) > 2 and not RunFolder(folder).finished for folder in folders)


def test_runs_begin_with_the_weights_of_the_column_that_theirs_is_after(tmp_path):
    """What fine-tuning has before its first round is what pre-training of the same row and seed ended with."""
    data = {"name": "scenes", "examples": 8, "test_examples": 4, "size": 16, "classes": 3, "fields": ["image", "label", "depth", "semseg"]}
    network = {"patch": 8, "width": 16, "depth": 1, "heads": 2, "semantic_classes": 4, "class_embedding": 4}
    decoders = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    everything = {"rounds": 1, "data": data, "partition": {"name": "iid", "clients": 2}, "strategy": {"name": "fedavg"}}
    before = {"name": "before", **everything, "learner": {"name": "multimae", **network, **decoders}}
    after = {"name": "after", **everything, "rounds": 0, "learner": {"name": "multimae-finetune", "task": "semseg", **network}}
    for tables in (before, after):
        (tmp_path / f"{tables['name']}.toml").write_text(tomli_w.dumps(tables))
    suite = {
        "name": "chain",
        "title": "Chain",
        "seeds": 1,
        "strategies": {"one": {"label": "One"}, "other": {"label": "Other", "set": {"learner.alpha": 5.0}}},
        "experiments": {
            "before": {"experiment": "before.toml", "title": "before"},
            "after": {"experiment": "after.toml", "title": "after", "after": "before"},
        },
        "tables": [],
    }
    (tmp_path / "chain.toml").write_text(tomli_w.dumps(suite))
    results = bench.bench(Suite.load(tmp_path / "chain.toml"), tmp_path / "results", jobs=1)
    assert results.failures == {}
    first = {cell.row: load_file(RunFolder(results.folder(cell)).model) for cell in results.suite.cells if cell.column == "before"}
    then = {cell.row: load_file(RunFolder(results.folder(cell)).model) for cell in results.suite.cells if cell.column == "after"}
    shared = [name for name in first["one"] if name.startswith(("encoder.", "input_adapters.rgb.proj"))]
    assert shared
    for name in shared:
        assert not torch.equal(first["one"][name], first["other"][name]) or name.endswith("bias"), "rows differ in pre-training"
        assert all(torch.equal(first[row][name], then[row][name]) for row in first)
