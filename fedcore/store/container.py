"""One vector as a file: count, then for each chunk its length and its bytes (4 bytes each, big-endian).

Uploads, downloads and the spool have this form, byte for byte. It can be read chunk by chunk, from any chunk
on, without loading the whole into memory.
Invariant: `check` accepts exactly the files that `write` can make: no trailing bytes, no length beyond the file.

A vector's size is that of its chunks, which a site signs; the container is `overhead(count)` bytes longer.
"""

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fedcore.errors import BadInput, StoreProblem, VectorRefused

MAX_CHUNK = 1 << 23
"""Bytes: a chunk of 64 full ciphertexts of the larger ring has 3.9 MB."""

_NUMBER = struct.Struct(">I")
_PIECE = 1 << 20


@dataclass(frozen=True)
class Vector:
    """Digest and size of a container. digest: 32 bytes, of the chunks, as sites sign it; size: bytes of all chunks
    together; chunks: their number."""

    digest: bytes
    size: int
    chunks: int


class VectorDigest:
    """The 32-byte digest that a site signs of its vector: SHA-256 over the SHA-256 of every chunk, in order."""

    def __init__(self) -> None:
        self._hashes = hashlib.sha256()

    def update(self, chunk: bytes) -> None:
        """The next chunk."""
        self._hashes.update(hashlib.sha256(chunk).digest())

    def digest(self) -> bytes:
        """Of the chunks so far."""
        return self._hashes.digest()


def vector_digest(chunks: Iterable[bytes]) -> bytes:
    """The `VectorDigest` of these chunks."""
    found = VectorDigest()
    for chunk in chunks:
        found.update(chunk)
    return found.digest()


def overhead(chunks: int) -> int:
    """Bytes of a container beyond those of its chunks."""
    return _NUMBER.size * (1 + chunks)


def to_bytes(chunks: Iterable[bytes]) -> bytes:
    """A small vector's container in memory."""
    parts = list(chunks)
    return b"".join([_NUMBER.pack(len(parts)), *(_NUMBER.pack(len(p)) + p for p in parts)])


def from_bytes(data: bytes) -> list[bytes]:
    """The chunks; the inverse of `to_bytes`. Raises BadInput for anything else."""
    count, at, found = int.from_bytes(data[: _NUMBER.size], "big"), _NUMBER.size, []
    possible = overhead(count) <= len(data)  # a count of 4 bytes could make the loop very long
    for _ in range(count if possible else 0):
        size = int.from_bytes(data[at : at + _NUMBER.size], "big")
        at += _NUMBER.size
        found.append(data[at : at + size])
        at += size
    if at != len(data) or sum(map(len, found)) + overhead(count) != len(data):
        raise _no_container()
    return found


class ChunkReader:
    """The chunks of a container whose bytes come in parts of any length."""

    def __init__(self) -> None:
        self._data, self._left = bytearray(), -1

    def take(self, part: bytes) -> list[bytes]:
        """The chunks that are whole with this part, in order. Raises BadInput for what is no container."""
        self._data += part
        at, found = 0, []
        if self._left < 0 and len(self._data) >= _NUMBER.size:
            self._left, at = int.from_bytes(self._data[: _NUMBER.size], "big"), _NUMBER.size
        while self._left > 0 and len(self._data) >= at + _NUMBER.size:
            size = int.from_bytes(self._data[at : at + _NUMBER.size], "big")
            if size > MAX_CHUNK:
                raise _no_container()
            end = at + _NUMBER.size + size
            if len(self._data) < end:
                break
            found.append(bytes(self._data[at + _NUMBER.size : end]))
            at, self._left = end, self._left - 1
        del self._data[:at]
        if not self._left and self._data:
            raise _no_container()
        return found

    def end(self) -> None:
        """Raise BadInput where chunks are missing."""
        if self._left:
            raise _no_container()


def _no_container() -> BadInput:
    return BadInput("vector: found bytes that are no chunk container")


