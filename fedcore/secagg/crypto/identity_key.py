"""Ed25519 identities of the sites, pinned in the roster before a round begins (PROTOCOL C).

Invariant: a signature is over one label and one message; its bytes under another label never verify.
`protocol/` decides what the message contains, h first. Ed25519: RFC 8032.
"""

import hashlib
import os
from collections.abc import Mapping

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedcore.errors import BadInput, RosterRefused, SignatureRefused
from fedcore.secagg.crypto.secret import Secret
from fedcore.secagg.crypto.symmetric import Label, derive, framed
from fedcore.types import SiteId

PUBLIC_BYTES = 32

_PRIME = (1 << 255) - 19
_Y_OF_ORDER_8 = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
_SMALL_ORDER_Y = frozenset({0, 1, _PRIME - 1, _Y_OF_ORDER_8, _PRIME - _Y_OF_ORDER_8})
"""y of the eight points whose order divides 8: order 1 (1), 2 (-1), 4 (0) and 8 (tested)."""


class IdentityKey(Secret):
    """A site's long-lived signing key. Prints redacted."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes | None = None) -> None:
        """key: 32 bytes, drawn from the operating system when None. Raises BadInput."""
        raw = os.urandom(32) if key is None else key
        if len(raw) != 32:
            raise BadInput(f"identity key: found {len(raw)} bytes, expected 32")
        self._key = Ed25519PrivateKey.from_private_bytes(raw)

    @property
    def public(self) -> bytes:
        """32 bytes: what the roster pins."""
        return self._key.public_key().public_bytes_raw()

    def derive(self, purpose: bytes) -> bytes:
        """32 bytes for this purpose, the same for as long as the site has this identity."""
        return derive(self._key.private_bytes_raw(), Label.OF_IDENTITY, purpose)

    def sign(self, label: bytes, message: bytes) -> bytes:
        """64 bytes over label and message. Raises BadInput for a label with a zero byte."""
        return self._key.sign(_signed(label, message))


def verify(public: bytes, label: bytes, message: bytes, signature: bytes, *, signer: str) -> None:
    """Return if `signature` is `public`'s over label and message, else raise SignatureRefused."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _signed(label, message))
    except (InvalidSignature, ValueError):  # ValueError: a key of another length
        what = f"signature of {signer} on '{label.decode(errors='replace')}'"
        expected = "that of the pinned key over this very message"
        raise SignatureRefused(what, "one that does not verify", expected, signer) from None


def roster_digest(roster: Mapping[SiteId, bytes]) -> str:
    """Hex SHA-256 over (id, public key) pairs in the mapping's order, each framed by its length.

    Raises RosterRefused for a key that is malformed, of small order (under which signatures verify for
    messages that were never signed), or another site's: one holder would count as two sites.
    """
    owners: dict[bytes, SiteId] = {}
    for site, public in roster.items():
        if len(public) != PUBLIC_BYTES:
            raise _refused(site, f"{len(public)} bytes", f"{PUBLIC_BYTES} bytes")
        y = int.from_bytes(public, "little") & ((1 << 255) - 1)  # the top bit is the sign of x
        if y >= _PRIME:
            raise _refused(site, "a coordinate that is not reduced", "one below 2^255 - 19")
        if y in _SMALL_ORDER_Y:
            raise _refused(site, "a point of small order", "one of large order")
        if public in owners:
            raise _refused(site, f"the key of {owners[public]}", "a key of its own")
        owners[public] = site
    parts = (part for site, public in roster.items() for part in (site.encode(), public))
    return hashlib.sha256(framed(b"fedcore/1 roster", *parts)).hexdigest()


def _refused(site: SiteId, found: str, expected: str) -> RosterRefused:
    return RosterRefused(f"identity key of {site}", found, expected, site)


def _signed(label: bytes, message: bytes) -> bytes:
    if b"\x00" in label:
        raise BadInput("signature label: found a zero byte, expected none")
    return b"fedcore/1 " + label + b"\x00" + message
