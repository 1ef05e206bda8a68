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

    async def download(self, job: str, what: str, digest: bytes) -> list[bytes]:
        """The chunks of a sum or a checkpoint; the download that broke off last is resumed. Raises Offline."""
        data = self._partial.pop(digest, bytearray())
        try:
            with self._of_the_session("download"):
                await self._download(frames.DownloadStart(job, what, digest, len(data)), data)
        except Offline:
            self._partial = {digest: data}
            raise
        return await asyncio.to_thread(container.from_bytes, bytes(data))

    async def _download(self, start: frames.DownloadStart, into: bytearray) -> None:
        call = calls.DOWNLOAD
        begin: Any = self._open().unary_stream(call.path)
        stream = begin(call.takes.pack(start))
        incoming = None
        async for raw in stream:
            await self._pace.received(len(raw))
            frame = call.gives.unpack(raw, sender="coordinator")
            if incoming is None:
                if not isinstance(frame, frames.DownloadHead) or frame.offset != start.offset:
                    raise MalformedMessage(
                        "download", found="another first frame", expected="its head",
                        fault="coordinator",
                    )  # fmt: skip
                incoming = chunks.Incoming(frame, sender="coordinator")
            else:
                into += incoming.take(frame)


async def _frames(start: frames.UploadStart, path: Path, pace: Pace) -> AsyncIterator[bytes]:
    """The upload's frames, read from disk in a thread one at a time, at the site's pace."""
    with path.open("rb") as file:
        parts = chunks.upload(start, file)
        while (frame := await asyncio.to_thread(next, parts, None)) is not None:
            await pace.sent(len(frame))
            yield frame
