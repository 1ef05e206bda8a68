"""A whole job at a site as a machine: its parts, and the order of what it asks for, without disk or session."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
from support.plans import round_plan

from fedcore.errors import GuardTripped, OtherSites, PolicyRefused, ReleaseRefused, StoreProblem
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.crypto.identity_key import IdentityKey, roster_digest
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.crypto.sumtag import GroupSecret, key_id, state_mac
from fedcore.secagg.packing import solve_packing
from fedcore.secagg.plan import ModelPlan, RangePlan, RoundHeader, RoundPlan, canonical
from fedcore.secagg.protocol import epoch, messages
from fedcore.secagg.protocol import job_messages as job
from fedcore.secagg.protocol.effects import Erase, MakeVector, OpenSum, Send, Upload, Warn
from fedcore.secagg.protocol.job import effects as ask
from fedcore.secagg.protocol.job.effects import CloseRound, EndJob, Info, PutValues
from fedcore.secagg.protocol.job.site import events
from fedcore.secagg.protocol.job.site.machine import Kept, SiteJob
from fedcore.secagg.protocol.job.site.participation import Agreed, JobParams, Participation
from fedcore.secagg.protocol.job.site.states import StateKeeper, led_to
from fedcore.secagg.protocol.messages import Certificate, sign
from fedcore.secagg.protocol.round import site
from fedcore.secagg.protocol.round.site import SiteProgress
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.secagg.protocol.wire_form import decode
from fedcore.secagg.scheme import EpochSecrets

SITES = ("a", "b", "c", "d")
KEYS = {name: IdentityKey() for name in SITES}
PINS = {name: key.public for name, key in KEYS.items()}
GROUP = GroupSecret()
PLAN = round_plan(SITES, "encrypted", bits=8, max_examples=64, rounds=3, range=RangePlan(start=0.5))
DURABLE = ask.AppendEntries | CloseRound | PutValues


@dataclass(frozen=True)
class State:
    """A job's state of a name."""

    name: str
    done: PlannedRound | None = None
    over: str = ""

    def canonical(self):
        return self.name.encode()

    def to_bytes(self):
        return b"file of " + self.name.encode()


@dataclass
class Policy:
    """Refuses what is named."""

    refuses: set = field(default_factory=set)

    def _asked(self, what):
        if what in self.refuses:
            return PolicyRefused(f"{what}: found it, expected none", word="policy", remedy="ask")
        return None

    def on_offer(self, offer):
        return self._asked("offer")

    def on_plan(self, plan):
        return self._asked("plan")

    def on_release(self, what):
        return self._asked(what if isinstance(what, str) else "rows")


class Ledger:
    """Nothing was given before."""

    def has(self, header):
        return False

    def rows_key(self, digest):
        return "rows " + digest

    def jobs_over(self, rows):
        return ()

    def statistics_only_with(self, rows, columns, besides=""):
        return None


class Planner:
    """The site makes PLAN of every offer."""

    def __init__(self, plan=PLAN):
        self._plan = plan

    def plan(self, offer, survey):
        return self._plan

    def first_state(self, plan, survey):
        return State("first")

    def scheme(self, plan):
        return SimpleNamespace(open_payload=lambda payload, maker: EpochSecrets(GROUP, None))


def params(policy=None, plan=PLAN, **changes):
    values = {
        "federation": "town", "id": "a", "identity": KEYS["a"], "pins": PINS, "minimum": 3,
        "policy": policy or Policy(), "ledger": Ledger(), "planner": Planner(plan),
        "entropy": OsEntropy(), "timeout": 100.0, "keep_keys": 50.0,
    }  # fmt: skip
    return JobParams(**values | changes)


OFFER = job.JobOffer("job", "t", "0" * 64, b"{}")
SURVEY = SimpleNamespace(shape=SimpleNamespace(features=0), columns=(), initial=None, rows="0" * 64)


def offered(me=None, asks=False, **changes):
    """A site's job after its offer."""
    me = me or params(**changes)
    return SiteJob(OFFER, Participation(me, "job", asks=asks, about=lambda: ["leaves: sums"]))


