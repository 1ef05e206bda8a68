"""The layers of protection between a site's slots and the wire.

A *sealer* runs at the sites (it protects a vector and opens a sum), a *fold* at the coordinator (it only
adds). Invariant: `Sealer.open` returns the integer sum of the protected slots, bit for bit, in any order of
folding.

Nothing here takes a run's seed: keys, masks and encryption draw from the operating system (PROTOCOL Z).
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from fedcore.errors import BadInput
from fedcore.types import Slots


class Sealer(Protocol):
    """The site's side, which can open a sum."""

    def protect(self, slots: Slots) -> Iterator[bytes]:
        """One vector of slots to its chunks, in order, with fresh randomness."""

    def open(self, chunks: Iterable[bytes], slots: int) -> Slots:
        """The chunks of a folded sum to (slots,) uint64. Raises ChunkRefused on a wrong size or count. The
        caller checks the sum tag before using any of it."""


class Fold(Protocol):
    """The coordinator's side: one running sum, for any number of sites."""

    def add(self, index: int, chunk: bytes) -> None:
        """Add chunk `index` of one site's vector to the running sum. Raises ChunkRefused, before anything is
        added, on a size or content that is not its place's."""

    def total(self) -> Iterator[bytes]:
        """The chunks of the sum, in order. Raises ChunkRefused while a chunk is missing."""


class UnmaskableFold(Fold, Protocol):
    """A fold of vectors that still have masks (`masked`, `layered`)."""

    def remove(self, mask: Slots) -> None:
        """Subtract the sum of all masks, (slots,) uint64 taken mod 2^slot_bits: once, at the end. Raises
        BadInput for another shape and a second time, ChunkRefused while a chunk is missing."""


def check_removal(mask: Slots, slots: int, *, removed: bool) -> None:
    """Raise BadInput unless `mask` is one (slots,) uint64 vector and no mask was removed before."""
    if mask.shape != (slots,) or mask.dtype != np.uint64:
        raise BadInput(
            f"masks: found {mask.dtype} of shape {mask.shape}, expected uint64 of shape ({slots},)"
        )
    if removed:
        raise BadInput("masks: found a second removal, expected one: they are off this sum already")
