"""Lying sites steer the common model into a question about single rows of the others (PROTOCOL G).

`steering.py` is the attack. The control reads three of three patients of another hospital; each rule alone
stops it. What the rules do not stop is said where it is shown, and in docs/decisions/0018-the-guard.md.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from steering import Steering, steer

from fedcore.experiment.attacks.lying_site import row_of
from fedcore.learning import guard, released
from fedcore.secagg.protocol.round import site

VICTIM = 0
FIRST_RANGE_UP = 4.0


@pytest.fixture
def any_range(stand_in):
    """The range rule as it was: a count alone doubles it, without an end."""
    real = released.next_bound

    def without_the_rule(bound, over, half, values, plan, *, first, sites):
        return real(bound, over, half, values, plan, first=plan.highest, sites=2)

    stand_in(released, next_bound=without_the_rule)


# About 15 s: 41 rounds of the real protocol.
@pytest.mark.usefixtures("any_range")
def test_control_without_both_rules_three_of_three_patients_are_read(monkeypatch):
    found = steer(monkeypatch, Steering(range_wanted=4.0), guarded=False)
    assert found.tripped is None
    assert found.ranges[-1] == 32 * found.ranges[0]
    assert found.read == [True, True, True]


@pytest.mark.usefixtures("any_range")
def test_the_guard_alone_refuses_the_lying_site_by_round_8(monkeypatch):
    found = steer(monkeypatch, Steering(range_wanted=4.0))
    assert found.tripped is not None
    assert found.tripped.round < found.used <= 8
    assert "rose far above the best so far" in str(found.tripped)
    assert not found.answers


def test_the_range_rule_alone_leaves_one_lying_site_nothing_to_steer_with(monkeypatch):
    """What it still does: it pulls at the model, with the same strength as any honest site."""
    found = steer(monkeypatch, Steering(), protection="plain", guarded=False)
    assert set(found.ranges) == {found.ranges[0]}
    assert not found.answers
    assert found.used == 80


def test_with_both_rules_nobody_is_read(monkeypatch):
    found = steer(monkeypatch, Steering(rounds=12))
    assert set(found.ranges) == {found.ranges[0]}
    assert not found.answers


# ------------------------------------------------------------------------------------ what else it may try


def test_two_lying_sites_widen_the_range_four_times_and_are_refused_by_round_8(monkeypatch):
    found = steer(monkeypatch, Steering(liars=(2, 3)), protection="plain")
    assert max(found.ranges) == FIRST_RANGE_UP * found.ranges[0]
    assert found.tripped is not None
    assert found.used <= 8
    assert not set(found.tripped.sites) & {"switzerland", "va"}
    assert not found.answers
    said = row_of(found, guarded=True)
    assert (said.value, said.samples, said.setting) == (0.0, 0, "guard on")
    assert "with 0 questions answered: guard: sites cleveland, hungary leave" in said.shows


def test_control_two_lying_sites_whom_no_guard_stops_read_a_patient_in_80_rounds(monkeypatch):
    """The range rule alone does not stop two: that they read nobody is the guard's work (the test above)."""
    found = steer(monkeypatch, Steering(liars=(2, 3)), protection="plain", guarded=False)
    assert max(found.ranges) == FIRST_RANGE_UP * found.ranges[0]
    assert len(found.answers) == 2
    assert found.read == [True]
    said = row_of(found, guarded=False)
    assert (said.value, said.samples, said.chance, said.setting) == (1.0, 1, 0.0, "guard off")
    assert "1 of 1 patients" in said.shows


# About 10 s: 80 rounds.
def test_fields_above_the_range_get_no_answer_in_80_rounds(monkeypatch):
    """Accepted as long as the sum is within what all sites could have sent: one liar pulls like several."""
    asked = Steering(beyond=2.5)
    found = steer(monkeypatch, asked, protection="plain", guarded=False)
    assert found.refused is None
    assert found.used == 80
    assert not found.answers


@pytest.mark.usefixtures("any_range")
@pytest.mark.parametrize("per_year", [0.05, 0.4])
def test_a_soft_question_reads_no_single_row(monkeypatch, per_year):
    """A model that asks softly stays closer to an honest one, and its answers mix many rows."""
    asked = Steering(range_wanted=4.0, per_year=per_year)
    found = steer(monkeypatch, asked, protection="plain", guarded=False)
    assert len(found.answers) == 5
    assert found.read == [False, False, False]


def test_a_range_that_one_site_lied_up_at_calibration_lets_it_ask_nothing(monkeypatch):
    """There one count of one site is enough for any first range: it then steers in a single round."""
    asked = Steering(at_calibration=True, per_year=1.0, rounds=6)
    with pytest.MonkeyPatch.context() as first:
        first.setattr(guard, "AT_ONCE", float("inf"))
        control = steer(first, replace(asked, answers={}, ranges=[]), protection="plain")
    assert control.ranges[0] == 128.0
    assert control.answers, "two strikes come too late: one question was answered"
    found = steer(monkeypatch, asked, protection="plain")
    assert found.used == 2
    assert "rose far above the best so far" in str(found.tripped)
    assert not found.answers


def test_another_sites_mark_is_found_by_that_site_which_refuses(monkeypatch):
    """The sum may still be released where enough others sign it; the range stops at four times all the same."""
    shells = {}
    real = site.step

    def step(member, stage, event, now):
        shells[member.id], found = real(member, stage, event, now)
        return shells[member.id], found

    with pytest.MonkeyPatch.context() as first:
        first.setattr(site, "step", step)
        found = steer(first, Steering(mark_of=VICTIM, rounds=2))
    assert isinstance(shells["cleveland"], site.Halted)
    assert found.refused is not None
    # Control: without the site's check of its own place one liar widens the range.
    control = steer(monkeypatch, Steering(mark_of=VICTIM, rounds=3), protection="plain")
    assert control.ranges[-1] == FIRST_RANGE_UP * control.ranges[0]
