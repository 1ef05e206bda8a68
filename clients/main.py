"""The site's process: its journal and spool, its jobs, its training process and its one session.

Invariant: the training process is started before grpc; a task runs only if the operator allowed its
name and its hash; on SIGTERM the session ends with a word and the process within ten seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import time
from collections.abc import Callable
from typing import Any

from fedcore_clients.config import SiteConfig
from fedcore_clients.jobs import Contributor, Party, SiteJob
from fedcore_clients.session import Address, Session
from fedcore_clients.training import Loaded, Training, TrainingFailed

from fedcore.aggregate.jobstate import JobState
from fedcore.errors import BadInput, MalformedMessage
from fedcore.files import write_json
from fedcore.loopback import Contribution
from fedcore.plan import RoundPlan
from fedcore.protect.identity import roster_digest
from fedcore.protocol import course, job
from fedcore.protocol.encoding import encode
from fedcore.provision.identities import read_identity, read_roster
from fedcore.provision.kit import Kit
from fedcore.provision.peer import require_role
from fedcore.store.journal import Journal
from fedcore.store.spool import Spool
from fedcore.types import Json, SiteId
from fedcore.wire.frames import Held, Hello, Record, SmallDownload, Task
from fedcore.wire.jobs import TO_SITE
from fedcore.wire.records import unpack_record

LOG = logging.getLogger("fedcore.site")


class AllowedTasks:
    """The training process behind the operator's list of tasks."""

    def __init__(self, config: SiteConfig, training: Training) -> None:
        self._config, self._training = config, training

    async def load(self, job: str, settings: Json, task: str, digest: str) -> Loaded:
        """Load a job's task, if it is allowed by name and hash. Raises TrainingFailed."""
        allowed = self._config.tasks.get(task)
        if allowed is None:
            raise TrainingFailed("task not allowed")
        if allowed.sha256 != digest:
            raise TrainingFailed("task differs")
        return await self._training.load(
            job, task=allowed.task, base=str(self._config.base), digest=digest, settings=settings,
            site=self._config.site, source=allowed.source,
        )  # fmt: skip

    async def contribute(
        self, job: str, plan: RoundPlan, step: course.Step, state: JobState
    ) -> Contribution:
        """The content of one vector. Raises TrainingFailed."""
        return await self._training.contribute(job, plan, step, state)

    async def forget(self, job: str) -> None:
        """The job is over."""
        await self._training.forget(job)