def between_rounds(state=None, standing=None, plan=PLAN, columns=(), survey=SURVEY, **changes):
    """A site's job between two rounds, in key epoch 1, in a process that loaded the rows, if any."""
    found = offered(plan=plan, **changes)
    found.part.survey = survey
    standing = standing or SiteProgress(1, b"k" * 32)
    payload, maker = SecretBytes(b"payload"), "b"
    header = epoch.EpochHeader(
        "town", "job", 1, SITES, roster_digest(PINS), plan.threshold, plan.digest, maker
    )
    held = epoch.KeyHeld(header.digest, "a", key_id(b"payload"), b"")
    holding = epoch.Holding(header, SecretBytes(b"s" * 32), None, payload, held)
    found.restored(
        Kept(
            Agreed(plan, len(columns), columns), "rows", site.Idle(standing),
            state or State("before"), None,
            holding, {"1": GROUP.to_bytes().hex()}, (b"", {}), "",
        )
    )  # fmt: skip
    return found


def header_of(number=1, **changes):
    found = RoundHeader(
        "town", "job", 1, number, number, "update", SITES, roster_digest(PINS), PLAN.threshold,
        PLAN.protection, PLAN.digest,
    )  # fmt: skip
    return replace(found, **changes)


def told(found, message, now=0.0, at=0.0):
    return found.step(events.MessageReceived(message, at), now)


def only(kind, effects):
    return [each for each in effects if isinstance(each, kind)]


def sent(effects):
    return [each.message for each in only(Send, effects)]


def certified(header, state, signers=SITES):
    """The certificate of the release that leads to this state."""
    mac = state_mac(GROUP, header.digest, state.canonical())
    found = Certificate(header, SITES, b"m" * 32, mac, ())
    signatures = tuple((n, sign(found.statement(n, b""), KEYS[n]).signature) for n in signers)
    return replace(found, signatures=signatures)


# ------------------------------------------------------------------------------ a round, whole


class Round:
    """One round under `encrypted`, played on site a."""

    def __init__(self, found, header):
        self.job, self.header, self.effects = found, header, []

    def do(self, event, now=0.0):
        found = self.job.step(event, now)
        self.effects += found
        return found

    def begin(self):
        return self.do(events.MessageReceived(messages.Announce(self.header)))

    def vector(self):
        made = site.VectorMade(b"d" * 32, 9)
        return self.do(events.VectorReady(self.header.digest, made, b"small", {"m": 1}, b"{}"))

    def aggregate(self):
        stage = self.job.stage
        others = tuple(
            sign(replace(stage.submit, site=name, signature=b""), KEYS[name]) for name in SITES
        )
        sum_ = messages.Aggregate(self.header.digest, others, b"e" * 32, 9)
        return self.do(events.MessageReceived(sum_))

    def opened(self, state):
        mac = state_mac(GROUP, self.header.digest, state.canonical())
        opened = site.SumOpened(b"m" * 32, mac)
        name = led_to(self.header, SITES, opened.sum_mac, mac)
        event = events.CheckedSum(
            self.header.digest, opened, name, state, state.to_bytes(), {"weight": [1]}, 4
        )
        return self.do(event)

    def certificate(self, state):
        return self.do(events.MessageReceived(certified(self.header, state)))


def played(after, **changes):
    found = Round(between_rounds(**changes), header_of())
    found.begin()
    found.vector()
    found.aggregate()
    found.opened(after)
    return found


def test_a_round_asks_for_its_work_in_order_and_leads_to_the_certified_state():
    after = State("after", PlannedRound("update", 1))
    found = played(after)
    last = found.certificate(after)
    work = [type(each) for each in found.effects if not isinstance(each, Send | ask.Report)]
    assert work == [
        MakeVector, ask.TidySpool, ask.Expose, ask.AppendEntries, Upload, ask.Expose, OpenSum,
        ask.AppendEntries, ask.Expose, ask.EnterRelease, CloseRound, ask.AdoptState, ask.Track,
        Erase, ask.StopMaking,
    ]  # fmt: skip
    assert found.job.state is after and isinstance(found.job.stage, site.Idle)
    assert [type(each) for each in sent(found.effects)] == [
        messages.Submit, messages.Statement, job.SiteStatus,
    ]  # fmt: skip
    (closed,), (adopted,) = only(CloseRound, last), only(ask.AdoptState, last)
    assert closed.values["state"] == adopted.data == after.to_bytes()
    assert decode(closed.values["stage"], site.Idle) == found.job.stage


