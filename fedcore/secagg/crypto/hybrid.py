"""Key pairs of X25519 and ML-KEM-768 together, and envelopes sealed from one pair to another.

Used for channel keys (PROTOCOL P), key epochs (PROTOCOL E) and mask keys (`pairwise`).
Invariant: an envelope opens only under the recipient's two secrets, with the sender's public keys and
the same context; a key in it is safe while either X25519 or ML-KEM-768 is. Every envelope has a fresh
encapsulation, hence a key of its own.
X25519: RFC 7748; ML-KEM: FIPS 203. Signatures over envelopes, and the context's content, are `protocol/`'s.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from fedcore.errors import BadInput, EnvelopeRefused, KeyRefused
from fedcore.secagg.crypto.entropy import Entropy
from fedcore.secagg.crypto.secret import Secret
from fedcore.secagg.crypto.shared_work import keep, once, shared
from fedcore.secagg.crypto.symmetric import BOX_OVERHEAD, Label, derive, open_box, seal_box

X25519_BYTES = 32
MLKEM_PUBLIC_BYTES = 1184
MLKEM_SEED_BYTES = 64
CIPHERTEXT_BYTES = 1088

ENVELOPE_OVERHEAD = CIPHERTEXT_BYTES + BOX_OVERHEAD
"""Bytes an envelope is longer than its plaintext."""

_PRIME = (1 << 255) - 19
_PROBE = X25519PrivateKey.from_private_bytes(bytes(32))
"""RFC 7748's clamping makes 2^254 of zeros, and 2^254 times a point is the neutral element exactly when
the point's order divides 8 (the other factors of curve and twist are odd). A constant, so no secret."""


@dataclass(frozen=True)
class HybridPublic:
    """The two public keys of a pair: x25519 (32 bytes) and mlkem (1184 bytes)."""

    x25519: bytes
    mlkem: bytes

    def check(self, owner: str) -> None:
        """Raise KeyRefused unless both are keys; to be called before any secret is used with them.

        Refused are wrong lengths, every X25519 point of small order (the shared secret would always be
        zero), a second spelling of a coordinate (a copied key would not look like one), and an
        ML-KEM key whose coefficients are not reduced (FIPS 203, section 7.2).
        """
        _exchange(_PROBE, self.x25519, owner)
        if int.from_bytes(self.x25519, "little") >= _PRIME:
            found = "a coordinate that is not reduced"
            raise KeyRefused(f"X25519 key of {owner}", found, "one below 2^255 - 19", owner)
        _mlkem_key(self.mlkem, owner)

    def to_bytes(self) -> bytes:
        """1216 bytes: x25519, then mlkem."""
        return self.x25519 + self.mlkem


class HybridKey(Secret):
    """Both secrets of a pair: 32 bytes of X25519 and ML-KEM-768's 64-byte seed. Prints redacted."""

    __slots__ = ("_mlkem", "_raw", "_x25519", "public")

    def __init__(self, x25519: bytes, mlkem_seed: bytes) -> None:
        """Raises BadInput for other lengths."""
        if (len(x25519), len(mlkem_seed)) != (X25519_BYTES, MLKEM_SEED_BYTES):
            raise BadInput(
                f"hybrid key: found {len(x25519)} and {len(mlkem_seed)} bytes, expected "
                f"{X25519_BYTES} and {MLKEM_SEED_BYTES}"
            )
        self._raw = x25519 + mlkem_seed
        self._x25519 = X25519PrivateKey.from_private_bytes(x25519)
        self._mlkem = MLKEM768PrivateKey.from_seed_bytes(mlkem_seed)
        self.public = HybridPublic(
            self._x25519.public_key().public_bytes_raw(),
            self._mlkem.public_key().public_bytes_raw(),
        )

    @classmethod
    def draw(cls, entropy: Entropy) -> HybridKey:
        """A fresh pair: draws 32 bytes, then 64."""
        return cls(entropy.draw(X25519_BYTES), entropy.draw(MLKEM_SEED_BYTES))

    def to_bytes(self) -> bytes:
        """96 bytes of secret, for the journal only."""
        return self._raw

    @classmethod
    def from_bytes(cls, data: bytes) -> HybridKey:
        """The inverse of `to_bytes`. Raises BadInput."""
        return shared((cls, data), lambda: cls(data[:X25519_BYTES], data[X25519_BYTES:]))

    def agree(self, other_x25519: bytes, owner: str) -> bytes:
        """The X25519 shared secret, 32 bytes. Raises KeyRefused for a malformed or small-order key."""
        pair = frozenset((self.public.x25519, other_x25519))
        return shared((_exchange, pair), lambda: _exchange(self._x25519, other_x25519, owner))

    def decapsulate(self, ciphertext: bytes, sender: str) -> bytes:
        """The ML-KEM shared secret, 32 bytes; of a foreign ciphertext, an unpredictable one. Raises
        KeyRefused for another length."""
        _expect_length(f"ML-KEM ciphertext from {sender}", ciphertext, CIPHERTEXT_BYTES, sender)
        return self._mlkem.decapsulate(ciphertext)


