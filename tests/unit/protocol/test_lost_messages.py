"""What is lost on the way keeps nobody waiting: messages, ends of rounds, and sites that cannot join."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.parties import HUB, KEY_ID, PAYLOAD, Epochs, Parties, granted_by, with_late_joiner

from fedcore.errors import Conflicting, HeaderRefused, OutOfOrder, ThresholdRefused
from fedcore.secagg.crypto.sumtag import key_id
from fedcore.secagg.protocol import effects, epoch, messages
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.round.site import SiteProgress


def lose(parties, name, kind):
    """From the first message of this type on, nothing reaches this site."""
    lost = []
    heard = parties.absent

    def absent(to, event):
        if to == name and (lost or isinstance(getattr(event, "message", None), kind)):
            lost.append(event)
        return bool(lost and to == name) or heard(to, event)

    parties.absent = absent


def end(parties):
    """Let the coordinator's deadlines pass; the sites' clocks stand still."""
    parties.pump()
    while not isinstance(parties.stages[HUB], coordinator.Released | coordinator.Failed):
        parties.now = parties.stages[HUB].until
        parties.step(HUB, coordinator.Tick())
        parties.pump()


@pytest.mark.parametrize(
    ("kind", "stage", "released"),
    [
        (messages.KeyBundle, "shares", False),
        (messages.KeyBundle, "shares", True),
        (messages.SurvivorList, "confirm", False),
        (messages.SurvivorList, "confirm", True),
        (messages.Confirmations, "unmask", True),
    ],
)
def test_a_later_announcement_ends_a_round_whose_end_was_lost(kind, stage, released):
    """The site is still in the old round; it leaves it, and takes part in the next one if it can."""
    parties = Parties(4)
    lose(parties, "s01", (kind, messages.Abandon))
    parties.begin(**({} if released else {"s00": stage, "s02": stage}))
    end(parties)
    assert isinstance(parties.stages["s01"], site.IN_ROUND)
    ended = coordinator.Released if released else coordinator.Failed
    assert isinstance(parties.stages[HUB], ended)
    del parties.absent
    for name in ("s00", "s02", "s03"):
        if isinstance(parties.stages[name], site.IN_ROUND):
            parties.step(name, site.Superseded())
    parties.queue.clear()
    before = parties.now
    parties.begin()
    announce = next(event for _, to, event in parties.queue if to == "s01")
    with pytest.raises(Conflicting):  # so a shell must not offer it as it is
        site.step(parties.members["s01"], parties.stages["s01"], announce, 0.0)
    found = parties.step("s01", site.Superseded())
    assert isinstance(parties.stages["s01"], site.Idle)
    assert any(isinstance(effect, effects.Erase) for effect in found)
    assert not any(isinstance(effect, effects.Send) for effect in found)
    parties.pump()
    survivors = parties.stages[HUB].certificate.survivors
    assert survivors == (("s00", "s02", "s03") if released else parties.sites)
    assert parties.now == before, "nobody waited for anybody"
    declined = [type(error) for to, _, error in parties.refusals if to == "s01"]
    assert declined == ([HeaderRefused] if released else [])


def test_nobody_waits_for_a_site_that_declines_an_invitation():
    parties = Parties(4)
    parties.stages["s02"] = site.Idle(SiteProgress(7, KEY_ID))
    last = parties.play()
    assert last.certificate.survivors == ("s00", "s01", "s03") and parties.now == 0.0
    assert [type(error).__name__ for _, _, error in parties.refusals] == ["StaleEpoch"]


def test_a_stage_that_begins_with_too_few_sites_ends_at_once():
    """Sites that leave after they sent their part count as gone in the next stage already."""
    parties = Parties(4)
    parties.begin()
    for _ in parties.sites:
        _, name, event = parties.queue.popleft()
        parties.deliver(name, event)
    keys = [event for _, _, event in parties.queue]
    for event in keys[:3]:
        parties.step(HUB, event)
    for name in ("s00", "s01"):
        parties.step(HUB, coordinator.Gone(name))
    parties.step(HUB, keys[3])
    last = parties.stages[HUB]
    assert isinstance(last, coordinator.Failed) and (last.stage, last.left) == ("shares", 2)


@pytest.mark.parametrize("protection", ["masked", "encrypted"])
def test_nobody_is_waited_for_while_the_masks_come_off(protection):
    parties = Parties(3, protection=protection)
    parties.play()
    summing = [s.after for s in parties.log if isinstance(s.after, coordinator.Summing)]
    assert summing and coordinator.members_of(summing[0]) == parties.sites
    assert coordinator.waiting_for(summing[0]) == ()


@pytest.mark.parametrize("part", ["state_tag", "key_id"])
def test_a_vector_with_another_start_than_its_sites_keys_is_refused(part):
    """A lying site cannot have the others refuse the survivor list: the coordinator leaves it out."""
    parties = Parties(4)

    def lie(message):
        if isinstance(message, messages.Submit) and message.site == "s02":
            return messages.sign(
                replace(message, **{part: b"x" * 32}), parties.members["s02"].identity
            )
        return message

    parties.wire = lie
    last = parties.play()
    assert last.certificate.survivors == ("s00", "s01", "s03")
    assert [type(error).__name__ for _, _, error in parties.refusals] == ["VectorRefused"]


@pytest.mark.parametrize("stage", ["", "confirm"])
def test_a_crash_between_the_end_of_a_round_and_the_word_of_it_keeps_nobody_waiting(stage):
    """The coordinator journalled the certificate, or that it gives up, and dies before it says so."""
    parties = Parties(4)
    silent = {"s00": stage, "s01": stage} if stage else {}
    deaf = ("s02", "s03")
    for name in deaf:
        lose(parties, name, messages.Abandon if stage else messages.Certificate)
    parties.begin(**silent)
    end(parties)
    assert all(isinstance(parties.stages[name], site.IN_ROUND) for name in deaf)
    del parties.absent
    parties.crash(HUB)
    parties.pump()
    assert all(isinstance(parties.stages[name], site.Idle) for name in deaf)


def test_a_refused_release_tells_the_other_sites_why_and_the_coordinator_nothing():
    parties = Parties(4)
    parties.refusers = {"s01"}
    parties.play()
    notices = [
        (s.who, e.notice) for s in parties.log for e in s.effects
        if isinstance(e, effects.ShowNotice)
    ]  # fmt: skip
    assert {who for who, _ in notices} == {"s00", "s02", "s03"}
    assert {(notice.site, notice.sealed) for _, notice in notices} == {("s01", b"sealed cause")}


def test_a_departure_for_any_other_reason_carries_nothing():
    parties = Parties(4)
    parties.begin()
    parties.pump(until=lambda: isinstance(parties.stages["s01"], site.Shared))
    found = parties.step("s01", site.CheckFailed(RuntimeError("an operator says no"), b"why"))
    told = [effect.message for effect in found if isinstance(effect, effects.Send)]
    assert [(leave.code, leave.sealed) for leave in told] == [("left", b"")]


# ------------------------------------------------------------------------------------- key epochs


def connect_anew(epochs):
    """Every connection is new: both ends say again what may not have arrived."""
    for name in epochs.sites:
        epochs.step(HUB, coordinator.SiteReconnected(name))
        epochs.step(name, epoch.Again())
    epochs.pump()


def messages_of_an_epoch():
    epochs = Epochs()
    epochs.begin().pump()
    return len(epochs.log)


@pytest.mark.parametrize("place", range(messages_of_an_epoch()))
def test_any_message_of_a_key_epoch_may_be_lost(place):
    """One message, by its place in the exchange, never arrives; new connections make up for it."""
    epochs = Epochs()
    epochs.begin()
    for count in range(place + 1):
        sender, to, message = epochs.queue.popleft()
        if count < place:
            event = epoch.FromSite(sender, message) if to == HUB else epoch.FromCoordinator(message)
            epochs.step(to, event)
    epochs.pump()
    for _ in range(2):
        connect_anew(epochs)
    assert isinstance(epochs.stages[HUB], epoch.Spreading)
    assert epochs.stages[HUB].holders == epochs.sites
    assert {len(found) for found in epochs.installed.values()} == {1}
    assert {key.key_id for key in epochs.stages[HUB].held} == {key_id(PAYLOAD.reveal())}
    epochs.log.clear()
    connect_anew(epochs)
    assert {type(message) for message in epochs.log} == {epoch.KeyHeld}, "and then there is peace"


def test_a_maker_that_dies_while_it_makes_makes_again():
    """Nothing of the first payload has left it: it is persisted before a grant is sent."""
    epochs = Epochs()
    epochs.begin()
    request = epochs.until(epoch.EpochKeys, "s00")
    making, found = epoch.step_site(
        epochs.members["s00"], epochs.stages["s00"], epoch.FromCoordinator(request)
    )
    assert [type(e) for e in found] == [effects.Persist, epoch.MakeSecrets]
    for event in (epoch.Again(), epoch.FromCoordinator(request)):
        same, found = epoch.step_site(epochs.members["s00"], making, event)
        assert same is making and [type(e) for e in found] == [epoch.MakeSecrets]
    other = replace(request, keys=request.keys[:3])
    with pytest.raises(OutOfOrder):
        epoch.step_site(epochs.members["s00"], making, epoch.FromCoordinator(other))


def test_a_late_joiner_whose_request_or_grant_was_lost_is_served_at_its_next_connection():
    epochs = with_late_joiner()
    epochs.pump(lambda to, message: isinstance(message, epoch.GrantRequest))
    epochs.queue.clear()
    epochs.step(HUB, coordinator.SiteReconnected("s03"))
    assert isinstance(epochs.queue[0][2], epoch.GrantRequest)
    epochs.pump()
    assert epochs.stages[HUB].holders == epochs.sites


def test_a_late_joiner_that_the_maker_serves_asks_for_the_signed_key_ids_too():
    """A threshold of sites holds the payload by then, so the coordinator has no reason to hide them."""
    epochs = with_late_joiner()
    granted = granted_by(epochs, "s00")
    assert granted.grant.site == epochs.stages[HUB].header.maker and len(granted.held) == 3
    short = replace(granted, held=granted.held[:2])
    assert epochs.refused("s03", epoch.FromCoordinator(short), ThresholdRefused) == HUB
    epochs.step("s03", epoch.FromCoordinator(granted))
    assert isinstance(epochs.stages["s03"], epoch.Holding)


def test_only_the_maker_is_asked_again_for_everybodys_grants():
    epochs = Epochs()
    epochs.begin()
    request = epochs.until(epoch.EpochKeys, "s00")
    epochs.step("s00", epoch.FromCoordinator(request))
    epochs.pump()
    assert epochs.refused("s01", epoch.FromCoordinator(request), OutOfOrder) == HUB
    epochs.step("s00", epoch.FromCoordinator(request))
    sent = [message for _, _, message in epochs.queue]
    assert [type(message) for message in sent] == [epoch.Grants, epoch.KeyHeld]
    assert [grant.recipient for grant in sent[0].grants] == ["s01", "s02", "s03"]


# --------------------------------------------------------------------------------- over-selection


@pytest.mark.parametrize("protection", ["masked", "encrypted"])
@pytest.mark.parametrize(("enough", "survivors"), [(0, 5), (3, 4), (4, 4), (5, 5), (9, 5)])
def test_enough_vectors_end_the_wait_for_more(protection, enough, survivors):
    """Of five sites one is slow; the threshold is four whatever is enough."""
    parties = Parties(5, protection=protection)
    parties.hub = replace(parties.hub, enough=enough)
    parties.begin()
    slow = []
    while parties.queue:
        sender, to, event = parties.queue.popleft()
        if isinstance(event, coordinator.Uploaded) and sender == "s01" and not slow:
            slow.append((sender, to, event))
            continue
        parties.deliver(to, event)
    parties.queue.extend(slow)
    parties.pump()
    last = parties.finish()
    assert len(last.certificate.survivors) == survivors and parties.now == 0.0
    assert len(parties.folded) == survivors
    left_out = "s01" not in last.certificate.survivors
    assert left_out == (survivors == 4)
    assert isinstance(parties.stages["s01"], site.Idle), "told that the round is over"
    parties.catch_up()
    assert isinstance(parties.play(), coordinator.Released), "and it is in the next one"
