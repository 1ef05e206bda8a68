"""The layers between a site's slots and the wire, and what opens their sum.

Two roles, two types each: a *sealer* lives at the sites (protects a vector, opens a sum), a *fold*
lives at the coordinator and only adds. Invariant: what `Sealer.open` returns is the integer sum of the
slots that were protected, bit for bit, in any order of folding.

Nothing here takes a run's seed: keys, masks and encryption draw from the operating system (PROTOCOL Z).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from fedcore.types import Slots


class Sealer(Protocol):
    """A site's end: the only one that can open a sum."""

    def protect(self, slots: Slots) -> Iterator[bytes]:
        """One vector of slots to its chunks, in order; every call uses fresh randomness."""
        ...

    def open(self, chunks: Iterable[bytes], slots: int) -> Slots:
        """The chunks of a folded sum back to (slots,) uint64. Raises ChunkRefused."""
        ...


class Fold(Protocol):
    """The coordinator's end: one running sum, whatever the number of sites."""

    def add(self, index: int, chunk: bytes) -> None:
        """Add chunk `index` of one site's vector to the running sum. Raises ChunkRefused."""
        ...

    def total(self) -> Iterator[bytes]:
        """The chunks of the sum, in order."""
        ...
