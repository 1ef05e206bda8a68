"""Pack fields into slots, with marks, canaries and the places of the tag.

One vector of S slots: as few as hold the data and the tag, in blocks of N of which the last may be short. Field f of
the data fills row 0 of the slots first, then row 1, ... (row r is shifted by r w bits), so packing is k shifts over
contiguous memory:

    row 0:   C d d d d d ... | C d d d d ... | C d d . . .    C = canary, the first of its block
    row k-1: d d d d d d ... | d d d d d ... | d d 0 . . .    . = the last L slots: the tag's limbs

Invariant: every field of a sum is below 2^w, so rows never overflow into each other.

- **marks**: site i puts 1 into mark i; the sum's marks are the survivors. A named mark of the spec has one
  place a site too, and site i puts 0 or 1 into place i; each site checks its own place in the sum.
- **canaries**: the largest field value, one per block with data: they detect wraps and missing blocks.
- **limbs**: an integer of more than b bits is b-bit limbs, one a field (PROTOCOL W). Recombining the summed limbs
  gives the sum of the integers, because `sum_i sum_j 2^(b j) limb_ij = sum_j 2^(b j) sum_i limb_ij`.
Marks and canaries detect accidents. The sum tag is the proof against a dishonest coordinator (`crypto/sumtag.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index as index_of

import numpy as np

from fedcore.errors import BadInput, TagRefused
from fedcore.secagg.encode.bitpack import WHOLE
from fedcore.secagg.packing import Packing
from fedcore.secagg.plan import TAG_BITS, VectorSpec
from fedcore.types import Fields, Slots


def limb_count(wide_bits: int, bits: int) -> int:
    """ceil(L / b): the number of fields for one integer of L = `wide_bits` bits."""
    return -(-wide_bits // bits)


def to_limbs(values: Sequence[int], wide_bits: int, bits: int) -> Fields:
    """(m,) integers in [0, 2^wide_bits) to (m * ceil(L / b),) fields, least significant limb first.

    Works on Python integers, since L may exceed 64. Raises BadInput outside the range, TypeError for a
    float, whose fraction would be lost.
    """
    integers = check_caps(values, wide_bits)
    mask, shifts = (1 << bits) - 1, range(0, limb_count(wide_bits, bits) * bits, bits)
    return np.array([(each >> shift) & mask for each in integers for shift in shifts], np.uint64)


def check_caps(values: Sequence[int], wide_bits: int) -> list[int]:
    """The values as Python integers. Raises as `to_limbs`."""
    integers = [index_of(value) for value in values]
    for index, integer in enumerate(integers):
        if not 0 <= integer < 1 << wide_bits:
            raise BadInput(
                f"wide coordinate {index}: found a value outside its public cap of {wide_bits} bits",
                remedy="raise the cap it comes from (protect.max_examples, or the task's ranges)",
            )
    return integers


def from_limbs(total: Fields, wide_bits: int, bits: int) -> list[int]:
    """(m * ceil(L / b),) summed limbs to m exact Python integers: the inverse of `to_limbs` under addition."""
    count = limb_count(wide_bits, bits)
    rows = total.reshape(-1, count).tolist()
    return [sum(limb << (place * bits) for place, limb in enumerate(row)) for row in rows]


@dataclass(frozen=True)
class Opened:
    """An unpacked sum. coordinates: (d,) uint64 sums of fields; wides: {name: exact integers}.

    A named mark is in `wides` too: 0 or 1 for each site of the roster, in its order.
    """

    coordinates: Fields
    wides: Mapping[str, list[int]]


@dataclass(frozen=True)
class Layout:
    """Where each part of a vector is: a pure function of the spec, packing and number of sites."""

    spec: VectorSpec
    packing: Packing
    sites: int

    @cached_property
    def data_fields(self) -> int:
        """Fields of coordinates, wide limbs and marks together."""
        bits = self.packing.bits
        wide = sum(w.count * limb_count(w.bits, bits) for w in self.spec.wides)
        return self.spec.coordinates + wide + self.sites * (len(self.spec.marks) + 1)

    @property
    def tag_slots(self) -> int:
        """The last slots, which carry the sum tag's limbs, one limb a slot."""
        return limb_count(TAG_BITS, self.packing.bits)

    @cached_property
    def tagged_slots(self) -> int:
        """The slots that the sum tag covers, all but its own: as few as hold the data, rounded up until all slots
        together fill whole bytes on the wire."""
        each, slots = self.packing.fields_per_slot, 0
        while (missing := self.data_fields - slots * each + self._canaries(slots)) > 0:
            slots += -(-missing // each)
        return -(-(slots + self.tag_slots) // WHOLE) * WHOLE - self.tag_slots

    def _canaries(self, slots: int) -> int:
        """Of so many slots before the tag: one a block that they begin."""
        return -(-slots // self.packing.slots_per_block)

    @property
    def slots(self) -> int:
        """S: all slots, including the tag's. Nothing else travels, also of a block that they do not fill."""
        return self.tagged_slots + self.tag_slots

    @property
    def blocks(self) -> int:
        """The number of ciphertexts (blocks of N slots) of the vector."""
        return -(-self.slots // self.packing.slots_per_block)

    @property
    def used_fraction(self) -> float:
        """Share of the fields of all blocks that hold data, 0 to 1."""
        fields = self.packing.slots_per_block * self.packing.fields_per_slot
        return self.data_fields / (self.blocks * fields)

    def pack(self, coordinates: Fields, wides: Mapping[str, Sequence[int]], site: int) -> Slots:
        """One site's (S,) uint64 slots, tag places zero. `site` is its index in the roster.

        wides: by name; of a named mark the one value, 0 or 1, that goes into this site's place.
        """
        return self._pack_fields(self._join(coordinates, wides, site))

    def _join(self, coordinates: Fields, wides: Mapping[str, Sequence[int]], site: int) -> Fields:
        self.check_fields(coordinates, 1)
        self.check_wides(wides)
        spec, bits = self.spec, self.packing.bits
        limbs = [to_limbs(wides[wide.name], wide.bits, bits) for wide in spec.wides]
        marks = [self._mark(site, wides[name][0]) for name in spec.marks]
        return np.concatenate([coordinates, *limbs, *marks, self._mark(site, 1)])

    def check_fields(self, coordinates: Fields, sites: int) -> None:
        """Raise BadInput for coordinates that are not of this vector, or not the sum of so many sites' fields."""
        if len(coordinates) != self.spec.coordinates:
            raise BadInput(
                f"update: found {len(coordinates)} coordinates, expected {self.spec.coordinates}",
                remedy="every site must build the same model",
            )
        bits = self.packing.bits
        if int(coordinates.max(initial=0)) > sites * ((1 << bits) - 1):
            raise BadInput(
                f"update: found a field of more than {bits} bits, which could wrap a sum"
            )

    def check_wides(self, wides: Mapping[str, Sequence[int]]) -> None:
        """Raise BadInput for a site's wide integers and marks that are not of this vector, but for their size
        (`check_caps`)."""
        for wide in self.spec.wides:
            values = wides[wide.name]
            if len(values) != wide.count:
                raise BadInput(f"{wide.name}: found {len(values)} values, expected {wide.count}")
        for name in self.spec.marks:
            if list(wides[name]) not in ([0], [1]):
                raise BadInput(f"{name}: found {list(wides[name])}, expected one value, 0 or 1")

    def _mark(self, site: int, value: int) -> Fields:
        """(sites,) fields: the value in this site's place, 0 in the others."""
        marks = np.zeros(self.sites, dtype=np.uint64)
        marks[site] = value
        return marks

    def check_own(self, opened: Opened, own: Mapping[str, int], site: int) -> None:
        """Raise TagRefused if this site's place of a named mark has another value than it put there.

        own: {mark: 0 or 1} of this site; `site` is its index in the roster.
        """
        for name, value in own.items():
            if opened.wides[name][site] != value:
                raise TagRefused(
                    f"sum: found a mark {name!r} in this site's place that it did not put"
                )

    def own_marks(self, wides: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """{mark: value} of a site's contribution, with which `check_own` compares the sum."""
        return {name: int(wides[name][0]) for name in self.spec.marks}

    def _pack_fields(self, data: Fields) -> Slots:
        size, width = self.packing.slots_per_block, self.packing.field_width
        slots, taken = np.zeros(self.slots, dtype=np.uint64), 0
        slots[: self.tagged_slots : size] = (1 << self.packing.bits) - 1
        for row, places in self._runs():
            part = data[taken : taken + places.stop - places.start]
            slots[places.start : places.start + len(part)] |= part << np.uint64(row * width)
            taken += len(part)
        return slots

    def put_tag(self, slots: Slots, tag: int) -> None:
        """Write a tag in [0, 2^61) into its slots, in place."""
        slots[self.tagged_slots :] = to_limbs([tag], TAG_BITS, self.packing.bits)

    def read_tag(self, total: Slots) -> int:
        """The sum of the sites' tags, an exact integer."""
        return from_limbs(total[self.tagged_slots :], TAG_BITS, self.packing.bits)[0]

    def unpack(self, total: Slots, survivors: Sequence[int]) -> Opened:
        """Unpack a sum of `survivors` (indices in the roster): the inverse of `pack` under addition.

        Raises TagRefused if a mark or canary does not fit these survivors, or if a named mark is neither 0
        nor 1, or not 0 for a site that is not in the sum; BadInput for another length.
        """
        if len(total) != self.slots:
            raise BadInput(f"sum: found {len(total)} slots, expected {self.slots}")
        bits, low = self.packing.bits, np.uint64((1 << self.packing.field_width) - 1)
        canaries = total[: self.tagged_slots : self.packing.slots_per_block] & low
        if not (canaries == len(survivors) * ((1 << bits) - 1)).all():
            raise TagRefused("sum: a canary is not the sum of the listed survivors' canaries")
        data = self.fields_of(total)
        coordinates, place = data[: self.spec.coordinates], self.spec.coordinates
        wides: dict[str, list[int]] = {}
        for wide in self.spec.wides:
            length = wide.count * limb_count(wide.bits, bits)
            wides[wide.name] = from_limbs(data[place : place + length], wide.bits, bits)
            place += length
        expected = np.zeros(self.sites, dtype=np.uint64)
        expected[list(survivors)] = 1
        for name in self.spec.marks:
            found = data[place : place + self.sites]
            if (found > expected).any():
                raise TagRefused(
                    f"sum: found marks {name!r} that the listed survivors cannot have put"
                )
            wides[name] = [int(value) for value in found]
            place += self.sites
        marks = data[place : place + self.sites]
        if not np.array_equal(marks, expected):
            raise TagRefused("sum: the contributor marks are not those of the listed survivors")
        return Opened(coordinates, wides)

    def fields_of(self, slots: Slots) -> Fields:
        """The (data_fields,) fields, each below 2^w, of (S,) slots of any kind; nothing is checked."""
        width, mask = self.packing.field_width, np.uint64((1 << self.packing.field_width) - 1)
        data, taken = np.empty(self.data_fields, dtype=np.uint64), 0
        for row, places in self._runs():
            part = data[taken : taken + places.stop - places.start]
            found = slots[places.start : places.start + len(part)]
            np.bitwise_and(found >> np.uint64(row * width), mask, out=part)
            taken += len(part)
        return data

    def _runs(self) -> Iterator[tuple[int, slice]]:
        """Row and slots of each run of data fields, in their order: row 0 between canaries, then whole rows."""
        size, end = self.packing.slots_per_block, self.tagged_slots
        for start in range(0, end, size):
            yield 0, slice(start + 1, min(start + size, end))
        for row in range(1, self.packing.fields_per_slot):
            yield row, slice(0, end)
