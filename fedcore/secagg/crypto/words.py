"""Slots as bit-packed words: the wire form of vectors without a lattice, shared by `plain` and `masked`.

A word is one slot without its leading zeros, a chunk at most SLOTS_PER_CHUNK of them.
Invariant: a chunk that does not have exactly the size of its place in the vector is refused before it is
used; sums are kept in uint64, where a wrap does not change the residue in Z_{2^bits}, and are reduced when
they are written.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from fedcore.errors import ChunkRefused
from fedcore.secagg.encode.bitpack import pack_words, packed_size, unpack_words
from fedcore.types import Slots

SLOTS_PER_CHUNK = 1 << 17
"""About 1 MiB per chunk, and a multiple of every bit-packing group."""


def write(slots: Slots, bits: int) -> Iterator[bytes]:
    """(s,) uint64 to the chunks of its residues in Z_{2^bits}: s * bits / 8 bytes in all."""
    mask = np.uint64((1 << bits) - 1)
    for start in range(0, len(slots), SLOTS_PER_CHUNK):
        yield pack_words(slots[start : start + SLOTS_PER_CHUNK] & mask, bits)


def add(total: Slots, index: int, chunk: bytes, bits: int) -> None:
    """Add chunk `index` of a vector as long as `total`, in place. Raises ChunkRefused."""
    words = _read(chunk, index, len(total), bits)
    start = index * SLOTS_PER_CHUNK
    total[start : start + len(words)] += words


def read(chunks: Iterable[bytes], slots: int, bits: int) -> Slots:
    """The inverse of `write`: (slots,) uint64. Raises ChunkRefused on a wrong size or count."""
    parts = [_read(chunk, index, slots, bits) for index, chunk in enumerate(chunks)]
    vector = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64)
    if len(vector) != slots:
        raise ChunkRefused(f"sum: found {len(vector)} slots, expected {slots}")
    return vector


def chunk_count(slots: int) -> int:
    """Chunks of a vector of `slots` slots."""
    return -(-slots // SLOTS_PER_CHUNK)


def _read(chunk: bytes, index: int, slots: int, bits: int) -> Slots:
    count = max(0, min(SLOTS_PER_CHUNK, slots - index * SLOTS_PER_CHUNK))
    if index < 0 or not count or len(chunk) != packed_size(count, bits):
        raise ChunkRefused(
            f"chunk {index}: found {len(chunk)} bytes, expected {packed_size(count, bits)}"
        )
    return unpack_words(chunk, bits, count)
