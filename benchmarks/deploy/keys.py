"""Certificates and keys of a federation: pure functions that make them, and the folders that hold them."""

import ipaddress
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, SECP384R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedvision.errors import EngineError

NAMES = ("superlink", "control", "localhost", "127.0.0.1")
"""The names of the coordinator that every server certificate has: those of the compose file, and of the machine itself."""

AUTHORITY_DAYS, SKEW = 3650, timedelta(minutes=5)
"""How long the authority is valid; how far the clocks of the silos may be behind."""

SILO = """\
# What this silo trains on. While there is no [data] here, that is its share of the experiment's own data set.
# Paths are those that the silo's processes see: in the container, data is mounted at /data.
#
# classes = 10                # how many the federation knows, where this silo has examples of some only
#
# [data]
# name = "image-folder"
# root = "/data"
"""


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        """The certificate as a file holds it."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The key as a file holds it, unencrypted."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def authority(now: datetime) -> Pair:
    """A certificate authority that vouches for one federation's coordinator, and for nothing else."""
    key, name = generate_private_key(SECP256R1()), _name("FedVision federation")
    usage = x509.KeyUsage(
        key_cert_sign=True, crl_sign=True, digital_signature=False, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    made = _begun(name, name, key, now, AUTHORITY_DAYS)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True).add_extension(usage, critical=True)
    made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return Pair(made.sign(key, hashes.SHA256()), key)


def server(issuer: Pair, names: Sequence[str], now: datetime, days: int) -> Pair:
    """A server's certificate.

    Args:
        issuer: the authority that signs it.
        names: host names and addresses under which the server is reached.
        now: when it becomes valid, but for clocks that are behind.
        days: how long it is valid; none or fewer: a certificate that has expired.
    """
    key = generate_private_key(SECP256R1())
    made = _begun(_name(names[0]), issuer.certificate.subject, key, now, days)
    made = made.add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    known = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
    return Pair(made.add_extension(known, critical=False).sign(issuer.key, hashes.SHA256()), key)


def node() -> tuple[bytes, bytes]:
    """A silo's private and public key, in OpenSSH's format."""
    key = generate_private_key(SECP384R1())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), public + b"\n"


