"""PROTOCOL D: the journal is the truth, comes before what relies on it, and answers twice alike.

The control of each: the log of real rounds holds the very records, messages and secrets asked about.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.parties import (
    HUB,
    KEY_ID,
    SIZE,
    STATE,
    Parties,
    hashed,
    kind_of,
    leaves_when_restarted,
    net,
    secrets_in,
)

from fedcore.errors import Conflicting, HeaderRefused
from fedcore.secagg.protocol import effects, messages
from fedcore.secagg.protocol.absences import STAGES
from fedcore.secagg.protocol.messages import sign
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.wire_form import decode, encode

PROTECTIONS = ("masked", "encrypted", "encrypted-keystream")
WHO = ("s00", "s02", HUB)


def rounds(protection, *absences):
    """A few rounds one after the other, every message through the queue."""
    parties = Parties(4, protection=protection)
    for each in absences:
        if isinstance(parties.play(**each), coordinator.Released):
            parties.catch_up()
    return parties


@settings(max_examples=12)
@given(
    protection=st.sampled_from(PROTECTIONS),
    gone=st.lists(
        st.dictionaries(st.sampled_from(["s00", "s01", "s02"]), st.sampled_from(STAGES), max_size=2),
        max_size=2,
    ),
    refuser=st.sampled_from(["s01", "s03", ""]),
)  # fmt: skip
def test_every_prefix_of_a_journal_gives_the_live_stage(protection, gone, refuser):
    parties = rounds(protection, *gone)
    parties.refusers = {refuser}
    parties.play()
    for who, records in parties.journals.items():
        steps = [step for step in parties.log if step.who == who]
        stage, replayed = parties.first[who], 0
        machine = coordinator if who == HUB else site
        for step in steps:
            for entry in parties.records(who)[replayed : step.journalled]:
                stage = machine.evolve(stage, entry)
            replayed = step.journalled
            assert encode(stage) == encode(step.after)
        assert replayed == len(records)


def answers_again(parties, who, stage, to):
    """What a party that comes back from the disk in this stage sends to `to`."""
    if who == HUB:
        _, found = coordinator.step(parties.hub, stage, coordinator.SiteReconnected(to), 0.0)
    else:
        _, found = site.step(parties.members[who], stage, site.SessionRestored(), 0.0)
    return [encode(e.message) for e in found if isinstance(e, effects.Send)]


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_what_is_on_disk_before_a_message_leaves_says_it_again_byte_for_byte(protection):
    """For every Send of every step: the records before it alone lead to the identical message."""
    parties = rounds(protection, {}, {"s01": "submit"}, {"s02": "unmask"})
    parties.refusers = {"s00"}
    parties.play(s01="release")
    seen = set()
    for step in parties.log:
        count = step.journalled - sum(isinstance(e, effects.Persist) for e in step.effects)
        for effect in step.effects:
            if isinstance(effect, effects.Persist):
                count += 1
                continue
            stage = parties.replayed(step.who, count)
            seen.add(type(effect))
            match effect:
                case effects.Send(message=messages.Leave()):
                    assert isinstance(stage, site.Idle | site.Halted)
                case effects.Send(to=to, message=messages.Abandon(stage=name)):
                    if isinstance(stage, coordinator.Released):  # to who is not in the sum
                        assert to not in stage.certificate.survivors
                    else:
                        assert isinstance(stage, coordinator.Failed) and stage.stage == name
                case effects.Send(message=messages.Notice()):
                    pass  # for the logs of others: lost with the process, and nobody waits for it
                case effects.Send(to=to, message=message):
                    seen.add(type(message))
                    assert encode(message) in answers_again(parties, step.who, stage, to)
                case effects.Upload(submit=submit):
                    assert stage.submit == submit
                case effects.MakeVector(masks=masks):
                    assert isinstance(stage, site.Masking) and encode(stage.masks) == encode(masks)
                case effects.OpenSum(digest=digest):
                    assert stage.aggregate.digest == digest
                case effects.Apply(certificate=certificate):
                    assert stage.standing.certificate == certificate.hash
                case effects.Erase():
                    assert isinstance(stage, site.Idle | site.Halted)
                case effects.FoldUpload(submit=submit):
                    assert submit in stage.submissions
                case effects.RemoveMasks(masks=masks):
                    assert isinstance(stage, coordinator.Summing)
                    assert encode(stage.masks) == encode(masks)
    said = {*messages.SiteMessage.__args__, *messages.CoordinatorMessage.__args__}
    said -= {messages.NextKeys, messages.NextBundle}  # in memory only
    unmasked = {messages.Announce, messages.Aggregate, messages.Certificate, messages.Statement}
    unmasked |= {messages.Submit}
    expected = said if protection == "masked" else unmasked
    # A notice is for people's logs: lost with its connection, and nobody waits for it.
    assert seen >= expected - {messages.Leave, messages.Abandon, messages.Notice}
    assert seen >= {
        effects.MakeVector,
        effects.OpenSum,
        effects.Apply,
        effects.Erase,
        effects.FoldUpload,
    }


def last_words(parties, who):
    """(last message sent in this round, stage it was sent from)."""
    sent = [m for step in parties.log if step.who == who for m in step.sent]
    return encode(sent[-1]) if sent else b""


def interrupted(protection, who, steps):
    """A round with a dropout in which `who` dies after so many of its steps, then goes on."""
    parties = Parties(5, 3, protection=protection)
    parties.begin(s04="submit")

    def dies():
        return sum(step.who == who for step in parties.log) >= steps

    parties.pump(until=dies)
    while not dies() and not isinstance(parties.stages[HUB], coordinator.Released):
        parties.now = parties.stages[HUB].until
        parties.step(HUB, coordinator.Tick())
        parties.pump(until=dies)
    return parties


@pytest.mark.parametrize("protection", PROTECTIONS)
@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("steps", range(1, 31))
def test_a_restart_at_any_point_says_the_same_or_leaves(protection, who, steps):
    parties = interrupted(protection, who, steps)
    before, words, made = parties.stages[who], last_words(parties, who), who in parties.made
    if type(before) in {site.Idle, coordinator.Released}:
        return  # the round was shorter than that
    found, leaving = parties.crash(who), leaves_when_restarted(before)
    assert encode(parties.replayed(who)) == encode(parties.stages[who])
    sent = [encode(e.message) for e in found if isinstance(e, effects.Send)]
    if leaving:
        assert isinstance(parties.stages[who], site.Idle)
        assert sent == [encode(messages.Leave(before.header.digest, who, "left"))]
    elif who != HUB and not isinstance(before, site.Opening):
        assert sent == [words]
    elif who == HUB:
        earlier = {encode(m) for step in parties.log[:-1] if step.who == HUB for m in step.sent}
        assert set(sent) <= earlier
        waiting = isinstance(before, coordinator.Waiting) and coordinator.waiting_for(before)
        assert bool(sent) == bool(waiting)
    left_out = {who} if leaving and not parties.taken(who) else set()
    last = parties.finish()
    assert isinstance(last, coordinator.Released)
    present = [name for name in parties.sites if name != "s04"]
    assert last.certificate.survivors == tuple(n for n in present if n not in left_out)
    if made:
        begun = [e for s in parties.log for e in s.effects if isinstance(e, effects.MakeVector)]
        assert len(begun) == len(parties.made), "one vector a round, whoever restarts"
    left = net(parties.made[name] for name in last.certificate.survivors)
    assert left == net([parties.removed])
    assert sorted(parties.folded) == sorted(last.certificate.survivors)
    assert all(isinstance(parties.stages[name], site.Idle) for name in parties.sites)


def test_the_restarts_above_meet_every_stage():
    """The control for the range of steps: nothing is left out."""
    for protection in PROTECTIONS:
        met = {who: set() for who in WHO}
        for who in WHO:
            for steps in range(1, 31):
                met[who].add(type(interrupted(protection, who, steps).stages[who]))
        masked = protection == "masked"
        hub = {*coordinator.MOVES} - {coordinator.Ready, coordinator.Failed}
        expected = {*site.IN_ROUND, site.Idle}
        if not masked:
            expected = {site.Idle, site.Masking, site.Submitted, site.Opening, site.Stated}
            hub = {coordinator.Collecting, coordinator.Summing, coordinator.Releasing}
            hub.add(coordinator.Released)
        assert met["s00"] == expected and met[HUB] == hub


def stopped_before(kind, who="s00", **absences):
    """(parties, event): everything up to the first message of this type to `who`."""
    parties = Parties(4)
    parties.begin(**absences)

    def waits():
        return [e for e in parties.queue if e[1] == who and kind_of(e[2]) is kind]

    while not waits():
        _, to, event = parties.queue.popleft()
        parties.deliver(to, event)
    return parties, waits()[0][2]


def other_bundle(parties, event):
    """The same bundle without the last site: the coordinator thins it."""
    return site.MessageFromCoordinator(replace(event.message, keys=event.message.keys[:-1]))


def other_delivery(parties, event):
    found = event.message
    return site.MessageFromCoordinator(
        replace(found, heads=found.heads[:-1], parcels=found.parcels[:-1])
    )  # fmt: skip


def other_list(parties, event):
    return site.MessageFromCoordinator(
        replace(event.message, submissions=event.message.submissions[:-1])
    )


def other_confirms(parties, event):
    return site.MessageFromCoordinator(replace(event.message, confirms=event.message.confirms[:-1]))


def other_sum(parties, event):
    return site.MessageFromCoordinator(replace(event.message, digest=b"d" * 32))


def other_announce(parties, event):
    header = replace(event.announce.header, training_round=2)
    return site.Invited(messages.Announce(header), STATE)


def announced(kind):
    return site.Invited if kind is messages.Announce else kind


SECOND = {
    messages.Announce: (other_announce, messages.Keys),
    messages.KeyBundle: (other_bundle, messages.Shares),
    messages.Delivery: (other_delivery, None),
    messages.SurvivorList: (other_list, messages.Confirm),
    messages.Confirmations: (other_confirms, messages.Unmask),
    messages.Aggregate: (other_sum, messages.Statement),
}


@pytest.mark.parametrize("kind", SECOND, ids=lambda kind: kind.__name__)
def test_an_identical_request_has_the_identical_answer_and_another_is_refused(kind):
    """At every later stage of the round; the control: each of the two is a request a site answers."""
    other, answer_type = SECOND[kind]
    parties, event = stopped_before(announced(kind))
    fresh = parties.stages["s00"]
    second = other(parties, event)
    after, _ = site.step(parties.members["s00"], fresh, second, 0.0)
    assert type(after) is not type(fresh), "alone the other request is answered too"
    parties.finish()
    steps = [s for s in parties.log if s.who == "s00"]
    reached = next(k for k, s in enumerate(steps) if s.event is event)
    answers = {encode(m) for s in steps for m in s.sent if type(m) is answer_type}
    stages = [s.after for s in steps[reached:] if isinstance(s.after, site.IN_ROUND)]
    assert stages
    for stage in stages:
        before = encode(stage)
        same, found = site.step(parties.members["s00"], stage, event, 0.0)
        assert same is stage and {encode(e.message) for e in found} <= answers
        complete = kind is not messages.Aggregate or isinstance(stage, site.Stated)
        assert bool(found) == (complete and answer_type is not None)
        with pytest.raises(Conflicting, match=kind.__name__) as refused:
            site.step(parties.members["s00"], stage, second, 0.0)
        assert refused.value.fault == HUB and encode(stage) == before


def test_a_number_that_was_used_is_not_used_again_after_the_round():
    """Neither after a departure nor after a release: the stored answer is gone with the round."""
    for absences in ({}, {"s01": "keys", "s02": "keys"}):
        parties, event = stopped_before(site.Invited)
        parties.absences = absences
        parties.finish()
        stage = parties.stages["s00"]
        assert isinstance(stage, site.Idle)
        for again in (event, other_announce(parties, event)):
            with pytest.raises(HeaderRefused, match="round: found 1, expected more than 1"):
                site.step(parties.members["s00"], stage, again, 0.0)


def signed_otherwise(parties, event):
    """The same site's second, different, validly signed message; a resigned copy of the first."""
    identity = parties.members["s01"].identity
    message = getattr(event, "submit", None) or event.message
    match message:
        case messages.Keys():
            new = sign(replace(message, self_seed_hash=b"z" * 32), identity)
        case messages.Shares(head=head, parcels=parcels):
            new = replace(message, head=replace(head, signature=b"z" * 64), parcels=parcels)
        case messages.Submit():
            new = sign(replace(message, digest=b"z" * 32), identity)
            return coordinator.Uploaded("s01", new, new.digest, SIZE)
        case messages.Confirm():
            new = replace(message, signature=b"z" * 64)
        case messages.Unmask():
            new = replace(message, answers=message.answers[::-1])
        case messages.Statement():
            new = sign(replace(message, state_mac=b"z" * 32), identity)
    return coordinator.MessageFromSite("s01", new)