def write(
    file: IO[bytes], chunks: Iterable[bytes], reserve: Callable[[int], None] = lambda _: None
) -> Vector:
    """Write the chunks into an empty, seekable file; one chunk is in memory at a time.

    reserve: called with the number of bytes before each write; it may raise.
    """
    reserve(_NUMBER.size)
    file.write(_NUMBER.pack(0))
    hashes, size, count = VectorDigest(), 0, 0
    for chunk in chunks:
        reserve(_NUMBER.size + len(chunk))
        file.write(_NUMBER.pack(len(chunk)))
        file.write(chunk)
        hashes.update(chunk)
        size, count = size + len(chunk), count + 1
    file.seek(0)
    file.write(_NUMBER.pack(count))
    return Vector(hashes.digest(), size, count)


def count(path: Path) -> int:
    """The number of chunks of a complete container. Raises StoreProblem."""
    with path.open("rb") as file:
        return _number(file, path)


def read(path: Path, first: int = 0, chunks: int | None = None) -> Iterator[bytes]:
    """The chunks of a complete container from index `first` on: all of them, or `chunks`. Raises StoreProblem."""
    with path.open("rb") as file:
        there = _number(file, path)
        end = there if chunks is None else first + chunks
        if not 0 <= first <= end <= there:
            raise damaged(path, f"{there} chunks", f"chunks {first} to {end - 1}")
        for _ in range(first):
            file.seek(_number(file, path), os.SEEK_CUR)
        for _ in range(first, end):
            size = _number(file, path)
            chunk = file.read(size) if size <= MAX_CHUNK else b""
            if len(chunk) != size:
                raise damaged(path, "a chunk cut short", f"one of {size} bytes")
            yield chunk


def _number(file: IO[bytes], path: Path) -> int:
    data = file.read(_NUMBER.size)
    if len(data) != _NUMBER.size:
        raise damaged(path, "the end of the file", "a chunk")
    value: int = _NUMBER.unpack(data)[0]
    return value


def damaged(path: Path, found: object, expected: object) -> StoreProblem:
    """For a container that was complete when it was stored."""
    return StoreProblem(
        f"spool: {path}: found {found}, expected {expected}",
        remedy="the file was damaged after it was stored: check the disk",
    )


def check(path: Path, *, fault: str) -> Vector:
    """Verify a whole container and return its digest and size. fault: its sender, named in the VectorRefused that
    anything else than a complete container raises."""
    hashes, size, found = hashlib.sha256(), 0, 0
    left = path.stat().st_size - _NUMBER.size
    with path.open("rb") as file:
        chunks = _announced(file, "a vector with chunks", fault)
        while found < chunks and left > 0:
            length = _announced(file, "a chunk's length", fault)
            left -= _NUMBER.size + length
            if length > MAX_CHUNK:
                raise _refused(f"a chunk of {length} bytes", f"at most {MAX_CHUNK}", fault)
            hashes.update(_hash_of(file, length))
            size, found = size + length, found + 1
    if found != chunks or left:
        raise _refused(
            f"{found} of {chunks} chunks and {left} bytes behind them", "all and none", fault
        )
    return Vector(hashes.digest(), size, chunks)


def _announced(file: IO[bytes], what: str, fault: str) -> int:
    data = file.read(_NUMBER.size)
    if len(data) != _NUMBER.size:
        raise _refused(f"{len(data)} bytes", what, fault)
    value: int = _NUMBER.unpack(data)[0]
    return value


def _hash_of(file: IO[bytes], length: int) -> bytes:
    chunk = hashlib.sha256()
    while length:
        piece = file.read(min(length, _PIECE))
        chunk.update(piece)
        length -= len(piece)
        if not piece:  # the file was truncated meanwhile: the digest will not match
            break
    return chunk.digest()


def _refused(found: object, expected: object, fault: str) -> VectorRefused:
    return VectorRefused("vector", found, expected, fault)
