"""Packing and unpacking against a field-by-field reference, for every width and around every edge."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference

from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.packing import RINGS, Packing, field_width, solve_packing
from fedcore.secagg.plan import VectorSpec, Wide


@st.composite
def packings(draw: st.DrawFn) -> Packing:
    """Any proved packing of 2 to 24 bits and 1 to 200 sites: the solver's, or another k and ring."""
    bits, sites = draw(st.integers(2, 24)), draw(st.integers(1, 200))
    if draw(st.booleans()):
        return solve_packing(bits, sites, draw(st.sampled_from(["plain", "encrypted"])))
    ring = draw(st.sampled_from([None, *RINGS]))
    width = field_width(bits, sites)
    fits = [k for k in range(1, 60 // width + 1) if ring is None or ring.proves(sites, k * width)]
    return Packing(bits, sites, draw(st.sampled_from(fits)), ring)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Vectors of one coordinate, of some, and of exactly as many as fill 1 or 2 blocks, -1, +0, +1."""
    packing, roster = draw(packings()), 0
    roster = draw(st.integers(1, min(packing.max_sites, 9)))
    wides = tuple(
        Wide(f"wide {place}", draw(st.integers(0, 3)), draw(st.integers(1, 70)))
        for place in range(draw(st.integers(0, 2)))
    )
    empty = Layout(VectorSpec("update", 0, wides), packing, roster)
    blocks = draw(st.integers(1, 2))
    slots = blocks * packing.slots_per_block - empty.tag_slots
    full = slots * packing.fields_per_slot - blocks - empty.data_fields
    row = blocks * (packing.slots_per_block - 1) - empty.tag_slots
    size = draw(
        st.one_of(
            st.integers(1, 50),
            st.sampled_from([full - 1, full, full + 1]),
            st.integers(row - 2, row + 2),  # where row 0 ends
        )
    )
    return Layout(VectorSpec("update", max(1, size), wides), packing, roster)


def contribution(layout: Layout, rng: np.random.Generator, *, worst: bool):
    top = 2**layout.packing.bits - 1
    size = layout.spec.coordinates
    fields = np.full(size, top, np.uint64) if worst else rng.integers(0, top + 1, size, np.uint64)
    wides = {
        wide.name: [2**wide.bits - 1 if worst else int(rng.integers(0, 2 ** min(wide.bits, 62)))]
        * wide.count
        for wide in layout.spec.wides
    }
    return fields, wides


@settings(max_examples=150)
@given(layouts(), st.integers(0, 2**32), st.booleans())
def test_pack_is_the_reference(layout, seed, worst):
    fields, wides = contribution(layout, np.random.default_rng(seed), worst=worst)
    site = seed % layout.sites
    slots = layout.pack(fields, wides, site)
    assert slots.tolist() == reference.pack(layout, fields.tolist(), wides, site)
    assert int(slots.max()) < 2**layout.packing.slot_bits


@settings(max_examples=150)
@given(layouts(), st.integers(0, 2**32), st.booleans(), st.data())
def test_unpack_is_the_inverse_of_pack_under_addition(layout, seed, worst, data):
    """With as many contributions as the packing allows, each mark once, and worst-case fields."""
    rng = np.random.default_rng(seed)
    survivors = data.draw(
        st.lists(st.integers(0, layout.sites - 1), min_size=1, max_size=layout.sites, unique=True)
    )
    total = np.zeros(layout.slots, dtype=np.uint64)
    exact_fields = np.zeros(layout.spec.coordinates, dtype=object)
    exact_wides = {wide.name: [0] * wide.count for wide in layout.spec.wides}
    for site in survivors:
        fields, wides = contribution(layout, rng, worst=worst)
        slots = layout.pack(fields, wides, site)
        layout.put_tag(slots, 2**61 - 1)
        total += slots
        exact_fields += fields.astype(object)
        exact_wides = {
            name: [a + b for a, b in zip(old, wides[name], strict=True)]
            for name, old in exact_wides.items()
        }
    opened = layout.unpack(total, survivors)
    assert opened.coordinates.tolist() == exact_fields.tolist()
    assert opened.wides == exact_wides
    assert layout.read_tag(total) == len(survivors) * (2**61 - 1)
    naive = reference.unpack(layout, total.tolist())
    assert naive[: layout.spec.coordinates] == exact_fields.tolist()
    marks = [int(site in survivors) for site in range(layout.sites)]
    assert naive[layout.data_fields - layout.sites :] == marks


@settings(max_examples=40)
@given(packings())
def test_the_fullest_sum_of_the_largest_roster_never_spills_into_the_next_field(packing):
    """max_sites times the largest field in every place: the slot is full and still exact."""
    width, k, n = packing.field_width, packing.fields_per_slot, packing.max_sites
    largest = n * (2**packing.bits - 1)
    slot = sum(largest << (row * width) for row in range(k))
    assert slot < 2**packing.slot_bits <= 2**60
    size = 3 * k
    layout = Layout(VectorSpec("update", size), packing, n)
    one = layout.pack(np.full(size, 2**packing.bits - 1, np.uint64), {}, 0)
    mark, shift = reference.place_of(layout, size)
    others = one.copy()
    others[mark] -= np.uint64(1 << shift)
    total = one + others * np.uint64(n - 1)
    for site in range(1, n):
        slot, shift = reference.place_of(layout, size + site)
        total[slot] += np.uint64(1 << shift)
    assert layout.unpack(total, range(n)).coordinates.tolist() == [largest] * size


@pytest.mark.parametrize("bits", range(2, 25))
def test_one_coordinate_of_every_width(bits):
    packing = solve_packing(bits, 3, "encrypted")
    layout = Layout(VectorSpec("update", 1), packing, 3)
    total = sum(
        layout.pack(np.array([2**bits - 1], dtype=np.uint64), {}, site) for site in range(3)
    )
    assert layout.unpack(total, range(3)).coordinates.tolist() == [3 * (2**bits - 1)]
    assert layout.blocks == 1