@pytest.mark.parametrize("stage", get_args(coordinator.Waiting), ids=lambda stage: stage.__name__)
def test_the_coordinator_takes_one_message_of_a_site_at_a_stage(stage):
    parties = Parties(4)
    parties.play()
    took = next(
        s for s in parties.log
        if type(s.before) is stage and type(s.after) is stage
        and getattr(s.event, "sender", "") == "s01"
    )  # fmt: skip
    before = encode(took.after)
    same, found = coordinator.step(parties.hub, took.after, took.event, 0.0)
    assert same is took.after and found == ()
    with pytest.raises(Conflicting) as refused:
        coordinator.step(parties.hub, took.after, signed_otherwise(parties, took.event), 0.0)
    assert refused.value.fault == "s01" and encode(took.after) == before


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_no_secret_is_in_a_message_and_none_of_their_bytes_either(protection):
    """Key shares leave in the one answer to unmask and nowhere else; the control: they do leave."""
    parties = rounds(protection, {}, {"s01": "submit"})
    sent = [m for step in parties.log for m in step.sent]
    assert sent and not any(secrets_in(message) for message in sent)
    data = [encode(message) for message in sent]
    asked = [m for m in sent if isinstance(m, messages.Unmask)]
    own, shares = set(), set()
    for who in parties.sites:
        for entry in parties.records(who):
            match entry:
                case site.Joined(secrets=secrets):
                    own.update(secrets_in(secrets))
                case site.DeliveryOpened(held=held, masks=masks):
                    shares.update(secrets_in(held))
                    own.update(secrets_in(masks))
    assert bool(own) == bool(shares) == (protection == "masked")
    assert not any(secret in each for secret in own for each in data)
    others = [encode(m) for m in sent if not isinstance(m, messages.Unmask)]
    assert not any(share in each for share in shares for each in others)
    revealed = [a.share for m in asked for a in m.answers]
    assert set(revealed) <= shares and len(revealed) == len(set(revealed))
    assert len(revealed) * 2 <= len(shares), "one of the two kinds for every site"


