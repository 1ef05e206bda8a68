"""The layout of one vector: where canaries, marks and tag sit, and what unpacking refuses."""

from __future__ import annotations

import numpy as np
import pytest
from support import reference

from fedcore.errors import BadInput, TagRefused
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.packing import solve_packing
from fedcore.secagg.plan import VectorSpec, Wide

SITES = 5
PACKING = solve_packing(16, SITES, "encrypted")


def layout_of(coordinates: int, wides: tuple[Wide, ...] = (), packing=PACKING) -> Layout:
    return Layout(VectorSpec("update", coordinates, wides), packing, SITES)


def capacity(blocks: int, packing=PACKING) -> int:
    """Data fields of `blocks` blocks, counted by the reference."""
    layout = layout_of(1, packing=packing)
    slots = blocks * packing.slots_per_block - layout.tag_slots
    return slots * packing.fields_per_slot - blocks  # a canary in each block's first slot


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("bits", [2, 8, 16, 24])
@pytest.mark.parametrize("protection", ["plain", "encrypted"])
def test_a_vector_takes_the_fewest_blocks(blocks, bits, protection):
    packing = solve_packing(bits, SITES, protection)
    full = capacity(blocks, packing) - SITES
    assert layout_of(full, packing=packing).blocks == blocks
    assert layout_of(full + 1, packing=packing).blocks == blocks + 1
    assert len(list(reference.places(layout_of(full, packing=packing)))) == full + SITES


def test_a_million_coordinates_take_what_division_says():
    layout = layout_of(1_000_000)
    assert capacity(layout.blocks - 1) < 1_000_000 + SITES <= capacity(layout.blocks)
    assert layout.used_fraction > 0.99
    assert layout.slots == reference.tagged_slots(layout) + 4
    assert (layout.blocks - 1) * 2048 < layout.slots <= layout.blocks * 2048


def test_canaries_open_each_block_and_the_tag_closes_the_last():
    layout = layout_of(5000)
    slots = layout.pack(np.zeros(5000, dtype=np.uint64), {}, 2)
    assert layout.blocks == 2
    assert slots[0] == slots[2048] == 2**16 - 1
    assert layout.tag_slots == 4  # 61 bits in 16-bit limbs
    assert layout.tagged_slots == layout.slots - 4
    assert not slots[-4:].any()
    layout.put_tag(slots, 2**61 - 2)
    assert slots[-4:].tolist() == reference.limbs(2**61 - 2, 61, 16)
    assert layout.read_tag(slots * np.uint64(3)) == 3 * (2**61 - 2)


def test_a_block_that_holds_only_the_tag_has_no_canary():
    packing = solve_packing(4, SITES, "encrypted")
    layout = layout_of(capacity(1, packing) - SITES + 1, packing=packing)
    assert (layout.blocks, layout.tag_slots) == (2, 16)
    assert layout.tagged_slots <= packing.slots_per_block < layout.slots
    fields = np.full(layout.spec.coordinates, 15, dtype=np.uint64)
    rows = [layout.pack(fields, {}, site) for site in range(SITES)]
    assert not rows[0][layout.tagged_slots :].any()
    for row in rows:
        layout.put_tag(row, 12_345)
    total = sum(rows)
    assert layout.unpack(total, range(SITES)).coordinates.tolist() == [15 * SITES] * len(fields)
    assert layout.read_tag(total) == SITES * 12_345


def test_the_tag_places_hold_nothing_else():
    """Written with the widest data, cleared of nothing: the tag must find them empty."""
    for coordinates in (1, capacity(1) - SITES, capacity(2) - SITES):
        layout = layout_of(coordinates)
        widest = np.full(coordinates, 2**16 - 1, dtype=np.uint64)
        assert not layout.pack(widest, {}, 0)[layout.tagged_slots :].any()


def packed(layout: Layout, sites=range(SITES), seed=0):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 2**16, layout.spec.coordinates, dtype=np.uint64) for _ in sites]
    wides = {wide.name: list(range(wide.count)) for wide in layout.spec.wides}
    return sum(layout.pack(row, wides, site) for row, site in zip(rows, sites, strict=True)), rows


def test_marks_of_other_survivors_are_refused():
    layout = layout_of(100)
    total, _ = packed(layout, sites=(0, 1, 3))
    layout.unpack(total, (0, 1, 3))
    layout.unpack(total, (3, 0, 1))
    for wrong in ((0, 1, 2), (0, 1, 1)):
        with pytest.raises(TagRefused, match="contributor marks"):
            layout.unpack(total, wrong)
    twice, _ = packed(layout, sites=(0, 1, 1))
    for claimed in ((0, 1, 2), (0, 1, 1)):
        with pytest.raises(TagRefused, match="contributor marks"):
            layout.unpack(twice, claimed)