@pytest.mark.parametrize("message", [messages.Submit, messages.Statement])
def test_what_a_message_relies_on_is_durable_before_it_is_sent(message):
    effects = played(State("after")).effects
    at = next(
        n for n, each in enumerate(effects) if isinstance(getattr(each, "message", None), message)
    )
    (before,) = only(ask.AppendEntries, effects[at - 1 : at])
    assert before.records, "the record of what is sent is in the commit just before it"
    if message is messages.Submit:
        assert before.values["vector"] == b"small" and before.values["guard"] == b"{}"
        assert json.loads(before.values["marks"])["marks"] == {"m": 1}
    else:
        name, data = decode(before.values["candidate"], tuple)
        said = effects[at].message
        assert data == State("after").to_bytes()
        assert name == led_to(header_of(), SITES, said.sum_mac, said.state_mac)


def test_own_marks_are_those_of_the_vector_that_was_sent_in_this_round():
    rounds = played(State("after")).job.parts.rounds
    assert rounds.own_marks(header_of()) == {"m": 1}
    with pytest.raises(ReleaseRefused, match="no record of this site's own marks"):
        rounds.own_marks(header_of(2))


def test_state_and_certificate_of_a_release_are_in_the_commit_that_ends_its_round():
    after = State("after", PlannedRound("update", 1))
    (closed,) = only(CloseRound, played(after).certificate(after))
    assert decode(closed.values["certificate"], Certificate) == certified(header_of(), after)
    assert closed.values["state"] == after.to_bytes()


def test_a_record_is_durable_before_a_message_that_brings_nothing_else_to_disk():
    """Under masks the list that a site signs has no value beside its record."""
    plan = replace(PLAN, protection="masked", packing=solve_packing(8, 4, "masked"))
    header = header_of(protection="masked", plan_digest=plan.digest)
    effects = told(between_rounds(plan=plan), messages.Announce(header))
    kinds = [type(each) for each in effects if isinstance(each, DURABLE | Send)]
    assert kinds == [ask.AppendEntries, Send] and only(messages.Keys, sent(effects))


def test_a_key_epoch_is_durable_before_its_key_is_sent():
    found = between_rounds()
    header = replace(found.parts.epochs.stage.header, epoch=2)
    effects = told(found, epoch.EpochCall(header))
    assert [type(each) for each in effects] == [PutValues, Send]
    assert decode(effects[0].values["epoch"], epoch.Offered).header == header
    assert only(epoch.EpochKey, sent(effects))


def test_a_later_announcement_does_not_end_a_round_whose_sum_may_be_known():
    found = played(State("after"))
    stage = found.job.stage
    effects = told(found.job, messages.Announce(header_of(2)))
    assert found.job.stage == stage and isinstance(stage, site.Stated)
    assert [each.code for each in only(messages.Leave, sent(effects))] == [messages.LEFT]


def test_the_ledger_has_an_entry_before_the_journal_and_before_anything_leaves():
    effects = played(State("after")).effects
    first = next(n for n, each in enumerate(effects) if isinstance(each, ask.Expose))
    assert not only(DURABLE, effects[:first]) and not sent(effects[:first])


def test_rows_in_enough_jobs_end_the_round_before_anything_is_exposed():
    policy = Policy()
    found = Round(between_rounds(policy=policy), header_of())
    found.begin()
    policy.refuses = {"rows"}
    found.vector()
    assert not only(ask.Expose | Upload, found.effects) and not only(
        messages.Submit, sent(found.effects)
    )
    assert found.job.part.refused is not None and isinstance(found.job.stage, site.Idle)
    assert job.SiteUnavailable("job", "a", "policy") in sent(found.effects)


def test_a_state_that_changed_since_it_was_found_is_not_adopted():
    after = State("after")
    found = played(after)
    (name,) = found.job.states.candidates
    found.job.states.hold(name, State("another"), b"")
    effects = found.certificate(after)
    assert found.job.state.name == "before" and isinstance(found.job.stage, site.Halted)
    assert [each.code for each in only(messages.Leave, sent(effects))] == [messages.RELEASE_REFUSED]


def test_a_site_that_refused_the_last_release_hears_the_end_and_does_not_wait_for_that_state():
    after = State("after")
    found = played(after)
    (name,) = found.job.states.candidates
    found.job.states.hold(name, State("another"), b"")
    found.certificate(after)
    last = certified(found.header, after).hash
    effects = told(found.job, job.JobEnded("job", "finished", "", last))
    assert only(EndJob, effects) and found.job.ended and found.job.state.name == "before"


