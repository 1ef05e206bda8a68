"""quantise and dequantise against their slow references, and the error of a sum of quantised vectors."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reference import dequantise as slow_dequantise
from support.reference import quantise as slow_quantise

from fedcore.secagg.encode.quantise import dequantise, quantise, step_size

BITS = st.integers(2, 24)
BOUNDS = st.one_of(st.sampled_from([2.0**e for e in range(-20, 11)]), st.floats(1e-6, 1e3))


@st.composite
def vectors(draw: st.DrawFn) -> tuple[list[float], float]:
    bound = draw(BOUNDS)
    inside = st.floats(-1.0, 1.0).map(lambda share: share * bound)
    value = st.one_of(
        inside, st.sampled_from([0.0, bound, -bound, 2 * bound, -1e30, 1e30, bound / 2, 5e-324])
    )
    return draw(st.lists(value, min_size=1, max_size=20)), bound


@settings(max_examples=300)
@given(vectors(), BITS, st.integers(0, 2**32))
def test_quantise_is_the_reference(case, bits, seed):
    values, bound = case
    found = quantise(np.array(values), bits, bound, np.random.default_rng(seed))
    uniforms = np.random.default_rng(seed).random(len(values)).tolist()
    assert found.fields.tolist() == slow_quantise(values, bits, bound, uniforms)
    assert found.over == sum(abs(v) > bound for v in values)
    assert found.over_half == sum(abs(v) > bound / 2 for v in values)
    assert int(found.fields.min()) >= 1
    assert int(found.fields.max()) <= 2**bits - 1


@given(
    st.lists(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3), min_size=1, max_size=8),
    BITS, BOUNDS, st.integers(0, 2**32),
)  # fmt: skip
def test_a_sum_of_quantised_vectors_is_off_by_less_than_a_step_each(rows, bits, bound, seed):
    rng = np.random.default_rng(seed)
    values = np.array(rows) * bound
    fields = [quantise(row, bits, bound, rng).fields for row in values]
    total = sum(fields[1:], start=fields[0])
    found = dequantise(total, bits, bound, len(rows))
    error = np.abs(found - np.clip(values, -bound, bound).sum(axis=0))
    assert (error <= len(rows) * step_size(bits, bound) * (1 + 1e-6)).all()


@given(
    BITS, BOUNDS, st.integers(1, 200), st.lists(st.floats(0, 1), min_size=1, max_size=10)
)  # fmt: skip
def test_dequantise_is_the_exact_value_to_two_roundings(bits, bound, contributors, shares):
    total = [round(share * contributors * (2**bits - 1)) for share in shares]
    found = dequantise(np.array(total, dtype=np.uint64), bits, bound, contributors)
    for value, exact in zip(found, slow_dequantise(total, bits, bound, contributors), strict=True):
        assert abs(Fraction(float(value)) - exact) <= abs(exact) * Fraction(3, 2**53)


@given(BITS, BOUNDS, st.integers(1, 200))
def test_absence_of_an_update_adds_nothing(bits, bound, contributors):
    zero = quantise(np.zeros(4), bits, bound, np.random.default_rng()).fields
    assert (dequantise(zero * np.uint64(contributors), bits, bound, contributors) == 0.0).all()
