"""Of one state at most one sum (PROTOCOL H), whatever a coordinator abandons, leaves out or restarts.

Measured at 45ef960: a coordinator that gave up every round after unmask, and left another site out of the
next one, read each site's update. The controls run that attack with the one check removed.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from kit import World, answer_of, refuses, world_at
from support.parties import HUB, Parties, leaves_when_restarted

from fedcore.errors import (
    Conflicting,
    HeaderRefused,
    KeyRefused,
    OldFolder,
    SecondSum,
    SignatureRefused,
    TagRefused,
)
from fedcore.secagg.protocol.messages import Abandon, Announce
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.round.site import releasing

LEAVING = {
    "the coordinator gives it up": lambda w: w.receive("ann", Abandon(w.h, "unmask")),
    "a check fails": lambda w: w.step("ann", site.CheckFailed(TagRefused("sum"))),
    "the word that ended it was lost": lambda w: w.step("ann", site.Superseded()),
}


def left_from(stage, how, protection="masked"):
    """A world in which ann answered, or began to open the sum, and then left the round."""
    world = world_at(stage, protection=protection)
    LEAVING[how](world)
    if isinstance(world.stages["ann"], site.Halted):
        world.step("ann", site.NewEpoch(2, b"k" * 32))
    restored = site.replay(world.stages["ann"], [])  # what the journal has between rounds
    world.stages["ann"], _ = site.step(world.members["ann"], restored, site.Restarted(), 0.0)
    return world


def next_round(world, **changes):
    epoch = world.stages["ann"].standing.epoch
    return replace(world.round_header, round=2, epoch=epoch, **changes)


@pytest.mark.parametrize("how", LEAVING)
@pytest.mark.parametrize(
    ("protection", "stage"),
    [("masked", "unmask"), ("masked", "open"), ("masked", "state"), ("encrypted", "open")],
)
@pytest.mark.parametrize(
    "other",
    [{}, {"training_round": 2}, {"purpose": "metrics"}, {"purpose": "statistics"}, {"roster": 4}],
    ids=str,
)
def test_whoever_helped_to_open_a_sum_joins_no_other_round_from_that_state(
    protection, stage, how, other, without
):
    world = left_from(stage, how, protection)
    assert world.stages["ann"].standing.exposed == world.h
    if "roster" in other:
        other = {"roster": world.roster[:4]}
    header = next_round(world, **other)
    refuses(world, "ann", world.invitation("ann", header), SecondSum, found="round 2")
    without(site, "_check_one_sum")
    world.step("ann", world.invitation("ann", header))
    assert isinstance(world.stages["ann"], site.IN_ROUND)


def second_round(world, cohort):
    """The same sites again, from the same state, in a round of some of them: (its world, who joined)."""
    other = World(len(world.roster))
    other.identities, other.pins, other.members = world.identities, world.pins, world.members
    other.group, other.key_id = world.group, world.key_id
    other.round_header = replace(world.round_header, round=2, roster=cohort)
    joined = []
    for name in cohort:
        other.stages[name] = world.stages[name]
        try:
            found = other.step(name, other.invitation(name))
        except SecondSum:
            continue
        other.keys[name] = answer_of(found)
        joined.append(name)
    return other, tuple(joined)


def opened(world, names):
    """The sum of these sites as a coordinator opens it from their answers."""
    masks = [(seed.reveal(), sign) for seed, sign in coordinator.rebuild_masks(world.unmasking())]
    return world.minus(names, masks)


def test_leaving_a_site_out_after_unmask_shows_its_update(without):
    """Point 2: the difference of two sums from one state is the update of the site that was left out."""
    world = world_at("unmask")
    four = world.roster[:4]
    first = opened(world, world.roster)
    for name in world.roster:
        world.receive(name, Abandon(world.h, "release"))
    _, joined = second_round(world, four)
    assert joined == (), "nothing follows a sum that may be known"

    without(site, "_check_one_sum")
    again, joined = second_round(world, four)
    assert joined == four
    again.advance("unmask", four, after="keys")
    second = opened(again, four)
    places = world.layout.spec.coordinates
    difference = world.layout.fields_of(world.ring(first - second))[:places]
    update = world.layout.fields_of(world.plain["eve"])[:places]
    assert np.array_equal(difference, update), "control: eve, alone"


def test_under_encrypted_a_step_gets_one_vector_though_no_sum_was_opened(without):
    """The coordinator has the ciphertext of the first, and whoever holds the key opens both."""
    world = world_at("submit", protection="encrypted")
    world.receive("ann", Abandon(world.h, "submit"))
    standing = world.stages["ann"].standing
    assert standing.submitted == (("update", 1),) and not standing.exposed
    again = world.invitation("ann", next_round(world))
    refuses(world, "ann", again, SecondSum, found="second sum for update of round 1")
    newer = world.copy()
    newer.step("ann", site.NewEpoch(2, b"k" * 32))
    under_it = newer.invitation("ann", next_round(newer))
    refuses(newer, "ann", under_it, SecondSum, found="second sum for update of round 1")
    later = world.copy()
    later.step("ann", world.invitation("ann", next_round(world, training_round=2)))
    assert isinstance(later.stages["ann"], site.Masking), "the next step has a vector of its own"
    without(site, "_check_one_sum")
    world.step("ann", again)
    assert isinstance(world.stages["ann"], site.Masking)


def test_under_masks_a_vector_whose_masks_were_never_removed_may_be_followed_by_another():
    world = world_at("confirm")
    world.receive("ann", Abandon(world.h, "confirm"))
    standing = world.stages["ann"].standing
    assert not standing.exposed and not standing.submitted
    world.step("ann", world.invitation("ann", next_round(world)))
    assert isinstance(world.stages["ann"], site.Advertised)


@pytest.mark.parametrize("stage", ["unmask", "open", "state"])
def test_an_exposed_round_is_not_ended_by_time_or_by_a_later_announcement(stage):
    world = world_at(stage)
    before = world.stages["ann"]
    assert world.step("ann", site.Tick(), 1e12) == ()
    later = site.Invited(Announce(next_round(world)), world.tag("ann"))
    refuses(world, "ann", later, Conflicting, found="other bytes")
    assert world.stages["ann"] is before


def test_only_a_release_ends_the_exposure():
    world = world_at("state")
    certificate = world.certificate()
    world.step("ann", site.MessageFromCoordinator(certificate))
    world.receive("bob", Abandon(world.h, "release"))
    assert world.stages["bob"].standing.exposed
    world.step("bob", site.CaughtUp(certificate, certificate.state_mac))
    for name in ("ann", "bob"):
        standing = world.stages[name].standing
        assert not standing.exposed and standing.certificate == certificate.hash
        header = next_round(world, training_round=2, certificate=certificate.hash)
        world.step(name, world.invitation(name, header))
        assert isinstance(world.stages[name], site.Advertised)


def test_the_exposure_is_on_disk_with_the_answer():
    world = world_at("confirm")
    found = world.step("ann", site.MessageFromCoordinator(world.confirmations()))
    restarted = site.replay(world_at("confirm").stages["ann"], [found[0].record])
    assert restarted.standing.exposed == world.h


# ------------------------------------------------------------------------------------ the coordinator


def test_one_lying_site_that_refuses_costs_a_key_epoch_and_not_the_job():
    parties = Parties(4)
    parties.refusers = {"s01"}
    last = parties.play()
    assert isinstance(last, coordinator.Released) and last.refused == ("s01",)
    assert [name for name, _ in last.certificate.signatures] == ["s00", "s02", "s03"]


@pytest.mark.parametrize("protection", ["masked", "encrypted"])
def test_a_release_that_too_few_can_sign_ends_without_another_round(protection):
    parties = Parties(4, protection=protection)
    parties.refusers = {"s01", "s02"}
    last = parties.play()
    assert isinstance(last, coordinator.Failed) and last.stage == "release"
    assert last.exposed == parties.sites and set(last.refused) == {"s01", "s02"}
    with pytest.raises(SecondSum):
        parties.begin()


def test_a_survivor_that_did_not_answer_may_sign_what_the_others_opened():
    """It holds the sites' secret: it checks the tag and the state like any other."""
    parties = Parties(4)
    parties.refusers = {"s03"}
    parties.begin()
    lost = []

    def absent(to, event):
        confirmations = type(getattr(event, "message", None)).__name__ == "Confirmations"
        if to == "s00" and confirmations and not lost:
            lost.append(event)
        return bool(lost) and to == "s00" and confirmations

    parties.absent = absent
    last = parties.finish()
    assert lost and isinstance(last, coordinator.Released)
    assert [name for name, _ in last.certificate.signatures] == ["s00", "s01", "s02"]
    assert parties.stages["s00"].standing.released == last.round