def test_a_failure_is_told_by_its_word_after_the_round_is_left():
    found = Round(between_rounds(), header_of())
    found.begin()
    failed = events.WorkFailed(
        found.header.digest, ValueError("row 7"), "it cannot take part", "unable"
    )
    words = [type(each) for each in sent(found.do(failed))]
    assert words == [messages.Leave, job.SiteStatus, job.SiteUnavailable]
    late = found.do(failed)  # the round is over, the word is not
    assert [type(each) for each in sent(late)] == [job.SiteUnavailable]


def test_a_tripped_guard_is_durable_and_keeps_the_site_out_of_later_rounds():
    found = Round(between_rounds(), header_of())
    found.begin()
    tripped = GuardTripped(("a",), 1, "a loss", found="0.9")
    effects = found.do(events.WorkFailed(found.header.digest, tripped, "guard", job.UNABLE))
    assert effects[0] == PutValues({"left": str(tripped).encode()}), "before the round is left"
    assert [type(each) for each in sent(effects)] == [messages.Leave, job.SiteUnavailable]
    effects = told(found.job, messages.Announce(header_of(2)))
    assert [type(each) for each in sent(effects)] == [messages.Leave]
    assert isinstance(found.job.stage, site.Idle)


def test_a_stage_has_a_deadline_and_a_job_between_rounds_none():
    found = between_rounds()
    assert found.deadline(5.0) is None
    found.step(events.MessageReceived(messages.Announce(header_of())), 5.0)
    assert found.deadline(5.0) == 100.0 and found.deadline(300.0) == 0.0
    effects = found.step(site.Tick(), 300.0)
    assert isinstance(found.stage, site.Idle) and only(messages.Leave, sent(effects))


def test_what_was_asked_for_before_an_error_stays_asked_for():
    """Otherwise a record would be lost that the stage in memory already follows."""
    found = Round(between_rounds(), header_of())
    found.begin()
    wrong = header_of(2, purpose="statistics")
    effects = told(found.job, messages.Announce(wrong))
    assert only(CloseRound, effects) and found.job.part.last_error.startswith("step: found")
    assert only(Warn, effects)


# ------------------------------------------------------------------------------ task and rows


def test_task_and_rows_are_loaded_once_and_the_survey_is_sent():
    found = offered()
    effects = found.step(events.Started(), 0.0)
    assert effects == [Info("job job: leaves: sums"), ask.Report("loading"), ask.LoadRows(None)]
    assert found.step(events.Started(), 0.0) == [], "they are being loaded"
    effects = found.step(events.RowsLoaded(SURVEY), 0.0)
    assert sent(effects) == [job.SiteSurvey("job", "a", SURVEY.shape)]
    assert found.part.rows == "rows " + SURVEY.rows and found.part.survey is SURVEY


def test_nothing_is_loaded_before_the_operator_approved():
    found = offered(asks=True)
    effects = found.step(events.Started(), 0.0)
    assert only(ask.AwaitApproval, effects) and not only(ask.LoadRows, effects)
    effects = found.step(events.Approved(), 0.0)
    assert only(ask.LoadRows, effects) and found.part.approval == "approved"


@pytest.mark.parametrize("refuses", ["offer", "plan"])
def test_the_policy_is_asked_before_rows_are_loaded(refuses):
    policy = Policy({refuses})
    job_ = (
        offered(policy=policy) if refuses == "offer" else between_rounds(survey=None, policy=policy)
    )
    effects = job_.step(events.Started(), 0.0)
    assert sent(effects)[-1] == job.SiteUnavailable("job", "a", "policy")
    assert not only(ask.LoadRows | ask.AwaitApproval, effects) and job_.part.refused is not None


def test_rows_that_are_in_enough_jobs_are_not_surveyed():
    found = offered(policy=Policy({"rows"}))
    found.step(events.Started(), 0.0)
    assert sent(found.step(events.RowsLoaded(SURVEY), 0.0)) == [
        job.SiteUnavailable("job", "a", "policy")
    ]
    assert found.part.survey is None


@pytest.mark.parametrize(("error", "warned"), [(StoreProblem("disk"), 1), (ValueError("row 7"), 0)])
def test_a_failure_to_load_is_told_by_its_word(error, warned):
    found = offered()
    found.step(events.Started(), 0.0)
    effects = found.step(events.LoadFailed(error, "task differs"), 0.0)
    assert sent(effects) == [job.SiteUnavailable("job", "a", "task differs")]
    assert len(only(Warn, effects)) == warned, "what else it raised is in the log of this side"


