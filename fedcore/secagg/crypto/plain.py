"""No protection: slots travel unchanged, packed to their bits. For simulation and tests only.

A coordinator that folds these sees every update; `fedcore_server` never constructs one.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from fedcore.secagg.crypto import words
from fedcore.secagg.packing import Packing
from fedcore.types import Slots


class PlainSealer:
    """The site's side of `plain`. No class of it is one of `masked`, which a coordinator may make."""

    def __init__(self, packing: Packing) -> None:
        self._bits = packing.slot_bits

    def protect(self, slots: Slots) -> Iterator[bytes]:
        return words.write(slots, self._bits)

    def open(self, chunks: Iterable[bytes], slots: int) -> Slots:
        return words.read(chunks, slots, self._bits)


class PlainFold:
    """The coordinator's side of `plain`: one running sum of (slots,) uint64."""

    def __init__(self, packing: Packing, slots: int) -> None:
        self._bits = packing.slot_bits
        self._total = np.zeros(slots, dtype=np.uint64)

    def add(self, index: int, chunk: bytes) -> None:
        words.add(self._total, index, chunk, self._bits)

    def total(self) -> Iterator[bytes]:
        return words.write(self._total, self._bits)
