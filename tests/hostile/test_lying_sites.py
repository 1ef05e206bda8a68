"""Lying sites before the real coordinator machine: other names, second versions, wrong vectors and shares."""

from __future__ import annotations

from dataclasses import replace

import pytest
from kit import World, answer_of, world_at
from support.machines import patch_machine

from fedcore.errors import (
    Conflicting,
    HeaderRefused,
    KeyRefused,
    ListRefused,
    OutOfOrder,
    RosterRefused,
    ShareRefused,
    SignatureRefused,
    VectorRefused,
)
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.protocol import checks
from fedcore.secagg.protocol.effects import FoldUpload, RemoveMasks, Send, Warn
from fedcore.secagg.protocol.messages import Certificate, Leave, Shares
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.round.site import releasing


class Hub:
    """The real coordinator machine, fed by hand from a world of honest sites."""

    def __init__(self, world):
        self.world, self.hub = world, coordinator.CoordinatorParams(world.pins)
        size = world.layout.slots * 8
        self.stage, _ = coordinator.step(
            self.hub, coordinator.Ready(), coordinator.Start(world.round_header, size), 0.0
        )

    def step(self, event, now=0.0):
        self.stage, found = coordinator.step(self.hub, self.stage, event, now)
        return found

    def received(self, messages, names=None):
        for name in names or self.world.roster:
            self.step(coordinator.MessageFromSite(name, messages[name]))
        return self

    def upload(self, name, **changes):
        submit = self.world.submits[name]
        event = coordinator.Uploaded(name, submit, submit.digest, submit.size)
        return self.step(replace(event, **changes))

    def refuses(self, event, error, *, fault, found=""):
        """This very error, and the stage as it was."""
        before = self.stage
        with pytest.raises(error) as refused:
            self.step(event)
        assert type(refused.value) is error
        assert refused.value.fault == fault
        assert found in str(refused.value.found)
        assert self.stage is before


def hub_at(stage, n=5):
    """(world, hub) with the hub waiting for what the sites send at `stage`."""
    world = world_at("state", n=n)
    hub = Hub(world)
    for name, messages in (("keys", world.keys), ("shares", world.shares)):
        if stage == name:
            return world, hub
        hub.received(messages)
    if stage == "submit":
        return world, hub
    for name in world.roster:
        hub.upload(name)
    for name, messages in (("confirm", world.confirms), ("unmask", world.answers)):
        if stage == name:
            return world, hub
        hub.received(messages)
    if stage == "sum":
        return world, hub
    hub.step(coordinator.SumReady(b"s" * 32, 100))
    return world, hub


@pytest.mark.parametrize("stage", ["keys", "shares", "confirm", "unmask", "release"])
def test_a_message_in_anothers_name(stage):
    world, hub = hub_at(stage)
    sent = {"keys": world.keys, "shares": world.shares, "confirm": world.confirms,
            "unmask": world.answers, "release": world.statements}[stage]  # fmt: skip
    hub.refuses(
        coordinator.MessageFromSite("eve", sent["bob"]), RosterRefused, fault="eve", found="'bob'"
    )
    hub.step(
        coordinator.MessageFromSite("bob", sent["bob"])
    )  # control: from bob himself it is taken


def test_a_leave_in_anothers_name_does_not_drop_it():
    world, hub = hub_at("submit")
    leave = Leave(world.h, "bob", "left")
    hub.refuses(coordinator.MessageFromSite("eve", leave), RosterRefused, fault="eve")
    hub.step(coordinator.MessageFromSite("bob", leave))
    assert hub.stage.gone == ("bob",)


def test_a_second_and_different_message(monkeypatch):
    for stage, kind, change in (
        ("keys", "keys", {"self_seed_hash": b"x" * 32}),
        ("confirm", "confirms", {"cohort": b"x" * 32}),
        ("release", "statements", {"state_mac": b"x" * 32}),
    ):
        world, hub = hub_at(stage)
        first = getattr(world, kind)["ann"]
        hub.step(coordinator.MessageFromSite("ann", first))
        before = hub.stage
        assert hub.step(coordinator.MessageFromSite("ann", first)) == () and hub.stage is before
        second = world.signed("ann", first, **change)
        hub.refuses(
            coordinator.MessageFromSite("ann", second),
            Conflicting,
            fault="ann",
            found="other bytes",
        )


