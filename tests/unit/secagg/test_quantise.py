"""What quantising promises at its edges: zero, the bound, NaN, empty vectors, blocks."""

from __future__ import annotations

import numpy as np
import pytest
from support import reference

from fedcore.errors import BadInput
from fedcore.secagg.encode import quantise as module
from fedcore.secagg.encode.quantise import dequantise, quantise, quantise_sum, step_size


class Uniform:
    """A generator that returns the same number for ever; for the ends of [0, 1)."""

    def __init__(self, value):
        self.value = value

    def random(self, size):
        return np.full(size, self.value)


ALMOST_ONE = float(np.nextafter(1.0, 0.0))


@pytest.mark.parametrize("bits", range(2, 25))
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-26])
def test_zero_and_the_ends_of_the_range_are_exact(bits, uniform):
    for bound in (1.0, 0.3, 2.0**-20, 1e10):
        found = quantise(np.array([0.0, -0.0, bound, -bound]), bits, bound, Uniform(uniform))
        offset, levels = 1 << (bits - 1), (1 << (bits - 1)) - 1
        assert found.fields.tolist() == [offset, offset, offset + levels, offset - levels]
        assert (found.over, found.over_half) == (0, 2)
        assert found.fields.dtype == np.uint64


def test_the_last_bit_of_the_product_never_leaves_the_field():
    # levels / bound rounds up for many bounds: bound * (levels / bound) + u may pass levels + 1.
    rng = np.random.default_rng(5)
    for bits in (2, 8, 24):
        for bound in rng.random(2000) + 0.5:
            ends = quantise(np.array([bound, -bound]), bits, float(bound), Uniform(ALMOST_ONE))
            assert ends.fields.min() >= 1
            assert int(ends.fields.max()) <= 2**bits - 1


@pytest.mark.parametrize("bits", range(2, 25))
def test_a_block_that_ends_just_inside_the_range_is_the_reference_too(bits):
    """Each share of the bound is the largest of its block, on both sides of every shortcut."""
    shares = [0.25, 0.5, 0.5 + 1e-12, 0.989, 0.99, 0.99 + 1e-12, ALMOST_ONE, 1.0, 1 + 1e-12, 3.0]
    for bound in (1.0, 0.3, 2.0**-20):
        for share in shares:
            for value in (share * bound, -share * bound):
                for uniform in (0.0, ALMOST_ONE):
                    found = quantise(np.array([value, 0.0]), bits, bound, Uniform(uniform))
                    naive = reference.quantise([value, 0.0], bits, bound, [uniform] * 2)
                    assert found.fields.tolist() == naive
                    assert found.over == (abs(value) > bound)
                    assert found.over_half == (abs(value) > bound / 2)


def test_quantising_leaves_the_update_as_it_was():
    values = np.array([0.2, -5.0, 5.0])
    quantise(values, 8, 1.0, np.random.default_rng(0))
    assert values.tolist() == [0.2, -5.0, 5.0]


def test_clipped_coordinates_are_counted_on_both_sides():
    values = np.array([-5.0, -1.0, -0.6, -0.5, 0.0, 0.5, 0.51, 1.0, 1.0000001, 7.0])
    found = quantise(values, 8, 1.0, Uniform(0.0))
    assert found.over == 3  # strictly beyond R
    assert found.over_half == 7  # strictly beyond R / 2
    assert found.fields[0] == 1
    assert found.fields[-1] == 255


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 2, module.BLOCK, module.BLOCK + 3])
def test_nan_and_infinity_are_refused_by_place(bad, where):
    values = np.zeros(module.BLOCK + 5, dtype=np.float32)
    values[where] = bad
    with pytest.raises(BadInput, match=f"NaN or infinity at coordinate {where}, expected finite"):
        quantise(values, 16, 1.0, np.random.default_rng(0))


def test_an_empty_vector_stays_empty():
    found = quantise(np.empty(0), 16, 1.0, np.random.default_rng(0))
    assert (len(found.fields), found.over, found.over_half) == (0, 0, 0)
    assert len(dequantise(found.fields, 16, 1.0, 3)) == 0


@pytest.mark.parametrize(
    "size", [module.BLOCK - 1, module.BLOCK, module.BLOCK + 1, 2 * module.BLOCK + 1]
)
def test_blocks_leave_no_seam(size):
    values = np.random.default_rng(1).normal(size=size).astype(np.float32)
    found = quantise(values, 16, 1.0, np.random.default_rng(2))
    uniforms = np.random.default_rng(2).random(size).tolist()
    naive = reference.quantise(values.astype(float).tolist(), 16, 1.0, uniforms)
    assert found.fields.tolist() == naive
    assert found.over == (np.abs(values) > 1).sum()
    assert found.over_half == (np.abs(values) > 0.5).sum()


def test_rounding_is_unbiased():
    value, bound, count = 0.3, 1.0, 200_000
    found = quantise(np.full(count, value), 4, bound, np.random.default_rng(3))
    mean = dequantise(found.fields, 4, bound, 1).mean()
    # One step is 1/7; the standard error of the mean is at most step / 2 / sqrt(count) = 1.6e-4.
    assert mean == pytest.approx(value, abs=5 * 1.6e-4)


def test_step_size_is_the_distance_of_neighbouring_levels():
    levels = dequantise(np.arange(1, 16, dtype=np.uint64), 4, 0.7, 1)
    assert np.diff(levels) == pytest.approx(step_size(4, 0.7))
    assert (levels[0], levels[7], levels[-1]) == (pytest.approx(-0.7), 0.0, pytest.approx(0.7))


@pytest.mark.parametrize(("sites", "width", "bits"), [(3, 70_001, 16), (400, 201, 24), (1, 5, 2)])
def test_many_sites_are_rounded_to_the_same_integers_at_once(sites, width, bits):
    rng = np.random.default_rng(sites)
    values = rng.normal(scale=0.4, size=(sites, width)).astype("f4")
    values[0, :3] = 1.0, -1.0, 30.0
    factors = rng.uniform(0.1, 1.0, size=sites)
    factors[0] = 1.0

    def rounding(site):
        return np.random.Generator(np.random.Philox(site))

    one_by_one = [
        quantise(row.astype("f8") * factor, bits, 1.0, rounding(k))
        for k, (row, factor) in enumerate(zip(values, factors, strict=True))
    ]
    for k, expected in enumerate(one_by_one):
        found = quantise_sum(values[k : k + 1], factors[k : k + 1], bits, 1.0, [rounding(k)])
        np.testing.assert_array_equal(found.total, expected.fields)
        assert (found.over[0], found.over_half[0]) == (expected.over, expected.over_half)
    whole = quantise_sum(values, factors, bits, 1.0, [rounding(k) for k in range(sites)])
    np.testing.assert_array_equal(whole.total, np.sum([e.fields for e in one_by_one], axis=0))
    assert whole.total.dtype == np.uint64
    assert whole.over.tolist() == [e.over for e in one_by_one] and whole.over[0] > 0
    assert whole.over_half.tolist() == [e.over_half for e in one_by_one]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused_for_many_sites_too(bad):
    values = np.zeros((2, 7), dtype="f4")
    values[1, 4] = bad
    with pytest.raises(BadInput, match="NaN or infinity at coordinate 4"):
        quantise_sum(values, np.ones(2), 8, 1.0, [np.random.default_rng(k) for k in (0, 1)])
