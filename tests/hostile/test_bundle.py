"""Key bundles that a site must not share under: swapped, copied, malformed or missing keys (PROTOCOL C, P).

The coordinator carries the keys, so it can put its own in their place: without the signatures it would
read every key share and every pair seed.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from kit import World, refuses, world_at

from fedcore.errors import (
    Conflicting,
    HeaderRefused,
    KeyRefused,
    ListRefused,
    RosterRefused,
    SignatureRefused,
    StateDiffers,
    ThresholdRefused,
)
from fedcore.secagg.crypto import hybrid, shamir
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.crypto.hybrid import HybridKey, open_envelope
from fedcore.secagg.crypto.pairwise import MaskRoot, open_offer
from fedcore.secagg.protocol import checks
from fedcore.secagg.protocol.effects import Send
from fedcore.secagg.protocol.messages import Shares
from fedcore.secagg.protocol.round import site
from fedcore.secagg.protocol.round.site import sharing


def shares_go_out(world, name, bundle):
    """The control: the site shares its secrets under this bundle."""
    shares = world.receive(name, bundle)
    assert isinstance(shares, Shares)
    return shares


def test_a_swapped_channel_key(without):
    world, mine = world_at("keys"), HybridKey.draw(OsEntropy())
    swapped = replace(world.keys["bob"], channel=mine.public)
    bundle = world.bundle(keys={"bob": swapped})
    stage = world.stages["ann"]
    refuses(world, "ann", bundle, SignatureRefused, fault="bob", found="does not verify")

    without(checks, "check_signature")
    shares = shares_go_out(world, "ann", bundle)
    parcel = next(p for p in shares.parcels if p.recipient == "bob")
    plain = open_envelope(
        mine, world.keys["ann"].channel, parcel.envelope,
        context=sharing._context(world.round_header, "ann", "bob"), sender="ann",
    )  # fmt: skip
    held = world.stages["ann"].own
    assert len(plain) == 2 * shamir.SHARE_BYTES, "the coordinator reads both of bob's shares"
    assert plain[: shamir.SHARE_BYTES] != held.self_share.reveal()
    # With such a swap for t sites it has ann's mask root and self-seed.
    for name in ("cat", "dan", "eve"):
        swapped_too = world.bundle(keys={"bob": swapped, **_same_key(world, mine, name)})
        assert swapped_too.keys != bundle.keys
    assert stage.secrets.root.reveal() != plain


def _same_key(world, key, name):
    return {name: replace(world.keys[name], channel=key.public)}


def test_keys_swapped_for_every_other_site_give_the_coordinator_root_and_self_seed(without):
    world = world_at("keys")
    own = {name: HybridKey.draw(OsEntropy()) for name in world.roster[1:]}
    lies = {name: replace(world.keys[name], channel=k.public) for name, k in own.items()}
    bundle, secrets = world.bundle(keys=lies), world.stages["ann"].secrets
    refuses(world, "ann", bundle, SignatureRefused, fault="bob")

    without(checks, "check_signature")
    read = {}
    for parcel in shares_go_out(world, "ann", bundle).parcels[1:]:
        to = parcel.recipient
        read[world.roster.index(to) + 1] = open_envelope(
            own[to], world.keys["ann"].channel, parcel.envelope,
            context=sharing._context(world.round_header, "ann", to), sender="ann",
        )  # fmt: skip
    halves = [
        {x: plain[part] for x, plain in read.items()}
        for part in (slice(shamir.SHARE_BYTES), slice(shamir.SHARE_BYTES, None))
    ]
    rebuilt = [shamir.combine(half, world.t, owner="ann") for half in halves]
    assert rebuilt == [secrets.self_seed.reveal(), secrets.root.reveal()]


def test_a_swapped_mask_key(without):
    world, root = world_at("keys"), MaskRoot(bytes(range(32)))
    bundle = world.bundle(keys={"bob": replace(world.keys["bob"], mask=root.keys.public)})
    refuses(world, "ann", bundle, SignatureRefused, fault="bob", found="does not verify")
    without(checks, "check_signature")
    parcel = next(p for p in shares_go_out(world, "ann", bundle).parcels if p.recipient == "bob")
    offered = open_offer(root, parcel.offer, sender="ann", recipient="bob", header=world.h)
    assert len(offered) == 32, "the coordinator agrees on ann's mask in bob's place"


@pytest.mark.parametrize(
    "field", ["self_seed_hash", "state_tag", "key_id", "header", "signature", "site"]
)
def test_every_other_field_of_keys_is_signed(field, without):
    world = world_at("keys")
    keys = world.keys["bob"]
    lie = {"site": "cat", "signature": bytes(64), "header": World().h}.get(field, bytes(32))
    bundle = replace(world.bundle(), keys=tuple(
        replace(each, **{field: lie}) if each is keys else each
        for each in world.bundle().keys if field != "site" or each.site != "cat"
    ))  # fmt: skip
    error, fault = SignatureRefused, "cat" if field == "site" else "bob"
    if field == "header":
        error = HeaderRefused
    refuses(world, "ann", bundle, error, fault=fault)
    for module, name in (
        (checks, "check_signature"),
        (checks, "of_round"),
        (checks, "same_state"),
    ):
        without(module, name)
    shares_go_out(world, "ann", bundle)


@pytest.mark.parametrize("field", ["channel", "mask", "self_seed_hash"])
def test_a_lying_site_that_copies_anothers_keys(field, without):
    """Signed by the liar itself: only the comparison within the bundle finds it."""
    world = world_at("keys")
    stolen = world.signed("cat", world.keys["cat"], **{field: getattr(world.keys["bob"], field)})
    bundle = world.bundle(keys={"cat": stolen})
    refuses(world, "ann", bundle, KeyRefused, fault="cat", found="a key of 'bob' again")
    without(checks, "distinct")
    shares_go_out(world, "ann", bundle)


def test_one_key_of_a_site_for_channel_and_mask(without):
    """A mask key may be rebuilt by the coordinator; a channel key must not be (PROTOCOL P)."""
    world = world_at("keys")
    twice = world.signed("bob", world.keys["bob"], channel=world.keys["bob"].mask)
    bundle = world.bundle(keys={"bob": twice})
    refuses(world, "ann", bundle, KeyRefused, fault="bob", found="a key of 'bob' again")
    without(checks, "distinct")
    shares_go_out(world, "ann", bundle)


SMALL_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    ((1 << 255) - 20).to_bytes(32, "little"),
]


@pytest.mark.parametrize("which", ["channel", "mask"])
@pytest.mark.parametrize("point", SMALL_ORDER, ids=["0", "1", "order 8", "-1"])
def test_a_point_of_low_order(which, point, without):
    world = world_at("keys")
    weak = replace(getattr(world.keys["cat"], which), x25519=point)
    bundle = world.bundle(keys={"cat": world.signed("cat", world.keys["cat"], **{which: weak})})
    refuses(world, "ann", bundle, KeyRefused, fault="cat", found="small order")
    # Control: plain RFC 7748 agrees on zero with such a point, and the site would go on.
    without(hybrid, _exchange=lambda mine, theirs, owner: bytes(32))
    shares_go_out(world, "ann", bundle)


@pytest.mark.parametrize("which", ["channel", "mask"])
@pytest.mark.parametrize("kind", ["not reduced", "short", "empty"])
def test_a_malformed_mlkem_key(which, kind, monkeypatch, without):
    world = world_at("keys")
    good = getattr(world.keys["cat"], which)
    bad = {"not reduced": b"\xff" * 1184, "short": good.mlkem[:-1], "empty": b""}[kind]
    lie = world.signed("cat", world.keys["cat"], **{which: replace(good, mlkem=bad)})
    bundle = world.bundle(keys={"cat": lie})
    found = "not reduced" if kind == "not reduced" else f"{len(bad)} bytes"
    refuses(world, "ann", bundle, KeyRefused, fault="cat", found=found)
    # Control: nothing else stands in the way of such a key.
    without(hybrid, "_mlkem_key")
    without(OsEntropy, encapsulate=lambda *_: (bytes(32), bytes(1088)))
    shares_go_out(world, "ann", bundle)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_self_seed_hash_of_another_length(length, without):
    world = world_at("keys")
    lie = world.signed("cat", world.keys["cat"], self_seed_hash=b"x" * length)
    bundle = world.bundle(keys={"cat": lie})
    refuses(world, "ann", bundle, KeyRefused, fault="cat", found=str(length), expected="32")
    without(checks, "keys")
    shares_go_out(world, "ann", bundle)


def test_other_keys_in_this_sites_own_name(without):
    """Even signed by itself: a site that ran twice, or whose identity key leaked, is not outvoted."""
    world = world_at("keys")
    lie = world.signed("ann", world.keys["ann"], self_seed_hash=b"x" * 32)
    bundle = world.bundle(keys={"ann": lie})
    refuses(world, "ann", bundle, KeyRefused, found="other keys for this site")
    without(site, "_check_bundle")
    shares_go_out(world, "ann", bundle)


def test_a_thinned_key_bundle(without):
    """With fewer than t sites in the bundle an update hides behind almost nobody."""
    world = world_at("keys")
    bundle = world.bundle(["ann", "bob", "cat"])
    refuses(world, "ann", bundle, ThresholdRefused, found="3 sites", expected="at least 4")
    without(checks, "members")
    assert len(shares_go_out(world, "ann", bundle).parcels) == 3
    shares_go_out(world_at("keys"), "bob", world.bundle(["ann", "bob", "cat", "dan"]))


@pytest.mark.parametrize("problem", ["unknown", "twice", "order", "without me"])
def test_a_bundle_of_the_wrong_sites(problem, without):
    world = world_at("keys", n=6)
    stranger = World(7)
    stranger.advance("keys", ["gus"])
    keys = dict(world.keys)
    items = {
        "unknown": (*keys.values(), replace(stranger.keys["gus"], header=world.h)),
        "twice": (*keys.values(), keys["bob"]),
        "order": tuple(reversed(keys.values())),
        "without me": tuple(k for k in keys.values() if k.site != "ann"),
    }
    found = {
        "unknown": "'gus'",
        "twice": "twice",
        "order": "another order",
        "without me": "left out",
    }
    bundle = replace(world.bundle(), keys=items[problem])
    refuses(world, "ann", bundle, ListRefused, found=found[problem])
    if problem in {"order", "without me"}:
        without(checks, "members")
        if problem == "order":
            shares_go_out(world, "ann", bundle)
        else:
            world.step("ann", site.MessageFromCoordinator(bundle))
            assert isinstance(world.stages["ann"], site.Shared)


def test_keys_of_a_site_that_is_pinned_but_not_of_this_cohort():
    world = World(6)
    header = replace(world.round_header, roster=world.roster[:5])
    world.round_header = header
    world.advance("keys", world.roster[:5])
    eve = world.signed("fay", world.keys["eve"], site="fay")
    with pytest.raises(RosterRefused) as refused:
        checks.keys(eve, header, world.pins)
    assert refused.value.found == "of 'fay'"
    bundle = world.bundle((*world.roster[:5], "fay"), {"fay": eve})
    refuses(world, "ann", bundle, ListRefused, found="'fay'")


def test_keys_of_an_earlier_round(without):
    """The signature is good; it speaks for another round."""
    world = world_at("keys")
    old = World()
    old.identities, old.pins, old.members = world.identities, world.pins, world.members
    old.round_header = replace(world.round_header, round=2)
    old.group = world.group
    old.advance("keys", ["bob"])
    bundle = world.bundle(keys={"bob": old.keys["bob"]})
    refuses(world, "ann", bundle, HeaderRefused, fault="bob", expected="round 1")
    refuses(world, "ann", replace(world.bundle(), header=old.h), HeaderRefused, expected="round 1")
    without(checks, "of_round")
    without(checks, "same_state")
    shares_go_out(world, "ann", bundle)


def test_a_site_under_another_key_id(without):
    world = world_at("keys")
    lie = world.signed("dan", world.keys["dan"], key_id=b"k" * 32)
    bundle = world.bundle(keys={"dan": lie})
    refuses(world, "ann", bundle, StateDiffers, fault="dan", found="another one at 'dan'")
    without(checks, "same_state")
    shares_go_out(world, "ann", bundle)


def test_a_second_and_different_key_bundle(monkeypatch, without):
    """U1 is asked for once: the shares of another bundle would be a second set of the same secrets."""
    world = world_at("shares")
    first = world.step("ann", site.MessageFromCoordinator(world.bundle()))
    assert first == (Send("coordinator", world.shares["ann"]),), "the same request, the same bytes"
    other = world.bundle(["ann", "bob", "cat", "dan"])
    refuses(world, "ann", other, Conflicting, found="other bytes")
    without(site, "answered")
    monkeypatch.setitem(
        site.MOVES[site.Shared], type(other), (sharing.share_secrets, (site.Shared,))
    )
    without(
        site, evolve=lambda stage, entry: replace(stage, bundle=entry.bundle, shares=entry.shares)
    )
    world.stages["ann"] = replace(world.stages["ann"])
    object.__setattr__(world.stages["ann"], "keys", world.keys["ann"])
    object.__setattr__(world.stages["ann"], "sealed", None)
    assert shares_go_out(world, "ann", other) != world.shares["ann"]
