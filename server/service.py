"""The coordinator's calls: sessions, transfers, and the operators' words, over one TLS port.

Messages in, messages out: whatever comes in is judged by `fedcore.wire` and by the gate, and goes to the
job it names; whatever a job says is put into the session of its site. Nothing is decided here.

Invariant: a call is admitted by its certificate before a frame of it is read, and a session again every
second; a site has one session, the newest; what a slow site has not read yet is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, assert_never

import grpc
import grpc.aio
from fedcore_server.context import CoordinatorContext, Quota
from fedcore_server.job_runner import JobRunner
from fedcore_server.prometheus import Counts, Seen
from fedcore_server.tls import Gate, refuse

from fedcore.cli.console import waiting_text
from fedcore.config import build_job
from fedcore.errors import (
    BadInput,
    CertificateRefused,
    FedcoreError,
    MalformedMessage,
    PeerRefused,
    PlanRefused,
    StoreProblem,
    UnknownName,
    VersionRefused,
)
from fedcore.files import write_json
from fedcore.identity.peer import Peer, check_name
from fedcore.secagg.crypto.identity_key import roster_digest
from fedcore.secagg.label import Terms
from fedcore.secagg.plan import canonical
from fedcore.secagg.protections import refuse_plain
from fedcore.secagg.protocol import job_messages
from fedcore.secagg.protocol.job.coordinator.facts import WAITING
from fedcore.secagg.protocol.round import coordinator
from fedcore.secagg.protocol.wire_form import encode, type_name
from fedcore.secagg.purposes import trains
from fedcore.store.spool import IncomingUpload, Stored
from fedcore.types import Json, SiteId
from fedcore.wire import calls, chunks, frames, refusals
from fedcore.wire.job_records import FROM_ANY_SITE, TO_COORDINATOR, TO_SITE
from fedcore.wire.limits import INLINE, KIB, MAX_JSON
from fedcore.wire.records import pack_record, unpack_record

LOG = logging.getLogger("fedcore.coordinator")

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

ROWS_AT_ONCE, ROWS_BYTES = 20, 256 * KIB
"""Rounds in one event of `watch`, and their bytes: a row names every site, and a frame has a limit."""

REST_BYTES = KIB
"""Of an answer to `jobs`, what is neither a job nor a site."""

MOST_FRAMES, MOST_BYTES = 4096, 64 << 20
"""What may wait for one site that does not read; beyond it its session ends, and it connects again."""

MOST_CALLS = 32
"""Open calls of one certificate: a site has a session, a transfer or two, and for a while old ones."""

MOST_RECORDS = 64
"""Records that may wait for a job; beyond it nothing more is read, and whoever sends waits."""

FIRST_WORD_SECONDS, PART_SECONDS = 10.0, 120.0
"""How long a call may be open without its first frame, and an upload without its next part."""

PING_SECONDS = 10.0

SLOW_SECONDS, SAID_SECONDS = 1.0, 10.0
"""From when on a wait is shown to those who watch, and when it is a line of the log."""

EVICTED = "evicted"
"""What is said of a site that an operator sent away, in `unable` and as a Goodbye."""

RESULT_FILE = "result.json"


@dataclass
class SiteSession:
    """One open session."""

    peer: Peer
    out: asyncio.Queue[bytes | None] = field(default_factory=lambda: asyncio.Queue(MOST_FRAMES))
    since: float = field(default_factory=time.time)
    last_seen: float = field(default_factory=time.time)
    tasks: tuple[str, ...] = ()
    over: bool = False
    begun: bool = False
    waiting: int = 0

    def put(self, frame: frames.ToSite) -> None:
        """Queue a frame; a site that does not read loses its session."""
        self.put_packed(calls.SESSION.gives.pack(frame))

    def put_packed(self, data: bytes) -> None:
        """Queue a frame as bytes."""
        if self.over:
            return
        if self.out.full() or self.waiting + len(data) > MOST_BYTES:
            LOG.warning("%s: found %d frames unread, session ended", self.peer, self.out.qsize())
            self.end(None)
            return
        self.waiting += len(data)
        self.out.put_nowait(data)

    async def next(self) -> bytes | None:
        """The next frame to send; None after the last one."""
        if self.over and self.out.empty():
            return None
        data = await self.out.get()
        self.waiting -= len(data or b"")
        return data

    def end(self, goodbye: frames.Goodbye | None) -> None:
        """No more frames but this one."""
        if goodbye is not None:
            self.put(goodbye)
        self.over = True
        with contextlib.suppress(asyncio.QueueFull):
            self.out.put_nowait(None)


class Coordinator:
    """All jobs and sessions of one coordinator process."""

    def __init__(self, context: CoordinatorContext, gate: Gate) -> None:
        self.context, self.gate = context, gate
        self.sessions: dict[SiteId, SiteSession] = {}
        self._last_peers: dict[SiteId, Peer] = {}
        """The certificate of each site's last session: it may be withdrawn while the site is away."""
        self.jobs: dict[str, JobRunner] = {}
        self.pins = roster_digest(context.pins)
        self.counts = Counts()
        self._said: tuple[str, job_messages.ToSite | None, bytes] = "", None, b""
        kept = context.journal.get("coordinator", "evicted")
        self.evicted: set[str] = set(json.loads(kept)) if kept else set()
        self._wait: _Wait = _Wait()
        self._changed = asyncio.Event()
        self._queued = asyncio.Event()
        self._restore()

    # ------------------------------------------------------------------------------- the jobs

    def _restore(self) -> None:
        kept = self.context.journal.get("coordinator", "jobs")
        for name in json.loads(kept) if kept else []:
            found = JobRunner.stored(self.context, self, name)
            self._adopt(found)

    def _adopt(self, found: JobRunner) -> None:
        found.on_change = self.changed
        found.facts.evicted = self.evicted
        for site in self.evicted & found.sites.keys():
            found.sites[SiteId(site)].unable = EVICTED
        self.jobs[found.id] = found

    async def run(self) -> None:
        """Run the jobs, one after the other, and look after the sessions, until cancelled."""
        care = asyncio.get_running_loop().create_task(self._care())
        try:
            while True:
                found = next((j for j in self.jobs.values() if j.outcome is None), None)
                if found is None:
                    self._queued.clear()
                    await self._queued.wait()
                    continue
                await found.run()
                self.changed()
        finally:
            care.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await care

    async def _care(self) -> None:
        """Every second: who may not stay, and what people should see; now and then: who is there."""
        number, last = 0, 0.0
        while True:
            await asyncio.sleep(1.0)
            ping = time.monotonic() - last > PING_SECONDS
            if ping:
                number, last = number + 1, time.monotonic()
            for session in list(self.sessions.values()):
                self._keep(session, frames.Ping(number) if ping else None)
            self._look_for_withdrawn()
            try:
                self._watch_waits(again=ping)
            except Exception:  # what is only shown must not end the care for the sessions
                LOG.exception("waits cannot be shown")

    def _look_for_withdrawn(self) -> None:
        """The job under way changes its keys where a site's certificate was revoked (PROTOCOL V)."""
        found = self.running()
        for name, peer in list(self._last_peers.items()):
            try:
                self.gate.still(peer)
            except CertificateRefused as error:
                del self._last_peers[name]
                if error.check == "revoked" and found is not None:
                    LOG.warning("site %s: its certificate was revoked, the job gets new keys", name)
                    found.withdrawn(name)

    def _keep(self, session: SiteSession, ping: frames.Ping | None) -> None:
        """End a session whose certificate no longer counts, or ask whether it is there."""
        try:
            self.gate.still(session.peer)
        except CertificateRefused as error:
            LOG.warning("%s", error)
            code = "revoked" if error.check == "revoked" else "roster"
            session.end(frames.Goodbye(code, _line(str(error))))
            return
        if ping is not None:
            session.put(ping)

    def _watch_waits(self, *, again: bool) -> None:
        """What people are told of a wait: shown after a second, in the log after ten."""
        found = self.running()
        names = tuple(self._waiting_for(found)) if found else ()
        key = _stage_key(found) if found is not None and names else None
        if key != self._wait.key:
            if self._wait.key is not None and self._wait.shown:
                self._to_all(frames.Waiting(self._wait.key[0]))
            self._wait = _Wait(key, since=time.monotonic())
        wait = self._wait
        if found is None or not names or wait.seconds < SLOW_SECONDS:
            return
        if wait.shown and names == wait.sites and not again:
            return
        wait.shown, wait.sites = True, names
        about = self._waiting(found)
        assert about is not None
        self.changed()
        awaited = tuple(map(frames.Awaited, names[:64]))
        until, then = 1000 * (about["until"] or 0), about["then"]
        told = (about["of"], until, then, about["least"], about["in_round"])
        self._to_all(frames.Waiting(found.id, awaited, *told))
        if not wait.said and wait.seconds >= SAID_SECONDS:
            wait.said = True
            LOG.info("job %s: %s", found.id, waiting_text(about, time.time()))

    def _to_all(self, frame: frames.Waiting) -> None:
        data = calls.SESSION.gives.pack(frame)
        for session in list(self.sessions.values()):
            session.put_packed(data)

    def _waiting_for(self, found: JobRunner) -> Collection[SiteId]:
        """Who is away, else who is still at work on this stage."""
        return found.progress.waiting_for or coordinator.waiting_for(found.stage)

    def _waiting(self, found: JobRunner) -> Json | None:
        """Whom a job waits for, of how many, until when, and with how many it then goes on.

        None while nobody would call it waiting. then: 0 where it could not go on.
        """
        wait, stage = self._wait, found.stage
        names = tuple(self._waiting_for(found))
        if wait.key is None or found.id != wait.key[0] or not wait.shown or not names:
            return None
        until, least = found.progress.waiting_until, self.context.limits.minimum
        if isinstance(stage, coordinator.Waiting):
            of = coordinator.members_of(stage)
            out, least = set(stage.gone) | set(names), stage.header.threshold
            if not found.progress.waiting_for:
                until = self.context.now() + stage.until - self.context.clock()
        else:
            of = tuple(self.context.pins)
            out = {n for n, view in found.sites.items() if view.unable or view.missed} | set(names)
            least = max(least, found.facts.threshold)
        there = len(of) - len(out & set(of))
        return {
            "for": {name: self._seen(found, name) for name in names}, "of": len(of),
            "until": None if until is None else round(until), "then": there if there >= least else 0,
            "least": least,
            # What cannot be abandoned as a round ends the job.
            "in_round": isinstance(stage, coordinator.Waiting)
            and not isinstance(stage, coordinator.EXPOSED),
        }  # fmt: skip

    def _seen(self, found: JobRunner, name: SiteId) -> Json:
        """What a connected site is at, or when another one was heard of last."""
        if name in self.sessions:
            return {"doing": found.sites[name].doing or "connected", "last_seen": None}
        return {"doing": "", "last_seen": round(found.sites[name].last_seen) or None}

    def seen(self) -> Seen:
        """For the counters; asked from another thread."""
        jobs = list(self.jobs.values())
        rows = [row for found in jobs for row in list(found.rounds.known)]
        return Seen(
            len(self.context.pins), len(self.sessions),
            Counter(found.progress.state for found in jobs),
            Counter("abandoned" if "abandoned" in row else "released" for row in rows),
        )  # fmt: skip

    def say_goodbye(self) -> None:
        """This process ends; the sites come back to the next one."""
        for session in list(self.sessions.values()):
            session.end(frames.Goodbye("stopping", "the coordinator stops"))

    def changed(self) -> None:
        """Somebody who watches should look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def running(self) -> JobRunner | None:
        """The job under way."""
        return next((j for j in self.jobs.values() if j.outcome is None), None)

    # ------------------------------------------------------------------- the sessions, for jobs

    def connected(self) -> Collection[SiteId]:
        """Sites with a session now, in roster order; whether one is in it is asked for each of many."""
        here = self.sessions
        return dict.fromkeys(n for n in self.context.pins if n in here and not here[n].over)

    def say(self, site: SiteId, job: str, message: job_messages.ToSite) -> None:
        """Send a record if the site has a session."""
        session = self.sessions.get(site)
        if session is None:
            return
        if self._said[:2] != (job, message):  # what all sites hear is laid out once for all of them
            frame = calls.SESSION.gives.pack(pack_record(job, message, TO_SITE))
            self._said = job, message, frame
        session.put_packed(self._said[2])

    def push(self, site: SiteId, job: str, what: str, stored: Stored) -> None:
        """Send a small sum or checkpoint unasked."""
        session = self.sessions.get(site)
        if session is None or stored.travels > INLINE:
            return
        start = frames.DownloadStart(job, what, stored.digest)
        data = stored.path.read_bytes()
        self.counts.bytes_out += len(data)
        session.put(frames.SmallDownload(start, data))

    # ---------------------------------------------------------------------------- site's calls

    async def session(
        self, requests: AsyncIterator[bytes], context: Context
    ) -> AsyncIterator[bytes]:
        """One site, as long as it stays."""
        peer = await self._admit(context, calls.SESSION)
        name = SiteId(peer.name)
        if name in self.evicted:
            yield calls.SESSION.gives.pack(_SENT_AWAY)
            return
        session = SiteSession(peer)
        self._last_peers[name] = peer
        reader = asyncio.get_running_loop().create_task(self._read(name, session, requests))
        try:
            while (data := await session.next()) is not None:
                yield data
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader
            if self.sessions.get(name) is session:
                del self.sessions[name]
                LOG.info("site %s: session over", name)
                self.changed()

    async def _read(
        self, name: SiteId, session: SiteSession, requests: AsyncIterator[bytes]
    ) -> None:
        try:
            async for data in _prompt(
                requests, lambda: None if session.begun else FIRST_WORD_SECONDS
            ):
                if session.over:
                    return
                frame = calls.SESSION.takes.unpack(data, sender=name)
                session.last_seen = time.time()
                if session.begun:
                    await self._on_frame(name, session, frame)
                elif self._begin(name, session, frame):
                    session.begun = True
                else:
                    return
        except TimeoutError:
            LOG.info("site %s: a session without a word, ended", name)
        except VersionRefused as error:
            session.end(frames.Goodbye("version", _line(str(error))))
        except PeerRefused as error:
            LOG.warning("site %s: %s", name, error)
            session.end(frames.Goodbye("malformed", _line(str(error))))
        except Exception:
            LOG.exception("site %s: session ended by a fault of this side", name)
        finally:
            session.end(None)

    def _begin(self, name: SiteId, session: SiteSession, frame: frames.FromSite) -> bool:
        """The first frame. False: the session is over already."""
        if not isinstance(frame, frames.Hello):
            raise MalformedMessage(
                "session", found=type(frame).__name__, expected="Hello first", fault=name
            )
        if frame.pins != self.pins:
            session.end(
                frames.Goodbye("roster", "the identity keys pinned here and at the site differ")
            )
            return False
        before = self.sessions.get(name)
        if before is not None:
            before.end(frames.Goodbye("replaced", "a newer session of this site"))
        session.tasks = tuple(task.name for task in frame.tasks)
        self.sessions[name] = session
        self.counts.sessions += 1
        session.put(frames.Welcome(self.context.federation, int(time.time() * 1000)))
        LOG.info("site %s: connected (%s)", name, frame.software)
        found = self.running()
        if found is not None:
            found.came(name)
        for ended in self.jobs.values():  # a site that was away at the end hears of it
            if ended.outcome is not None and any(h.job == ended.id for h in frame.held):
                ended.came(name)
        self.changed()
        return True

    async def _on_frame(self, name: SiteId, session: SiteSession, frame: frames.FromSite) -> None:
        match frame:
            case frames.Record():
                found = self.jobs.get(frame.job)
                if found is not None and (found.outcome is not None or found is self.running()):
                    await self._room(found)
                    table = TO_COORDINATOR if found.asks_for_grants(name) else FROM_ANY_SITE
                    pins = len(self.context.pins)
                    found.tell(name, unpack_record(frame, table, sender=name, sites=pins))
            case frames.Doing(job, what):
                if job in self.jobs:
                    self.jobs[job].doing(name, what)
            case frames.SmallUpload(start, data):
                complete = self._small(name, start, data)
                session.put(frames.UploadReceipt(start.digest, 0, complete=complete))
            case frames.Goodbye():
                LOG.info("site %s says goodbye: %s", name, frame.code)
                session.end(None)
                running = self.running()
                if running is not None:
                    running.left(name)
            case frames.Hello():
                raise MalformedMessage(
                    "session", found="a second Hello", expected="none", fault=name
                )
            case frames.Pong():
                pass
            case _:
                assert_never(frame)

    @staticmethod
    async def _room(found: JobRunner) -> None:
        """Wait until a job has handled what came before: nothing more of this site is read meanwhile."""
        while found.backlog >= MOST_RECORDS and found.outcome is None:  # noqa: ASYNC110 - rare
            await asyncio.sleep(0.01)

    def _small(self, name: SiteId, start: frames.UploadStart, data: bytes) -> bool:
        """A vector inside the session: whether it is here whole. One that comes late, or finds no
        room, is no reason to end the session: the site tries again while its round lasts."""
        try:
            incoming = self._incoming(name, start)
            if not incoming.complete:
                incoming.write(incoming.offset, data[incoming.offset :])
            # No thread and no sync: the job keeps so small a file in its journal when it takes it.
            self._whole(name, start, incoming.finish(unsynced=INLINE))
        except MalformedMessage:
            raise
        except (BadInput, PeerRefused, StoreProblem) as error:
            LOG.warning("site %s: %s", name, error)
            return False
        return True

    def _incoming(self, name: SiteId, start: frames.UploadStart) -> IncomingUpload:
        """The upload, if a job waits for it. Raises BadInput otherwise: nothing else is spooled."""
        found = self.jobs.get(start.job)
        if found is None or not found.expects(name, start.header, start.size):
            raise BadInput(
                "upload: found one that nobody waits for",
                remedy="it belongs to a round that is over",
            )
        return self.context.spool.upload(start.job, start.header, name, start.digest, start.size)

    async def _finish(
        self, name: SiteId, start: frames.UploadStart, incoming: IncomingUpload
    ) -> None:
        self._whole(name, start, await asyncio.to_thread(incoming.finish))

    def _whole(self, name: SiteId, start: frames.UploadStart, stored: Stored) -> None:
        self.counts.bytes_in += start.size
        self.jobs[start.job].arrived(name, start.header, stored)

    async def check(self, data: bytes, context: Context) -> bytes:
        """What a session would say to this Hello."""
        peer = await self._admit(context, calls.CHECK)
        hello = calls.CHECK.takes.unpack(data, sender=peer.name)
        if hello.pins != self.pins:
            raise BadInput(
                "roster: found other identity keys pinned at the site than here",
                remedy="both must have the same roster.toml",
            )
        return calls.CHECK.gives.pack(
            frames.Welcome(self.context.federation, int(time.time() * 1000))
        )

    async def upload(self, requests: AsyncIterator[bytes], context: Context) -> bytes:
        """A vector, from where it broke off."""
        name = SiteId((await self._admit(context, calls.UPLOAD)).name)
        incoming, coming, start = None, None, None
        pauses = itertools.chain([FIRST_WORD_SECONDS], itertools.repeat(PART_SECONDS))
        async for data in _prompt(requests, lambda: next(pauses)):
            frame = calls.UPLOAD.takes.unpack(data, sender=name)
            if incoming is None or coming is None:
                if not isinstance(frame, frames.UploadStart):
                    raise MalformedMessage(
                        "upload", found="a part", expected="its start first", fault=name
                    )
                start, incoming = frame, self._incoming(name, frame)
                coming = chunks.Incoming(frame, sender=name)
                if incoming.complete:
                    break
            else:
                at, part = coming.offset, coming.take(frame)
                await asyncio.to_thread(incoming.write, at, part)
        if incoming is None or start is None:
            raise MalformedMessage("upload", found="nothing", expected="its start", fault=name)
        if incoming.offset == incoming.size:
            await self._finish(name, start, incoming)
        return calls.UPLOAD.gives.pack(
            frames.UploadReceipt(start.digest, incoming.offset, incoming.complete)
        )

    async def upload_offset(self, data: bytes, context: Context) -> bytes:
        """How much of an upload is here."""
        name = SiteId((await self._admit(context, calls.UPLOAD_OFFSET)).name)
        start = calls.UPLOAD_OFFSET.takes.unpack(data, sender=name)
        incoming = self._incoming(name, start)
        if incoming.complete:
            await self._finish(name, start, incoming)
        return calls.UPLOAD_OFFSET.gives.pack(
            frames.UploadReceipt(start.digest, incoming.offset, incoming.complete)
        )

    async def download(self, data: bytes, context: Context) -> AsyncIterator[bytes]:
        """A sum or a checkpoint, from an offset on."""
        name = SiteId((await self._admit(context, calls.DOWNLOAD)).name)
        start = calls.DOWNLOAD.takes.unpack(data, sender=name)
        found = self.jobs.get(start.job)
        stored = found.download(start.what, start.digest) if found is not None else None
        if stored is None:
            raise BadInput("download: found no such sum or checkpoint here")
        head = frames.DownloadHead(start.digest, stored.travels, start.offset)
        with stored.path.open("rb") as file:
            parts = chunks.download(head, file)
            while (part := await asyncio.to_thread(next, parts, None)) is not None:
                self.counts.bytes_out += len(part)
                yield part

    # ------------------------------------------------------------------------- operators' calls

    async def submit(self, data: bytes, context: Context) -> bytes:
        """Queue a job."""
        peer = await self._admit(context, calls.SUBMIT)
        asked = calls.SUBMIT.takes.unpack(data, sender=peer.name)
        about = frames.json_value(asked.about, sender=peer.name)
        settings = about.get("settings")
        if not isinstance(settings, dict):
            raise BadInput("submit: found no settings, expected those of the job file, complete")
        check_name("task", asked.task)  # it names folders
        _check_settings(settings, len(self.context.pins), self.context.quota)
        _check_budget(settings, self.context.limits.stage)
        self._check_room(peer.name)
        check_name("submit: task", asked.task)  # it names folders, here and at the sites
        name = f"{asked.task[:48].strip()}-{secrets.token_hex(4)}"
        offer = job_messages.JobOffer(name, asked.task, asked.task_sha256, canonical(settings))
        found = JobRunner(self.context, self, offer)
        (found.directory / "job.toml").write_bytes(asked.toml)
        found.submitter = peer.name
        journal = self.context.journal
        journal.put(name, "submitter", peer.name.encode())
        journal.put(name, "offer", encode(offer))
        self._adopt(found)
        journal.put("coordinator", "jobs", json.dumps([*self.jobs]).encode())
        LOG.info("job %s: submitted by %s", name, peer.name)
        self._queued.set()
        self.changed()
        return calls.SUBMIT.gives.pack(frames.SubmitReply(name))

    def _check_room(self, operator: str) -> None:
        """Raise PlanRefused where as many jobs wait, or are kept for this operator, as may."""
        quota = self.context.quota
        queued = sum(found.outcome is None for found in self.jobs.values())
        kept = sum(found.submitter == operator for found in self.jobs.values())
        if queued >= quota.queued:
            raise PlanRefused(
                f"submit: found {queued} jobs that are not over, expected fewer than {quota.queued}",
                remedy="stop one, or wait until one has ended (limits.most_queued of federation.toml)",
            )
        if kept >= quota.kept:
            raise PlanRefused(
                f"submit: found {kept} jobs of operator {operator!r} kept here, expected fewer than "
                f"{quota.kept}",
                remedy="the coordinator's operator raises limits.most_kept of federation.toml, or gives it "
                "a new folder",
            )

    async def list_jobs(self, data: bytes, context: Context) -> bytes:
        """The jobs, oldest first, and the sites; where not all have room, how many came earlier."""
        peer = await self._admit(context, calls.JOBS)
        calls.JOBS.takes.unpack(data, sender=peer.name)
        sites = self._sites(None)
        room = MAX_JSON - REST_BYTES - len(frames.json_bytes(sites))
        rows = _fitting(map(self._about, reversed(self.jobs.values())), room)
        answer = {
            "federation": self.context.federation, "earlier": len(self.jobs) - len(rows),
            "jobs": rows[::-1], "sites": sites,
        }  # fmt: skip
        return calls.JOBS.gives.pack(frames.JobsReply(frames.json_bytes(answer)))

    async def watch(self, data: bytes, context: Context) -> AsyncIterator[bytes]:
        """A job as it goes on, and its last word."""
        peer = await self._admit(context, calls.WATCH)
        asked = calls.WATCH.takes.unpack(data, sender=peer.name)
        found = self._named(asked.job) if asked.job else self.running()
        if found is None:
            found = next(reversed(self.jobs.values()), None)
        if found is None:
            raise BadInput(
                "watch: found no job here", remedy="`fed-coordinator submit job.toml` begins one"
            )
        last, sent, shown = None, 0, 0
        while True:
            self.gate.still(peer)
            changed, over = self._changed, found.outcome is not None
            event = self._about(found) | {"sites": self._sites(found)}
            rounds, metrics = found.rounds.known, found.metrics.known
            event["new_rounds"] = fresh = _fitting(rounds[sent : sent + ROWS_AT_ONCE])
            event["new_metrics"] = known = _fitting(metrics[shown : shown + ROWS_AT_ONCE])
            if event != last:
                yield calls.WATCH.gives.pack(frames.WatchEvent(frames.json_bytes(event)))
                last, sent = event | {"new_rounds": [], "new_metrics": []}, sent + len(fresh)
                shown += len(known)
            all_sent = sent == len(rounds) and shown == len(metrics)
            if over and all_sent:
                return  # not as soon as it ends: that may be while an event before it is sent
            if not all_sent:
                continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), 1.0)
            await asyncio.sleep(0.05)

    def _about(self, found: JobRunner) -> Json:
        progress, stage = found.progress, found.stage
        settings = json.loads(found.offer.settings)
        return {
            "job": found.id, "task": found.offer.task, "state": progress.state or WAITING,
            "text": progress.text, "stage": type_name(type(stage)).lower(),
            "step": None if found.step is None else [found.step.purpose, found.step.training_round],
            "rounds": settings["round"]["rounds"],
            "rounds_done": sum(trains(r["purpose"]) for r in found.rounds.known),
            "protection": settings["protect"]["protection"],
            "waiting_for": list(progress.waiting_for), "waiting_until": progress.waiting_until,
            "waiting": self._waiting(found),
            "public_metrics": found.plan.public_metrics if found.plan is not None else None,
            "model": found.has_model,
            "metrics": max(found.metrics.known, key=lambda row: row["number"], default=None),
        }  # fmt: skip

    def _sites(self, found: JobRunner | None) -> Json:
        out: Json = {}
        for name in self.context.pins:
            session = self.sessions.get(name)
            view = found.sites[name] if found is not None else None
            out[name] = {
                "connected": session is not None,
                "evicted": name in self.evicted,
                "since": session.since if session else None,
                "last_seen": session.last_seen if session else (view.last_seen if view else None),
                "doing": view.doing if view and session else "",
                "unable": view.unable if view else "",
            }
        return out

    def _named(self, name: str) -> JobRunner:
        if name not in self.jobs:
            raise UnknownName("job", name, list(self.jobs))
        return self.jobs[name]

    async def stop(self, data: bytes, context: Context) -> bytes:
        """End a job."""
        peer = await self._admit(context, calls.STOP)
        found = self._named(calls.STOP.takes.unpack(data, sender=peer.name).job)
        if found.outcome is not None:
            raise BadInput(f"stop: job {found.id} is over already ({found.outcome.outcome})")
        if found is self.running():
            found.stop(f"stopped by {peer.name}")
        else:
            found.end("stopped", f"stopped by {peer.name}")
        return calls.STOP.gives.pack(frames.Reply(f"job {found.id} is being stopped"))

    async def evict(self, data: bytes, context: Context) -> bytes:
        """Send a site away until it is let in again; survives a restart."""
        peer = await self._admit(context, calls.EVICT)
        asked = calls.EVICT.takes.unpack(data, sender=peer.name)
        if asked.site not in self.context.pins:
            raise UnknownName("site", asked.site, list(self.context.pins))
        if (asked.site in self.evicted) is not asked.undo:
            how = "is not evicted" if asked.undo else "is evicted already"
            raise BadInput(f"evict: site {asked.site} {how}")
        evicted = self.evicted ^ {asked.site}
        self.context.journal.put("coordinator", "evicted", json.dumps(sorted(evicted)).encode())
        self.evicted = evicted
        name = SiteId(asked.site)
        for found in self.jobs.values():
            view, found.facts.evicted = found.sites[name], evicted
            if asked.undo and view.unable == EVICTED:
                view.unable = ""
            elif not asked.undo and found.outcome is None:
                view.unable = EVICTED
        session = self.sessions.get(name)
        if session is not None and not asked.undo:
            session.end(_SENT_AWAY)
        LOG.info("site %s: %s by %s", name, "let in again" if asked.undo else "evicted", peer.name)
        self.changed()
        text = f"site {name} may connect again" if asked.undo else f"site {name} is evicted"
        return calls.EVICT.gives.pack(frames.Reply(text))

    async def result(self, data: bytes, context: Context) -> AsyncIterator[bytes]:
        """The files of a job."""
        peer = await self._admit(context, calls.RESULT)
        found = self._named(calls.RESULT.takes.unpack(data, sender=peer.name).job)
        result = self._about(found) | {"sites": self._sites(found)} | self._recipe(found)
        await asyncio.to_thread(write_json, found.directory / RESULT_FILE, result)
        for path in await asyncio.to_thread(lambda: sorted(found.directory.iterdir())):
            if path.name.startswith("."):
                continue
            with path.open("rb") as file:
                for part in chunks.file_parts(path.name, file):
                    yield calls.RESULT.gives.pack(part)

    @staticmethod
    def _recipe(found: JobRunner) -> Json:
        """What was run: enough to run it again."""
        return {
            "task_sha256": found.offer.task_digest, "settings": json.loads(found.offer.settings),
            "plan": found.plan.to_json() if found.plan is not None else None,
            "plan_sha256": found.plan.digest if found.plan is not None else None,
        }  # fmt: skip

    # ----------------------------------------------------------------------------------- gates

    async def _admit(self, context: Context, call: calls.Call[Any, Any]) -> Peer:
        try:
            peer = self.gate.admit(context, call.roles)
            if peer.role == calls.SITE and peer.name in self.evicted and call is not calls.SESSION:
                raise CertificateRefused(
                    f"site {peer.name!r}: found it evicted by an operator, expected one in the federation",
                    check="roster",
                    remedy="ask the operator why: `fed-coordinator evict SITE --undo` lets it in again",
                )
            return peer
        except CertificateRefused as error:
            self.counts.refused += 1
            LOG.warning("%s: %s", call.name, error)
            await refuse(context, error)


def _fitting(rows: Iterable[Json], most: int = ROWS_BYTES) -> list[Json]:
    """The first rows, as many as have room in so many bytes of JSON: one at least."""
    found: list[Json] = []
    for row in rows:
        most -= len(frames.json_bytes(row)) + 1
        if found and most < 0:
            break
        found.append(row)
    return found


def _stage_key(found: JobRunner) -> tuple[str, str, int]:
    """One stage of one round of one job."""
    header = getattr(found.stage, "header", None)
    return found.id, type(found.stage).__name__, header.round if header is not None else 0


@dataclass
class _Wait:
    """For whom the running job waits, and since when. shown, said: to watchers, in the log."""

    key: tuple[str, str, int] | None = None
    sites: tuple[SiteId, ...] = ()
    since: float = 0.0
    shown: bool = False
    said: bool = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since


_SENT_AWAY = frames.Goodbye(EVICTED, "an operator sent this site away")


def _check_settings(settings: Json, sites: int, quota: Quota) -> None:
    """What a deployed job must have. Raises BadInput and PlanRefused."""
    for section, key in (("round", "rounds"), ("protect", "protection")):
        table = settings.get(section)
        if not isinstance(table, dict) or key not in table:
            raise BadInput(f"{section}.{key}: found none, expected the settings of a job, complete")
    found = build_job(settings)
    if found.protect.max_examples is None:
        raise BadInput(
            "protect.max_examples: found none, expected the public cap on any site's rows",
            remedy="--set protect.max_examples=1024: no site tells how many rows it has",
        )
    for what, value, key, most in (
        ("round.rounds", found.round.rounds, "most_rounds", quota.rounds),
        ("train.epochs", found.train.epochs, "most_epochs", quota.epochs),
        ("train.batch_size", found.train.batch_size, "most_batch", quota.batch),
    ):
        if value > most:
            raise PlanRefused(
                f"{what}: found {value}, expected at most {most}",
                remedy=f"limits.{key} of the coordinator's federation.toml is the limit",
            )
    if found.round.drop or found.round.dropout:
        raise BadInput(
            "round.drop: found simulated absences, expected none",
            remedy="they are for `fedcore simulate`; here sites really come and go",
        )
    refuse_plain(found.protect.protection)
    Terms.of_job(found, sites)  # refuses a roster and a threshold that no plan can have


def _check_budget(settings: Json, stage_seconds: float) -> None:
    """Raise BadInput for a budget that ends after this coordinator has given up every site."""
    budget = build_job(settings).round.submit_seconds
    if budget is not None and budget >= stage_seconds:
        raise BadInput(
            f"round.submit_seconds: found {budget:g}, expected less than stage_seconds = {stage_seconds:g} "
            "of this coordinator",
            remedy="a smaller budget, or a larger stage_seconds in [limits] of federation.toml",
        )


def _line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)[:200]


def handlers(hub: Coordinator) -> list[grpc.GenericRpcHandler]:
    """What a gRPC server registers: bytes in, bytes out."""
    methods: dict[str, dict[str, grpc.RpcMethodHandler[bytes, bytes]]] = {
        calls.COORDINATOR: {},
        calls.OPERATORS: {},
    }
    table: list[tuple[calls.Call[Any, Any], Callable[..., Any]]] = [
        (calls.SESSION, hub.session), (calls.CHECK, hub.check), (calls.UPLOAD, hub.upload),
        (calls.UPLOAD_OFFSET, hub.upload_offset), (calls.DOWNLOAD, hub.download),
        (calls.SUBMIT, hub.submit), (calls.JOBS, hub.list_jobs), (calls.WATCH, hub.watch),
        (calls.STOP, hub.stop), (calls.EVICT, hub.evict), (calls.RESULT, hub.result),
    ]  # fmt: skip
    busy: Counter[bytes] = Counter()
    for call, function in table:
        told = _told_stream(function, busy) if call.gives_stream else _told(function, busy)
        kind = {
            (True, True): grpc.stream_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (False, False): grpc.unary_unary_rpc_method_handler,
        }[call.takes_stream, call.gives_stream]
        methods[call.service][call.name] = kind(told)
    return [grpc.method_handlers_generic_handler(name, each) for name, each in methods.items()]


def _told(
    function: Callable[[Any, Context], Awaitable[bytes]], busy: Counter[bytes]
) -> Callable[..., Awaitable[bytes]]:
    async def call(request: Any, context: Context) -> bytes:
        async with _one_of(busy, context):
            return await function(request, context)

    return call


def _told_stream(
    function: Callable[[Any, Context], AsyncIterator[bytes]], busy: Counter[bytes]
) -> Callable[..., AsyncIterator[bytes]]:
    async def call(request: Any, context: Context) -> AsyncIterator[bytes]:
        async with _one_of(busy, context):
            async for data in function(request, context):
                yield data

    return call


@contextlib.asynccontextmanager
async def _one_of(busy: Counter[bytes], context: Context) -> AsyncIterator[None]:
    """One of the few open calls of a certificate; what goes wrong in it is told without its text."""
    who = b"".join(context.auth_context().get("x509_pem_cert", ()))
    if busy[who] >= MOST_CALLS:
        line = f"calls: found {MOST_CALLS} of this certificate open, expected fewer"
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, line)
    busy[who] += 1
    try:
        yield
    except FedcoreError as error:
        await _abort(context, error)
    except TimeoutError:
        await context.abort(
            grpc.StatusCode.DEADLINE_EXCEEDED, "call: found nothing to read for long"
        )
    except (grpc.aio.AbortError, grpc.aio.UsageError):
        raise
    except Exception as error:
        LOG.exception("a call ended by a fault of this side")
        await _abort(context, error)
    finally:
        busy[who] -= 1
        if not busy[who]:
            del busy[who]


async def _prompt(
    requests: AsyncIterator[bytes], patience: Callable[[], float | None]
) -> AsyncIterator[bytes]:
    """What comes in, while no pause is longer than `patience` says. Raises TimeoutError."""
    coming = aiter(requests)
    while True:
        try:
            yield await asyncio.wait_for(anext(coming), patience())
        except StopAsyncIteration:
            return


async def _abort(context: Context, error: Exception) -> None:
    code, details = refusals.status_of(error)
    LOG.info("%s", error)
    await context.abort(getattr(grpc.StatusCode, code), details)


def journal_path(folder: Path) -> Path:
    """Where a coordinator's journal is."""
    return folder / "journal.sqlite"
