"""The rule of the next range, line by line (PROTOCOL Q, G)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.plans import round_plan

from fedcore.errors import ImpossibleSum
from fedcore.learning.adaptive_range import (
    CALIBRATION_EXPONENTS,
    calibrated_bound,
    exceedance_counts,
    exceeds,
)
from fedcore.learning.adaptive_range import next_bound as rule
from fedcore.learning.optimisers import init_state
from fedcore.learning.released import OpenedSum, applied, calibrated
from fedcore.learning.state import JobState
from fedcore.secagg.encode.pack import Opened
from fedcore.secagg.plan import (
    EXCEEDS,
    RangePlan,
    RoundPlan,
    ServerPlan,
    TrainPlan,
    solve_packing,
)

pytestmark = pytest.mark.usefixtures("no_drawings")

PLAN = RangePlan(lowest=2.0**-4, highest=2.0**4)
VALUES = 1_000_000


def next_bound(bound, over, over_half, values, plan, *, first=None, sites=2):
    """The rule, where two sites exceed the range and it is as calibrated, unless a test says otherwise."""
    return rule(bound, over, over_half, values, plan, first=first or bound, sites=sites)


@pytest.mark.parametrize(
    ("over", "over_half", "factor"),
    [
        (0, 0, 0.5),
        (0, 9, 0.5),  # below 1e-5
        (0, 10, 1.0),  # 1e-5 exactly is not below
        (0, 1000, 1.0),
        (1000, 1000, 1.0),  # 1e-3 exactly does not exceed
        (1001, 1001, 2.0),
        (1001, 0, 2.0),  # too many over wins
        (VALUES, VALUES, 2.0),
    ],
)
def test_the_rule_at_both_sides_of_each_threshold(over, over_half, factor):
    assert next_bound(1.0, over, over_half, VALUES, PLAN) == factor


def test_the_range_stays_within_the_plan():
    assert next_bound(PLAN.highest, VALUES, VALUES, VALUES, PLAN) == PLAN.highest
    assert next_bound(PLAN.highest / 2, VALUES, VALUES, VALUES, PLAN) == PLAN.highest
    assert next_bound(PLAN.lowest, 0, 0, VALUES, PLAN) == PLAN.lowest
    assert next_bound(PLAN.lowest * 2, 0, 0, VALUES, PLAN) == PLAN.lowest


@pytest.mark.parametrize("sites", [0, 1])
def test_one_site_alone_cannot_widen_the_range(sites):
    assert next_bound(1.0, VALUES, VALUES, VALUES, PLAN, sites=sites) == 1.0
    assert next_bound(1.0, VALUES, VALUES, VALUES, PLAN, sites=2) == 2.0


def test_one_site_alone_cannot_keep_it_from_growing_or_shrinking_when_the_others_agree():
    assert next_bound(1.0, VALUES, VALUES, VALUES, PLAN, sites=3) == 2.0
    assert next_bound(1.0, 0, 0, VALUES, PLAN, sites=1) == 0.5


def test_the_range_grows_to_four_times_its_first_value_and_no_further():
    bound, seen = 1.0, []
    for _ in range(5):
        bound = next_bound(bound, VALUES, VALUES, VALUES, PLAN, first=1.0, sites=4)
        seen.append(bound)
    assert seen == [2.0, 4.0, 4.0, 4.0, 4.0]
    # It may shrink below its first value, and comes back as far.
    assert next_bound(1.0, 0, 0, VALUES, PLAN, first=1.0) == 0.5
    assert next_bound(0.5, VALUES, VALUES, VALUES, PLAN, first=1.0) == 1.0


def test_a_site_exceeds_with_more_than_one_coordinate_in_a_thousand():
    assert [exceeds(over, 2000) for over in (0, 1, 2, 3)] == [False, False, False, True]
    assert exceeds(1, 31)
    assert not exceeds(0, 31)
    assert not exceeds(0, 0)


def test_a_fixed_range_and_an_empty_vector_do_not_move():
    fixed = RangePlan(adaptive=False)
    assert next_bound(0.3, VALUES, VALUES, VALUES, fixed) == 0.3
    assert next_bound(0.3, 0, 0, VALUES, fixed) == 0.3
    assert next_bound(0.3, 0, 0, 0, PLAN) == 0.3


@given(
    st.integers(-4, 4), st.integers(0, 2**40), st.integers(0, 2**40), st.integers(1, 2**30)
)  # fmt: skip
def test_whatever_is_counted_the_range_moves_one_step_at_most(exponent, over, over_half, values):
    bound = 2.0**exponent
    found = next_bound(bound, over, over_half, values, PLAN)
    assert found in {bound / 2, bound, bound * 2}
    assert PLAN.lowest <= found <= PLAN.highest


def test_calibration_counts_24_powers_of_two_strictly():
    assert len(CALIBRATION_EXPONENTS) == 24
    assert tuple(range(-16, 8)) == CALIBRATION_EXPONENTS
    update = np.array([0.0, 2.0**-16, -(2.0**-15), 1.0, -1.5, 200.0], dtype=np.float32)
    counts = dict(zip(CALIBRATION_EXPONENTS, exceedance_counts(update), strict=True))
    assert [counts[e] for e in (-16, -15, -14, -1, 0, 1, 7)] == [4, 3, 3, 3, 2, 1, 1]
    assert exceedance_counts(np.empty(0, dtype=np.float32)) == [0] * 24


def test_calibration_takes_the_smallest_power_that_clips_at_most_one_in_a_thousand():
    wide = RangePlan()
    counts = [2000] * 10 + [1001] + [1000] + [0] * 12
    assert calibrated_bound(counts, VALUES, wide) == 2.0 ** CALIBRATION_EXPONENTS[11]
    assert calibrated_bound([0] * 24, VALUES, wide) == 2.0**-16
    assert calibrated_bound([VALUES] * 24, VALUES, wide) == 2.0**7
    assert calibrated_bound([0] * 24, 0, wide) == 2.0**-16
    assert calibrated_bound([0] * 24, VALUES, PLAN) == PLAN.lowest
    assert calibrated_bound([VALUES] * 24, VALUES, PLAN) == PLAN.highest
    assert calibrated_bound([VALUES] * 23 + [0], VALUES, PLAN) == PLAN.highest
    with pytest.raises(ValueError, match="zip"):
        calibrated_bound([VALUES] * 23, VALUES, wide)


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=50))
def test_a_calibrated_range_clips_at_most_one_in_a_thousand_and_half_of_it_would_clip_more(values):
    update = np.array(values, dtype=np.float32)
    bound = calibrated_bound(exceedance_counts(update), len(update), RangePlan())
    assert np.count_nonzero(np.abs(update) > bound) * 1000 <= len(update)
    if bound > 2.0**-16:
        assert np.count_nonzero(np.abs(update) > bound / 2) * 1000 > len(update)


# ------------------------------------------------------------------------------ in a release


def test_a_release_widens_the_range_where_two_sites_put_the_mark_and_not_for_one():
    plan = RoundPlan(
        "t", "0" * 64, ("a", "b", "c", "d"), "masked", solve_packing(8, 4, "masked"), 5, 0, 64, 3,
        TrainPlan(), ServerPlan(), RangePlan(start=0.5),
    )  # fmt: skip
    state = JobState(init_state(np.zeros(5, dtype=np.float32), 5, plan.server, 0.5))
    wides = {"weight": [4 * 64], "over_range": [8], "over_half_range": [8]}
    for marks, bound in (([1, 0, 0, 0], 0.5), ([1, 1, 0, 0], 1.0)):
        opened = Opened(np.full(5, 4 * 128, dtype=np.uint64), wides | {EXCEEDS: marks})
        assert applied(plan, state, OpenedSum(opened, plan.sites)).server.bound == bound


@pytest.mark.parametrize("cap", [2, 128, 130, 255, 256])
@pytest.mark.parametrize("values", [1, 3, 129, 200, 255, 256])
def test_a_calibration_in_which_every_coordinate_exceeds_every_power_is_possible(values, cap):
    plan = round_plan(("a", "b", "c"), parameters=values, max_examples=cap)
    state = JobState(init_state(np.zeros(values, dtype=np.float32), values, plan.server, 0.0))
    counts = {"exceeding": [3 * values] * 24}
    nothing = np.empty(0, dtype=np.uint64)
    found = calibrated(plan, state, OpenedSum(Opened(nothing, counts), plan.sites))
    assert found.server.bound == 2.0 ** CALIBRATION_EXPONENTS[-1]
    one_more = {"exceeding": [3 * values + 1] + [0] * 23}
    with pytest.raises(ImpossibleSum, match=f"expected at most {3 * values}"):
        calibrated(plan, state, OpenedSum(Opened(nothing, one_more), plan.sites))