def test_a_vector_waits_until_a_new_process_has_loaded_the_rows():
    found = Round(between_rounds(survey=None), header_of())
    (load,) = only(ask.LoadRows, found.begin())
    assert load.plan == PLAN and not only(MakeVector, found.effects)
    assert [type(each) for each in found.do(events.RowsLoaded(SURVEY))] == [MakeVector]


def test_a_new_process_between_rounds_loads_the_rows_and_waits():
    found = between_rounds(survey=None)
    assert only(ask.LoadRows, found.step(events.Started(), 0.0))
    assert found.step(events.RowsLoaded(SURVEY), 0.0) == [ask.Report("waiting")]


def test_a_round_is_left_where_its_rows_cannot_be_loaded_and_the_next_one_loads_them_again():
    found = Round(between_rounds(survey=None), header_of())
    found.begin()
    failed = events.LoadFailed(StoreProblem("the disk"), "unable")
    effects = found.do(failed)
    assert [type(each) for each in sent(effects)] == [
        messages.Leave, job.SiteStatus, job.SiteUnavailable,
    ]  # fmt: skip
    assert only(ask.LoadRows, told(found.job, messages.Announce(header_of(2))))


def test_rows_that_could_not_be_loaded_are_tried_again_after_growing_pauses():
    found, now = offered(), 100.0
    assert only(ask.LoadRows, found.step(events.Started(), now))
    for pause in (5.0, 10.0, 20.0):
        effects = found.step(events.LoadFailed(OSError("the share is away"), "unable"), now)
        assert sent(effects) == [job.SiteUnavailable("job", "a", "unable")]
        assert found.deadline(now) == pause
        assert found.step(site.Tick(), now + pause - 0.1) == []
        now += pause
        assert only(ask.LoadRows, found.step(site.Tick(), now)) and found.deadline(now) is None
    assert sent(found.step(events.RowsLoaded(SURVEY), now)) == [
        job.SiteSurvey("job", "a", SURVEY.shape)
    ]
    assert found.deadline(now) is None


def test_the_pause_before_rows_are_tried_again_ends_at_five_minutes_and_with_the_job():
    found = offered()
    found.step(events.Started(), 0.0)
    for _ in range(12):
        found.step(events.LoadFailed(OSError("away"), "unable"), 0.0)
        last = found.deadline(0.0)
        found.step(site.Tick(), last)
    assert last == 300.0
    found.step(events.LoadFailed(OSError("away"), "unable"), 0.0)
    told(found, job.JobEnded("job", "failed", "too few sites"))
    assert found.deadline(1000.0) is None and found.step(site.Tick(), 1000.0) == []


@pytest.mark.parametrize("word", ["task differs", "task not allowed", "policy"])
def test_what_only_an_operator_can_change_is_not_tried_again(word):
    found = offered()
    found.step(events.Started(), 0.0)
    error = PolicyRefused("t", word="policy", remedy="") if word == "policy" else OSError("t")
    found.step(events.LoadFailed(error, word), 0.0)
    assert found.deadline(0.0) is None


def test_a_vector_of_a_round_that_is_over_is_not_made_when_the_rows_are_there():
    found = Round(between_rounds(survey=None), header_of())
    found.begin()
    told(found.job, messages.Announce(header_of(2)))
    (made,) = only(MakeVector, found.do(events.RowsLoaded(SURVEY)))
    assert made.header == header_of(2)


# ---------------------------------------------------------------------------- offer and plan


def test_a_plan_is_durable_with_its_first_state_before_it_is_agreed_to():
    found = offered()
    assert told(found, job.PlanOffer("job", canonical(PLAN.to_json()))) == [], "still loading"
    found.part.take_rows(SURVEY)
    effects = told(found, job.PlanOffer("job", canonical(PLAN.to_json())))
    assert [type(each) for each in effects] == [ask.WriteState, PutValues, Send]
    kept = json.loads(effects[1].values["plan"])
    assert kept["rows"] == "rows " + SURVEY.rows and RoundPlan.from_json(kept["plan"]) == PLAN
    assert sent(effects) == [job.PlanAgreed("job", "a", PLAN.digest)]


@pytest.mark.parametrize("refuses", ["plan", ""])
def test_another_plan_and_one_that_the_policy_forbids_are_not_agreed_to(refuses):
    found = offered(policy=Policy({refuses}))
    found.part.take_rows(SURVEY)
    plan = PLAN if refuses else replace(PLAN, rounds=99)
    effects = told(found, job.PlanOffer("job", canonical(plan.to_json())))
    word = "policy" if refuses else "unable"
    assert sent(effects) == [job.SiteUnavailable("job", "a", word)] and found.plan is None
    assert len(only(Warn, effects)) == 1


