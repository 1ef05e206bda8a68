"""Uploads of sites, whole or resumed, and downloads of sums and checkpoints."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator

from fedcore_server.coordinator import Coordinator
from fedcore_server.sessions import FIRST_FRAME_SECONDS, with_timeouts

from fedcore.errors import BadInput, MalformedMessage, PeerRefused, StoreProblem
from fedcore.identity.peer import Peer
from fedcore.store.spool import IncomingUpload, Stored
from fedcore.types import SiteId
from fedcore.wire import calls, chunks, frames
from fedcore.wire.limits import INLINE

LOG = logging.getLogger("fedcore.coordinator")

PART_SECONDS = 120.0
"""Timeout of an upload without its next part."""


class Transfers:
    """The transfers of one coordinator."""

    def __init__(self, hub: Coordinator) -> None:
        self._hub = hub

    def small(self, name: SiteId, start: frames.UploadStart, data: bytes) -> bool:
        """Whether an upload inside the session is complete.

        One that comes late or finds no room does not end the session: the site retries while its round lasts.
        """
        try:
            incoming = self.open_upload(name, start)
            if not incoming.complete:
                incoming.write(incoming.offset, data[incoming.offset :])
            # No thread and no fsync: the job writes so small a file into its journal when it takes it.
            self._complete(name, start, incoming.finish(unsynced=INLINE))
        except MalformedMessage:
            raise
        except (BadInput, PeerRefused, StoreProblem) as error:
            LOG.warning("site %s: %s", name, error)
            return False
        return True

    def open_upload(self, name: SiteId, start: frames.UploadStart) -> IncomingUpload:
        """The upload, if its job expects it. Raises BadInput otherwise: nothing else is spooled."""
        found = self._hub.jobs.get(start.job)
        if found is None or not found.expects(name, start.header, start.size):
            raise BadInput(
                "upload: found one that no job expects", remedy="it belongs to a round that is over"
            )
        spool = self._hub.context.spool
        return spool.upload(start.job, start.header, name, start.digest, start.size)

    def _complete(self, name: SiteId, start: frames.UploadStart, stored: Stored) -> None:
        self._hub.sessions.counts.bytes_in += start.size
        self._hub.jobs[start.job].arrived(name, start.header, stored)

    async def _receipt(
        self, name: SiteId, start: frames.UploadStart, incoming: IncomingUpload, *, whole: bool
    ) -> frames.UploadReceipt:
        """whole: its job gets it first."""
        if whole:
            self._complete(name, start, await asyncio.to_thread(incoming.finish))
        return frames.UploadReceipt(start.digest, incoming.offset, incoming.complete)

    async def upload(self, peer: Peer, requests: AsyncIterator[bytes]) -> frames.UploadReceipt:
        """Take an upload from the offset at which it broke off."""
        name = SiteId(peer.name)
        incoming, coming, start = None, None, None
        timeouts = itertools.chain([FIRST_FRAME_SECONDS], itertools.repeat(PART_SECONDS))
        async for data in with_timeouts(requests, lambda: next(timeouts)):
            frame = calls.UPLOAD.takes.unpack(data, sender=name)
            if incoming is None or coming is None:
                if not isinstance(frame, frames.UploadStart):
                    raise MalformedMessage(
                        "upload", found="a part", expected="its start first", fault=name
                    )
                start, incoming = frame, self.open_upload(name, frame)
                coming = chunks.Incoming(frame, sender=name)
                if incoming.complete:
                    break
            else:
                at, part = coming.offset, coming.take(frame)
                await asyncio.to_thread(incoming.write, at, part)
        if incoming is None or start is None:
            raise MalformedMessage("upload", found="nothing", expected="its start", fault=name)
        return await self._receipt(name, start, incoming, whole=incoming.offset == incoming.size)

    async def upload_offset(self, peer: Peer, start: frames.UploadStart) -> frames.UploadReceipt:
        """How many bytes of an upload are here."""
        name = SiteId(peer.name)
        incoming = self.open_upload(name, start)
        return await self._receipt(name, start, incoming, whole=incoming.complete)

    async def download(self, _: Peer, start: frames.DownloadStart) -> AsyncIterator[bytes]:
        """The serialised frames of a sum or a checkpoint, from an offset on."""
        found = self._hub.jobs.get(start.job)
        stored = found.download(start.what, start.digest) if found is not None else None
        if stored is None:
            raise BadInput("download: found no such sum or checkpoint here")
        head = frames.DownloadHead(start.digest, stored.travels, start.offset)
        with stored.path.open("rb") as file:
            parts = chunks.download(head, file)
            while (part := await asyncio.to_thread(next, parts, None)) is not None:
                self._hub.sessions.counts.bytes_out += len(part)
                yield part
