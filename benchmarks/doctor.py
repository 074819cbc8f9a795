"""`fedvision doctor`: is everything here, and how to get what is not."""

import os
import platform
import shutil
import sys
from importlib import metadata
from importlib.util import find_spec

from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape

from fedvision.experiment import bundled

EXTRAS = {"transformers": ("`fedvision pseudo-labels`", "pip install 'fedvision[pseudo-labels]'")}
"""Packages that only some commands need: which, and what installs them."""

OPTIONAL = {
    "docker": "real silos in containers: install Docker Engine with the compose plugin, or podman with podman-compose",
    "openssl": "TLS certificates for real silos: install the package openssl",
    "ssh-keygen": "keys of real silos: install the package openssh-client",
    "git": "the commit in a run's manifest: install the package git",
}

OK, NO, WITHOUT = "[green]ok[/]", "[red]no[/]", "[yellow]--[/]"
"""What stands before a line: it is there, it is missing or wrong, one can do without it."""

NAME_WIDTH = 20
"""Columns of the names of packages and programs."""


def examine(console: Console) -> int:
    """Print the state of the installation; 0 if FedVision can run, 1 if something needed is missing."""
    console.print(f"Python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPUs\n")
    complete = _packages(console)
    _devices(console)
    _optional(console)
    console.print("[green]FedVision can run.[/]" if complete else "[red]Something that FedVision needs is missing; see above.[/]")
    return 0 if complete else 1


def _packages(console: Console) -> bool:
    console.print("[bold]packages[/]")
    complete = True
    for line in metadata.requires("fedvision") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
            fits = requirement.specifier.contains(version, prereleases=True)
        except metadata.PackageNotFoundError:
            version, fits = "missing", False
        complete = complete and fits
        advice = "" if fits else f"  needs {requirement.specifier or 'any version'}: run `make setup`"
        _tell(console, OK if fits else NO, requirement.name, f"{version}{advice}")
    console.print()
    return complete


def _devices(console: Console) -> None:
    import torch

    console.print("[bold]devices[/]")
    console.print(f"  cpu: {torch.get_num_threads()} threads by default; an experiment's key `threads` decides")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        size = f"{properties.total_memory / 2**30:.0f} GiB"
        console.print(f"  cuda:{index}: {properties.name}, {size}; use it with --set engine.device=cuda:{index}")
    if not torch.cuda.is_available():
        console.print("  no GPU: everything runs on the CPU")
    console.print()


def _optional(console: Console) -> None:
    console.print("[bold]optional parts[/]")
    for package, (purpose, command) in EXTRAS.items():
        if find_spec(package) is not None:
            _tell(console, OK, package, metadata.version(package))
        else:
            _tell(console, WITHOUT, package, f"not found; for {purpose}, run", command)
    for program, purpose in OPTIONAL.items():
        found = shutil.which(program)
        _tell(console, OK if found else WITHOUT, program, found or f"not found; for {purpose}")
    writable = os.access(".", os.W_OK)
    free = shutil.disk_usage(".").free / 2**30
    _tell(console, OK if writable else NO, "this folder", f"{'writable' if writable else 'not writable'}, {free:.0f} GiB free")
    _tell(console, OK, "bundled experiments", f"{len(bundled())}, see `fedvision list experiments`")
    _tell(console, OK, "interpreter", sys.executable)
    console.print()


def _tell(console: Console, mark: str, name: str, *lines: str) -> None:
    """Print what was found of something. No line is cut or broken, whatever the width: what is to be copied stays in one piece."""
    first, *others = map(escape, lines)
    console.print(f"  {mark}  {name:<{NAME_WIDTH}}  {first}", soft_wrap=True, highlight=False)
    for line in others:
        console.print(f"{' ' * (NAME_WIDTH + 8)}{line}", soft_wrap=True, highlight=False)
