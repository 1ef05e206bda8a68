"""Which cohorts a round may have: the plan's threshold holds for every one of them (PROTOCOL N).

A coordinator chooses whom it invites. If a small cohort needed fewer sites than the whole roster, it
would open small sums: here sixteen sites agreed on t = 11 and three are invited.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from kit import NAMES, World, refuses, world_at

from fedcore.errors import RosterRefused, ThresholdRefused
from fedcore.secagg.label import Collusion, Terms, collusion
from fedcore.secagg.plan import default_threshold
from fedcore.secagg.protocol import checks
from fedcore.secagg.protocol.round import coordinator, site

SITES, PLANNED = 16, 11


def invited(names, threshold):
    """Sixteen pinned sites under a plan with t = 11, and a round for these alone."""
    world = World(SITES)
    assert world.t == PLANNED
    world.roster = names
    world.round_header = replace(world.round_header, roster=names, threshold=threshold)
    return world


def test_a_cohort_of_three_is_not_opened_by_two_colluders_where_eleven_are_needed(without):
    """Refused by each of the three. Control: with t that of the cohort, two read the third."""
    three = NAMES[:3]
    promised = collusion(Terms("masked", SITES, PLANNED))
    assert promised == Collusion(5, 9, 5, 6), "what the label of the sixteen says"
    for threshold in (default_threshold(3), 2, PLANNED):
        world = invited(three, threshold)
        for name in three:
            refuses(
                world, name, world.invitation(name), RosterRefused,
                found="3 sites", expected="at least 11",
            )  # fmt: skip

    without(checks, "roster", "round_threshold")
    world = invited(three, default_threshold(3)).advance("unmask", three)
    secrets = world.rebuilt(world.shares_held(world.answers.values()))
    opened = world.open_sum_of(three, secrets)
    rest = world.ring(opened - world.plain["bob"] - world.plain["cat"])
    assert np.array_equal(rest, world.plain["ann"]), "two colluding sites read the third"


def test_a_cohort_of_the_threshold_is_taken_and_needs_every_site_at_every_stage():
    """Eleven of sixteen: the smallest cohort there may be. One site fewer is refused wherever it counts."""
    names = NAMES[:PLANNED]
    fewer = names[:-1]
    world = invited(names, PLANNED)
    short = replace(world.round_header, roster=fewer)
    refuses(world, "ann", world.invitation("ann", short), RosterRefused, found="10 sites")
    few = {"found": "10 sites", "expected": "at least 11"}
    world.advance("keys", names)
    refuses(world.copy(), "ann", world.bundle(fewer), ThresholdRefused, **few)
    world.advance("shares", names, after="keys")
    refuses(world.copy(), "ann", world.delivery("ann", fewer), ThresholdRefused, **few)
    world.advance("submit", names, after="shares")
    refuses(world.copy(), "ann", world.survivor_list(fewer), ThresholdRefused, **few)
    world.advance("confirm", names, after="submit")
    refuses(world.copy(), "ann", world.confirmations(fewer), ThresholdRefused, **few)
    world.advance("unmask", names, after="confirm")
    answers = [world.answers[name] for name in fewer]
    assert world.rebuilt(world.shares_held(answers)) == {}, "ten shares open nothing"
    secrets = world.rebuilt(world.shares_held(world.answers.values()))
    assert np.array_equal(world.open_sum_of(names, secrets), world.plain_sum(names))
    world.advance("state", names, after="unmask")
    short = world.certificate(fewer)
    refuses(world.copy(), "ann", short, ThresholdRefused, **few)
    late = world.copy()
    late.stages["ann"] = world_at("idle", n=SITES).stages["ann"]
    refuses(late, "ann", site.CaughtUp(short, short.state_mac), ThresholdRefused, **few)
    world.receive("ann", world.certificate())
    assert world.stages["ann"].standing.released == 1


def test_under_one_common_key_a_short_list_is_refused_as_well():
    """`encrypted` has no masks and no confirmations: the list comes with the sum."""
    world = world_at("submit", protection="encrypted")
    few = {"found": "3 sites", "expected": "at least 4"}
    refuses(world, "ann", world.aggregate(("ann", "bob", "cat")), ThresholdRefused, **few)
    world.step("ann", site.MessageFromCoordinator(world.aggregate(("ann", "bob", "cat", "dan"))))
    assert isinstance(world.stages["ann"], site.Opening)


def test_a_site_whose_minimum_is_lower_or_higher_keeps_to_the_larger_of_both():
    for minimum, least in ((3, 4), (4, 4), (5, 5)):
        member = replace(world_at("idle").members["ann"], minimum=minimum)
        assert member.plan.threshold == 4 and member.least == least


@pytest.mark.parametrize("sites", [1, 3])
def test_our_own_coordinator_begins_no_round_below_its_threshold(sites):
    world = world_at("idle")
    header = replace(world.round_header, roster=world.roster[:sites])
    hub = coordinator.CoordinatorParams(dict(world.pins), 60.0)
    with pytest.raises(RosterRefused, match=f"found {sites} sites?, expected at least 4"):
        coordinator.step(hub, coordinator.Ready(), coordinator.Start(header, 8), 0.0)
    begun, _ = coordinator.step(
        hub, coordinator.Ready(), coordinator.Start(world.round_header, 8), 0.0
    )
    assert isinstance(begun, coordinator.Advertising)
