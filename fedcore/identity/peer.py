"""The party that a certificate names by one URI, `fedcore://<federation>/<role>/<name>`, and its checks.

Invariant: a certificate names exactly one party; one with two such URIs, or with another spelling, is refused.
TLS verifies the issuer before anything here is called.
The URI is a subject alternative name (RFC 5280, section 4.2.1.6).
"""

import re
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from fedcore.errors import BadInput, CertificateRefused, UnknownName

ROLES = ("coordinator", "site", "operator", "observer")
CLIENT_ROLES = ("site", "operator", "observer")
"""Roles of clients; the coordinator is the server."""

MOST_NAME = 64
"""Characters of a name."""

_NAME = rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MOST_NAME - 1}}}"
_URI = re.compile(rf"fedcore://({_NAME})/({'|'.join(ROLES)})/({_NAME})")


@dataclass(frozen=True)
class Peer:
    """One party as its certificate names it. begins, ends: its validity, in UTC."""

    federation: str
    role: str
    name: str
    serial: str  # hex, as `openssl x509 -serial` prints it but lower case
    fingerprint: str  # hex SHA-256 of the certificate
    begins: datetime
    ends: datetime

    def __str__(self) -> str:
        """For messages, with the serial number that an operator writes into the revocation list."""
        return f"{self.role} {self.name!r} of {self.federation!r}, serial {self.serial}"


def check_name(what: str, name: str) -> str:
    """`name`, if a certificate can contain it. Raises BadInput."""
    if not re.fullmatch(_NAME, name):
        raise BadInput(
            f"{what}: found {name!r}, expected 1 to 64 letters, digits, '.', '_' or '-', "
            "beginning with a letter or a digit",
            remedy="such as north-2: the name stands in certificates, and folders are named after it",
        )
    return name


NO_SITE = ("coordinator", "operator", "observer", "authority")
"""Other parties of a federation: a log that names one of them means that party."""

_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
"""Names of devices on Windows, where no folder can have them."""


def check_sites(names: Iterable[str], where: str = "sites", *, deployed: bool) -> None:
    """Refuse names that no federation may have: of another party, of a device or a path, or two of which differ in
    nothing but case, so that their folders would be one on some systems.

    deployed: the names stand in certificates too (`check_name`). Raises BadInput.
    """
    seen: dict[str, str] = {}
    for name in names:
        if deployed:
            check_name(where, name)
        if not name.strip() or len(name) > MOST_NAME or not name.isprintable():
            raise BadInput(f"{where}: found the name {name!r}, expected 1 to 64 visible characters")
        what = ""
        if name.casefold() in NO_SITE:
            what = "which is another party of a federation"
        elif _DEVICES.fullmatch(name):
            what = "which is a device on Windows"
        elif "/" in name or "\\" in name or name.endswith(".") or name != name.strip():
            what = "which is no name of a folder everywhere"
        if what:
            raise BadInput(
                f"{where}: found a site named {name!r}, {what}",
                remedy="another name: it is that of the site's folder and stands in logs and reports",
            )
        folded = unicodedata.normalize("NFKC", name).casefold()
        if folded in seen:
            raise BadInput(
                f"{where}: found the names {seen[folded]!r} and {name!r}, expected names that differ in more than "
                "case or spelling",
                remedy="on some systems both would have one folder",
            )
        seen[folded] = name


def identity_uri(federation: str, role: str, name: str) -> str:
    """The URI that names a party in its certificate. Raises BadInput, UnknownName."""
    if role not in ROLES:
        raise UnknownName("role", role, ROLES)
    return f"fedcore://{check_name('federation', federation)}/{role}/{check_name('name', name)}"


def peer_of(certificate_pem: bytes) -> Peer:
    """The party that a certificate names. Raises CertificateRefused if it names none, or several."""
    certificate = read_certificate(certificate_pem)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    ours = [uri for uri in uris if uri.casefold().startswith("fedcore:")]
    match = _URI.fullmatch(ours[0]) if len(ours) == 1 else None
    if match is None:
        raise CertificateRefused(
            f"certificate: found {', '.join(map(repr, ours)) or 'no federation'} in it, "
            "expected one fedcore://FEDERATION/ROLE/NAME",
            check="role",
            remedy="use the certificate that was issued for this federation",
        )
    federation, role, name = match.groups()
    return Peer(
        federation, role, name, f"{certificate.serial_number:x}",
        certificate.fingerprint(hashes.SHA256()).hex(),
        certificate.not_valid_before_utc, certificate.not_valid_after_utc,
    )  # fmt: skip


def read_certificate(certificate_pem: bytes) -> x509.Certificate:
    """The first certificate of a PEM text. Raises CertificateRefused."""
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        _ = certificate.extensions  # parsed on first use only
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        raise CertificateRefused(
            "certificate: found bytes that are no X.509 certificate, expected one in PEM form",
            check="readable",
        ) from None
    return certificate


def require_federation(peer: Peer, federation: str) -> None:
    """Return if the peer belongs to this federation, else raise CertificateRefused."""
    if peer.federation != federation:
        raise CertificateRefused(
            f"certificate of {peer}: found federation {peer.federation!r}, expected {federation!r}",
            check="federation",
            remedy=f"use the certificate that was issued for {federation!r}",
        )


def require_role(peer: Peer, roles: Collection[str]) -> None:
    """Return if the peer holds one of `roles`, else raise CertificateRefused."""
    if peer.role not in roles:
        raise CertificateRefused(
            f"certificate of {peer}: found role {peer.role!r}, expected {' or '.join(sorted(roles))}",
            check="role",
            remedy="each role has a certificate of its own; ask the operator for the right one",
        )


def require_time(whose: str, begins: datetime, ends: datetime, now: datetime) -> None:
    """Return if `now` (with a zone) lies in a certificate's time, else raise CertificateRefused. whose: its holder."""
    if now < begins:
        raise CertificateRefused(
            f"certificate of {whose}: found not valid before {_time(begins)}, expected a beginning "
            f"before {_time(now)}, the time here",
            check="begins",
            remedy="compare the clocks of both machines: one of them is wrong, or wait until then",
        )
    if now > ends:
        raise CertificateRefused(
            f"certificate of {whose}: found expired since {_time(ends)}, expected an end after "
            f"{_time(now)}, the time here",
            check="expired",
            remedy="have a new certificate issued; if that date is still to come, the clock here is wrong",
        )


def require_rostered(peer: Peer, roster: Collection[str]) -> None:
    """Return unless the peer is a site that `roster` does not name: then raise CertificateRefused."""
    if peer.role == "site" and peer.name not in roster:
        raise CertificateRefused(
            f"certificate of {peer}: found site {peer.name!r}, expected one of the roster's "
            f"{len(roster)} sites",
            check="roster",
            remedy=f"the operator adds {peer.name!r} and its identity key to roster.toml",
        )


def _time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"
