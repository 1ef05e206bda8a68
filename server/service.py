"""The coordinator's calls: sessions, transfers, and the operators' words, over one TLS port.

Messages in, messages out: whatever comes in is judged by `fedcore.wire` and by the gate, and goes to the
job it names; whatever a job says is put into the session of its site. Nothing is decided here.

Invariant: a call is admitted by its certificate before a frame of it is read, and a session again every
second; a site has one session, the newest; what a slow site has not read yet is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import grpc.aio
from fedcore_server.jobs import WAITING, CoordinatedJob, House
from fedcore_server.tls import Gate, refuse

from fedcore.config import build_job
from fedcore.errors import (
    BadInput,
    CertificateRefused,
    FedcoreError,
    MalformedMessage,
    PlanRefused,
    UnknownName,
    VersionRefused,
)
from fedcore.plan import canonical
from fedcore.protect.identity import roster_digest
from fedcore.protocol import job as job_messages
from fedcore.protocol.encoding import encode
from fedcore.provision.peer import Peer
from fedcore.store.spool import Incoming, Stored
from fedcore.types import Json, SiteId
from fedcore.wire import calls, chunks, frames, refusals
from fedcore.wire.jobs import TO_COORDINATOR, TO_SITE
from fedcore.wire.limits import INLINE
from fedcore.wire.records import pack_record, unpack_record

LOG = logging.getLogger("fedcore.coordinator")

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

MOST_FRAMES = 4096
"""Frames that may wait for one site; beyond it its session ends, and it connects again."""

PING_SECONDS = 10.0


@dataclass
class SiteSession:
    """One open session."""

    peer: Peer
    out: asyncio.Queue[bytes | None] = field(default_factory=lambda: asyncio.Queue(MOST_FRAMES))
    since: float = field(default_factory=time.time)
    last_seen: float = field(default_factory=time.time)
    tasks: tuple[str, ...] = ()
    over: bool = False

    def put(self, frame: Any) -> None:
        """Queue a frame; a site that does not read loses its session."""
        if self.over:
            return
        try:
            self.out.put_nowait(calls.SESSION.gives.pack(frame))
        except asyncio.QueueFull:
            self.end(None)

    def end(self, goodbye: frames.Goodbye | None) -> None:
        """No more frames but this one."""
        if goodbye is not None:
            self.put(goodbye)
        self.over = True
        with contextlib.suppress(asyncio.QueueFull):
            self.out.put_nowait(None)


class Coordinator:
    """All jobs and sessions of one coordinator process."""

    def __init__(self, house: House, gate: Gate) -> None:
        self.house, self.gate = house, gate
        self.sessions: dict[SiteId, SiteSession] = {}
        self.jobs: dict[str, CoordinatedJob] = {}
        self.pins = roster_digest(house.pins)
        self._changed = asyncio.Event()
        self._queued = asyncio.Event()
        self._restore()

    # ------------------------------------------------------------------------------- the jobs

    def _restore(self) -> None:
        kept = self.house.journal.get("coordinator", "jobs")
        for name in json.loads(kept) if kept else []:
            found = CoordinatedJob.stored(self.house, self, name)
            found.on_change = self.changed
            self.jobs[name] = found

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
        """Every second: who may not stay; now and then: who is still there."""
        number, last = 0, 0.0
        while True:
            await asyncio.sleep(1.0)
            ping = time.monotonic() - last > PING_SECONDS
            if ping:
                number, last = number + 1, time.monotonic()
            for session in list(self.sessions.values()):
                try:
                    self.gate.still(session.peer)
                except CertificateRefused as error:
                    LOG.warning("%s", error)
                    code = "revoked" if error.check == "revoked" else "roster"
                    session.end(frames.Goodbye(code, _line(str(error))))
                    continue
                if ping:
                    session.put(frames.Ping(number))

    def say_goodbye(self) -> None:
        """This process ends; the sites come back to the next one."""
        for session in list(self.sessions.values()):
            session.end(frames.Goodbye("stopping", "the coordinator stops"))

    def changed(self) -> None:
        """Somebody who watches should look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def running(self) -> CoordinatedJob | None:
        """The job under way."""
        return next((j for j in self.jobs.values() if j.outcome is None), None)

    # ------------------------------------------------------------------- the sessions, for jobs

    def connected(self) -> Collection[SiteId]:
        """Sites with a session now, in roster order."""
        return [name for name in self.house.pins if name in self.sessions]

    def say(self, site: SiteId, job: str, message: Any) -> None:
        """Send a record if the site has a session."""
        session = self.sessions.get(site)
        if session is not None:
            session.put(pack_record(job, message, TO_SITE))

    def push(self, site: SiteId, job: str, what: str, stored: Stored) -> None:
        """Send a small sum or checkpoint unasked."""
        session = self.sessions.get(site)
        if session is None or stored.travels > INLINE:
            return
        start = frames.DownloadStart(job, what, stored.digest)
        session.put(frames.SmallDownload(start, stored.path.read_bytes()))

    # ---------------------------------------------------------------------------- site's calls

    async def session(
        self, requests: AsyncIterator[bytes], context: Context
    ) -> AsyncIterator[bytes]:
        """One site, as long as it stays."""
        peer = await self._admit(context, calls.SESSION)
        name = SiteId(peer.name)
        session = SiteSession(peer)
        reader = asyncio.get_running_loop().create_task(self._read(name, session, requests))
        try:
            while (data := await session.out.get()) is not None:
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
            async for data in requests:
                frame = calls.SESSION.takes.unpack(data, sender=name)
                session.last_seen = time.time()
                if self.sessions.get(name) is not session and not self._begin(name, session, frame):
                    return
                await self._on_frame(name, session, frame)
        except VersionRefused as error:
            session.end(frames.Goodbye("version", _line(str(error))))
        except MalformedMessage as error:
            LOG.warning("site %s: %s", name, error)
            session.end(frames.Goodbye("malformed", _line(str(error))))
        except Exception:
            LOG.exception("site %s: session ended by a fault of this side", name)
        finally:
            session.end(None)

    def _begin(self, name: SiteId, session: SiteSession, frame: Any) -> bool:
        """The first frame. False: the session is over already."""
        if session.over:
            return False
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
        session.put(frames.Welcome(self.house.federation, int(time.time() * 1000)))
        LOG.info("site %s: connected (%s)", name, frame.software)
        found = self.running()
        if found is not None:
            found.came(name)
        for ended in self.jobs.values():  # a site that was away at the end hears of it
            if ended.outcome is not None and any(h.job == ended.id for h in frame.held):
                self.say(name, ended.id, ended.outcome)
        self.changed()
        return True

    async def _on_frame(self, name: SiteId, session: SiteSession, frame: Any) -> None:
        match frame:
            case frames.Record():
                found = self.jobs.get(frame.job)
                if found is not None and found.outcome is None:
                    found.tell(name, unpack_record(frame, TO_COORDINATOR, sender=name))
            case frames.Doing(job, what):
                if job in self.jobs:
                    self.jobs[job].doing(name, what)
            case frames.SmallUpload(start, data):
                incoming = self._incoming(name, start)
                if not incoming.complete:
                    if incoming.offset:
                        incoming = self._incoming(name, start)
                    incoming.write(incoming.offset, data[incoming.offset :])
                await self._finish(name, start, incoming)
                session.put(frames.UploadReceipt(start.digest, start.size, complete=True))
            case frames.Goodbye():
                LOG.info("site %s says goodbye: %s", name, frame.code)
                session.end(None)
            case frames.Hello() if self.sessions.get(name) is not session:
                raise MalformedMessage(
                    "session", found="a second Hello", expected="none", fault=name
                )
            case _:
                pass

    def _incoming(self, name: SiteId, start: frames.UploadStart) -> Incoming:
        """The upload, if a job waits for it. Raises BadInput otherwise: nothing else is spooled."""
        found = self.jobs.get(start.job)
        if found is None or not found.expects(name, start.header, start.size):
            raise BadInput(
                "upload: found one that nobody waits for",
                remedy="it belongs to a round that is over",
            )
        return self.house.spool.upload(start.job, start.header, name, start.digest, start.size)

    async def _finish(self, name: SiteId, start: frames.UploadStart, incoming: Incoming) -> None:
        stored = await asyncio.to_thread(incoming.finish)
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
            frames.Welcome(self.house.federation, int(time.time() * 1000))
        )

    async def upload(self, requests: AsyncIterator[bytes], context: Context) -> bytes:
        """A vector, from where it broke off."""
        name = SiteId((await self._admit(context, calls.UPLOAD)).name)
        incoming, coming, start = None, None, None
        async for data in requests:
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
        _check_settings(settings, len(self.house.pins))
        name = f"{asked.task}-{secrets.token_hex(4)}"
        offer = job_messages.JobOffer(name, asked.task, asked.task_sha256, canonical(settings))
        found = CoordinatedJob(self.house, self, offer)
        found.on_change = self.changed
        journal = self.house.journal
        journal.put(name, "offer", encode(offer))
        self.jobs[name] = found
        journal.put("coordinator", "jobs", json.dumps([*self.jobs]).encode())
        (found.directory / "job.toml").write_bytes(asked.toml)
        LOG.info("job %s: submitted by %s", name, peer.name)
        self._queued.set()
        self.changed()
        return calls.SUBMIT.gives.pack(frames.SubmitReply(name))

    async def list_jobs(self, data: bytes, context: Context) -> bytes:
        """Every job, oldest first, and the sites."""
        peer = await self._admit(context, calls.JOBS)
        calls.JOBS.takes.unpack(data, sender=peer.name)
        rows = [self._about(found) for found in self.jobs.values()]
        answer = {"federation": self.house.federation, "jobs": rows, "sites": self._sites(None)}
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
        last, sent = None, 0
        while True:
            self.gate.still(peer)
            changed = self._changed
            event = self._about(found) | {"sites": self._sites(found)}
            rounds = found.progress.rounds
            event["new_rounds"] = rounds[sent:]
            if event != last:
                yield calls.WATCH.gives.pack(frames.WatchEvent(frames.json_bytes(event)))
                last, sent = event | {"new_rounds": []}, len(rounds)
            if found.outcome is not None and sent == len(rounds):
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), 1.0)
            await asyncio.sleep(0.05)

    def _about(self, found: CoordinatedJob) -> Json:
        progress, stage = found.progress, found.stage
        return {
            "job": found.id, "task": found.offer.task, "state": progress.state or WAITING,
            "text": progress.text, "stage": type(stage).__name__.lower(),
            "step": None if found.step is None else [found.step.purpose, found.step.training_round],
            "rounds": json.loads(found.offer.settings)["round"]["rounds"],
            "rounds_done": sum(r["purpose"] == "update" for r in progress.rounds),
            "protection": json.loads(found.offer.settings)["protect"]["protection"],
            "waiting_for": list(progress.waiting_for), "waiting_until": progress.waiting_until,
        }  # fmt: skip

    def _sites(self, found: CoordinatedJob | None) -> Json:
        out: Json = {}
        for name in self.house.pins:
            session = self.sessions.get(name)
            view = found.sites[name] if found is not None else None
            out[name] = {
                "connected": session is not None,
                "since": session.since if session else None,
                "last_seen": session.last_seen if session else (view.last_seen if view else None),
                "doing": view.doing if view and session else "",
                "unable": view.unable if view else "",
            }
        return out

    def _named(self, name: str) -> CoordinatedJob:
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

    async def result(self, data: bytes, context: Context) -> AsyncIterator[bytes]:
        """The files of a job."""
        peer = await self._admit(context, calls.RESULT)
        found = self._named(calls.RESULT.takes.unpack(data, sender=peer.name).job)
        for path in await asyncio.to_thread(lambda: sorted(found.directory.iterdir())):
            with path.open("rb") as file:
                for part in chunks.file_parts(path.name, file):
                    yield calls.RESULT.gives.pack(part)

    # ----------------------------------------------------------------------------------- gates

    async def _admit(self, context: Context, call: calls.Call[Any, Any]) -> Peer:
        try:
            return self.gate.admit(context, call.roles)
        except CertificateRefused as error:
            LOG.warning("%s: %s", call.name, error)
            await refuse(context, error)


