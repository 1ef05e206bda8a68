"""Sums of contributions that are not packed: those of packed vectors, in any parts, with the same refusals."""

from __future__ import annotations

from itertools import starmap

import numpy as np
import pytest

from fedcore.errors import BadInput
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.encode.partial import PartialSum, RunningSum
from fedcore.secagg.packing import solve_packing
from fedcore.secagg.plan import VectorSpec, Wide

SITES, BITS = 5, 8
LAYOUT = Layout(
    VectorSpec("update", 9, (Wide("rows", 2, 5), Wide("large", 1, 70)), ("mark",)),
    solve_packing(BITS, SITES, "masked", 20), SITES,
)  # fmt: skip


def contribution(site, **changes):
    rng = np.random.default_rng(site)
    wides = {"rows": [site, 31], "large": [(1 << 69) + site], "mark": [site % 2]} | changes
    return rng.integers(0, 1 << BITS, size=9).astype("u8"), wides


def test_they_are_the_sums_of_packed_vectors_in_any_order_and_parts():
    places = [0, 1, 3, 4]
    packed = sum(LAYOUT.pack(*contribution(place), place) for place in places)
    expected = LAYOUT.unpack(packed, places)
    parts = list(starmap(PartialSum.of, ((place, contribution(place)) for place in places)))
    two = parts[1:3]
    pair = PartialSum((1, 3), sum(p.coordinates for p in two), [p.wides[0] for p in two])
    for order in (parts, parts[::-1], [parts[3], pair, parts[0]]):
        total = RunningSum(LAYOUT)
        for part in order:
            total.add(part, part.indices)
        found = total.opened()
        np.testing.assert_array_equal(found.coordinates, expected.coordinates)
        assert found.wides == expected.wides
        assert found.wides["large"] == [4 * (1 << 69) + sum(places)]


BAD = {
    "a field too large": (np.full(9, 1 << BITS, dtype="u8"), {}),
    "another length": (np.zeros(8, dtype="u8"), {}),
    "a value beyond its cap": (np.zeros(9, dtype="u8"), {"rows": [32, 0]}),
    "a negative value": (np.zeros(9, dtype="u8"), {"rows": [-1, 0]}),
    "too few values": (np.zeros(9, dtype="u8"), {"rows": [1]}),
    "a mark of 2": (np.zeros(9, dtype="u8"), {"mark": [2]}),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_no_vector_can_hold_is_refused_as_packing_refuses_it(bad):
    fields, changes = BAD[bad]
    given = fields, contribution(1, **changes)[1]
    said = []
    for add in (
        lambda: LAYOUT.pack(*given, 1),
        lambda: RunningSum(LAYOUT).add(PartialSum.of(1, given), [1]),
    ):
        with pytest.raises(BadInput) as refused:
            add()
        said.append(str(refused.value))
    assert said[0] == said[1]
