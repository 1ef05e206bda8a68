"""The runner of one job at the coordinator: it feeds the job's machine with events and obeys its effects.

What happens in a job is decided by `fedcore/secagg/protocol/job/coordinator`; here are queue, clock,
journal, spool, fold pool and links. Every event goes through one queue and is handled to its end before the
next. Invariant (PROTOCOL D): effects are obeyed in order, so what a step records is in the journal before
anything that relies on it is sent; an upload counts once it is whole, checked and folded, and stays in the
spool until the round is over, so after a restart the sum is made again from exactly the uploads the journal
lists.

The coordinator learns here who takes part, how large things are and how long they take; no vector is
opened and no model is seen under `layered` and `encrypted`, unless the plan gives it the last one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedcore_server.context import CoordinatorContext, Links
from fedcore_server.job_disk import JobDisk
from fedcore_server.job_plan import JobPlan, layout_of, vector_sizes
from fedcore_server.job_sum import JobSum

from fedcore.errors import FedcoreError, StoreFull, StoreProblem
from fedcore.runtime.driver import keep_serving
from fedcore.runtime.mailbox import Mailbox
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol import job_messages, schedule
from fedcore.secagg.protocol.effects import RemoveMasks, Send, Warn
from fedcore.secagg.protocol.job.coordinator import events
from fedcore.secagg.protocol.job.coordinator.facts import (
    RUNNING,
    JobLog,
    KeptFile,
    Moment,
    Progress,
    SiteView,
)
from fedcore.secagg.protocol.job.coordinator.machine import JobMachine
from fedcore.secagg.protocol.job.effects import (
    AppendRecords,
    CloseRound,
    CoordinatorJobEffect,
    DiscardUploads,
    DropCheckpoint,
    EndJob,
    FailSum,
    Info,
    KeepCheckpoint,
    KeepMetrics,
    KeepModel,
    MakePlan,
    OpenFold,
    Push,
    PutValues,
    ShowRound,
    StartFold,
)
from fedcore.secagg.protocol.round import coordinator
from fedcore.secagg.protocol.wire_form import decode
from fedcore.store import container
from fedcore.store.spool import Stored
from fedcore.types import SiteId

LOG = logging.getLogger("fedcore.coordinator.job")


@dataclass(frozen=True)
class _Fault:
    """Background work raised; `run` decides what becomes of the job."""

    error: Exception


def _reason(fault: Exception) -> str:
    """One line for operators and sites on why a job failed."""
    if isinstance(fault, FedcoreError):
        return " ".join(str(fault).split())
    if isinstance(fault, OSError):
        return f"the coordinator's disk refused it ({fault.strerror or type(fault).__name__})"
    return "a fault of the coordinator; its own log says which"


class JobRunner:
    """One job, run to its end by `run`."""

    def __init__(
        self, context: CoordinatorContext, links: Links, offer: job_messages.JobOffer
    ) -> None:
        self.context, self.links, self.offer = context, links, offer
        self.submitter = ""
        """The operator who submitted it, by the name in the certificate."""
        self.on_change: Callable[[], None] = lambda: None
        self.machine = JobMachine(context.federation, offer, context.pins, context.limits)
        self.facts = self.machine.facts
        self.disk = JobDisk(context.journal, context.spool, self.directory, self.facts)
        self._mailbox = Mailbox[events.Event | _Fault](events.TimePassed())
        self._sum = JobSum(context.pool, self.disk, context.retry_seconds)
        self._plan = JobPlan(offer, context.pins)
        self._stopped: events.StopRequested | None = None
        """An operator's request, which counts while the disk refuses too."""
        self._refused_since: float | None = None
        """Clock seconds of the first refusal of the disk since the round last went on."""

    # ---------------------------------------------------------------------- what people see

    @property
    def id(self) -> str:
        """The job's name."""
        return self.offer.job

    @property
    def outcome(self) -> job_messages.JobEnded | None:
        """How the job ended, once that is on disk."""
        return self.facts.outcome

    @property
    def plan(self) -> RoundPlan | None:
        """The plan, once there is one."""
        return self.facts.plan

    @property
    def stage(self) -> coordinator.CoordinatorStage:
        """Of the round under way, or of the last one."""
        return self.facts.stage

    @property
    def step(self) -> schedule.PlannedRound | None:
        """The round under way or to come; None after the last one."""
        return self.facts.step

    @property
    def sites(self) -> dict[SiteId, SiteView]:
        """What is known of each site."""
        return self.facts.sites

    @property
    def progress(self) -> Progress:
        """What the job is at."""
        return self.facts.progress

    @property
    def rounds(self) -> JobLog:
        """One row a round."""
        return self.facts.rounds

    @property
    def metrics(self) -> JobLog:
        """One row a release whose metrics are public."""
        return self.facts.metrics

    @property
    def has_model(self) -> bool:
        """Whether the model that the plan gives to the coordinator is among the job's files."""
        return self.machine.model.here

    @property
    def directory(self) -> Path:
        """Where people find this job's files."""
        path = self.context.folder / "jobs" / self.id
        path.mkdir(parents=True, exist_ok=True)
        return path

    # --------------------------------------------------------------------------- coming back

    @classmethod
    def stored(cls, context: CoordinatorContext, links: Links, name: str) -> JobRunner:
        """A job as the journal has it."""
        kept = context.journal.get(name, "offer")
        assert kept is not None
        found = cls(context, links, decode(kept, job_messages.JobOffer))
        found.submitter = (context.journal.get(name, "submitter") or b"").decode()
        found._restore()
        return found

    def _restore(self) -> None:
        """What is on disk. Raises StoreProblem while the disk refuses."""
        planned, outcome = self.disk.plan(), self.disk.outcome()
        if planned is None:
            self.machine.restore(None, outcome)
            return
        found = self.disk.restored(*planned, vector_sizes(*planned))
        self.machine.restore(found, outcome)
        self.disk.settle(self.machine.catch_up.name)
        self.machine.files_restored(
            _kept(self.disk.checkpoint), _kept(self.disk.sum), self.moment(),
            model=self.disk.has_model, restarted=found.restarted,
        )  # fmt: skip

    # ----------------------------------------------------------------------------- the queue

    def tell(self, site: SiteId, message: job_messages.ToCoordinator) -> None:
        """A record of a site."""
        self._put(events.MessageReceived(site, message))

    @property
    def backlog(self) -> int:
        """Events that wait."""
        return self._mailbox.backlog

    def arrived(self, site: SiteId, header: bytes, stored: Stored) -> None:
        """A whole upload of a site."""
        self.disk.uploads[stored.digest] = stored
        self._put(events.UploadArrived(site, header, stored.digest, stored.size))

    def came(self, site: SiteId) -> None:
        """A site has a new session."""
        self._put(events.SiteConnected(site))

    def left(self, site: SiteId) -> None:
        """A site announced that it stops: the round under way goes on without it."""
        self._put(events.SiteLeft(site))

    def _put(self, event: events.SiteEvent) -> None:
        if self.outcome is None:
            self._mailbox.put(event)
            return
        try:
            self._feed(event)
        except FedcoreError as error:
            LOG.warning("job %s: %s", self.id, error)

    def asks_for_grants(self, site: SiteId) -> bool:
        """Whether this site was asked to make the epoch's payload: only then is its message long."""
        return self.machine.epochs.asks_for_grants(site)

    def expects(self, name: SiteId, header: bytes, size: int) -> bool:
        """Whether an upload of this site for this round may come in: nothing else is spooled."""
        return self.machine.expects(name, header, size, container.overhead(1 + size // 1024))

    def download(self, what: str, digest: bytes) -> Stored | None:
        """What a site may download now."""
        found = self.disk.kept(what)
        return found if found is not None and found.digest == digest else None

    def doing(self, site: SiteId, what: str) -> None:
        """What a site reports to be doing."""
        self.sites[site].doing = what
        self.sites[site].last_seen = self.context.now()
        self.on_change()

    def withdrawn(self, site: SiteId) -> None:
        """The certificate of a site was revoked: whoever has it may have what the site holds."""
        self.obey_all(self.machine.epochs.withdraw(site))

    def stop(self, text: str) -> None:
        """End the job at an operator's request."""
        self._stopped = events.StopRequested(text)
        self._mailbox.put(self._stopped)

    def end(self, outcome: str, text: str) -> None:
        """End the job now; raises StoreProblem where the disk refuses its end."""
        self._feed(events.StopRequested(text, outcome))

    async def run(self) -> None:
        """Run the job to its end. Never raises an Exception: the queue behind the job goes on.

        One policy for every fault, of the queue and of background work. Where the disk refuses
        (StoreProblem, OSError), everything is read from it again, as a new process would, and goes on.
        Anything else, and a disk that refuses the same stage for longer than a stage may take, fails the
        job with a one-line reason. A disk that is only full is waited for, except while a sum is made.
        """
        self.progress.state = RUNNING
        fault = await keep_serving(
            self._serve, tolerates=self._tolerates, restore=self._read_again,
            retry_seconds=self.context.retry_seconds,
        )  # fmt: skip
        if self._stopped is not None:
            await self._end_surely(self._stopped.outcome, self._stopped.text)
        elif fault is not None:
            LOG.error("job %s: ended by a fault of this side", self.id, exc_info=fault)
            await self._end_surely("failed", _reason(fault))
        self.on_change()

    async def _serve(self) -> None:
        if self.outcome is not None:  # its end was on disk already
            return
        try:
            await self.handle(events.Resumed())
            if not self.facts.threshold and self.outcome is None:
                self._read_threshold()
            while self.outcome is None:
                await self._mailbox.turn(self.handle, self._wait)
                await self.handle(events.Advance())
                self.on_change()
        finally:
            await self._mailbox.close()
            await self._sum.end()

    def _read_threshold(self) -> None:
        try:
            self.facts.threshold = self._plan.threshold()
        except FedcoreError as error:  # the roster is another one than when the job was submitted
            self._feed(events.PlanImpossible(str(error)))

    def _wait(self) -> float:
        """Seconds until something is due by itself; never more than a second, for people who watch."""
        return self.machine.due - self.context.clock()

    def _tolerates(self, fault: Exception) -> bool:
        """Whether the job is read from disk again after a pause: see `run`."""
        now = self.context.clock()
        if self._refused_since is None:
            self._refused_since = now
        late = now - self._refused_since > self.facts.limits.stage
        if isinstance(fault, StoreFull) and not isinstance(self.stage, coordinator.Summing):
            late = False
        if self._stopped is not None or late or not isinstance(fault, StoreProblem | OSError):
            return False
        LOG.error("job %s: %s", self.id, fault)
        self.progress.text = _reason(fault)
        self.on_change()
        return True

    def _read_again(self) -> None:
        self._restore()
        self.machine.forget_standing()

    async def _end_surely(self, outcome: str, text: str) -> None:
        """End the job, as soon as the disk takes its end."""
        while self.outcome is None:
            try:
                self.end(outcome, text)
            except Exception:
                LOG.exception("job %s: its end cannot be written; trying again", self.id)
                self.progress.text = text
                self.on_change()
                await asyncio.sleep(self.context.retry_seconds)

    # --------------------------------------------------------------------------- the effects

    def moment(self) -> Moment:
        """The present one: clock, time of day, connected sites."""
        return Moment(self.context.clock(), self.context.now(), self.links.connected())

    def _step(self, event: events.Event) -> list[CoordinatorJobEffect]:
        before = type(self.stage)
        found = self.machine.step(event, self.moment())
        if type(self.stage) is not before:
            self._refused_since = None
        return found

    async def handle(self, event: events.Event | _Fault) -> None:
        """One event, to its end. Raises what the disk refuses."""
        if isinstance(event, _Fault):
            raise event.error
        for effect in self._step(event):
            match effect:
                case StartFold(site, digest):
                    await self.handle(await self._sum.add(site, digest))
                case KeepModel(digest=digest):
                    await asyncio.to_thread(self.disk.keep_model, digest)
                    await self.handle(events.ModelKept())
                case _:
                    self.obey(effect)

    def _feed(self, event: events.Event) -> None:
        """An event that asks for nothing that takes long."""
        self.obey_all(self._step(event))

    def obey_all(self, effects: list[CoordinatorJobEffect]) -> None:
        """Obey them in order. Raises what the disk refuses; the rest is then not obeyed."""
        for effect in effects:
            self.obey(effect)

    def obey(self, effect: CoordinatorJobEffect) -> None:
        """Do one thing that the machine asks for. Raises what the disk refuses."""
        disk, name = self.disk, self.id
        match effect:
            case PutValues(values):
                disk.put(values)
            case AppendRecords():
                disk.append(effect)
            case CloseRound(values):
                disk.close_round(values)
            case EndJob(ended):
                disk.end(ended)
                self.machine.ended(ended)
                LOG.info("job %s: %s %s", name, ended.outcome, ended.text)
            case Send(to=to, message=message):
                self.links.say(SiteId(to), name, message)
            case Push(to, what):
                stored = disk.kept(what)
                if stored is not None:
                    self.links.push(to, name, what, stored)
            case OpenFold(header):
                assert self.plan is not None
                slots = layout_of(self.plan, self.facts.features, header.purpose).slots
                self._sum.open(header, self.plan.packing, slots)
            case RemoveMasks():
                rounds = self.machine.rounds
                made = self._sum.make(
                    effect, lambda: rounds.summing_late(self.moment()), self._wait_for_room
                )
                self._mailbox.background(made, _Fault)
            case FailSum(header, seconds):
                self._sum.give_up(header.round, seconds)
            case DiscardUploads(under):
                disk.discard(under)
            case KeepCheckpoint():
                kept = disk.keep_checkpoint(effect)
                if kept is not None:
                    self._feed(events.CheckpointKept(kept.digest, kept.size))
            case DropCheckpoint(file):
                disk.drop_checkpoint(file)
            case MakePlan(shape):
                self._feed(self._plan.made(shape))
            case KeepMetrics(row):
                disk.keep_metrics(self._plan.compared(row))
                self.on_change()
            case ShowRound():
                disk.show_round()
            case Warn(text=text):
                LOG.warning("job %s: %s", name, text)
            case Info(text):
                LOG.info("job %s: %s", name, text)

    def _wait_for_room(self, why: str) -> None:
        LOG.warning("job %s: %s", self.id, why)
        self.progress.text = why


def _kept(stored: Stored | None) -> KeptFile | None:
    return None if stored is None else KeptFile(stored.digest, stored.size)