# -------------------------------------------------------------- a folder that is put back (PROTOCOL V)


def test_a_site_put_back_to_an_older_folder_opened_anothers_vector(monkeypatch):
    """Point 9: with one colluding site, which four sites tolerate. Two lists are signed, ann in one only."""
    names = ("ann", "bob", "cat", "dan")
    world = world_at("submit", n=4)
    snapshot = world.copy()  # bob's folder, taken here and put back after his first answer
    confirms, answers = {}, []
    for name in ("ann", "bob", "cat"):
        confirms[name] = world.receive(name, world.survivor_list(names))
    request = world.confirmations(names[:3], confirms=confirms)
    answers += [world.receive(name, request) for name in ("ann", "bob")]
    also = [("cat", snapshot.stages["cat"].held)]
    assert ("ann", "mask root") not in world.rebuilt(world.shares_held(answers, also))

    restarted, found = site.step(
        world.members["bob"], snapshot.stages["bob"], site.Restarted(), 0.0
    )
    assert isinstance(restarted, site.Idle), "a new process is in the round no longer"
    assert answer_of(found).code == "left"

    moves = site.MOVES[site.Submitted] | {site.Restarted: (releasing.resend, ())}
    monkeypatch.setitem(site.MOVES, site.Submitted, moves)
    stage, _ = site.step(world.members["bob"], snapshot.stages["bob"], site.Restarted(), 0.0)
    other = snapshot.copy()
    other.stages["bob"] = stage
    three = ("bob", "cat", "dan")
    second = {name: other.receive(name, other.survivor_list(three)) for name in three}
    request = other.confirmations(three, confirms=second)
    answers += [other.receive(name, request) for name in ("bob", "dan")]
    secrets = world.rebuilt(world.shares_held(answers, also))
    vector = world.open_sum_of(("ann",), secrets, known=[m[0] for m in world.masks["cat"]])
    assert np.array_equal(vector, world.plain["ann"]), "control: ann's vector, alone"


