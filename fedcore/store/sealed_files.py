"""Whole files, encrypted under a key of their party, piece by piece.

    16 bytes  the form, "fedcore sealed 1"
    32 bytes  salt
    boxes of up to 1 MiB of content each, ChaCha20-Poly1305; the last one may be shorter, or empty

Each box has a key of its own: HKDF(HKDF(key, salt, place), number of the box, whether it is the last). So no key seals
twice, and boxes cannot be moved within a file or between files. This is the construction STREAM (Hoang, Reyhanitabar,
Rogaway, Vizár: Online authenticated-encryption and its nonce-reuse misuse-resistance, CRYPTO 2015, section 7) with
derived keys in place of nonces.
Invariant: a file opens whole, as it was sealed, in its own place (its role, its job, its name) or not at all: what was
cut off, appended, swapped or renamed is refused. In clear are names, lengths and times. Not detected: a file that is
missing, and one put back to an earlier content of the same place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fedcore.errors import EnvelopeRefused, StoreProblem
from fedcore.secagg.crypto.secret import Secret, SecretBytes
from fedcore.secagg.crypto.symmetric import BOX_OVERHEAD, Label, derive, open_box, seal_box

FORM = b"fedcore sealed 1"
SALT_BYTES = 32
PIECE = 1 << 20


class FileSealer(Secret):
    """Seals and opens files. Prints redacted."""

    __slots__ = ("_key",)

    def __init__(self, key: SecretBytes) -> None:
        """key: 32 bytes."""
        self._key = key.reveal()

    def seal(self, content: bytes, *place: str) -> Iterator[bytes]:
        """The file of this content, in pieces."""
        salt, whole = os.urandom(SALT_BYTES), memoryview(content)
        key = self._of(salt, place)
        yield FORM + salt
        last = max(0, (len(content) - 1) // PIECE)
        for number in range(last + 1):
            piece = bytes(whole[number * PIECE : (number + 1) * PIECE])
            yield seal_box(_box_key(key, number, number == last), piece, FORM)

    def open(self, path: Path, *place: str) -> bytes:
        """The content of a file. Raises StoreProblem for one in clear, or not sealed for this place; OSError."""
        with path.open("rb") as file:
            if file.read(len(FORM)) != FORM:
                raise in_clear(path)
            key, pieces = self._of(file.read(SALT_BYTES), place), list[bytes]()
            box = file.read(PIECE + BOX_OVERHEAD)
            while True:
                following = file.read(PIECE + BOX_OVERHEAD)
                own = _box_key(key, len(pieces), not following)
                try:
                    pieces.append(open_box(own, box, FORM, sender="this party's disk"))
                except EnvelopeRefused:
                    raise _refused(path) from None
                if not following:
                    return b"".join(pieces)
                box = following

    def _of(self, salt: bytes, place: tuple[str, ...]) -> bytes:
        parts = (part.encode() for part in place)
        return derive(self._key, Label.SEALED_FILE, *parts, salt=salt)


def _box_key(key: bytes, number: int, last: bool) -> bytes:
    return derive(key, Label.SEALED_BOX, number.to_bytes(8, "big"), bytes([last]))


def is_sealed_file(path: Path) -> bool:
    """Whether a file begins like a sealed one. Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(FORM)) == FORM


def sealed(path: Path) -> StoreProblem:
    """For a sealed file of a party without a keystore."""
    return StoreProblem(
        f"{path}: found it encrypted, expected it in clear: there is no [keystore]",
        remedy="write [keystore] back into site.toml, and restore its file if it is gone",
    )


def in_clear(path: Path) -> StoreProblem:
    """For a file that should be sealed, and is not."""
    return StoreProblem(
        f"{path}: found it in clear, expected it encrypted, as [keystore] says",
        remedy="`keystore encrypt` encrypts it, if it is this party's own",
    )


def _refused(path: Path) -> StoreProblem:
    return StoreProblem(
        f"{path}: found a content that was not encrypted for this place, or is not whole, expected its own",
        remedy="it was damaged, or put there by another program: restore it from a backup, or remove it",
    )
