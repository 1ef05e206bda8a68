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
import contextlib
import json
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from fedcore_server.folding import FoldPool, JobFold
from fedcore_server.rows import METRICS_FILE, ROUNDS_FILE, Rows

from fedcore.config import Job, build_job, plan_of
from fedcore.errors import ChunkRefused, DataLost, FedcoreError, StoreFull, StoreProblem
from fedcore.files import write_atomic
from fedcore.runtime.mailbox import Mailbox
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.label import Terms
from fedcore.secagg.plan import ModelShape, RoundPlan
from fedcore.secagg.protocol import epoch, messages, schedule
from fedcore.secagg.protocol import job_messages as job
from fedcore.secagg.protocol.effects import RemoveMasks, Send, Warn
from fedcore.secagg.protocol.job.coordinator import events
from fedcore.secagg.protocol.job.coordinator.facts import (
    RUNNING,
    JobLog,
    KeptFile,
    Limits,
    Moment,
    Progress,
    SiteView,
)
from fedcore.secagg.protocol.job.coordinator.machine import JobMachine, Restored
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
from fedcore.secagg.protocol.wire_form import decode, encode
from fedcore.secagg.scheme import Scheme, vector_of
from fedcore.store import container
from fedcore.store.disk import refusals, sync_folder
from fedcore.store.journal import Journal
from fedcore.store.spool import Spool, Stored
from fedcore.types import SiteId
from fedcore.wire.limits import INLINE

LOG = logging.getLogger("fedcore.coordinator.job")
ROUND = "round"
MODEL_FILE = "model.safetensors"
_VECTOR, _SUM = "vector-", "sum-"
"""Small files of the round under way: in the journal with the record that relies on them, in one commit,
and so without a sync of their own. A power cut may take the file; the next start writes it again."""

_AGAIN = 2.0
"""Seconds before what found no room on the disk is tried again."""


class Links(Protocol):
    """The sessions as a job sees them."""

    def connected(self) -> Collection[SiteId]:
        """Sites with a session now, in roster order."""
        ...

    def say(self, site: SiteId, job: str, message: Any) -> None:
        """Send a record if the site has a session."""
        ...

    def push(self, site: SiteId, job: str, what: str, stored: Stored) -> None:
        """Send a small file beside the record that announces it."""
        ...


@dataclass(frozen=True)
class Quota:
    """What operators may ask of a coordinator. rounds, epochs: of one job. batch: rows of one step.

    queued: jobs that are not over; kept: jobs of one operator's certificates, over or not.
    """

    rounds: int = 10_000
    epochs: int = 1_000
    batch: int = 1 << 20
    queued: int = 100
    kept: int = 1_000


@dataclass(frozen=True)
class House:
    """What every job of a coordinator shares. clock: monotonic seconds; now: seconds since 1970."""

    federation: str
    pins: Mapping[SiteId, bytes]
    journal: Journal
    spool: Spool
    pool: FoldPool
    folder: Path
    limits: Limits
    quota: Quota = Quota()
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time


@dataclass(frozen=True)
class _Fault:
    """Background work raised; `run` decides what becomes of the job."""

    error: Exception


def _small_key(what: str, digest: bytes) -> str:
    return f"{what}{digest.hex()[:48]}"


def _small_file(what: str, stored: Stored | None) -> dict[str, bytes]:
    """What the journal keeps of a file that was not synced."""
    if stored is None or stored.travels > INLINE:
        return {}
    return {_small_key(what, stored.digest): stored.path.read_bytes()}


def _reason(fault: Exception) -> str:
    """One line for operators and sites on why a job failed."""
    if isinstance(fault, FedcoreError):
        return " ".join(str(fault).split())
    if isinstance(fault, OSError):
        return f"the coordinator's disk refused it ({fault.strerror or type(fault).__name__})"
    return "a fault of the coordinator; its own log says which"


