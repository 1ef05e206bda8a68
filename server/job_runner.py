"""Runs one job at the coordinator: events go to the job's machine, and its effects are carried out.

What happens in a job is decided by `fedcore/secagg/protocol/job/coordinator`; here are queue, clock,
journal, spool, fold pool and links. Every event goes through one queue and is handled to its end before the
next. Invariant (PROTOCOL D): effects are carried out in order, so what a step records is in the journal before
anything that relies on it is sent; an upload counts once it is complete, checked and folded, and stays in the
spool until the round is over, so after a restart the sum is made again from exactly the uploads in the journal.

The coordinator sees the names of the sites, sizes and times; under `layered` and `encrypted` it opens no vector
and no model, except the last one where the plan gives it that.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

from fedcore_server.announced_sums import AnnouncedSums
from fedcore_server.context import CoordinatorContext
from fedcore_server.folding import JobSum
from fedcore_server.job_disk import JobDisk
from fedcore_server.sealed_models import SealedModels
from fedcore_server.sessions import Sessions

from fedcore.audit.round_facts import release
from fedcore.config import Job, build_job, plan_of
from fedcore.errors import FedcoreError, LeaseLost, StoreFull, StoreProblem
from fedcore.identity.roster import ROSTER_KEY, PinnedRoster
from fedcore.results import MetricsRow, ReferenceGap
from fedcore.runtime.mailbox import Mailbox, keep_serving
from fedcore.secagg.label import Terms
from fedcore.secagg.plan import ModelShape
from fedcore.secagg.protocol import job_messages, messages
from fedcore.secagg.protocol.effects import RemoveMasks, Send, Warn
from fedcore.secagg.protocol.job import effects
from fedcore.secagg.protocol.job.coordinator import events
from fedcore.secagg.protocol.job.coordinator.facts import RUNNING, JobFacts, KeptFile, Moment
from fedcore.secagg.protocol.job.coordinator.machine import JobMachine
from fedcore.secagg.protocol.job.effects import CoordinatorJobEffect
from fedcore.secagg.protocol.round import coordinator
from fedcore.secagg.protocol.wire_form import decode
from fedcore.secagg.scheme import layout_of, vector_sizes
from fedcore.store import container
from fedcore.store.spool import Stored
from fedcore.types import SiteId
from fedcore.wire.frames import SUM, JobRoster

LOG = logging.getLogger("fedcore.coordinator.job")
_BEGAN = "began"
"""The key of the journal that a job has once it left the queue."""


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


class JobPlan:
    """The settings of one job, for these pinned sites."""

    def __init__(self, offer: job_messages.JobOffer, sites: Collection[SiteId]) -> None:
        self._offer, self._sites = offer, tuple(sites)

    @cached_property
    def _settings(self) -> Job:
        """As they were submitted, built once."""
        return build_job(json.loads(self._offer.settings))

    def threshold(self) -> int:
        """t. Raises FedcoreError where the roster is another one than when the job was submitted."""
        return Terms.of_job(self._settings, self._sites, calibrated=False).threshold

    def made(self, shape: ModelShape) -> events.PlanMade | events.StopRequested:
        """The plan for the shape that most sites found; the end of the job where there is none."""
        try:
            cap = self._settings.protect.max_examples
            assert cap is not None
            plan = plan_of(self._settings, shape, self._sites, cap)
        except FedcoreError as error:
            return events.StopRequested(str(error), "failed")
        return events.PlanMade(plan, shape.features, vector_sizes(plan, shape.features))

    def compared(self, row: MetricsRow) -> MetricsRow:
        """A row of public metrics, with the gap to the job's reference value if it has one."""
        reference = self._settings.track.reference
        if reference is None:
            return row
        return replace(row, reference=ReferenceGap(**reference.against(row.metrics)))


