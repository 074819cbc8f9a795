"""A newcomer follows docs/add-a-strategy.md: one short file, which the list, the conformance suite and a bench pick up."""

import re
import sys

import pytest

import strategies as package
from benchmarks.bench import bench
from benchmarks.report import Rounds, blocks
from benchmarks.suite import Suite
from fedvision import registry
from fedvision.silo import Silo
from strategies.check import check_strategy


@pytest.fixture(scope="module")
def blocks_of_the_page(root):
    """The code blocks of the page by language, in order."""
    text = (root / "docs" / "add-a-strategy.md").read_text()
    found = re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return {kind: [block for other, block in found if other == kind] for kind, _ in found}


@pytest.fixture
def followed(blocks_of_the_page, tmp_path, monkeypatch):
    """A folder with the page's files; what they register is forgotten afterwards."""
    experiment, suite = blocks_of_the_page["toml"]
    (tmp_path / "my_strategies.py").write_text(blocks_of_the_page["python"][0])
    (tmp_path / "unequal.toml").write_text(experiment)
    (tmp_path / "nova.toml").write_text(suite)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known = {name: registry.strategies.find(name) for name in registry.strategies.names()}
    monkeypatch.setattr(registry.strategies, "entries", known)
    yield tmp_path
    sys.modules.pop("my_strategies", None)


def test_the_file_is_short(blocks_of_the_page):
    assert len(blocks_of_the_page["python"][0].splitlines()) < 60


def test_it_passes_the_conformance_suite_by_its_dotted_name(followed):
    check_strategy("my_strategies:FedNova", Silo, epochs=2)


def test_it_is_listed_once_it_lies_in_the_folder_of_strategies(followed, monkeypatch, request):
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(followed)])
    request.addfinalizer(lambda: sys.modules.pop("strategies.my_strategies", None))
    assert "fednova" in registry.strategies.names()
    assert registry.strategies.summary("fednova").startswith("FedAvg that averages")


def test_a_bench_compares_it_with_fedavg(followed):
    suite = Suite.load("nova.toml", seeds=1, overrides={"rounds": 2})
    results = bench(suite, followed / "results", jobs=1)
    assert not results.failures
    [block] = blocks(suite, Rounds(results))
    assert set(block.rows) == {"fedavg", "fednova"}
    values = {row: summaries["last"].mean for row, summaries in block.rows.items()}
    assert 0 < values["fednova"] < 1 and values["fednova"] != values["fedavg"]
