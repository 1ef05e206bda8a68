"""Lies inside a key epoch (PROTOCOL E): makers, grants, keys and key ids that are not what they say.

`tests/unit/protocol/test_key_epochs.py` has the rest, each beside the message that is taken: a call that
differs from what the operator approved (federation, job, version, roster, pins, plan, threshold), a
number used twice, keys that are unsigned, copied, stale or malformed, a grant for another site or key,
a tampered envelope, another key id, a list of holders that is short, repeated or forged.
Here each control removes the one check, and the lie is installed.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import replace

import pytest
from support.machines import patch_machine
from support.parties import HUB, PAYLOAD, Died, Epochs, Parties, granted_by, with_late_joiner

from fedcore.errors import (
    EnvelopeRefused,
    HeaderRefused,
    KeyRefused,
    ListRefused,
    OutOfOrder,
    RosterRefused,
    SignatureRefused,
    StaleEpoch,
    StateDiffers,
    ThresholdRefused,
)
from fedcore.secagg.crypto import hybrid
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.crypto.sumtag import key_id
from fedcore.secagg.protocol import checks, effects, epoch, messages
from fedcore.secagg.protocol.messages import sign
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.wire_form import encode

LIE = SecretBytes(b"a payload that the coordinator knows")


def at_grant(to="s02"):
    """(epochs, the maker's grant for `to` as it is about to arrive)."""
    epochs = Epochs().begin()
    return epochs, epochs.until(epoch.Granted, to)


def lying_grant(epochs, by, to, payload=LIE, header=None):
    """A grant that `by`, a rostered site which colludes with the coordinator, really makes."""
    stage = epochs.stages[by]
    header = header or stage.header
    keys = {name: epochs.stages[name].key for name in (by, to)}
    keys = {
        name: sign(replace(key, header=header.digest), epochs.members[name].identity)
        for name, key in keys.items()
    }
    stage = replace(stage, header=header, key=keys[by])
    grant = epoch.seal_grant(
        epochs.members[by], stage, keys[to], payload, key_id(payload.reveal())
    )  # fmt: skip
    return epoch.FromCoordinator(epoch.Granted(grant, keys[by], ()))


def installs(epochs, who, event, payload=LIE):
    """The control: the site uses this payload from now on."""
    epochs.step(who, event)
    assert epochs.installed[who][-1].payload.reveal() == payload.reveal()


# ------------------------------------------------------------------------------------ the maker


def test_a_payload_by_another_site_than_the_maker(monkeypatch):
    """One colluding site makes the key in the maker's place: the coordinator would read everything."""
    epochs, granted = at_grant()
    lie = lying_grant(epochs, "s01", "s02")
    assert epochs.refused("s02", lie, ThresholdRefused, match="holders: found 0 sites") == HUB
    control = Epochs().begin()
    control.until(epoch.Granted, "s02")
    with monkeypatch.context() as without:
        patch_machine(without, epoch, "_check_held", lambda *_: None)
        installs(control, "s02", lying_grant(control, "s01", "s02"))
    installs(epochs, "s02", epoch.FromCoordinator(granted), PAYLOAD)


def test_a_grant_by_the_coordinator_in_the_makers_name(without):
    """Its own epoch key and envelope, all in order but for the two signatures."""

    def forged(epochs):
        member = replace(epochs.members["s00"], identity=Epochs().members["s00"].identity)
        made = epoch.HybridKey.draw(member.entropy)
        key = sign(replace(epochs.stages["s00"].key, key=made.public), member.identity)
        stage = replace(epochs.stages["s00"], secret=SecretBytes(made.to_bytes()), key=key)
        to = epochs.stages["s02"].key
        grant = epoch.seal_grant(member, stage, to, LIE, key_id(LIE.reveal()))
        return epoch.FromCoordinator(epoch.Granted(grant, key, ()))

    epochs, granted = at_grant()
    assert epochs.refused("s02", forged(epochs), SignatureRefused) == "s00"
    unsigned = replace(granted, grant=replace(granted.grant, signature=bytes(64)))
    assert epochs.refused("s02", epoch.FromCoordinator(unsigned), SignatureRefused) == "s00"
    unsigned = replace(granted, granter=replace(granted.granter, signature=bytes(64)))
    assert epochs.refused("s02", epoch.FromCoordinator(unsigned), SignatureRefused) == "s00"
    without(epoch, "check_signature")
    installs(epochs, "s02", forged(epochs))


HEADERS = {
    "maker": {"maker": "s01"},
    "earlier number": {"epoch": 0},
    "later number": {"epoch": 2},
    "roster": {"roster": ("s00", "s01", "s02")},
    "pinned keys": {"pins": "0" * 64},
    "plan digest": {"plan_digest": "0" * 64},
    "federation": {"federation": "other"},
    "job": {"job": "other"},
    "threshold": {"threshold": 2},
    "version": {"version": 99},
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_grant_under_another_header(what, monkeypatch, without):
    """All of E is in the header's digest: signed, and in the envelope's context, so neither alone."""
    epochs, _ = at_grant()
    header = epochs.header(**HEADERS[what])
    lie = lying_grant(epochs, "s00", "s02", header=header)
    assert epochs.refused("s02", lie, StaleEpoch, match="another one") == "s00"
    mixed = epoch.FromCoordinator(replace(lie.message, granter=epochs.stages["s00"].key))
    assert epochs.refused("s02", mixed, StaleEpoch, match="another one") == "s00"
    without(epoch, "check_epoch")
    assert epochs.refused("s02", lie, EnvelopeRefused, match="does not open") == "s00"
    patch_machine(monkeypatch, epoch, "_context", lambda header, *rest: encode(rest))
    installs(epochs, "s02", lying_grant(epochs, "s00", "s02", header=header))


def test_a_maker_that_is_asked_twice_makes_one_payload():
    """Two payloads of one epoch would be two groups of sites, each without the other."""
    epochs = Epochs().begin()
    request = epochs.until(epoch.EpochKeys, "s00")
    epochs.step("s00", epoch.FromCoordinator(request))
    epochs.payload = LIE
    epochs.step("s00", epoch.FromCoordinator(request))
    assert [i.payload.reveal() for i in epochs.installed["s00"]] == [PAYLOAD.reveal()]
    made = [m for m in epochs.log if isinstance(m, epoch.Grants)]
    assert {g.key_id for grants in made for g in grants.grants} == {key_id(PAYLOAD.reveal())}
    # Asked again with a key that its site did not sign, nothing is sealed to it.
    first, second, *rest = request.keys
    eve = replace(second, key=first.key)
    swapped = epoch.FromCoordinator(replace(request, keys=(first, eve, *rest)))
    assert epochs.refused("s00", swapped, SignatureRefused) == "s01"
    epochs.refused("s01", epoch.FromCoordinator(request), OutOfOrder, match="s00")


# --------------------------------------------------------------------------------- epoch keys


WEAK = {
    "0": bytes(32),
    "1": (1).to_bytes(32, "little"),
    "order 8": bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    "-1": ((1 << 255) - 20).to_bytes(32, "little"),
}
BAD_KEYS = {
    **{f"small order: {name}": {"x25519": point} for name, point in WEAK.items()},
    "X25519 too short": {"x25519": b"x" * 31},
    "ML-KEM not reduced": {"mlkem": b"\xff" * 1184},
    "ML-KEM too short": {"mlkem": bytes(1183)},
}


def bad_key(epochs, name, what):
    key = epochs.stages[name].key
    return sign(replace(key, key=replace(key.key, **BAD_KEYS[what])), epochs.members[name].identity)


@pytest.mark.parametrize("what", BAD_KEYS)
def test_a_lying_sites_malformed_epoch_key(what, without):
    """At the coordinator, the maker, a holder and a recipient; before a payload is even made."""
    epochs = Epochs().begin()
    request = epochs.until(epoch.EpochKeys, "s00")
    lie = bad_key(epochs, "s02", what)
    keys = tuple(lie if key.site == "s02" else key for key in request.keys)
    asked = epoch.FromCoordinator(replace(request, keys=keys))
    assert epochs.refused("s00", asked, KeyRefused) == "s02"
    assert "s00" not in epochs.installed
    hub = Epochs().begin()
    hub.step("s02", epoch.FromCoordinator(epoch.EpochCall(hub.header())))
    lie_there = bad_key(hub, "s02", what)
    assert hub.refused(HUB, epoch.FromSite("s02", lie_there), KeyRefused) == "s02"

    late = with_late_joiner()
    weak = bad_key(late, "s03", what)
    assert late.refused("s01", epoch.FromCoordinator(epoch.GrantRequest(weak)), KeyRefused) == "s03"
    granted = granted_by(late, "s01")
    weak = replace(granted, granter=bad_key(late, "s01", what))
    assert late.refused("s03", epoch.FromCoordinator(weak), KeyRefused) == "s01"

    without(hybrid.HybridPublic, "check")
    stage, found = epoch.step_site(epochs.members["s00"], epochs.stages["s00"], asked)
    assert isinstance(stage, epoch.Making) and isinstance(found[-1], epoch.MakeSecrets)


def test_one_epoch_key_under_two_names(monkeypatch):
    """Whoever holds it would open the grants of both; the second site signs the first one's key."""
    epochs = Epochs().begin()
    request = epochs.until(epoch.EpochKeys, "s00")
    for part in ("x25519", "mlkem"):
        first, second, third, *rest = request.keys
        copied = replace(third.key, **{part: getattr(second.key, part)})
        lie = sign(replace(third, key=copied), epochs.members["s02"].identity)
        asked = epoch.FromCoordinator(replace(request, keys=(first, second, lie, *rest)))
        fault = epochs.refused("s00", asked, KeyRefused, match="a key of 's01' again")
        assert fault == "s02"
    epochs.step("s00", epoch.FromCoordinator(request))  # the control: the same with distinct keys
    assert "s00" in epochs.installed


def test_one_identity_under_two_names_of_the_roster(monkeypatch):
    """The coordinator's own, say: it would count twice among holders, and hold two shares of each."""
    epochs = Epochs()
    pins = {**epochs.parties.pins, "s03": epochs.parties.pins["s02"]}
    honest, twice = epochs.members["s01"], replace(epochs.members["s01"], pins=pins)
    call = epoch.FromCoordinator(epoch.EpochCall(epochs.header()))
    epochs.members["s01"] = twice
    assert epochs.refused("s01", call, RosterRefused, match="key of s02") == "s03"
    with monkeypatch.context() as without:
        patch_machine(without, site, "roster_digest", lambda _: epochs.header().pins)
        stage, _ = epoch.step_site(twice, epochs.stages["s01"], call)
        assert isinstance(stage, epoch.Offered)
    epochs.members["s01"] = honest
    epochs.step("s01", call)


# ------------------------------------------------------------------------------ the late joiner


def test_holders_that_are_strangers_or_not_enough(without):
    """A colluding holder and its own payload: it would need t signatures, and has one."""
    epochs = with_late_joiner()
    granted = granted_by(epochs, "s01")
    to, other = epochs.stages["s03"].key, key_id(LIE.reveal())
    lie = epoch.seal_grant(epochs.members["s01"], epochs.stages["s01"], to, LIE, other)
    own = sign(replace(granted.held[1], key_id=other), epochs.members["s01"].identity)
    stranger = Epochs().members["s00"].identity
    strangers = [sign(replace(own, site=name), stranger) for name in ("x", "y", "z")]
    forged = [sign(replace(own, site=name), stranger) for name in ("s00", "s02")]
    for held, error in (
        ((own,), ThresholdRefused),
        (tuple(strangers), ListRefused),
        ((own, *strangers), ListRefused),
        ((forged[0], own, forged[1]), SignatureRefused),
        (granted.held, KeyRefused),
    ):
        wrong = epoch.FromCoordinator(replace(granted, grant=lie, held=held))
        epochs.refused("s03", wrong, error)
    assert "s03" not in epochs.installed
    without(epoch, "_check_held")
    installs(epochs, "s03", epoch.FromCoordinator(replace(granted, grant=lie, held=(own,))))


def test_a_holders_signature_from_an_earlier_epoch(without):
    """The sites did sign that key id, an epoch ago, before it was revoked."""
    epochs = with_late_joiner()
    old = granted_by(epochs, "s01")
    epochs.pump()
    epochs.payload = SecretBytes(b"the second payload")
    epochs.silent = {"s03"}
    epochs.begin(2, "s01").pump()
    epochs.now += 100.0
    epochs.step(HUB, coordinator.Tick())
    epochs.pump()
    epochs.silent = set()
    epochs.step("s03", epoch.FromCoordinator(epoch.EpochCall(epochs.header(2, "s01"))))
    to, name = epochs.stages["s03"].key, old.grant.key_id
    revoked = epoch.seal_grant(epochs.members["s02"], epochs.stages["s02"], to, PAYLOAD, name)
    wrong = epoch.FromCoordinator(epoch.Granted(revoked, epochs.stages["s02"].key, old.held))
    assert epochs.refused("s03", wrong, StaleEpoch) == "s00"
    without(epoch, "_check_held")
    installs(epochs, "s03", wrong, PAYLOAD)


# ----------------------------------------------------------- different epochs to different sites


def in_two_epochs():
    """s00 to s02 hold epoch 2; s03 was never told of it and stands in epoch 1, with another payload."""
    epochs = Epochs().begin()
    epochs.pump()
    epochs.payload, epochs.silent = LIE, {"s03"}
    epochs.begin(2).pump()
    epochs.now = 100.0
    epochs.step(HUB, coordinator.Tick())
    epochs.pump()
    parties = epochs.parties
    for name in epochs.sites:
        install = epochs.installed[name][-1]
        standing = site.SiteProgress(install.epoch, install.key_id)
        parties.first[name] = parties.stages[name] = site.Idle(standing)
    return parties


def joined(parties, headers):
    """Everybody's keys, each under the header the coordinator told it."""
    found = {}
    for name, header in headers.items():
        parties.step(
            name, site.Invited(messages.Announce(header), parties.tags.get(name, b"t" * 32))
        )
        found[name] = parties.queue.pop()[2].message
    return found


def test_sites_in_different_epochs_never_come_into_one_round(without):
    """By the epoch's number, by the header, and at last by the key ids: each refusal without the one
    before it. The control: without all three they share keys, and no sum would have one key."""
    parties = in_two_epochs()
    ours, theirs = parties.header(epoch=2), parties.header(epoch=1)
    with pytest.raises(StaleEpoch, match="found 2, expected 1"):
        parties.step("s03", site.Invited(messages.Announce(ours), b"t" * 32))
    keys = joined(parties, {**dict.fromkeys(("s00", "s01", "s02"), ours), "s03": theirs})
    bundle = site.MessageFromCoordinator(messages.KeyBundle(ours.digest, tuple(keys.values())))
    stage = parties.stages["s00"]
    with pytest.raises(HeaderRefused) as refused:
        parties.step("s00", bundle)
    assert refused.value.fault == "s03"
    without(checks, "of_round")
    with pytest.raises(StateDiffers, match="key id") as refused:
        parties.step("s00", bundle)
    assert refused.value.fault == "s03" and parties.stages["s00"] is stage
    without(checks, "same_state")
    parties.step("s00", bundle)
    assert isinstance(parties.stages["s00"], site.Shared)


def test_encrypted_a_survivor_under_another_payload(monkeypatch):
    """Without keys to agree on, the submission carries the key id."""
    parties = Parties(4, protection="encrypted")
    parties.begin()
    parties.pump(until=lambda: isinstance(parties.stages["s00"], site.Submitted))
    header = parties.stages["s00"].header
    own = parties.stages["s00"].submit
    others = [
        sign(replace(own, site=name, digest=name.encode() * 8), parties.members[name].identity)
        for name in ("s01", "s02")
    ]
    lie = sign(replace(others[1], key_id=b"i" * 32), parties.members["s02"].identity)
    sums = [
        messages.Aggregate(header.digest, (own, others[0], x), b"s", 9) for x in (lie, others[1])
    ]
    with pytest.raises(StateDiffers, match="key id") as refused:
        parties.step("s00", site.MessageFromCoordinator(sums[0]))
    assert refused.value.fault == "s02"
    parties.step("s00", site.MessageFromCoordinator(sums[1]))  # the control
    assert isinstance(parties.stages["s00"], site.Opening)


# ------------------------------------------------------------------------ restarts in a key epoch


class Mortal(Epochs):
    """Journals of its own, and a process that ends after so many effects: `cut` as in `Parties`."""

    def __init__(self, n, cut):
        super().__init__(n)
        self.cut, self.disk, self.done = cut, dict(self.stages), 0

    def step(self, who, event):
        stage = self.stages[who]
        if who == HUB:
            self.stages[who], found = epoch.step_hub(self.hub, stage, event, self.now)
        else:
            self.stages[who], found = epoch.step_site(self.members[who], stage, event)
        for effect in found:
            match effect:
                case effects.Persist(record=record):
                    self.disk[who] = record
                case effects.Send(to=to, message=message):
                    self.log.append(message)
                    self.queue.append((who, to, message))
                case epoch.MakeSecrets():
                    self.step(who, epoch.SecretsMade(SecretBytes(os.urandom(64))))
                case epoch.Install():
                    self.installed.setdefault(who, []).append(effect)
            self.done += who == self.cut[0]
            if (who, self.done) == self.cut:
                raise Died
        return found

    def restart(self, who):
        self.queue = deque(e for e in self.queue if who not in e[:2])
        self.stages[who] = self.disk[who]
        for name in self.sites if who == HUB else [who]:
            self.step(name, epoch.Again())
            self.step(HUB, coordinator.SiteReconnected(name))
        if isinstance(self.stages[HUB], epoch.NoEpoch):
            self.begin()


@pytest.mark.parametrize("who", ["s00", "s02", HUB])
def test_a_process_that_dies_after_any_effect_of_a_key_epoch(who):
    """The epoch goes on, and of one number there is one payload only, whoever made it twice."""
    for count in range(1, 99):
        epochs = Mortal(4, (who, count))
        try:
            epochs.begin().pump()
        except Died:
            epochs.restart(who)
            epochs.pump()
        else:
            break
        held = {m.key_id for m in epochs.log if isinstance(m, epoch.KeyHeld)}
        assert len(held) == 1 and epochs.stages[HUB].holders == epochs.sites
        assert {epochs.stages[name].held.key_id for name in epochs.sites} == held
    assert count > (15 if who == HUB else 4), "all of them were met"
