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

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fedcore.errors import EnvelopeRefused, StoreProblem
from fedcore.secagg.crypto.secret import Secret, SecretBytes
from fedcore.secagg.crypto.symmetric import BOX_OVERHEAD, Label, derive, open_box, seal_box

FORM = b"fedcore sealed 1"
SALT_BYTES = 32
PIECE = 1 << 20


_HEAD = len(FORM) + SALT_BYTES


class FileSealer(Secret):
    """Seals and opens files. Prints redacted."""

    __slots__ = ("_key",)

    def __init__(self, key: SecretBytes) -> None:
        """key: 32 bytes."""
        self._key = key.reveal()

    def seal(self, parts: Iterable[bytes], *place: str) -> Iterator[bytes]:
        """The file of a content that comes in parts of any length."""
        salt = os.urandom(SALT_BYTES)
        key = self._of(salt, place)
        yield FORM + salt
        pieces, number = _pieces(parts), 0
        piece = next(pieces)
        for number, following in enumerate(pieces, 1):
            yield seal_box(_box_key(key, number - 1, last=False), piece, FORM)
            piece = following
        yield seal_box(_box_key(key, number, last=True), piece, FORM)

    def open(self, path: Path, *place: str) -> bytes:
        """The content of a file. Raises StoreProblem for one in clear, or not sealed for this place; OSError."""
        with self.reader(path, *place) as file:
            return file.read()

    def reader(self, path: Path, *place: str) -> io.BufferedReader:
        """A file to read from, at any offset. Raises StoreProblem as `open`: of its length and its end at once, of what
        is before when it is read; OSError."""
        file = path.open("rb")
        try:
            if file.read(len(FORM)) != FORM:
                raise in_clear(path)
            key = self._of(file.read(SALT_BYTES), place)
            return io.BufferedReader(_SealedFile(file, path, key), PIECE)
        except BaseException:
            file.close()
            raise

    def _of(self, salt: bytes, place: tuple[str, ...]) -> bytes:
        parts = (part.encode() for part in place)
        return derive(self._key, Label.SEALED_FILE, *parts, salt=salt)


class _SealedFile(io.RawIOBase):
    """The content of a sealed file. key: of this file and place."""

    def __init__(self, file: BinaryIO, path: Path, key: bytes) -> None:
        self._file, self._path, self._key = file, path, key
        self._box = PIECE + BOX_OVERHEAD
        boxes = file.seek(0, os.SEEK_END) - _HEAD
        self._last = max(0, -(-boxes // self._box) - 1)
        self._size, self._at = boxes - (self._last + 1) * BOX_OVERHEAD, 0
        self._number, self._piece = self._last, self._opened(self._last)

    def _opened(self, number: int) -> bytes:
        self._file.seek(_HEAD + number * self._box)
        key = _box_key(self._key, number, last=number == self._last)
        try:
            return open_box(key, self._file.read(self._box), FORM, sender="this party's disk")
        except EnvelopeRefused:
            raise _refused(self._path) from None

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Offset in the content."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        """Of one piece, as much as there is room for."""
        if self._at >= self._size:
            return 0
        number, offset = divmod(self._at, PIECE)
        if number != self._number:
            self._number, self._piece = number, self._opened(number)
        found = self._piece[offset : offset + len(buffer)]
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()
        super().close()


def _pieces(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The same content in pieces of PIECE bytes; the last one may be shorter, and is empty where all is."""
    left = b""
    for part in parts:
        whole, at = memoryview(left + part if left else part), 0
        while len(whole) - at > PIECE:
            yield bytes(whole[at : at + PIECE])
            at += PIECE
        left = bytes(whole[at:])
    yield left


def _box_key(key: bytes, number: int, *, last: bool) -> bytes:
    return derive(key, Label.SEALED_BOX, number.to_bytes(8, "big"), bytes([last]))


def is_sealed_file(path: Path) -> bool:
    """Whether a file begins like a sealed one. Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(FORM)) == FORM


def sealed(path: Path) -> StoreProblem:
    """For a sealed file of a party without a keystore."""
    return StoreProblem(
        f"{path}: found it encrypted, expected it in clear: there is no [keystore]",
        remedy="write [keystore] back into site.toml or federation.toml, and restore its file if it is gone",
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
