"""No protection: slots travel unchanged, packed to their bits. For simulation and tests only.

A coordinator that folds these sees every update; `fedcore_server` never constructs one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedcore.secagg.crypto import words
from fedcore.secagg.crypto.masked import MaskedSealer
from fedcore.secagg.plan import Packing


class PlainSealer(MaskedSealer):
    """The site's side of `plain`: the words of `masked`, of slots without masks."""


class PlainFold:
    """The coordinator's side of `plain`: one running sum of (slots,) uint64."""

    def __init__(self, packing: Packing, slots: int) -> None:
        self._bits = packing.slot_bits
        self._total = np.zeros(slots, dtype=np.uint64)

    def add(self, index: int, chunk: bytes) -> None:
        words.add(self._total, index, chunk, self._bits)

    def total(self) -> Iterator[bytes]:
        return words.write(self._total, self._bits)
