"""Whole jobs, both machines, in any order of what happens: with sessions that are lost, and with a party that
dies before any of its effects. Every message is checked against the disk of its sender as it is sent.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.whole_jobs import HUB, LIMITS, SITES, Died, Hub, Jobs, Site

from fedcore.secagg.protocol import job_messages, messages
from fedcore.secagg.protocol.effects import OpenSum, Send
from fedcore.secagg.protocol.round import coordinator

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


def survivors(world):
    """{training round: the sites in its sum, joined}"""
    known = world.parties[HUB].machine.facts.rounds.known
    return {row.round: "".join(row.survivors) for row in known if row.purpose == "update"}


@pytest.mark.parametrize("seed", range(2))
def test_a_site_that_fails_once_is_in_the_next_round(seed):
    world = Jobs(seed, rounds=6, failing={("b", 2): 1, ("c", 4): 1})
    world.play()
    assert survivors(world) == {1: "abcd", 2: "acd", 3: "abcd", 4: "abd", 5: "abcd", 6: "abcd"}
    released(world)
    assert not any(view.unable for view in world.parties[HUB].machine.facts.sites.values())


def test_a_site_that_fails_again_and_again_is_invited_ever_more_rarely():
    failing = {("b", round_): 9 for round_ in range(1, 8)}
    world = Jobs(1, rounds=9, failing=failing)
    world.play()
    assert [round_ for _, round_ in failing if world.failing["b", round_] < 9] == [1, 2, 4]
    assert survivors(world) == {r: "abcd" if r > 7 else "acd" for r in range(1, 10)}


def test_sites_that_fail_together_are_invited_again_at_once():
    world = Jobs(2, rounds=4, failing={("b", 2): 1, ("c", 2): 1})
    world.play()
    found = survivors(world)
    assert found[2] == "" and found[3] == found[4] == "abcd", "one round without enough vectors"


class CutOff(Jobs):
    """The link of b goes down in round 2, and is back while round 4 or a later one runs."""

    down, back = 2, 4
    returned = 0

    def once(self):
        step = self.parties[HUB].machine.facts.step
        round_ = step.training_round if step is not None else 99
        if not self.returned and "b" in self.here and round_ == self.down:
            self.cut("b")
        away = not self.returned and "b" not in self.here
        if away and round_ >= self.back and self.random.random() < 0.1:
            self.returned = round_
            self.connect("b")
        super().once()


@pytest.mark.parametrize("seed", range(3))
def test_a_site_whose_link_was_down_is_in_a_sum_within_two_rounds(seed):
    """Though the coordinator waits for a second only: less than the pause before it resends a message."""
    world = CutOff(seed, rounds=8, limits=replace(LIMITS, gather=1.0, grace=1.0))
    world.play()
    found = survivors(world)
    assert world.returned in range(4, 7) and found[3] == "acd"
    assert "abcd" in (found[world.returned + 1], found[world.returned + 2])
    released(world)


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


def heard(world):
    """(to, message) of all that was sent, as it is sent."""
    found, say = [], world.say

    def listening(sender, to, message):
        found.append((to, message))
        say(sender, to, message)

    world.say = listening
    return found


def test_every_round_after_the_first_begins_with_keys_that_were_sent_ahead():
    """No site is asked for keys or for its status between two rounds, and no number is left out."""
    world = Jobs(0, rounds=4)
    said = heard(world)
    world.play()
    released(world)
    announced = {m.header.round: m for to, m in said if isinstance(m, messages.Announce)}
    first, *others = sorted(announced)
    assert others == list(range(first + 1, first + 6))
    assert [len(announced[number].keys) for number in (first, *others)] == [0, 4, 4, 4, 4, 4]
    bundles = [m for _, m in said if isinstance(m, messages.KeyBundle)]
    assert {m.header for m in bundles} == {announced[first].header.digest}
    statuses = [m.round for to, m in said if to == HUB and isinstance(m, job_messages.SiteStatus)]
    assert set(statuses) <= {0, others[-1]}, "before the first round, and after the last"


def test_a_round_of_other_sites_than_expected_asks_for_keys_under_a_later_number():
    """b fails in round 2: the others send keys for a round without it, and it is back in round 3."""
    world = Jobs(0, rounds=4, failing={("b", 2): 1})
    said = heard(world)
    world.play()
    released(world)
    rounds = {m.header.training_round: m for to, m in said if isinstance(m, messages.Announce)}
    assert [rounds[each].header.roster for each in (2, 3, 4)] == [SITES] * 3
    assert [len(rounds[each].keys) for each in (2, 3, 4)] == [4, 0, 4]
    numbers = [rounds[each].header.round for each in (2, 3, 4)]
    assert numbers == [numbers[0], numbers[0] + 2, numbers[0] + 3]


class SlowToOpen(Jobs):
    """b has downloaded the sum of round 2, and opens it only once the others have released it."""

    held = 0

    def labour(self, name):
        party, stage = self.parties[name], self.parties[HUB].machine.facts.stage
        late = next((w for w in party.work if self.is_slow(name, w)), None)
        if late is None:
            super().labour(name)
        elif late.header == stage.header and isinstance(stage, coordinator.Releasing):
            self.held += 1
            self.pass_time()
        elif party.job.parts.rounds.early is not None:
            party.work.remove(late)
            self.safely(name, lambda: party.open(late.header, late.survivors))

    def is_slow(self, name, work):
        return name == "b" and isinstance(work, OpenSum) and work.header.training_round == 2


@pytest.mark.parametrize("seed", range(2))
def test_a_site_whose_statement_came_after_the_certificate_says_where_it_stands(seed):
    """It is not among the signers, so that nothing else tells the coordinator that it can go on."""
    world = SlowToOpen(seed, rounds=6)
    world.play()
    released(world)
    found = survivors(world)
    assert world.held and found[2] == "abcd" and found[5] == found[6] == "abcd"


class CertifiedTwice(Jobs):
    """Each certificate comes to b once more, as soon as b is in the round after it."""

    def __init__(self, seed):
        super().__init__(seed)
        self.last, self.repeated = None, []

    def deliver(self, ends):
        message = self.channels[ends][0]
        super().deliver(ends)
        if ends != (HUB, "b"):
            return
        if isinstance(message, messages.Certificate) and message not in self.repeated:
            self.last = message
        elif self.last is not None and self.parties["b"].job.parts.rounds.in_round:
            self.channels[ends].appendleft(self.last)
            self.repeated.append(self.last)
            self.last = None


@pytest.mark.parametrize("seed", range(2))
def test_a_certificate_that_comes_again_in_the_next_round_does_not_end_it(seed):
    """A site that had a new session just before the release is sent its certificate twice."""
    world = CertifiedTwice(seed)
    world.play()
    assert released(world) == tuple((step, SITES) for step in STEPS)
    assert len(world.repeated) == len(STEPS) - 1


class EndsAtReleases(Hub):
    """A coordinator whose process ends as soon as a release is on its disk, before anybody is told."""

    def __init__(self, world, name):
        self.gone = []
        super().__init__(world, name)

    def obey(self, effect):
        super().obey(effect)
        stage = self.stage()
        if isinstance(stage, coordinator.Released) and stage.round not in self.gone:
            self.gone.append(stage.round)
            raise Died(self.name)


@pytest.mark.parametrize("seed", range(2))
def test_a_coordinator_that_ends_at_a_release_waits_for_no_status_of_the_sites(seed):
    """They sent keys ahead and signed: they send no status, and the new process knows what that means."""
    world = Jobs(seed)
    world.parties[HUB] = EndsAtReleases(world, HUB)
    world.play()
    assert released(world) == tuple((step, SITES) for step in STEPS)
    assert len(world.parties[HUB].gone) == len(STEPS)
