"""Symmetric cryptography: key derivation, sealed boxes, keystreams, all by the package `cryptography`.

Invariant: two keys are equal only if secret, salt, label and every part are equal. All labels are in one
table, and every part of HKDF's info is preceded by its length, so that no two lists of parts give the same
bytes.
HKDF-SHA256: RFC 5869; ChaCha20-Poly1305: RFC 8439; AES-256 in counter mode: NIST SP 800-38A, section 6.5.
The secrets and contexts are chosen in `hybrid`, `pairwise` and `masking`.
"""

from enum import StrEnum, unique

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedcore.errors import BadInput, EnvelopeRefused

KEY_BYTES = 32
BOX_OVERHEAD = 16
"""Bytes by which a box is longer than its plaintext: Poly1305's tag."""

_VERSION = b"fedcore/1"
_ONLY_NONCE = bytes(12)
"""Every box has a key of its own, derived from a fresh shared secret, so one nonce is enough."""
_CTR_START = bytes(16)


@unique
class Label(StrEnum):
    """Every use of `derive`, each with its own label, so that keys of two uses are unrelated."""

    ENVELOPE = "envelope"
    OF_IDENTITY = "of identity"
    MASK_X25519 = "mask x25519"
    MASK_MLKEM = "mask mlkem"
    OFFER_ROOT = "offer root"
    OFFERED = "offered value"
    OFFER_BOX = "offer box"
    PAIR_SEED = "pair seed"
    SELF_MASK = "self mask"
    KEYSTREAM = "keystream"
    KEY_FILE = "key file"
    JOURNAL = "journal"
    JOURNAL_NAME = "journal name"
    JOURNAL_ROW = "journal row"
    BACKUP = "backup"
    FILES = "files"
    SEALED_FILE = "sealed file"
    SEALED_BOX = "sealed file's box"


def framed(*parts: bytes) -> bytes:
    """The parts, each behind its length in 4 bytes little-endian: injective, for any number of parts."""
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """HKDF-SHA256, extract and expand: `length` bytes, at most 8160."""
    return HKDF(SHA256(), length, salt, info).derive(secret)


def derive(
    secret: bytes, label: Label, *parts: bytes, salt: bytes = b"", length: int = KEY_BYTES
) -> bytes:
    """HKDF(secret, salt, version || label || parts, each framed): `length` bytes."""
    return hkdf(secret, salt, framed(_VERSION, label.encode(), *parts), length)


def seal_box(key: bytes, plaintext: bytes, context: bytes) -> bytes:
    """ChaCha20-Poly1305 under a key that seals nothing else: len(plaintext) + 16 bytes."""
    return ChaCha20Poly1305(key).encrypt(_ONLY_NONCE, plaintext, context)


def open_box(key: bytes, box: bytes, context: bytes, *, sender: str) -> bytes:
    """The inverse of `seal_box`. Raises EnvelopeRefused, without the reason."""
    try:
        return ChaCha20Poly1305(key).decrypt(_ONLY_NONCE, box, context)
    except InvalidTag:
        expected = "one sealed for this recipient, round and purpose"
        raise EnvelopeRefused(
            f"sealed message from {sender}", "one that does not open", expected, sender
        ) from None


def keystream(key: bytes, start: bytes = _CTR_START) -> CipherContext:
    """AES-256-CTR from counter block `start`; encrypting zeros gives the stream. Raises BadInput unless the
    key has 32 bytes."""
    if len(key) != KEY_BYTES:
        raise BadInput(f"keystream: found a key of {len(key)} bytes, expected {KEY_BYTES}")
    return Cipher(algorithms.AES256(key), modes.CTR(start)).encryptor()
