"""A connection that something on the way inspects: it ends TLS there, and shows a certificate of its own.

Firewalls and proxies of institutions do so, with an authority that the machine's browsers trust. Such a connection is
refused in any case; what is here gives the refusal its name.
"""

from __future__ import annotations

import ssl
from contextlib import suppress

from cryptography import x509
from cryptography.x509.oid import NameOID

from fedcore.errors import BadInput, CertificateRefused, printable
from fedcore.identity.addresses import authority_of
from fedcore.identity.authority import COMMON_NAME
from fedcore.identity.proxies import Proxy
from fedcore.identity.tunnel import connect
from fedcore.identity.verify import made_out_to

LOOK_SECONDS = 2.0
"""For a second look, where the first handshake failed without a certificate."""


def presented(host: str, port: int, proxy: Proxy | None, timeout: float) -> bytes:
    """The certificate shown at a port, as DER, whoever issued it; empty where there is none. Nothing is sent."""
    look = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    look.check_hostname, look.verify_mode = False, ssl.CERT_NONE
    with (
        suppress(OSError, BadInput),
        connect(host, port, proxy, timeout) as plain,
        look.wrap_socket(plain, server_hostname=host) as seen,
    ):
        return seen.getpeercert(binary_form=True) or b""
    return b""


def inspected(theirs: bytes, host: str, port: int) -> CertificateRefused | None:
    """The refusal of a certificate (DER) that no federation's authority issued; None for one of a federation, or one
    that names no issuer."""
    try:
        found = x509.load_der_x509_certificate(theirs)
        issuer, subject = found.issuer, found.subject
        names = [str(each.value) for each in issuer.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except ValueError:
        return None
    if issuer == subject or any(name.startswith(COMMON_NAME) for name in names):
        return None
    where, by = authority_of(host, port), printable(issuer.rfc4514_string())
    what = "the connection inspected on the way" if made_out_to(found, host) else "another server"
    return CertificateRefused(
        f"coordinator {where}: found {what}: a certificate that {by} issued, expected one of the federation's "
        "authority",
        check="inspected",
        remedy=f"nothing was sent. Have {where} exempted from TLS inspection, at the proxy or firewall that {by} "
        "belongs to" + ("" if what.startswith("the conn") else ", or correct host and port"),
    )
