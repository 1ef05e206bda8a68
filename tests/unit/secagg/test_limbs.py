"""Wide integers in b-bit limbs: exact under addition, for any width (PROTOCOL W)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import reference

from fedcore.errors import BadInput
from fedcore.secagg.encode.pack import from_limbs, limb_count, to_limbs
from fedcore.secagg.packing import field_width


@st.composite
def wide_values(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    """The values of 1 to 200 sites, their width L and the bits b of a limb."""
    bits, wide_bits = draw(st.integers(2, 24)), draw(st.integers(1, 130))
    sites, count = draw(st.sampled_from([1, 2, 3, 7, 200])), draw(st.integers(0, 4))
    top = 2**wide_bits - 1
    value = st.one_of(st.integers(0, top), st.sampled_from([0, top]))
    row = st.lists(value, min_size=count, max_size=count)
    some = draw(st.lists(row, min_size=1, max_size=min(sites, 5)))
    return [some[i % len(some)] for i in range(sites)], wide_bits, bits


@given(wide_values())
def test_summed_limbs_recombine_to_the_summed_integers(case):
    rows, wide_bits, bits = case
    encoded = [to_limbs(row, wide_bits, bits) for row in rows]
    for row, limbs in zip(rows, encoded, strict=True):
        naive = [limb for value in row for limb in reference.limbs(value, wide_bits, bits)]
        assert limbs.tolist() == naive
        assert len(limbs) == len(row) * limb_count(wide_bits, bits)
        assert int(limbs.max(initial=0)) < 2**bits
    total = sum(encoded[1:], start=encoded[0])
    assert int(total.max(initial=0)) < 2 ** field_width(bits, len(rows))
    assert from_limbs(total, wide_bits, bits) == [sum(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("wide_bits", [1, 2, 16, 17, 61, 100])
def test_both_ends_of_the_public_cap(wide_bits):
    top = 2**wide_bits - 1
    assert from_limbs(to_limbs([0, top], wide_bits, 16), wide_bits, 16) == [0, top]
    for outside in (top + 1, -1):
        with pytest.raises(BadInput, match="wide coordinate 1: found a value outside"):
            to_limbs([0, outside], wide_bits, 16)


def test_a_refused_value_is_not_printed():
    with pytest.raises(BadInput) as refused:
        to_limbs([123456], 10, 16)
    assert "123456" not in str(refused.value) + refused.value.remedy


def test_numpy_integers_are_integers_and_floats_are_refused():
    assert to_limbs([np.int64(5), np.uint64(6)], 8, 4).tolist() == [5, 0, 6, 0]
    for fraction in (1.0, 2.7, np.float64(3)):
        with pytest.raises(TypeError):
            to_limbs([fraction], 8, 4)


@pytest.mark.parametrize(
    ("wide_bits", "bits", "count"), [(1, 24, 1), (24, 24, 1), (25, 24, 2), (61, 2, 31)]
)
def test_limb_count_is_the_ceiling(wide_bits, bits, count):
    assert limb_count(wide_bits, bits) == count