def encapsulate(mlkem_public: bytes, owner: str, entropy: Entropy) -> tuple[bytes, bytes]:
    """A fresh shared secret for `owner` and its ciphertext. Raises KeyRefused for a malformed key."""
    _mlkem_key(mlkem_public, owner)
    return entropy.encapsulate(mlkem_public)


def seal_envelope(
    mine: HybridKey,
    theirs: HybridPublic,
    plaintext: bytes,
    *,
    context: bytes,
    recipient: str,
    entropy: Entropy,
) -> bytes:
    """ML-KEM ciphertext (1088 bytes), then the box (plaintext + 16 bytes).

    context: names version, label, h, sender and recipient, unambiguously. Raises KeyRefused.
    """
    shared, ciphertext = encapsulate(theirs.mlkem, recipient, entropy)
    secret = mine.agree(theirs.x25519, recipient) + shared
    key = _envelope_key(secret, mine.public, theirs, ciphertext, context)
    sealed = ciphertext + seal_box(key, plaintext, context)
    keep((_opened, theirs, mine.public, sealed, context), plaintext)
    return sealed


def open_envelope(
    mine: HybridKey, sender_public: HybridPublic, sealed: bytes, *, context: bytes, sender: str
) -> bytes:
    """The plaintext. Raises EnvelopeRefused for all that `sender` did not seal to `mine` in `context`. Raises
    KeyRefused for a sender's key that `HybridPublic.check` would have refused."""
    if len(sealed) < ENVELOPE_OVERHEAD:
        found, expected = f"{len(sealed)} bytes", f"at least {ENVELOPE_OVERHEAD}"
        raise EnvelopeRefused(f"sealed message from {sender}", found, expected, sender)
    key = _opened, mine.public, sender_public, sealed, context
    return shared(key, lambda: _opened(mine, sender_public, sealed, context, sender))


def _opened(
    mine: HybridKey, sender_public: HybridPublic, sealed: bytes, context: bytes, sender: str
) -> bytes:
    ciphertext, box = sealed[:CIPHERTEXT_BYTES], sealed[CIPHERTEXT_BYTES:]
    secret = mine.agree(sender_public.x25519, sender) + mine.decapsulate(ciphertext, sender)
    key = _envelope_key(secret, sender_public, mine.public, ciphertext, context)
    return open_box(key, box, context, sender=sender)


def _envelope_key(
    secret: bytes, sender: HybridPublic, recipient: HybridPublic, ciphertext: bytes, context: bytes
) -> bytes:
    """HKDF(X25519 || ML-KEM, salt SHA256(context), info: sender's keys, recipient's keys, ciphertext). The
    public keys and the ciphertext are hashed in because neither shared secret binds them alone."""
    salt = hashlib.sha256(context).digest()
    return derive(
        secret, Label.ENVELOPE, sender.to_bytes(), recipient.to_bytes(), ciphertext, salt=salt
    )


def _exchange(mine: X25519PrivateKey, theirs: bytes, owner: str) -> bytes:
    what = f"X25519 key of {owner}"
    _expect_length(what, theirs, X25519_BYTES, owner)
    try:
        return mine.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError:  # pyca's refusal of an all-zero shared secret (RFC 7748, section 6.1)
        raise KeyRefused(what, "a point of small order", "one of large order", owner) from None


@once
def _mlkem_key(public: bytes, owner: str) -> None:
    what = f"ML-KEM key of {owner}"
    _expect_length(what, public, MLKEM_PUBLIC_BYTES, owner)
    try:
        MLKEM768PublicKey.from_public_bytes(public)
    except ValueError:
        found = "coefficients that are not reduced"
        raise KeyRefused(what, found, "a valid key", owner) from None


def _expect_length(what: str, data: bytes, length: int, fault: str) -> None:
    if len(data) != length:
        raise KeyRefused(what, f"{len(data)} bytes", f"{length} bytes", fault)
