"""The house stands: our packages are ours, nothing draws from global generators, nothing unpickles, the documentation runs."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fedvision", "strategies", "clients", "server", "benchmarks")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

LENDERS = {"fedvision/seeds.py"}
"""Who may touch global generators: to lend them to others' code, and to put them back."""

ENQUIRERS = {"fedvision/learners/check.py"}
"""Who may look at the state of global generators, to see that nobody moved them."""

TORCH_DRAWS = {
    "bernoulli", "multinomial", "normal", "poisson", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm",
    "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_",
    "kaiming_normal_", "kaiming_uniform_", "orthogonal_", "trunc_normal_", "xavier_normal_", "xavier_uniform_",
}  # fmt: skip
TORCH_GLOBAL = {"manual_seed", "seed", "set_rng_state", "manual_seed_all"}
PYTHON_DRAWS = {
    "betavariate", "choice", "choices", "expovariate", "gauss", "getrandbits", "normalvariate", "randbytes", "randint", "random",
    "randrange", "sample", "seed", "setstate", "shuffle", "triangular", "uniform", "vonmisesvariate",
}  # fmt: skip
NUMPY_ALLOWED = {"Generator", "default_rng", "SeedSequence", "BitGenerator", "PCG64", "RandomState"}


def calls(source: Path) -> list[tuple[ast.Call, str]]:
    """Every call in a file, with the dotted name of what is called."""
    return [(node, ast.unparse(node.func)) for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call)]


def draws_globally(call: ast.Call, name: str, source: str) -> bool:
    """Whether a call draws from, or seeds, a global generator."""
    module, _, function = name.rpartition(".")
    if module in ("np.random", "numpy.random"):
        looks = function == "get_state" and source in ENQUIRERS
        return function not in NUMPY_ALLOWED and not looks
    if module == "random":
        return function in PYTHON_DRAWS
    if function in TORCH_GLOBAL:
        return module in ("torch", "torch.random", "torch.cuda")
    return function in TORCH_DRAWS and module != "rng" and not any(keyword.arg == "generator" for keyword in call.keywords)


# ---- packages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_ours_and_not_another_distributions(package):
    # opacus 1.6 installs a top-level package `benchmarks`
    assert Path(importlib.import_module(package).__file__).parent == ROOT / package


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_ours_elsewhere_too(package, tmp_path):
    code = f"import {package}; print({package}.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).parent == ROOT / package


def test_imports_go_one_way():
    allowed = {
        "fedvision": {"fedvision"},
        "strategies": {"strategies", "fedvision"},
        "clients": {"clients", "strategies", "fedvision"},
        "server": {"server", "strategies", "fedvision"},
        "benchmarks": set(PACKAGES),
    }
    wrong = []
    for source in SOURCES:
        package = source.relative_to(ROOT).parts[0]
        for node in ast.walk(ast.parse(source.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.partition(".")[0] for name in names} & set(PACKAGES)
            wrong += [f"{source.relative_to(ROOT)} imports {root}" for root in roots - allowed[package]]
    assert not wrong


@pytest.mark.parametrize("app", ["serverapp", "clientapp"])
def test_flower_finds_the_apps(app):
    import tomllib

    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["components"][app]
    module, _, attribute = named.partition(":")
    kind = "ServerApp" if app == "serverapp" else "ClientApp"
    assert type(getattr(importlib.import_module(module), attribute)).__name__ == kind
    # Flower reads the file without running it, and wants a plain assignment
    assert re.search(rf"^{attribute} = {kind}\(", (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(), re.MULTILINE)


# ---- randomness and pickles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_draws_from_a_global_generator(source):
    name = str(source.relative_to(ROOT))
    if name in LENDERS:
        pytest.skip("the one place that lends the global generators")
    odd = [f"line {call.lineno}: {called}" for call, called in calls(source) if draws_globally(call, called, name)]
    assert not odd, f"{name} draws from a global generator; derive one with fedvision.seeds"


@pytest.mark.parametrize(
    ("line", "draws"),
    [
        ("torch.rand(3)", True),
        ("torch.rand(3, generator=rng)", False),
        ("x.uniform_(0, 1)", True),
        ("x.uniform_(0, 1, generator=rng)", False),
        ("torch.manual_seed(0)", True),
        ("torch.Generator().manual_seed(0)", False),
        ("torch.randperm(5)", True),
        ("nn.init.xavier_uniform_(w)", True),
        ("np.random.rand(3)", True),
        ("np.random.seed(0)", True),
        ("np.random.default_rng(0)", False),
        ("np.random.RandomState(1)", False),
        ("numpy.random.permutation(3)", True),
        ("rng.permutation(3)", False),
        ("rng.random(3)", False),
        ("random.shuffle(x)", True),
        ("random.Random(3)", False),
        ("rng.normal(size=3)", False),
        ("np.random.get_state()", True),
    ],
)
def test_the_search_for_global_draws_finds_them(line, draws):
    [call] = [node for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Call)][:1]
    assert draws_globally(call, ast.unparse(call.func), "some/file.py") == draws


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles(source):
    tree = ast.parse(source.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for call, name in calls(source):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name in ("torch.load", "torch.hub.load_state_dict_from_url"):
            assert keywords.get("weights_only") == "True", f"line {call.lineno}: {name} without weights_only=True"
        assert keywords.get("allow_pickle", "False") == "False", f"line {call.lineno}: allow_pickle"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_message_is_kept_alive_by_flowers_views_of_it(source):
    # `content.array_records` and its like leave a reference cycle that holds the message until the garbage collector runs
    views = {"array_records", "metric_records", "config_records", "parameters_records", "metrics_records", "configs_records"}
    used = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Attribute) and node.attr in views]
    assert not [f"line {node.lineno}: {ast.unparse(node)}" for node in used], "use fedvision.arrays.array_records and its neighbors"


