"""`masked`, and the cipher `keystream`: slots under masks, travelling as words of Z_{2^slot_bits}.

The site adds the masks (`masking.add_masks`) before it passes a vector to the sealer; the coordinator
rebuilds them and subtracts them from the sum at once: `MaskedFold.remove`. A keystream
(`crypto/masking.py`) is added in the same way, and only the sites can subtract it.
Invariant: what remains is the integer sum modulo 2^slot_bits, and headroom keeps every field below its
own modulus, so it is the integer sum (Bonawitz et al. 2017, section 4). One masked vector alone is
uniform in the ring. Vectors of `plain` have a fold of their own, which a coordinator never makes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from fedcore.errors import ChunkRefused
from fedcore.secagg.crypto import check_removal, words
from fedcore.secagg.packing import Packing
from fedcore.types import Slots


class MaskedSealer:
    """The site's side of `masked`: masked slots to words, and the unmasked sum back to slots."""

    def __init__(self, packing: Packing) -> None:
        self._bits = packing.slot_bits

    def protect(self, slots: Slots) -> Iterator[bytes]:
        """(s,) uint64, masks already added, to chunks of s * slot_bits / 8 bytes in all."""
        return words.write(slots, self._bits)

    def open(self, chunks: Iterable[bytes], slots: int) -> Slots:
        return words.read(chunks, slots, self._bits)


class MaskedFold:
    """The coordinator's side of `masked`: one running sum of (slots,) uint64, and the removal of its masks.

    With `first_chunk` it is the fold of a part: `slots` slots from that chunk on.
    """

    def __init__(self, packing: Packing, slots: int, *, first_chunk: int = 0) -> None:
        self._bits, self._first = packing.slot_bits, first_chunk
        self._total = np.zeros(slots, dtype=np.uint64)
        self._missing = set(range(words.chunk_count(slots)))
        self._removed = False

    def add(self, index: int, chunk: bytes) -> None:
        if self._removed:
            raise ChunkRefused(f"chunk {index}: the masks are already off this sum")
        words.add(self._total, index - self._first, chunk, self._bits)
        self._missing.discard(index - self._first)

    def merge(self, other: MaskedFold) -> None:
        """Add another fold's sum, of the same part. Raises ChunkRefused after `remove`, or with gaps."""
        other._refuse_gaps()
        if self._removed or other._removed:
            raise ChunkRefused("sum: the masks are already off")
        self._total += other._total
        self._missing.clear()

    def expand_ahead(self) -> bool:
        """Nothing: the words of a vector are added as they are."""
        return False

    def read_ahead(self) -> bool:
        """Nothing: the sum is words already."""
        return False

    def remove(self, mask: Slots) -> None:
        check_removal(mask, len(self._total), removed=self._removed)
        self._refuse_gaps()
        self._total -= mask
        self._removed = True

    def total(self) -> Iterator[bytes]:
        self._refuse_gaps()
        return words.write(self._total, self._bits)

    def _refuse_gaps(self) -> None:
        if self._missing:
            raise ChunkRefused(f"sum: chunk {self._first + min(self._missing)} was never added")