class Site:
    """All jobs of one site process."""

    def __init__(
        self, config: SiteConfig, kit: Kit, party: Party, contributor: Contributor
    ) -> None:
        self.config, self.party, self.contributor = config, party, contributor
        self.jobs: dict[str, SiteJob] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        proxy = "" if config.proxy == "none" else config.proxy
        self.session = Session(
            kit, Address(config.host, config.port, proxy), self._hello, self._on_frame,
            self._on_connected,
        )  # fmt: skip

    def restore(self) -> None:
        """The jobs of the journal."""
        kept = self.party.journal.get("site", "jobs")
        for name in json.loads(kept) if kept else []:
            self._begin(SiteJob.stored(self.party, self.session, self.contributor, name))

    def _begin(self, found: SiteJob) -> None:
        self.jobs[found.id] = found
        if found.ended is None:
            task = asyncio.get_running_loop().create_task(found.run())
            task.add_done_callback(self._job_task_ended)
            self._running[found.id] = task

    @staticmethod
    def _job_task_ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            LOG.error("a job stopped by a fault of this side", exc_info=task.exception())

    def _hello(self) -> Hello:
        held = []
        for found in self.jobs.values():
            standing = found.stage.standing
            held.append(Held(found.id, standing.certificate, standing.epoch, standing.round))
        tasks = tuple(Task(name, task.sha256) for name, task in self.config.tasks.items())
        return Hello(roster_digest(self.party.pins), tasks, tuple(held[-64:]))

    def _on_connected(self) -> None:
        for found in self.jobs.values():
            found.connected()

    def _on_frame(self, frame: Any) -> None:
        match frame:
            case Record():
                message = unpack_record(frame, TO_SITE, sender="coordinator")
                if isinstance(message, job.JobOffer):
                    self._offered(message)
                found = self.jobs.get(frame.job)
                if found is None:
                    LOG.warning("a message of the unknown job %s", frame.job)
                else:
                    found.tell(message)
            case SmallDownload(start, data):
                if start.job in self.jobs:
                    self.jobs[start.job].inline(start.digest, data)

    def _offered(self, offer: job.JobOffer) -> None:
        """A new job: known from now on, whatever becomes of it."""
        known = self.jobs.get(offer.job)
        if known is not None:
            if known.offer != offer:
                raise MalformedMessage(
                    "job", found="another offer under a known id", expected="the same",
                    fault="coordinator",
                )  # fmt: skip
            return
        journal = self.party.journal
        journal.put(offer.job, "offer", encode(offer))
        journal.put("site", "jobs", json.dumps([*self.jobs, offer.job]).encode())
        LOG.info("job %s: task %s", offer.job, offer.task)
        self._begin(SiteJob(self.party, self.session, self.contributor, offer))

    def status(self) -> Json:
        """What `fed-site status` shows."""
        link = self.session.status
        rows = []
        for found in self.jobs.values():
            state, stage = found.state, found.stage
            header = getattr(stage, "header", None)
            rows.append(
                {
                    "job": found.id, "task": found.offer.task,
                    "stage": "over" if found.ended else type(stage).__name__.lower(),
                    "round": header.training_round if header is not None else None,
                    "last_error": found.last_error,
                    "outcome": found.ended.outcome if found.ended else None,
                    "model_sha256": state.model_sha256 if state and state.done else None,
                    "done": [state.done.purpose, state.done.training_round]
                    if state and state.done else None,
                }
            )  # fmt: skip
        return {
            "site": self.party.id, "coordinator": link.coordinator, "connected_since": link.since,
            "last_error": link.last_error, "jobs": rows, "written": time.time(),
        }  # fmt: skip

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set, or the coordinator will not have this site."""
        self.restore()
        loop = asyncio.get_running_loop()
        session = loop.create_task(self.session.run())
        status = loop.create_task(self._keep_status())
        waiting = loop.create_task(stop.wait())
        try:
            await asyncio.wait({session, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if session.done():
                session.result()
                refused = self.session.refused
                assert refused is not None
                raise BadInput(f"coordinator: {refused.code}: {refused.text}")
            await self.session.goodbye("the site stops")
        finally:
            tasks = [session, status, waiting, *self._running.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for found in self.jobs.values():
                await found.close()
            self._write_status()

    async def _keep_status(self) -> None:
        while True:
            self._write_status()
            await asyncio.sleep(1.0)

    def _write_status(self) -> None:
        with contextlib.suppress(OSError):
            write_json(self.party.folder / "status.json", self.status())


def run(config: SiteConfig, said: Callable[[str], None]) -> None:
    """Run until SIGTERM or SIGINT. Raises FedcoreError."""
    pins = read_roster(config.roster)
    kit = Kit.load(config.kit)
    require_role(kit.peer, ["site"])
    if kit.peer.name != config.site or config.site not in pins:
        raise BadInput(
            f"site: found a certificate of {kit.peer.name!r}, expected one of {config.site!r}, "
            "which must be on the roster",
            remedy="check `site`, `kit` and `roster` in site.toml",
        )
    identity = read_identity(config.identity)
    if pins[SiteId(config.site)] != identity.public:
        raise BadInput(
            f"identity: found another key than roster.toml pins for {config.site!r}",
            remedy="the roster must hold the public half of this site's identity key",
        )
    with Journal.open(config.folder / "journal.sqlite", party=f"site {config.site}") as journal:
        party = Party(
            kit.peer.federation, SiteId(config.site), identity, pins, journal,
            Spool(config.folder / "spool", config.spool_bytes), config.folder,
            config.minimum_sites, config.patience_seconds,
        )  # fmt: skip
        asyncio.run(_run(config, kit, party, said))


async def _run(config: SiteConfig, kit: Kit, party: Party, said: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(each, stop.set)
    training = Training()
    await training.start()
    try:
        site = Site(config, kit, party, AllowedTasks(config, training))
        said(f"site {config.site}: coordinator {config.coordinator}")
        await site.run(stop)
    finally:
        await training.close()