class JobRunner:
    """One job, run to its end by `run`."""

    def __init__(
        self,
        context: CoordinatorContext,
        links: Sessions,
        offer: job_messages.JobOffer,
        submitter: str = "",
        roster: PinnedRoster | None = None,
    ) -> None:
        self.context, self.links, self.offer, self.id = context, links, offer, offer.job
        self.submitter = submitter
        """Name of the operator that submitted it, from the certificate."""
        self.directory = context.folder / "jobs" / self.id
        """Folder of the job's files for people."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.on_change: Callable[[], None] = lambda: None
        self.on_begin: Callable[[JobRunner], None] = lambda _: None
        """Called before sites are offered the job; its roster is fixed then."""
        self.mailbox = Mailbox[events.Event | _Fault](events.TimePassed())
        self._stop: events.StopRequested | None = None
        """An operator's request; it counts while the disk refuses, too."""
        self._refused_since: float | None = None
        """Clock seconds of the first refusal of the disk since the round last went on."""
        self._pin(roster or context.rosters.current)

    def _pin(self, roster: PinnedRoster) -> None:
        """Fix the job's roster: what the federation's roster becomes later is for other jobs."""
        context, self.roster = self.context, roster
        facts = JobFacts(context.federation, self.offer, roster.sites, context.limits)
        self.machine, self.facts = JobMachine(facts), facts
        sealed = SealedModels(context.sealer)
        self.disk = JobDisk(context.journal, context.spool, self.directory, facts, sealed)
        self._sum = JobSum(context.pool, self.disk, context.retry_seconds)
        self.announced = AnnouncedSums()
        self._plan = JobPlan(self.offer, roster.sites)

    @property
    def job_roster(self) -> JobRoster:
        """For the job's sites, before the offer."""
        return JobRoster(self.id, self.roster.number, self.roster.digest)

    def _begin(self) -> None:
        """A job that waited in the queue begins with the newest roster, for sites take no older one; from then on it
        keeps it. Raises what the disk refuses."""
        newest, journal = self.context.rosters.current, self.context.journal
        if journal.get(self.id, _BEGAN) is not None or self.facts.plan is not None:
            return
        if (newest.number, newest.digest) != (self.roster.number, self.roster.digest):
            LOG.info("job %s: begins with the roster that is the newest by now", self.id)
            self._pin(newest)
        self.disk.put({ROSTER_KEY: self.roster.to_bytes(), _BEGAN: b"1"})

    @classmethod
    def stored(cls, context: CoordinatorContext, links: Sessions, name: str) -> JobRunner:
        """A job as the journal has it."""
        get = partial(context.journal.get, name)
        kept, submitter, roster = get("offer"), get("submitter") or b"", get(ROSTER_KEY)
        assert kept is not None
        offer = decode(kept, job_messages.JobOffer)
        pinned = None if roster is None else PinnedRoster.from_bytes(roster)
        found = cls(context, links, offer, submitter.decode(), pinned)
        found._restore()
        return found

    def _restore(self) -> None:
        """Read the job from disk. Raises StoreProblem while the disk refuses."""
        restarted, disk = self.disk.load(), self.disk
        self.announced.over()
        self.machine.restored(
            _kept(disk.checkpoint), _kept(disk.sum), self.moment(),
            model=disk.has_model, restarted=restarted, lost=disk.lost,
        )  # fmt: skip

    def put(self, event: events.SiteEvent) -> None:
        """Queue an event of a site; a job that is over handles it at once. A site that is not on the job's roster
        has no part in it."""
        if event.site not in self.facts.sites:
            return
        if self.facts.outcome is None:
            self.mailbox.put(event)
            return
        try:
            self._feed(event)
        except FedcoreError as error:
            LOG.warning("job %s: %s", self.id, error)

    def arrived(self, site: SiteId, header: bytes, stored: Stored) -> None:
        """A complete upload of a site."""
        self.disk.uploads[stored.digest] = stored
        self.put(events.UploadArrived(site, header, KeptFile(stored.digest, stored.size)))

    def expects(self, name: SiteId, header: bytes, size: int) -> bool:
        """Whether an upload of this site for this round may come in: nothing else is spooled."""
        return self.machine.expects(name, header, size, container.overhead(1 + size // 1024))

    def download(self, name: SiteId, what: str, digest: bytes) -> Stored | None:
        """What a site of the job may download now."""
        found = self.disk.kept(what) if name in self.facts.sites else None
        return found if found is not None and found.digest == digest else None

    def in_round(self, site: SiteId, header: bytes) -> bool:
        """Whether the round with this header is under way, and the site in it."""
        stage = self.facts.round
        return stage is not None and stage.header.digest == header and site in stage.header.roster

    def doing(self, site: SiteId, what: str) -> None:
        """What a site reports to be doing."""
        view = self.facts.sites.get(site)
        if view is None:
            return
        view.doing, view.last_seen = what, self.context.now()
        self.on_change()

    def withdrawn(self, site: SiteId) -> None:
        """The certificate of a site was revoked: the next round has new keys. Raises what the disk refuses."""
        before = self.facts.withdrawn
        if site not in self.facts.sites:
            return
        try:
            self.perform_all(self.machine.epochs.withdraw(site))
        except Exception:
            self.facts.withdrawn = before  # as on disk
            raise

    def stop(self, text: str) -> None:
        """End the running job at an operator's request."""
        self._stop = events.StopRequested(text)
        self.mailbox.put(self._stop)

    def end(self, outcome: str, text: str) -> None:
        """End the job now. Raises StoreProblem where the disk refuses its end."""
        self._feed(events.StopRequested(text, outcome))

    async def run(self) -> None:
        """Run the job to its end. Raises LeaseLost only, so the next job in the queue runs.

        One policy for every fault, of the queue and of background work. Where the disk refuses
        (StoreProblem, OSError), everything is read from it again, as a new process would, and the job continues.
        Anything else, and a disk that refuses the same stage for longer than a stage may take, fails the
        job with a one-line reason. A full disk is waited for, except while a sum is made.
        """
        self.facts.progress.state = RUNNING
        fault = await keep_serving(
            self._serve, tolerates=self._tolerates, restore=self._restore,
            retry_seconds=self.context.retry_seconds,
        )  # fmt: skip
        if isinstance(fault, LeaseLost):  # the job is another coordinator's now
            raise fault
        if self._stop is not None:
            await self._end_surely(self._stop.outcome, self._stop.text)
        elif fault is not None:
            LOG.error("job %s: ended by an internal error", self.id, exc_info=fault)
            await self._end_surely("failed", _reason(fault))
        self.on_change()

    async def _serve(self) -> None:
        if self.facts.outcome is not None:  # its end was on disk already
            return
        self._begin()
        self.on_begin(self)
        try:
            await self.handle(events.Resumed())
            if not self.facts.threshold and self.facts.outcome is None:
                try:
                    self.facts.threshold = self._plan.threshold()
                except FedcoreError as error:  # the roster has changed since the job was submitted
                    self.end("failed", str(error))
            while self.facts.outcome is None:
                await self.mailbox.turn(
                    self.handle, lambda: self.machine.due - self.context.clock()
                )
                await self.handle(events.Advance())
                self.on_change()
        finally:
            self.announced.over()
            await self.mailbox.close()
            await self._sum.end()

    def _tolerates(self, fault: Exception) -> bool:
        """Whether the job is read from disk again after a pause: see `run`."""
        now = self.context.clock()
        if self._refused_since is None:
            self._refused_since = now
        late = now - self._refused_since > self.facts.limits.stage
        if isinstance(fault, StoreFull) and not isinstance(self.facts.stage, coordinator.Summing):
            late = False
        if self._stop is not None or late or not isinstance(fault, StoreProblem | OSError):
            return False
        LOG.error("job %s: %s", self.id, fault)
        self.facts.progress.text = _reason(fault)
        self.on_change()
        return True

    async def _end_surely(self, outcome: str, text: str) -> None:
        """End the job; retry until the disk takes its end."""
        while self.facts.outcome is None:
            try:
                self.end(outcome, text)
            except LeaseLost:
                raise
            except Exception:
                LOG.exception("job %s: its end cannot be written; retrying", self.id)
                self.facts.progress.text = text
                self.on_change()
                await asyncio.sleep(self.context.retry_seconds)

    def moment(self) -> Moment:
        """Now: clock, time of day, connected sites of the job's roster, in its order."""
        there = self.links.connected()
        here = dict.fromkeys(name for name in self.roster.sites if name in there)
        return Moment(self.context.clock(), self.context.now(), here)

    def _step(self, event: events.Event) -> list[CoordinatorJobEffect]:
        before = type(self.facts.stage)
        found = self.machine.step(event, self.moment())
        if type(self.facts.stage) is not before:
            self._refused_since = None
        return found

    async def handle(self, event: events.Event | _Fault) -> None:
        """One event, to its end. Raises what the disk refuses."""
        if isinstance(event, _Fault):
            raise event.error
        for effect in self._step(event):
            match effect:
                case effects.StartFold(site, digest):
                    await self.handle(await self._sum.add(site, digest))
                case effects.KeepModel(digest=digest):
                    await asyncio.to_thread(self.disk.keep_model, digest)
                    await self.handle(events.ModelKept())
                case _:
                    self.perform(effect)

    def _feed(self, event: events.Event) -> None:
        """Handle an event whose effects are quick."""
        self.perform_all(self._step(event))

    def perform_all(self, found: list[CoordinatorJobEffect]) -> None:
        """Carry them out in order. Raises what the disk refuses, and leaves the rest."""
        for effect in found:
            self.perform(effect)

    def _record_release(self, values: Mapping[str, bytes]) -> None:
        """Record the release that ended a round, if one did. Raises StoreProblem."""
        if "certificate" in values:
            found = decode(values["certificate"], messages.Certificate)
            self.context.audit.record("released", job=self.id, **release(found))

    def perform(self, effect: CoordinatorJobEffect) -> None:
        """Carry out one effect. Raises what the disk refuses."""
        disk, name = self.disk, self.id
        match effect:
            case effects.PutValues(values):
                disk.put(values)
            case effects.AppendRecords():
                disk.append(effect)
            case effects.CloseRound(values):
                self._record_release(values)
                disk.close_round(values)
                self.announced.over()
            case effects.EndJob(ended):
                about = {"outcome": ended.outcome, "text": ended.text}
                self.context.audit.record("ended", job=name, **about)
                disk.end(ended)
                self.announced.over()
                self.machine.ended(ended)
                LOG.info("job %s: %s %s", name, ended.outcome, ended.text)
            case Send(to=to, message=message):
                self.links.say(SiteId(to), name, message)
            case effects.Push(to, what):
                stored, under_way = disk.kept(what), self.facts.round
                if stored is not None:
                    self.links.push(to, name, what, stored)
                if what == SUM and under_way is not None:
                    self.announced.announce(to, under_way.header.digest, stored)
            case effects.OpenFold(header):
                plan = self.facts.plan
                assert plan is not None
                slots = layout_of(plan, self.facts.features, header.purpose).slots
                self._sum.open(header, plan.packing, slots)
            case RemoveMasks():
                late, show = self.machine.rounds.summing_late, self._show
                made = self._sum.make(effect, lambda: late(self.moment()), show)
                self.mailbox.background(made, _Fault)
            case effects.FailSum(header, seconds):
                self._sum.give_up(header.round, seconds)
            case effects.DiscardUploads(under):
                disk.discard(under)
            case effects.KeepCheckpoint():
                kept = disk.keep_checkpoint(effect)
                if kept is not None:
                    self._feed(events.CheckpointKept(kept))
            case effects.DropCheckpoint(file):
                disk.drop_checkpoint(file)
            case effects.MakePlan(shape):
                self._feed(self._plan.made(shape))
            case effects.KeepMetrics(row):
                disk.keep_metrics(self._plan.compared(row))
                self.on_change()
            case effects.ShowRound():
                disk.show_round()
            case Warn(text=text):
                LOG.warning("job %s: %s", name, text)
            case effects.Info(text):
                LOG.info("job %s: %s", name, text)

    def _show(self, text: str) -> None:
        """Show and log a problem that is retried."""
        LOG.warning("job %s: %s", self.id, text)
        self.facts.progress.text = text


def _kept(stored: Stored | None) -> KeptFile | None:
    return None if stored is None else KeptFile(stored.digest, stored.size)
