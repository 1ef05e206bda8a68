"""Messages sealed under G that the coordinator forwards: the checkpoint for late sites (PROTOCOL E), and the
notice with the reason why a site refused a release (PROTOCOL R).

Invariant: a checkpoint opens only with G, and only for its job, round and release certificate; the site that
opens it still compares the state with the certificate, which at least t sites signed. Every notice has the
same length, so the coordinator learns only that it was sent.
"""

import hashlib

from fedcore.secagg.crypto.entropy import Entropy
from fedcore.secagg.crypto.sumtag import GroupSecret
from fedcore.secagg.crypto.symmetric import BOX_OVERHEAD, framed, open_box, seal_box
from fedcore.types import SiteId

SALT_BYTES = 32

OVERHEAD = SALT_BYTES + BOX_OVERHEAD
"""Bytes by which a checkpoint is longer than its state."""


def seal_checkpoint(
    group: GroupSecret, state: bytes, *, job: str, round_: int, certificate: str, entropy: Entropy
) -> bytes:
    """32 bytes of salt, then the box. Every call has a key of its own: HKDF(G, fresh salt)."""
    salt = entropy.draw(SALT_BYTES)
    return salt + seal_box(_key(group, salt), state, _context(job, round_, certificate))


def open_checkpoint(
    group: GroupSecret, sealed: bytes, *, job: str, round_: int, certificate: str
) -> bytes:
    """The state's bytes. Raises EnvelopeRefused for any other bytes, job, round or certificate."""
    salt, box = sealed[:SALT_BYTES], sealed[SALT_BYTES:]
    context = _context(job, round_, certificate)
    return open_box(_key(group, salt), box, context, sender="coordinator")


def _key(group: GroupSecret, salt: bytes) -> bytes:
    return group.derive(salt, b"sealed checkpoint", 32)


def _context(job: str, round_: int, certificate: str) -> bytes:
    context = framed(b"checkpoint", job.encode(), str(round_).encode(), certificate.encode())
    return hashlib.sha256(context).digest()


NOTICE_BYTES = 512
"""Bytes of text in a notice; the rest is cut off."""

NOTICE_LENGTH = NOTICE_BYTES + OVERHEAD
"""Bytes of every sealed notice."""


def seal_notice(
    group: GroupSecret, text: str, *, header: bytes, site: SiteId, entropy: Entropy
) -> bytes:
    """Seal a text: NOTICE_LENGTH bytes, whatever its length."""
    salt = entropy.draw(SALT_BYTES)
    body = text.encode()[:NOTICE_BYTES].decode(errors="ignore").encode().ljust(NOTICE_BYTES, b"\0")
    key = group.derive(salt, b"sealed notice", 32)
    return salt + seal_box(key, body, _notice(header, site))


def open_notice(group: GroupSecret, sealed: bytes, *, header: bytes, site: SiteId) -> str:
    """The text of a notice, printable. Raises EnvelopeRefused unless a holder of G made it in that site's name for
    that round."""
    key = group.derive(sealed[:SALT_BYTES], b"sealed notice", 32)
    body = open_box(key, sealed[SALT_BYTES:], _notice(header, site), sender=site)
    text = body.rstrip(b"\0").decode(errors="replace")
    return "".join(c if c.isprintable() else " " for c in text)


def _notice(header: bytes, site: SiteId) -> bytes:
    return hashlib.sha256(framed(b"notice", header, site.encode())).digest()
