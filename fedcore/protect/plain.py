"""No protection: slots travel as themselves, packed to their bits. For simulation and tests only.

A coordinator that folds these sees every update; `fedcore_server` never constructs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from fedcore.encode.bitpack import pack_words, packed_size, unpack_words
from fedcore.errors import ChunkRefused
from fedcore.plan import Packing
from fedcore.types import Slots

SLOTS_PER_CHUNK = 1 << 17
"""About 1 MiB per chunk, and a multiple of every bit-packing group."""


def _chunks(slots: Slots, bits: int) -> Iterator[bytes]:
    for start in range(0, len(slots), SLOTS_PER_CHUNK):
        yield pack_words(slots[start : start + SLOTS_PER_CHUNK], bits)


def _chunk_slots(index: int, slots: int) -> int:
    return min(SLOTS_PER_CHUNK, slots - index * SLOTS_PER_CHUNK)


def _read(chunk: bytes, index: int, count: int, bits: int) -> Slots:
    if index < 0 or count <= 0 or len(chunk) != packed_size(count, bits):
        raise ChunkRefused(
            f"chunk {index}: found {len(chunk)} bytes, expected {packed_size(max(count, 0), bits)}"
        )
    return unpack_words(chunk, bits, count)


class PlainSealer:
    """A site's end of `plain`."""

    def __init__(self, packing: Packing) -> None:
        self._bits = packing.slot_bits

    def protect(self, slots: Slots) -> Iterator[bytes]:
        """(s,) uint64 below 2^slot_bits to chunks of s * slot_bits / 8 bytes in all."""
        yield from _chunks(slots, self._bits)

    def open(self, chunks: Iterable[bytes], slots: int) -> Slots:
        """Chunks of the sum to (slots,) uint64. Raises ChunkRefused on a wrong size or count."""
        parts = [
            _read(chunk, index, _chunk_slots(index, slots), self._bits)
            for index, chunk in enumerate(chunks)
        ]
        total = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64)
        if len(total) != slots:
            raise ChunkRefused(f"sum: found {len(total)} slots, expected {slots}")
        return total


class PlainFold:
    """The coordinator's end of `plain`: one running sum of (slots,) uint64."""

    def __init__(self, packing: Packing, slots: int) -> None:
        self._bits = packing.slot_bits
        self._total = np.zeros(slots, dtype=np.uint64)

    def add(self, index: int, chunk: bytes) -> None:
        """Add one chunk. Raises ChunkRefused unless it has exactly the size of its place."""
        count = _chunk_slots(index, len(self._total))
        slots = _read(chunk, index, count, self._bits)
        start = index * SLOTS_PER_CHUNK
        self._total[start : start + count] += slots

    def total(self) -> Iterator[bytes]:
        """The running sum in the ring Z_{2^slot_bits}, packed like an upload."""
        yield from _chunks(self._total & np.uint64((1 << self._bits) - 1), self._bits)
