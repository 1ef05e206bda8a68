"""The sealed checkpoint: a released state, kept by the coordinator for sites that come late (PROTOCOL E).

Invariant: it opens only with G, for the job, round and release certificate it was made for. Whoever
opens it still compares the state with the certificate, which at least t sites signed.
"""

from __future__ import annotations

import hashlib

from fedcore.protect.entropy import Entropy
from fedcore.protect.sumtag import GroupSecret
from fedcore.protect.symmetric import BOX_OVERHEAD, framed, open_box, seal_box

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
