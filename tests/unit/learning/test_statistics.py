"""Federated statistics against pooled NumPy, within half a fixed-point step, and the two small-count rules."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import BadInput, Refused
from fedcore.learning.data.statistics import (
    FIXED_POINT_BITS,
    MIN_CONTRIBUTORS,
    MIN_OBSERVED,
    Statistics,
    finish_statistics,
    site_sums,
    statistics_vector,
)
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.packing import solve_packing

LOW, HIGH = -3.0, 7.0
STEP = (HIGH - LOW) / (2**FIXED_POINT_BITS - 1)
NONE = np.empty(0, dtype=np.uint64)


def through_the_ring(parts, features, *, max_examples=512, bits=16):
    """The sites' sums as they travel: limbs, packing, one integer sum, and back."""
    spec = statistics_vector(features, max_examples)
    layout = Layout(spec, solve_packing(bits, len(parts), "plain"), len(parts))
    total = sum(layout.pack(NONE, part, site) for site, part in enumerate(parts))
    return layout.unpack(total, range(len(parts))).wides


def federated(tables, ranges, **more):
    parts = [site_sums(table, ranges) for table in tables]
    names = [f"feature {i}" for i in range(len(ranges))]
    return finish_statistics(names, ranges, through_the_ring(parts, len(ranges)), **more)


@st.composite
def hospitals(draw: st.DrawFn):
    """3 to 5 sites with 5 to 40 rows of one feature, some rows missing, all inside the range."""
    value = st.one_of(st.floats(LOW, HIGH), st.sampled_from([LOW, HIGH, 0.0]))
    tables = []
    for _ in range(draw(st.integers(3, 5))):
        observed = draw(st.lists(value, min_size=MIN_OBSERVED, max_size=40))
        missing = draw(st.integers(0, 3))
        tables.append(np.array([*observed, *[np.nan] * missing]).reshape(-1, 1))
    return tables


@settings(max_examples=150)
@given(hospitals())
def test_mean_and_spread_are_the_pooled_ones_within_half_a_step(tables):
    found = federated(tables, [(LOW, HIGH)])
    pooled = np.concatenate(tables)
    pooled = pooled[~np.isnan(pooled)]
    assert found.count == (len(pooled),)
    assert found.sites == (len(tables),)
    assert found.clipped == (0,)
    slack = STEP / 2 * (1 + 1e-9) + 1e-12
    assert abs(found.mean[0] - pooled.mean()) <= slack
    fixed = np.rint((pooled - LOW) / STEP)
    if len(set(fixed.tolist())) == 1:
        assert found.std[0] == 1.0
    else:
        assert abs(found.std[0] - pooled.std()) <= slack
        assert found.std[0] == pytest.approx(fixed.std() * STEP, rel=1e-9)


@given(
    st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=60), st.integers(1, 2**20)
)  # fmt: skip
def test_the_variance_is_never_negative(values, repeats):
    """From integers, so even a million copies of nearly equal values leave no rounding below zero."""
    sums = {
        "count": [len(values) * repeats], "sum": [sum(values) * repeats],
        "square": [sum(v * v for v in values) * repeats], "contributes": [3], "clipped": [0],
    }  # fmt: skip
    with np.errstate(invalid="raise"):
        found = finish_statistics(["x"], [(0.0, 1.0)], sums)
    assert found.std[0] > 0
    exact = np.std(values) / (2**16 - 1)
    assert found.std[0] == (pytest.approx(exact, rel=1e-9) if len(set(values)) > 1 else 1.0)


def test_a_constant_feature_has_spread_one():
    for value in (LOW, 0.1, HIGH):
        found = federated([np.full((9, 1), value)] * 3, [(LOW, HIGH)])
        assert found.std[0] == 1.0
        assert found.mean[0] == pytest.approx(value, abs=STEP / 2)