@pytest.mark.parametrize("protection", ["masked", "encrypted"])
def test_a_folder_put_back_at_any_commit_of_a_round_says_nothing_new(protection):
    """Every prefix of the journal of a whole round, restored after the site had gone on."""
    parties = Parties(4, protection=protection)
    parties.play()
    name, said = "s01", {}
    for step in parties.log:
        for message in step.sent if step.who == name else ():
            said[type(message).__name__] = message
    met = set()
    for count in range(len(parties.journals[name]) + 1):
        stage = parties.replayed(name, count)
        after, found = site.step(parties.members[name], stage, site.Restarted(), 0.0)
        words = [e.message for e in found if hasattr(e, "message")]
        met.add(type(stage))
        if leaves_when_restarted(stage):
            assert isinstance(after, site.Idle) and [w.code for w in words] == ["left"]
        else:
            assert words == [said[type(word).__name__] for word in words]
    assert {site.Idle, site.Masking, site.Submitted, site.Opening, site.Stated} <= met
    assert HUB not in met


def own(certificate, name):
    signature = dict(certificate.signatures)[name]
    return site.OwnSignature(certificate.statement(name, signature), certificate.header)


def test_its_own_signature_under_a_later_round_shows_a_site_that_its_folder_is_old():
    """It sits out until it has a state that is not older; what it knows or what is forged shows nothing."""
    world = world_at("state")
    certificate = world.certificate()
    old = world_at("idle").stages["ann"]  # as the folder was before round 1
    world.stages["ann"] = old
    free = world.copy()
    free.step("ann", world.invitation("ann", replace(world.round_header, round=2)))
    assert isinstance(free.stages["ann"], site.Advertised), "control: from there it would go on"

    forged = own(certificate, "ann")
    forged = replace(forged, said=replace(forged.said, signature=b"x" * 64))
    refuses(world, "ann", forged, SignatureRefused, fault="ann")
    found = world.step("ann", own(certificate, "ann"))
    assert any("put back to an earlier time" in getattr(e, "text", "") for e in found)
    assert world.stages["ann"].standing.proved == 1
    again = site.replay(old, [found[0].record])
    assert again == world.stages["ann"], "on disk"
    assert world.step("ann", own(certificate, "ann")) == (), "said once"
    later = world.invitation("ann", replace(world.round_header, round=2))
    refuses(world, "ann", later, OldFolder, found="round 2")
    world.step("ann", site.CaughtUp(certificate, certificate.state_mac))
    assert world.stages["ann"].standing.proved == 0
    header = next_round(world, training_round=2, certificate=certificate.hash)
    world.step("ann", world.invitation("ann", header))
    assert isinstance(world.stages["ann"], site.Advertised)


