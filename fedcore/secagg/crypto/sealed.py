"""What passes the coordinator sealed under G: the checkpoint for sites that come late (PROTOCOL E), and
the notice that tells the other sites why one refused a release (PROTOCOL R).

Invariant: a checkpoint opens only with G, for the job, round and release certificate it was made for;
whoever opens it still compares the state with the certificate, which at least t sites signed. Every
notice has the same length, so the coordinator learns nothing from it but that it was sent.
"""

from __future__ import annotations

import hashlib

from fedcore.secagg.crypto.entropy import Entropy
from fedcore.secagg.crypto.sumtag import GroupSecret
from fedcore.secagg.crypto.symmetric import BOX_OVERHEAD, framed, open_box, seal_box
from fedcore.types import SiteId

SALT_BYTES = 32

OVERHEAD = SALT_BYTES + BOX_OVERHEAD
"""Bytes a checkpoint is longer than its state."""


def seal_checkpoint(
    group: GroupSecret, state: bytes, *, job: str, round_: int, certificate: str, entropy: Entropy
) -> bytes:
    """32 bytes of salt, then the box. Every call has a key of its own: HKDF(G, fresh salt)."""
    salt = entropy.draw(SALT_BYTES)
    return salt + seal_box(_key(group, salt), state, _context(job, round_, certificate))


def open_checkpoint(
    group: GroupSecret, sealed: bytes, *, job: str, round_: int, certificate: str
) -> bytes:
    """The state's bytes. Raises EnvelopeRefused for anything else than that very checkpoint."""
    salt, box = sealed[:SALT_BYTES], sealed[SALT_BYTES:]
    context = _context(job, round_, certificate)
    return open_box(_key(group, salt), box, context, sender="coordinator")


def _key(group: GroupSecret, salt: bytes) -> bytes:
    return group.derive(salt, b"sealed checkpoint", 32)


def _context(job: str, round_: int, certificate: str) -> bytes:
    context = framed(b"checkpoint", job.encode(), str(round_).encode(), certificate.encode())
    return hashlib.sha256(context).digest()


NOTICE_BYTES = 512
"""Bytes of text a notice has room for; the rest is cut."""

NOTICE_LENGTH = NOTICE_BYTES + OVERHEAD
"""Bytes of every sealed notice."""


def seal_notice(
    group: GroupSecret, text: str, *, header: bytes, site: SiteId, entropy: Entropy
) -> bytes:
    """NOTICE_LENGTH bytes for any text."""
    salt = entropy.draw(SALT_BYTES)
    body = text.encode()[:NOTICE_BYTES].decode(errors="ignore").encode().ljust(NOTICE_BYTES, b"\0")
    key = group.derive(salt, b"sealed notice", 32)
    return salt + seal_box(key, body, _notice(header, site))


def open_notice(group: GroupSecret, sealed: bytes, *, header: bytes, site: SiteId) -> str:
    """The text, fit for one line of a log. Raises EnvelopeRefused for anything but a notice that a
    holder of G made in that site's name for that round."""
    key = group.derive(sealed[:SALT_BYTES], b"sealed notice", 32)
    body = open_box(key, sealed[SALT_BYTES:], _notice(header, site), sender=site)
    text = body.rstrip(b"\0").decode(errors="replace")
    return "".join(c if c.isprintable() else " " for c in text)


def _notice(header: bytes, site: SiteId) -> bytes:
    return hashlib.sha256(framed(b"notice", header, site.encode())).digest()