@pytest.mark.parametrize("kind", ["keys", "shares", "confirms", "statements"])
def test_a_message_with_a_bad_signature(kind, without):
    stage = {"confirms": "confirm", "statements": "release"}.get(kind, kind)
    world, hub = hub_at(stage)
    good = getattr(world, kind)["ann"]
    forged = (
        Shares(replace(good.head, signature=bytes(64)), good.parcels)
        if kind == "shares" else replace(good, signature=bytes(64))
    )  # fmt: skip
    event = coordinator.MessageFromSite("ann", forged)
    hub.refuses(event, SignatureRefused, fault="ann")
    without(coordinator, "check_signature")
    without(checks, "check_signature")
    hub.step(event)


def test_keys_and_shares_of_another_round_or_malformed(without):
    world, hub = hub_at("keys")
    other = world.signed("ann", world.keys["ann"], header=b"o" * 32)
    hub.refuses(coordinator.MessageFromSite("ann", other), HeaderRefused, fault="ann")
    weak = replace(world.keys["ann"].mask, x25519=bytes(32))
    lie = world.signed("ann", world.keys["ann"], mask=weak)
    hub.refuses(
        coordinator.MessageFromSite("ann", lie), KeyRefused, fault="ann", found="small order"
    )
    world, hub = hub_at("shares")
    head = world.signed("ann", world.shares["ann"].head, header=b"o" * 32)
    late = coordinator.MessageFromSite("ann", replace(world.shares["ann"], head=head))
    hub.refuses(late, HeaderRefused, fault="ann")
    without(checks, "of_round")
    hub.step(late)


@pytest.mark.parametrize("lie", ["altered", "missing", "in anothers name"])
def test_shares_that_are_not_one_for_each(lie, monkeypatch):
    world, hub = hub_at("shares")
    good = world.shares["ann"]
    if lie == "altered":
        shares = replace(
            good, parcels=(*good.parcels[:-1], replace(good.parcels[-1], envelope=b""))
        )
    elif lie == "missing":
        head = world.signed("ann", good.head, parcels=good.head.parcels[:-1])
        shares = Shares(head, good.parcels[:-1])
    else:
        shares = world.lying_shares("ann", lambda p: replace(p, sender="bob"))
    hub.refuses(coordinator.MessageFromSite("ann", shares), ShareRefused, fault="ann")
    hub.step(coordinator.MessageFromSite("ann", good))


# ------------------------------------------------------------------------------------- the vectors


@pytest.mark.parametrize("change", [-8, 8])
def test_a_vector_of_the_wrong_length(change):
    world, hub = hub_at("submit")
    size = world.submits["ann"].size
    event = coordinator.Uploaded(
        "ann", world.submits["ann"], world.submits["ann"].digest, size + change
    )
    hub.refuses(event, VectorRefused, fault="ann", found=f"{size + change} bytes")
    signed = world.signed("ann", world.submits["ann"], size=size + change)
    lie = coordinator.Uploaded("ann", signed, signed.digest, size + change)
    hub.refuses(lie, VectorRefused, fault="ann")
    signed_only = coordinator.Uploaded("ann", signed, signed.digest, size)
    hub.refuses(signed_only, VectorRefused, fault="ann")
    hub.stage = replace(hub.stage, size=size + change)  # control: a round of such vectors takes it
    assert any(isinstance(e, FoldUpload) for e in hub.step(lie))


def test_a_vector_whose_bytes_are_not_the_signed_ones():
    world, hub = hub_at("submit")
    submit = world.submits["ann"]
    event = coordinator.Uploaded("ann", submit, b"x" * 32, submit.size)
    hub.refuses(event, VectorRefused, fault="ann", found="other bytes than were signed")
    assert any(isinstance(e, FoldUpload) for e in hub.upload("ann")), (
        "control: the signed bytes are folded"
    )


def test_a_vector_signed_by_somebody_else_or_for_another_round():
    world, hub = hub_at("submit")
    forged = replace(world.submits["bob"], site="ann")
    hub.refuses(
        coordinator.Uploaded("ann", forged, forged.digest, forged.size),
        SignatureRefused,
        fault="ann",
    )
    other = world.signed("ann", world.submits["ann"], header=b"o" * 32)
    hub.refuses(
        coordinator.Uploaded("ann", other, other.digest, other.size), HeaderRefused, fault="ann"
    )


