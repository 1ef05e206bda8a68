"""All jobs of one coordinator process: restored from the journal, run one after the other.

What a job decides is in its machine; what sites and operators call is in `site_api.py`, `transfers.py` and
`operators_api.py`.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections import Counter

from fedcore_server.context import CoordinatorContext
from fedcore_server.job_runner import JobRunner
from fedcore_server.probes import Seen
from fedcore_server.sessions import EVICTED, Sessions
from fedcore_server.tls import Gate
from fedcore_server.views import Views

from fedcore.errors import StoreProblem
from fedcore.types import SiteId
from fedcore.wire import frames

LOG = logging.getLogger("fedcore.coordinator")

PING_SECONDS = 10.0


class Coordinator:
    """The jobs of one coordinator, by name, oldest first."""

    def __init__(self, context: CoordinatorContext, gate: Gate) -> None:
        self.context = context
        self.sessions = Sessions(context, gate)
        self.views = Views(context, self.sessions)
        self.jobs: dict[str, JobRunner] = {}
        self.change = asyncio.Event()
        """Set at the next change that operators see, and then replaced by another event."""
        kept = context.journal.get("coordinator", "jobs")
        for name in json.loads(kept) if kept else []:
            self.adopt(JobRunner.stored(context, self.sessions, name))

    def adopt(self, found: JobRunner) -> None:
        """Add a job at the end of the queue."""
        evicted = self.sessions.evicted
        found.on_change = self.changed
        found.facts.evicted = evicted
        for site in evicted & found.facts.sites.keys():
            found.facts.sites[SiteId(site)].unable = EVICTED
        self.jobs[found.id] = found

    def running(self) -> JobRunner | None:
        """The job that runs: the oldest that is not over."""
        return next((j for j in self.jobs.values() if j.facts.outcome is None), None)

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
            self.sessions.check(frames.Ping(number) if ping else None)
            self.withdraw_revoked()
            try:
                if self.views.show_waits(self.running(), again=ping):
                    self.changed()
            except Exception:  # what is only shown must not end the checks of the sessions
                LOG.exception("waits cannot be shown")

    def withdraw_revoked(self) -> None:
        """The running job changes its keys where a certificate was revoked (PROTOCOL V).

        Retried at the next call where the disk refuses to record it.
        """
        found = self.running()
        for name in self.sessions.revoked():
            if found is not None:
                LOG.warning("site %s: its certificate was revoked, the job gets new keys", name)
                try:
                    found.withdrawn(name)
                except (StoreProblem, OSError) as error:
                    LOG.warning("job %s: %s; retried", found.id, error)
                    continue
            del self.sessions.last_peers[name]

    def seen(self) -> Seen:
        """The gauges of `/metrics`; called from another thread."""
        jobs = list(self.jobs.values())
        rows = [row for found in jobs for row in list(found.facts.rounds.known)]
        return Seen(
            len(self.context.pins), len(self.sessions.open),
            Counter(found.facts.progress.state for found in jobs),
            Counter("released" if row.abandoned is None else "abandoned" for row in rows),
        )  # fmt: skip