@pytest.mark.parametrize(
    ("changes", "names_it"),
    [
        ({"model": ModelPlan(initial="b" * 64)}, True),
        ({"model": ModelPlan(initial="b" * 64), "rounds": 99}, False),
        ({"model": ModelPlan()}, False),
    ],
)  # fmt: skip
def test_a_plan_with_another_initial_model_is_named_as_that(changes, names_it):
    mine = replace(PLAN, model=ModelPlan(initial="a" * 64))
    found = offered(planner=Planner(mine))
    found.part.take_rows(SURVEY)
    effects = told(found, job.PlanOffer("job", canonical(replace(mine, **changes).to_json())))
    (warning,) = only(Warn, effects)
    assert ("its initial model is another one (hint: task.model" in warning.text) is names_it
    assert sent(effects) == [job.SiteUnavailable("job", "a", "unable")]


def test_a_refusal_is_logged_once_and_its_word_is_said_at_every_session():
    found = offered()
    refused = PolicyRefused("epochs: found 3", word="policy", remedy="change it")
    effects = [*found.part.refuse(refused), *found.part.refuse(refused)]
    assert len(only(Warn, effects)) == 1
    assert sent(found.step(events.Connected(), 0.0)) == [job.SiteUnavailable("job", "a", "policy")]
    assert found.part.last_error == "epochs: found 3"


def test_what_the_ledger_forbids_is_a_refusal_of_the_policy():
    found = offered()
    error = OtherSites("cohort", found="a, b", expected="a, c", fault="coordinator", remedy="r")
    assert sent(list(found.part.note(error))) == [job.SiteUnavailable("job", "a", "policy")]
    assert found.part.refused.remedy == "r"


def test_statistics_are_given_again_to_the_sites_that_the_ledger_names():
    class Before(Ledger):
        def statistics_only_with(self, rows, columns, besides=""):
            return ("a", "b", "c") if (rows, columns) == ("rows", ["age"]) else None

    header = header_of(purpose="statistics", training_round=0)
    for ledger, joins in ((Ledger(), True), (Before(), False)):
        found = between_rounds(columns=(("age", 0.0, 99.0),), ledger=ledger)
        effects = told(found, messages.Announce(header))
        assert bool(only(MakeVector, effects)) == joins
    assert "exactly a, b, c" in found.part.last_error and found.part.refused is not None


# ------------------------------------------------------------------------------ catching up

OTHERS = SITES[1:]


def test_a_site_whose_own_signature_it_does_not_know_has_an_old_folder():
    found = between_rounds()
    effects = told(found, certified(header_of(), State("missed")))
    assert "put back to an earlier time" in only(Warn, effects)[0].text
    assert found.stage.standing.proved == 1 and only(CloseRound, effects)


def test_its_own_signature_in_the_offer_of_a_checkpoint_shows_an_old_folder_too():
    found = between_rounds()
    offer = job.CheckpointOffer("job", certified(header_of(), State("missed")), b"d" * 32, 9)
    effects = told(found, offer)
    assert found.stage.standing.proved == 1 and only(CloseRound, effects)
    assert only(ask.TakeCheckpoint, effects), "and it catches up"


def test_a_new_process_leaves_a_round_in_which_it_signed_something():
    """The folder may be an old copy, in which it would sign something else (PROTOCOL V)."""
    plan = replace(PLAN, protection="masked", packing=solve_packing(8, 4, "masked"))
    header = header_of(protection="masked", plan_digest=plan.digest)
    before, after = between_rounds(plan=plan), between_rounds(plan=plan)
    told(before, messages.Announce(header))
    after.parts.rounds.stage = before.stage
    effects = after.step(events.Started(), 0.0)
    assert isinstance(after.stage, site.Idle) and only(CloseRound, effects)
    assert [each.code for each in only(messages.Leave, sent(effects))] == [messages.LEFT]


def test_other_keys_of_its_own_in_a_bundle_show_an_old_folder():
    """Another life of this site is in the round: its folder was put back before it."""
    plan = replace(PLAN, protection="masked", packing=solve_packing(8, 4, "masked"))
    header = header_of(protection="masked", plan_digest=plan.digest)
    found, other = between_rounds(plan=plan), between_rounds(plan=plan)
    told(found, messages.Announce(header))
    (keys,) = only(messages.Keys, sent(told(other, messages.Announce(header))))
    told(found, messages.KeyBundle(header.digest, (keys,)))
    assert isinstance(found.stage, site.Idle) and found.stage.standing.proved == 1


