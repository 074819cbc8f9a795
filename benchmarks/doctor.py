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
from rich.table import Table

from fedvision.experiment import bundled

EXTRAS = {"transformers": "`fedvision pseudo-labels`: pip install 'fedvision[pseudo-labels]'"}
"""Packages that only some commands need."""

OPTIONAL = {
    "docker": "real silos in containers: install Docker Engine with the compose plugin, or podman with podman-compose",
    "openssl": "TLS certificates for real silos: install the package openssl",
    "ssh-keygen": "keys of real silos: install the package openssh-client",
    "git": "the commit in a run's manifest: install the package git",
}


def examine(console: Console) -> int:
    """Print the state of the installation; 0 if FedVision can run, 1 if something needed is missing."""
    console.print(f"Python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPUs\n")
    complete = _packages(console)
    _devices(console)
    _optional(console)
    console.print("[green]FedVision can run.[/]" if complete else "[red]Something that FedVision needs is missing; see above.[/]")
    return 0 if complete else 1


def _packages(console: Console) -> bool:
    table = Table(title="packages", title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 2))
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
        advice = "" if fits else f"needs {requirement.specifier or 'any version'}: run `make setup`"
        table.add_row("[green]ok[/]" if fits else "[red]no[/]", requirement.name, version, advice)
    console.print(table, "")
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
    table = Table(title="optional parts", title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 2))
    for package, purpose in EXTRAS.items():
        there = find_spec(package) is not None
        table.add_row(
            "[green]ok[/]" if there else "[yellow]--[/]",
            package,
            metadata.version(package) if there else f"not found; for {escape(purpose)}",
        )
    for program, purpose in OPTIONAL.items():
        found = shutil.which(program)
        table.add_row("[green]ok[/]" if found else "[yellow]--[/]", program, found or f"not found; for {purpose}")
    writable = os.access(".", os.W_OK)
    free = shutil.disk_usage(".").free / 2**30
    state = "writable" if writable else "not writable"
    table.add_row("[green]ok[/]" if writable else "[red]no[/]", "this folder", f"{state}, {free:.0f} GiB free")
    table.add_row("[green]ok[/]", "bundled experiments", ", ".join(bundled()))
    table.add_row("[green]ok[/]", "interpreter", sys.executable)
    console.print(table, "")