def test_a_state_older_than_its_own_signature_does_not_end_the_wait_of_an_old_folder():
    """It signed in round 5: the state of round 1 may be the one that it already gave a sum of."""
    world = world_at("state")
    certificate = world.certificate()
    standing = replace(world_at("idle").stages["ann"].standing, proved=5, round=5)
    world.stages["ann"] = site.Idle(standing)
    world.step("ann", site.CaughtUp(certificate, certificate.state_mac))
    assert world.stages["ann"].standing.proved == 5
    changes = {"round": 6, "training_round": 2, "certificate": certificate.hash}
    again = world.invitation("ann", replace(world.round_header, **changes))
    refuses(world, "ann", again, OldFolder, expected="round 5 or of a later one")


def test_keys_of_an_earlier_round_do_not_show_an_old_folder():
    """Else a coordinator could replay them in a later bundle, and the site would sit out."""
    world = world_at("keys")
    replayed = site.OwnSignature(
        world.keys["ann"], replace(world.round_header, round=2), other=True
    )
    world.receive("ann", Abandon(world.h, "keys"))
    refuses(world, "ann", replayed, HeaderRefused, found="another round")


def test_a_round_that_a_site_knows_shows_nothing():
    world = world_at("state")
    certificate = world.certificate()
    world.receive("ann", Abandon(world.h, "release"))
    assert world.step("ann", own(certificate, "ann")) == ()


def test_other_keys_of_its_own_in_a_bundle_show_an_old_folder():
    """The coordinator begins the same round again with a site that was put back before it."""
    world = world_at("keys")
    first = world.keys["ann"]
    world.stages["ann"] = world_at("idle").stages["ann"]
    world.step("ann", world.invitation("ann"))
    refuses(world, "ann", world.bundle(keys={"ann": first}), KeyRefused, found="other keys")
    world.step("ann", site.CheckFailed(KeyRefused("keys", found="", expected="", fault="ann")))
    found = world.step("ann", site.OwnSignature(first, world.round_header, other=True))
    assert found and world.stages["ann"].standing.proved == 1
