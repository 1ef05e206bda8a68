"""The parts of a coordinator's job, fed with events: who is waited for, which keys and rounds begin, who
catches up, how the job ends; and in which order the machine asks for it. No loop, disk or socket.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support.deployed_jobs import VALUES, certificate, plan_for, word
from support.job_parts import LIMITS, OFFER, SITES, at, facts_of, sent
from support.parties import HUB, Parties

from fedcore.errors import OutOfOrder, PeerRefused
from fedcore.results import AbandonedRound, JobRow, MetricsRow
from fedcore.secagg.plan import ModelShape
from fedcore.secagg.protocol import epoch, job_messages, messages
from fedcore.secagg.protocol.effects import RemoveMasks, Send, Warn
from fedcore.secagg.protocol.job.coordinator import events
from fedcore.secagg.protocol.job.coordinator.catch_up import CatchUp
from fedcore.secagg.protocol.job.coordinator.ending import RETRY_SECONDS, JobEnd
from fedcore.secagg.protocol.job.coordinator.epochs import KEYS_ERASED, EpochDriver
from fedcore.secagg.protocol.job.coordinator.facts import JobFacts, KeptFile
from fedcore.secagg.protocol.job.coordinator.gathering import Gathering
from fedcore.secagg.protocol.job.coordinator.handover import ModelHandover
from fedcore.secagg.protocol.job.coordinator.machine import SHAPE_DIFFERS, JobMachine
from fedcore.secagg.protocol.job.coordinator.public_metrics import Metrics
from fedcore.secagg.protocol.job.coordinator.rounds import MOST_TRIES, RoundDriver
from fedcore.secagg.protocol.job.effects import (
    AppendRecords,
    CloseRound,
    DiscardUploads,
    DropCheckpoint,
    EndJob,
    FailSum,
    Info,
    KeepCheckpoint,
    KeepMetrics,
    MakePlan,
    OpenFold,
    Push,
    PutValues,
    ShowRound,
    StartFold,
)
from fedcore.secagg.protocol.round import coordinator
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.secagg.protocol.wire_form import decode, encode

PLAN = plan_for("masked")
SHAPE = ModelShape("t", "0" * 64, 5, 0, 0, "", PLAN.metric_sums)
CERTIFICATE = certificate()


def epoch_of(holders=SITES, number=1, keys=SITES):
    """A key epoch whose payload these sites hold."""
    header = epoch.EpochHeader(
        "clinics", "job", number, SITES, "pins", 3, PLAN.digest, keys[0] if keys else "a"
    )
    signed = tuple(epoch.EpochKey(b"h", name, None, b"") for name in keys)
    held = tuple(epoch.KeyHeld(b"h", name, b"k", b"") for name in holders)
    return epoch.Spreading(header, signed, (), held)


def rest(name, certificate="", of=1, number=7):
    return job_messages.SiteStatus("job", name, of, certificate, number)


def at_rest(facts, **certificates):
    """These sites stand at these certificates."""
    for name, found in certificates.items():
        facts.sites[name].rest = rest(name, found)


# ------------------------------------------------------------------------------- gathering


def test_gathering_goes_on_at_once_when_every_site_is_there():
    facts = facts_of(PLAN)
    assert Gathering(facts).check(SITES, at(here=SITES)) is True
    assert facts.progress.waiting_for == () and facts.progress.waiting_until is None


def test_gathering_waits_for_an_absent_site_once():
    facts = facts_of(PLAN)
    found = Gathering(facts)
    assert found.check("abc", at(5.0)) is False
    assert facts.progress.waiting_for == ("d",)
    assert facts.progress.waiting_until == 1000.0 + 5.0 + LIMITS.gather
    assert found.check("abc", at(5.0 + LIMITS.gather - 0.1)) is False
    assert found.check("abc", at(5.0 + LIMITS.gather)) is True and facts.sites["d"].missed
    assert found.check("abc", at(16.0)) is True, "it is not waited for again"
    found.connected("d")
    assert found.check("abc", at(17.0)) is False, "it connected: the wait begins anew"


def test_gathering_ends_the_job_when_too_few_come():
    facts = facts_of(PLAN)
    facts.progress.text = "why"
    found = Gathering(facts)
    assert found.check("ab", at()) is False
    assert found.check("ab", at(LIMITS.enough - 1)) is False
    assert found.check("ab", at(LIMITS.enough)) == (
        "2 sites were there after 1000 s, too few for a round, which needs 3: why"
    )


def test_gathering_is_short_where_too_many_sites_cannot_take_part():
    facts = facts_of(PLAN)
    facts.sites["c"].unable = facts.sites["d"].unable = "policy"
    found = Gathering(facts)
    assert found.check("ab", at()) is False
    ended = found.check("ab", at(LIMITS.gather))
    assert ended.endswith("which needs 3; cannot take part: c (policy), d (policy)")


def test_a_site_is_lost_after_the_grace_and_not_before():
    found = Gathering(facts_of(PLAN))
    assert found.lost(at(1.0, "abc")) == []
    assert found.lost(at(0.9 + LIMITS.grace, "abc")) == []
    assert found.lost(at(1.0 + LIMITS.grace, "abc")) == ["d"]
    assert found.lost(at(2.0 + LIMITS.grace)) == []


# ----------------------------------------------------------------------------- catching up


def behind(**certificates):
    facts = facts_of(PLAN, certificate=CERTIFICATE, epoch=epoch_of())
    here = CERTIFICATE.hash
    at_rest(facts, **{"a": here, "b": here, "c": here, "d": "earlier", **certificates})
    return facts, CatchUp(facts)


def test_a_site_with_the_state_is_asked_to_seal_it_and_another_after_a_while():
    _, found = behind()
    wanted = job_messages.CheckpointWanted("job", CERTIFICATE.hash)
    assert found.check("d", at()) == [Send("a", wanted)]
    assert found.check("d", at(LIMITS.gather - 0.1)) == []
    assert found.check("d", at(LIMITS.gather)) == [Send("b", wanted)]
    assert found.check("d", at(LIMITS.gather + 1, "acd")) == [Send("a", wanted)], "b is away"
    assert found.check("a", at(100.0)) == [], "it missed nothing"
    assert found.check("d", at(200.0, "d")) == [], "no site seals what it missed itself"


def test_a_checkpoint_is_kept_under_its_epoch_and_offered_once_a_session():
    _, found = behind(c="earlier")
    header = CERTIFICATE.header.digest
    found.check("d", at())
    assert found.expects("a", header, 100) and not found.expects("b", header, 100)
    assert not found.expects("a", header, found.most_bytes + 1)
    sealed = job_messages.CheckpointSealed("job", "a", CERTIFICATE.hash, b"d", 9)
    name = f"checkpoint-1-{CERTIFICATE.hash[:32]}"
    assert found.sealed("a", sealed) == [KeepCheckpoint("a", header, b"d", name)]
    assert found.sealed("a", replace(sealed, certificate="earlier")) == []
    offer = job_messages.CheckpointOffer("job", CERTIFICATE, b"d", 9)
    both = [Push("c", "checkpoint"), Send("c", offer), Push("d", "checkpoint"), Send("d", offer)]
    assert found.kept(KeptFile(b"d", 9), at()) == both, "the file goes before what announces it"
    assert found.check("d", at()) == []
    found.connected("d")
    assert found.check("d", at()) == both[2:]
    assert found.drop() == [DropCheckpoint(name)] and found.checkpoint is None


def test_a_site_of_another_key_epoch_is_offered_no_checkpoint():
    facts, found = behind()
    found.kept(KeptFile(b"d", 9), at())
    facts.sites["d"].rest = rest("d", "earlier", of=0)
    found.connected("d")
    assert found.check("d", at()) == []


# ------------------------------------------------------------------------------ key epochs


def test_a_key_epoch_is_on_disk_before_a_site_is_called():
    facts = facts_of(PLAN)
    found = EpochDriver(facts)
    first, *calls = found.call(("b", "c", "d"), at(5.0))
    assert isinstance(first, PutValues)
    assert decode(first.values["epoch"], object) == replace(facts.epoch, until=0.0)
    assert [name for name, _ in sent(calls, epoch.EpochCall)] == list(SITES)
    assert (facts.epoch.header.maker, facts.epoch.awaited) == ("b", ("b", "c", "d"))
    assert facts.epoch.until == 5.0 + LIMITS.gather
    found.resume(at(50.0))
    assert facts.epoch.until == 50.0 + LIMITS.gather


def test_an_epoch_that_too_few_join_says_so_and_waits():
    facts = facts_of(PLAN)
    found = EpochDriver(facts)
    found.call(SITES, at())
    assert found.take(coordinator.Tick(), at(LIMITS.gather)) == []
    assert "epoch keys: found 0 sites" in facts.progress.text
    with pytest.raises(PeerRefused):
        found.take(epoch.FromSite("a", epoch.KeyHeld(b"", "a", b"", b"")), at())


def test_a_late_site_is_granted_the_key_by_a_holder_that_is_connected():
    facts = facts_of(PLAN, epoch=epoch_of(holders="abc"))
    found = EpochDriver(facts)
    assert found.lacking(at()) == [], "d has not agreed to the plan"
    found.agreed("d")
    assert found.lacking(at()) == ["d"] and found.lacking(at(here="abc")) == []
    found.back("d", at())
    (asked,) = sent(found.back("d", at(here="bcd")), epoch.GrantRequest)
    assert asked[0] == "b", "a is away"


def test_a_key_is_spent_by_a_refusal_a_revocation_or_an_eviction():
    facts = facts_of(PLAN, epoch=epoch_of(), step=PlannedRound("update", 1))
    found = EpochDriver(facts)
    assert not found.spent()
    found.refused("x")
    assert not found.spent(), "not a holder"
    found.refused("a")
    assert found.spent()
    found.call_anew(SITES, at())
    assert not found.spent() and facts.epoch.epoch == 2
    facts.epoch, facts.evicted = epoch_of(), {"d"}
    assert found.spent()
    facts.step = None
    assert not found.spent(), "no round follows"
    facts.evicted, facts.step = frozenset(), PlannedRound("update", 1)
    (put,) = found.withdraw("d")
    assert json.loads(put.values["withdrawn"]) == ["d"] and found.spent()
    assert found.withdraw("d") == []
    first, *_ = found.call_anew(SITES, at())
    assert first == PutValues({"withdrawn": b"[]"}) and not facts.withdrawn


def test_a_refused_release_spends_the_key_of_its_own_epoch_only():
    header = replace(CERTIFICATE.header, epoch=1)
    facts = facts_of(PLAN, epoch=epoch_of(), step=PlannedRound("update", 2))
    found = EpochDriver(facts)
    facts.stage = coordinator.Failed(header, "release", 2, (), ("a",))
    assert found.spent()
    facts.epoch = epoch_of(number=2)
    assert not found.spent()


def test_a_holder_that_erased_the_keys_is_passed_by():
    over = job_messages.JobEnded("job", "finished", "", "x")
    facts = facts_of(PLAN, epoch=epoch_of(holders="ab"), outcome=over)
    found = EpochDriver(facts)
    (asked,) = found.pass_by("a", "d", at())
    assert asked.to == "b" and isinstance(asked.message, epoch.GrantRequest)
    stays = replace(over, certificate="", text=KEYS_ERASED)
    assert found.pass_by("b", "d", at()) == [Send("d", stays)]
    assert found.pass_by("b", "stranger", at()) == []


# --------------------------------------------------------------------------------- rounds


class Rounds(Parties):
    """Real machines at the sites, and a round driver at the coordinator."""

    def __init__(self, **about):
        super().__init__(4, 3, **about)
        self.facts = facts_of(self.plan, sites=self.sites, step=PlannedRound("update", 1))
        self.facts.pins.update(self.pins)
        self.facts.sizes = dict.fromkeys(("statistics", "range", "update", "metrics"), 640)
        self.driver = RoundDriver(self.facts)
        self.asked = []

    def step(self, who, event):
        if who != HUB:
            return super().step(who, event)
        if isinstance(event, coordinator.Uploaded):
            self.driver.submitted(event.sender, event.submit)
            file = KeptFile(event.digest, event.size)
            assert self.driver.arrived(event.sender, event.submit.header, file)
            self.asked += self.driver.to_fold(event.sender, self.moment)
            event = self.driver.uploaded(event.sender)
        found = self.driver.take(event, self.moment)
        self.stages[HUB] = self.facts.stage
        self.asked += found
        for effect in found:
            if not isinstance(effect, AppendRecords | Push):
                self.act(who, effect)
        return found

    @property
    def moment(self):
        return at(self.now, self.sites)


def played(**about):
    found = Rounds(**about)
    found.play()
    assert isinstance(found.facts.stage, coordinator.Released)
    return found


@pytest.mark.parametrize("protection", ["masked", "encrypted"])
def test_records_are_asked_for_before_any_message_that_relies_on_them(protection):
    """PROTOCOL D: what the records so far say is all that a message may rely on."""
    found = Rounds(protection=protection)
    stage, driver = coordinator.Ready(), found.driver
    take = driver.take

    def checked(event, moment):
        nonlocal stage
        effects = take(event, moment)
        for effect in effects:
            match effect:
                case AppendRecords(records):
                    stage = coordinator.replay(stage, records)
                case Send() | RemoveMasks() | Push() if not isinstance(
                    found.facts.stage, coordinator.Released
                ):
                    assert encode(stage) == encode(found.facts.stage)
        return effects

    driver.take = checked
    found.play()
    assert isinstance(found.facts.stage, coordinator.Released)


def test_records_that_nothing_relies_on_wait_for_the_next_ones():
    found = Rounds()
    found.begin()
    assert isinstance(found.asked[0], AppendRecords), "the round number is used up"
    del found.asked[:]
    found.pump(until=lambda: len(getattr(found.facts.stage, "keys", ())) == 3)
    assert found.asked == []
    (kept,) = found.driver.flush()
    assert [type(each) for each in kept.records] == [coordinator.KeysTaken] * 3
    assert found.driver.flush() == []


def test_an_upload_is_folded_before_it_is_taken_and_its_small_file_is_in_the_same_commit():
    found = played()
    folds = [e for e in found.asked if isinstance(e, StartFold)]
    assert {fold.site for fold in folds} == set(found.sites)
    vectors = [d for e in found.asked if isinstance(e, AppendRecords) for d in e.vectors]
    assert sorted(vectors) == sorted(fold.digest for fold in folds)
    sums = [e for e in found.asked if isinstance(e, AppendRecords) and e.with_sum]
    assert [type(r) for r in sums[0].records][-1] is coordinator.SumSpooled and len(sums) == 1


def test_the_sum_goes_before_the_message_that_announces_it():
    found = played()
    places = [k for k, e in enumerate(found.asked) if isinstance(e, Push)]
    assert len(places) == 4
    for place in places:
        push, announced = found.asked[place : place + 2]
        assert push.what == "sum" and push.to == announced.to
        assert isinstance(announced.message, messages.Aggregate)


def test_a_vector_that_must_not_be_taken_is_not_folded():
    found = Rounds()
    found.begin()
    found.pump(until=lambda: isinstance(found.facts.stage, coordinator.Collecting))
    found.pump(until=lambda: any(isinstance(e, coordinator.Uploaded) for *_, e in found.queue))
    upload = next(e for *_, e in found.queue if isinstance(e, coordinator.Uploaded))
    found.driver.submitted(upload.sender, upload.submit)
    assert found.driver.to_fold(upload.sender, found.moment) == [], "the vector is not there"
    assert not found.driver.arrived(upload.sender, b"another", KeptFile(upload.digest, 640))
    header = upload.submit.header
    assert found.driver.arrived(upload.sender, header, KeptFile(upload.digest, 999))
    with pytest.raises(PeerRefused, match="999 bytes"):
        found.driver.to_fold(upload.sender, found.moment)
    assert found.driver.expects(upload.sender, header, 640)
    assert not found.driver.expects(upload.sender, header, 641)
    assert not found.driver.expects("stranger", header, 640)


def test_the_end_of_a_round_is_one_commit_with_its_row_and_the_step_that_follows():
    found = played()
    asked, stage = found.asked, found.facts.stage
    at_end = [e for e in asked[-6:] if isinstance(e, AppendRecords)]
    assert not any(coordinator.RoundReleased in map(type, e.records) for e in at_end)
    close = found.driver.close(found.moment)
    assert isinstance(close, CloseRound)
    assert set(close.values) == {"stage", "step", "certificate", "row-000000"}
    assert decode(close.values["step"], object) == found.facts.step == PlannedRound("update", 2)
    (row,) = found.facts.rounds.known
    assert json.loads(close.values["row-000000"]) == row.to_json()
    assert row.survivors == row.roster == tuple(found.sites)
    assert (row.bytes_up, row.bytes_down) == (640, 640)
    assert set(row.seconds_by_stage) == {*coordinator.STAGE_NAMES.values()}
    assert decode(close.values["stage"], object) == stage


def test_a_sum_that_takes_longer_than_a_stage_is_given_up():
    found = Rounds()
    found.begin()
    found.pump(until=lambda: isinstance(found.facts.stage, coordinator.Summing))
    assert found.driver.overdue_sum(at(LIMITS.stage)) == []
    header = found.facts.stage.header
    assert found.driver.overdue_sum(at(LIMITS.stage + 1)) == [FailSum(header, LIMITS.stage)]
    assert found.driver.summing_late(at(LIMITS.stage + 1))


def test_a_round_whose_sum_may_be_known_waits_as_long_as_a_job_for_its_start():
    found = Rounds()
    found.begin()
    found.pump(until=lambda: isinstance(found.facts.stage, coordinator.Releasing))
    assert found.driver.unreleasable(found.moment) == ""
    few = found.sites[:2]
    assert found.driver.unreleasable(at(1.0, few)) == "" and found.driver.short_since == 1.0
    text = found.driver.unreleasable(at(2.0 + LIMITS.enough, few))
    assert "did not come back to release it; its sum may be known" in text
    assert found.driver.unreleasable(at(2.0 + LIMITS.enough, found.sites)) == ""


def test_a_sum_that_another_machine_had_is_waited_for_no_longer_than_a_stage():
    """The sites that fetched it may be enough to release it, and nobody else can get it any more."""
    found = Rounds()
    found.begin()
    found.pump(until=lambda: isinstance(found.facts.stage, coordinator.Releasing))
    found.driver.restore(None, at(1.0, found.sites), restarted=True)
    assert found.driver.unreleasable(at(1.0 + LIMITS.stage, found.sites)) == ""
    text = found.driver.unreleasable(at(2.0 + LIMITS.stage, found.sites))
    assert "its sum is not on this machine" in text and "no other may be taken" in text
    here = KeptFile(b"s" * 32, 10)
    found.driver.restore(here, at(1.0, found.sites), restarted=True)
    assert found.driver.unreleasable(at(2.0 + LIMITS.stage, found.sites)) == ""


def abandoned(purpose, training_round):
    why = AbandonedRound(stage="keys", left=2)
    about = {"round": training_round, "purpose": purpose, "seconds": 0.1}
    return JobRow(**about, survivors=(), roster=SITES, abandoned=why)


def test_a_step_is_tried_so_many_times():
    facts = facts_of(PLAN, step=PlannedRound("statistics", 0))
    row = abandoned("statistics", 0)
    facts.rounds.known += [row] * (MOST_TRIES - 1)
    assert RoundDriver(facts).tried_enough() == ""
    facts.rounds.known.append(row)
    assert (
        RoundDriver(facts).tried_enough() == "the statistics round was abandoned 12 times in a row"
    )


# ------------------------------------------------------------------------- metrics, the end


def test_public_metrics_become_a_row_when_enough_sites_say_the_same():
    facts = facts_of(plan_for(public_metrics=True), certificate=CERTIFICATE)
    found = Metrics(facts)
    with pytest.raises(PeerRefused, match="before there is a plan"):
        found.take("a", word("a"))
    found.released()
    assert found.take("a", word("a")) == found.take("b", word("b")) == []
    row = MetricsRow(round=1, number=7, sites=4, metrics=VALUES)
    assert found.take("c", word("c")) == [KeepMetrics(row)]
    assert not found.may_come(at())


def test_a_plan_that_the_disk_refused_judges_no_public_metrics():
    """The next plan may be another one."""
    facts = facts_of(plan_for(public_metrics=True))
    found = Metrics(facts)
    found.released()
    facts.plan = None
    found.released()
    with pytest.raises(PeerRefused, match="before there is a plan"):
        found.take("a", word("a"))


def ending(**fields):
    facts = facts_of(PLAN, certificate=CERTIFICATE, epoch=epoch_of(), **fields)
    parts = EpochDriver(facts), CatchUp(facts), Metrics(facts), ModelHandover(facts)
    return facts, JobEnd(facts, *parts), parts[1]


def test_the_end_of_a_job_is_on_disk_before_a_site_hears_of_it():
    _, found, _ = ending()
    over = job_messages.JobEnded("job", "stopped", "by op", CERTIFICATE.hash)
    assert found.end("stopped", "by op", at(here="ab")) == [
        EndJob(over), Send("a", over), Send("b", over), DiscardUploads()
    ]  # fmt: skip


def test_a_job_ends_after_its_sites_said_where_they_stand_or_a_checkpoint_is_kept():
    facts, found, catch_up = ending()
    assert found.finish(at()) == [], "they are about to say where they stand"
    at_rest(facts, a=CERTIFICATE.hash, b=CERTIFICATE.hash, c=CERTIFICATE.hash, d="earlier")
    (asked,) = sent(found.finish(at(RETRY_SECONDS)), job_messages.CheckpointWanted)
    assert asked[0] == "a"
    catch_up.checkpoint = KeptFile(b"d", 9)
    over = found.finish(at(RETRY_SECONDS + 1))
    assert over[0].ended.outcome == "finished"


def test_a_job_without_a_released_round_of_training_is_abandoned():
    facts, found, _ = ending()
    facts.rounds.known.append(abandoned("update", 1))
    at_rest(facts, **dict.fromkeys(SITES, CERTIFICATE.hash))
    assert found.finish(at())[0].ended.outcome == "abandoned"


AFTERWARDS = {
    "a new session": (events.SiteConnected, "over"),
    "a message of its last round": (
        lambda n: heard(n, job_messages.InRound("job", n, b"h")),
        "over",
    ),
    "at the last release": (lambda n: heard(n, rest(n, CERTIFICATE.hash)), "over"),
    "behind, without a checkpoint": (lambda n: heard(n, rest(n, "earlier")), "stays"),
    "it was loading": (lambda n: heard(n, job_messages.SiteSurvey("job", n, SHAPE)), "plan"),
    "it cannot take part": (
        lambda n: heard(n, job_messages.SiteUnavailable("job", n, "policy")),
        "stays",
    ),
    "a tick": (lambda _: events.TimePassed(), None),
}


def heard(name, message):
    return events.MessageReceived(name, message)


@pytest.mark.parametrize("what", AFTERWARDS)
def test_what_a_late_site_hears_of_a_job_that_is_over(what):
    event, answer = AFTERWARDS[what]
    over = job_messages.JobEnded("job", "finished", "", CERTIFICATE.hash)
    facts, found, _ = ending(outcome=over)
    answers = {"over": over, "stays": replace(over, certificate=""), "plan": facts.plan_offer()}
    expected = [] if answer is None else [Send("d", answers[answer])]
    assert found.afterwards(event("d"), at()) == expected


def test_a_late_site_gets_the_last_state_or_first_the_key_that_opens_it():
    over = job_messages.JobEnded("job", "finished", "", CERTIFICATE.hash)
    facts, found, catch_up = ending(outcome=over)
    catch_up.checkpoint = KeptFile(b"d", 9)
    push, offer = found.afterwards(heard("d", rest("d", "earlier")), at())
    assert push == Push("d", "checkpoint") and isinstance(
        offer.message, job_messages.CheckpointOffer
    )
    facts.epoch = epoch_of(holders="abc", keys="abc")
    (called,) = found.afterwards(heard("d", rest("d", "earlier", of=0)), at())
    assert isinstance(called.message, epoch.EpochCall)


# ----------------------------------------------------------------------------- the machine


def machine():
    found = JobMachine(JobFacts("clinics", OFFER, facts_of().pins, LIMITS))
    found.facts.threshold = 3
    return found


def surveyed(found, *names, shape=SHAPE):
    for name in names:
        found.step(heard(name, job_messages.SiteSurvey("job", name, shape)), at())


def test_a_job_is_offered_surveyed_and_planned():
    found = machine()
    assert sent(found.step(events.Resumed(), at(here="ab"))) == [("a", OFFER), ("b", OFFER)]
    surveyed(found, "a", "b")
    assert found.step(events.Advance(), at()) == []
    assert found.facts.progress.waiting_for == ("c", "d")
    surveyed(found, "c")
    surveyed(found, "d", shape=replace(SHAPE, parameters=6))
    assert found.step(events.Advance(), at()) == [MakePlan(SHAPE)]
    assert found.facts.sites["d"].unable == SHAPE_DIFFERS
    put, *offers = found.step(events.PlanMade(PLAN, 0, {}), at(here="ab"))
    assert json.loads(put.values["plan"]) == {"plan": PLAN.to_json(), "features": 0}
    assert [name for name, _ in sent(offers, job_messages.PlanOffer)] == ["a", "b"]


def begun_with(*parts):
    return replace(SHAPE, initial=parts)


def test_a_site_whose_model_begins_otherwise_is_named_and_takes_no_part():
    found = machine()
    surveyed(found, "a", "b", "c", shape=begun_with("p", "f", "b"))
    surveyed(found, "d", shape=begun_with("p", "other", "b"))
    warned, planned = found.step(events.Advance(), at())
    assert (
        warned.text == "sites differ over the initial model (frozen parameters): a, b, c against d"
    )
    assert planned == MakePlan(begun_with("p", "f", "b"))
    assert found.facts.sites["d"].unable == SHAPE_DIFFERS


def test_sites_that_all_begin_otherwise_end_the_job_at_once():
    found = machine()
    for name, part in zip("abcd", ("1", "2", "2", "3"), strict=True):
        surveyed(found, name, shape=begun_with(part, "f", part))
    (ended, *_) = found.step(events.Advance(), at())
    assert ended.ended.outcome == "failed"
    assert ended.ended.text == (
        "sites differ over the initial model (parameters and buffers that stay): a against b, c against d"
    )


def test_other_columns_are_no_other_initial_model():
    found = machine()
    surveyed(found, "a", "b", "c", shape=begun_with("p", "f", "b"))
    surveyed(found, "d", shape=replace(begun_with("q", "f", "b"), parameters=6))
    assert found.step(events.Advance(), at()) == [MakePlan(begun_with("p", "f", "b"))]


def test_a_job_that_too_few_sites_can_join_fails():
    found = machine()
    for name in "ab":
        found.step(heard(name, job_messages.SiteUnavailable("job", name, "policy")), at())
    (ended, *_) = found.step(events.Advance(), at())
    assert ended.ended.text == "too few sites can take part (a: policy, b: policy)"
    assert found.facts.outcome is None, "it counts once it is on disk"


def test_what_a_site_must_not_say_is_a_line_of_the_log():
    found = machine()
    (warning,) = found.step(heard("a", job_messages.SiteSurvey("job", "b", SHAPE)), at())
    assert isinstance(warning, Warn) and "another site from a" in warning.text
    (said,) = found.step(heard("a", job_messages.KeysErased("job", "a", "b")), at())
    assert (
        isinstance(said, Info) and "site a: dropped a message that came again or late" in said.text
    )
    assert "fault" not in said.text, "a repeat after a reconnect is nobody's"
    with pytest.raises(OutOfOrder):
        found.on_message("a", job_messages.KeysErased("job", "a", "b"))


def test_the_clock_is_due_every_second_and_at_the_deadline_of_a_stage():
    found = machine()
    found.step(events.TimePassed(), at(5.0))
    assert found.due == 6.0
    header = CERTIFICATE.header
    found.facts.stage = coordinator.Advertising(header, 640, 0, until=5.25)
    assert found.due == 5.25
    found.facts.stage = coordinator.Advertising(header, 640, 0, until=5.0)
    assert found.due == 6.0, "a deadline that passed without effect is no reason to be busy"


def test_a_new_round_opens_its_fold_before_it_is_announced():
    found = machine()
    facts = found.facts
    facts.plan, facts.epoch, facts.step = PLAN, epoch_of(), PlannedRound("update", 1)
    facts.sizes = {"update": 640}
    at_rest(facts, **dict.fromkeys(SITES, ""))
    fold, kept, *announced = found.step(events.Advance(), at())
    assert isinstance(fold, OpenFold) and isinstance(kept, AppendRecords)
    assert [name for name, _ in sent(announced, messages.Announce)] == list(SITES)
    assert fold.header.round == 8, "one more than any site has seen"
    assert all(view.rest is None for view in facts.sites.values())


def test_a_round_waits_again_for_a_site_that_reports_its_status_while_it_catches_up():
    """Else fast rounds stay one release ahead of it until the job ends."""
    found = machine()
    facts = found.facts
    facts.plan, facts.epoch, facts.step = PLAN, epoch_of(), PlannedRound("update", 1)
    facts.sizes = {"update": 640}
    at_rest(facts, **dict.fromkeys("abc", ""))
    facts.sites["d"].missed = True
    found.step(heard("d", rest("d", "f" * 64)), at())
    assert sent(found.step(events.Advance(), at()), messages.Announce) == []
    assert facts.progress.waiting_for == ("d",)


def between(stage):
    """A job whose last round stands at this stage, with a step to come."""
    found = machine()
    facts = found.facts
    facts.plan, facts.epoch, facts.step = PLAN, epoch_of(), PlannedRound("update", 1)
    facts.stage, facts.sizes = stage, {"update": 640}
    at_rest(facts, **dict.fromkeys(SITES, ""))
    return found


def test_no_round_follows_one_whose_sum_may_be_known():
    header = CERTIFICATE.header
    free = between(coordinator.Failed(header, "submit", 2, ()))
    assert sent(free.step(events.Advance(), at()), messages.Announce)
    found = between(coordinator.Failed(header, "unmask", 2, ("a", "b")))
    (ended, *_) = effects = found.step(events.Advance(), at())
    assert ended.ended.outcome == "abandoned" and "its sum may be known" in ended.ended.text
    assert sent(effects, messages.Announce) == []


def test_public_metrics_are_taken_once_their_round_is_released_and_not_before():
    found = between(coordinator.Ready())
    found.facts.plan = plan_for(public_metrics=True)
    found.metrics.released()
    (refused,) = found.step(heard("a", word("a")), at())
    assert isinstance(refused, Warn) and "not certified here" in refused.text
    found.facts.stage = coordinator.Released(CERTIFICATE.header, CERTIFICATE)
    found.close_round([])
    kept = [e for n in "abc" for e in found.step(heard(n, word(n)), at())]
    assert [type(each) for each in kept] == [KeepMetrics]


def test_a_round_that_cannot_be_released_ends_the_job_when_sites_were_waited_for_long_enough():
    submissions = tuple(messages.Submit(b"h", n, b"", 640, b"", b"", b"", b"") for n in "abc")
    aggregate = messages.Aggregate(b"h", submissions, b"d" * 32, 640)
    stage = coordinator.Releasing(CERTIFICATE.header, submissions, aggregate)
    found = between(stage)
    few = SITES[:2]
    assert not [e for e in found.step(events.TimePassed(), at(1.0, few)) if isinstance(e, EndJob)]
    (ended, *_) = found.step(events.TimePassed(), at(2.0 + LIMITS.enough, few))
    assert ended.ended.outcome == "abandoned"
    assert "did not come back to release it" in ended.ended.text


def test_a_round_that_ends_is_written_then_told_then_its_files_go():
    found = machine()
    facts = found.facts
    facts.plan, facts.epoch, facts.step = PLAN, epoch_of(), PlannedRound("update", 1)
    facts.sizes = {"update": 640}
    at_rest(facts, **dict.fromkeys(SITES, ""))
    found.step(events.Advance(), at())
    effects = []
    for name in SITES[:2]:
        leave = messages.Leave(facts.stage.header.digest, name, "stopped")
        effects += found.step(heard(name, leave), at())
    closes = [k for k, e in enumerate(effects) if isinstance(e, CloseRound)]
    abandons = [
        k for k, e in enumerate(effects) if isinstance(getattr(e, "message", 0), messages.Abandon)
    ]
    shown = effects.index(ShowRound())
    assert len(closes) == 1 and closes[0] < min(abandons) <= max(abandons) < shown
    assert effects[shown + 1] == DiscardUploads(facts.stage.header.digest)
    assert facts.rounds.known[0].abandoned.stage == "keys"
