"""What operators and sites are shown of a job: its state, its sites, and the sites that it waits for."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass

from fedcore_server.context import CoordinatorContext
from fedcore_server.job_runner import JobRunner
from fedcore_server.sessions import Sessions

from fedcore.cli.console import waiting_text
from fedcore.secagg.protocol.job.coordinator.facts import WAITING
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
        key = _stage_key(found) if found is not None and names else None
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
        awaited = tuple(map(frames.Awaited, names[:64]))
        until, then = 1000 * (about["until"] or 0), about["then"]
        told = (about["of"], until, then, about["least"], about["in_round"])
        self._sessions.broadcast(frames.Waiting(found.id, awaited, *told))
        if not wait.logged and seconds >= LOGGED_SECONDS:
            wait.logged = True
            LOG.info("job %s: %s", found.id, waiting_text(about, time.time()))
        return True

    def waiting(self, found: JobRunner) -> Json | None:
        """The sites that a job waits for, of how many, until when, and with how many it continues then.

        None while no wait is shown. then: 0 where it cannot continue.
        """
        wait, stage = self._wait, found.facts.stage
        names = tuple(_waiting_for(found))
        if wait.key is None or found.id != wait.key[0] or not wait.shown or not names:
            return None
        until, least = found.facts.progress.waiting_until, self._context.limits.minimum
        if isinstance(stage, coordinator.Waiting):
            of = coordinator.members_of(stage)
            out, least = set(stage.gone) | set(names), stage.header.threshold
            if not found.facts.progress.waiting_for:
                until = self._context.now() + stage.until - self._context.clock()
        else:
            of = tuple(self._context.pins)
            out = {n for n, view in found.facts.sites.items() if view.unable or view.missed} | set(
                names
            )
            least = max(least, found.facts.threshold)
        there = len(of) - len(out & set(of))
        return {
            "for": {name: self._awaited(found, name) for name in names}, "of": len(of),
            "until": None if until is None else round(until), "then": there if there >= least else 0,
            "least": least,
            # A round that cannot be abandoned ends the job.
            "in_round": isinstance(stage, coordinator.Waiting)
            and not isinstance(stage, coordinator.EXPOSED),
        }  # fmt: skip

    def _awaited(self, found: JobRunner, name: SiteId) -> Json:
        """What a connected site does, or when another one was seen last."""
        if name in self._sessions.open:
            return {"doing": found.facts.sites[name].doing or "connected", "last_seen": None}
        return {"doing": "", "last_seen": round(found.facts.sites[name].last_seen) or None}

    def about(self, found: JobRunner) -> Json:
        """One job: a row of `jobs`, and the base of a `watch` event and of result.json."""
        progress, stage = found.facts.progress, found.facts.stage
        settings = json.loads(found.offer.settings)
        return {
            "job": found.id, "task": found.offer.task, "state": progress.state or WAITING,
            "text": progress.text, "stage": type_name(type(stage)).lower(),
            "step": None if found.facts.step is None else [found.facts.step.purpose, found.facts.step.training_round],
            "rounds": settings["round"]["rounds"],
            "rounds_done": sum(trains(r["purpose"]) for r in found.facts.rounds.known),
            "protection": settings["protect"]["protection"],
            "waiting_for": list(progress.waiting_for), "waiting_until": progress.waiting_until,
            "waiting": self.waiting(found),
            "public_metrics": found.facts.plan.public_metrics if found.facts.plan is not None else None,
            "model": found.machine.model.here,
            "metrics": max(found.facts.metrics.known, key=lambda row: row["number"], default=None),
        }  # fmt: skip

    def sites(self, found: JobRunner | None) -> Json:
        """All sites, as one job sees them if there is one."""
        out: Json = {}
        for name in self._context.pins:
            session = self._sessions.open.get(name)
            view = found.facts.sites[name] if found is not None else None
            out[name] = {
                "connected": session is not None,
                "evicted": name in self._sessions.evicted,
                "since": session.since if session else None,
                "last_seen": session.last_seen if session else (view.last_seen if view else None),
                "doing": view.doing if view and session else "",
                "unable": view.unable if view else "",
            }
        return out


def _waiting_for(found: JobRunner) -> Collection[SiteId]:
    """The sites that are away, else those that still work at this stage."""
    return found.facts.progress.waiting_for or coordinator.waiting_for(found.facts.stage)


def _stage_key(found: JobRunner) -> tuple[str, str, int]:
    """One stage of one round of one job."""
    header = getattr(found.facts.stage, "header", None)
    return found.id, type(found.facts.stage).__name__, header.round if header is not None else 0
