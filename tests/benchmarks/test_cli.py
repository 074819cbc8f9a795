import io
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from benchmarks import cli, display, run
from fedvision import registry
from fedvision.experiment import bundled
from server.folder import RunFolder
from server.record import read_rows
from strategies.fedsgd import FedSGD

LIGHT = """
import sys
from types import SimpleNamespace
sys.argv = {argv!r}
try:
    from fedvision.__main__ import main
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {{"torch", "flwr", "numpy", "pandas", "matplotlib", "sklearn", "timm", "pydantic"}}
imported = heavy & {{name.partition(".")[0] for name in sys.modules}}
assert not imported, sorted(imported)
"""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["data", "--help"], ["list", "--help"], ["doctor", "--help"], ["pseudo-labels", "--help"], []],
)
def test_help_imports_nothing_that_takes_seconds(root, arguments):
    code = LIGHT.format(argv=["fedvision", *arguments]).replace("assert not stop.code, stop.code", "assert stop.code in (0, 2), stop.code")
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout
    if not arguments or arguments == ["--help"]:
        assert all(command in done.stdout for command in ("run", "bench", "list", "data", "doctor"))


def test_a_run_prints_quiet_lines_a_summary_and_its_folder(fedvision, here, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    ended = fedvision("run", "mine.toml", "--out", "out")
    assert (ended.status, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert [line.split()[1] for line in lines[:4]] == ["0/3", "1/3", "2/3", "3/3"]
    assert "first" in ended.out and "last" in ended.out
    assert re.search(r"test_loss +│ +\d+\.\d{4} │", ended.out), "numbers are whole in a narrow window"
    assert "run folder: out" in ended.out
    assert "\x1b" not in ended.out, "escape codes although this is no terminal"


def test_long_runs_print_about_ten_lines(fedvision, here):
    ended = fedvision("run", "mine.toml", "--set", "rounds=40", "--set", "evaluate_every=40", "--out", "out")
    shown = [line.split()[1] for line in ended.out.splitlines() if "/40" in line]
    assert shown == [f"{number}/40" for number in range(0, 41, 4)]


def test_overrides_reach_the_run(fedvision, here):
    assert fedvision("run", "mine.toml", "--set", "rounds=1", "-s", "strategy.name=fedavg", "--out", "out").status == 0
    manifest, rows = RunFolder(here / "out").read_manifest(), list(read_rows(here / "out" / "rounds.jsonl"))
    assert len(rows) == 2 and manifest["status"] == "finished"
    assert 'name = "fedavg"' in (here / "out" / "experiment.toml").read_text()


def test_without_a_folder_the_run_is_under_runs(fedvision, here):
    fedvision("run", "mine.toml", "--set", "rounds=0")
    fedvision("run", "mine.toml", "--set", "rounds=0")
    names = sorted(path.name for path in (here / "runs").iterdir())
    assert len(names) == 2 and names[1] == f"{names[0]}-2" and names[0].startswith("mine-")


def test_a_run_may_start_from_the_model_of_another(fedvision, here):
    fedvision("run", "mine.toml", "--out", "first")
    assert fedvision("run", "mine.toml", "--initial", "first/model.safetensors", "--set", "rounds=0", "--out", "second").status == 0
    last, first = (list(read_rows(here / name / "rounds.jsonl")) for name in ("first", "second"))
    assert last[-1]["test_loss"] == first[0]["test_loss"]


def test_resuming_a_finished_run_shows_it_again(fedvision, here):
    first = fedvision("run", "mine.toml", "--out", "out")
    again = fedvision("run", "mine.toml", "--out", "out", "--resume")
    assert again.status == 0 and again.out == first.out


@pytest.mark.parametrize("kind", [None, "strategies", "learners", "data", "partitions", "engines", "experiments"])
def test_everything_that_can_be_named_is_listed_with_one_line(fedvision, kind):
    ended = fedvision("list", *([kind] if kind else []))
    assert ended.status == 0
    known = {
        "strategies": registry.strategies, "learners": registry.learners, "data": registry.datasets,
        "partitions": registry.partitions, "engines": registry.engines,
    }  # fmt: skip
    for title, names in known.items():
        for name in names.names():
            lines = [line for line in ended.out.splitlines() if line.split()[:1] == [name]]
            if kind in (None, title):
                assert lines, f"{name} is not listed"
                assert any(names.summary(name)[:30] in line for line in lines)
    if kind in (None, "experiments"):
        assert all(name in ended.out for name in bundled())


def test_the_card_of_a_partition_is_printed_and_drawn(fedvision, here):
    ended = fedvision("data", "mine.toml")
    assert ended.status == 0
    assert "3 clients, 10 classes" in ended.out and "Jensen-Shannon" in ended.out
    assert (here / "mine-partition.png").read_bytes().startswith(b"\x89PNG")
    assert fedvision("data", "mine.toml", "--out", "card.png").status == 0
    assert (here / "card.png").exists()


def test_the_doctor_finds_this_installation_healthy(fedvision):
    ended = fedvision("doctor")
    assert ended.status == 0
    assert "FedVision can run." in ended.out and "torch" in ended.out and "`fedvision list experiments`" in ended.out


def test_the_doctor_breaks_no_line_whatever_the_width(fedvision, monkeypatch):
    interpreter = "/home" + "/a-long-name" * 20 + "/bin/python"
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("benchmarks.doctor.sys", SimpleNamespace(executable=interpreter))
    monkeypatch.setattr("benchmarks.doctor.find_spec", lambda name: None)
    lines = [line.strip() for line in fedvision("doctor").out.splitlines()]
    assert f"ok  interpreter           {interpreter}" in lines
    assert "pip install 'fedvision[pseudo-labels]'" in lines, "the command that is to be copied has a line of its own"


def test_clients_that_fail_are_named_at_the_end_and_in_the_exit_status(fedvision, here, monkeypatch):
    (here / "one_bad_apple.py").write_text(
        "import math\n"
        "from fedvision.data import FederatedData\n"
        "def apples():\n"
        "    good, bad = ([[0.0], [1.0]], [0, 1]), ([[math.nan], [1.0]], [0, 1])\n"
        "    return FederatedData.from_arrays([good, bad, good], test=good)\n"
    )
    monkeypatch.syspath_prepend(here)
    ended = fedvision("run", "mine.toml", "--set", "data.name=one_bad_apple:apples", "--out", "out")
    assert ended.status == cli.CLIENTS_FAILED == 3
    assert "3 answers of clients were lost or refused: client 1: array 'hidden1.weight' holds NaN or infinite values (3 times)" in ended.err
    assert "run folder: out" in ended.out
    assert RunFolder(here / "out").finished


def test_reasons_with_brackets_are_printed_as_they_are(fedvision, here, monkeypatch):
    honest = FedSGD.client_update

    def failing(self, silo, content):
        if len(silo.train) == 479 and silo.progress == 0:
            raise ValueError("no [silo] here, nor [/there]")
        return honest(self, silo, content)

    monkeypatch.setattr(FedSGD, "client_update", failing)
    ended = fedvision("run", "mine.toml", "--out", "out")
    assert "ValueError: no [silo] here, nor [/there]" in ended.err


def test_debug_shows_where_an_error_happened(fedvision):
    ended = fedvision("run", "nowhere.toml", "--debug")
    assert ended.status == 1
    assert "Traceback" in ended.err and "error: no experiment 'nowhere.toml'" in ended.err


def test_what_nobody_expected_is_one_message_too(fedvision, monkeypatch):
    def broken(*arguments, **options):
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr("benchmarks.runs.run", broken)
    ended = fedvision("run", "mine.toml")
    assert ended.status == 1
    assert "error: ZeroDivisionError: a bug of ours" in ended.err and "--debug" in ended.err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_says_how_to_go_on_and_goes_on(here, spawned, rows_reach, no_figures, number):
    process = spawned("run", "mine.toml", "--set=rounds=80", "--out", "stopped")
    rows_reach(process, here / "stopped", 5)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == cli.INTERRUPTED == 130
    assert "Traceback" not in out + err
    assert "--resume" in err and "last checkpoint is kept" in err
    folder = RunFolder(here / "stopped")
    assert folder.read_manifest()["status"] == "interrupted" and not folder.model.exists()
    done = run("mine.toml", {"rounds": 80}, out="stopped", resume=True)
    whole = run("mine.toml", {"rounds": 80}, out="whole")
    assert (done.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()
    assert done.rounds.drop(columns="seconds").equals(whole.rounds.drop(columns="seconds"))


def test_a_terminal_shows_a_live_bar(experiment):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with display.of_rounds(console, experiment()) as on_round:
        for number in range(4):
            on_round({"round": number, "test_loss": 0.25, "clients": 3, "failures": 0})
    shown = console.file.getvalue()
    assert "\x1b[" in shown and "3/3" in shown and "0.2500" in shown