@dataclass(frozen=True)
class Federation:
    """The folder of a federation: one folder for each party, which gets that and no other.

    ``authority/`` signs and stays offline; ``coordinator/`` and ``silo0/``, ``silo1/``, ... go to where they run.

    Attributes:
        folder: that holds them.
    """

    folder: Path

    @property
    def coordinator(self) -> Path:
        """What the coordinator gets: certificates, the server's key, the silos' public keys."""
        return self.folder / "coordinator"

    def silo(self, number: int) -> Path:
        """What a silo gets: its private key, the authority's certificate, and a file in which it says what its data is."""
        return self.folder / f"silo{number}"

    @classmethod
    def make(cls, folder: Path, names: Sequence[str], silos: int, days: int, now: datetime | None = None) -> "Federation":
        """Make all keys and certificates.

        Args:
            folder: where; it must not exist, or be empty.
            names: host names and addresses of the coordinator, besides ``NAMES``.
            silos: how many.
            days: how long the server's certificate is valid.
            now: when it is made.

        Raises:
            EngineError: the folder holds something: keys are never overwritten.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise EngineError(f"{folder} is not empty, and keys are never overwritten; name another folder with --out, or move it away")
        made, now = cls(folder.absolute()), now or datetime.now(UTC)
        issuer = authority(now)
        signed = server(issuer, list(dict.fromkeys([*NAMES, *names])), now, days)
        for path, content, secret in made._files(issuer, signed):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write(path, content, secret)
        for name in ("runs", "state"):
            (made.folder / name).mkdir()
        made._admit(issuer, range(silos))
        return made

    def renew(self, names: Sequence[str], days: int, now: datetime | None = None) -> None:
        """Replace the coordinator's certificate and key by new ones of the same authority; silos keep what they have.

        Args:
            names: host names and addresses of the coordinator, besides those of the present certificate.
            days: how long the new certificate is valid.
            now: when it is made.

        Raises:
            EngineError: the authority's key is not here.
        """
        present = x509.load_pem_x509_certificate((self.coordinator / "server.crt").read_bytes())
        signed = server(self._issuer(), list(dict.fromkeys([*names_of(present), *names])), now or datetime.now(UTC), days)
        for path, content, secret in (("server.key", signed.key_pem, True), ("server.crt", signed.certificate_pem, False)):
            new = self.coordinator / f"{path}.new"
            new.unlink(missing_ok=True)
            write(new, content, secret)
            new.replace(self.coordinator / path)

    def admit(self, silos: int) -> list[Path]:
        """Make keys for further silos; their folders.

        Raises:
            EngineError: the authority's key is not here.
        """
        known = len(public_keys(self.coordinator))
        numbers = range(known, known + silos)
        self._admit(self._issuer(), numbers)
        return [self.silo(number) for number in numbers]

    def _admit(self, issuer: Pair, numbers: Sequence[int]) -> None:
        for number in numbers:
            private, public = node()
            for path, content, secret in (
                (self.silo(number) / "ca.crt", issuer.certificate_pem, False),
                (self.silo(number) / "node.key", private, True),
                (self.silo(number) / "silo.toml", SILO.encode(), False),
                (self.coordinator / "nodes" / f"silo{number}.pub", public, False),
            ):
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                write(path, content, secret)
            (self.silo(number) / "data").mkdir()
            (self.silo(number) / "state").mkdir()

    def _issuer(self) -> Pair:
        """The authority.

        Raises:
            EngineError: its key is not here.
        """
        folder = self.folder / "authority"
        try:
            key = load_pem_private_key((folder / "ca.key").read_bytes(), None)
            certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        except (OSError, ValueError) as error:
            raise EngineError(f"{folder}: the authority cannot sign ({error}); bring its folder back from where it is kept") from error
        assert isinstance(key, EllipticCurvePrivateKey)
        return Pair(certificate, key)

    def _files(self, issuer: Pair, signed: Pair) -> Iterator[tuple[Path, bytes, bool]]:
        """Each file of authority and coordinator, its content, and whether only its owner may read it."""
        yield self.folder / "authority" / "ca.key", issuer.key_pem, True
        yield self.folder / "authority" / "ca.crt", issuer.certificate_pem, False
        yield self.coordinator / "ca.crt", issuer.certificate_pem, False
        yield self.coordinator / "server.crt", signed.certificate_pem, False
        yield self.coordinator / "server.key", signed.key_pem, True
        yield self.coordinator / "superexec.secret", secrets.token_hex(32).encode(), True


def public_keys(coordinator: Path) -> dict[str, Path]:
    """The silos' public keys by name.

    Args:
        coordinator: its folder.

    Raises:
        EngineError: there are none.
    """
    found = {path.stem: path for path in sorted((coordinator / "nodes").glob("*.pub"))}
    if not found:
        raise EngineError(f"{coordinator / 'nodes'} has no public keys of silos; make them with `fedvision deploy keys`, or name --keys")
    return found


def names_of(certificate: x509.Certificate) -> list[str]:
    """The host names and addresses that a certificate is for."""
    try:
        named = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in named]


def write(path: Path, content: bytes, secret: bool) -> None:
    """Write a new file that only its owner may read if it is secret, from the moment it exists."""
    path.touch(mode=0o600 if secret else 0o644, exist_ok=False)
    path.write_bytes(content)


def _begun(subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, now: datetime, days: int) -> x509.CertificateBuilder:
    begin, end = now - SKEW, now + timedelta(days=days)
    if end <= begin:
        begin = end - timedelta(days=1)
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    return made.serial_number(x509.random_serial_number()).not_valid_before(begin).not_valid_after(end)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