def test_shares_of_both_kinds_of_one_site_never_leave_a_site():
    parties = rounds("masked", {"s01": "submit"}, {"s01": "confirm"}, {"s02": "shares"})
    asked = [m for step in parties.log for m in step.sent if isinstance(m, messages.Unmask)]
    assert len({(m.header, m.site) for m in asked}) == len(asked) > 6
    kinds = {(m.header, a.of): set() for m in asked for a in m.answers}
    for m in asked:
        assert len({a.of for a in m.answers}) == len(m.answers)
        for a in m.answers:
            kinds[m.header, a.of].add(a.kind)
    assert all(len(found) == 1 for found in kinds.values())
    assert {kind for found in kinds.values() for kind in found} == {"self-seed", "mask root"}


def test_the_secrets_are_gone_from_the_stages_that_no_longer_need_them():
    """Mask root and self-seed after the masks are made, the masks after the vector, shares at last."""
    parties = Parties(3)
    parties.play()
    left = {type(s.after): len(secrets_in(s.after)) for s in parties.log if s.who == "s00"}
    masks, held = 3, 6  # two pairs and its own; two shares of each of three sites
    assert left == {
        site.Advertised: 3, site.Shared: 3 + 2, site.Masking: held + masks, site.Submitted: held,
        site.Confirmed: held, site.Answered: 0, site.Opening: 0, site.Stated: 0, site.Idle: 0,
    }  # fmt: skip


def test_a_journal_of_another_order_is_refused():
    parties = Parties(3)
    parties.play()
    for who, machine in ((HUB, coordinator), ("s00", site)):
        entries = parties.records(who)
        assert machine.replay(parties.first[who], entries)
        for wrong in (entries[1:], entries[::-1], entries[:1] * 2):
            with pytest.raises(machine.OutOfOrder, match="journal"):
                machine.replay(parties.first[who], wrong)


def test_a_new_key_epoch_is_journalled_and_only_grows():
    parties = Parties(3)
    parties.refusers = {"s01"}
    parties.play()
    assert isinstance(parties.stages["s01"], site.Halted)
    parties.step("s01", site.NewEpoch(2, hashed("new key")))
    assert isinstance(parties.stages["s01"], site.Idle)
    assert encode(parties.replayed("s01")) == encode(parties.stages["s01"])
    kind, data = parties.journals["s01"][-1]
    assert decode(data, kind) == site.EpochInstalled(2, hashed("new key"))
    for old in (1, 2):
        with pytest.raises(HeaderRefused):
            parties.step("s01", site.NewEpoch(old, KEY_ID))
