"""Slow versions of the key derivations, boxes and masks, written from RFCs and docs alone.

HMAC and single AES blocks are the only primitives; nothing here calls the code it is compared with.
"""

from __future__ import annotations

import hmac

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int = 32) -> bytes:
    """RFC 5869, sections 2.2 and 2.3."""
    extracted = hmac.digest(salt or bytes(32), secret, "sha256")
    block, blocks = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.digest(extracted, block + info + bytes([counter]), "sha256")
        blocks += block
    return blocks[:length]


def info(*parts: bytes) -> bytes:
    """The version, then every part, each behind 4 bytes of length."""
    out = b""
    for part in (b"fedcore/1", *parts):
        out += bytes([len(part) % 256, len(part) // 256 % 256, len(part) // 65536, 0]) + part
    return out


def open_box(key: bytes, box: bytes, context: bytes) -> bytes:
    return ChaCha20Poly1305(key).decrypt(bytes(12), box, context)


def stream(key: bytes, slots: int) -> list[int]:
    """AES-256 of the counter, block by block from 0 (SP 800-38A, section 6.5); 8 bytes to a slot."""
    cipher = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()
    out = b"".join(cipher.update(block.to_bytes(16, "big")) for block in range(-(-slots // 2)))
    return [int.from_bytes(out[8 * k : 8 * k + 8], "little") for k in range(slots)]
