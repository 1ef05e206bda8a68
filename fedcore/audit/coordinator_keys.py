"""Which keys may have signed a coordinator's trail: those of certificates that the authority issued to it.

A certificate is renewed now and then, so a long trail is signed under several. Each opening of the trail has its
certificate; whether it was valid is asked of the time at which it began, since an old trail stays true.
"""

from __future__ import annotations

from contextlib import suppress

from fedcore.audit.keys import certificate_key
from fedcore.audit.lines import Line
from fedcore.errors import BadInput, CertificateRefused
from fedcore.identity.peer import peer_of
from fedcore.identity.verify import check_certificate


def coordinator_keys(data: bytes, authority_pem: bytes, federation: str) -> set[str]:
    """The keys of all certificates in a coordinator's trail that are its federation's."""
    found = set()
    for raw in data.splitlines():
        if b'"event":"opened"' in raw:
            with suppress(BadInput, CertificateRefused):
                pem = str(Line.parse(raw).facts.get("certificate", "")).encode()
                found.add(trusted_key(pem, authority_pem, federation))
    return found


def trusted_key(pem: bytes, authority_pem: bytes, federation: str) -> str:
    """The key of a coordinator's certificate. Raises BadInput, and CertificateRefused unless this authority issued it
    to a coordinator of this federation."""
    when = peer_of(pem).begins
    check_certificate(pem, authority_pem, federation=federation, role="coordinator", now=when)
    return certificate_key(pem)