class CoordinatedJob:
    """One job, run to its end by `run`."""

    def __init__(self, house: House, links: Links, offer: job.JobOffer) -> None:
        self.house, self.links, self.offer = house, links, offer
        self.submitter = ""
        """The operator who submitted it, by the name in the certificate."""
        self.on_change: Callable[[], None] = lambda: None
        self.machine = JobMachine(house.federation, offer, house.pins, house.limits)
        self.facts = self.machine.facts
        self._rounds_file = Rows(self.directory / ROUNDS_FILE, self.facts.rounds)
        self._metrics_file = Rows(self.directory / METRICS_FILE, self.facts.metrics)
        self._mailbox = Mailbox[events.Event | _Fault](events.TimePassed())
        self._fold: JobFold | None = None
        self._folding = b""
        """Header of the round that the fold is for."""
        self._uploads: dict[bytes, Stored] = {}
        """Whole uploads of the round under way, by digest."""
        self._sum: Stored | None = None
        self._checkpoint: Stored | None = None
        self._small: set[str] = set()
        """Keys of the journal with files of the round under way that came without a sync."""
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
    def outcome(self) -> job.JobEnded | None:
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
    def epoch(self) -> epoch.CoordinatorEpochStage:
        """The present key epoch."""
        return self.facts.epoch

    @property
    def step(self) -> schedule.PlannedRound | None:
        """The round under way or to come; None after the last one."""
        return self.facts.step

    @property
    def certificate(self) -> messages.Certificate | None:
        """Of the last release."""
        return self.facts.certificate

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
        path = self.house.folder / "jobs" / self.id
        path.mkdir(parents=True, exist_ok=True)
        return path

    # --------------------------------------------------------------------------- coming back

    @classmethod
    def stored(cls, house: House, links: Links, name: str) -> CoordinatedJob:
        """A job as the journal has it."""
        kept = house.journal.get(name, "offer")
        assert kept is not None
        found = cls(house, links, decode(kept, job.JobOffer))
        found.submitter = (house.journal.get(name, "submitter") or b"").decode()
        found._restore()
        return found

    def _restore(self) -> None:
        """What journal and spool have. Raises StoreProblem while the disk refuses."""
        journal, name, spool = self.house.journal, self.id, self.house.spool
        ended, about = journal.get(name, "ended"), journal.get(name, "plan")
        records = list(journal.read(name, ROUND))
        outcome = decode(ended, job.JobEnded) if ended is not None else None
        self.machine.restore(None if about is None else self._kept(about, records), outcome)
        if about is None:
            return
        for rows in (self._rounds_file, self._metrics_file):
            rows.make()
        self.machine.model.here = (self.directory / MODEL_FILE).exists()
        self._give_back_small()
        stage, self._sum, self._checkpoint = self.stage, None, None
        if self.certificate is not None:
            self._checkpoint = spool.find(name, self.machine.catch_up.name)
        if outcome is not None:
            self._discard_rounds()
        elif isinstance(stage, coordinator.InRound):
            self._folding = stage.header.digest
            if isinstance(stage, coordinator.Releasing):
                self._sum = spool.find(name, "sum", header=stage.header.digest)
        found = self._checkpoint
        self.machine.files_restored(
            None if found is None else KeptFile(found.digest, found.size),
            None if self._sum is None else self._sum.size,
            self._moment(), under_way=bool(records),
        )  # fmt: skip
        if outcome is None:
            self._tidy()

    def _kept(self, about: bytes, records: list[Any]) -> Restored:
        """What the journal has of a job with this plan and these records of a round under way."""
        journal, name, kept = self.house.journal, self.id, json.loads(about)
        plan, features = RoundPlan.from_json(kept["plan"]), kept["features"]

        def value(key: str, otherwise: Any) -> Any:
            found = journal.get(name, key)
            return otherwise if found is None else decode(found, object)

        return Restored(
            plan, features, self._sizes(plan, features), value("epoch", epoch.NoEpoch()),
            coordinator.replay(value("stage", coordinator.Ready()), records), value("step", None),
            value("certificate", None),
            frozenset(json.loads(journal.get(name, "withdrawn") or b"[]")),
            self._rounds_file.kept(journal, name), self._metrics_file.kept(journal, name),
        )  # fmt: skip

    @staticmethod
    def _sizes(plan: RoundPlan, features: int) -> dict[str, int]:
        scheme, purposes = Scheme(plan), schedule.PURPOSES[0 if features else 1 :]
        return {each: scheme.upload_bytes(_layout(plan, features, each)) for each in purposes}

    def _give_back_small(self) -> None:
        """Files that the journal has may be gone, or empty, after a power cut."""
        journal, name, stage = self.house.journal, self.id, self.stage
        self._small = {key for key in journal.keys(name) if key.startswith((_VECTOR, _SUM))}
        if not isinstance(stage, coordinator.InRound):
            return
        header = stage.header.digest
        for submit in getattr(stage, "submissions", ()):
            data = journal.get(name, _small_key(_VECTOR, submit.digest))
            if data is not None:
                self.house.spool.give_back(name, header, submit.site, data)
        for key in self._small:
            data = journal.get(name, key) if key.startswith(_SUM) else None
            if data is not None:
                chunks = container.from_bytes(data)
                self.house.spool.put(name, "sum", chunks, header=header, unsynced=INLINE)

    def _tidy(self) -> None:
        """Remove the spool's rounds that a crash kept from being removed."""
        keep = {self._folding} if self.facts.round is not None else set()
        if self.certificate is not None:  # a checkpoint on its way in
            keep.add(self.certificate.header.digest)
        for found in self.house.spool.rounds(self.id):
            if found not in keep:
                self.house.spool.discard(self.id, found)

    # ----------------------------------------------------------------------------- the queue

    def tell(self, site: SiteId, message: Any) -> None:
        """A record of a site."""
        self._put(events.MessageReceived(site, message))

    @property
    def backlog(self) -> int:
        """Events that wait."""
        return self._mailbox.backlog

    def arrived(self, site: SiteId, header: bytes, stored: Stored) -> None:
        """A whole upload of a site."""
        self._uploads[stored.digest] = stored
        self._put(events.UploadArrived(site, header, stored.digest, stored.size))

    def came(self, site: SiteId) -> None:
        """A site has a new session."""
        self._put(events.SiteConnected(site))

    def left(self, site: SiteId) -> None:
        """A site says that it stops: the round under way goes on without it."""
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
        found = self._sum if what == "sum" else self._checkpoint
        return found if found is not None and found.digest == digest else None

    def doing(self, site: SiteId, what: str) -> None:
        """What a site says it is at."""
        self.sites[site].doing = what
        self.sites[site].last_seen = self.house.now()
        self.on_change()

    def withdrawn(self, site: SiteId) -> None:
        """The certificate of a site was revoked: whoever has it may have what the site holds."""
        self._obey_all(self.machine.epochs.withdraw(site))

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
        fault: Exception | None = None
        while self.outcome is None:
            try:
                if fault is not None:
                    await self._recover(fault)
                fault = None
                if self.outcome is None:
                    await self._serve()
            except Exception as error:  # noqa: BLE001 - one policy for all of them: _recover
                fault = error
        self.on_change()

    async def _serve(self) -> None:
        try:
            await self.handle(events.Resumed())
            self._read_settings()
            while self.outcome is None:
                await self._mailbox.turn(self.handle, self._wait)
                await self.handle(events.Advance())
                self.on_change()
        finally:
            await self._mailbox.close()
            if self._fold is not None:
                with contextlib.suppress(FedcoreError):
                    await self._fold.end()

    def _wait(self) -> float:
        """Seconds until something is due by itself; never more than a second, for people who watch."""
        return self.machine.due - self.house.clock()

    async def _recover(self, fault: Exception) -> None:
        """Read everything from disk again after a pause, or fail the job: see `run`.

        Raises what the disk refused this time.
        """
        now = self.house.clock()
        if self._refused_since is None:
            self._refused_since = now
        late = now - self._refused_since > self.facts.limits.stage
        if isinstance(fault, StoreFull) and not isinstance(self.stage, coordinator.Summing):
            late = False
        if self._stopped is not None:
            await self._end_surely(self._stopped.outcome, self._stopped.text)
        elif late or not isinstance(fault, StoreProblem | OSError):
            LOG.error("job %s: ended by a fault of this side", self.id, exc_info=fault)
            await self._end_surely("failed", _reason(fault))
        else:
            LOG.error("job %s: %s", self.id, fault)
            self.progress.text = _reason(fault)
            self.on_change()
            await asyncio.sleep(_AGAIN)
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
                await asyncio.sleep(_AGAIN)

    # --------------------------------------------------------------------------- the effects

    def _moment(self) -> Moment:
        return Moment(self.house.clock(), self.house.now(), self.links.connected())

    def _step(self, event: events.Event) -> list[CoordinatorJobEffect]:
        before = type(self.stage)
        found = self.machine.step(event, self._moment())
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
                    await self.handle(await self._folded(site, self._uploads[digest]))
                case KeepModel(digest=digest):
                    await asyncio.to_thread(self._keep_model, self._uploads[digest])
                    await self.handle(events.ModelKept())
                case _:
                    self._obey(effect)

    def _feed(self, event: events.Event) -> None:
        """An event that asks for nothing that takes long."""
        self._obey_all(self._step(event))

    def _obey_all(self, effects: list[CoordinatorJobEffect]) -> None:
        for effect in effects:
            self._obey(effect)

    def _obey(self, effect: CoordinatorJobEffect) -> None:
        journal, spool, name = self.house.journal, self.house.spool, self.id
        match effect:
            case PutValues(values):
                journal.append(name, ROUND, (), put=values)
            case AppendRecords():
                self._append(effect)
            case CloseRound(values):
                # Nothing of it is secret here, so it need not be gone from free pages.
                journal.trim(name, ROUND, put=values, forget=sorted(self._small))
                self._small = set()
                self._uploads.clear()
            case EndJob(ended):
                self._end(ended)
            case Send(to=to, message=message):
                self.links.say(SiteId(to), name, message)
            case Push(to, what):
                stored = self._sum if what == "sum" else self._checkpoint
                if stored is not None:
                    self.links.push(to, name, what, stored)
            case OpenFold(header):
                self._open_fold(header.digest, header.round, header.purpose)
            case RemoveMasks():
                self._mailbox.background(self._make_sum(effect), _Fault)
            case FailSum(header, seconds):
                self._fail_sum(header.round, seconds)
            case DiscardUploads(None):
                self._discard_after_end()
            case DiscardUploads(header=bytes() as under):
                spool.discard(name, under)
            case KeepCheckpoint():
                self._keep_checkpoint(effect)
            case DropCheckpoint(file):
                spool.remove(name, file)
                self._checkpoint = None
            case MakePlan(shape):
                self._feed(self._make_plan(shape))
            case KeepMetrics(row):
                self._keep_metrics(dict(row))
            case ShowRound():
                self._rounds_file.show()
            case Warn(text=text):
                LOG.warning("job %s: %s", name, text)
            case Info(text):
                LOG.info("job %s: %s", name, text)

    def _append(self, effect: AppendRecords) -> None:
        put: dict[str, bytes] = {}
        for digest in effect.vectors:
            put |= _small_file(_VECTOR, self._uploads.get(digest))
        if effect.with_sum:
            put |= _small_file(_SUM, self._sum)
        self.house.journal.append(self.id, ROUND, effect.records, put=put)
        self._small |= put.keys()

    def _end(self, ended: job.JobEnded) -> None:
        kept = {"ended": encode(ended)}
        self.house.journal.compact(self.id, ROUND, put=kept, forget=sorted(self._small))
        self._small = set()
        self._uploads.clear()
        self.facts.outcome = ended
        self.progress.state, self.progress.text = ended.outcome, ended.text
        self.progress.waiting_for, self.progress.waiting_until = (), None
        LOG.info("job %s: %s %s", self.id, ended.outcome, ended.text)

    def _discard_after_end(self) -> None:
        try:
            self._discard_rounds()
        except StoreProblem as error:  # the job is over all the same; the next process removes them
            LOG.warning("job %s: %s", self.id, error)

    def _discard_rounds(self) -> None:
        for found in self.house.spool.rounds(self.id):
            self.house.spool.discard(self.id, found)

    # ------------------------------------------------------------------------------ the plan

    @cached_property
    def _settings(self) -> Job:
        """The job as it was submitted, built once."""
        return build_job(json.loads(self.offer.settings))

    def _read_settings(self) -> None:
        if self.facts.threshold or self.outcome is not None:
            return
        try:
            self.facts.threshold = Terms.of_job(self._settings, tuple(self.house.pins)).threshold
        except FedcoreError as error:  # the roster is another one than when the job was submitted
            self._feed(events.PlanImpossible(str(error)))

    def _make_plan(self, shape: ModelShape) -> events.Event:
        try:
            cap = self._settings.protect.max_examples
            assert cap is not None
            plan = plan_of(self._settings, shape, tuple(self.house.pins), cap)
        except FedcoreError as error:
            return events.PlanImpossible(str(error))
        return events.PlanMade(plan, shape.features, self._sizes(plan, shape.features))

    # ------------------------------------------------------------------------- uploads, sums

    def _open_fold(self, header: bytes, number: int, purpose: str) -> None:
        assert self.plan is not None
        if header != self._folding:
            self._folding, self._sum = header, None
        slots = _layout(self.plan, self.facts.features, purpose).slots
        self._fold = self.house.pool.job(f"{self.id}-{number}", self.plan.packing, slots)

    async def _folded(self, site: SiteId, stored: Stored) -> events.Event:
        assert self._fold is not None
        try:
            await self._fold.add(stored.path)
        except ChunkRefused as error:
            return events.FoldRefused(site, str(error))
        return events.Folded(site)

    async def _make_sum(self, asked: RemoveMasks) -> events.Event:
        assert self._fold is not None
        header = asked.header.digest
        while True:
            try:
                self._sum = await self._fold.total(
                    self._files(asked), asked.masks,
                    lambda chunks: self.house.spool.put(
                        self.id, "sum", chunks, header=header, unsynced=INLINE
                    ),
                )  # fmt: skip
            except StoreFull as error:  # room may come back, and nothing of the round is lost
                LOG.warning("job %s: %s", self.id, error)
                self.progress.text = str(error)
                if self.machine.rounds.summing_late(self._moment()):
                    raise
                await asyncio.sleep(_AGAIN)
            else:
                return events.SumMade(header, self._sum.digest, self._sum.size)

    def _files(self, asked: RemoveMasks) -> list[Path]:
        """The files of a sum, small ones given back from the journal. Raises DataLost for one that is gone."""
        found = self.house.spool.complete(self.id, asked.header.digest)
        if not found.keys() >= set(asked.survivors):
            self._give_back_small()
            found = self.house.spool.complete(self.id, asked.header.digest)
        for name in asked.survivors:
            if name not in found:
                raise DataLost(
                    f"spool: found the vector of site {name} gone, expected it until its round is over",
                    remedy="check the disk; the spool is the coordinator's own, nothing else may remove files",
                )
        return [found[name] for name in asked.survivors]

    def _fail_sum(self, number: int, seconds: float) -> None:
        if self._fold is not None:
            self._fold.give_up()
        raise DataLost(
            f"sum of round {number}: found none after {seconds:.0f} s, expected it within the limit of a stage",
            remedy="look at the disk and the fold workers, and raise limits.stage_seconds if they are slow",
        )

    def _keep_checkpoint(self, effect: KeepCheckpoint) -> None:
        spool, header = self.house.spool, effect.header
        path = spool.uploaded(self.id, header, effect.site, effect.digest)
        if path is None:
            return
        self._checkpoint = found = spool.put(self.id, effect.name, container.read(path))
        spool.discard(self.id, header)
        self._feed(events.CheckpointKept(found.digest, found.size))

    def _keep_model(self, stored: Stored) -> None:
        path = self.directory / MODEL_FILE
        with refusals("model", path):
            write_atomic(path, container.read(stored.path))
            sync_folder(path.parent)

    def _keep_metrics(self, row: dict[str, Any]) -> None:
        reference = self._settings.track.reference
        if reference is not None:
            row["reference"] = reference.against(row["metrics"])
        rows = self.facts.metrics
        self.house.journal.append(self.id, ROUND, (), put=rows.entry(row))
        rows.known.append(row)
        self._metrics_file.show()
        self.on_change()


def _layout(plan: RoundPlan, features: int, purpose: str) -> Layout:
    return Layout(vector_of(plan, features, purpose), plan.packing, len(plan.sites))
