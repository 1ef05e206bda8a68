"""Shares for the next round are sealed while this one is released, with keys that confirmations sign (PROTOCOL C, P).

A coordinator passes these keys on. Control: the honest bundle is answered with shares before its announcement; and
without the check of a key's digest a coordinator that puts its own key in reads a share of every site.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from support.parties import HUB, Parties

from fedcore.errors import KeyRefused
from fedcore.secagg.crypto import shamir
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.crypto.hybrid import HybridKey, open_envelope
from fedcore.secagg.protocol import checks, effects, messages
from fedcore.secagg.protocol.messages import sign
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.round.site import following, sharing

NAMES = ["s00", "s01", "s02", "s03"]


def released(wire=None):
    parties = Parties(4, ahead=True)
    parties.wire = wire or parties.wire
    assert isinstance(parties.play(), coordinator.Released)
    return parties


def sent(parties, since=0):
    """(sender, message) of all messages of the sites."""
    return [
        (step.who, effect.message)
        for step in parties.log[since:]
        for effect in step.effects
        if step.who != HUB and isinstance(effect, effects.Send)
    ]


def warnings(parties):
    return [e.text for step in parties.log for e in step.effects if isinstance(e, effects.Warn)]


def test_a_round_begins_with_the_shares_that_its_sites_sent_during_the_last_one():
    parties = released()
    assert list(parties.sent.shares) == list(parties.sent.keys) == NAMES
    for name, shares in parties.sent.shares.items():
        assert shares.head.header == parties.header().digest
        assert parties.sent.announced[name].public == parties.sent.keys[name].public
        assert parties.stages[name].ahead.sealed.shares == shares
    before = len(parties.log)
    parties.begin()
    assert isinstance(parties.stages[HUB], coordinator.Collecting)  # before a site heard of it
    assert isinstance(parties.finish(), coordinator.Released)
    now = [type(message) for _, message in sent(parties, before)]
    of_the_next = [messages.Keys, messages.Shares]
    for kind in (*of_the_next, messages.Confirm, messages.NextKeys, messages.Unmask):
        assert now.count(kind) == 4
    assert now.index(messages.Confirm) < now.index(messages.Keys)  # none for this round
    assert not warnings(parties) and not parties.refusals


class OwnKey:
    """A coordinator that puts a channel key of its own in the place of some sites' keys."""

    def __init__(self, names):
        self.names, self.key = names, HybridKey.draw(OsEntropy())

    def __call__(self, message):
        if not isinstance(message, messages.NextBundle):
            return message
        public = self.key.public
        keys = (replace(k, channel=public) if k.site in self.names else k for k in message.keys)
        return replace(message, keys=tuple(keys))

    def read(self, shares, channel):
        """The self-seed of a site, from the shares that it sealed for these sites."""
        head = shares.head
        points = {}
        for place, parcel in enumerate(shares.parcels):
            if parcel.recipient in self.names and parcel.envelope:
                who = head.site, parcel.recipient
                context = sharing.encode(("fedcore/1 shares", head.header, *who))
                plain = open_envelope(
                    self.key, channel, parcel.envelope, context=context, sender=head.site
                )
                points[place + 1] = plain[: shamir.SHARE_BYTES]
        return shamir.combine(points, len(points), owner=head.site)


def test_nothing_is_sealed_for_a_key_that_its_site_did_not_confirm(without):
    liar = OwnKey(["s01", "s02", "s03"])
    parties = released(liar)
    assert not parties.sent.shares and list(parties.sent.keys) == NAMES
    told = [text for text in warnings(parties) if "keys of the next round" in text]
    assert len(told) == 4 and "than it confirmed" in told[0]
    assert "the next round begins without it" in told[0]
    assert isinstance(parties.play(), coordinator.Released)  # it goes on by what it can check
    # Control: without the check the coordinator reads the secret that hides the next vector of s00.
    without(following, "_check")
    parties = released(liar)
    shares = parties.sent.shares["s00"]
    keys = parties.sent.keys["s00"]
    assert hashlib.sha256(liar.read(shares, keys.channel)).digest() == keys.self_seed_hash


@pytest.mark.parametrize("how", ["a site less", "another order", "a key twice", "of another round"])
def test_a_bundle_is_of_all_survivors_each_once(how, without):
    def wire(message):
        if not isinstance(message, messages.NextBundle):
            return message
        first, second, *rest = message.keys
        keys = {
            "a site less": (first, second, *rest[1:]),
            "another order": (second, first, *rest),
            "a key twice": (first, replace(first, site=second.site), *rest),
            "of another round": (replace(first, header=b"o" * 32), second, *rest),
        }[how]
        return replace(message, keys=keys)

    parties = released(wire)
    assert not parties.sent.shares and len(warnings(parties)) == 4
    assert isinstance(parties.play(), coordinator.Released)


