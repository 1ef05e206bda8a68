"""One job at the coordinator: from its offer to its last round, by the protocol's machines.

Every event goes through one queue and is handled to its end before the next. Invariant (PROTOCOL D):
what a step records is in the journal before anything of that step is sent; an upload counts once it is
whole, checked and folded ahead, and stays in the spool until the round is over, so after a restart the
sum is made again from exactly the uploads the journal lists.

The coordinator learns here who takes part, how large things are and how long they take; no vector is
opened and no model is seen under `layered` and `encrypted`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedcore_server.folding import FoldPool, JobFold

from fedcore.config import build_job, plan_of
from fedcore.encode.pack import Layout
from fedcore.errors import FedcoreError, PeerRefused
from fedcore.plan import ModelShape, RoundHeader, RoundPlan, canonical
from fedcore.protect.identity import roster_digest
from fedcore.protocol import coordinator, course, effects, epoch, job, messages
from fedcore.protocol.encoding import decode, encode
from fedcore.run import append_row
from fedcore.scheme import Scheme, vector_of
from fedcore.store.container import overhead
from fedcore.store.journal import Journal
from fedcore.store.spool import Spool, Stored
from fedcore.types import Json, SiteId

LOG = logging.getLogger("fedcore.coordinator.job")
ROUND = "round"

WAITING, RUNNING = "waiting", "running"
"""States of a job besides job.OUTCOMES: in the queue, and under way."""


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
    """How long a job waits, and for how many. Seconds; sites."""

    stage: float = 600.0
    gather: float = 60.0
    minimum: int = 3


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
class _Done:
    """Work beside the queue ended."""

    event: Any
    header: bytes


@dataclass(frozen=True)
class _Stop:
    text: str


@dataclass
class SiteView:
    """What is known of a site in this job, for scheduling and for people."""

    shape: ModelShape | None = None
    unable: str = ""
    agreed: bool = False
    rest: job.AtRest | None = None
    doing: str = ""
    last_seen: float = 0.0


@dataclass
class Progress:
    """For `watch`: what the job is at."""

    state: str = WAITING
    text: str = ""
    rounds: list[Json] = field(default_factory=list)
    waiting_for: tuple[SiteId, ...] = ()
    waiting_until: float | None = None


class CoordinatedJob:
    """One job, run to its end by `run`."""

    def __init__(self, house: House, links: Links, offer: job.JobOffer) -> None:
        self.house, self.links, self.offer = house, links, offer
        self.id = offer.job
        self.plan: RoundPlan | None = None
        self.features = 0
        self.sites = {name: SiteView() for name in house.pins}
        self.progress = Progress()
        self.epoch: Any = epoch.NoEpoch()
        self.stage: Any = coordinator.Ready()
        self.step: course.Step | None = None
        self.certificate: messages.Certificate | None = None
        self.outcome: job.JobEnded | None = None
        self.on_change: Callable[[], None] = lambda: None
        self._scheme: Scheme | None = None
        self._fold: JobFold | None = None
        self._sum: Stored | None = None
        self._submits: dict[SiteId, messages.Submit] = {}
        self._arrived: dict[SiteId, Stored] = {}
        self._begun = 0.0
        self._checkpoint: Stored | None = None
        self._asked_checkpoint = ""
        self._gather_until: float | None = None
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._beside: set[asyncio.Task[None]] = set()
        self._hub = coordinator.Hub(dict(house.pins), house.limits.stage)
        self._epoch_hub = epoch.EpochHub(dict(house.pins), house.limits.gather)

    # --------------------------------------------------------------------------- coming back

    @classmethod
    def stored(cls, house: House, links: Links, name: str) -> CoordinatedJob:
        """A job as the journal has it."""
        kept = house.journal.get(name, "offer")
        assert kept is not None
        found = cls(house, links, decode(kept, job.JobOffer))
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
        certificate = journal.get(name, "certificate")
        if certificate is not None:
            self.certificate = decode(certificate, messages.Certificate)
        self.stage = coordinator.replay(self.stage, journal.read(name, ROUND))
        self._checkpoint = self._kept_checkpoint()

    def _kept_checkpoint(self) -> Stored | None:
        if self.certificate is None:
            return None
        return self.house.spool.find(self.id, f"checkpoint-{self.certificate.hash[:32]}")

    # ----------------------------------------------------------------------------- the queue

    def tell(self, site: SiteId, message: Any) -> None:
        """A record of a site."""
        self._queue.put_nowait(_Told(site, message))

    def arrived(self, site: SiteId, header: bytes, stored: Stored) -> None:
        """A whole upload of a site."""
        self._queue.put_nowait(_Arrived(site, header, stored))

    def came(self, site: SiteId) -> None:
        """A site has a new session."""
        self._queue.put_nowait(_Came(site))

    def doing(self, site: SiteId, what: str) -> None:
        """What a site says it is at."""
        self.sites[site].doing = what
        self.sites[site].last_seen = self.house.now()
        self.on_change()

    def stop(self, text: str) -> None:
        """End the job at an operator's word."""
        self._queue.put_nowait(_Stop(text))

    async def run(self) -> None:
        """Run the job to its end."""
        self.progress.state = RUNNING
        try:
            self._resume()
            while self.outcome is None:
                try:
                    event = await asyncio.wait_for(self._queue.get(), self._wait())
                except TimeoutError:
                    event = None
                await self._handle(event)
                self._advance()
                self.on_change()
        finally:
            for task in list(self._beside):
                task.cancel()
            await asyncio.gather(*self._beside, return_exceptions=True)
            if self._fold is not None:
                with contextlib.suppress(FedcoreError):
                    await self._fold.end()

    def _resume(self) -> None:
        if self.plan is not None and isinstance(
            self.stage, coordinator.Waiting | coordinator.Summing
        ):
            self._open_fold(self.stage.header)
            self._machine(coordinator.Restarted())
        for name in self.links.connected():
            self._greet(name)

    def _wait(self) -> float:
        """Seconds until something is due by itself; never more than a second, for people who watch."""
        until = [self.house.clock() + 1.0]
        if isinstance(self.stage, coordinator.Waiting):
            until.append(self.stage.until)
        return max(0.0, min(until) - self.house.clock()) + 0.001

    async def _handle(self, event: Any) -> None:
        try:
            match event:
                case None:
                    self._tick()
                case _Told(name, message):
                    self.sites[name].last_seen = self.house.now()
                    await self._on_message(name, message)
                case _Arrived(name, header, stored):
                    await self._on_upload(name, header, stored)
                case _Came(name):
                    self._greet(name)
                case _Done(inner, header):
                    if getattr(getattr(self.stage, "header", None), "digest", b"") == header:
                        self._machine(inner)
                case _Stop(text):
                    self.end("stopped", text)
        except PeerRefused as error:
            LOG.warning("job %s: %s", self.id, error)

    def _tick(self) -> None:
        self._machine(coordinator.Tick())
        self._epoch_machine(epoch.EpochTick())

    # -------------------------------------------------------------------------------- sites

    def _greet(self, name: SiteId) -> None:
        """What a site that just connected needs to hear."""
        self.sites[name].rest = None
        self.links.say(name, self.id, self.offer)
        if self.plan is None:
            return
        self.links.say(name, self.id, job.PlanOffer(self.id, canonical(self.plan.to_json())))
        if self.sites[name].agreed:
            self._rejoin(name)

    def _rejoin(self, name: SiteId) -> None:
        """A site that knows the plan gets again what epoch and round have for it."""
        self._epoch_machine(epoch.Reconnected(name))
        self._machine(coordinator.Reconnected(name))

    async def _on_message(self, name: SiteId, message: Any) -> None:
        view = self.sites[name]
        if getattr(message, "site", name) != name:
            raise PeerRefused(f"record: found one of another site from {name}")
        match message:
            case job.Survey(shape=shape):
                view.shape, view.unable = shape, ""
                if self.plan is not None:
                    self.links.say(
                        name, self.id, job.PlanOffer(self.id, canonical(self.plan.to_json()))
                    )
            case job.Unable(reason=reason):
                view.unable = reason if reason in job.REASONS else "trouble"
                LOG.warning("job %s: site %s: %s", self.id, name, job.REASONS[view.unable])
            case job.PlanAgreed(plan_digest=digest):
                if self.plan is not None and digest == self.plan.digest and not view.agreed:
                    view.agreed = True
                    self._rejoin(name)
            case job.AtRest():
                view.rest = message
                self._catch_up(name)
            case job.CheckpointSealed():
                self._take_checkpoint(name, message)
            case epoch.EpochKey() | epoch.Grants() | epoch.Grant() | epoch.KeyHeld():
                self._epoch_machine(epoch.FromSite(name, message))
            case messages.Submit():
                self._submits[name] = message
                await self._take_upload(name)
            case _:
                self._machine(coordinator.Received(name, message))

    # ------------------------------------------------------------------------------ the plan

    def _advance(self) -> None:
        """Whatever can begin now, begins."""
        if self.outcome is not None:
            return
        if self.plan is None:
            self._make_plan()
        elif isinstance(self.epoch, epoch.NoEpoch):
            self._begin_epoch()
        elif isinstance(
            self.stage, coordinator.Ready | coordinator.Released | coordinator.Abandoned
        ):
            self._next_round()

    def _gathered(self, present: list[SiteId], wanted: int) -> bool:
        """Whether to go on: everybody is there, or enough are and the time to wait for more is over."""
        least = max(self.house.limits.minimum, wanted)
        absent = [name for name in self.house.pins if name not in present]
        hopeless = [name for name in absent if self.sites[name].unable]
        if len(present) >= least and len(absent) == len(hopeless):
            self._gather_until = None
            self._waiting((), None)
            return True
        now = self.house.clock()
        if self._gather_until is None:
            self._gather_until = now + self.house.limits.gather
        self._waiting(tuple(n for n in absent if n not in hopeless), self._gather_until)
        if now < self._gather_until or len(present) < least:
            return False
        self._gather_until = None
        self._waiting((), None)
        return True

    def _waiting(self, sites: tuple[SiteId, ...], until: float | None) -> None:
        self.progress.waiting_for = sites
        moment = None if until is None else self.house.now() + until - self.house.clock()
        self.progress.waiting_until = moment

    def _threshold(self) -> int:
        if self.plan is not None:
            return self.plan.threshold
        sites = len(self.house.pins)
        return min(sites, 2 * sites // 3 + 1)

    def _make_plan(self) -> None:
        """One plan from what the sites found; a site that finds another shape is named and stays out."""
        surveyed = [name for name, view in self.sites.items() if view.shape is not None]
        unable = [name for name, view in self.sites.items() if view.unable]
        if len(self.sites) - len(unable) < self._threshold():
            reasons = ", ".join(f"{n}: {self.sites[n].unable}" for n in unable)
            self.end("failed", f"too few sites can take part ({reasons})")
            return
        if not self._gathered(surveyed, self._threshold()):
            return
        shapes = [self.sites[name].shape for name in surveyed]
        common = max(shapes, key=shapes.count)
        assert common is not None
        for name in surveyed:
            if self.sites[name].shape != common:
                self.sites[name].unable = "plan differs"
        settings = json.loads(self.offer.settings)
        try:
            complete = build_job(settings)
            cap = complete.protect.max_examples
            assert cap is not None
            plan = plan_of(complete, common, tuple(self.house.pins), cap)
        except FedcoreError as error:
            self.end("failed", str(error))
            return
        self._adopt(plan, common.features)
        about = {"plan": plan.to_json(), "features": common.features}
        self.step = course.first_step(plan, common.features)
        self.house.journal.append(
            self.id, ROUND, (), put={"plan": canonical(about), "step": encode(self.step)}
        )
        for name in self.links.connected():
            self.links.say(name, self.id, job.PlanOffer(self.id, canonical(plan.to_json())))

    def _adopt(self, plan: RoundPlan, features: int) -> None:
        self.plan, self.features, self._scheme = plan, features, Scheme(plan)

    def _begin_epoch(self) -> None:
        agreed = [name for name in self.links.connected() if self.sites[name].agreed]
        present = [name for name in self.house.pins if name in agreed]
        if self._gathered(present, self._threshold()):
            self._call_epoch(tuple(present))

    def _call_epoch(self, present: tuple[SiteId, ...]) -> None:
        assert self.plan is not None
        roster = tuple(self.house.pins)
        header = epoch.EpochHeader(
            self.house.federation, self.id, self.epoch.epoch + 1, roster,
            roster_digest(self.house.pins), self.plan.threshold, self.plan.digest,
            epoch.first_maker(roster, present),
        )  # fmt: skip
        self._epoch_machine(epoch.StartEpoch(header))

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
                    self.links.say(SiteId(to), self.id, message)

    # ---------------------------------------------------------------------------- the rounds

    def _next_round(self) -> None:
        """Announce the next step to the sites that stand where the job stands."""
        assert self.plan is not None
        if self.step is None:
            self._finish()
            return
        if not isinstance(self.epoch, epoch.Spreading):
            return
        here = self.certificate.hash if self.certificate else ""
        ready = []
        for name in self.links.connected():
            rest = self.sites[name].rest
            if rest is not None and (rest.epoch, rest.certificate) == (self.epoch.epoch, here):
                ready.append(name)
        roster = tuple(name for name in self.house.pins if name in ready)
        if not self._gathered(list(roster), self._threshold()):
            return
        self._begin_round(self.step, roster)

    def _begin_round(self, step: course.Step, roster: tuple[SiteId, ...]) -> None:
        assert self.plan is not None
        assert self._scheme is not None
        plan, seen = self.plan, [v.rest.round for v in self.sites.values() if v.rest]
        sites = len(plan.sites)
        threshold = plan.threshold
        if len(roster) != sites:
            threshold = _cohort_threshold(plan, len(roster))
        header = RoundHeader(
            self.house.federation, self.id, self.epoch.epoch, max([self.stage.round, *seen]) + 1,
            step.training_round, step.purpose, roster, roster_digest(self.house.pins), threshold,
            plan.protection, plan.digest, self.certificate.hash if self.certificate else "",
        )  # fmt: skip
        self._submits, self._arrived, self._sum = {}, {}, None
        self._begun = self.house.clock()
        self._open_fold(header)
        for name in roster:
            self.sites[name].rest = None
        layout = self._layout(header)
        self._machine(coordinator.Start(header, self._scheme.upload_bytes(layout)))

    def _layout(self, header: RoundHeader) -> Layout:
        assert self.plan is not None
        spec = vector_of(self.plan, self.features, header.purpose)
        return Layout(spec, self.plan.packing, len(self.plan.sites))

    def _open_fold(self, header: RoundHeader) -> None:
        assert self.plan is not None
        slots = self._layout(header).slots
        name = f"{self.id}-{header.round}"
        self._fold = self.house.pool.job(name, self.plan.packing, slots)

    def _machine(self, event: Any) -> None:
        """Step; records first, then everything else in order."""
        before = self.stage
        after, found = coordinator.step(self._hub, before, event, self.house.clock())
        records = [e.record for e in found if isinstance(e, effects.Persist)]
        if records:
            self.house.journal.append(self.id, ROUND, records)
        self.stage = after
        for effect in found:
            self._obey(effect)
        ended = coordinator.Released | coordinator.Abandoned
        if isinstance(after, ended) and not isinstance(before, ended):
            self._round_over()

    def _obey(self, effect: Any) -> None:
        match effect:
            case effects.Send(to=to, message=message):
                if isinstance(message, messages.Aggregate) and self._sum is not None:
                    self.links.push(SiteId(to), self.id, "sum", self._sum)
                self.links.say(SiteId(to), self.id, message)
            case effects.RemoveMasks():
                self._aside(self._remove_masks(effect))
            case effects.Warn(text=text):
                LOG.warning("job %s: %s", self.id, text)
            case _:
                pass  # Fold and Rebuild: `total` makes the sum of exactly the uploads it is given

    def _aside(self, work: Awaitable[None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except FedcoreError as error:
                LOG.error("job %s: %s", self.id, error)  # noqa: TRY400 - one line is what helps
                self._queue.put_nowait(_Stop(str(error)))

        task = asyncio.get_running_loop().create_task(guarded())
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    async def _on_upload(self, name: SiteId, header: bytes, stored: Stored) -> None:
        stage = self.stage
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
        await self._fold.add(stored.path)
        self._machine(event)

    async def _remove_masks(self, asked: effects.RemoveMasks) -> None:
        assert self._fold is not None
        header = asked.header.digest
        paths = self.house.spool.complete(self.id, header)
        uploads = [paths[name] for name in asked.survivors]
        self._sum = await self._fold.total(
            uploads, asked.masks,
            lambda chunks: self.house.spool.put(self.id, "sum", chunks, header=header),
        )  # fmt: skip
        self._queue.put_nowait(
            _Done(coordinator.SumReady(self._sum.digest, self._sum.size), header)
        )

    def _round_over(self) -> None:
        """One value says how the round ended; its records and its spool go."""
        assert self.plan is not None
        stage, step = self.stage, self.step
        assert step is not None
        released = isinstance(stage, coordinator.Released)
        values = {"stage": encode(stage)}
        if isinstance(stage, coordinator.Released):
            self.certificate = stage.certificate
            values["certificate"] = encode(stage.certificate)
            self._checkpoint, self._asked_checkpoint = None, ""
        self._report(step)
        self.step = course.step_after(self.plan, step, released=released)
        values["step"] = encode(self.step)
        self.house.journal.append(self.id, ROUND, (), put=values)
        self.house.journal.compact(self.id, ROUND)
        self.house.spool.discard(self.id, stage.header.digest)
        if stage.refused:
            self._new_epoch()

    def _new_epoch(self) -> None:
        """After a refused release no round runs under this key (PROTOCOL R)."""
        present = tuple(name for name in self.house.pins if name in self.links.connected())
        for view in self.sites.values():
            view.rest = None
        self._call_epoch(present or tuple(self.house.pins))

    def _report(self, step: course.Step) -> None:
        stage = self.stage
        row: Json = {
            "round": step.training_round, "purpose": step.purpose,
            "seconds": round(self.house.clock() - self._begun, 4),
            "survivors": list(stage.certificate.survivors)
            if isinstance(stage, coordinator.Released) else [],
            "roster": list(stage.header.roster),
        }  # fmt: skip
        if self._arrived:
            row["bytes_up"] = max(stored.size for stored in self._arrived.values())
        if self._sum is not None:
            row["bytes_down"] = self._sum.size
        if isinstance(stage, coordinator.Abandoned):
            row["abandoned"] = {
                "stage": stage.stage, "left": stage.left, "needed": stage.header.threshold,
                "exposed": list(stage.exposed),
            }  # fmt: skip
        self.progress.rounds.append(row)
        append_row(self.directory, row)

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
        if self._checkpoint is not None:
            self._offer_checkpoint(name)
            return
        self._want_checkpoint()

    def _want_checkpoint(self) -> None:
        assert self.certificate is not None
        for name in self.links.connected():
            rest = self.sites[name].rest
            has = rest is not None and rest.certificate == self.certificate.hash
            if has and self._asked_checkpoint != name:
                self._asked_checkpoint = name
                self.links.say(name, self.id, job.CheckpointWanted(self.id, self.certificate.hash))
                return

    def _take_checkpoint(self, name: SiteId, sealed: job.CheckpointSealed) -> None:
        if self.certificate is None or sealed.certificate != self.certificate.hash:
            return
        header = self.certificate.header.digest
        paths = self.house.spool.complete(self.id, header)
        if name not in paths:
            return
        from fedcore.store import container

        self._checkpoint = self.house.spool.put(
            self.id, f"checkpoint-{sealed.certificate[:32]}", container.read(paths[name])
        )
        self.house.spool.discard(self.id, header)
        for other, view in self.sites.items():
            if view.rest is not None and view.rest.certificate != sealed.certificate:
                self._offer_checkpoint(other)

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
            slack = overhead(1 + size // 1024)
            return name in coordinator.members_of(stage) and size <= stage.size + slack
        certificate = self.certificate
        sealing = certificate is not None and certificate.header.digest == header
        return sealing and self._asked_checkpoint == name

    # ---------------------------------------------------------------------------------- the end

    def _finish(self) -> None:
        trained = [r for r in self.progress.rounds if r["purpose"] == "update"]
        if trained and all("abandoned" in row for row in trained):
            self.end("abandoned", "every round was abandoned for want of sites")
            return
        self.end("finished", "")

    def end(self, outcome: str, text: str) -> None:
        """No further round: the sites hear of it."""
        ended = job.JobEnded(self.id, outcome, text)
        self.house.journal.append(self.id, ROUND, (), put={"ended": encode(ended)})
        self.outcome = ended
        self.progress.state, self.progress.text = outcome, text
        for name in self.links.connected():
            self.links.say(name, self.id, ended)
        LOG.info("job %s: %s %s", self.id, outcome, text)


def _cohort_threshold(plan: RoundPlan, sites: int) -> int:
    """t of a smaller cohort, as the sites check it (protocol/shared.py check_cohort_threshold)."""
    default = min(sites, 2 * sites // 3 + 1)
    stricter = plan.threshold > min(len(plan.sites), 2 * len(plan.sites) // 3 + 1)
    return max(default, min(plan.threshold, sites)) if stricter else default
