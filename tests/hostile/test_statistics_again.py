"""Statistics of two jobs over the same rows, with another site away in each: their difference is one site's.

The ledger of a site tells its machine with whom a sum over its rows was given; the machine then gives such
a sum with exactly these sites, or not at all (PROTOCOL H, across jobs). Each control is the same situation
without the rule, or with the sites that the rule names. The whole of it, over two jobs with real sums, is
in tests/e2e/test_two_jobs_statistics.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from kit import World

from fedcore.errors import OtherSites
from fedcore.secagg.protocol.messages import Confirm, Submit, Unmask
from fedcore.secagg.protocol.round import site


def held(world, *names, of=None):
    """From now on the sites give such a sum with these only: another job had one meanwhile."""
    for name in of or world.roster:
        world.members[name] = replace(world.members[name], only_with={"update": names})


def refused(world, name, message, match):
    before = world.stages[name]
    with pytest.raises(OtherSites, match=match) as found:
        world.receive(name, message)
    assert found.value.fault == "coordinator" and found.value.remedy
    assert world.stages[name] is before, "nothing was signed or answered"


def test_another_cohort_is_not_joined():
    world = World()
    held(world, *world.roster[:4])
    with pytest.raises(OtherSites, match=r"cohort \(update\): found ann, bob, cat, dan, eve"):
        world.step("ann", world.invitation("ann"))
    held(world, *world.roster)  # controls: the same sites as then, and no sum before
    world.step("ann", world.invitation("ann"))
    assert isinstance(world.stages["ann"], site.Advertised)
    control = World()
    control.step("ann", control.invitation("ann"))
    assert isinstance(control.stages["ann"], site.Advertised)


def test_a_shorter_survivor_list_is_not_confirmed():
    world = World().advance("submit")
    held(world, *world.roster)
    others = world.roster[:4]
    control = world.copy()
    refused(
        world, "ann", world.survivor_list(others), r"survivor list \(update\): found ann, bob, cat"
    )
    assert isinstance(world.receive("ann", world.survivor_list()), Confirm)
    held(control, of=[])
    control.members = {n: replace(m, only_with={}) for n, m in control.members.items()}
    assert isinstance(control.receive("ann", control.survivor_list(others)), Confirm)


def test_a_sum_of_another_job_between_confirm_and_unmask():
    """Two jobs at once: the second is not answered after the first was."""
    world = World().advance("confirm")
    held(world, *world.roster[:4])
    refused(world, "ann", world.confirmations(), "survivor list")
    held(world, *world.roster)  # control
    assert isinstance(world.receive("ann", world.confirmations()), Unmask)


def test_a_sum_of_another_job_between_confirm_and_the_opened_sum():
    """Others may unmask without this site; it does not open such a sum before it has answered itself."""
    world = World().advance("confirm")
    control = world.copy()
    held(world, *world.roster[:4])
    refused(world, "ann", world.aggregate(), "survivor list")
    control.step("ann", site.MessageFromCoordinator(control.aggregate()))
    assert isinstance(control.stages["ann"], site.Opening)


def test_under_encrypted_no_vector_leaves_with_another_cohort():
    """There is no list to confirm: what is submitted can be opened by whoever has the key."""
    world = World(protection="encrypted")
    world.step("ann", world.invitation("ann"))
    control = world.copy()
    held(world, *world.roster[:4])
    with pytest.raises(OtherSites, match="cohort"):
        world.step("ann", site.VectorMade(b"d" * 32, 100))
    assert isinstance(world.stages["ann"], site.Masking)
    found = control.step("ann", site.VectorMade(b"d" * 32, 100))
    assert any(isinstance(getattr(each, "message", None), Submit) for each in found)


def test_under_encrypted_no_other_sum_is_opened():
    world = World(protection="encrypted").advance("submit")
    control = world.copy()
    held(world, *world.roster)
    refused_before = world.stages["ann"]
    with pytest.raises(OtherSites, match="survivor list"):
        world.step("ann", site.MessageFromCoordinator(world.aggregate(world.roster[:4])))
    assert world.stages["ann"] is refused_before
    control.step("ann", site.MessageFromCoordinator(control.aggregate(control.roster[:4])))
    assert isinstance(control.stages["ann"], site.Opening)
    world.step("ann", site.MessageFromCoordinator(world.aggregate()))
    assert isinstance(world.stages["ann"], site.Opening)


def test_two_sets_before_mean_none_now():
    world = World()
    held(world)
    with pytest.raises(OtherSites, match="exactly no sites at all"):
        world.step("ann", world.invitation("ann"))
