"""What the pages say besides Python, which test_house.py runs: their TOML loads, their commands exist, their excerpts are still true."""

import re
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from benchmarks.cli import app
from benchmarks.suite import Suite
from fedvision.experiment import Experiment

ROOT = Path(__file__).resolve().parent.parent
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")), *DECISIONS]


def code(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def strategy_of_the_page(tmp_path, monkeypatch):
    """A current folder that holds the file of docs/add-a-strategy.md; it is forgotten afterwards."""
    (tmp_path / "my_strategies.py").write_text(
        code(ROOT / "docs" / "add-a-strategy.md", "python")[0].replace("@strategies", "# @strategies")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_strategies", None)


@pytest.mark.parametrize("page", [page for page in PAGES if code(page, "toml")], ids=lambda page: page.stem)
def test_experiments_and_suites_load(page, strategy_of_the_page):
    for number, block in enumerate(code(page, "toml")):
        file = strategy_of_the_page / f"{number}.toml"
        file.write_text(block)
        if "[experiments." in block:
            assert Suite.load(file).cells and Suite.load(file, quick=True).cells
        else:
            file.rename(file.with_name(f"{Experiment.load(file).name}.toml"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_exist_and_have_their_options(page):
    commands = get_command(app).commands
    for line in re.findall(
        r"fedvision ([\w-]+)([^`\n#]*)", "\n".join([*code(page, "sh"), *re.findall(r"`(fedvision [^`]+)`", page.read_text())])
    ):
        name, rest = line
        assert name in commands, f"{page.name} mentions `fedvision {name}`"
        command, (further, *_) = commands[name], (*rest.split(), "")
        if further and hasattr(command, "commands"):
            assert further in command.commands, f"{page.name} mentions `fedvision {name} {further}`"
            command = command.commands[further]
        known = {option for parameter in command.params for option in parameter.opts}
        unknown = set(re.findall(r"--[\w-]+", rest)) - known
        assert not unknown, f"{page.name} gives `fedvision {name}` the options {unknown}"


def test_excerpts_stand_in_the_files_they_show():
    files = [*(ROOT / "docs" / "examples").rglob("*.py"), ROOT / "tests" / "test_flower_app.py"]
    sources = [file.read_text() for file in files]
    for block in code(ROOT / "docs" / "flower-app.md", "py"):
        assert any(block in source for source in sources), f"no file holds this excerpt any more:\n{block}"


@pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.stem)
def test_links_of_the_decisions_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
