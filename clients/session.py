"""The site's one connection: a session that is pushed to, and the transfers beside it.

Connects, sends a hello, passes frames on, and reconnects with exponential backoff and jitter.
Invariant: nothing waits for a session: a message without one is lost, and the jobs resend after `on_connected`; a
transfer (transfers.py) raises Offline and is retried.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from fedcore_clients.channel import A, Offline, Q, call_unary, open_channel
from fedcore_clients.chunk_stream import EachChunk
from fedcore_clients.config import SiteConfig
from fedcore_clients.leaving import Gate
from fedcore_clients.rate import Pace
from fedcore_clients.transfers import Transfers

from fedcore.errors import (
    BadInput,
    CertificateRefused,
    FedcoreError,
    MalformedMessage,
    PeerRefused,
    PolicyRefused,
    with_hint,
)
from fedcore.identity.addresses import authority_of
from fedcore.identity.kit import Kit
from fedcore.identity.preflight import preflight
from fedcore.secagg.protocol.job_messages import ToCoordinator
from fedcore.wire import calls, frames
from fedcore.wire.codec import MOST_TOGETHER, in_messages
from fedcore.wire.limits import INLINE
from fedcore.wire.records import TO_COORDINATOR, pack_record
from fedcore.wire.refusals import told

LOG = logging.getLogger("fedcore.site.session")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0
"""Seconds between attempts: doubled each time, and drawn between half and all of that."""

ANSWER_SECONDS = 30.0
"""Timeout of the coordinator's first frame, and of a part of a transfer."""

REVOKED = "revoked"
"""The check of a certificate that does not count any more, also after a new attempt."""

TELLING_SECONDS = 0.2
"""How long an activity lasts before it is sent: this saves a third of a small round's messages."""

OPTIONS = (
    *calls.LENGTHS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own for every site of a process
)

ForJobs = (
    frames.Record | frames.SmallDownload | frames.Waiting | frames.Roster | frames.JobRoster |
    frames.TrailReceipt | frames.SecondProcess
)  # fmt: skip
"""The frames that the session passes on."""


class _Presence:
    """Whether there is to be a session. away: why not, of `frames.AWAY`, or ""; attempt: the one under way; welcomed:
    whether the last one was."""

    def __init__(self) -> None:
        self.away = ""
        self.wanted = asyncio.Event()
        self.wanted.set()
        self.attempt: asyncio.Task[None] | None = None
        self.welcomed = False