def test_a_vector_is_folded_once():
    world, hub = hub_at("submit")
    assert any(isinstance(e, FoldUpload) for e in hub.upload("ann"))
    assert hub.upload("ann") == (), "again: nothing happens"
    second = world.signed("ann", world.submits["ann"], digest=b"x" * 32)
    event = coordinator.Uploaded("ann", second, second.digest, second.size)
    hub.refuses(event, Conflicting, fault="ann")


@pytest.mark.parametrize("stage", ["confirm", "unmask", "sum", "release"])
def test_a_late_submission_after_the_list_is_fixed(stage):
    world, hub = hub_at(stage)
    submit = world.submits["ann"]
    late = coordinator.Uploaded("ann", submit, submit.digest, submit.size)
    hub.refuses(late, OutOfOrder, fault="ann", found="Uploaded")


def test_a_late_submission_after_release():
    world, hub = hub_at("release")
    hub.received(world.statements)
    assert isinstance(hub.stage, coordinator.Released)
    submit = world.submits["ann"]
    late = coordinator.Uploaded("ann", submit, submit.digest, submit.size)
    hub.refuses(late, OutOfOrder, fault="ann")


def test_a_vector_of_a_site_that_did_not_share_or_left():
    world = world_at("state")
    hub = Hub(world).received(world.keys).received(world.shares, world.roster[:4])
    hub.step(coordinator.Tick(), 1e6)
    assert isinstance(hub.stage, coordinator.Collecting)
    submit = world.submits["eve"]
    event = coordinator.Uploaded("eve", submit, submit.digest, submit.size)
    hub.refuses(event, RosterRefused, fault="eve", found="not waited for")
    hub.step(coordinator.MessageFromSite("dan", Leave(world.h, "dan", "left")))
    assert isinstance(hub.stage, coordinator.Failed)


# --------------------------------------------------------------------------- confirm, unmask, state


@pytest.mark.parametrize("field", ["bundle", "cohort", "survivors"])
def test_a_confirmation_of_another_list(field):
    world, hub = hub_at("confirm")
    value = world.confirms["ann"].survivors[:4] if field == "survivors" else b"x" * 32
    lie = world.signed("ann", world.confirms["ann"], **{field: value})
    hub.refuses(
        coordinator.MessageFromSite("ann", lie), ListRefused, fault="ann", found="another list"
    )
    hub.step(coordinator.MessageFromSite("ann", world.confirms["ann"]))


@pytest.mark.parametrize("lie", ["share", "kind", "of", "missing", "both"])
def test_an_answer_with_other_shares_than_asked(lie, monkeypatch):
    world, hub = hub_at("unmask")
    first, *rest = world.answers["ann"].answers
    changed = {
        "share": (replace(first, share=bytes(33)), *rest),
        "kind": (replace(first, kind="mask root"), *rest),
        "of": (replace(first, of="bob"), *rest),
        "missing": tuple(rest),
        "both": (first, replace(first, kind="mask root"), *rest),
    }[lie]
    event = coordinator.MessageFromSite("ann", replace(world.answers["ann"], answers=changed))
    hub.refuses(event, ShareRefused, fault="ann")
    hub.step(coordinator.MessageFromSite("ann", world.answers["ann"]))


def test_an_answer_of_another_round():
    world, hub = hub_at("unmask")
    lie = replace(world.answers["ann"], header=b"o" * 32)
    hub.refuses(coordinator.MessageFromSite("ann", lie), HeaderRefused, fault="ann")


