"""Flower's runtime gives the numbers of the in-process engine, bit for bit, and leaves nothing behind."""

import io
import re
import shutil
import subprocess
import tempfile
import time
import uuid
import zipfile
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks import run
from fedvision.errors import EngineError
from fedvision.experiment import Experiment
from fedvision.grids.flower import RUNS, FlowerRuntime
from fedvision.grids.local_superlink import local_superlink
from server.record import read_rows

SMALL = {"rounds": 3, "learner.hidden": [8], "tensorboard": False}
ON_FLOWER = {"engine.name": "flower"}


def real(test):
    """A test that starts a SuperLink and Ray."""
    return pytest.mark.slow(pytest.mark.ray(pytest.mark.grpc(test)))


def numbers(folder: Path) -> list[dict]:
    return [row | {"seconds": 0} for row in read_rows(folder / "rounds.jsonl")]


def bits(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture
def traces(monkeypatch):
    """What is left of the processes and folders that the test started: none in the end."""
    mark, folder = f"FEDVISION_TEST={uuid.uuid4().hex}", Path(tempfile.mkdtemp(prefix="t"))
    monkeypatch.setenv(*mark.split("="))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))

    def left() -> list[str]:
        marked = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                    marked.append((process / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return marked + [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")]  # which torch keeps

    yield left
    shutil.rmtree(folder)


# ---- the same numbers -----------------------------------------------------------------------------------------------


@real
def test_a_run_begun_in_this_process_ends_in_flowers_with_the_same_bits(tmp_path, traces, no_figures):
    class Stopped(BaseException):
        pass

    def stop(row):
        if row["round"] == 1:
            raise Stopped

    sampled = SMALL | {"strategy.name": "fedavg", "strategy.fraction": 0.5}
    whole = run("quickstart", sampled, out=tmp_path / "whole")
    with pytest.raises(Stopped):
        run("quickstart", sampled, out=tmp_path / "parts", on_round=stop)
    told = []
    done = run("quickstart", sampled | ON_FLOWER, out=tmp_path / "parts", resume=True, on_round=told.append)
    assert numbers(done.path) == numbers(whole.path)
    assert bits(done.path) == bits(whole.path)
    assert [row["round"] for row in told] == [0, 1, 2, 3]
    assert done.manifest["status"] == "finished"
    assert {path.name for path in done.path.iterdir()} == {path.name for path in whole.path.iterdir()}
    assert traces() == []


@pytest.fixture(scope="module")
def superlink():
    with local_superlink(RUNS) as environment:
        yield environment


def flwr(superlink: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(["flwr", *arguments], env=superlink, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@real
@pytest.mark.parametrize("strategy", ["scaffold", "fishr-inter-geo"])
def test_flwr_run_gives_the_numbers_of_the_command_line(superlink, strategy, root, tmp_path, no_figures):
    overrides = f"rounds=2; strategy.name={strategy}; learner.hidden=[8]"
    federation = "num-supernodes=5 client-resources-num-cpus=1"
    config = f'experiment="quickstart" overrides="{overrides}"'
    said = flwr(superlink, "run", str(root), "local", "--stream", "--run-config", config, "--federation-config", federation)
    asked = {"rounds": 2, "strategy.name": strategy, "learner.hidden": [8]}
    here = run("quickstart", asked, out=tmp_path / "here")
    there = Path(superlink[RUNS]) / f"quickstart-{here.experiment.fingerprint}"
    assert there.exists(), said
    assert numbers(there) == numbers(here.path)
    assert bits(there) == bits(here.path)


# ---- when it fails --------------------------------------------------------------------------------------------------


@real
def test_a_run_that_fails_says_why_and_leaves_nothing(fedvision, here, traces):
    settings = ["rounds=1", "learner.hidden=[8]", "strategy.min_clients=6", "engine.name=flower", "tensorboard=false"]
    ended = fedvision("run", "quickstart", *(part for setting in settings for part in ("--set", setting)), "--out", "failed")
    assert ended.status == 1
    assert "5 clients are connected, strategy.min_clients = 6" in " ".join(ended.err.split())
    assert "ServerApp" not in (here / "failed" / "manifest.json").read_text()
    assert (here / "failed" / "flower.log").stat().st_size > 100
    assert traces() == []


@real
def test_a_run_that_is_cut_short_leaves_nothing(tmp_path, traces):
    with closing(FlowerRuntime().follow(Experiment.load("quickstart"), 5, tmp_path)) as news:
        began = time.monotonic()
        while not any("flwr-simulation" in line for line in traces()):
            next(news)
            assert time.monotonic() - began < 60
    assert traces() == []


# ---- what cannot travel; nothing is started -------------------------------------------------------------------------


def test_arrays_and_weights_do_not_travel(experiment, federated, tmp_path):
    with pytest.raises(EngineError, match=r"`data` was given here and does not travel.*engine.name = 'in-process'"):
        run("quickstart", ON_FLOWER, data=federated, out=tmp_path / "run")
    with pytest.raises(EngineError, match="`initial` was given here"):
        run("quickstart", ON_FLOWER, initial={}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_code_of_the_users_own_does_not_travel(tmp_path, monkeypatch):
    (tmp_path / "left_at_home.py").write_text("from strategies.fedavg import FedAvg as Mine\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError, match=r"strategy 'left_at_home:Mine' is code of your own.*install its package"):
        run("quickstart", ON_FLOWER | {"strategy": {"name": "left_at_home:Mine"}})
    FlowerRuntime().check(Experiment.load("quickstart", {"strategy": {"name": "flwr.serverapp.strategy:FedTrimmedAvg"}}))


def test_silos_need_a_folder_to_bring_runs_from():
    with pytest.raises(EngineError, match=r"engine.connection = 'hospitals' needs engine.runs"):
        run("quickstart", ON_FLOWER | {"engine.connection": "hospitals"})


def test_a_gpu_must_be_set_aside_for_workers():
    with pytest.raises(EngineError, match="hides all GPUs"):
        FlowerRuntime(device="cuda")


# ---- the bundle -----------------------------------------------------------------------------------------------------

LITTER = [
    "data/patients.json", "runs/quickstart-1/model.safetensors", "runs/quickstart-1/experiment.toml", "bench/demo/report.md",
    "federation/authority/ca.key", "federation/silo0/node.key", "federation/silo0/silo.toml", "federation/silo0/data/scan.png",
    "clients/cases.csv", "server/cases.json", "fedvision/data/cohort.parquet", "fedvision/vocabularies/notes.txt", "benchmarks/secret.toml",
    "notebook.ipynb", "patients.py", ".env",
]  # fmt: skip
"""What may lie in a checkout and is nobody's business."""

BUNDLED = re.compile(
    r"(fedvision|strategies|clients|server)/([\w-]+/)*\w+\.py|fedvision/vocabularies/[\w-]+\.json|benchmarks/__init__\.py"
    r"|benchmarks/experiments/[\w-]+\.toml|pyproject\.toml|\.info/CONTENT"
)


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern")
def test_the_bundle_has_our_code_and_nothing_that_lies_beside_it(root, tmp_path):
    from flwr.cli.build import build_fab_from_disk

    for part in ("fedvision", "strategies", "clients", "server", "benchmarks", "docker", "tests/clients"):
        shutil.copytree(root / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE", ".gitignore", "constraints.txt"):
        shutil.copy(root / part, tmp_path / part)
    for litter in LITTER:
        (tmp_path / litter).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / litter).write_text("Jane Doe")
    bundle = build_fab_from_disk(tmp_path)
    with zipfile.ZipFile(io.BytesIO(bundle)) as opened:
        content = {name: opened.read(name) for name in opened.namelist()}
    assert [name for name in content if not BUNDLED.fullmatch(name)] == []
    assert not any(b"Jane Doe" in data for data in content.values())
    assert {"server/app.py", "clients/app.py", "strategies/fishr.py", "benchmarks/experiments/quickstart.toml"} <= content.keys()
    assert len(bundle) < 2_000_000  # Flower takes at most five times that