def test_a_missed_release_is_taken_once_and_applied_under_its_certificate():
    found, missed = between_rounds(), State("missed", PlannedRound("update", 1))
    certificate = certified(header_of(), missed, OTHERS)
    offer = job.CheckpointOffer("job", certificate, b"d" * 32, 9)
    (take,) = told(found, offer)
    assert isinstance(take, ask.TakeCheckpoint) and found.parts.catch_up.wants(certificate)
    assert told(found, offer) == [], "it is on its way"
    mac = certificate.state_mac
    effects = found.step(events.CheckpointReady(certificate, GROUP, mac, missed, b"file"), 0.0)
    assert found.state is missed and found.stage.standing.certificate == certificate.hash
    durable = [type(each) for each in only(DURABLE, effects)]
    assert durable == [PutValues, CloseRound] and only(ask.AdoptState, effects)[0].data == b"file"


def test_a_release_that_was_missed_is_not_measured_by_a_sum_that_was_opened_before():
    found, missed = played(State("after")).job, State("missed", PlannedRound("update", 2))
    told(found, messages.Abandon(header_of().digest, "release"))
    certificate = certified(header_of(2), missed, OTHERS)
    told(found, job.CheckpointOffer("job", certificate, b"d" * 32, 9))
    ready = events.CheckpointReady(certificate, GROUP, certificate.state_mac, missed, b"file")
    effects = found.step(ready, 0.0)
    assert found.state is missed and not only(ask.Track, effects)


def test_the_end_of_the_next_round_does_not_touch_one_whose_certificate_was_lost():
    """With keys that were sent ahead a site is on the next round's roster before it knows the release."""
    after = State("after", PlannedRound("update", 1))
    found = played(after)
    for message in (
        messages.Abandon(header_of(2).digest, "keys"),
        messages.Notice(header_of(2).digest, "b", b"x"),
    ):
        assert told(found.job, message) == []
    assert isinstance(found.job.stage, site.Stated)
    found.certificate(after)
    assert found.job.state is after and isinstance(found.job.stage, site.Idle)


def test_a_checkpoint_that_was_lost_is_taken_again():
    found = between_rounds()
    certificate = certified(header_of(), State("missed"), OTHERS)
    offer = job.CheckpointOffer("job", certificate, b"d" * 32, 9)
    told(found, offer)
    found.step(events.CheckpointLost(certificate), 0.0)
    assert not found.parts.catch_up.wants(certificate)
    assert len(only(ask.TakeCheckpoint, told(found, offer))) == 1


def test_nothing_is_fetched_for_a_certificate_that_proves_no_release():
    found = between_rounds()
    forged = replace(certified(header_of(), State("forged")), signatures=())
    effects = told(found, job.CheckpointOffer("job", forged, b"d" * 32, 9))
    assert not only(ask.TakeCheckpoint, effects) and "signers" in found.part.last_error


def test_a_state_is_sealed_only_for_the_release_that_it_is_of():
    found = played(State("after", PlannedRound("update", 1)))
    found.certificate(State("after", PlannedRound("update", 1)))
    here = found.job.stage.standing.certificate
    (seal,) = told(found.job, job.CheckpointWanted("job", here))
    assert isinstance(seal, ask.SealCheckpoint) and seal.group.to_bytes() == GROUP.to_bytes()
    assert told(found.job, job.CheckpointWanted("job", "0" * 64)) == []


def test_a_state_under_another_secret_is_not_the_certified_one():
    keeper, state = StateKeeper(), State("after")
    certificate = certified(header_of(), state)
    list(keeper.learn_group(1, GroupSecret(), installed=False))
    keeper.hold(certificate.hash, state, b"")
    with pytest.raises(ReleaseRefused, match="HMAC"):
        keeper.check(certificate)
    list(keeper.learn_group(1, GROUP, installed=False))
    with pytest.raises(ReleaseRefused, match="HMAC"):
        keeper.check(certificate)  # what is known already is not replaced by a checkpoint's
    list(keeper.learn_group(1, GROUP, installed=True))
    keeper.check(certificate)


