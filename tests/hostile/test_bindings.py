"""What each derived secret is bound to, attacked where something else has already given way (security.md s0).

A site whose generator repeats itself (a machine restored from a snapshot), or a check that is removed
here: the keys of a round must still be of this round, of these sites, in this direction. Control: the
same attack with that one value left out of the derivation.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from kit import World, answer_of, refuses, world_at

from fedcore.errors import EnvelopeRefused, KeyRefused, ShareRefused, TagRefused
from fedcore.secagg.crypto import hybrid, pairwise
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.crypto.sumtag import SumTag
from fedcore.secagg.protocol import checks, messages
from fedcore.secagg.protocol.messages import MASK_ROOT, SELF_SEED, Shares, SharesHead
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.round.site import releasing
from fedcore.secagg.protocol.wire_form import encode


class Snapshot(OsEntropy):
    """A machine restored from a snapshot: it draws in every round what it drew in the first.

    Encapsulation stays fresh, as the library's own generator is outside the snapshot.
    """

    def __init__(self, seed):
        self.seed, self.random = seed, Random(seed)

    def draw(self, length):
        return self.random.randbytes(length)

    def restored(self):
        return Snapshot(self.seed)


def snapshots(world):
    for place, name in enumerate(world.roster):
        world.members[name] = replace(world.members[name], entropy=Snapshot(place))
    return world


def second_round(world, stage):
    """The same sites, state and key epoch in the next round, with the generators restored."""
    later = world.copy()
    later.round_header = replace(world.round_header, round=2)
    for name in later.roster:
        member = later.members[name]
        later.members[name] = replace(member, entropy=member.entropy.restored())
        later.stages[name] = site.Idle(replace(world.stages[name].standing))
    later.tag = world.tag  # the abandoned round changed nothing: even the state tags are as before
    return later.advance(stage)


def without_header(without, *names):
    """Leave h out of these derivations at the sites."""
    for name in names:
        real = getattr(pairwise, name)

        def derive(*args, header, real=real, **rest):
            return real(*args, header=b"", **rest)

        without(pairwise, **{name: derive})


def one_offered_value(without):
    """What the offers carried is the same in both rounds: here only the pair's own derivation is asked."""
    without(pairwise, pair_secret=lambda *_, **__: b"r" * 32)
    without(pairwise, open_offer=lambda *_, **__: b"r" * 32)


def test_masks_of_two_rounds_of_one_snapshot_are_unrelated():
    """Two vectors under the same masks differ by what the updates differ, in clear."""
    first = snapshots(World()).advance("submit")
    later = second_round(first, "submit")
    assert later.stages["ann"].standing.round == 2
    assert later.keys["ann"].mask == first.keys["ann"].mask, "the generator did repeat itself"
    for name in first.roster:
        assert not {m[0] for m in first.masks[name]} & {m[0] for m in later.masks[name]}
        assert np.mean(later.masked[name] == first.masked[name]) < 0.1


