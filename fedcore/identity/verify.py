"""All checks of one certificate, in an order that is easy to follow.

TLS itself reports only `certificate verify failed`, and a gRPC server closes the connection without a reason.
So both sides also check here, and name the certificate, the name in it and the check that it fails.

Invariant: nothing here accepts a connection. It is called before a connection is tried, or after TLS refused
one. Text from the other side is shortened and made printable.
"""

import ipaddress
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedcore.errors import CertificateRefused, printable
from fedcore.identity.peer import (
    Peer,
    peer_of,
    read_certificate,
    require_federation,
    require_role,
    require_time,
)


def check_certificate(
    certificate_pem: bytes,
    authority_pem: bytes,
    *,
    federation: str,
    role: str,
    now: datetime,
    host: str = "",
) -> Peer:
    """The party of a certificate that passes every check. Raises CertificateRefused for the first that fails.

    authority_pem: the trusted certificates, of which one must be the issuer. host: the name or address
    under which its holder was reached; empty for a client.
    """
    certificate = read_certificate(certificate_pem)
    whose = _holder(certificate_pem, certificate)
    authority = _issuer(certificate, authority_pem, whose)
    for holder, one in (
        (whose, certificate),
        (printable(f"authority {_subject(authority)}"), authority),
    ):
        require_time(holder, one.not_valid_before_utc, one.not_valid_after_utc, now)
    peer = peer_of(certificate_pem)
    require_federation(peer, federation)
    require_role(peer, [role])
    _require_usage(certificate, whose, serves=role == "coordinator")
    if host:
        _require_host(certificate, whose, host)
    return peer


def fingerprint(certificate_pem: bytes) -> str:
    """Hex SHA-256 of a certificate, for operators to compare. Raises CertificateRefused."""
    return read_certificate(certificate_pem).fingerprint(hashes.SHA256()).hex()


def _issuer(certificate: x509.Certificate, authority_pem: bytes, whose: str) -> x509.Certificate:
    authorities = x509.load_pem_x509_certificates(authority_pem)
    for authority in authorities:
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return authority
    known = ", ".join(
        f"{_subject(one)} ({one.fingerprint(hashes.SHA256()).hex()[:16]})" for one in authorities
    )
    found = f"issuer {printable(certificate.issuer.rfc4514_string())}"
    if certificate.issuer == certificate.subject:
        found = "itself as issuer"
    raise CertificateRefused(
        f"certificate of {whose}: found {found} that is not trusted here, expected {known}",
        check="issuer",
        remedy="both sides need the same authority.pem: compare its SHA-256 fingerprint with the operator",
    )


def _require_usage(certificate: x509.Certificate, whose: str, *, serves: bool) -> None:
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if serves else ExtendedKeyUsageOID.CLIENT_AUTH
    try:
        usage = list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return  # RFC 5280: without the extension every use is allowed
    if purpose not in usage:
        raise CertificateRefused(
            f"certificate of {whose}: found one that may not {'serve' if serves else 'connect'}, "
            f"expected the usage {'serverAuth' if serves else 'clientAuth'}",
            check="usage",
            remedy="each role has a certificate of its own; ask the operator for the right one",
        )


def made_out_to(certificate: x509.Certificate, host: str) -> bool:
    """Whether a certificate has this name or address among its alternative names."""
    hosts, addresses = _hosts(certificate)
    try:
        return str(ipaddress.ip_address(host)) in addresses
    except ValueError:
        return any(_matches(one.lower(), host.lower()) for one in hosts)


def _hosts(certificate: x509.Certificate) -> tuple[list[str], list[str]]:
    """The names and the addresses in a certificate."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return [], []
    found = names.get_values_for_type(x509.IPAddress)
    return names.get_values_for_type(x509.DNSName), [str(one) for one in found]


def _require_host(certificate: x509.Certificate, whose: str, host: str) -> None:
    if not made_out_to(certificate, host):
        hosts, addresses = _hosts(certificate)
        raise CertificateRefused(
            f"certificate of {whose}: found it made out to "
            f"{printable(', '.join([*hosts, *addresses])) or 'no host'}, expected {host}",
            check="host",
            remedy="connect under one of these names, or have a certificate issued for this one",
        )


def _matches(pattern: str, host: str) -> bool:
    """A `*` stands for one whole first label (RFC 6125, section 6.4.3)."""
    first, _, rest = host.partition(".")
    return pattern == host or (bool(first) and pattern == f"*.{rest}")


def _holder(certificate_pem: bytes, certificate: x509.Certificate) -> str:
    try:
        return str(peer_of(certificate_pem))
    except CertificateRefused:
        return printable(f"{_subject(certificate)}, serial {certificate.serial_number:x}")


def _subject(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string() or "nobody"