@pytest.mark.parametrize("observed", [0, 1, 4])
def test_a_site_with_few_observed_rows_sends_zeros_only(observed):
    column = np.full((20, 1), np.nan)
    column[:observed] = 1e9  # out of the range too: not even that may be counted
    assert site_sums(column, [(LOW, HIGH)]) == {
        name: [0] for name in ("count", "sum", "square", "contributes", "clipped")
    }


def test_five_observed_rows_are_enough():
    column = np.array([[LOW], [LOW], [HIGH], [HIGH], [HIGH], [np.nan]])
    top = 2**FIXED_POINT_BITS - 1
    assert site_sums(column, [(LOW, HIGH)]) == {
        "count": [5], "sum": [3 * top], "square": [3 * top * top], "contributes": [1], "clipped": [0],
    }  # fmt: skip


def test_each_feature_is_counted_for_itself():
    table = np.array([[1.0, np.nan], [2.0, np.nan], [1.5, 1.0], [1.0, 1.0], [1.0, 1.0]])
    sums = site_sums(table, [(LOW, HIGH), (0.0, 2.0)])
    assert sums["count"] == [5, 0]
    assert sums["contributes"] == [1, 0]


@pytest.mark.parametrize("sites", [0, 1, 2])
def test_a_feature_of_fewer_than_three_sites_is_refused(sites):
    full, empty = np.full((9, 1), 1.0), np.full((9, 1), np.nan)
    tables = [full] * sites + [empty] * (4 - sites)
    with pytest.raises(Refused, match=f"'feature 0': found {sites} contributing") as refused:
        federated(tables, [(LOW, HIGH)])
    assert "protect.single_site_features" in refused.value.remedy
    allowed = federated(tables, [(LOW, HIGH)], allow_few_sites=True)
    assert allowed.sites == (sites,)
    if not sites:
        assert (allowed.mean[0], allowed.std[0]) == (pytest.approx((LOW + HIGH) / 2), 1.0)
    assert MIN_CONTRIBUTORS == 3
    federated([full] * 3, [(LOW, HIGH)])


def test_values_outside_the_public_range_are_clipped_and_counted():
    inside = np.linspace(LOW, HIGH, 10)
    wild = np.array([LOW - 1, HIGH + 100, -np.inf, np.inf, LOW, HIGH, HIGH + 1e-9])
    tables = [np.concatenate((inside, wild)).reshape(-1, 1)] * 3
    found = federated(tables, [(LOW, HIGH)])
    assert found.clipped == (3 * 5,)
    clipped = np.clip(np.concatenate((inside, wild)), LOW, HIGH)
    assert found.mean[0] == pytest.approx(clipped.mean(), abs=STEP / 2)
    assert found.std[0] == pytest.approx(clipped.std(), abs=STEP / 2)


@pytest.mark.parametrize("bits", [2, 8, 16, 24])
def test_the_largest_sums_fit_their_caps(bits):
    """As many rows as the cap, all at the top of the range: 2 f + log2 rows bits hold the squares."""
    cap = 100
    part = site_sums(np.full((cap, 2), HIGH), [(LOW, HIGH)] * 2)
    wides = through_the_ring([part] * 5, 2, max_examples=cap, bits=bits)
    top = 2**FIXED_POINT_BITS - 1
    assert wides["square"] == [5 * cap * top * top] * 2
    assert wides["count"] == [5 * cap] * 2
    over = site_sums(np.full((128, 2), HIGH), [(LOW, HIGH)] * 2)
    with pytest.raises(BadInput, match="public cap"):
        through_the_ring([over] * 5, 2, max_examples=cap, bits=bits)


def test_statistics_survive_json_exactly():
    found = federated(
        [np.random.default_rng(i).normal(size=(20, 2)) for i in range(3)], [(LOW, HIGH)] * 2
    )
    copy = Statistics.from_json(json.loads(json.dumps(found.to_json())))
    assert copy.to_json() == found.to_json()
    assert (copy.mean == found.mean).all()
    assert (copy.std == found.std).all()