@pytest.mark.parametrize("what", ["self_seed_hash", "root"])
def test_a_site_whose_shares_rebuild_another_secret(what, monkeypatch):
    """Its digests were honest, its shared secret was not what it advertised: named, and nothing opened."""
    world, hub = hub_at("unmask")
    names = world.roster
    if what == "self_seed_hash":
        lies = tuple(
            replace(k, self_seed_hash=b"x" * 32) if k.site == "bob" else k for k in hub.stage.bundle
        )
        hub.stage = replace(hub.stage, bundle=lies)
    else:
        four = tuple(s for s in hub.stage.submissions if s.site != "bob")
        names = tuple(n for n in world.roster if n != "bob")
        lies = tuple(
            replace(k, mask=world.keys["ann"].mask) if k.site == "bob" else k
            for k in hub.stage.bundle
        )
        hub.stage = replace(hub.stage, bundle=lies, submissions=four)
        answered = {}
        for name in names:
            held = {each.of: each for each in world_at("confirm").stages[name].held}
            answered[name] = replace(
                world.answers[name],
                answers=tuple(releasing._one_share(held[n], n != "bob") for n in world.roster),
            )
        world.answers = answered
    for name in names[:-1]:
        hub.step(coordinator.MessageFromSite(name, world.answers[name]))
    control, event = hub.stage, coordinator.MessageFromSite(names[-1], world.answers[names[-1]])
    found = hub.step(event)
    assert isinstance(hub.stage, coordinator.Failed)
    assert any(isinstance(e, Warn) and "fault: bob" in e.text for e in found)
    assert not any(isinstance(e, RemoveMasks) for e in found)
    hub.stage = control
    check = "_check_self_seed" if what == "self_seed_hash" else "_checked_root"
    patch_machine(monkeypatch, coordinator, check, lambda *_: (SecretBytes(bytes(32)), 1))
    patch_machine(monkeypatch, coordinator, "pair_mask", lambda *_: (SecretBytes(bytes(32)), 1))
    assert any(isinstance(e, RemoveMasks) for e in hub.step(event))


def test_statements_that_differ_make_no_certificate():
    """A lying site alone changes nothing; two of five (t = 4) leave the round without a release."""
    world, hub = hub_at("release")
    lie = world.signed("eve", world.statements["eve"], state_mac=b"x" * 32)
    control = Hub.__new__(Hub)
    control.__dict__.update(hub.__dict__)
    hub.received({**world.statements, "eve": lie})
    assert isinstance(hub.stage, coordinator.Released)
    assert [name for name, _ in hub.stage.certificate.signatures] == list(world.roster[:4])
    lies = {n: world.signed(n, world.statements[n], state_mac=b"x" * 32) for n in ("dan", "eve")}
    control.received({**world.statements, **lies})
    assert isinstance(control.stage, coordinator.Failed)


def test_a_statement_about_other_survivors():
    world, hub = hub_at("release")
    lie = world.signed("ann", world.statements["ann"], survivors=b"x" * 32)
    hub.refuses(coordinator.MessageFromSite("ann", lie), ListRefused, fault="ann")


@pytest.mark.parametrize("stage", ["confirm", "release"])
def test_a_confirmation_and_a_statement_of_another_round(stage):
    """Its signature holds, over another header: every site would refuse a certificate with it."""
    world, hub = hub_at(stage)
    honest = (world.confirms if stage == "confirm" else world.statements)["ann"]
    lie = world.signed("ann", honest, header=b"o" * 32)
    hub.refuses(coordinator.MessageFromSite("ann", lie), HeaderRefused, fault="ann")
    hub.step(coordinator.MessageFromSite("ann", honest))


def test_an_unknown_site_and_a_round_for_one():
    world, hub = hub_at("keys")
    stranger = replace(world.keys["ann"], site="mallory")
    hub.refuses(coordinator.MessageFromSite("mallory", stranger), RosterRefused, fault="mallory")
    for roster, found in ((("ann", "mallory"), "mallory"), (("ann", "ann"), "twice")):
        idle = Hub(World())
        idle.stage = coordinator.Ready()
        start = coordinator.Start(replace(world.round_header, roster=roster), 8)
        idle.refuses(start, RosterRefused, fault="coordinator", found=found)


def test_a_certificate_the_honest_coordinator_made_is_taken_by_every_site():
    world, hub = hub_at("release")
    sent = []
    for name in world.roster:
        sent += hub.step(coordinator.MessageFromSite(name, world.statements[name]))
    certificates = [e for e in sent if isinstance(e, Send) and isinstance(e.message, Certificate)]
    assert [e.to for e in certificates] == list(world.roster)
    for e in certificates:
        assert answer_of(world.step(e.to, site.MessageFromCoordinator(e.message))) is None
        assert isinstance(world.stages[e.to], site.Idle)