@pytest.mark.parametrize("bound", [True, False])
def test_what_an_offer_carries_is_of_its_round(bound, without):
    made = []
    if not bound:
        without_header(without, "pair_secret")
    real = pairwise.pair_secret
    without(pairwise, pair_secret=lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    first = snapshots(World()).advance("submit")
    second_round(first, "submit")
    assert len(made) == 40 and len(set(made)) == (20 if bound else 10)


@pytest.mark.parametrize("derivation", ["pair_seed", "self_mask_seed"])
@pytest.mark.parametrize("bound", [True, False])
def test_each_derivation_binds_the_round_by_itself(derivation, bound, without):
    one_offered_value(without)
    if not bound:
        without_header(without, derivation)
    first = snapshots(World()).advance("submit")
    later = second_round(first, "submit")
    for name in first.roster:
        own = slice(1) if derivation == "self_mask_seed" else slice(1, None)
        repeated = {m[0] for m in first.masks[name][own]} & {m[0] for m in later.masks[name][own]}
        assert bool(repeated) is not bound
        rest = [m for m in later.masks[name] if m[0] not in repeated]
        assert bound or len(rest) == (4 if derivation == "self_mask_seed" else 1)


def test_with_no_round_in_any_of_them_the_vectors_of_a_snapshot_are_equal(without):
    """The control of the two above: nothing else stands between two rounds."""
    one_offered_value(without)
    without_header(without, "pair_seed", "self_mask_seed")
    first = snapshots(World()).advance("submit")
    later = second_round(first, "submit")
    assert later.masks == first.masks
    difference = later.ring(later.masked["ann"] - first.masked["ann"])
    tagged = first.layout.tagged_slots
    assert not difference[:tagged].any(), "the same update, and the coordinator sees that it is"


def old_parcels(first, later, liar, to, field):
    """The liar's shares of the later round with its earlier parcel's field, signed anew."""
    old = next(p for p in first.shares[liar].parcels if p.recipient == to)
    digests = {}
    if field == "envelope":  # the same shares: their digests are signed for this round
        digests = signed_digests(first, later, liar, to)
    return later.lying_shares(
        liar,
        lambda p: replace(p, **{field: getattr(old, field)}, **digests) if p.recipient == to else p,
    )


def signed_digests(first, later, liar, to):
    """The digests of the earlier round's plaintext shares, as this round asks for them."""
    held = next(h for h in opened_by(first, to) if h.of == liar)
    kinds = (SELF_SEED, held.self_share), (MASK_ROOT, held.root_share)
    names = ("self_share_digest", "root_share_digest")
    return {
        name: messages.share_digest(later.h, liar, to, kind, share.reveal())
        for name, (kind, share) in zip(names, kinds, strict=True)
    }


def opened_by(world, to):
    """What a site holds once it took the delivery of this round."""
    probe = world.copy()
    probe.step(to, site.MessageFromCoordinator(probe.delivery(to)))
    return probe.stages[to].held


@pytest.mark.parametrize("field", ["envelope", "offer"])
def test_an_envelope_or_offer_of_an_earlier_round_does_not_open(field, without):
    """A liar seals nothing anew: it sends what it sent before, under this round's good signature."""
    first = snapshots(World()).advance("shares")
    later = second_round(first, "shares")
    lie = old_parcels(first, later, "ann", "cat", field)
    delivery = later.delivery("cat", shares={"ann": lie})
    refuses(later.copy(), "cat", delivery, EnvelopeRefused, fault="ann", found="does not open")

    def no_round(header, sender, recipient):
        return encode(("fedcore/1 shares", sender, recipient))

    def no_round_key(
        shared_, mlkem, ciphertext, sender, recipient, header, real=pairwise._offer_key
    ):
        return real(shared_, mlkem, ciphertext, sender, recipient, b"")

    if field == "envelope":
        without(site, _context=no_round)
    else:
        without(pairwise, _offer_key=no_round_key)
    first = snapshots(World()).advance("shares")
    later = second_round(first, "shares")
    lie = old_parcels(first, later, "ann", "cat", field)
    later.step("cat", site.MessageFromCoordinator(later.delivery("cat", shares={"ann": lie})))
    assert isinstance(later.stages["cat"], site.Masking), "control: it opens, and is taken"


# --------------------------------------------------------------------------- whose envelope it is


def copied_keys(world):
    """ann says bob's channel key is hers: she cannot open with it, but can hand on bob's envelopes."""
    world.keys["ann"] = world.signed("ann", world.keys["ann"], channel=world.keys["bob"].channel)
    stage = world.stages["ann"]
    world.stages["ann"] = replace(stage, keys=world.keys["ann"])
    return world


def copied_envelopes(world):
    """ann's parcels with bob's envelopes in them. She knows no share, so she can sign no true digest."""
    bobs = {p.recipient: p for p in world.shares["bob"].parcels}
    return world.lying_shares("ann", lambda p: replace(p, envelope=bobs[p.recipient].envelope))


def without_distinct_keys(without):
    without(checks, "distinct")
    return copied_keys(World().advance("keys")).advance("shares", after="keys")


def test_anothers_envelopes_handed_on_as_ones_own(without):
    """The cohort would hold bob's shares under ann's name too. If ann then drops and bob survives, an
    honest answer to unmask has bob's self-seed share and, as ann's, his mask-root share: both."""
    world = copied_keys(World().advance("keys"))
    refuses(world, "cat", world.bundle(), KeyRefused, fault="bob", found="a key of 'ann' again")

    world = without_distinct_keys(without)
    delivery = world.delivery("cat", shares={"ann": copied_envelopes(world)})
    refuses(world.copy(), "cat", delivery, EnvelopeRefused, fault="ann", found="does not open")

    without(site, _context=lambda header, sender, recipient: recipient.encode())
    world = without_distinct_keys(without)
    delivery = world.delivery("cat", shares={"ann": copied_envelopes(world)})
    refuses(
        world.copy(), "cat", delivery, ShareRefused, fault="ann", found="differs from its signed"
    )

    # The control: with the digests unchecked as well, cat holds bob's shares twice.
    without(checks, share_digest=lambda *_: b"")
    without(site, digest=lambda *_: b"")
    unsigned = copied_envelopes(world)
    blank = tuple(
        replace(p, self_share_digest=b"", root_share_digest=b"") for p in unsigned.parcels
    )
    heads = {}
    for name, each in world.shares.items():
        parcels = tuple(
            replace(p, self_share_digest=b"", root_share_digest=b"") for p in each.parcels
        )
        parcels = blank if name == "ann" else parcels
        listed = tuple((p.recipient, b"") for p in parcels)
        heads[name] = Shares(world.signed(name, SharesHead(world.h, name, listed, b"")), parcels)
    world.step("cat", site.MessageFromCoordinator(world.delivery("cat", shares=heads)))
    held = {each.of: each for each in world.stages["cat"].held}
    assert held["ann"].root_share.reveal() == held["bob"].root_share.reveal()
    answers = {
        of: releasing._one_share(held[of], survived)
        for of, survived in (("ann", False), ("bob", True))
    }
    bobs = {held["bob"].self_share.reveal(), held["bob"].root_share.reveal()}
    assert {answers["ann"].share, answers["bob"].share} == bobs, "both kinds of bob's leave"


# ----------------------------------------------------------------------------- bad channel keys


class Counting(OsEntropy):
    """Counts what a site draws."""

    def __init__(self):
        self.draws = 0

    def draw(self, length):
        self.draws += 1
        return super().draw(length)

    def encapsulate(self, mlkem_public):
        self.draws += 1
        return super().encapsulate(mlkem_public)


@pytest.mark.parametrize("which", ["channel", "mask"])
def test_every_key_is_checked_before_a_secret_is_cut_into_shares(which, without):
    """The last in the roster has the bad key: the shares for the others would have been sealed by then."""
    world = world_at("keys")
    weak = replace(getattr(world.keys["eve"], which), x25519=bytes(32))
    bundle = world.bundle(keys={"eve": world.signed("eve", world.keys["eve"], **{which: weak})})
    entropy = Counting()
    world.members["ann"] = replace(world.members["ann"], entropy=entropy)
    refuses(world, "ann", bundle, KeyRefused, fault="eve", found="small order")
    assert entropy.draws == 0
    # Control: without the early check it is the agreement itself that refuses, with the secrets at work.
    without(hybrid.HybridPublic, "check")
    if which == "channel":
        refuses(world, "ann", bundle, KeyRefused, fault="eve", found="small order")
    else:
        assert isinstance(answer_of(world.step("ann", site.MessageFromCoordinator(bundle))), Shares)
    assert entropy.draws > 0


@pytest.mark.parametrize("which", ["channel", "mask"])
def test_a_bad_key_stops_at_the_coordinator_and_spoils_no_round(which, without):
    """Handed on, it would make every honest site leave; one site could end every round unnamed."""
    world = world_at("keys")
    weak = replace(getattr(world.keys["eve"], which), x25519=bytes(32))
    lie = world.signed("eve", world.keys["eve"], **{which: weak})
    hub = coordinator.CoordinatorParams(world.pins)
    stage, _ = coordinator.step(
        hub, coordinator.Ready(), coordinator.Start(world.round_header, 100), 0.0
    )
    event = coordinator.MessageFromSite("eve", lie)
    with pytest.raises(KeyRefused) as refused:
        coordinator.step(hub, stage, event, 0.0)
    assert refused.value.fault == "eve"
    without(hybrid.HybridPublic, "check")
    after, _ = coordinator.step(hub, stage, event, 0.0)
    assert after.keys == (lie,), "control"


# --------------------------------------------------------------------------------- the tag's pads


def test_with_one_pad_for_all_a_site_could_stand_in_for_another(without):
    """The control of "one site in another's place" in test_release.py: as many vectors as listed sites,
    but dan's twice and eve's not. Equal pads would not tell."""

    def check(world):
        total = world.plain_sum(("ann", "bob", "cat", "dan", "dan"))
        tag = SumTag(world.group, world.round_header, world.tag("ann"))
        tagged = world.layout.tagged_slots
        tag.check(total[:tagged], world.layout.read_tag(total), world.roster)

    with pytest.raises(TagRefused):
        check(world_at("unmask"))
    real, label = SumTag._derive, b"sum tag pad"

    def one_pad(tag, info, length):
        return real(tag, label if info.startswith(label) else info, length)

    without(SumTag, _derive=one_pad)
    check(World().advance("unmask"))
