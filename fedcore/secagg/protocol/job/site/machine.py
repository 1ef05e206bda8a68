"""A whole job at a site, from its offer to its end: `step(event, now) -> effects`, without input or output.

The parts are in the modules beside this one, and only `step` changes them. Computing, waiting, reading and sending
are effects, and their results come back as events. A process that is killed continues from what the effects
before that left on disk, or leaves the round.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fedcore.errors import BadInput, FedcoreError, GuardTripped, PeerRefused, PolicyRefused, Refused
from fedcore.learning.state import JobState
from fedcore.secagg.plan import RoundPlan, canonical
from fedcore.secagg.protocol import epoch, job_messages, messages
from fedcore.secagg.protocol.job import effects
from fedcore.secagg.protocol.job.effects import SiteEffect, SiteEffects
from fedcore.secagg.protocol.job.site import events, participation
from fedcore.secagg.protocol.job.site.epochs import EpochDriver
from fedcore.secagg.protocol.job.site.participation import Agreed, Participation, require
from fedcore.secagg.protocol.job.site.release import CatchUp, PublicRelease
from fedcore.secagg.protocol.job.site.rounds import NOWHERE, RoundDriver
from fedcore.secagg.protocol.job.site.states import StateKeeper
from fedcore.secagg.protocol.messages import COORDINATOR
from fedcore.secagg.protocol.moves import Restarted, Tick
from fedcore.secagg.protocol.round import site

_NEED_ROWS = effects.MakeVector, effects.GiveModel
"""Effects that wait until the rows are loaded."""

LOAD_AGAIN_SECONDS, LONGEST_LOAD_PAUSE = 5.0, 300.0
"""Pauses before a task or rows that could not be loaded are tried again: a share may be away for a moment. Each is
twice the one before."""

ENDING_SECONDS = 5.0
"""How often a site asks again for the last release of a job that is over, if it missed it."""


@dataclass(frozen=True)
class Kept:
    """What the journal has of a job whose plan this site agreed to. stage: after all records of the round."""

    agreed: Agreed
    rows: str
    stage: site.SiteStage
    state: JobState
    certificate: messages.Certificate | None
    epoch: epoch.SiteEpochStage
    groups: dict[str, str]
    marks: tuple[bytes, dict[str, int]]
    left: str


@dataclass
class JobEnd:
    """How a job ended here. at: seconds since 1970. pending: an end that waits for the last release, and when the
    coordinator announced it."""

    ended: job_messages.JobEnded | None = None
    at: float = 0.0
    pending: tuple[job_messages.JobEnded, float] | None = None


class Parts:
    """The parts of a job that exist once this site agreed to its plan."""

    def __init__(self, agreed: Agreed, part: Participation, states: StateKeeper) -> None:
        self.agreed, self.keys = agreed, participation.HeldKeys(part.me.planner.scheme(agreed.plan))
        self.rounds = RoundDriver(agreed, part, self.keys, states)
        self.epochs = EpochDriver(self.rounds, self.keys, states)
        self.catch_up = CatchUp(self.rounds, states)
        self.public = PublicRelease(self.rounds, states)


class SiteJob:
    """One job at one site."""

    def __init__(self, offer: job_messages.JobOffer, part: Participation) -> None:
        self.me, self.offer, self.id, self.part = part.me, offer, offer.job, part
        self.states = StateKeeper()
        self.parts: Parts | None = None
        self.end = JobEnd()
        self.loading = False
        self._need_rows: list[effects.MakeVector | effects.GiveModel] = []
        self._load_failures = 0
        self._load_at: float | None = None
        """Clock seconds at which a task or rows that could not be loaded are tried again."""

    def restored(self, kept: Kept) -> None:
        self.part.rows, self.part.left = kept.rows, kept.left
        parts = self.parts = Parts(kept.agreed, self.part, self.states)
        self.states.current, self.states.certificate = kept.state, kept.certificate
        self.states.groups = kept.groups
        parts.rounds.stage, parts.rounds.marks = kept.stage, kept.marks
        parts.epochs.restored(kept.epoch)

    @property
    def plan(self) -> RoundPlan | None:
        return None if self.parts is None else self.parts.agreed.plan

    @property
    def state(self) -> JobState | None:
        return self.states.current

    @property
    def stage(self) -> site.SiteStage:
        return NOWHERE if self.parts is None else self.parts.rounds.stage

    @property
    def in_round(self) -> bool:
        return self.parts is not None and self.parts.rounds.in_round

    @property
    def ended(self) -> job_messages.JobEnded | None:
        return self.end.ended

    @property
    def holds_keys(self) -> bool:
        return self.parts is not None and isinstance(self.parts.epochs.stage, epoch.Holding)

    def deadline(self, now: float) -> float | None:
        """Seconds until the next `Tick`; 0: now, None: not before another event."""
        until = getattr(self.stage, "until", self._load_at)
        if until is None:
            return None if self.end.pending is None else ENDING_SECONDS
        left = float(until) - now
        return max(0.0, left)

    def step(self, event: events.SiteEvent, now: float) -> list[SiteEffect]:
        """The effects of one event. now: seconds of a monotonic clock.

        A refused message is logged; the effects before the refusal stay. Raises only faults of this side.
        """
        found: list[SiteEffect] = []
        try:
            for effect in self._handled(event, now):
                found.append(effect)  # noqa: PERF402 - the effects before an error stay
        except (PeerRefused, Refused, BadInput) as error:
            if isinstance(event, events.Started):
                raise
            found.extend(self.part.show(participation.problem_of(error), str(error)))
        return found

    def _handled(self, event: events.SiteEvent, now: float) -> SiteEffects:
        """What follows from an event; vectors and models wait until the rows are loaded."""
        for effect in self._answered(event, now):
            if isinstance(effect, effects.StopMaking):
                self._need_rows = [e for e in self._need_rows if isinstance(e, effects.GiveModel)]
            if self.part.survey is None and isinstance(effect, _NEED_ROWS):
                self._need_rows.append(effect)
            else:
                yield effect
        if self._need_rows:
            yield from self._load(now)
        if self.parts is not None and self.parts.rounds.ended:
            self.parts.rounds.ended = False
            if self.end.pending is not None:
                yield from self._ended(*self.end.pending, now)

    def _answered(self, event: events.SiteEvent, now: float) -> SiteEffects:
        match event:
            case events.Started() if self.ended is None:
                yield from self._started(now)
            case events.Connected() if self.ended is None:
                yield from self._reconnected(now)
            case events.MessageReceived(message, at):
                yield from self._received(message, at, now)
            case events.Approved() | events.RowsLoaded() | events.LoadFailed() if not self.ended:
                yield from self._loaded(event, now)
            case events.PolicyChanged(minimum) if self.ended is None:
                yield from self._policy_changed(minimum, now)
            case events.WorkFailed():
                yield from self._failed(event, now)
            case Tick() if self._load_at is not None and now >= self._load_at and not self.ended:
                self._load_at = None
                yield from self._load(now)
            case _ if self.parts is not None:
                yield from self._with_plan(self.parts, event, now)

    def _with_plan(self, parts: Parts, event: events.SiteEvent, now: float) -> SiteEffects:
        match event:
            case Tick():
                if self.end.pending is not None:  # the last state, or its request, was lost
                    yield from parts.rounds.send_status()
                yield from parts.rounds.step(event, now)
            case events.VectorReady() | events.CheckedSum() | events.SumGone():
                if parts.rounds.is_round(event.header):
                    yield from parts.rounds.work_done(event, now)
            case events.CheckpointReady():
                yield from parts.catch_up.taken(event, now)
            case events.CheckpointLost(certificate, problem):
                if problem:
                    yield from self.part.show(problem)
                parts.catch_up.lost(certificate)
            case events.Tracked():
                yield from parts.public.measured(event)
            case epoch.SecretsMade():
                yield from parts.epochs.step(event, now)

    def _failed(self, event: events.WorkFailed, now: float) -> SiteEffects:
        if event.problem:
            yield from self.part.show(event.problem)
        if isinstance(event.error, GuardTripped):
            yield effects.PutValues({"left": str(event.error).encode()})
            self.part.left = str(event.error)
        if self.parts is not None and self.parts.rounds.is_round(event.header):
            yield from self.parts.rounds.work_done(event, now)
        if event.word:
            yield from self.part.unable(event.word)

    def _load(self, now: float) -> SiteEffects:
        """Load task and rows, unless they are loaded or loading: the policy is asked before a row is read, and
        then the operator, where the policy says so."""
        if self.part.survey is not None or self.loading:
            return
        self.loading = True
        if (error := self._not_allowed()) is not None:
            yield from self._loaded(events.LoadFailed(error, job_messages.UNABLE), now)
            return
        for line in self.part.about():
            yield effects.Info(f"job {self.id}: {line}")
        if self.part.approval == "waiting":
            yield effects.AwaitApproval()
        else:
            yield effects.Report("loading")
            yield effects.LoadRows(self.plan)

    def _not_allowed(self) -> BadInput | PolicyRefused | None:
        """Why the policy in force refuses the offer, or the plan that this site agreed to."""
        try:
            require(self.me.policy.on_offer(self.offer))
            if self.plan is not None:
                require(self.me.policy.on_plan(self.plan))
        except (BadInput, PolicyRefused) as error:
            self.part.barred = isinstance(error, PolicyRefused)
            return error
        self.part.barred = False
        return None

    def _policy_changed(self, minimum: int, now: float) -> SiteEffects:
        """Leave the job that the new rules refuse, or take part again in one that they allow.

        A round whose sum may be known already is brought to its end: nothing more of the rows leaves with it.
        """
        self.me = self.part.me = replace(self.me, minimum=minimum)
        parts, was = self.parts, self.part.barred
        if parts is not None:
            parts.rounds.base_member = replace(parts.rounds.base_member, minimum=minimum)
        error = self._not_allowed()
        if isinstance(error, PolicyRefused):
            exposed = parts is not None and isinstance(parts.rounds.stage, site.EXPOSED)
            if parts is not None and parts.rounds.in_round and not exposed:
                sealed = parts.rounds.sealed(events.WITHHELD)
                yield from parts.rounds.step(site.CheckFailed(error, sealed), now)
            yield from self.part.refuse(error)
        elif error is None and was and not self.part.left:
            self.part.refused, self.part.last_error = None, ""
            yield effects.Info(f"job {self.id}: the policy allows it now")
            yield from self._rejoined(now)

    def _rejoined(self, now: float) -> SiteEffects:
        if self.parts is not None:
            yield from self._load(now)
            yield from self._resend(self.parts, now)
        elif self.part.survey is not None:
            yield from self.part.send_survey()
        else:
            yield from self._load(now)

    def _loaded(
        self, event: events.Approved | events.RowsLoaded | events.LoadFailed, now: float
    ) -> SiteEffects:
        if isinstance(event, events.Approved):
            self.part.approval = "approved"
            if self.part.barred:
                self.loading = False
                return
            yield effects.Info(f"job {self.id}: approved")
            yield effects.Report("loading")
            yield effects.LoadRows(self.plan)
            return
        self.loading = False
        need, self._need_rows = self._need_rows, []
        if isinstance(event, events.RowsLoaded):
            try:
                self.part.take_rows(event.found)
            except FedcoreError as error:
                event = events.LoadFailed(error, job_messages.UNABLE)
        if isinstance(event, events.LoadFailed):
            yield from self._not_loaded(event, need, now)
            return
        if self.parts is None and not self.part.barred:
            yield from self.part.send_survey()
        if not need:
            yield effects.Report("idle" if self.parts is None else "waiting")
        yield from need

    def _not_loaded(
        self, event: events.LoadFailed, need: Iterable[SiteEffect], now: float
    ) -> SiteEffects:
        """Leave the round that waits for a vector, and tell the coordinator; a model is asked for again.

        Without a plan they are loaded again after a pause, which grows; with one at the next vector or model.
        """
        waited = self.parts is None
        for each in need:
            if isinstance(each, effects.MakeVector):
                waited = True
                yield from self._failed(
                    events.WorkFailed(each.header.digest, event.error, events.WITHHELD), now
                )
        if isinstance(event.error, FedcoreError) or not waited:
            yield from self.part.note(event.error)
        if waited and not isinstance(event.error, PolicyRefused):
            yield from self.part.unable(event.word)
            if self.parts is None and event.word == job_messages.UNABLE:
                self._load_at = now + min(
                    LOAD_AGAIN_SECONDS * 2**self._load_failures, LONGEST_LOAD_PAUSE
                )
                self._load_failures += 1

    def _started(self, now: float) -> SiteEffects:
        if self.parts is None:
            yield from self._load(now)
            return
        yield self.parts.rounds.tidy()
        yield from self.parts.rounds.step(Restarted(), now)
        yield from self.parts.epochs.install_held(now)
        if self.part.left:
            yield from self.part.unable(job_messages.UNABLE)
        else:
            yield from self.parts.epochs.step(epoch.Again(), now)
            yield from self._load(now)

    def _reconnected(self, now: float) -> SiteEffects:
        if self.part.refused is not None:
            yield from self.part.unable(self.part.refused.word)
            self.part.last_error = str(self.part.refused)
        elif self.part.left:
            yield from self.part.unable(job_messages.UNABLE)
        elif self.parts is not None:
            yield from self._resend(self.parts, now)
        elif self.part.survey is not None:
            yield from self.part.send_survey()

    def _resend(self, parts: Parts, now: float) -> SiteEffects:
        """Resend what the coordinator may not have received, or may have lost."""
        yield self._agreement(parts)
        yield from parts.epochs.step(epoch.Again(), now)
        if isinstance(parts.rounds.stage, site.Idle | site.Halted):
            yield from parts.rounds.step(site.SessionRestored(), now)
            yield from parts.rounds.resend_status()
        else:
            header = parts.rounds.stage.header.digest
            yield effects.Send(COORDINATOR, job_messages.InRound(self.id, self.me.id, header))
            yield from parts.rounds.step(site.SessionRestored(), now)
        yield from parts.public.resend()

    def _agreement(self, parts: Parts) -> effects.Send[job_messages.ToCoordinator]:
        agreed = job_messages.PlanAgreed(self.id, self.me.id, parts.agreed.plan.digest)
        return effects.Send(COORDINATOR, agreed)

    def _received(self, message: job_messages.ToSite, at: float, now: float) -> SiteEffects:
        parts = self.parts
        match message:
            case job_messages.JobEnded():
                yield from self._ended(message, at, now)
            case epoch.GrantRequest() if self.ended is not None and not self.holds_keys:
                erased = job_messages.KeysErased(self.id, self.me.id, message.key.site)
                yield effects.Send(COORDINATOR, erased)
            case _ if self.part.out and not (parts is not None and parts.rounds.in_round):
                if parts is not None and isinstance(message, messages.Announce):
                    yield from parts.rounds.step(site.Declined(message.header), now)
            case job_messages.JobOffer():
                pass  # resent after a new session
            case job_messages.PlanOffer() if parts is None:
                yield from self._planned(message)
            case _ if parts is not None:
                yield from self._received_with_plan(parts, message, now)
            case _:
                pass  # still loading: the coordinator resends it after this site agreed to a plan

    def _received_with_plan(
        self, parts: Parts, message: job_messages.ToSite, now: float
    ) -> SiteEffects:
        assert not isinstance(message, job_messages.JobEnded | job_messages.JobOffer)
        match message:
            case job_messages.PlanOffer():  # the coordinator lost what it was told: its disk failed
                yield from self._resend(parts, now)
            case job_messages.CheckpointWanted():
                yield from parts.catch_up.seal(message)
            case job_messages.CheckpointOffer():
                yield from parts.rounds.check_own_signature(message.certificate, now)
                yield from parts.catch_up.offered(message)
            case job_messages.ModelWanted():
                yield from parts.public.give(message, over=self.ended is not None)
            case messages.Certificate():
                yield from parts.rounds.check_own_signature(message, now)
                yield from parts.rounds.certified(message, now)
            case epoch.EpochCall() | epoch.EpochKeys() | epoch.Granted() | epoch.GrantRequest():
                yield from parts.epochs.step(epoch.FromCoordinator(message), now)
            case messages.Announce():
                yield from parts.rounds.invited(message, now)
            case messages.Abandon() | messages.Notice() | messages.NextBundle() if (
                parts.rounds.in_another(message.header)
            ):
                pass  # of the next round, which begins with keys sent ahead: this one's certificate was lost
            case _:
                yield from parts.rounds.step(site.MessageFromCoordinator(message), now)

    def _planned(self, offered: job_messages.PlanOffer) -> SiteEffects:
        """Make the plan here, and agree only if the offered one is the same."""
        survey, planner = self.part.survey, self.me.planner
        if survey is None:
            return  # still loading: the coordinator resends it
        mine = planner.plan(self.offer, survey)
        if canonical(mine.to_json()) != offered.plan:
            yield effects.Warn(
                f"job {self.id}: found another plan at the coordinator than this site makes of its offer "
                f"and its task{_but_initial(mine, offered.plan)}; it takes no part"
            )
            yield from self.part.unable(job_messages.UNABLE)
            return
        if (refusal := self.me.policy.on_plan(mine)) is not None:
            yield from self.part.refuse(refusal)
            return
        agreed = Agreed(mine, survey.shape.features, survey.columns)
        parts = self.parts = Parts(agreed, self.part, self.states)
        self.states.current = planner.first_state(mine, survey)
        yield effects.WriteState(self.states.current)
        about = {
            "plan": mine.to_json(), "features": parts.agreed.features, "rows": self.part.rows,
            "columns": [list(column) for column in parts.agreed.columns],
        }  # fmt: skip
        yield effects.PutValues({"plan": canonical(about)})
        if mine.public_metrics:
            yield effects.Info(
                f"job {self.id}: the coordinator will learn the metrics of each release, over all its sites"
            )
        if mine.release == "coordinator":
            yield effects.Info(
                f"job {self.id}: the coordinator will be given the model of the last round"
            )
        yield self._agreement(parts)

    def _ended(self, ended: job_messages.JobEnded, at: float, now: float) -> SiteEffects:
        """End the job: the state stays, everything of its rounds is removed.

        A site that missed the last release sends its status and catches up first. One that refused a release cannot.
        """
        self.end.pending = self._load_at = None
        parts = self.parts
        if parts is not None:
            if parts.rounds.in_round:
                yield from parts.rounds.step(site.Superseded(), now)
                parts.rounds.ended = False
            behind = parts.rounds.standing.certificate != ended.certificate
            stays = self.part.left or isinstance(parts.rounds.stage, site.Halted)
            # It takes no model it left for, or refused.
            if ended.certificate and behind and not stays:
                self.part.ending = True
                self.end.pending = ended, at
                yield from parts.rounds.send_status()
                return
        yield effects.StopMaking()
        if self.states.current is not None:
            yield effects.WriteState(self.states.current)  # fsync: nothing rewrites this file later
        yield effects.EndJob(ended, int(at))
        self.end = JobEnd(ended, at)
        yield effects.Finish()
        yield effects.Report("idle")
        yield effects.Info(f"job {self.id}: {ended.outcome} {ended.text}")
        yield from self.erase_keys(at)

    def erase_keys(self, at: float) -> SiteEffects:
        """Erase the secrets of the key epochs of a job that ended for longer than the site's grace.

        at: seconds since 1970. No file has them afterwards (PROTOCOL V). Within the grace nothing is done.
        """
        over = self.ended is not None and at >= self.end.at + self.me.keep_keys
        if over and self.parts is not None:
            yield from self.parts.epochs.erase()


def _but_initial(mine: RoundPlan, offered: bytes) -> str:
    """What to add where another plan differs in the initial model only."""
    if not mine.model.initial:
        return ""
    whole = canonical(mine.to_json())
    before, _, after = whole.partition(mine.model.initial.encode())
    if len(offered) != len(whole) or not (offered.startswith(before) and offered.endswith(after)):
        return ""
    return (
        ": its initial model is another one (hint: task.model must give the same values at every site, frozen "
        "parameters and buffers too: the same files, and draws from torch's or NumPy's global generators)"
    )
