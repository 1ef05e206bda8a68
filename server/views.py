"""What operators and sites are shown of a job: its state, its sites, and the sites that it waits for."""

import json
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass

from fedcore_server.context import CoordinatorContext
from fedcore_server.job_runner import JobRunner
from fedcore_server.sessions import Sessions

from fedcore.cli.console import waiting_text
from fedcore.results import AwaitedSite, JobSite, JobSummary, JobWait
from fedcore.secagg.protocol.job.coordinator.facts import WAITING, SiteView
from fedcore.secagg.protocol.round import coordinator
from fedcore.secagg.protocol.wire_form import type_name
from fedcore.secagg.purposes import trains
from fedcore.types import Json, SiteId
from fedcore.wire import frames

LOG = logging.getLogger("fedcore.coordinator")

SHOWN_SECONDS, LOGGED_SECONDS = 1.0, 10.0
"""Duration after which a wait is shown to operators and sites, and after which it is logged."""


@dataclass
class _Wait:
    """The wait of the running job. shown, logged: to operators and sites, in the log.

    key: job, stage and round; None while no site is waited for. since: monotonic seconds.
    """

    key: tuple[str, str, int] | None = None
    sites: tuple[SiteId, ...] = ()
    since: float = 0.0
    shown: bool = False
    logged: bool = False


class Views:
    """JSON of jobs and sites for operators, and the waits of the running job."""

    def __init__(self, context: CoordinatorContext, sessions: Sessions) -> None:
        self._context, self._sessions = context, sessions
        self._wait = _Wait()

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
                self._sessions.broadcast(frames.Waiting(self._wait.key[0]))
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
        self._sessions.broadcast(frames.Waiting(found.id, awaited, *waits))
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
        until, least = facts.progress.waiting_until, self._context.limits.minimum
        if isinstance(stage, coordinator.Waiting):
            of = coordinator.members_of(stage)
            out, least = set(stage.gone) | set(names), stage.header.threshold
            if not facts.progress.waiting_for:
                until = self._context.now() + stage.until - self._context.clock()
        else:
            of = tuple(self._context.pins)
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
        if name in self._sessions.open:
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
            model=found.machine.model.here,
            metrics=max(facts.metrics.known, key=lambda row: row.number, default=None),
        )  # fmt: skip

    def sites(self, found: JobRunner | None) -> Json:
        """{site: `JobSite` as JSON} of all sites, as one job sees them if there is one."""
        out: Json = {}
        for name in self._context.pins:
            session = self._sessions.open.get(name)
            view = found.facts.sites[name] if found is not None else SiteView()
            out[name] = JobSite(
                connected=session is not None,
                evicted=name in self._sessions.evicted,
                since=session.since if session else None,
                last_seen=session.last_seen if session else (view.last_seen if found else None),
                doing=view.doing if session else "",
                unable=view.unable,
            ).to_json()
        return out


def _waiting_for(found: JobRunner) -> Collection[SiteId]:
    """The sites that are away, else those that still work at this stage."""
    return found.facts.progress.waiting_for or coordinator.waiting_for(found.facts.stage)
