"""Where keys, shares, masks and encapsulations take their randomness from (PROTOCOL Z).

Invariant: outside the tests there is one implementation, and it is the operating system's generator.
It is an argument so that a round can be replayed in a test, never so that a run can be repeated.
"""

import os
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey

from fedcore.secagg.crypto.shared_work import shared


class Entropy(Protocol):
    """Random bytes, and the one primitive that draws some of its own."""

    def draw(self, length: int) -> bytes:
        """`length` uniform bytes."""

    def encapsulate(self, mlkem_public: bytes) -> tuple[bytes, bytes]:
        """A fresh shared secret (32 bytes) and its ML-KEM-768 ciphertext (1088 bytes). Raises ValueError for
        bytes that are no key; `hybrid.encapsulate` turns it into KeyRefused."""


class OsEntropy:
    """The operating system's generator, and pyca's ML-KEM, which draws from the same."""

    def draw(self, length: int) -> bytes:
        return os.urandom(length)

    def encapsulate(self, mlkem_public: bytes) -> tuple[bytes, bytes]:
        public = shared(
            (MLKEM768PublicKey, mlkem_public),
            lambda: MLKEM768PublicKey.from_public_bytes(mlkem_public),
        )
        return public.encapsulate()
