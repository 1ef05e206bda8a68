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
    measured_anew,
    outgrown,
)
from fedcore.learning.adaptive_range import next_bound as rule
from fedcore.learning.optimisers import init_state
from fedcore.learning.released import OpenedSum, applied, calibrated
from fedcore.learning.state import JobState
from fedcore.secagg.encode.pack import Opened
from fedcore.secagg.packing import solve_packing
from fedcore.secagg.plan import EXCEEDS, RangePlan, RoundPlan, ServerPlan, TrainPlan

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


# ---------------------------------------------------------------------------- measured anew


CALIBRATED = RangePlan()


@pytest.mark.parametrize(
    ("over", "sites", "plan", "found"),
    [
        (501, 4, CALIBRATED, True),
        (1000, 4, CALIBRATED, True),
        (500, 4, CALIBRATED, False),  # half of them is not more than half
        (1000, 3, CALIBRATED, False),  # one honest site does not exceed it
        (1000, 1, CALIBRATED, False),
        (1000, 4, RangePlan(start=0.5), False),  # the job stated it
        (1000, 4, RangePlan(adaptive=False), False),
    ],
)
def test_a_range_is_outgrown_where_every_site_marks_it_and_most_coordinates_exceed(
    over, sites, plan, found
):
    assert outgrown(over, 1000, plan, sites=sites, survivors=4) is found


def test_one_survivor_alone_does_not_outgrow_a_range():
    assert not outgrown(1000, 1000, CALIBRATED, sites=1, survivors=1)


def test_a_range_that_was_outgrown_is_four_times_as_wide_and_the_new_start():
    assert measured_anew(0.5, 0.5, CALIBRATED) == (2.0, 2.0)
    assert measured_anew(0.5, 8.0, CALIBRATED) == (2.0, 8.0), "the start never becomes smaller"
    assert measured_anew(512.0, 512.0, CALIBRATED) == (1024.0, 1024.0), "the plan's highest"
    assert measured_anew(1024.0, 512.0, CALIBRATED) == (1024.0, 1024.0)


def test_after_a_calibration_that_saw_no_update_it_begins_where_updates_usually_are():
    smallest = 2.0**-16
    assert measured_anew(smallest, smallest, CALIBRATED) == (2.0**-6, 2.0**-6)
    assert measured_anew(smallest / 8, smallest, CALIBRATED) == (2.0**-6, 2.0**-6)
    assert measured_anew(2 * smallest, 2 * smallest, CALIBRATED)[0] == 8 * smallest


@given(st.integers(-16, 7), st.integers(-20, 9), st.integers(-20, 12))
def test_whatever_the_updates_a_range_is_at_most_four_times_what_every_site_exceeded(
    started, at, size
):
    """All coordinates of all sites are of one size; the range grows until they fit, in the fewest rounds."""
    first, bound = 2.0**started, min(2.0**at, 4 * 2.0**started)
    update, rounds = 2.0**size * 0.99, 0
    while outgrown(1000 * (update > bound), 1000, CALIBRATED, sites=4, survivors=4):
        before = bound
        bound, first = measured_anew(bound, first, CALIBRATED)
        rounds += 1
        assert bound <= max(4 * before, 2.0**-6) and first <= max(2.0**started, bound)
        if bound == before == CALIBRATED.highest:
            return
    assert update <= bound
    assert bound <= max(4 * update, 2.0**-6, 2.0**at), "of a calibration that saw nothing: 2^-6"
    assert rounds <= 17


# ------------------------------------------------------------------------------ in a release


def release(marks, counts, bound=2.0**-8, **changes):
    """The server state after a round of four sites with five parameters, calibrated to `bound`."""
    plan = RoundPlan(
        "t", "0" * 64, ("a", "b", "c", "d"), "masked", solve_packing(8, 4, "masked"), 5, 0, 64, 3,
        TrainPlan(), ServerPlan(), RangePlan(**changes),
    )  # fmt: skip
    state = JobState(init_state(np.zeros(5, dtype=np.float32), 5, plan.server, bound))
    wides = {"weight": [4 * 64], "over_range": [counts], "over_half_range": [counts]}
    opened = Opened(np.full(5, 4 * 128, dtype=np.uint64), wides | {EXCEEDS: marks})
    return applied(plan, state, OpenedSum(opened, plan.sites)).server


def test_a_lying_site_that_claims_every_count_widens_nothing_while_one_honest_site_fits():
    """The attack: one site puts the largest count that is possible for all, and its own mark."""
    for marks in ([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]):
        found = release(marks, counts=4 * 5)
        assert found.first_bound == 2.0**-8 and found.bound <= 2.0**-7
    control = release([1, 1, 1, 1], counts=4 * 5)
    assert (control.bound, control.first_bound) == (2.0**-6, 2.0**-6)


def test_a_stated_range_stays_within_four_times_though_all_sites_exceed_it():
    found = release([1, 1, 1, 1], counts=4 * 5, start=2.0**-8)
    assert (found.bound, found.first_bound) == (2.0**-7, 2.0**-8)


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
