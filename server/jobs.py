"""One job at the coordinator: from its offer to its last round, by the protocol's machines.

Every event goes through one queue and is handled to its end before the next. Invariant (PROTOCOL D):
what a step records is in the journal before anything of that step is sent; an upload counts once it is
whole, checked and folded ahead, and stays in the spool until the round is over, so after a restart the
sum is made again from exactly the uploads the journal lists.

The coordinator learns here who takes part, how large things are and how long they take; no vector is
opened and no model is seen under `layered` and `encrypted`, unless the plan gives it the last one
(`handover.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from fedcore_server.folding import FoldPool, JobFold
from fedcore_server.handover import HandOver
from fedcore_server.rows import METRICS_FILE, ROUNDS_FILE, Rows

from fedcore.config import Job, build_job, plan_of
from fedcore.errors import (
    ChunkRefused,
    DataLost,
    FedcoreError,
    OutOfOrder,
    PeerRefused,
    StoreFull,
    StoreProblem,
)
from fedcore.secagg.crypto.identity_key import roster_digest
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.label import Terms
from fedcore.secagg.plan import ModelShape, RoundHeader, RoundPlan, canonical
from fedcore.secagg.protocol import effects, epoch, messages, public_metrics, schedule
from fedcore.secagg.protocol import job_messages as job
from fedcore.secagg.protocol.round import coordinator
from fedcore.secagg.protocol.wire_form import decode, encode
from fedcore.secagg.scheme import Scheme, vector_of
from fedcore.store import container
from fedcore.store.journal import Journal
from fedcore.store.spool import Spool, Stored
from fedcore.types import Json, SiteId
from fedcore.wire.limits import INLINE

LOG = logging.getLogger("fedcore.coordinator.job")
ROUND = "round"
_VECTOR, _SUM = "vector-", "sum-"
"""Small files of the round under way: in the journal with the record that relies on them, in one commit,
and so without a sync of their own. A power cut may take the file; the next start writes it again."""

MOST_AHEAD = 1 << 20
"""Rounds that a site may have seen and this journal not: it was restored from a backup."""

TICK = 1.0
"""Seconds between looks at the clock."""

_AGAIN = 2.0
"""Seconds before what got no answer, or found no room on the disk, is tried again."""

_MOST_STATE, _MOST_REST = 64, 1 << 24
"""Bytes of a sealed state: for each parameter, and for all the rest."""

MOST_TRIES = 12
"""Times in a row that a step without which nothing can follow may be abandoned. Only rounds of which no
sum can be known are tried again: any other is released, or the job ends (PROTOCOL H)."""

KEYS_ERASED = (
    "the sites have erased the keys of this job, so its last model cannot be fetched any more"
)
"""For a site that comes back later than the others keep a job's keys: it stays at the state it has."""

SHAPE_DIFFERS = "another model or other columns than most sites"
"""What this coordinator finds where a site's survey differs: not a word of the site's."""

WAITING, RUNNING = "waiting", "running"
"""States of a job besides job.OUTCOMES: in the queue, and under way."""

_ROUND_STAGES = (*coordinator.Waiting.__args__, coordinator.Summing)
"""Stages of a round under way."""


class Links(Protocol):
    """The sessions as a job sees them."""

    def connected(self) -> Collection[SiteId]:
        """Sites with a session now."""
        ...

    def say(self, site: SiteId, job: str, message: Any) -> None:
        """Send a record if the site has a session."""
        ...

    def push(self, site: SiteId, job: str, what: str, stored: Stored) -> None:
        """Send a small file beside the record that announces it."""
        ...


@dataclass(frozen=True)
class Limits:
    """How long a job waits, and for how many. Seconds; sites.

    stage: for the sites at one stage of a round. gather: for absent sites before a round begins without
    them. grace: for a site that lost its connection during a round; shorter than that it goes on where
    it stood. enough: while fewer sites are there than a round needs; then the job ends. vectors:
    over-selection: so many of a round (and at least its threshold) end the wait for more; 0 for all.
    """

    stage: float = 600.0
    gather: float = 60.0
    minimum: int = 3
    grace: float = 60.0
    enough: float = 86_400.0
    vectors: int = 0


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


# ------------------------------------------------------------------------------------ events


@dataclass(frozen=True)
class _Told:
    site: SiteId
    message: Any


@dataclass(frozen=True)
class _Arrived:
    """An upload is whole and its digest is the one in its name."""

    site: SiteId
    header: bytes
    stored: Stored


@dataclass(frozen=True)
class _Came:
    """A site has a new session."""

    site: SiteId


@dataclass(frozen=True)
class _Left:
    """A site said that it stops."""

    site: SiteId


@dataclass(frozen=True)
class _Done:
    """Work beside the queue ended."""

    event: Any
    header: bytes


@dataclass(frozen=True)
class _Fault:
    """Background work raised; `run` decides what becomes of the job."""

    error: Exception


@dataclass(frozen=True)
class _Stop:
    text: str
    outcome: str = "stopped"


@dataclass
class SiteView:
    """What is known of a site in this job, for scheduling and for people."""

    shape: ModelShape | None = None
    unable: str = ""
    agreed: bool = False
    anew: bool = False
    """It agreed before and surveys again: its journal is gone, and the epoch's secret with it."""
    rest: job.SiteStatus | None = None
    doing: str = ""
    last_seen: float = 0.0
    missed: bool = False
    """A round began without it; nobody waits for it again before it comes."""
    away_since: float | None = None
    """Clock seconds at which its connection was found lost."""


@dataclass
class Progress:
    """For `watch`: what the job is at."""

    state: str = WAITING
    text: str = ""
    waiting_for: tuple[SiteId, ...] = ()
    waiting_until: float | None = None


_FROM_DISK = (
    "_small", "plan", "features", "epoch", "stage", "step", "certificate", "outcome", "_scheme", "_sum", "_submits",
    "_arrived", "_begun", "_stage_since", "_stage_seconds", "_checkpoint", "_asked_checkpoint",
    "_withdrawn",
)  # fmt: skip
"""What a job knows from the journal and the spool."""


_OF_A_ROUND = (
    messages.Keys, messages.Shares, messages.Submit, messages.Confirm, messages.Unmask,
    messages.Statement, job.InRound,
)  # fmt: skip
"""What only a site in a round says."""


_NO_OTHER_SUM = "; its sum may be known, so no other may be taken from the same state"


