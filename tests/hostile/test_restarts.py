"""Restart between any two effects (PROTOCOL D, V, attack 6): every cut of a whole round.

A process ends after an effect and before the next, comes back from its journal, and goes on or leaves the
round. Then the round ends with the exact sum of its survivors, or is abandoned where too few are left;
and no party says two things where the protocol knows one: keys, shares, vector, list, answer, statement.
Control: with the journal a record behind what was sent, which is what the order of effects prevents,
the same restarts do say two things.
"""

from __future__ import annotations

import pytest
from support.parties import HUB, Died, Parties, leaves_when_restarted, net

from fedcore.errors import SecondSum
from fedcore.secagg.protocol import effects, messages
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.wire_form import encode

PROTECTIONS = ("masked", "encrypted", "encrypted-keystream")
ABSENT = {"s03": "submit"}


def said(parties):
    """{(who, to, type, round): different bytes that left} of all that may be said only once."""
    found = {}
    for step in parties.log:
        for effect in step.effects:
            if isinstance(effect, effects.Upload):
                to, message = HUB, effect.submit
            elif isinstance(effect, effects.Send):
                to, message = effect.to, effect.message
            else:
                continue
            header = message.head if isinstance(message, messages.Shares) else message
            key = step.who, to, type(message).__name__, encode(header.header)
            found.setdefault(key, set()).add(encode(message))
    return found


def carried_out(who, make):
    """How many effects `who` carries out in this round when nobody dies."""
    parties = make()
    parties.play(**ABSENT)
    return sum(len(step.effects) for step in parties.log if step.who == who)


def cut_after(who, count, make, heard):
    """The round in which `who` dies after so many effects: (parties, its end, the stage it died in)."""
    parties = make()
    parties.cut = {who: count}
    with pytest.raises(Died):
        parties.play(**ABSENT)
    died_in = parties.replayed(who)
    parties.crash(who, heard)
    return parties, parties.finish(), died_in


def ends_well(parties, last, who, died_in):
    assert all(len(bodies) == 1 for bodies in said(parties).values()), "never two of one kind"
    assert set(parties.vectors.values()) == {1}, "one vector a round"
    for name in parties.sites:
        assert isinstance(parties.stages[name], site.Idle)
    left = {who} if leaves_when_restarted(died_in) else set()
    stayed = [name for name in parties.sites if name not in {*ABSENT, *left}]
    if len(stayed) < last.header.threshold:
        assert isinstance(last, coordinator.Failed) and parties.removed is None
        standings = {name: parties.stages[name].standing for name in parties.sites}
        assert all(not standing.released for standing in standings.values())
        exposed = {name for name, standing in standings.items() if standing.exposed}
        assert exposed >= set(last.exposed) and who not in exposed
        return
    assert isinstance(last, coordinator.Released)
    taken = {who} if parties.taken(who) else set()  # its vector was there before it left
    expected = tuple(n for n in parties.sites if n in {*stayed, *taken})
    assert last.certificate.survivors == expected
    assert all(parties.stages[name].standing.released for name in stayed), "and all applied it"
    assert sorted(parties.folded) == list(expected), "each of them once"
    assert net(parties.made[name] for name in expected) == net([parties.removed])


def goes_on(parties, last):
    """A further round of everybody, in which nobody refuses anything; none after a sum that may be known."""
    if isinstance(last, coordinator.Released):
        parties.catch_up()
    elif last.exposed:
        with pytest.raises(SecondSum):
            parties.begin()
        return
    refusals = len(parties.refusals)
    after = parties.play()
    assert isinstance(after, coordinator.Released) and len(parties.refusals) == refusals
    assert after.certificate.survivors == parties.sites
    assert after.header.round == last.header.round + 1


CASES = [("s00", 5), ("s02", 5), ("s00", 4), ("s02", 4), (HUB, 4)]


@pytest.mark.parametrize("heard", [False, True], ids=["lost", "heard"])
@pytest.mark.parametrize(("who", "n"), CASES)
@pytest.mark.parametrize("protection", PROTECTIONS)
def test_a_process_that_dies_after_any_effect(protection, who, n, heard):
    """heard: what it sent just before had arrived. Of four sites with one away, t = 3 spares no other."""
    stages = set()

    def make():
        return Parties(n, 3, protection)

    for count in range(1, carried_out(who, make) + 1):
        parties, last, died_in = cut_after(who, count, make, heard)
        stages.add(type(died_in))
        ends_well(parties, last, who, died_in)
        if heard:
            goes_on(parties, last)
    masked = protection == "masked"
    if who == HUB:
        everywhere = {*coordinator.MOVES} - {coordinator.Ready, coordinator.Failed}
        unmasked = {coordinator.Collecting, coordinator.Summing, coordinator.Releasing}
        assert stages == (everywhere if masked else unmasked | {coordinator.Released})
    else:
        unmasked = {site.Masking, site.Submitted, site.Opening, site.Stated, site.Idle}
        assert stages == ({*site.IN_ROUND, site.Idle} if masked else unmasked)


class LateDisk(Parties):
    """The control: a record reaches the disk only when the effect behind it is done."""

    def __init__(self, *args):
        super().__init__(*args)
        self.waiting = {who: [] for who in self.first}

    def step(self, who, event):
        self.flush(who)
        return super().step(who, event)

    def act(self, who, effect):
        if isinstance(effect, effects.Persist):
            self.waiting[who].append(effect)
            return
        super().act(who, effect)

    def count(self, who, effect):
        super().count(who, effect)
        if not isinstance(effect, effects.Persist):
            self.flush(who)

    def flush(self, who):
        for record in self.waiting[who]:
            super().act(who, record)
        self.waiting[who] = []

    def crash(self, who, heard=False):
        self.waiting[who] = []
        return super().crash(who, heard)


def test_a_record_behind_what_it_records_would_say_two_things():
    twice, vectors = set(), set()
    for protection in PROTECTIONS:

        def make(protection=protection):
            return LateDisk(5, 3, protection)

        for count in range(1, carried_out("s00", make) + 1):
            parties, _, _ = cut_after("s00", count, make, heard=True)
            twice |= {key[2] for key, bodies in said(parties).items() if len(bodies) > 1}
            vectors |= set(parties.vectors.values())
    assert "Keys" in twice and 2 in vectors


@pytest.mark.parametrize("jump", [1e9, -1e9], ids=["forward", "backward"])
@pytest.mark.parametrize("protection", PROTECTIONS)
def test_a_clock_that_jumps(protection, jump):
    """At every point of a round: forward it may only end it, cleanly; backward it ends nothing."""
    ended = set()
    for steps in range(1, 99, 2):
        parties = Parties(4, protection=protection)
        parties.begin()
        parties.pump(until=lambda p=parties, n=steps: len(p.log) >= n)
        if not parties.queue:
            break
        before = dict(parties.stages)
        parties.now += jump
        for name in parties.sites:
            parties.step(name, site.Tick())
        if not isinstance(parties.stages[HUB], coordinator.Released):
            parties.step(HUB, coordinator.Tick())
        if jump < 0:
            assert parties.stages == before
            parties.now -= jump
        last = parties.finish()
        ended.add(type(last))
        assert all(len(bodies) == 1 for bodies in said(parties).values())
        if isinstance(last, coordinator.Released):
            left = net(parties.made[name] for name in last.certificate.survivors)
            assert left == net([parties.removed])
        goes_on(parties, last)
    both = {coordinator.Released, coordinator.Failed}
    assert ended == (both if jump > 0 else {coordinator.Released})