@pytest.mark.parametrize("block", [0, 1])
def test_a_canary_of_another_number_of_sites_is_refused(block):
    layout = layout_of(5000)
    total, _ = packed(layout)
    for wrong in (range(4), [*range(5), 0]):
        with pytest.raises(TagRefused, match="canary"):
            layout.unpack(total, wrong)
    total[block * 2048] -= 1
    with pytest.raises(TagRefused, match="canary"):
        layout.unpack(total, range(SITES))


def test_a_missing_block_is_found_by_its_canary():
    layout = layout_of(5000)
    total, _ = packed(layout)
    total[2048 : 2048 + 2000] = 0
    with pytest.raises(TagRefused, match="canary"):
        layout.unpack(total, range(SITES))


@pytest.mark.parametrize("size", [0, 99, 101])
def test_a_model_of_another_size_is_refused(size):
    layout = layout_of(100)
    with pytest.raises(BadInput, match=f"found {size} coordinates, expected 100") as refused:
        layout.pack(np.zeros(size, dtype=np.uint64), {}, 0)
    assert "same model" in refused.value.remedy


def test_a_field_that_could_wrap_a_sum_is_refused():
    layout = layout_of(100)
    fields = np.full(100, 2**16 - 1, dtype=np.uint64)
    layout.pack(fields, {}, 0)
    fields[57] = 2**16
    with pytest.raises(BadInput, match="a field of more than 16 bits"):
        layout.pack(fields, {}, 0)


def test_wide_integers_of_another_count_or_size_are_refused():
    layout = layout_of(3, (Wide("sums", 2, 20),))
    fields = np.zeros(3, dtype=np.uint64)
    layout.pack(fields, {"sums": [0, 2**20 - 1]}, 0)
    with pytest.raises(BadInput, match="sums: found 1 values, expected 2"):
        layout.pack(fields, {"sums": [0]}, 0)
    with pytest.raises(BadInput, match="public cap of 20 bits"):
        layout.pack(fields, {"sums": [0, 2**20]}, 0)


@pytest.mark.parametrize("slots", [0, 8, 15, 17, 2048])
def test_a_sum_of_another_size_is_refused(slots):
    with pytest.raises(BadInput, match=f"found {slots} slots, expected 16"):
        layout_of(3).unpack(np.zeros(slots, dtype=np.uint64), range(SITES))


MARKED = Layout(
    VectorSpec("update", 3, (Wide("weight", 1, 20),), ("exceeds", "late")), PACKING, SITES
)


def marked(site, exceeds, late=0):
    wides = {"weight": [7], "exceeds": [exceeds], "late": [late]}
    return MARKED.pack(np.ones(3, dtype=np.uint64), wides, site)


def test_each_site_has_a_place_of_its_own_for_a_named_mark():
    total = sum(marked(site, exceeds=site % 2, late=1) for site in (0, 1, 3))
    opened = MARKED.unpack(total, (0, 1, 3))
    assert opened.wides == {"weight": [21], "exceeds": [0, 1, 0, 1, 0], "late": [1, 1, 0, 1, 0]}
    for site in (0, 1, 3):
        MARKED.check_own(opened, MARKED.own_marks({"exceeds": [site % 2], "late": [1]}), site)


def field_added(slots, field, value):
    """Slots with something added to one field: row 0 holds the first ones, after the canary."""
    changed = slots.copy()
    changed[1 + field : 2 + field] += np.uint64(value)
    return changed


EXCEEDS_OF = {site: 3 + 2 + site for site in range(SITES)}
"""Fields before it: three coordinates and two limbs of the weight."""


@pytest.mark.parametrize(("place", "value"), [(1, 2), (2, 1), (4, 5)])
def test_a_mark_that_no_survivor_can_have_put_is_refused(place, value):
    """2 in one place, or any in the place of a site that is not in the sum."""
    total = sum(marked(site, exceeds=0) for site in (0, 1, 3))
    MARKED.unpack(total, (0, 1, 3))
    with pytest.raises(TagRefused, match="marks 'exceeds' that the listed survivors cannot"):
        MARKED.unpack(field_added(total, EXCEEDS_OF[place], value), (0, 1, 3))


@pytest.mark.parametrize("put", [0, 1])
def test_a_mark_put_for_another_site_is_found_by_that_site(put):
    total = sum(marked(site, exceeds=put) for site in (0, 1, 3))
    step = 1 if put == 0 else (1 << 64) - 1  # one more, or one less
    opened = MARKED.unpack(field_added(total, EXCEEDS_OF[3], step), (0, 1, 3))
    own = MARKED.own_marks({"exceeds": [put], "late": [0]})
    MARKED.check_own(opened, own, 0)
    with pytest.raises(TagRefused, match="'exceeds' in this site's place that it did not put"):
        MARKED.check_own(opened, own, 3)


@pytest.mark.parametrize("wrong", [[2], [0, 1], [], [-1]])
def test_a_mark_is_one_value_0_or_1(wrong):
    with pytest.raises(BadInput, match="expected one value, 0 or 1"):
        MARKED.pack(np.ones(3, dtype=np.uint64), {"weight": [7], "exceeds": wrong, "late": [0]}, 2)
