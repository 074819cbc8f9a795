"""What can be wrong with a deployment, found before a run: files, certificates, ports, registered silos."""

import socket
import ssl
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from benchmarks.deploy.coordinator import Coordinator
from benchmarks.deploy.keys import names_of, public_keys
from fedvision.errors import EngineError

SOON = timedelta(days=30)
"""A certificate that expires within this time is to be renewed."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: it is.
        fact: what was found; with the remedy if it is wrong.
        good: whether it is as it must be.
    """

    what: str
    fact: str
    good: bool


def examine(folder: Path, connection: str, address: str, now: datetime | None = None) -> Iterator[Finding]:
    """Look at everything that a party can see.

    Args:
        folder: the party's, of those that ``fedvision deploy keys`` makes: the coordinator's or a silo's.
        connection: over which the coordinator asks its SuperLink; a silo has none.
        address: where silos reach the coordinator, ``host:port``.
        now: the time.

    Yields:
        Findings, in the order in which they are to be mended.
    """
    now = now or datetime.now(UTC)
    host, _, port = address.rpartition(":")
    yield from _secrets(folder)
    if (folder / "server.crt").exists():
        yield from certificates(folder, host, now)
    yield _handshake(folder / "ca.crt", host, int(port))
    if (folder / "nodes").is_dir():
        yield _registered(folder, connection)


def certificates(folder: Path, host: str, now: datetime) -> Iterator[Finding]:
    """The server's certificate: who signed it, when it is valid, which names it has."""
    served = x509.load_pem_x509_certificate((folder / "server.crt").read_bytes())
    issuer = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    renew = "renew it with `fedvision deploy renew`"
    try:
        served.verify_directly_issued_by(issuer)
        yield Finding("server.crt", "signed by ca.crt", True)
    except (ValueError, TypeError, InvalidSignature):
        yield Finding("server.crt", f"not signed by the authority of ca.crt; {renew} where that authority is", False)
    for name, certificate in (("ca.crt", issuer), ("server.crt", served)):
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        span = f"valid from {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC"
        if not begin <= now <= end:
            yield Finding(name, f"{span}, and it is {now:%Y-%m-%d %H:%M}; {renew}", False)
        else:
            yield Finding(name, span + (f", soon to be renewed: {renew}" if end - now < SOON else ""), True)
    names = names_of(served)
    told = f"names {', '.join(names)}"
    yield Finding("server.crt", told if host in names else f"{told}, but not {host}; {renew} --name {host}", host in names)


def _secrets(folder: Path) -> Iterator[Finding]:
    """Whether only their owner can read private files."""
    for path in [path for name in ("server.key", "superexec.secret", "node.key") if (path := folder / name).exists()]:
        mode = stat.S_IMODE(path.stat().st_mode)
        open_to_others = bool(mode & 0o077)
        yield Finding(path.name, f"mode {mode:o}" + ("; run chmod 600 on it" if open_to_others else ""), not open_to_others)


def _handshake(authority: Path, host: str, port: int) -> Finding:
    """Whether the coordinator answers, and is who it says."""
    what = f"{host}:{port}"
    try:
        context = ssl.create_default_context(cafile=str(authority))
    except OSError as error:
        return Finding(authority.name, f"{authority} cannot be read: {error}; name the party's folder with --keys", False)
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((host, port), timeout=5) as plain, context.wrap_socket(plain, server_hostname=host):
            return Finding(what, "reached, and its certificate is the authority's", True)
    except ssl.SSLCertVerificationError as error:
        return Finding(what, f"its certificate is refused: {error.verify_message}", False)
    except ssl.SSLError as error:
        return Finding(what, f"it does not speak TLS ({error.reason}); start the SuperLink with its certificates", False)
    except OSError as error:
        return Finding(what, f"not reached: {error}; start the coordinator, or open the port", False)


def _registered(folder: Path, connection: str) -> Finding:
    try:
        nodes, keys = Coordinator(connection).nodes(), public_keys(folder)
    except EngineError as error:
        return Finding("registered silos", str(error), False)
    online = sum(node["status"] == "online" for node in nodes)
    fact = f"{len(nodes)} registered, {online} online, {len(keys)} public keys"
    if len(nodes) < len(keys):
        return Finding("registered silos", f"{fact}; run `fedvision deploy register`", False)
    return Finding("registered silos", fact if online == len(keys) else f"{fact}; start the others", online == len(keys))
