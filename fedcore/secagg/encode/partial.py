"""Sums of the contributions of some sites, before any packing: what a simulation adds that leaves the protocol out.

Packing is linear: the fields of a sum of packed vectors are the sums of their fields, since no sum overflows its field
(`secagg/packing.py`). So vectors need not be packed to be added, and partial sums can be added in any order.
Invariant: what `Layout.pack` refuses of a contribution is refused here too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.secagg.encode.pack import Layout, Opened, check_caps
from fedcore.secagg.plan import Wide
from fedcore.types import Contribution, Fields


@dataclass(frozen=True)
class PartialSum:
    """indices: roster indices of the sites; coordinates: (d,) uint64, the sum of their fields; wides: the wide integers
    of each, by name."""

    indices: tuple[int, ...]
    coordinates: Fields
    wides: Sequence[Mapping[str, Sequence[int]]]

    @classmethod
    def of(cls, index: int, contribution: Contribution) -> PartialSum:
        """Of one site."""
        coordinates, wides = contribution
        return cls((index,), coordinates, (wides,))


class RunningSum:
    """What is left of a round without its protocol. layout: of the round's vectors."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._coordinates = np.zeros(layout.spec.coordinates, dtype=np.uint64)
        self._wides = {wide.name: _zeros(wide, layout.sites) for wide in layout.spec.wides}
        self._marks = {name: [0] * layout.sites for name in layout.spec.marks}

    def add(self, part: PartialSum, places: Sequence[int]) -> None:
        """places: of the sites of the part in the layout. Raises BadInput for what does not fit a vector."""
        layout = self._layout
        layout.check_fields(part.coordinates, len(places))
        self._coordinates += part.coordinates
        for place, wides in zip(places, part.wides, strict=True):
            layout.check_wides(wides)
            for wide in layout.spec.wides:
                total = self._wides[wide.name]
                total += np.array(check_caps(wides[wide.name], wide.bits), dtype=total.dtype)
            for name, marks in self._marks.items():
                marks[place] = int(wides[name][0])

    def opened(self) -> Opened:
        wides = {name: total.tolist() for name, total in self._wides.items()}
        return Opened(self._coordinates, {**wides, **self._marks})


def _zeros(wide: Wide, sites: int) -> NDArray[Any]:
    """Sums of so many sites' integers, which need not fit in 64 bits."""
    fits = wide.bits + sites.bit_length() < _INT64_BITS
    return np.zeros(wide.count, dtype=np.int64 if fits else object)


_INT64_BITS = 63
