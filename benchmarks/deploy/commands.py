"""``fedvision deploy``: keys, checks and runs of real silos."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedvision.errors import EngineError

KEYS, RUNS = "FEDVISION_KEYS", "FEDVISION_RUNS"
"""Environment variables: the coordinator's folder, of those that ``keys`` makes; where the coordinator's runs are."""

console = Console()
app = typer.Typer(
    name="deploy", help="Real silos: make keys, check, run, look.", no_args_is_help=True, add_completion=False, rich_markup_mode="rich"
)

ExperimentArgument = Annotated[str, typer.Argument(help="An experiment file, or the name of a bundled experiment.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a value. May be repeated.")]
ConnectionOption = Annotated[str, typer.Option(help="The coordinator: a connection of Flower's config.toml.")]
KeysOption = Annotated[Path, typer.Option("--keys", envvar=KEYS, help="The coordinator's folder, of those that `deploy keys` makes.")]
AddressOption = Annotated[str, typer.Option(help="Where silos reach the coordinator, host:port.")]


NameOption = Annotated[list[str] | None, typer.Option(help="A host name or address of the coordinator. May be repeated.")]
SilosOption = Annotated[int, typer.Option(min=1, help="How many.")]
DaysOption = Annotated[int, typer.Option(min=1, help="How long the server's certificate is valid.")]
FederationArgument = Annotated[Path, typer.Argument(help="The folder that `deploy keys` made.")]


class Places(StrEnum):
    """Where the services of the compose file run on one machine."""

    loopback = "loopback"
    namespaces = "namespaces"
    containers = "containers"


@app.command()
def keys(
    name: NameOption = None,
    silos: SilosOption = 3,
    days: DaysOption = 397,
    out: Annotated[Path, typer.Option(help="The folder to make.")] = Path("federation"),
) -> None:
    """Make an authority, the coordinator's certificate and the silos' keys; nothing is ever overwritten."""
    from benchmarks.deploy.keys import Federation

    made = Federation.make(out, name or [], silos, days)
    for folder, purpose in [
        (made.folder / "authority", "signs certificates; keep it offline"),
        (made.coordinator, "for the coordinator"),
        *((made.silo(number), "for this silo alone") for number in range(silos)),
    ]:
        console.print(f"{folder}: {purpose}", soft_wrap=True, highlight=False)


@app.command()
def renew(
    folder: FederationArgument = Path("federation"),
    name: NameOption = None,
    days: DaysOption = 397,
) -> None:
    """Give the coordinator a new certificate of the same authority; silos keep what they have."""
    from benchmarks.deploy.keys import Federation

    Federation(folder.absolute()).renew(name or [], days)
    console.print(f"{folder / 'coordinator'}: a new certificate; start the SuperLink again", soft_wrap=True, highlight=False)


@app.command()
def admit(folder: FederationArgument = Path("federation"), silos: SilosOption = 1) -> None:
    """Make keys for further silos."""
    from benchmarks.deploy.keys import Federation

    for made in Federation(folder.absolute()).admit(silos):
        console.print(f"{made}: for this silo alone", soft_wrap=True, highlight=False)


@app.command()
def check(
    connection: ConnectionOption = "silos",
    folder: KeysOption = Path("federation/coordinator"),
    address: AddressOption = "superlink:9092",
) -> None:
    """Check keys, certificates, ports and registered silos; the status is 1 if something is wrong."""
    from benchmarks.deploy.checks import examine

    found = list(examine(folder, connection, address))
    for finding in found:
        console.print(f"  {'[green]ok[/]' if finding.good else '[red]no[/]'}  ", end="")
        console.print(f"{finding.what}: {finding.fact}", soft_wrap=True, highlight=False, markup=False)
    if not all(finding.good for finding in found):
        raise typer.Exit(1)


@app.command()
def register(connection: ConnectionOption = "silos", folder: KeysOption = Path("federation/coordinator")) -> None:
    """Register the silos' public keys with the coordinator; those that are known stay as they are."""
    from benchmarks.deploy.coordinator import Coordinator
    from benchmarks.deploy.keys import public_keys

    known = public_keys(folder.absolute())
    new = Coordinator(connection).register(known)
    console.print(f"{len(known)} silos are registered, {len(new)} of them new", highlight=False)


@app.command()
def run(
    experiment: ExperimentArgument,
    connection: ConnectionOption = "silos",
    overrides: SetOption = None,
    folder: KeysOption = Path("federation/coordinator"),
    runs: Annotated[Path, typer.Option(envvar=RUNS, help="Where the coordinator's runs are mounted here.")] = Path("federation/runs"),
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/NAME-FINGERPRINT if not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that the folder holds.")] = False,
) -> None:
    """Register the silos, run an experiment on them, follow it, and bring its folder here.

    The status is 0 if it finished and no answer was lost, 1 if it failed, 3 if some clients' answers were lost or refused.
    """
    from benchmarks import cli

    register(connection, folder)
    if not runs.is_dir():
        raise EngineError(f"{runs} is no folder; mount the coordinator's runs here, and name the place with --runs or {RUNS}")
    engine = {"engine.name": "flower", "engine.connection": connection, "engine.runs": str(runs.absolute())}
    cli.run(experiment, [*(overrides or []), *(f"{key}={value!r}" for key, value in engine.items())], out, resume, None)


@app.command()
def status(connection: ConnectionOption = "silos", last: Annotated[int, typer.Option(min=1, help="How many runs to show.")] = 5) -> None:
    """Show which silos are registered and online, and how the last runs ended."""
    from benchmarks.deploy.coordinator import Coordinator

    coordinator = Coordinator(connection)
    for node in coordinator.nodes():
        console.print(f"silo {node['node-id']}: {node['status']}", soft_wrap=True, highlight=False)
    for told in coordinator.runs()[:last]:
        console.print(f"run {told['run-id']}: {told['status']}", soft_wrap=True, highlight=False)


@app.command()
def demo(
    experiment: Annotated[str | None, typer.Argument(help="Of three clients; if not given, three rounds of quickstart.")] = None,
    overrides: SetOption = None,
    places: Annotated[
        Places, typer.Option(help="All on 127.0.0.1, or each service in a network namespace (as root) or a container of podman's.")
    ] = Places.loopback,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/NAME-FINGERPRINT if not given.")] = None,
) -> None:
    """Bring coordinator and three silos up on this machine, with TLS and keys made for it, run an experiment, and leave nothing running."""
    from benchmarks.deploy.demonstration import SHORT, demonstrate

    outcome, folder = demonstrate(experiment or "quickstart", [*(() if experiment else SHORT), *(overrides or [])], places.value, out)
    console.print(f"kept in {folder}", soft_wrap=True, highlight=False)
    if outcome:
        raise typer.Exit(outcome)