def test_the_keys_of_the_announcement_are_those_that_shares_are_sealed_for():
    """A site with other keys in the next round than it confirmed: its shares could not be opened by it."""
    parties = released()
    header, names = parties.header(), NAMES
    fresh = following.draw_keys(parties.members["s01"], header, *_standing(parties, "s01"))
    other = {**parties.sent.keys, "s01": fresh.keys}
    announce = messages.Announce(header, tuple(other[name] for name in names))
    with pytest.raises(KeyRefused, match="shares are sealed for") as caught:
        parties.step("s00", site.Invited(announce, parties.stages["s00"].ahead.state_tag))
    assert caught.value.fault == "s01"
    # The coordinator does not even ask: the round after a restart begins with fresh keys of all sites.
    parties.sent.keys["s01"] = fresh.keys
    assert coordinator.ahead_of(parties.hub, header, parties.sent.keys)
    assert parties.sent.for_round(parties.hub, header) == ((), [])


def _standing(parties, name):
    stage = parties.stages[name]
    return stage.ahead.state_tag, stage.standing.key_id


def test_a_thinner_bundle_than_shares_are_sealed_for():
    parties = released()
    thinner = tuple(k for name, k in parties.sent.keys.items() if name != "s03")
    announce = messages.Announce(parties.header(), thinner)
    with pytest.raises(KeyRefused, match="found 3 sites"):
        parties.step("s00", site.Invited(announce, parties.stages["s00"].ahead.state_tag))


def test_a_site_that_lost_the_announcement_hears_it_again_with_the_shares():
    parties = released()
    parties.begin()
    parties.queue.clear()
    found = parties.step(HUB, coordinator.SiteReconnected("s02"))
    assert [type(e.message) for e in found] == [messages.Announce, messages.Delivery]
    assert {e.to for e in found} == {"s02"}
    parties.pump()
    assert isinstance(parties.stages["s02"], site.Submitted)


def test_shares_that_did_not_arrive_are_sent_again_in_a_new_session():
    parties = released()
    del parties.sent.shares["s02"]
    parties.begin()
    parties.pump()
    assert isinstance(parties.stages[HUB], coordinator.Sharing)
    parties.step("s02", site.SessionRestored())
    assert isinstance(parties.finish(), coordinator.Released)


def test_confirmations_of_a_round_differ_in_their_next_keys_only(without):
    """The lists that are signed must be the same; the digest of keys is of each site its own."""
    parties = Parties(4, ahead=True)
    parties.begin()
    parties.pump(until=lambda: isinstance(parties.stages[HUB], coordinator.Unmasking))
    first, second = parties.stages[HUB].confirms[:2]
    assert first.next != second.next and len(first.next) == 32
    checks.confirm(second, first, parties.pins)
    unsigned = replace(second, next=first.next)
    with pytest.raises(Exception, match="signature"):
        checks.confirm(unsigned, first, parties.pins)
    assert sign(unsigned, parties.members[second.site].identity) != second


def test_a_coordinator_that_lost_them_asks_and_gets_the_very_same_shares():
    """Secrets are split once: no second polynomial through the same secret, whatever bundle follows."""
    parties = released()
    first, header = parties.sent.shares["s00"], parties.header()
    ask, tag = messages.Announce(header), parties.stages["s00"].ahead.state_tag
    bundle = messages.KeyBundle(header.digest, tuple(parties.sent.keys.values()))
    parties.step("s00", site.Invited(ask, tag))
    asked = parties.stages["s00"]
    (_, again) = parties.step("s00", site.MessageFromCoordinator(bundle))
    assert again.message == first
    parties.stages["s00"] = asked
    thinner = replace(bundle, keys=bundle.keys[:3])
    with pytest.raises(KeyRefused, match="found 3 sites"):
        parties.step("s00", site.MessageFromCoordinator(thinner))
    parties.stages["s00"] = replace(asked, sealed=None)  # control: without what was sealed
    (_, second) = parties.step("s00", site.MessageFromCoordinator(thinner))
    assert second.message != first


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("of another round", "than it confirmed"),
        ("of small order", "small order"),
        ("a key twice", "distinct keys"),
    ],
)
def test_keys_that_a_lying_site_confirmed_are_checked_as_those_of_an_announcement(how, told):
    """Its confirmation signs their digest, so the coordinator passes them on."""
    parties = Parties(4, ahead=True)
    lies = {}

    def lie(keys):
        return {
            "of another round": replace(keys, header=b"o" * 32),
            "of small order": replace(keys, channel=replace(keys.channel, x25519=bytes(32))),
            "a key twice": replace(keys, channel=keys.mask),
        }[how]

    def wire(message):
        if isinstance(message, messages.Confirm) and message.site == "s01":
            keys = lies["s01"] = lie(parties.stages["s01"].drawn.keys)
            new = replace(message, next=following.digest(keys), signature=b"")
            return sign(new, parties.members["s01"].identity)
        if isinstance(message, messages.NextKeys) and message.site == "s01":
            return lies["s01"]
        return message

    parties.wire = wire
    assert isinstance(parties.play(), coordinator.Released)
    assert parties.passed_on() and not parties.sent.shares
    assert all(told in text for text in warnings(parties)) and len(warnings(parties)) >= 3


def test_shares_are_sent_again_with_the_round_where_the_session_ended_since():
    parties = released()
    event = site.Invited(
        messages.Announce(parties.header(), tuple(parties.sent.keys.values())),
        parties.stages["s00"].ahead.state_tag,
    )
    parties.step("s01", event)  # control: in the same session they are not sent twice
    parties.step("s00", site.SessionRestored())
    parties.step("s00", event)
    found = [name for name, message in sent(parties, -3) if isinstance(message, messages.Shares)]
    assert found == ["s00"]
