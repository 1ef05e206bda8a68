"""Large uploads and downloads: calls of their own beside the session, resumed where they broke off."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from fedcore_clients.channel import Offline, call_unary
from fedcore_clients.chunk_stream import EachChunk
from fedcore_clients.rate import Pace

from fedcore.errors import MalformedMessage
from fedcore.store import container
from fedcore.wire import calls, chunks, frames

LOG = logging.getLogger("fedcore.site.session")


class Transfers:
    """Of one process of a site. channel: of the present session, raises Offline without one; pace: their rate."""

    def __init__(self, channel: Callable[[], grpc.aio.Channel], pace: Pace) -> None:
        self._open, self._pace = channel, pace
        self._partial: dict[bytes, bytearray] = {}
        """What came of the last download that broke off."""
        self._begun: bytes | None = None
        """Digest of the last upload whose parts were sent: some of it may be there. None at first: an earlier process
        may have sent parts."""
        self._expected: tuple[bytes, Any] | None = None
        """h of the round whose sum was asked for, and the call."""

    async def upload(self, start: frames.UploadStart, source: Path) -> None:
        """Upload a whole container. Raises Offline."""
        with self._of_the_session("upload"):
            while True:
                channel = self._open()
                if self._begun in (None, start.digest):  # else no part of it is there
                    found = await call_unary(channel, calls.UPLOAD_OFFSET, start)
                    if found.complete:
                        return
                    start = replace(start, offset=found.offset)
                self._begun = start.digest
                begin: Any = channel.stream_unary(calls.UPLOAD.path)
                call = begin(_frames(start, source, self._pace))
                receipt = calls.UPLOAD.gives.unpack(await call, sender="coordinator")
                if receipt.complete:
                    return

    @contextlib.contextmanager
    def _of_the_session(self, what: str) -> Iterator[None]:
        """Raise Offline for a transfer that ended with the session or was ended by the coordinator. A closed channel
        shows as a CancelledError, which is not a cancellation of this task."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            LOG.info("%s interrupted: %s", what, error.code().name.lower())
            raise Offline from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise Offline from error

    def expect_sum(self, job: str, header: bytes) -> None:
        """Ask for the sum of a round before it exists: it then comes with its announcement, one round trip earlier. It
        is read by `download`; without a session nothing is asked."""
        self._forget_expected()
        with contextlib.suppress(Offline):
            asked = frames.DownloadStart(job, frames.SUM_OF_ROUND, header)
            self._expected = header, self._asked(asked)

    async def download(
        self, job: str, what: str, digest: bytes, each: EachChunk, of: bytes = b""
    ) -> None:
        """Pass the chunks of a sum or a checkpoint to `each` as they come, with their places.

        The download that broke off last is resumed, and its chunks are passed again. of: h of the round of a sum.
        Raises Offline, and BadInput for other bytes than a container's.
        """
        data, reader, place = self._partial.pop(digest, bytearray()), container.ChunkReader(), 0

        def take(part: bytes) -> None:
            nonlocal place
            for chunk in reader.take(part):
                each(place, chunk)
                place += 1

        take(bytes(data))
        try:
            with self._of_the_session("download"):
                start = frames.DownloadStart(job, what, digest, len(data))
                async for part in self._parts(start, await self._begun_download(start, of)):
                    data += part
                    take(part)
        except Offline:
            self._partial = {digest: data}
            raise
        reader.end()

    async def _begun_download(self, start: frames.DownloadStart, of: bytes) -> tuple[Any, Any]:
        """A call, and its first message: that of `expect_sum` where this sum is in it, else a new one."""
        (header, stream), whole = self._expected or (b"", None), not start.offset
        if stream is not None and header == of and whole and start.what == frames.SUM:
            self._expected = None
            with contextlib.suppress(grpc.aio.AioRpcError):  # its round was over, or its session
                raw = await stream.read()
                if raw is not grpc.aio.EOF and _head(raw).digest == start.digest:
                    return stream, raw
            stream.cancel()
        stream = self._asked(start)
        return stream, await stream.read()

    async def _parts(
        self, start: frames.DownloadStart, begun: tuple[Any, Any]
    ) -> AsyncIterator[bytes]:
        """The bytes of a download from its offset on, part by part."""
        stream, raw = begun
        head = _head(raw)
        if head.offset != start.offset:
            raise MalformedMessage(
                "download", found="another offset", expected="the one that was asked for",
                fault="coordinator",
            )  # fmt: skip
        incoming = chunks.Incoming(head, sender="coordinator")
        await self._pace.received(len(raw))
        while (raw := await stream.read()) is not grpc.aio.EOF:
            await self._pace.received(len(raw))
            yield incoming.take(calls.DOWNLOAD.gives.unpack(raw, sender="coordinator"))

    def _asked(self, start: frames.DownloadStart) -> Any:
        begin: Any = self._open().unary_stream(calls.DOWNLOAD.path)
        return begin(calls.DOWNLOAD.takes.pack(start))

    def _forget_expected(self) -> None:
        if self._expected is not None:
            self._expected[1].cancel()
            self._expected = None


def _head(raw: Any) -> frames.DownloadHead:
    """The first frame of a download. Raises MalformedMessage."""
    frame = None if raw is grpc.aio.EOF else calls.DOWNLOAD.gives.unpack(raw, sender="coordinator")
    if not isinstance(frame, frames.DownloadHead):
        raise MalformedMessage(
            "download", found="another first frame", expected="its head", fault="coordinator"
        )
    return frame


async def _frames(start: frames.UploadStart, path: Path, pace: Pace) -> AsyncIterator[bytes]:
    """The upload's frames, read from disk in a thread one at a time, at the site's pace."""
    with path.open("rb") as file:
        parts = chunks.upload(start, file)
        while (frame := await asyncio.to_thread(next, parts, None)) is not None:
            await pace.sent(len(frame))
            yield frame