def test_a_state_is_checked_under_the_secret_of_its_certificates_key_epoch():
    keeper, state = StateKeeper(), State("after")
    list(keeper.learn_group(1, GROUP, installed=True))
    list(keeper.learn_group(2, GroupSecret(), installed=True))
    for number in (1, 2):
        certificate = certified(header_of(epoch=number), state)  # under GROUP, whatever its epoch
        keeper.hold(certificate.hash, state, b"")
        if number == 1:
            keeper.check(certificate)
        else:
            with pytest.raises(ReleaseRefused, match="HMAC"):
                keeper.check(certificate)


def test_a_release_whose_state_is_gone_is_a_fault_of_the_disk():
    keeper = StateKeeper()
    with pytest.raises(StoreProblem, match="gone"):
        keeper.check(certified(header_of(), State("after")))


# ------------------------------------------------------------------------------- the end


ENDED = job.JobEnded("job", "finished", "")


def test_the_state_is_written_and_the_end_durable_before_the_rest_is_freed():
    found = between_rounds()
    effects = told(found, ENDED, at=1000.5)
    kinds = [type(each) for each in effects]
    assert kinds == [ask.StopMaking, ask.WriteState, EndJob, ask.Finish, ask.Report, Info]
    assert effects[2] == EndJob(ENDED, 1000) and found.ended == ENDED
    assert found.step(events.Connected(), 0.0) == [], "nothing is said of a job that is over"


def test_a_site_that_missed_the_last_release_takes_it_first():
    found, last = between_rounds(), State("last", PlannedRound("update", 1))
    certificate = certified(header_of(), last)
    effects = told(found, replace(ENDED, certificate=certificate.hash), at=10.0)
    assert found.ended is None and [type(each) for each in sent(effects)] == [job.SiteStatus]
    assert found.deadline(0.0) is not None, "it asks again, should the answer be lost"
    assert [type(each) for each in sent(found.step(site.Tick(), 9.0))] == [job.SiteStatus]
    ready = events.CheckpointReady(certificate, GROUP, certificate.state_mac, last, b"file")
    effects = found.step(ready, 0.0)
    assert found.ended is not None and found.state is last and only(ask.Finish, effects)


def test_keys_are_erased_after_the_grace_and_not_before():
    found = between_rounds()
    told(found, ENDED, at=1000.0)
    assert list(found.erase_keys(1049.0)) == [] and found.holds_keys
    assert [type(each) for each in found.erase_keys(1050.0)] == [ask.EraseKeys, Info]
    assert not found.holds_keys and found.parts.keys.secrets is None and not found.states.groups
    assert list(found.erase_keys(2000.0)) == []


def test_a_request_for_erased_keys_is_answered_by_that_word():
    found = between_rounds()
    told(found, ENDED, at=0.0)
    list(found.erase_keys(100.0))
    wanted = epoch.GrantRequest(SimpleNamespace(site="b"))
    assert sent(told(found, wanted)) == [job.KeysErased("job", "a", "b")]


def test_keys_that_the_disk_did_not_erase_are_not_erased_in_memory():
    """The runner does an effect before it asks for the next one: so it is tried again later."""
    found = between_rounds()
    told(found, ENDED, at=0.0)
    assert isinstance(next(found.erase_keys(100.0)), ask.EraseKeys)
    assert found.holds_keys


def test_a_model_is_given_after_the_last_round_where_plan_and_policy_say_so():
    masked = solve_packing(8, 4, "masked")
    plan = replace(PLAN, release="coordinator", protection="masked", packing=masked)
    policy = Policy()
    last = State("last", PlannedRound("update", plan.rounds))
    standing = SiteProgress(1, b"k" * 32, certificate="c" * 64)
    found = between_rounds(last, standing, plan, policy=policy)
    wanted = job.ModelWanted("job", "c" * 64, b"")
    assert told(found, wanted) == [ask.GiveModel("c" * 64, last, b"")]
    found.part.survey = None  # a new process
    assert len(only(ask.LoadRows, told(found, wanted))) == 1
    assert found.step(events.RowsLoaded(SURVEY), 0.0) == [ask.GiveModel("c" * 64, last, b"")]
    assert told(found, replace(wanted, certificate="d" * 64)) == [], "it stands elsewhere"
    policy.refuses = {"model"}
    assert not only(ask.GiveModel, told(found, wanted))
    early = between_rounds(State("early", PlannedRound("update", 1)), standing, plan)
    told(early, wanted)
    assert "before the last round" in early.part.last_error
    kept = between_rounds(last, standing)
    told(kept, wanted)
    assert "stays at the sites" in kept.part.last_error
