"""Key shares and offers that a site must not take: of another round, unsigned, broken, or lies (PROTOCOL P, C).

A lying site signs its lies; a lying coordinator cannot. Who is at fault is told apart.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from kit import World, answer_of, refuses, world_at

from fedcore.errors import (
    Conflicting,
    EnvelopeRefused,
    HeaderRefused,
    KeyRefused,
    ListRefused,
    ShareRefused,
    SignatureRefused,
    ThresholdRefused,
)
from fedcore.secagg.crypto import pairwise
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.crypto.hybrid import HybridKey, seal_envelope
from fedcore.secagg.protocol import checks, messages
from fedcore.secagg.protocol.effects import MakeVector
from fedcore.secagg.protocol.messages import LEFT, MASK_ROOT, SELF_SEED, Leave, Submit
from fedcore.secagg.protocol.round import site
from fedcore.secagg.protocol.wire_form import encode


def goes_on(world, name, delivery):
    """The control: the shares are taken and the vector is asked for."""
    found = world.step(name, site.MessageFromCoordinator(delivery))
    assert any(isinstance(effect, MakeVector) for effect in found)
    assert isinstance(world.stages[name], site.Masking)


def flipped(data, at=5):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def to(recipient, **changes):
    """A liar's change to its parcel for one recipient."""
    return lambda p: (
        replace(p, **{k: f(p) for k, f in changes.items()}) if p.recipient == recipient else p
    )


