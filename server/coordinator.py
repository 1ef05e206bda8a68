"""All jobs of one coordinator process: restored from the journal, run one after the other; and what is shown of them.

What a job decides is in its machine; what sites and operators call is in `site_api.py` and `operators_api.py`.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from fedcore_server.context import CoordinatorContext
from fedcore_server.job_runner import JobRunner
from fedcore_server.probes import Seen
from fedcore_server.sessions import EVICTED, WITHDRAWN, Sessions
from fedcore_server.tls import Gate

from fedcore.cli.console import waiting_text
from fedcore.errors import BadInput, Refused, StoreProblem, with_hint
from fedcore.identity.signed_roster import changes_of
from fedcore.results import AwaitedSite, JobSite, JobSummary, JobWait
from fedcore.secagg.protocol.job.coordinator.events import SiteLeft
from fedcore.secagg.protocol.job.coordinator.facts import WAITING, SiteView
from fedcore.secagg.protocol.round import coordinator
from fedcore.secagg.protocol.wire_form import type_name
from fedcore.secagg.purposes import trains
from fedcore.types import Json, SiteId
from fedcore.wire import frames

LOG = logging.getLogger("fedcore.coordinator")

PING_SECONDS = 10.0

SHOWN_SECONDS, LOGGED_SECONDS = 1.0, 10.0
"""Duration after which a wait is shown to operators and sites, and after which it is logged."""


@dataclass
class _Wait:
    """The wait of the running job. shown, logged: to operators and sites, in the log. key: job, stage and round; None
    while no site is waited for. since: monotonic seconds."""

    key: tuple[str, str, int] | None = None
    sites: tuple[SiteId, ...] = ()
    since: float = 0.0
    shown: bool = False
    logged: bool = False


class Coordinator:
    """The jobs of one coordinator, by name, oldest first."""

    def __init__(self, context: CoordinatorContext, gate: Gate) -> None:
        self.context = context
        self.sessions = Sessions(context, gate)
        self._wait = _Wait()
        self.jobs: dict[str, JobRunner] = {}
        self.change = asyncio.Event()
        """Set at the next change that operators see, and then replaced by another event."""
        kept = context.journal.get("coordinator", "jobs")
        for name in json.loads(kept) if kept else []:
            self.adopt(JobRunner.stored(context, self.sessions, name))

    def adopt(self, found: JobRunner) -> None:
        """Add a job at the end of the queue."""
        found.on_change, found.on_begin = self.changed, self._begins
        self._show_sites(found)
        self.jobs[found.id] = found

    def _begins(self, found: JobRunner) -> None:
        """Show a job that begins the sites that were sent away, and its sites which roster it has."""
        self._show_sites(found)
        self.sessions.broadcast(found.job_roster, found.roster.sites)

    def _show_sites(self, found: JobRunner) -> None:
        """Show a job the sites that were sent away."""
        evicted = self.sessions.evicted
        found.facts.evicted = evicted
        for site, view in found.facts.sites.items():
            if site in evicted:
                view.unable = EVICTED
            elif site not in self.context.rosters:
                view.unable = WITHDRAWN["roster"]
            view.missed |= site in self.sessions.away

    def left(self, name: SiteId, code: str) -> None:
        """A site said goodbye. No job waits for one that is away because its operator says so."""
        if chosen := code in frames.AWAY:
            self.sessions.note_away(name, code)
        running = self.running()
        for found in (each for each in self.jobs.values() if name in each.facts.sites):
            if found is running:
                found.put(SiteLeft(name, chosen))
            elif chosen and found.facts.outcome is None:
                found.facts.sites[name].missed = True

    def running(self) -> JobRunner | None:
        """The job that runs: the oldest that is not over."""
        return next((j for j in self.jobs.values() if j.facts.outcome is None), None)

    def knows_roster(self, digest: str) -> bool:
        """Whether a site may connect with this digest: of the newest roster, or of a job that is not over. A site that
        has another one is sent the newest, if that is signed."""
        if digest != self.context.rosters.current.digest:
            self.refresh_roster()  # the site may have the roster that was written just now
        if self.context.rosters.current.document:
            return True
        running = (job.roster.digest for job in self.jobs.values() if job.facts.outcome is None)
        return digest in {self.context.rosters.current.digest, *running}

    def changed(self) -> None:
        """Wake up the calls that watch."""
        self.change.set()
        self.change = asyncio.Event()

    async def run(self) -> None:
        """Run the jobs, one after the other, and check the sessions, until cancelled."""
        care = asyncio.get_running_loop().create_task(self._check_sessions())
        try:
            while True:
                found = self.running()
                if found is None:
                    await self.change.wait()
                else:
                    await found.run()
                    self.changed()
        finally:
            care.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await care

    async def _check_sessions(self) -> None:
        """Every second: check the certificates and show waits; now and then: ping the sites."""
        number, last = 0, 0.0
        while True:
            await asyncio.sleep(1.0)
            ping = time.monotonic() - last > PING_SECONDS
            if ping:
                number, last = number + 1, time.monotonic()
            self.refresh_roster()
            self.sessions.check(frames.Ping(number) if ping else None)
            self.withdraw()
            try:
                if self.show_waits(self.running(), again=ping):
                    self.changed()
            except Exception:  # what is only shown must not end the checks of the sessions
                LOG.exception("waits cannot be shown")

    def refresh_roster(self) -> None:
        """Reload the roster if its file changed: the next job gets it, and the jobs before keep their own."""
        rosters = self.context.rosters
        before = rosters.current
        try:
            if not rosters.refresh():
                return
        except (BadInput, Refused) as error:
            LOG.error("roster: %s; the one read before stays in force", with_hint(error))  # noqa: TRY400 - one line
            return
        now = rosters.current
        changes = tuple(changes_of(now.sites, before.sites))
        about = {"digest": now.digest, "sites": tuple(now.sites), "changes": changes}
        self.sessions.note("roster", number=now.number, **about)
        for line in changes:
            LOG.info("roster %s: %s", now.number or "(not numbered)", line)
        if now.document:
            self.sessions.broadcast(frames.Roster(now.document), now.sites)
        self.changed()

    def withdraw(self) -> None:
        """Where a certificate was revoked, or a site removed from the roster, the running job goes on without the site
        and changes its keys (PROTOCOL V). Retried at the next call where the disk refuses to record it."""
        found = self.running()
        for name, why in self.sessions.withdrawn().items():
            if found is not None and name in found.facts.sites:
                LOG.warning("site %s: %s, the job goes on without it and gets new keys", name, why)
                try:
                    found.withdrawn(name)
                except (StoreProblem, OSError) as error:
                    LOG.warning("job %s: %s; retried", found.id, error)
                    continue
                found.facts.sites[name].unable = why
                found.put(SiteLeft(name))
            peer = self.sessions.last_peers[name]
            about = {"certificate": peer.fingerprint, "serial": peer.serial}
            self.sessions.note("revoke", site=name, word=why, **about)
            del self.sessions.last_peers[name]

    def returned(self, name: SiteId) -> None:
        """A site has a new session: what withdrew it before counts no more."""
        for found in self.jobs.values():
            view = found.facts.sites.get(name)
            if view is not None and view.unable in WITHDRAWN.values():
                view.unable = ""

    def seen(self) -> Seen:
        """The gauges of `/metrics`; called from another thread."""
        jobs = list(self.jobs.values())
        rows = [row for found in jobs for row in list(found.facts.rounds.known)]
        return Seen(
            len(self.context.rosters), len(self.sessions.open),
            Counter(found.facts.progress.state for found in jobs),
            Counter("released" if row.abandoned is None else "abandoned" for row in rows),
        )  # fmt: skip

    def show_waits(self, found: JobRunner | None, *, again: bool) -> bool:
        """Show a wait of the running job after a second, log it after ten; whether it was shown now.

        again: also when it was shown before.
        """
        names = tuple(_waiting_for(found)) if found else ()
        key = None
        if found is not None and names:
            key = found.id, type(found.facts.stage).__name__, found.facts.number
        if key != self._wait.key:
            if self._wait.key is not None and self._wait.shown:
                before = self.jobs[self._wait.key[0]]
                self.sessions.broadcast(frames.Waiting(before.id), before.roster.sites)
            self._wait = _Wait(key, since=time.monotonic())
        wait, seconds = self._wait, time.monotonic() - self._wait.since
        if found is None or not names or seconds < SHOWN_SECONDS:
            return False
        if wait.shown and names == wait.sites and not again:
            return False
        wait.shown, wait.sites = True, names
        about = self.waiting(found)
        assert about is not None
        awaited, until = tuple(map(frames.Awaited, names[:64])), int(1000 * (about.until or 0))
        waits = (about.of, until, about.then, about.least, about.in_round)
        self.sessions.broadcast(frames.Waiting(found.id, awaited, *waits), found.roster.sites)
        if not wait.logged and seconds >= LOGGED_SECONDS:
            wait.logged = True
            LOG.info("job %s: %s", found.id, waiting_text(about.to_json(), time.time()))
        return True

    def waiting(self, found: JobRunner) -> JobWait | None:
        """What a job waits for; None while no wait is shown."""
        facts, wait, stage = found.facts, self._wait, found.facts.stage
        names = tuple(_waiting_for(found))
        if wait.key is None or found.id != wait.key[0] or not wait.shown or not names:
            return None
        until, least = facts.progress.waiting_until, self.context.limits.minimum
        if isinstance(stage, coordinator.Waiting):
            of = coordinator.members_of(stage)
            out, least = set(stage.gone) | set(names), stage.header.threshold
            if not facts.progress.waiting_for:
                until = self.context.now() + stage.until - self.context.clock()
        else:
            of = tuple(facts.pins)
            out = {n for n, view in facts.sites.items() if view.unable or view.missed} | set(names)
            least = max(least, facts.threshold)
        there = len(of) - len(out & set(of))
        # A round that cannot be abandoned ends the job.
        in_round = isinstance(stage, coordinator.Waiting) and not isinstance(
            stage, coordinator.EXPOSED
        )
        return JobWait(
            sites={name: self._awaited(facts.sites[name], name) for name in names}, of=len(of),
            until=None if until is None else round(until), then=there if there >= least else 0,
            least=least, in_round=in_round,
        )  # fmt: skip

    def _awaited(self, view: SiteView, name: SiteId) -> AwaitedSite:
        if name in self.sessions.open:
            return AwaitedSite(doing=view.doing or "connected")
        return AwaitedSite(last_seen=round(view.last_seen) or None)

    def about(self, found: JobRunner) -> JobSummary:
        """One job: a row of `jobs`, and the base of a `watch` event and of result.json."""
        facts, settings = found.facts, json.loads(found.offer.settings)
        progress, step = facts.progress, facts.step
        return JobSummary(
            job=found.id, task=found.offer.task, state=progress.state or WAITING,
            text=progress.text, stage=type_name(type(facts.stage)).lower(),
            step=None if step is None else (step.purpose, step.training_round),
            rounds=settings["round"]["rounds"],
            rounds_done=sum(trains(row.purpose) for row in facts.rounds.known),
            protection=settings["protect"]["protection"],
            waiting_for=tuple(progress.waiting_for), waiting_until=progress.waiting_until,
            waiting=self.waiting(found),
            public_metrics=facts.plan.public_metrics if facts.plan is not None else None,
            model=found.machine.model.here, roster=found.roster.number,
            metrics=max(facts.metrics.known, key=lambda row: row.number, default=None),
        )  # fmt: skip

    def sites(self, found: JobRunner | None) -> Json:
        """{site: `JobSite` as JSON} of the sites of a job as it sees them, else of the newest roster."""
        out: Json = {}
        for name in self.context.rosters if found is None else found.roster.sites:
            session = self.sessions.open.get(name)
            view = found.facts.sites[name] if found is not None else SiteView()
            out[name] = JobSite(
                connected=session is not None, evicted=name in self.sessions.evicted,
                since=session.since if session else None,
                last_seen=session.last_seen if session else (view.last_seen if found else None),
                doing=view.doing if session else "",
                unable=view.unable or self.sessions.away.get(name, ""),
                roster=session.roster if session else "",
                second=self.sessions.seconds.get(name, ""),
            ).to_json()  # fmt: skip
        return out


def _waiting_for(found: JobRunner) -> Collection[SiteId]:
    """The sites that are away, else those that still work at this stage."""
    return found.facts.progress.waiting_for or coordinator.waiting_for(found.facts.stage)
