"""Whole jobs, both machines, in any order of what happens: with sessions that are lost, and with a party that
dies before any of its effects. Every message is checked against the disk of its sender as it is sent.
"""

from __future__ import annotations

import pytest
from support.whole_jobs import HUB, SITES, Hub, Jobs, Site

from fedcore.secagg.protocol.effects import Send

STEPS = [("range", 0), ("update", 1), ("update", 2), ("metrics", 3)]


def released(world):
    """(step, survivors) of the released rounds: every site has the state of exactly these."""
    hub = world.parties[HUB]
    assert hub.outcome.outcome == "finished", (hub.outcome, world.warnings)
    rows = [row for row in hub.machine.facts.rounds.known if row.survivors]
    found = tuple(((row.purpose, row.round), row.survivors) for row in rows)
    assert len({step for step, _ in found}) == len(found)
    for name in SITES:
        assert world.parties[name].job.state.sums == found, name
        assert world.parties[name].records == hub.records == []
    return found


@pytest.mark.parametrize("protection", ["masked", "encrypted"])
@pytest.mark.parametrize("seed", range(3))
def test_a_job_ends_with_one_state_at_every_site_in_any_order(protection, seed):
    world = Jobs(seed, protection)
    world.play()
    assert released(world) == tuple((step, SITES) for step in STEPS)


@pytest.mark.parametrize("seed", range(3))
def test_a_job_ends_with_one_state_though_sessions_are_lost(seed):
    world = Jobs(seed, flaky=0.1)
    world.play()
    assert released(world)


@pytest.mark.parametrize("party", [HUB, "b"])
def test_a_job_ends_with_one_state_though_a_party_dies_before_any_effect(party):
    """Every 29th is tried: the coordinator has some 230, and a site 130."""
    died = 0
    for number in range(1, 240, 29):
        world = Jobs(number, flaky=0.02)
        world.play(die=(party, number))
        released(world)
        died += len(world.deaths)
    assert died >= 4


def sends_first(step):
    """The effects of a step with its messages before its records."""

    def turned(*about):
        found = step(*about)
        return sorted(found, key=lambda effect: not isinstance(effect, Send))

    return turned


@pytest.mark.parametrize("party", [HUB, "b"])
def test_control_a_message_before_its_record_is_noticed(party):
    world = Jobs(1)
    found = world.parties[party]
    machine = found.machine if isinstance(found, Hub) else found.job
    assert isinstance(found, Hub | Site)
    machine.step = sends_first(machine.step)
    with pytest.raises(AssertionError, match="sent before it is on disk"):
        world.play()
