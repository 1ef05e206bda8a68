"""Keys that were sent ahead, for the round after a release (PROTOCOL C, D, H): a coordinator may use them in that round
only, once, with one bundle, and after the release.

A site signs them over the whole header of that round, which names the certificate. Control: the honest announcement is
answered with shares at once; and with the check removed the lie is, too, or a second set of keys leaves.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from kit import refuses, world_at
from support.parties import HUB, KEY_ID, SIZE, Died, Parties
from test_restarts import said

from fedcore.errors import (
    Conflicting,
    HeaderRefused,
    KeyRefused,
    SecondSum,
    StaleEpoch,
    StateDiffers,
    ThresholdRefused,
)
from fedcore.secagg.crypto.sumtag import state_tag
from fedcore.secagg.protocol import checks, effects
from fedcore.secagg.protocol.messages import (
    Abandon,
    Announce,
    Certificate,
    Keys,
    Shares,
    Statement,
    sign,
)
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.wire_form import decode, encode

MACS = b"S" * 32, b"N" * 32
NEXT_STATE = b"the model after the round"


class Ahead:
    """A world whose sites have stated a sum and sent keys for the next round. certified: and have its release."""

    def __init__(self, *, certified=True):
        world = self.world = world_at("open")
        names = tuple(sorted(world.submits))
        released = Certificate(world.round_header, names, *MACS, ())
        self.header = replace(
            world.round_header, round=2, training_round=2, certificate=released.hash
        )
        self.tag = state_tag(world.group, "job", 2, NEXT_STATE)
        self.keys, self.old = {}, dict(world.keys)
        for name in world.roster:
            opened = site.SumOpened(*MACS, site.Following(self.header, self.tag))
            sent = [e.message for e in world.step(name, opened) if isinstance(e, effects.Send)]
            assert [type(each) for each in sent] == [Keys, Statement]
            self.keys[name], world.statements[name] = sent
        if certified:
            for name in world.roster:
                world.receive(name, world.certificate())
            world.round_header = self.header

    def invitation(self, header=None, keys=None, tag=None):
        keys = tuple(self.keys.values()) if keys is None else tuple(keys)
        return site.Invited(Announce(header or self.header, keys), tag or self.tag)

    def shares(self, name, **changes):
        found = self.world.step(name, self.invitation(**changes))
        return [e.message for e in found if isinstance(e, effects.Send)]

    def with_keys(self, name, keys):
        return tuple({**self.keys, name: keys}.values())


def test_keys_ahead_belong_to_the_whole_header_and_shares_answer_them_at_once():
    found = Ahead()
    assert {keys.header for keys in found.keys.values()} == {found.header.digest}
    (sent,) = found.shares("ann")
    assert isinstance(sent, Shares) and isinstance(found.world.stages["ann"], site.Shared)
    # A coordinator that lost them asks, and gets the very same ones.
    (again,) = found.shares("bob", keys=())
    assert again == found.keys["bob"]


def test_keys_of_another_round_in_the_bundle(without):
    found = Ahead()
    bundle = found.with_keys("bob", found.old["bob"])
    refuses(
        found.world, "ann", found.invitation(keys=bundle), HeaderRefused,
        fault="bob", found="another round",
    )  # fmt: skip
    without(checks, "of_round", "same_state")
    (sent,) = found.shares("ann", keys=bundle)
    assert isinstance(sent, Shares)


def test_keys_ahead_of_one_round_are_not_used_in_another(without):
    """A later number, with the keys that all sites sent for the one before it."""
    found = Ahead()
    later = replace(found.header, round=3)
    refuses(
        found.world, "ann", found.invitation(later), KeyRefused, found="sent ahead", expected="none"
    )
    (fresh,) = found.shares("ann", header=later, keys=())
    assert fresh.header == later.digest and fresh.public != found.keys["ann"].public


@pytest.mark.parametrize(
    "changes", [{"roster": ("ann", "bob", "cat", "dan")}, {"training_round": 3}, {"purpose": "metrics"}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_another_round_of_the_same_number_gets_no_second_keys(changes, without):
    """The number is used up by the keys that were sent for it."""
    found = Ahead()
    other = replace(found.header, **changes)
    refuses(
        found.world, "ann", found.invitation(other, keys=()), HeaderRefused,
        found="2", expected="more than 2",
    )  # fmt: skip
    without(checks, "grows")
    (second,) = found.shares("ann", header=other, keys=())
    assert second.header == other.digest


def test_a_second_bundle_for_the_same_keys():
    found = Ahead()
    other = found.world.copy()
    found.shares("ann")
    thinner = tuple(found.keys.values())[:4]
    refuses(found.world, "ann", found.invitation(keys=thinner), Conflicting, found="other bytes")
    found.world = other  # alone, it is a bundle of enough sites
    (sent,) = found.shares("ann", keys=thinner)
    assert isinstance(sent, Shares)


@pytest.mark.parametrize("how", ["left", "declined"])
def test_keys_ahead_are_used_once(how, without):
    """A round that was left, or an announcement that was refused, uses them up."""
    found = Ahead()
    if how == "left":
        found.shares("ann")
        found.world.step("ann", site.CheckFailed(RuntimeError("an operator says no")))
    else:
        found.world.step("ann", site.Declined(found.header))
    for keys in (None, ()):
        refuses(
            found.world, "ann", found.invitation(keys=keys), HeaderRefused, expected="more than 2"
        )
    without(checks, "grows")
    (second,) = found.shares("ann", keys=())
    assert second.header == found.header.digest and second != found.keys["ann"]


def test_no_round_begins_before_the_release():
    found = Ahead(certified=False)
    refuses(found.world, "ann", found.invitation(), Conflicting, found="other bytes")
    found = Ahead()
    assert isinstance(found.shares("ann")[0], Shares)


def test_an_abandoned_round_drops_the_keys_that_were_sent_in_it(without):
    found = Ahead(certified=False)
    found.world.receive("ann", Abandon(found.world.h, "release"))
    stage = found.world.stages["ann"]
    assert stage.ahead is None and stage.standing.exposed
    refuses(found.world, "ann", found.invitation(), SecondSum)
    without(checks, "grows", "equal")
    found.world.stages["ann"] = replace(stage, standing=replace(stage.standing, exposed=b""))
    header = replace(found.header, certificate="")
    refuses(found.world, "ann", found.invitation(header), KeyRefused)


def test_a_new_process_has_no_keys_ahead_and_makes_none_of_that_number():
    found = Ahead(certified=False)
    for name in ("ann", "bob"):  # as it comes out of the journal
        found.world.stages[name] = decode(encode(found.world.stages[name]), site.Stated)
        found.world.receive(name, found.world.certificate())
        assert found.world.stages[name].ahead is None
    refuses(found.world, "ann", found.invitation(), HeaderRefused, expected="more than 2")
    refuses(found.world, "bob", found.invitation(keys=()), HeaderRefused, expected="more than 2")


def test_a_new_key_epoch_drops_them():
    found = Ahead()
    found.world.step("ann", site.NewEpoch(2, b"another" * 4))
    assert found.world.stages["ann"].ahead is None
    refuses(found.world, "ann", found.invitation(), StaleEpoch)
    later = replace(found.header, epoch=2)
    refuses(found.world, "ann", found.invitation(later), HeaderRefused, expected="more than 2")


def test_a_site_whose_state_is_another_one_by_then_does_not_use_them():
    found = Ahead()
    other = state_tag(found.world.group, "job", 2, b"another model")
    refuses(found.world, "ann", found.invitation(tag=other), HeaderRefused, expected="more than 2")


# -------------------------------------------------------------------------- at the coordinator


def released(n=4, threshold=0):
    parties = Parties(n, threshold, ahead=True)
    assert isinstance(parties.play(), coordinator.Released)
    return parties


def start(parties, keys):
    header = parties.header()
    event = coordinator.Start(header, SIZE, 0, tuple(keys))
    return coordinator.step(parties.hub, parties.stages[HUB], event, 0.0)


def test_a_round_begins_with_the_keys_of_all_sites_and_with_them_only():
    parties = released()
    kept, header = parties.sent.keys, parties.header()
    assert list(coordinator.ahead_of(parties.hub, header, kept)) == list(kept.values())
    after, found = start(parties, kept.values())
    assert isinstance(after, coordinator.Sharing)
    sent = [e.message for e in found if isinstance(e, effects.Send)]
    assert sent == [Announce(header, tuple(kept.values()))] * 4
    identity = parties.members["s01"].identity
    forged = replace(kept["s01"], signature=bytes(64))
    stranger = sign(replace(kept["s01"], state_tag=b"x" * 32), identity)
    older = sign(replace(kept["s01"], header=b"o" * 32), identity)
    assert kept["s01"].key_id == KEY_ID
    for wrong, error in ((stranger, StateDiffers), (older, HeaderRefused)):
        with pytest.raises(error):
            start(parties, {**kept, "s01": wrong}.values())
    for wrong in (forged, stranger, older):
        assert coordinator.ahead_of(parties.hub, header, {**kept, "s01": wrong}) == ()
    less = {name: keys for name, keys in kept.items() if name != "s01"}
    assert coordinator.ahead_of(parties.hub, header, less) == ()
    assert coordinator.ahead_of(parties.hub, replace(header, round=9), kept) == ()
    with pytest.raises(ThresholdRefused, match="at least 4"):
        start(parties, less.values())


def test_keys_ahead_follow_a_release_only():
    parties = released()
    keys, header = parties.sent.keys.values(), parties.header()
    for stage in (
        coordinator.Ready(1),
        coordinator.Failed(parties.stages[HUB].header, "keys", 1, ()),
    ):
        with pytest.raises(KeyRefused, match="no release"):
            coordinator.step(
                parties.hub, stage, coordinator.Start(header, SIZE, 0, tuple(keys)), 0.0
            )


@pytest.mark.parametrize(("who", "heard"), [("s00", False), ("s00", True), (HUB, True)])
def test_a_process_that_dies_after_any_effect_of_a_round_with_keys_ahead(who, heard):
    """Never two things where the protocol knows one, and at t = 2 of 3 the round is released without it."""
    count, every, ends = 1, 1 if who == "s00" else 3, 0
    while True:
        parties = released(3, 2)
        parties.cut = {who: count}
        try:
            parties.play()
        except Died:
            parties.crash(who, heard)
        else:
            break
        last = parties.finish()
        ends += isinstance(last, coordinator.Released) and len(last.certificate.survivors) >= 2
        assert all(len(bodies) == 1 for bodies in said(parties).values())
        assert set(parties.vectors.values()) == {1}
        count += every
    assert count > 10 and ends == (count - 1) / every