# ---- files ----------------------------------------------------------------------------------------------------------


def tracked() -> list[Path]:
    """The text files of the repository."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    files = [ROOT / name for name in listed.stdout.splitlines()]
    return [path for path in files if path.is_file() and b"\0" not in path.read_bytes()[:8000]]


def test_no_file_names_a_place_on_one_machine():
    places = re.compile(r"/(?:work|home|root|Users)/[\w.]+|https?://[\w.:-]*(?:pypi|simple|artifactory|nexus|proxy|mirror)[\w.:-]*/")
    public = re.compile(r"https?://(?:pypi\.org|files\.pythonhosted\.org|docs\.)")
    odd = []
    for path in tracked():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            found = [place for place in places.findall(line) if not public.match(place)]
            odd += [f"{path.relative_to(ROOT)}:{number}: {place}" for place in found if path != Path(__file__)]
    assert not odd


def test_no_large_file_is_in_the_repository():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()
    large = {name: size for name in listed if (ROOT / name).is_file() and (size := (ROOT / name).stat().st_size) > 1_000_000}
    assert not large


def test_every_bundled_experiment_begins_with_a_line_for_the_list():
    for path in sorted((ROOT / "benchmarks" / "experiments").glob("*.toml")):
        first = path.read_text().splitlines()[0]
        assert first.startswith("# ") and first.endswith((".", ":")), (
            f"{path.name} begins with {first!r}, not with a comment that is a sentence"
        )


def test_every_module_says_what_it_is():
    for source in SOURCES:
        tree = ast.parse(source.read_text())
        assert ast.get_docstring(tree) or not tree.body, f"{source.relative_to(ROOT)} has no docstring"


# ---- documentation --------------------------------------------------------------------------------------------------

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = sorted({ROOT / "README.md", ROOT / "docs" / "tour.md", *(ROOT / "docs").glob("*.md")})


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_python_of_the_documentation_runs(page, tmp_path):
    if not page.exists():
        pytest.skip(f"{page.relative_to(ROOT)} is not written yet")
    blocks = BLOCK.findall(page.read_text())
    if not blocks:
        pytest.skip(f"{page.relative_to(ROOT)} holds no python")
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(blocks))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


RUN_APP = """
import importlib, sys, tomllib
from flwr.app import Context, RecordDict
from fedvision.grids.in_process import InProcessGrid

app = tomllib.loads(open(sys.argv[1] + "/pyproject.toml").read())["tool"]["flwr"]["app"]
sys.path.insert(0, sys.argv[1])
names = [app["components"][kind].split(":") for kind in ("serverapp", "clientapp")]
server, client = (getattr(importlib.import_module(module), attribute) for module, attribute in names)
config = app.get("config", {}) | {"rounds": 2}
with InProcessGrid(client, config, int(config.get("clients", 3))) as grid:
    server(grid, Context(1, 0, {}, RecordDict(), config))
"""
"""Runs the Flower app in a folder over the in-process grid, for two rounds."""


@pytest.mark.slow
@pytest.mark.parametrize("app", sorted((ROOT / "docs").rglob("pyproject.toml")), ids=lambda path: path.parent.name)
def test_the_flower_apps_of_the_documentation_run(app, tmp_path):
    line = [sys.executable, "-c", RUN_APP, str(app.parent)]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_links_of_the_documentation_lead_somewhere(page):
    if not page.exists():
        pytest.skip(f"{page.relative_to(ROOT)} is not written yet")
    for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