LIES = {
    "KEM ciphertext of the envelope": (
        to("cat", envelope=lambda p: flipped(p.envelope)), EnvelopeRefused, "does not open"),
    "box of the envelope": (
        to("cat", envelope=lambda p: flipped(p.envelope, 1100)), EnvelopeRefused, "does not open"),
    "truncated envelope": (
        to("cat", envelope=lambda p: p.envelope[:1000]), EnvelopeRefused, "1000 bytes"),
    "KEM ciphertext of the offer": (
        to("cat", offer=lambda p: flipped(p.offer)), EnvelopeRefused, "does not open"),
    "box of the offer": (
        to("cat", offer=lambda p: flipped(p.offer, 1100)), EnvelopeRefused, "does not open"),
    "truncated offer": (to("cat", offer=lambda p: p.offer[:-1]), EnvelopeRefused, "1135 bytes"),
    "no offer": (to("cat", offer=lambda p: b""), ShareRefused, "none"),
    "self-seed share that differs from its signed digest": (
        to("cat", self_share_digest=lambda p: b"x" * 32), ShareRefused, "differs from its signed"),
    "mask-root share that differs from its signed digest": (
        to("cat", root_share_digest=lambda p: b"x" * 32), ShareRefused, "differs from its signed"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_site_and_its_signed_parcel(lie, without):
    change, error, found = LIES[lie]
    world = world_at("shares")
    delivery = world.delivery("cat", shares={"ann": world.lying_shares("ann", change)})
    refuses(world, "cat", delivery, error, fault="ann", found=found)
    if error is ShareRefused and "digest" in lie:
        without(
            site, _open_parcel=lambda member, stage, parcel, _: replace(stage.own, of=parcel.sender)
        )
    else:  # with the parcel opened whatever it is
        without(site, _open_parcel=lambda _, stage, p, __: replace(stage.own, of=p.sender))
        without(site, _pairwise_mask=lambda _, stage, *__: (stage.secrets.root, 1))
    goes_on(world, "cat", delivery)


def sealed_by_ann(world, holder):
    """ann's parcel for cat with the shares of `holder`, sealed anew."""
    seen = world.copy()
    seen.step(holder, site.MessageFromCoordinator(seen.delivery(holder)))
    held = next(each for each in seen.stages[holder].held if each.of == "ann")
    parts = held.self_share.reveal(), held.root_share.reveal()
    ann = world.stages["ann"]
    envelope = seal_envelope(
        HybridKey.from_bytes(ann.secrets.channel.reveal()), world.keys["cat"].channel, b"".join(parts),
        context=encode(("fedcore/1 shares", world.h, "ann", "cat")), recipient="cat", entropy=OsEntropy(),
    )  # fmt: skip
    digests = {
        name: messages.share_digest(world.h, "ann", holder, kind, share)
        for name, kind, share in zip(
            ("self_share_digest", "root_share_digest"), (SELF_SEED, MASK_ROOT), parts, strict=True
        )
    }
    changes = {name: lambda _, value=value: value for name, value in digests.items()}
    return world.lying_shares("ann", to("cat", envelope=lambda _: envelope, **changes))


def test_a_real_share_of_somebody_else(without):
    """A liar sends dan's copy of its share to cat, well sealed: the digest names the holder."""
    world = world_at("shares")
    delivery = world.delivery("cat", shares={"ann": sealed_by_ann(world, "dan")})
    refuses(world, "cat", delivery, ShareRefused, fault="ann", found="differs from its signed")
    without(checks, "share")
    goes_on(world, "cat", delivery)


def test_a_parcel_that_its_sender_altered_needs_its_signature():
    """Sealed anew, an envelope of the same shares has other bytes: the list of the sender names them."""
    world = world_at("shares")
    anew = sealed_by_ann(world, "cat")
    unsigned = replace(anew, head=world.shares["ann"].head)
    delivery = world.delivery("cat", shares={"ann": unsigned})
    refuses(world, "cat", delivery, ShareRefused, found="other bytes than its sender signed")
    goes_on(world, "cat", world.delivery("cat", shares={"ann": anew}))


def test_an_offer_from_the_second_of_a_pair(without):
    """One seed for a pair: whoever stands second in the roster has no say in it."""
    world = world_at("shares")
    offer = world.shares["ann"].parcels[1].offer
    lie = world.lying_shares("cat", to("bob", offer=lambda p: offer))
    delivery = world.delivery("bob", shares={"cat": lie})
    refuses(
        world, "bob", delivery, ShareRefused, fault="cat", found="one", expected="first of the pair"
    )
    without(site, _pairwise_mask=lambda _, stage, *__: (stage.secrets.root, 1))
    goes_on(world, "bob", delivery)


@pytest.mark.parametrize(
    "field", ["envelope", "offer", "self_share_digest", "root_share_digest", "sender", "recipient"]
)
def test_a_parcel_altered_on_the_way(field, without):
    """The same alterations by the coordinator, which cannot sign the list anew: its own fault."""
    world = world_at("shares")
    delivery = world.delivery("cat")
    first = delivery.parcels[0]
    value = getattr(first, field)
    lie = replace(first, **{field: "dan" if isinstance(value, str) else flipped(value)})
    altered = replace(delivery, parcels=(lie, *delivery.parcels[1:]))
    found = "do not match the heads" if field == "sender" else "other bytes than its sender signed"
    refuses(world, "cat", altered, ShareRefused, found=found)
    if field == "sender":  # without the checks there is no head to take this parcel for
        return
    without(site, "_check_parcel")
    without(site, _open_parcel=lambda _, stage, p, __: replace(stage.own, of=p.sender))
    without(site, _pairwise_mask=lambda _, stage, *__: (stage.secrets.root, 1))
    goes_on(world, "cat", altered)


def test_a_list_of_parcels_that_its_site_did_not_sign(without):
    world = world_at("shares")
    lie = world.lying_shares("ann", to("cat", offer=lambda p: p.offer))
    forged = replace(lie, head=replace(lie.head, signature=bytes(64)))
    delivery = world.delivery("cat", shares={"ann": forged})
    refuses(world, "cat", delivery, SignatureRefused, fault="ann")
    without(checks, "check_signature")
    goes_on(world, "cat", delivery)


def test_a_lying_site_that_shares_with_fewer_than_all_who_joined(without):
    world = world_at("shares")
    head = world.shares["ann"].head
    short = world.signed("ann", head, parcels=head.parcels[:-1])
    delivery = world.delivery("cat", shares={"ann": replace(world.shares["ann"], head=short)})
    refuses(
        world, "cat", delivery, ShareRefused, fault="ann", found="parcels for 4 sites", expected="5"
    )
    without(site, "_check_parcel")
    goes_on(world, "cat", delivery)


def other_round(world):
    """The same sites in a later round."""
    later = World()
    later.identities, later.pins, later.members = world.identities, world.pins, world.members
    later.group, later.key_id = world.group, world.key_id
    later.stages = dict(World().stages)
    for name in later.roster:
        stage = later.stages[name]
        later.stages[name] = replace(stage, standing=replace(stage.standing, key_id=world.key_id))
    later.round_header = replace(world.round_header, round=2)
    return later.advance("shares")


def test_shares_for_the_wrong_round(without):
    world = world_at("shares")
    later = other_round(world)
    stale = world.delivery("cat")
    refuses(later, "cat", stale, HeaderRefused, expected="round 2")
    # Under this round's name: every head is still of the other round, and signed so.
    refuses(
        later, "cat", replace(stale, header=later.h), HeaderRefused, fault="ann", expected="round 2"
    )
    # With the list signed anew by a lying site the envelope still belongs to the other round.
    moved = later.signed("ann", world.shares["ann"].head, header=later.h)
    mixed = later.delivery("cat", shares={"ann": replace(world.shares["ann"], head=moved)})
    refuses(later, "cat", mixed, EnvelopeRefused, fault="ann")
    without(checks, "of_round")
    goes_on(world.copy(), "cat", replace(stale, header=later.h))


@pytest.mark.parametrize(
    ("names", "error", "found"),
    [
        (("ann", "bob", "cat"), ThresholdRefused, "3 sites"),
        (("ann", "bob", "cat", "dan", "dan"), ListRefused, "twice"),
        (("bob", "ann", "cat", "dan"), ListRefused, "another order"),
        (("ann", "bob", "dan", "eve"), ListRefused, "left out"),
    ],
)
def test_a_cohort_that_is_thinned_repeats_or_leaves_this_site_out(names, error, found, without):
    world = world_at("shares")
    delivery = world.delivery("cat", names)
    refuses(world, "cat", delivery, error, found=found)
    without(checks, "members")
    goes_on(world, "cat", delivery)


def test_a_site_that_did_not_join_has_no_shares(without):
    world = world_at("idle", n=6)
    world.advance("keys")
    five = world.bundle(world.roster[:5])
    for name in world.roster[:5]:
        world.shares[name] = world.receive(name, five)
    refuses(
        world, "ann", replace(world.delivery("ann"), heads=(
            *world.delivery("ann").heads,
            world.signed("fay", world.shares["eve"].head, site="fay"),
        )), ListRefused, found="'fay'",
    )  # fmt: skip
    goes_on(world, "ann", world.delivery("ann"))


def test_parcels_that_do_not_match_the_heads(without):
    world = world_at("shares")
    delivery = world.delivery("cat")
    refuses(
        world, "cat", replace(delivery, parcels=delivery.parcels[:-1]), ShareRefused,
        found="4 that do not match",
    )  # fmt: skip


def test_a_second_and_different_delivery():
    world = world_at("submit")
    assert world.step("cat", site.MessageFromCoordinator(world.delivery("cat"))) == ()
    refuses(world, "cat", world.delivery("cat", world.roster[:4]), Conflicting, found="other bytes")
    # Control: the site as it was before, without its journal, makes a second vector of this round.
    before = world_at("shares")
    goes_on(before, "cat", before.delivery("cat", before.roster[:4]))


def test_a_second_vector_under_one_rounds_seeds():
    """Attack 8: metrics sent separately, or a vector made again, under masks that are used already."""
    world = world_at("submit")
    from fedcore.errors import OutOfOrder

    refuses(
        world, "ann", site.VectorMade(b"d" * 32, 100), OutOfOrder,
        fault="this site", found="VectorMade",
    )  # fmt: skip
    assert site.Masking not in {type(stage) for stage in world.stages.values()}
    # Control: two vectors under the same masks differ by what the updates differ, in clear.
    import numpy as np

    from fedcore.secagg.crypto.masking import add_masks

    second = world.plain["ann"].copy()
    second[0] += np.uint64(7)
    add_masks(second, world.masks["ann"], world.bits)
    assert world.ring(second - world.masked["ann"])[0] == 7
    assert not world.ring(second - world.masked["ann"])[1:].any()


def test_seeds_of_two_purposes_of_one_training_round_are_unrelated():
    world = world_at("submit")
    seeds = {seed for masks in world.masks.values() for seed, _ in masks}
    assert len(seeds) == 5 + 5 * 4 // 2
    h, other = world.h, replace(world.round_header, purpose="metrics").digest
    root = pairwise.MaskRoot(bytes(32))
    assert pairwise.pair_secret(root, sender="a", recipient="b", header=h) != pairwise.pair_secret(
        root, sender="a", recipient="b", header=other
    )
    assert pairwise.self_mask_seed(bytes(32), site="a", header=h, state_tag=b"") != (
        pairwise.self_mask_seed(bytes(32), site="a", header=other, state_tag=b"")
    )


def test_a_restarted_site_never_makes_its_vector_a_second_time():
    """Attack 6."""
    world = world_at("shares")
    goes_on(world, "cat", world.delivery("cat"))
    found = world.step("cat", site.Restarted())
    assert not any(isinstance(effect, MakeVector) for effect in found)
    assert isinstance(world.stages["cat"], site.Idle)
    # Its vector sent: under masks it leaves, and says nothing else; under `encrypted` it says the same again.
    masked = world_at("submit")
    assert isinstance(masked.submits["cat"], Submit)
    assert answer_of(masked.step("cat", site.Restarted())) == Leave(masked.h, "cat", LEFT)
    assert isinstance(masked.stages["cat"], site.Idle)
    sealed = world_at("submit", protection="encrypted")
    again = sealed.step("cat", site.Restarted())
    assert not any(isinstance(effect, MakeVector) for effect in again)
    assert answer_of(again) == sealed.submits["cat"]


def test_a_low_order_point_at_the_pairwise_agreement_itself(without):
    """Were it ever past the bundle, the agreement refuses it too."""
    world = world_at("shares")
    stage = world.stages["cat"]
    weak = tuple(
        replace(k, mask=replace(k.mask, x25519=bytes(32))) if k.site == "dan" else k
        for k in stage.bundle
    )
    world.stages["cat"] = replace(stage, bundle=weak)
    refuses(world, "cat", world.delivery("cat"), KeyRefused, fault="dan", found="small order")