class Session:
    """Runs until cancelled. on_frame: of `ForJobs`; on_connected: after a Welcome; gate: what each record and upload
    passes; on_refused: the word and the text of a certificate that one end does not accept, once for each cause; pace:
    the rate of transfers."""

    def __init__(
        self,
        kit: Kit,
        config: SiteConfig,
        hello: Callable[[], frames.Hello],
        on_frame: Callable[[ForJobs], None],
        on_connected: Callable[[], None],
        gate: Gate,
        on_refused: Callable[[str, str], None] = lambda word, text: None,
        pace: Pace | None = None,
    ) -> None:
        self.kit, self._config, self._hello = kit, config, hello
        self._instance = frames.new_instance()
        self._on_frame, self._on_connected, self._gate = on_frame, on_connected, gate
        self._on_refused = on_refused
        self._pace = pace or Pace()
        self._out: asyncio.Queue[bytes] | None = None
        self._channel: grpc.aio.Channel | None = None
        self._receipts: dict[bytes, asyncio.Future[frames.UploadReceipt]] = {}
        self._telling: dict[str, asyncio.TimerHandle] = {}
        self._transfers = Transfers(self._open, self._pace)
        self._turn = 0
        """Which of the addresses is connected or tried, counted on and on."""
        self.since: float | None = None
        """Start of the present session, None without one."""
        self.last_error = ""
        self.welcome: frames.Welcome | None = None
        self.refused: frames.Goodbye | None = None
        self._presence = _Presence()

    async def ask(self, call: calls.Call[Q, A], asked: Q) -> A:
        """The answer to a call beside the session. Raises Offline without a session, AioRpcError for a refusal."""
        return await call_unary(self._open(), call, asked, ANSWER_SECONDS)

    async def use(self, kit: Kit) -> None:
        """Use this certificate from now on: the session ends, and the next one begins at once."""
        self.kit = kit
        await self.goodbye("a new certificate")

    async def go_away(self, word: str) -> None:
        """End the session, and begin none before `come_back`. word: of `frames.AWAY`, for the coordinator."""
        found = self._presence
        already, found.away = found.away, word
        if already:
            return
        found.wanted.clear()
        await self.goodbye("the operator of the site wants it", word)
        if found.attempt is not None:
            found.attempt.cancel()

    def come_back(self) -> None:
        """Sessions may begin again; idempotent."""
        self._presence.away = ""
        self._presence.wanted.set()

    @property
    def _place(self) -> tuple[str, int]:
        addresses = self._config.addresses
        return addresses[self._turn % len(addresses)]

    @property
    def coordinator(self) -> str:
        """The address that is connected or tried."""
        return authority_of(*self._place)

    async def run(self) -> None:
        """Run sessions, one after the other, until the coordinator refuses this site permanently."""
        pause = FIRST_PAUSE
        while self.refused is None:
            await self._presence.wanted.wait()
            started = time.monotonic()
            attempt = asyncio.get_running_loop().create_task(self._tried())
            self._presence.attempt = attempt
            try:
                await attempt
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                pause = FIRST_PAUSE  # the operator sent it away
                continue
            if self.refused is not None:
                return
            if self._presence.welcomed and time.monotonic() - started > 2 * pause:
                pause = FIRST_PAUSE
            if not self._presence.welcomed:
                self._turn += 1
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            if self._turn % len(self._config.addresses) == 0:  # every address was tried
                pause = min(2 * pause, LONGEST_PAUSE)

    async def _tried(self) -> None:
        """One session, to its end, with a line in the log where it did not begin or broke off."""
        try:
            await self._once()
        except (grpc.aio.AioRpcError, PeerRefused, BadInput, OSError) as error:
            self.refused = final(error)
            if self.refused is None:
                await self._explain(error)
            else:
                self.last_error = self.refused.text
        except Exception as error:
            LOG.exception("the session ended by a fault of this side")
            self.last_error = type(error).__name__

    async def _once(self) -> None:
        config, self._presence.welcomed = self._config, False
        out: asyncio.Queue[bytes] = asyncio.Queue()
        async with open_channel(
            self.kit, *self._place, proxy=config.through, folder=config.folder,
            options=(*OPTIONS, *calls.keepalive(config.keepalive_seconds)),
        ) as channel:  # fmt: skip
            await self._on(channel, out)

    async def _on(self, channel: grpc.aio.Channel, out: asyncio.Queue[bytes]) -> None:
        """One session over a channel, to its end."""
        try:
            session = calls.SESSION
            stream: Any = channel.stream_stream(session.path)(wait_for_ready=False)
            hello = replace(self._hello(), instance=self._instance)
            await stream.write(session.takes.pack(hello))
            async with asyncio.timeout(ANSWER_SECONDS):
                first = await stream.read()
            if first is grpc.aio.EOF:
                raise MalformedMessage(
                    "session", found="its end", expected="a welcome", fault="coordinator"
                )
            coming = session.gives.unpack_each(first, sender="coordinator")
            self._welcomed(next(coming))
            if self.refused is not None:
                return
            # Not before: transfers outside of the session that the coordinator knows are refused.
            self._channel, self._out = channel, out
            writer = asyncio.get_running_loop().create_task(send_frames(stream, out))
            try:
                self._on_connected()
                while not any(map(self._take, coming)):
                    if (data := await stream.read()) is grpc.aio.EOF:
                        return
                    coming = session.gives.unpack_each(data, sender="coordinator")
            finally:
                writer.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await writer
        finally:
            self._lost()

    def _welcomed(self, frame: frames.ToSite) -> None:
        if isinstance(frame, frames.Goodbye):
            self._goodbye(frame)
            return
        if not isinstance(frame, frames.Welcome) or frame.federation != self.kit.peer.federation:
            raise MalformedMessage(
                "session", found="another first frame or federation", expected="a welcome",
                fault="coordinator",
            )  # fmt: skip
        self.welcome, self.since, self.last_error = frame, time.time(), ""
        self._presence.welcomed = True
        LOG.info("connected to %s (%s)", self.coordinator, frame.software)

    def _goodbye(self, frame: frames.Goodbye) -> None:
        orderly = frame.code == "stopping"
        reason = f"{frame.code}: {frame.text}"
        self.last_error = "" if orderly else reason
        level = logging.INFO if orderly else logging.WARNING
        LOG.log(level, "the coordinator ended the session: %s", reason)
        if not frame.again:
            self.refused = frame

    def _take(self, frame: frames.ToSite) -> bool:
        """Whether the session ends with this frame."""
        match frame:
            case frames.Ping(number):
                self._put(frames.Pong(number))
            case frames.UploadReceipt(digest=digest):
                waiting = self._receipts.pop(digest, None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(frame)
            case frames.Goodbye():
                self._goodbye(frame)
                return True
            case frames.Welcome():
                pass
            case _:
                self._on_frame(frame)
        return False

    def _lost(self) -> None:
        self._out = self._channel = None
        if self.since is not None:
            LOG.info("the session with %s ended", self.coordinator)
        self.since = None
        for waiting in self._receipts.values():
            if not waiting.done():
                waiting.set_exception(Offline())
        self._receipts.clear()

    async def _explain(self, error: Exception) -> None:
        """Log why a connection failed, if that changed: gRPC gives few reasons, so Python's ssl is tried once."""
        text, cause = str(error), None
        if isinstance(error, grpc.aio.AioRpcError):
            text = f"{error.code().name.lower()}: {error.details()}"
            if error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.PERMISSION_DENIED}:
                cause = await asyncio.to_thread(self._why, error)
        if cause is not None:
            text = with_hint(cause) if isinstance(cause, FedcoreError) else str(cause)
        if text != self.last_error:
            LOG.warning("no session with %s: %s", self.coordinator, text)
            if isinstance(cause, CertificateRefused):
                self._on_refused(cause.check, str(cause))
        self.last_error = text

    def _why(self, error: grpc.aio.AioRpcError) -> Exception | None:
        """Why there is no connection, or no session in it; None where that is unknown."""
        config, now = self._config, datetime.now(UTC)
        try:
            preflight(self.kit, *self._place, now=now, proxy=config.through)
        except (CertificateRefused, BadInput, OSError) as found:
            return found
        return told(error.code().name, error.details() or "")

    def _put(self, frame: frames.FromSite) -> bool:
        if self._out is None:
            return False
        self._out.put_nowait(calls.SESSION.takes.pack(frame))
        return True

    def roster_seen(self, seen: frames.RosterSeen) -> None:
        """Send what this site made of a roster, if there is a session."""
        self._put(seen)

    def say(self, job: str, message: ToCoordinator) -> None:
        """Send a record, if there is a session; the coordinator asks again for a lost one. One that may not leave is
        logged, and not sent."""
        record = pack_record(job, message, TO_COORDINATOR)
        try:
            self._gate.record(job, message, len(record.body))
        except PolicyRefused as refused:
            LOG.error("job %s: %s; hint: %s", job, refused, refused.remedy)  # noqa: TRY400 - one line
            self._gate.stopped(job, message, refused)
            return
        self._put(record)

    def ask_receipt(self, head: frames.TrailHead) -> None:
        """Have the end of the audit trail confirmed, if there is a session."""
        self._put(head)

    def doing(self, job: str, what: str) -> None:
        """Send what this site is doing, if there is a session and if it lasts."""
        before = self._telling.pop(job, None)
        if before is not None:
            before.cancel()
        loop = asyncio.get_running_loop()
        self._telling[job] = loop.call_later(TELLING_SECONDS, self._tell, job, what)

    def _tell(self, job: str, what: str) -> None:
        self._telling.pop(job, None)
        self._put(frames.Doing(job, what))

    async def goodbye(self, text: str, code: str = "stopping") -> None:
        """Tell the coordinator that this site stops, or is away, and flush the queue."""
        out = self._out
        if out is None:
            return
        self._put(frames.Goodbye(code, text))
        for _ in range(100):
            if out.empty():
                break
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)  # grpc does not tell when the last write was sent

    async def upload(self, job: str, header: bytes, digest: bytes, source: Path | bytes) -> None:
        """Upload a whole container: inside the session where it is small, else in a call of its own, resumed where it
        broke off. Raises Offline without a session, and PolicyRefused for what may not leave."""
        size = len(source) if isinstance(source, bytes) else -1
        if isinstance(source, Path):
            size = (await asyncio.to_thread(source.stat)).st_size
        if not self._gate.upload(job, header, size):
            raise Offline
        if isinstance(source, Path):
            if size > INLINE:
                await self._transfers.upload(frames.UploadStart(job, header, digest, size), source)
                return
            source = await asyncio.to_thread(source.read_bytes)
        await self._pace.sent(len(source))
        await self._inline(
            frames.SmallUpload(frames.UploadStart(job, header, digest, len(source)), source)
        )

    def expect_sum(self, job: str, header: bytes) -> None:
        """Ask for the sum of a round before it exists, if there is a session."""
        self._transfers.expect_sum(job, header)

    async def download(
        self, job: str, what: str, digest: bytes, each: EachChunk, of: bytes = b""
    ) -> None:
        """Pass the chunks of a sum or a checkpoint to `each` as they come: `Transfers.download`. Raises Offline."""
        await self._transfers.download(job, what, digest, each, of)

    async def _inline(self, frame: frames.SmallUpload) -> None:
        waiting = asyncio.get_running_loop().create_future()
        self._receipts[frame.start.digest] = waiting
        if not self._put(frame):
            self._receipts.pop(frame.start.digest, None)
            raise Offline
        receipt = await waiting
        if not receipt.complete:  # no room there now, or its round is over
            raise Offline

    def _open(self) -> grpc.aio.Channel:
        if self._channel is None:
            raise Offline
        return self._channel


def final(error: Exception) -> frames.Goodbye | None:
    """The coordinator's refusal that no later attempt changes: this certificate is revoked. None for other errors.

    It is authenticated: gRPC reads a status from a connection only after its handshake, in which the other side proved
    to have the coordinator's certificate of this federation's authority. A proxy's own answer has no such first line.
    """
    if not isinstance(error, grpc.aio.AioRpcError):
        return None
    found = told(error.code().name, error.details() or "")
    if isinstance(found, CertificateRefused) and found.check == REVOKED:
        return frames.Goodbye(REVOKED, str(found))
    return None


async def send_frames(stream: Any, out: asyncio.Queue[bytes]) -> None:
    """Sends frames until the stream ends. How it ended is reported where it is read, not here."""
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        while True:
            found = [await out.get()]
            await asyncio.sleep(0)  # for what the same turn has to say
            while not out.empty() and len(found) < MOST_TOGETHER:
                found.append(out.get_nowait())
            for message in in_messages(found):
                await stream.write(message)
