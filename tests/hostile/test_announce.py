"""A round that a site must not join: announcements by a lying coordinator (PROTOCOL C, E, D).

Each lie is refused with the site still idle and nothing sent. Control: the same header is joined by a
site that differs in just what the check compares, or with the check removed.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from kit import World, answer_of, refuses, world_at
from support.machines import patch_machine

from fedcore.errors import (  # fmt: skip
    HeaderRefused,
    ListRefused,
    PlanRefused,
    RosterRefused,
    StaleEpoch,
    ThresholdRefused,
)
from fedcore.secagg.crypto.identity_key import roster_digest
from fedcore.secagg.plan import RangePlan
from fedcore.secagg.protocol import checks
from fedcore.secagg.protocol.messages import Keys
from fedcore.secagg.protocol.round import site


def joins(world, name, header):
    """The control: keys leave for this header."""
    keys = answer_of(world.step(name, world.invitation(name, header)))
    assert isinstance(keys, Keys) and keys.header == header.digest
    assert isinstance(world.stages[name], site.Advertised)


@pytest.mark.parametrize(
    ("field", "lie", "member"),
    [("federation", "another", "federation"), ("job", "job2", "job")],
)
def test_a_round_of_another_federation_or_job(field, lie, member):
    world = world_at("idle")
    header = replace(world.round_header, **{field: lie})
    refuses(
        world, "ann", world.invitation("ann", header), HeaderRefused,
        found=lie, expected=getattr(world.members["ann"], member),
    )  # fmt: skip
    world.members["ann"] = replace(world.members["ann"], **{member: lie})
    joins(world, "ann", header)


@pytest.mark.parametrize(
    "changes",
    [{"range": RangePlan(start=2.0)}, {"rounds": 10}, {"max_examples": 500}, {"threshold": 5}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_differing_plan_digest_whatever_was_changed_in_it(changes):
    """security.md (e): ranges and limits reach a site in its plan only, never in a message."""
    world = world_at("idle")
    other = replace(world.plan, **changes)
    header = replace(world.round_header, plan_digest=other.digest)
    refuses(
        world, "ann", world.invitation("ann", header), HeaderRefused,
        found=other.digest, expected=world.plan.digest,
    )  # fmt: skip
    world.members["ann"] = replace(world.members["ann"], plan=other)
    joins(world, "ann", replace(header, threshold=other.threshold))


def test_a_round_with_less_protection_than_the_plan_asks_for():
    world = world_at("idle")
    for lie in ("encrypted", "plain", "layered"):
        header = replace(world.round_header, protection=lie)
        refuses(
            world, "ann", world.invitation("ann", header), HeaderRefused,
            found=lie, expected="masked",
        )  # fmt: skip
    other = World(5, 0, "encrypted")
    other.step("ann", other.invitation("ann"))
    assert isinstance(other.stages["ann"], site.Masking), "control: under such a plan it joins"


def test_a_protocol_version_this_site_does_not_speak():
    world = world_at("idle")
    header = replace(world.round_header, version=99)
    refuses(world, "ann", world.invitation("ann", header), HeaderRefused, found="99")


def test_pinned_keys_other_than_those_the_operator_approved():
    """A coordinator that tells half the sites another roster of keys is found out before any key."""
    world, other = world_at("idle"), World()
    header = replace(world.round_header, pins=roster_digest(other.pins))
    refuses(
        world, "ann", world.invitation("ann", header), HeaderRefused,
        found=header.pins, expected=world.round_header.pins,
    )  # fmt: skip
    world.members["ann"] = replace(world.members["ann"], pins=other.pins)
    joins(world, "ann", header)


@pytest.mark.parametrize("epoch", [0, 2], ids=["stale", "not installed"])
def test_another_key_epoch_than_the_one_held(epoch):
    world = world_at("idle")
    header = replace(world.round_header, epoch=epoch)
    refuses(
        world, "ann", world.invitation("ann", header), StaleEpoch, found=str(epoch), expected="1"
    )
    stage = world.stages["ann"]
    world.stages["ann"] = replace(stage, standing=replace(stage.standing, epoch=epoch))
    joins(world, "ann", header)


@pytest.mark.parametrize("number", [0, 4, 5])
def test_a_replayed_round_number_even_of_an_abandoned_round(number):
    world = world_at("idle")
    joins(world, "ann", replace(world.round_header, round=5))
    world.step("ann", site.CheckFailed(TimeoutError("the round was abandoned")))
    replayed = replace(world.round_header, round=number)
    refuses(
        world, "ann", world.invitation("ann", replayed), HeaderRefused,
        found=str(number), expected="more than 5",
    )  # fmt: skip
    fresh = world_at("idle")
    if number:
        joins(
            fresh, "ann", replayed
        )  # control: a site that forgot its rounds takes the number again
    joins(world, "ann", replace(world.round_header, round=6))


def test_a_round_that_hides_or_invents_a_release():
    """PROTOCOL S: a late or rolled-back view of the job has another certificate hash in its header."""
    world = world_at("idle")
    header = replace(world.round_header, certificate="c" * 64)
    refuses(
        world, "ann", world.invitation("ann", header), HeaderRefused,
        found="c" * 16, expected="none",
    )  # fmt: skip
    stage = world.stages["ann"]
    released = replace(stage, standing=replace(stage.standing, certificate="c" * 64))
    world.stages["ann"] = released
    refuses(
        world, "ann", world.invitation("ann", replace(header, certificate="")), HeaderRefused,
        found="none", expected="c" * 16,
    )  # fmt: skip
    joins(world, "ann", header)


# -------------------------------------------------------------------------------------- the roster


def cohort(world, *names, threshold=None):
    return replace(world.round_header, roster=names, threshold=threshold or world.t)


def test_a_roster_with_an_unpinned_site(without):
    world = world_at("idle")
    header = cohort(world, "ann", "bob", "cat", "dan", "mallory")
    invitation = world.invitation("ann", header)
    refuses(world, "ann", invitation, RosterRefused, found="mallory", expected="pinned")
    without(checks, "roster")
    joins(world, "ann", header)


def test_a_roster_that_names_one_site_twice(without):
    world = world_at("idle")
    header = cohort(world, "ann", "bob", "cat", "dan", "dan")
    refuses(world, "ann", world.invitation("ann", header), RosterRefused, found="twice")
    without(checks, "roster")
    joins(world, "ann", header)


def test_a_roster_in_another_order_than_that_of_the_pins(without):
    """One cohort has one header: the place in it decides signs of masks and which key share is whose."""
    world = world_at("idle")
    header = cohort(world, "bob", "ann", "cat", "dan", "eve")
    refuses(world, "ann", world.invitation("ann", header), RosterRefused, found="another order")
    without(checks, "roster")
    joins(world, "ann", header)


def test_a_cohort_below_the_sites_minimum(without):
    """n = 2 protects nothing: each of the two subtracts its own update."""
    world = world_at("idle", threshold=3)
    header = cohort(world, "ann", "bob")
    invitation = world.invitation("ann", header)
    refuses(world, "ann", invitation, RosterRefused, found="2 sites", expected="at least 3")
    world.members["bob"] = replace(world.members["bob"], minimum=5)
    four = cohort(world, "ann", "bob", "cat", "dan")
    refuses(
        world, "bob", world.invitation("bob", four), RosterRefused,
        found="4 sites", expected="at least 5",
    )  # fmt: skip
    without(checks, "roster")
    joins(world, "ann", header)
    joins(world, "bob", four)


@pytest.mark.parametrize("sites", [1, 2])
def test_a_plan_for_two_sites_is_refused_with_the_reason(sites):
    with pytest.raises(PlanRefused, match="expected at least 3: with fewer, the sum shows"):
        World(sites)


def test_more_than_64_sites_are_refused_until_block_K_is_built():
    """PROTOCOL K's attack (all honest neighbours of a victim dropped) needs a sparse graph: there is none."""
    plan = World().plan
    with pytest.raises(PlanRefused, match="expected at most 64"):
        replace(plan, sites=tuple(f"s{i}" for i in range(65)), threshold=0)