def _check_settings(settings: Json, sites: int) -> None:
    """What a deployed job must have. Raises BadInput and PlanRefused."""
    found = build_job(settings)
    if found.protect.max_examples is None:
        raise BadInput(
            "protect.max_examples: found none, expected the public cap on any site's rows",
            remedy="--set protect.max_examples=1024: no site tells how many rows it has",
        )
    if found.round.drop or found.round.dropout:
        raise BadInput(
            "round.drop: found simulated absences, expected none",
            remedy="they are for `fedcore simulate`; here sites really come and go",
        )
    if found.protect.protection == "plain":
        raise PlanRefused(
            "protect.protection: found 'plain', expected layered, masked or encrypted",
            remedy="`plain` exists inside one process only: `fedcore simulate --protection plain`",
        )
    if sites < 3:
        raise PlanRefused(f"roster: found {sites} sites, expected at least 3")


def _line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)[:200]


def handlers(hub: Coordinator) -> list[grpc.GenericRpcHandler]:
    """What a gRPC server registers: bytes in, bytes out."""
    methods: dict[str, dict[str, Any]] = {calls.COORDINATOR: {}, calls.OPERATORS: {}}
    table: list[tuple[calls.Call[Any, Any], Callable[..., Any]]] = [
        (calls.SESSION, hub.session), (calls.CHECK, hub.check), (calls.UPLOAD, hub.upload),
        (calls.UPLOAD_OFFSET, hub.upload_offset), (calls.DOWNLOAD, hub.download),
        (calls.SUBMIT, hub.submit), (calls.JOBS, hub.list_jobs), (calls.WATCH, hub.watch),
        (calls.STOP, hub.stop), (calls.RESULT, hub.result),
    ]  # fmt: skip
    for call, function in table:
        told = _told_stream(function) if call.gives_stream else _told(function)
        kind = {
            (True, True): grpc.stream_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (False, False): grpc.unary_unary_rpc_method_handler,
        }[call.takes_stream, call.gives_stream]
        methods[call.service][call.name] = kind(told)
    return [grpc.method_handlers_generic_handler(name, each) for name, each in methods.items()]


def _told(function: Callable[[Any, Context], Awaitable[bytes]]) -> Callable[..., Awaitable[bytes]]:
    async def call(request: Any, context: Context) -> bytes:
        try:
            return await function(request, context)
        except FedcoreError as error:
            await _abort(context, error)
            raise

    return call


def _told_stream(
    function: Callable[[Any, Context], AsyncIterator[bytes]],
) -> Callable[..., AsyncIterator[bytes]]:
    async def call(request: Any, context: Context) -> AsyncIterator[bytes]:
        try:
            async for data in function(request, context):
                yield data
        except FedcoreError as error:
            await _abort(context, error)

    return call


async def _abort(context: Context, error: FedcoreError) -> None:
    code, details = refusals.status_of(error)
    LOG.info("%s", error)
    await context.abort(getattr(grpc.StatusCode, code), details)


def journal_path(folder: Path) -> Path:
    """Where a coordinator's journal is."""
    return folder / "journal.sqlite"