def _names(sites: Collection[SiteId]) -> str:
    return f"{'site' if len(sites) == 1 else 'sites'} {', '.join(sites)}"


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
        self.id = offer.job
        self.submitter = ""
        """The operator who submitted it, by the name in the certificate."""
        self.plan: RoundPlan | None = None
        self.threshold = 0
        """t, once the job's settings were read."""
        self.features = 0
        self.sites = {name: SiteView() for name in house.pins}
        self.progress = Progress()
        self.rounds = Rows(house.journal, self.id, self.directory, ROUNDS_FILE)
        self.metrics = Rows(house.journal, self.id, self.directory, METRICS_FILE)
        self.epoch: Any = epoch.NoEpoch()
        self.stage: Any = coordinator.Ready()
        self.step: schedule.PlannedRound | None = None
        self.certificate: messages.Certificate | None = None
        self.outcome: job.JobEnded | None = None
        self.on_change: Callable[[], None] = lambda: None
        self._scheme: Scheme | None = None
        self._fold: JobFold | None = None
        self._sum: Stored | None = None
        self._submits: dict[SiteId, messages.Submit] = {}
        self._arrived: dict[SiteId, Stored] = {}
        self._begun = self._stage_since = 0.0
        self._stage_seconds: dict[str, float] = {}
        self._checkpoint: Stored | None = None
        self._asked_checkpoint: SiteId | None = None
        self._asked_at = 0.0
        self._offered: dict[SiteId, job.SiteStatus] = {}
        self._gathering: float | None = None
        self._tick_at = 0.0
        self._nudged_at = 0.0
        self._finishing: float | None = None
        self._hearing: public_metrics.Hearing | None = None
        self._handing: HandOver | None = None
        self._restarted = False
        self._epoch_refused = False
        self._erased: set[SiteId] = set()
        """Holders of the last key epoch that have erased it since the job ended."""
        self._short_since: float | None = None
        """Clock seconds since which a round that has to be released lacks sites."""
        self.evicted: AbstractSet[str] = frozenset()
        """Sites that an operator sent away, as the coordinator has it: no grant is asked for them."""
        self._withdrawn: set[SiteId] = set()
        """Sites whose certificate was revoked under the present key epoch."""
        self._stopped: _Stop | None = None
        """An operator's word, which counts while the disk refuses too."""
        self._refused_since: float | None = None
        """Clock seconds of the first refusal of the disk since the round last went on."""
        self._summing: tuple[bytes, float] = b"", 0.0
        """Header of the sum under way, and the clock seconds at which making it began."""
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._due: list[Any] = []
        """Effects of the steps taken since the last commit."""
        self._put: dict[str, bytes] = {}
        self._small: set[str] = set()
        """Keys of the journal with files of the round under way that came without a sync."""
        self._beside: set[asyncio.Task[None]] = set()
        self._hub = coordinator.CoordinatorParams(
            dict(house.pins), house.limits.stage, house.limits.vectors
        )
        self._epoch_hub = epoch.EpochParams(dict(house.pins), house.limits.gather)

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
        journal, name = self.house.journal, self.id
        ended = journal.get(name, "ended")
        if ended is not None:
            self.outcome = decode(ended, job.JobEnded)
            self.progress.state, self.progress.text = self.outcome.outcome, self.outcome.text
        about = journal.get(name, "plan")
        if about is None:
            return
        kept = json.loads(about)
        self._adopt(RoundPlan.from_json(kept["plan"]), kept["features"])
        for key, target in (("epoch", "epoch"), ("stage", "stage"), ("step", "step")):
            value = journal.get(name, key)
            if value is not None:
                setattr(self, target, decode(value, object))
        self._withdrawn = set(json.loads(journal.get(name, "withdrawn") or b"[]"))
        certificate = journal.get(name, "certificate")
        if certificate is not None:
            self.certificate = decode(certificate, messages.Certificate)
        self.rounds.restore()
        self.metrics.restore()
        self._hear_of(self.certificate)
        records = list(journal.read(name, ROUND))
        self.stage = coordinator.replay(self.stage, records)
        self._give_back_small()
        if self.outcome is not None:
            self._checkpoint = self._kept_checkpoint()
            self._discard_rounds()
            return
        self._restarted = bool(records)
        if isinstance(self.stage, coordinator.Releasing):
            digest = self.stage.header.digest
            self._sum = self.house.spool.find(self.id, "sum", header=digest)
        self._begun = self._stage_since = self.house.clock()
        self._checkpoint = self._kept_checkpoint()
        self._tidy()

    def _give_back_small(self) -> None:
        """Files that the journal has may be gone, or empty, after a power cut."""
        journal, name, stage = self.house.journal, self.id, self.stage
        self._small = {key for key in journal.keys(name) if key.startswith((_VECTOR, _SUM))}
        if not isinstance(stage, _ROUND_STAGES):
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
        header = getattr(self.stage, "header", None)
        keep = {header.digest} if isinstance(self.stage, _ROUND_STAGES) and header else set()
        if self.certificate is not None:  # a checkpoint on its way in
            keep.add(self.certificate.header.digest)
        for found in self.house.spool.rounds(self.id):
            if found not in keep:
                self.house.spool.discard(self.id, found)

    def _checkpoint_name(self) -> str:
        """A checkpoint is sealed under the secret of a key epoch."""
        assert self.certificate is not None
        return f"checkpoint-{self.epoch.epoch}-{self.certificate.hash[:32]}"

    def _kept_checkpoint(self) -> Stored | None:
        if self.certificate is None:
            return None
        return self.house.spool.find(self.id, self._checkpoint_name())

    # ----------------------------------------------------------------------------- the queue

    def tell(self, site: SiteId, message: Any) -> None:
        """A record of a site."""
        self._take(_Told(site, message))

    @property
    def backlog(self) -> int:
        """Events that wait."""
        return self._queue.qsize()

    def arrived(self, site: SiteId, header: bytes, stored: Stored) -> None:
        """A whole upload of a site."""
        self._take(_Arrived(site, header, stored))

    def came(self, site: SiteId) -> None:
        """A site has a new session."""
        self._take(_Came(site))

    def left(self, site: SiteId) -> None:
        """A site says that it stops: the round under way goes on without it."""
        self._take(_Left(site))

    def _take(self, event: Any) -> None:
        if self.outcome is None:
            self._queue.put_nowait(event)
            return
        try:
            self._afterwards(event)
        except FedcoreError as error:
            LOG.warning("job %s: %s", self.id, error)

    def asks_for_grants(self, site: SiteId) -> bool:
        """Whether this site was asked to make the epoch's payload: only then is its word long."""
        header = getattr(self.epoch, "header", None)
        return header is not None and header.maker == site

    def doing(self, site: SiteId, what: str) -> None:
        """What a site says it is at."""
        self.sites[site].doing = what
        self.sites[site].last_seen = self.house.now()
        self.on_change()

    def stop(self, text: str) -> None:
        """End the job at an operator's word."""
        self._stopped = _Stop(text)
        self._queue.put_nowait(self._stopped)

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
        self._due.clear()
        self._put.clear()
        try:
            self._resume()
            while self.outcome is None:
                try:
                    # Not wait_for: before Python 3.12 it may lose a cancellation.
                    async with asyncio.timeout(self._wait()):
                        event = await self._queue.get()
                except TimeoutError:
                    event = None
                await self._handle(event)
                await self._handle_waiting()
                if self.house.clock() >= self._tick_at:
                    await self._handle(None)  # however much is said, the clock is looked at
                self._advance()
                self.on_change()
        finally:
            for task in list(self._beside):
                task.cancel()
            await asyncio.gather(*self._beside, return_exceptions=True)
            if self._fold is not None:
                with contextlib.suppress(FedcoreError):
                    await self._fold.end()

    async def _handle_waiting(self) -> None:
        """What came in at the same time, before anybody who watches looks again."""
        await asyncio.sleep(0)  # frames that are read already get here first
        for _ in range(self._queue.qsize()):
            if self.outcome is not None:
                break
            await self._handle(self._queue.get_nowait())

    async def _recover(self, fault: Exception) -> None:
        """Read everything from disk again after a pause, or fail the job: see `run`.

        Raises what the disk refused this time.
        """
        now = self.house.clock()
        if self._refused_since is None:
            self._refused_since = now
        late = now - self._refused_since > self.house.limits.stage
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
            self._reload()

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

    def _reload(self) -> None:
        """What a new process would know. Raises StoreProblem while the disk refuses."""
        fresh = CoordinatedJob(self.house, self.links, self.offer)
        fresh._restore()
        for name in _FROM_DISK:
            setattr(self, name, getattr(fresh, name))
        self.rounds.known[:] = fresh.rounds.known
        self.metrics.known[:] = fresh.metrics.known
        self.progress.text = ""
        self._hear_of(self.certificate)
        for view in self.sites.values():
            # Each is offered the plan again, and says where it stands.
            view.rest, view.agreed = None, False
        self._restarted = True

    def _resume(self) -> None:
        now = self.house.clock()
        self._tick_at = now + TICK
        if isinstance(self.epoch, epoch.Calling | epoch.Granting):
            self.epoch = replace(self.epoch, until=now + self._epoch_hub.patience)
        if self.plan is not None and isinstance(self.stage, _ROUND_STAGES):
            self._open_fold(self.stage.header)
            self._machine(coordinator.Restarted())
        for name in self.links.connected():
            self._greet(name)

    def _wait(self) -> float:
        """Seconds until something is due by itself; never more than a second, for people who watch."""
        until = [self._tick_at]
        if isinstance(self.stage, coordinator.Waiting):
            until.append(self.stage.until)
        return max(0.0, min(until) - self.house.clock()) + 0.001

    async def _handle(self, event: Any) -> None:
        if isinstance(event, _Fault):
            raise event.error
        try:
            match event:
                case None:
                    self._tick()
                case _Left(name):
                    self._gone(name)
                case _Told(name, message):
                    self.sites[name].last_seen = self.house.now()
                    await self._on_message(name, message)
                case _Arrived(name, header, stored):
                    await self._on_upload(name, header, stored)
                case _Came(name):
                    self._greet(name)
                case _Done(inner, header):
                    if getattr(getattr(self.stage, "header", None), "digest", b"") == header:
                        kept = self._sum if isinstance(inner, coordinator.SumReady) else None
                        self._machine(inner, put=_small_file(_SUM, kept))
                case _Stop(text, outcome):
                    self.end(outcome, text)
        except OutOfOrder as error:  # said again after a new connection, and known already
            LOG.info("job %s: %s", self.id, error)
        except PeerRefused as error:
            LOG.warning("job %s: %s", self.id, error)

    def _tick(self) -> None:
        now = self.house.clock()
        self._tick_at = now + TICK
        self._check_sum_deadline(now)
        self._look_at_release(now)
        if self.outcome is not None:
            return
        self._machine(coordinator.Tick())
        self._commit()
        self._epoch_machine(epoch.EpochTick())
        self._look_for_lost(now)
        if now - self._nudged_at >= _AGAIN:
            self._nudged_at = now
            self._nudge()

    def _check_sum_deadline(self, now: float) -> None:
        """Raise DataLost for a sum that takes longer than a stage may: a worker or the disk hangs."""
        stage, (header, since) = self.stage, self._summing
        if not isinstance(stage, coordinator.Summing) or stage.header.digest != header:
            return
        if now - since > self.house.limits.stage:
            if self._fold is not None:
                self._fold.give_up()
            raise DataLost(
                f"sum of round {stage.header.round}: found none after {self.house.limits.stage:.0f} s, "
                "expected it within the limit of a stage",
                remedy="look at the disk and the fold workers, and raise limits.stage_seconds if they are slow",
            )

    def _look_for_lost(self, now: float) -> None:
        """A round goes on without a site whose connection is lost for longer than the grace."""
        here = self.links.connected()
        for name, view in self.sites.items():
            if name in here:
                view.away_since = None
            elif view.away_since is None:
                view.away_since = now
            if view.away_since is not None and now - view.away_since >= self.house.limits.grace:
                self._gone(name)

    def _gone(self, name: SiteId) -> None:
        if name in coordinator.waiting_for(self.stage) and name not in self.stage.gone:
            LOG.info("job %s: the round goes on without site %s, if it can", self.id, name)
            self._machine(coordinator.Gone(name))

    def _out_of_round(self, name: SiteId) -> None:
        """This site is in no round, or no more: it says so, or has lost its journal."""
        if isinstance(self.stage, _ROUND_STAGES):
            self._machine(coordinator.Gone(name, for_good=True))

    def _nudge(self) -> None:
        """Say again what may have been lost on its way between two others."""
        if self.plan is None:
            return
        for name in self.links.connected():
            view = self.sites[name]
            spreading = isinstance(self.epoch, epoch.Spreading) and view.agreed
            if spreading and name not in self.epoch.holders:
                self._epoch_machine(epoch.SiteReturned(name))
            if view.rest is not None:
                self._catch_up(name)

    # -------------------------------------------------------------------------------- sites

    def _greet(self, name: SiteId) -> None:
        """What a site that just connected needs to hear; it answers where it stands."""
        view = self.sites[name]
        view.rest, view.missed, view.away_since = None, False, None
        self._offered.pop(name, None)
        if self._handing is not None:
            self._handing.came(name)
        self.links.say(name, self.id, self.offer)
        if self.plan is not None and not view.agreed:
            self._offer_plan(name)

    def _offer_plan(self, name: SiteId) -> None:
        assert self.plan is not None
        self.links.say(name, self.id, job.PlanOffer(self.id, canonical(self.plan.to_json())))

    def _rejoin(self, name: SiteId) -> None:
        """A site that says that it knows the plan gets again what epoch and round have for it.

        It says so in every new session, and when its disk refused something that was said to it.
        """
        # The round first: a site takes no new epoch inside one.
        self._machine(coordinator.SiteReconnected(name))
        self._epoch_machine(epoch.SiteReturned(name))

    async def _on_message(self, name: SiteId, message: Any) -> None:
        view = self.sites[name]
        if getattr(message, "site", name) != name:
            raise PeerRefused(f"record: found one of another site from {name}")
        match message:
            case job.SiteSurvey(shape=shape):
                view.shape, view.unable = shape, ""
                # A site surveys before it has a plan, or without its journal.
                view.anew, view.agreed = view.agreed, False
                self._out_of_round(name)
                if self.plan is not None:
                    self._offer_plan(name)
            case job.SiteUnavailable(reason=reason):
                view.unable = reason if reason in job.REASONS else job.UNABLE
                LOG.warning("job %s: site %s: %s", self.id, name, job.REASONS[view.unable])
                if not isinstance(self.stage, coordinator.EXPOSED):  # what it sent it can say again
                    self._out_of_round(name)
            case job.InRound(header=header):
                self._tell_if_over(name, header)
            case job.PlanAgreed(plan_digest=digest):
                if self.plan is not None and digest == self.plan.digest:
                    view.agreed = True
                    if view.anew and isinstance(self.epoch, epoch.Spreading):
                        view.anew = False
                        self.links.say(name, self.id, epoch.EpochCall(self.epoch.header))
                    self._rejoin(name)
            case job.SiteStatus():
                if not 0 <= message.round <= self._number() + MOST_AHEAD:
                    raise PeerRefused(f"round: found a number of {name} that is far from ours")
                view.rest = message
                number = getattr(getattr(self.stage, "header", None), "round", 0)
                waiting = coordinator.waiting_for(self.stage)
                if message.round < number and coordinator.is_first(self.stage) and name in waiting:
                    # It could not write down that the round began, or said this before it heard.
                    self._machine(coordinator.SiteReconnected(name))
                else:
                    self._out_of_round(name)
                if self._asked_checkpoint == name:
                    self._asked_checkpoint = None  # back from elsewhere: it may not have heard
                self._catch_up(name)
            case job.CheckpointSealed():
                self._take_checkpoint(name, message)
            case job.PublicMetrics():
                self._take_metrics(name, message)
            case job.ModelMade():
                self._take_word(name, message)
            case epoch.EpochKey() | epoch.Grants() | epoch.Grant() | epoch.KeyHeld():
                self._epoch_machine(epoch.FromSite(name, message))
            case messages.Submit():
                self._submits[name] = message
                await self._take_upload(name)
            case messages.Leave(code=messages.RELEASE_REFUSED) if not self._of_this_round(message):
                self._halted(name)
            case messages.Leave(code=messages.MATERIAL):
                self.progress.text = f"site {name} left a round over another site's material: the sites' logs say whose"
                self._machine(coordinator.MessageFromSite(name, message))
            case _:
                self._machine(coordinator.MessageFromSite(name, message))

    def _tell_if_over(self, name: SiteId, header: bytes) -> None:
        """A site that is still in an earlier round hears how that one ended: the word of it was lost."""
        if isinstance(self.stage, _ROUND_STAGES) and self.stage.header.digest == header:
            return
        if self.certificate is not None and self.certificate.header.digest == header:
            self.links.say(name, self.id, self.certificate)
        else:
            self.links.say(name, self.id, messages.Abandon(header, "release"))

    def _of_this_round(self, leave: messages.Leave) -> bool:
        header = getattr(self.stage, "header", None)
        if header is None or not isinstance(self.stage, _ROUND_STAGES):
            return False
        return bool(header.digest == leave.header)

    def _number(self) -> int:
        """Of the round under way, or else of the last one."""
        header = getattr(self.stage, "header", None)
        return int(header.round if header is not None else self.stage.round)

    def _halted(self, name: SiteId) -> None:
        """A site refused the release of a round that is over: this key epoch is, too (PROTOCOL R)."""
        if isinstance(self.epoch, epoch.Spreading) and name in self.epoch.holders:
            self._epoch_refused = True
        self._gone(name)

    # ------------------------------------------------------------------------------ the plan

    def _advance(self) -> None:
        """Whatever can begin now, begins."""
        if self.outcome is not None:
            return
        if isinstance(self.stage, coordinator.Waiting):
            self._show_waiting(self.stage)
        if self.plan is None:
            self._make_plan()
        elif isinstance(self.epoch, epoch.NoEpoch):
            self._begin_epoch()
        elif isinstance(self.stage, coordinator.Ready | coordinator.Released | coordinator.Failed):
            self._next_round()

    def _gathered(self, present: list[SiteId], wanted: int) -> bool:
        """Whether to go on: everybody is there, or enough are and the time to wait for more is over.

        Who was waited for once and did not come is not waited for again before it connects. Where too many
        sites said that they cannot take part, the job waits no longer than for one more site.
        """
        limits, now = self.house.limits, self.house.clock()
        needed = max(limits.minimum, wanted)
        enough = len(present) >= needed
        for name in present:
            self.sites[name].missed = False
        views = {name: self.sites[name] for name in self.house.pins if name not in present}
        awaited = tuple(n for n, v in views.items() if not (v.unable or v.missed))
        if enough and not awaited:
            self._gathering = None
            self._waiting((), None)
            return True
        if self._gathering is None:
            self._gathering = now
        unable = [name for name, view in views.items() if view.unable]
        patience = limits.enough if len(self.sites) - len(unable) >= needed else limits.gather
        until = self._gathering + (limits.gather if enough else patience)
        self._waiting(awaited or tuple(views), until)
        if now < until:
            return False
        self._gathering = None
        self._waiting((), None)
        if not enough:
            text = (
                f"{len(present)} sites were there after {patience:.0f} s, too few for a round, "
                f"which needs {needed}"
            )
            if unable:
                text += f"; cannot take part: {', '.join(unable)}"
            why = f": {self.progress.text}" if self.progress.text else ""
            self.end("abandoned" if self.rounds.known else "failed", text + why)
            return False
        for name in awaited:
            self.sites[name].missed = True
        return True

    def _waiting(self, sites: tuple[SiteId, ...], until: float | None) -> None:
        self.progress.waiting_for = sites
        moment = None if until is None else self.house.now() + until - self.house.clock()
        self.progress.waiting_until = moment

    def _show_waiting(self, stage: Any) -> None:
        """During a round: who is not connected, and when the round goes on without them."""
        here = self.links.connected()
        lost = tuple(name for name in coordinator.waiting_for(stage) if name not in here)
        since = [self.sites[name].away_since or self.house.clock() for name in lost]
        ends = [moment + self.house.limits.grace for moment in since]
        until = min([stage.until, *ends])
        if self._short_since is not None:
            until = self._short_since + self.house.limits.enough
        self._waiting(lost, until if lost else None)

    @cached_property
    def _settings(self) -> Job:
        """The job as it was submitted, built once: every event until there is a plan asks for it."""
        return build_job(json.loads(self.offer.settings))

    def _make_plan(self) -> None:
        """One plan from what the sites found; a site that finds another shape is named and stays out."""
        try:
            complete = self._settings
            self.threshold = (
                self.threshold or Terms.of_job(complete, tuple(self.house.pins)).threshold
            )
        except FedcoreError as error:  # the roster is another one than when the job was submitted
            self.end("failed", str(error))
            return
        surveyed = [name for name, view in self.sites.items() if view.shape is not None]
        unable = [name for name, view in self.sites.items() if view.unable]
        if len(self.sites) - len(unable) < self.threshold:
            reasons = ", ".join(f"{n}: {self.sites[n].unable}" for n in unable)
            self.end("failed", f"too few sites can take part ({reasons})")
            return
        if not self._gathered(surveyed, self.threshold):
            return
        shapes = [self.sites[name].shape for name in surveyed]
        common = max(shapes, key=shapes.count)
        assert common is not None
        for name in surveyed:
            if self.sites[name].shape != common:
                self.sites[name].unable = SHAPE_DIFFERS
        try:
            cap = complete.protect.max_examples
            assert cap is not None
            plan = plan_of(complete, common, tuple(self.house.pins), cap)
        except FedcoreError as error:
            self.end("failed", str(error))
            return
        self._adopt(plan, common.features)
        about = {"plan": plan.to_json(), "features": common.features}
        self.step = schedule.first_step(plan, common.features)
        self.house.journal.append(
            self.id, ROUND, (), put={"plan": canonical(about), "step": encode(self.step)}
        )
        for name in self.links.connected():
            self._offer_plan(name)

    def _adopt(self, plan: RoundPlan, features: int) -> None:
        self.plan, self.features, self._scheme = plan, features, Scheme(plan)
        self.threshold = plan.threshold
        self._hearing = public_metrics.Hearing(plan, self.id)
        if plan.release == "coordinator":
            patience = self.house.limits.gather
            self._handing = HandOver(plan, self.id, self.directory, patience)

    def _begin_epoch(self) -> None:
        agreed = [name for name in self.links.connected() if self.sites[name].agreed]
        present = [name for name in self.house.pins if name in agreed]
        if self._gathered(present, self.threshold):
            self._call_epoch(tuple(present))

    def _call_epoch(self, present: tuple[SiteId, ...]) -> None:
        assert self.plan is not None
        roster = tuple(self.house.pins)
        header = epoch.EpochHeader(
            self.house.federation, self.id, self.epoch.epoch + 1, roster,
            roster_digest(self.house.pins), self.plan.threshold, self.plan.digest,
            epoch.first_maker(roster, present),
        )  # fmt: skip
        self._epoch_machine(epoch.StartEpoch(header, present))

    def _epoch_machine(self, event: Any) -> None:
        try:
            self.epoch, found = epoch.step_hub(
                self._epoch_hub, self.epoch, event, self.house.clock()
            )
        except PeerRefused as error:
            if not isinstance(event, epoch.EpochTick):
                raise
            self.progress.text = str(error)
            return
        for effect in found:
            match effect:
                case effects.Persist(record=record):
                    self.house.journal.put(self.id, "epoch", encode(record))
                case effects.Send(to=to, message=message):
                    self.links.say(self._holder(SiteId(to), message), self.id, message)

    def _holder(self, to: SiteId, message: Any) -> SiteId:
        """Any holder can grant: one that is connected is asked."""
        here = self.links.connected()
        if not isinstance(message, epoch.GrantRequest) or (to in here and to not in self._erased):
            return to
        holders = self._holders_beside(message.key.site)
        return holders[0] if holders else to

    def _holders_beside(self, name: SiteId) -> list[SiteId]:
        here = self.links.connected()
        return [n for n in self.epoch.holders if n in here and n not in {name, *self._erased}]

    def _pass_by(self, name: SiteId, wanted: SiteId) -> None:
        """A holder has erased the ended job's keys: another one is asked, or the late site stays behind."""
        assert self.outcome is not None
        self._erased.add(name)
        if wanted not in self.sites or not isinstance(self.epoch, epoch.Spreading):
            return
        if self._holders_beside(wanted):
            self._epoch_machine(epoch.SiteReturned(wanted))
        else:
            over = replace(self.outcome, certificate="", text=KEYS_ERASED)
            self.links.say(wanted, self.id, over)

    # ---------------------------------------------------------------------------- the rounds

    def _next_round(self) -> None:
        """Announce the next step to the sites that stand where the job stands."""
        assert self.plan is not None
        stage = self.stage
        if self.step is not None and isinstance(stage, coordinator.Failed) and stage.exposed:
            self.end("abandoned", self._why_not_released(stage))
            return
        if self._key_is_spent() and not self._new_epoch():
            return
        if self.step is None:
            self._finish()
            return
        if not isinstance(self.epoch, epoch.Spreading):
            self._waiting(epoch.awaited_in(self.epoch), getattr(self.epoch, "until", None))
            return
        here = self.certificate.hash if self.certificate else ""
        ready = []
        for name in self.links.connected():
            rest = self.sites[name].rest
            if rest is not None and (rest.epoch, rest.certificate) == (self.epoch.epoch, here):
                ready.append(name)
        roster = tuple(name for name in self.house.pins if name in ready)
        if not self._gathered(list(roster), self.threshold):
            return
        self.progress.text = ""
        self._begin_round(self.step, roster)

    def _begin_round(self, step: schedule.PlannedRound, roster: tuple[SiteId, ...]) -> None:
        assert self.plan is not None
        assert self._scheme is not None
        plan, seen = self.plan, [v.rest.round for v in self.sites.values() if v.rest]
        header = RoundHeader(
            self.house.federation, self.id, self.epoch.epoch, max([self.stage.round, *seen]) + 1,
            step.training_round, step.purpose, roster, roster_digest(self.house.pins),
            plan.threshold, plan.protection, plan.digest, self.certificate.hash if self.certificate else "",
        )  # fmt: skip
        self._submits, self._arrived, self._sum, self._restarted = {}, {}, None, False
        self._begun = self._stage_since = self.house.clock()
        self._stage_seconds = {}
        self._open_fold(header)
        for name in roster:
            self.sites[name].rest = None
        layout = self._layout(header)
        size = self._scheme.upload_bytes(layout)
        self._machine(coordinator.Start(header, size, plan.salt_bytes))

    def _layout(self, header: RoundHeader) -> Layout:
        assert self.plan is not None
        spec = vector_of(self.plan, self.features, header.purpose)
        return Layout(spec, self.plan.packing, len(self.plan.sites))

    def _open_fold(self, header: RoundHeader) -> None:
        assert self.plan is not None
        slots = self._layout(header).slots
        name = f"{self.id}-{header.round}"
        self._fold = self.house.pool.job(name, self.plan.packing, slots)

    def _machine(self, event: Any, *, put: Mapping[str, bytes] | None = None) -> None:
        """Step; records first, then everything else in order.

        Records that nothing relies on yet may wait, for the next ones or for the clock: a process that
        ends meanwhile has not heard what they say, and whoever said it says it again.
        put: what goes into the journal in the commit of this step's records.
        """
        before = self.stage
        self.stage, found = coordinator.step(self._hub, before, event, self.house.clock())
        self._due.extend(found)
        self._put.update(put or {})
        changed = type(self.stage) is not type(before)
        if changed:
            self._refused_since = None
            self._time(before)
        if changed or not all(isinstance(e, effects.Persist | effects.FoldUpload) for e in found):
            ended = coordinator.Released | coordinator.Failed
            self._commit(ended=isinstance(self.stage, ended) and not isinstance(before, ended))

    def _commit(self, *, ended: bool = False) -> None:
        """Write the records of the steps taken, and do what they ask for. ended: so did the round."""
        due, self._due = self._due, []
        put, self._put = self._put, {}
        records = [effect.record for effect in due if isinstance(effect, effects.Persist)]
        if ended:
            self._keep_end()
        elif records:
            self.house.journal.append(self.id, ROUND, records, put=put)
            self._small |= put.keys()
        for effect in due:
            self._obey(effect)
        if ended:
            self._round_over()

    def _time(self, before: Any) -> None:
        """Add the time since the last change of stage to the stage that ended."""
        now, name = self.house.clock(), coordinator.STAGE_NAMES.get(type(before))
        if name is not None:
            spent = self._stage_seconds.get(name, 0.0) + now - self._stage_since
            self._stage_seconds[name] = spent
        self._stage_since = now

    def _obey(self, effect: Any) -> None:
        match effect:
            case effects.Send(to=to, message=message):
                if isinstance(message, messages.Aggregate) and self._sum is not None:
                    self.links.push(SiteId(to), self.id, "sum", self._sum)
                self.links.say(SiteId(to), self.id, message)
            case effects.RemoveMasks(header=header):
                if self._summing[0] != header.digest:
                    self._summing = header.digest, self.house.clock()
                self._aside(self._remove_masks(effect))
            case effects.Warn(text=text):
                LOG.warning("job %s: %s", self.id, text)
            case _:
                pass  # Fold and Rebuild: `total` makes the sum of exactly the uploads it is given

    def _aside(self, work: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except Exception as error:  # noqa: BLE001 - `run` decides
                self._queue.put_nowait(_Fault(error))

        task = asyncio.get_running_loop().create_task(guarded())
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)
        task.add_done_callback(lambda _: work.close())  # cancelled before its first step

    async def _on_upload(self, name: SiteId, header: bytes, stored: Stored) -> None:
        stage = self.stage
        if self._handing is not None and header == job.model_upload(self._last_certificate()):
            await self._take_model(self._handing, header, stored)
            return
        if not isinstance(stage, coordinator.Waiting) or stage.header.digest != header:
            return
        self._arrived[name] = stored
        await self._take_upload(name)

    async def _take_upload(self, name: SiteId) -> None:
        """Signed submission and whole vector are both there: folded ahead, then taken."""
        submit, stored = self._submits.get(name), self._arrived.get(name)
        if submit is None or stored is None or not isinstance(self.stage, coordinator.Collecting):
            return
        assert self._fold is not None
        event = coordinator.Uploaded(name, submit, stored.digest, stored.size)
        # What cannot be folded must not be taken; what is not taken must not be in the sum, and is
        # not: `total` gets the list.
        coordinator.step(self._hub, self.stage, event, self.house.clock())
        try:
            await self._fold.add(stored.path)
        except ChunkRefused:
            self._machine(coordinator.Gone(name))
            raise
        self._machine(event, put=_small_file(_VECTOR, stored))
        self.sites[name].unable = ""

    async def _remove_masks(self, asked: effects.RemoveMasks) -> None:
        assert self._fold is not None
        header = asked.header.digest
        while True:
            try:
                self._sum = await self._fold.total(
                    self._uploads(asked), asked.masks,
                    lambda chunks: self.house.spool.put(
                        self.id, "sum", chunks, header=header, unsynced=INLINE
                    ),
                )  # fmt: skip
                break
            except StoreFull as error:  # room may come back, and nothing of the round is lost
                LOG.warning("job %s: %s", self.id, error)
                self.progress.text = str(error)
                if self.house.clock() - self._summing[1] > self.house.limits.stage:
                    raise
                await asyncio.sleep(_AGAIN)
        self._queue.put_nowait(
            _Done(coordinator.SumReady(self._sum.digest, self._sum.size), header)
        )

    def _uploads(self, asked: effects.RemoveMasks) -> list[Path]:
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

    def _keep_end(self) -> None:
        """In one write: how the round ended, its row, and what comes next; its records go."""
        assert self.plan is not None
        stage, step = self.stage, self.step
        assert step is not None
        row = self._row(step)
        released = isinstance(stage, coordinator.Released)
        after = schedule.step_after(self.plan, step, released=released)
        values = {"stage": encode(stage), "step": encode(after), **self.rounds.entry(row)}
        if isinstance(stage, coordinator.Released):
            values["certificate"] = encode(stage.certificate)
        # Nothing of it is secret here, so it need not be gone from free pages.
        self.house.journal.trim(self.id, ROUND, put=values, forget=sorted(self._small))
        self._small = set()
        self.step = after
        if isinstance(stage, coordinator.Released):
            self._drop_checkpoint()
            self.certificate = stage.certificate
            self._hear_of(stage.certificate)
        self.rounds.add(row)

    def _round_over(self) -> None:
        """What nobody waits for, once the sites have heard how the round ended."""
        self.rounds.show()
        self.house.spool.discard(self.id, self.stage.header.digest)
        self._give_up_trying()

    def _give_up_trying(self) -> None:
        """A step that is tried again and again ends the job, not later than its last try."""
        step = self.step
        if step is None:
            return
        again = step.purpose, step.training_round
        last = self.rounds.known[-MOST_TRIES:]
        same = [r for r in last if (r["purpose"], r["round"]) == again and "abandoned" in r]
        if len(same) == MOST_TRIES:
            self.end(
                "abandoned", f"the {step.purpose} round was abandoned {MOST_TRIES} times in a row"
            )

    def _drop_checkpoint(self) -> None:
        """It is of an earlier release or key epoch."""
        if self.certificate is not None:
            self.house.spool.remove(self.id, self._checkpoint_name())
        self._checkpoint, self._asked_checkpoint = None, None
        self._offered.clear()

    def _why_not_released(self, stage: coordinator.Failed) -> str:
        """Why a round whose sum may be known ended the job."""
        header = stage.header
        if stage.refused:
            what = f"{_names(stage.refused)} refused the release (the logs of the sites say why)"
        else:
            what = f"only {stage.left} sites could still help to release it, of {header.threshold} it needs"
        return f"round {header.round} ({header.purpose}): {what}{_NO_OTHER_SUM}"

    def _look_at_release(self, now: float) -> None:
        """A round whose sum may be known waits for enough sites as long as a job does for its start."""
        stage = self.stage
        if not isinstance(stage, coordinator.EXPOSED):
            self._short_since = None
            return
        here, waited = self.links.connected(), coordinator.waiting_for(stage)
        away = sum(name not in here for name in waited)
        if coordinator.in_sight(stage) - away >= stage.header.threshold:
            self._short_since = None
        elif self._short_since is None:
            self._short_since = now
        since, limits = self._short_since, self.house.limits
        late = since is not None and now - since > limits.enough
        if late or now - self._stage_since > limits.enough + limits.stage:
            found = f"{_names(waited)} did not come back to release it"
            about = f"round {stage.header.round} ({stage.header.purpose}): {found}"
            self.end("abandoned", about + _NO_OTHER_SUM)

    def _key_is_spent(self) -> bool:
        """Whether no further round runs under the present key epoch.

        A site refused a release under it (PROTOCOL R), or a site that holds its secret was sent away or
        lost its certificate (V). An evicted site is no reason any more where no round follows.
        """
        if isinstance(self.epoch, epoch.NoEpoch):
            return False
        refused = getattr(self.stage, "refused", ())
        if self._epoch_refused or (refused and self.stage.header.epoch == self.epoch.epoch):
            return True
        holders = {key.site for key in getattr(self.epoch, "keys", ())}
        return self.step is not None and bool(holders & (self.evicted | self._withdrawn))

    def _new_epoch(self) -> bool:
        """Begin the next key epoch with the sites that are there; False while too few are."""
        here = self.links.connected()
        present = tuple(n for n in self.house.pins if n in here and n not in self.evicted)
        if self.step is not None and not self._gathered(list(present), self.threshold):
            return False
        self._epoch_refused = False
        if self._withdrawn:
            self._withdrawn = set()
            self.house.journal.put(self.id, "withdrawn", b"[]")
        self._drop_checkpoint()
        for view in self.sites.values():
            view.rest = None
        self._call_epoch(present or tuple(self.house.pins))
        return True

    def withdrawn(self, site: SiteId) -> None:
        """The certificate of a site was revoked: whoever has it may have what the site holds."""
        if self.outcome is None and site not in self._withdrawn:
            self._withdrawn = {*self._withdrawn, site}
            kept = json.dumps(sorted(self._withdrawn)).encode()
            self.house.journal.put(self.id, "withdrawn", kept)

    def _row(self, step: schedule.PlannedRound) -> Json:
        stage = self.stage
        row: Json = {
            "round": step.training_round, "purpose": step.purpose, "number": stage.header.round,
            "seconds": round(self.house.clock() - self._begun, 4),
            "survivors": list(stage.certificate.survivors)
            if isinstance(stage, coordinator.Released) else [],
            "roster": list(stage.header.roster),
            "seconds_by_stage": {n: round(s, 5) for n, s in self._stage_seconds.items()},
        }  # fmt: skip
        if self._restarted:
            row["restarted"] = True  # the times are those since the coordinator came back
        if self._arrived:
            row["bytes_up"] = max(stored.size for stored in self._arrived.values())
        if self._sum is not None:
            row["bytes_down"] = self._sum.size
        if isinstance(stage, coordinator.Failed):
            row["abandoned"] = {
                "stage": stage.stage, "left": stage.left, "needed": stage.header.threshold,
                "exposed": list(stage.exposed),
            }  # fmt: skip
        return row

    # ------------------------------------------------------------------------- public metrics

    def _hear_of(self, certificate: messages.Certificate | None) -> None:
        """From now on the sites may say the metrics of this release."""
        if certificate is None or self._hearing is None:
            return
        number = certificate.header.round
        known = any(row["number"] == number for row in self.metrics.known)
        self._hearing.released(certificate, believed=known)

    def _take_metrics(self, name: SiteId, message: job.PublicMetrics) -> None:
        """A site's word on a release; the one that makes it enough gives the values a row."""
        if self._hearing is None:
            raise PeerRefused(f"public metrics: found some of {name} before there is a plan")
        found, warning = self._hearing.take(name, message)
        if warning:
            LOG.warning("job %s: %s", self.id, warning)
        if found is None:
            return
        # The sums that ride in a round are of the model that it starts from.
        row: Json = {
            "round": found.header.training_round - 1, "number": found.header.round,
            "sites": found.sites, "metrics": found.values,
        }  # fmt: skip
        reference = self._settings.track.reference
        if reference is not None:
            row["reference"] = reference.against(found.values)
        self.house.journal.append(self.id, ROUND, (), put=self.metrics.entry(row))
        self.metrics.add(row)
        self.metrics.show()
        self.on_change()

    def _metrics_awaited(self) -> bool:
        """Whether a connected site may still say what the last release is worth."""
        if self.certificate is None or self._hearing is None:
            return False
        return bool(self._hearing.awaited(self.certificate, self._present()))

    # ------------------------------------------------------------------- a model that is given

    @property
    def has_model(self) -> bool:
        """Whether the model that the plan gives to the coordinator is among the job's files."""
        return self._handing is not None and self._handing.here

    def _present(self) -> list[SiteId]:
        """Connected sites that can take part."""
        return [name for name in self.links.connected() if not self.sites[name].unable]

    def _model_awaited(self, spent: float) -> bool:
        """Ask for the model that the plan gives; whether it may still come. spent: seconds of waiting."""
        if self._handing is None or self.has_model or self.certificate is None:
            return False
        if self._handing.lacking(self.certificate, self.house.pins):
            return False
        present, limits = self._present(), self.house.limits
        for name, wanted in self._handing.asking(self.certificate, present, self.house.clock()):
            self.links.say(name, self.id, wanted)
        absent = self._handing.lacking(self.certificate, present)
        return spent < (limits.gather if absent else limits.stage)

    def _take_word(self, name: SiteId, made: job.ModelMade) -> None:
        """Which file a site has for the model that the plan gives."""
        if self._handing is None:
            raise PeerRefused(f"model: found a word of {name} on it, and the plan gives none")
        warning = self._handing.take(name, made, self.certificate)
        if warning:
            LOG.warning("job %s: %s", self.id, warning)

    async def _take_model(self, handing: HandOver, header: bytes, stored: Stored) -> None:
        assert self.certificate is not None
        handing.lost()  # unless the disk takes it
        pieces = container.read(stored.path)
        if await asyncio.to_thread(handing.keep, stored.digest, pieces, self.certificate):
            LOG.info("job %s: the sites gave the model", self.id)
        self.house.spool.discard(self.id, header)

    @property
    def directory(self) -> Path:
        """Where people find this job's files."""
        path = self.house.folder / "jobs" / self.id
        path.mkdir(parents=True, exist_ok=True)
        return path

    # ----------------------------------------------------------------------------- catching up

    def _catch_up(self, name: SiteId) -> None:
        """A site that missed a release gets the state that another one seals."""
        rest = self.sites[name].rest
        if rest is None or self.certificate is None or rest.certificate == self.certificate.hash:
            return
        if rest.epoch != self.epoch.epoch:
            return  # it could not open the checkpoint: the key epoch first
        if self._checkpoint is None:
            self._want_checkpoint()
        elif self._offered.get(name) != rest:
            self._offered[name] = rest
            self._offer_checkpoint(name)

    def _want_checkpoint(self) -> None:
        """Ask a site that has the state; another one after a while without an answer."""
        assert self.certificate is not None
        now, here = self.house.clock(), self.links.connected()
        asked = self._asked_checkpoint
        if asked is not None and asked in here and now - self._asked_at < self.house.limits.gather:
            return
        stands = (self.epoch.epoch, self.certificate.hash)
        able = [
            name for name in here
            if (rest := self.sites[name].rest) and (rest.epoch, rest.certificate) == stands
        ]  # fmt: skip
        if not able:
            return
        others = [name for name in able if name != asked] or able
        self._asked_checkpoint, self._asked_at = others[0], now
        self.links.say(others[0], self.id, job.CheckpointWanted(self.id, self.certificate.hash))

    def _take_checkpoint(self, name: SiteId, sealed: job.CheckpointSealed) -> None:
        if self.certificate is None or sealed.certificate != self.certificate.hash:
            return
        header = self.certificate.header.digest
        path = self.house.spool.uploaded(self.id, header, name, sealed.digest)
        if path is None:  # nothing came but from a site that was asked, if not as the last one
            return
        self._checkpoint = self.house.spool.put(
            self.id, self._checkpoint_name(), container.read(path)
        )
        self._asked_checkpoint = None
        self.house.spool.discard(self.id, header)
        for other, view in self.sites.items():
            if view.rest is not None and view.rest.certificate != sealed.certificate:
                self._catch_up(other)

    def _offer_checkpoint(self, name: SiteId) -> None:
        assert self._checkpoint is not None
        assert self.certificate is not None
        found = self._checkpoint
        self.links.push(name, self.id, "checkpoint", found)
        self.links.say(
            name, self.id,
            job.CheckpointOffer(self.id, self.certificate, found.digest, found.size),
        )  # fmt: skip

    def download(self, what: str, digest: bytes) -> Stored | None:
        """What a site may download now."""
        found = self._sum if what == "sum" else self._checkpoint
        return found if found is not None and found.digest == digest else None

    def expects(self, name: SiteId, header: bytes, size: int) -> bool:
        """Whether an upload of this site for this round may come in: nothing else is spooled."""
        stage = self.stage
        if isinstance(stage, coordinator.Collecting) and stage.header.digest == header:
            slack = container.overhead(1 + size // 1024)
            return name in coordinator.members_of(stage) and size <= stage.size + slack
        certificate = self.certificate
        if certificate is None or self.plan is None:
            return False
        if self.outcome is not None:
            return False  # it was asked for, and is not needed any more
        most = _MOST_STATE * self.plan.parameters + _MOST_REST  # as large as a state can be
        if header == certificate.header.digest:
            return self._asked_checkpoint == name and size <= most
        if self._handing is not None and header == job.model_upload(certificate.hash):
            return self._handing.may_come_from(name) and size <= most
        return False

    # ---------------------------------------------------------------------------------- the end

    def _finish(self) -> None:
        """End, once a sealed checkpoint is here for whoever is not at the last release, and what the plan
        tells the coordinator of it: whoever watches goes with the end."""
        now = self.house.clock()
        if self._finishing is None:
            self._finishing = now
        spent = now - self._finishing
        if spent < self.house.limits.gather and self._metrics_awaited():
            return
        if self._checkpoint is None and spent < max(self.house.limits.gather, _AGAIN):
            here = self.links.connected()
            if spent < _AGAIN and any(self.sites[name].rest is None for name in here):
                return  # they are about to say where they stand
            if self._somebody_behind():
                if isinstance(self.epoch, epoch.Spreading):
                    self._want_checkpoint()
                return
        trained = [r for r in self.rounds.known if r["purpose"] == "update"]
        if trained and all("abandoned" in row for row in trained):
            self.end("abandoned", "every round was abandoned for want of sites")
            return
        if self._model_awaited(spent):
            return
        text = ""
        if self._handing is not None and not self.has_model:
            why = self._handing.lacking(self.certificate, self._present())
            text = f"without the model: {why or 'no site gave it in time'}"
        self.end("finished", text)

    def _somebody_behind(self) -> bool:
        here = self._last_certificate()
        rests = [view.rest for view in self.sites.values()]
        return bool(here) and any(rest is None or rest.certificate != here for rest in rests)

    def end(self, outcome: str, text: str) -> None:
        """No further round: the sites hear of it. Of the rounds nothing is kept but their rows."""
        self._due.clear()
        self._put.clear()
        ended = job.JobEnded(self.id, outcome, text, self._last_certificate())
        kept = {"ended": encode(ended)}
        self.house.journal.compact(self.id, ROUND, put=kept, forget=sorted(self._small))
        self._small = set()
        self.outcome = ended
        self.progress.state, self.progress.text = outcome, text
        self._waiting((), None)
        for name in self.links.connected():
            self.links.say(name, self.id, ended)
        try:
            self._discard_rounds()
        except StoreProblem as error:  # the job is over all the same; the next process removes them
            LOG.warning("job %s: %s", self.id, error)
        LOG.info("job %s: %s %s", self.id, outcome, text)

    def _discard_rounds(self) -> None:
        for found in self.house.spool.rounds(self.id):
            self.house.spool.discard(self.id, found)

    def _last_certificate(self) -> str:
        return self.certificate.hash if self.certificate is not None else ""

    def _afterwards(self, event: Any) -> None:
        """The job is over: a site that was away hears of it, and gets the last state it missed."""
        assert self.outcome is not None
        match event:
            case _Came(name):
                self.links.say(name, self.id, self.outcome)
            case _Told(name, job.SiteStatus() as rest):
                self.sites[name].rest = rest
                if rest.certificate == self.outcome.certificate:
                    self.links.say(name, self.id, self.outcome)
                elif rest.epoch == self.epoch.epoch and self._checkpoint is not None:
                    self._offer_checkpoint(name)
                elif rest.epoch == self.epoch.epoch or self.plan is None:
                    # Nobody left a checkpoint: the site stays where it is.
                    self.links.say(name, self.id, replace(self.outcome, certificate=""))
                else:
                    self._epoch_machine(epoch.SiteReturned(name))
            case _Told(name, job.KeysErased(wanted=wanted)):
                self._pass_by(name, wanted)
            case _Told(name, job.PublicMetrics() as message):
                self._take_metrics(name, message)  # it needed longer than the end waited
            case _Told(name, message) if isinstance(message, _OF_A_ROUND):
                # It is in the last round still: the word that ended it was lost there.
                self.links.say(name, self.id, self.outcome)
            case _Told(name, job.SiteSurvey()) if (
                self.plan is not None
            ):  # it was loading at the end
                self._offer_plan(name)
            case _Told(name, job.SiteSurvey() | job.SiteUnavailable()):
                self.links.say(name, self.id, replace(self.outcome, certificate=""))
            case _Told(name, job.PlanAgreed()) if self.plan is not None:
                self._epoch_machine(epoch.SiteReturned(name))
            case _Told(name, (epoch.EpochKey() | epoch.Grant() | epoch.KeyHeld()) as message):
                self._epoch_machine(epoch.FromSite(name, message))