def test_a_round_for_a_roster_without_this_site(without):
    world = world_at("idle")
    header = cohort(world, "ann", "bob", "cat", "dan")
    refuses(world, "eve", world.invitation("eve", header), ListRefused, found="left out")
    without(checks, "_has")
    joins(world, "eve", header)


def test_two_sites_with_one_identity(monkeypatch):
    """One holder of one key would count as two sites towards the threshold."""
    world = world_at("idle")
    pins = {**world.pins, "eve": world.pins["dan"]}
    world.members["ann"] = replace(world.members["ann"], pins=pins)
    invitation = world.invitation("ann")
    refuses(world, "ann", invitation, RosterRefused, fault="eve", found="the key of dan")
    patch_machine(monkeypatch, site, "roster_digest", lambda _: world.round_header.pins)
    joins(world, "ann", world.round_header)


# ----------------------------------------------------------------------------------- the threshold


@pytest.mark.parametrize("threshold", [-1, 0, 1, 2, 3, 5, 6])
def test_a_threshold_other_than_the_plans(threshold, without):
    """Of five sites t = 4; 2 and less lies outside (n/2, n], 6 above it."""
    world = world_at("idle")
    header = replace(world.round_header, threshold=threshold)
    refuses(
        world, "ann", world.invitation("ann", header), ThresholdRefused,
        found=str(threshold), expected="4",
    )  # fmt: skip
    without(checks, "round_threshold")
    joins(world, "ann", header)


@pytest.mark.parametrize("threshold", [1, 2, 3, 5])
def test_a_smaller_cohort_has_the_plans_threshold(threshold, without):
    """Four of five sites: t = 4 as for all five, though 3 is what four sites alone would have."""
    world = world_at("idle")
    header = cohort(world, "ann", "bob", "cat", "dan", threshold=threshold)
    refuses(
        world, "ann", world.invitation("ann", header), ThresholdRefused,
        found=str(threshold), expected="4",
    )  # fmt: skip
    joins(world.copy(), "ann", replace(header, threshold=4))
    without(checks, "round_threshold")
    joins(world, "ann", header)


@pytest.mark.parametrize("minimum", [3, 4])
def test_a_cohort_below_the_plans_threshold_whatever_the_minimum(minimum, without):
    """The label promises what t = 5 of 5 withstands; four sites would withstand less."""
    world = world_at("idle", threshold=5)
    world.members["ann"] = replace(world.members["ann"], minimum=minimum)
    header = cohort(world, "ann", "bob", "cat", "dan")
    refuses(
        world, "ann", world.invitation("ann", header), RosterRefused,
        found="4 sites", expected="at least 5",
    )  # fmt: skip
    without(checks, "roster")
    joins(world, "ann", header)


@pytest.mark.parametrize("threshold", [1, 2, 6])
def test_a_plan_with_a_threshold_outside_half_and_all(threshold):
    with pytest.raises(PlanRefused, match="expected 3 to 5"):
        World(5, threshold)
    assert World(5, 3).t == 3
