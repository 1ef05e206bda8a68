"""A small certificate authority: EC P-256, one level, one federation.

`fed-coordinator init` makes one whose key is encrypted at rest (`authority_files.py`); `fedcore up` makes one for
development, whose key is not. A holder of the key can impersonate every party of the federation.

Invariant: an issued certificate has one use. A coordinator's is for servers only, every other one for clients
only (extended key usage, RFC 5280 section 4.2.1.12); only a coordinator's names hosts; none is valid longer
than the authority.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedcore.errors import BadInput, CertificateRefused
from fedcore.files import write_atomic
from fedcore.identity import kit
from fedcore.identity.peer import check_name, identity_uri, peer_of, read_certificate
from fedcore.secagg.crypto.secret import SecretBytes

LOOPBACK = ("localhost", "127.0.0.1", "::1")
AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 90
BACKDATED = timedelta(minutes=5)
"""How long before its making a certificate becomes valid: clocks of two machines differ by seconds."""

_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*")

COMMON_NAME = "fedcore "
"""Begins the common name of every certificate that an authority of ours made, its own included."""


@dataclass(frozen=True)
class Issued:
    """A certificate with its key, not yet on disk."""

    certificate_pem: bytes
    authority_pem: bytes
    key_pem: SecretBytes

    def save(self, folder: Path) -> kit.Kit:
        """Write the three files of a kit; the key is readable by its owner only. Raises AlreadyExists if the folder
        has a key, BadInput if it cannot be written."""
        _make(folder)
        kit.write_private(folder / kit.KEY_FILE, self.key_pem)  # first: it refuses an existing key
        write_atomic(folder / kit.CERTIFICATE_FILE, self.certificate_pem)
        write_atomic(folder / kit.AUTHORITY_FILE, self.authority_pem)
        return kit.Kit.load(folder)


@dataclass(frozen=True)
class Authority:
    """Issues the certificates of one federation. Its key prints redacted."""

    federation: str
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def create(
        cls,
        federation: str,
        now: datetime,
        *,
        days: int = AUTHORITY_DAYS,
        key: ec.EllipticCurvePrivateKey | None = None,
    ) -> Authority:
        """A new authority with a new key, or with this one on P-256. now: with a time zone. Raises BadInput."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        name = _distinguished(check_name("federation", federation), "authority")
        begins = now - BACKDATED
        ends = begins + timedelta(days=days)
        builder = _builder(name, name, key.public_key(), begins, ends, signs_certificates=True)
        return cls(federation, builder.sign(key, hashes.SHA256()), key)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of its certificate: what parties compare, and what a join line names."""
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    def sign(self, message: bytes) -> bytes:
        """ECDSA P-256 with SHA-256, DER. The message's first byte must differ from 0x30, with which the body of a
        certificate begins."""
        return self.key.sign(message, ec.ECDSA(hashes.SHA256()))

    @property
    def certificate_pem(self) -> bytes:
        """The certificate that every party of the federation trusts, as PEM."""
        return _pem(self.certificate)

    @classmethod
    def of(cls, pem: bytes, key: PrivateKeyTypes, where: str) -> Authority:
        """The authority of a certificate and its key. where: of the key. Raises BadInput for another key."""
        certificate = read_certificate(pem)
        if (
            not isinstance(key, ec.EllipticCurvePrivateKey)
            or key.public_key() != certificate.public_key()
        ):
            raise BadInput(
                f"{where}: found the key of another certificate than {kit.AUTHORITY_FILE}'s"
            )
        return cls(federation_of(pem), certificate, key)

    def issue(
        self,
        role: str,
        name: str,
        now: datetime,
        *,
        hosts: Sequence[str] = (),
        days: float = CERTIFICATE_DAYS,
    ) -> Issued:
        """A certificate with a new key; otherwise as `certify`."""
        key = ec.generate_private_key(ec.SECP256R1())
        pem = self.certify(key.public_key(), role, name, now, hosts=hosts, days=days)
        return Issued(pem, self.certificate_pem, kit.key_pem(key))

    def certify(
        self,
        public: ec.EllipticCurvePublicKey,
        role: str,
        name: str,
        now: datetime,
        *,
        hosts: Sequence[str] = (),
        days: float = CERTIFICATE_DAYS,
    ) -> bytes:
        """A certificate for the holder of a key, as PEM. hosts: DNS names and addresses of a coordinator (required).
        Raises BadInput, UnknownName."""
        uri = identity_uri(self.federation, role, name)
        serves = role == "coordinator"
        if serves and not hosts:
            raise BadInput(
                "hosts: found none, expected the names sites use to reach the coordinator"
            )
        if hosts and not serves:
            raise BadInput(f"hosts: found {', '.join(hosts)} for role {role!r}, expected none")
        begins = max(now - BACKDATED, self.certificate.not_valid_before_utc)
        ends = min(now + timedelta(days=days), self.certificate.not_valid_after_utc)
        if ends <= begins:
            raise BadInput(
                f"authority of {self.federation!r}: found its end at {ends:%Y-%m-%d}, expected one to come"
            )
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if serves else ExtendedKeyUsageOID.CLIENT_AUTH
        names = [x509.UniformResourceIdentifier(uri), *map(host_name, hosts)]
        subject = _distinguished(self.federation, f"{role} {name}")
        issuer = self.certificate.subject
        signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        certificate = (
            _builder(subject, issuer, public, begins, ends, signs_certificates=False)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(signer, critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return _pem(certificate)

    def renew(
        self, certificate_pem: bytes, now: datetime, *, hosts: Sequence[str] = (), days: float
    ) -> bytes:
        """A certificate like this one of the same authority (key, role, name, hosts), for further hosts too, as PEM.
        Raises BadInput, CertificateRefused."""
        peer, certificate = peer_of(certificate_pem), read_certificate(certificate_pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        known = [
            str(each.value) for each in names if isinstance(each, x509.DNSName | x509.IPAddress)
        ]
        public = certificate.public_key()
        if peer.federation != self.federation or not isinstance(public, ec.EllipticCurvePublicKey):
            raise BadInput(f"certificate of {peer}: expected one of {self.federation!r}")
        serves = peer.role == "coordinator"
        together = tuple(dict.fromkeys((*known, *hosts))) if serves else ()
        return self.certify(public, peer.role, peer.name, now, hosts=together, days=days)

    def save(self, folder: Path, password: SecretBytes | None = None) -> None:
        """Write `authority.pem` and `key.pem`, which the password encrypts. Raises AlreadyExists, BadInput."""
        _make(folder)
        kit.write_private(folder / kit.KEY_FILE, kit.key_pem(self.key, password))
        write_atomic(folder / kit.AUTHORITY_FILE, self.certificate_pem)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    begins: datetime,
    ends: datetime,
    *,
    signs_certificates: bool,
) -> x509.CertificateBuilder:
    """A certificate of an authority (signs_certificates) or of a party, still without its other extensions."""
    others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    usage = x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        **dict.fromkeys((*others, "encipher_only", "decipher_only"), False),
    )
    length = 0 if signs_certificates else None
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.BasicConstraints(signs_certificates, length), critical=True)
        .add_extension(usage, critical=True)
    )


def _distinguished(federation: str, common: str) -> x509.Name:
    """The common name has a space, so that no program takes it for a host name."""
    text = f"{COMMON_NAME}{common}"[:64]
    names = {NameOID.ORGANIZATION_NAME: federation, NameOID.COMMON_NAME: text}
    return x509.Name([x509.NameAttribute(kind, text) for kind, text in names.items()])


def federation_of(authority_pem: bytes) -> str:
    """The federation that an authority's certificate names. Raises CertificateRefused."""
    subject = read_certificate(authority_pem).subject
    names = subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    try:
        return check_name("federation", str(names[0].value if names else ""))
    except BadInput as error:
        raise CertificateRefused(f"authority: {error}", check="federation") from None


def host_name(host: str) -> x509.GeneralName:
    """A host as a certificate names it. Raises BadInput."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not _HOST.fullmatch(host):
            raise BadInput(
                f"hosts: found {host!r}, expected a DNS name or an address, without port or brackets"
            ) from None
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        what = f"{folder}: {error.strerror}, expected a folder that can be written"
        raise BadInput(what) from error
