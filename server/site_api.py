"""The calls of sites: uploads and downloads, whole or resumed; a session, and the check of a Hello without one."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator
from typing import assert_never

from fedcore_server import sessions
from fedcore_server.coordinator import Coordinator
from fedcore_server.job_runner import JobRunner
from fedcore_server.sessions import SiteSession

from fedcore.errors import (
    BadInput,
    MalformedMessage,
    PeerRefused,
    Refused,
    StoreProblem,
    VersionRefused,
)
from fedcore.identity.peer import Peer
from fedcore.secagg.protocol.job.coordinator.events import MessageReceived, SiteConnected
from fedcore.secagg.protocol.job_messages import SiteUnavailable
from fedcore.store.spool import IncomingUpload, Stored
from fedcore.types import SiteId
from fedcore.wire import calls, chunks, frames
from fedcore.wire.limits import INLINE
from fedcore.wire.records import FROM_ANY_SITE, TO_COORDINATOR, unpack_record

LOG = logging.getLogger("fedcore.coordinator")

MOST_RECORDS = 64
"""Records in the queue of a job beyond which sessions are not read: flow control slows the senders."""

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
        timeouts = itertools.chain([sessions.FIRST_FRAME_SECONDS], itertools.repeat(PART_SECONDS))
        stream = sessions.with_timeouts(requests, lambda: next(timeouts))
        first = await anext(stream, None)
        if first is None:
            raise MalformedMessage("upload", found="nothing", expected="its start", fault=name)
        start = calls.UPLOAD.takes.unpack(first, sender=name)
        if not isinstance(start, frames.UploadStart):
            raise MalformedMessage("upload", found="a part", expected="its start first", fault=name)
        incoming, coming = self.open_upload(name, start), chunks.Incoming(start, sender=name)
        if not incoming.complete:
            async for data in stream:
                at, part = coming.offset, coming.take(calls.UPLOAD.takes.unpack(data, sender=name))
                await asyncio.to_thread(incoming.write, at, part)
        return await self._receipt(name, start, incoming, whole=incoming.offset == incoming.size)

    async def upload_offset(self, peer: Peer, start: frames.UploadStart) -> frames.UploadReceipt:
        """How many bytes of an upload are here."""
        name = SiteId(peer.name)
        incoming = self.open_upload(name, start)
        return await self._receipt(name, start, incoming, whole=incoming.complete)

    async def download(self, peer: Peer, start: frames.DownloadStart) -> AsyncIterator[bytes]:
        """The serialised frames of a sum or a checkpoint, from an offset on; none for the sum of a round that ends
        without one."""
        found = self._hub.jobs.get(start.job)
        site = SiteId(peer.name)
        waits = start.what == frames.SUM_OF_ROUND
        if found is not None and waits and found.in_round(site, start.digest):
            stored = await found.announced.wait(site, start.digest)
            if stored is None:
                return
        else:
            stored = found.download(site, start.what, start.digest) if found is not None else None
        if stored is None:
            raise BadInput("download: found no such sum or checkpoint here")
        head = frames.DownloadHead(stored.digest, stored.travels, start.offset)
        with stored.path.open("rb") as file:
            parts = chunks.download(head, file)
            while (part := await asyncio.to_thread(next, parts, None)) is not None:
                self._hub.sessions.counts.bytes_out += len(part)
                yield part


class SiteApi:
    """`Session` and `Check` of one coordinator."""

    def __init__(self, hub: Coordinator, transfers: Transfers) -> None:
        self._hub, self._sessions, self._transfers = hub, hub.sessions, transfers

    async def check(self, _: Peer, hello: frames.Hello) -> frames.Welcome:
        """The answer of a session to this Hello. Raises BadInput for another roster."""
        if not self._hub.knows_roster(hello.pins):
            raise BadInput(
                "roster: found other identity keys pinned at the site than here",
                remedy="both must have the same roster.toml",
            )
        return sessions.welcome(self._hub.context)

    async def session(
        self, peer: Peer, requests: AsyncIterator[bytes], connection: str
    ) -> AsyncIterator[bytes]:
        """The serialised frames for one site, until its session ends. connection: the call's peer, as gRPC has it."""
        name = SiteId(peer.name)
        if name in self._sessions.evicted:
            yield calls.SESSION.gives.pack(sessions.EVICTED_GOODBYE)
            return
        session = SiteSession(peer, connection)
        self._sessions.last_peers[name] = peer
        reader = asyncio.get_running_loop().create_task(self._read(name, session, requests))
        try:
            async for data in session.messages():
                yield data
        finally:
            session.gone()
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader
            if self._sessions.open.get(name) is session:
                del self._sessions.open[name]
                self._sessions.note("connect", site=name, word="ends")
                LOG.info("site %s: session over", name)
                self._hub.changed()

    async def renew(self, peer: Peer, asked: frames.RenewRequest) -> frames.RenewReply:
        """A new certificate for the site that asks. Raises Refused where none are made, or for another's name."""
        certify = self._hub.context.certify
        if certify is None:
            raise Refused(
                "renewal: found a coordinator that makes no certificates, expected one with an enrol_port",
                remedy="ask the operator for a new certificate",
            )
        return frames.RenewReply(await asyncio.to_thread(certify, peer.name, asked.csr))

    async def _read(
        self, name: SiteId, session: SiteSession, requests: AsyncIterator[bytes]
    ) -> None:
        try:
            async for data in sessions.with_timeouts(
                requests, lambda: None if session.begun else sessions.FIRST_FRAME_SECONDS
            ):
                if session.over:
                    return
                session.last_seen = time.time()
                if (
                    not session.begun
                ):  # with a message of its own: nothing is read of one that is refused
                    hello = calls.SESSION.takes.unpack(data, sender=name)
                    session.begun = await self._begin(name, session, hello)
                    if not session.begun:
                        return
                    continue
                for frame in calls.SESSION.takes.unpack_each(data, sender=name):
                    await self._on_frame(name, session, frame)
                    if session.over:
                        return
        except TimeoutError:
            LOG.info("site %s: session without a first frame, ended", name)
        except VersionRefused as error:
            session.end(sessions.goodbye("version", error))
        except PeerRefused as error:
            LOG.warning("site %s: %s", name, error)
            session.end(sessions.goodbye("malformed", error))
        except Exception:
            LOG.exception("site %s: session ended by an internal error", name)
        finally:
            session.end(None)

    async def _begin(self, name: SiteId, session: SiteSession, frame: frames.FromSite) -> bool:
        """Whether the first frame begins the session; otherwise it is over."""
        if not isinstance(frame, frames.Hello):
            raise MalformedMessage(
                "session", found=type(frame).__name__, expected="Hello first", fault=name
            )
        if not self._hub.knows_roster(frame.pins):
            session.end(
                frames.Goodbye("roster", "the identity keys pinned here and at the site differ")
            )
            return False
        session.instance = frame.instance
        refused = await self._sessions.second(name, session)
        if refused is not None:
            session.end(refused)
            return False
        self._sessions.begin(name, session)
        LOG.info("site %s: connected (%s)", name, frame.software)
        self._hub.returned(name)
        newest, found = self._hub.context.rosters.current, self._hub.running()
        if newest.document:
            session.put(frames.Roster(newest.document))
        if found is not None and name in found.facts.sites:
            session.put(found.job_roster)
            found.put(SiteConnected(name))
        for ended in self._hub.jobs.values():  # a site that was not connected at the end
            if ended.facts.outcome is not None and any(h.job == ended.id for h in frame.held):
                ended.put(SiteConnected(name))
        self._hub.changed()
        return True

    async def _on_frame(self, name: SiteId, session: SiteSession, frame: frames.FromSite) -> None:
        jobs, running = self._hub.jobs, self._hub.running()
        match frame:
            case frames.Record():
                found = jobs.get(frame.job)
                if found is None or name not in found.facts.sites:
                    LOG.warning("site %s: dropped a message of a job without it", name)
                elif found.facts.outcome is not None or found is running:
                    await room(found)
                    grants = found.machine.epochs.asks_for_grants(name)
                    table = TO_COORDINATOR if grants else FROM_ANY_SITE
                    sites = len(found.facts.sites)
                    message = unpack_record(frame, table, sender=name, sites=sites)
                    if isinstance(message, SiteUnavailable):
                        self._sessions.site_refused(name, "job", message.reason, job=found.id)
                    found.put(MessageReceived(name, message))
            case frames.TrailHead():
                receipts = self._hub.context.receipts
                receipt = receipts.confirm(name, frame) if receipts is not None else None
                if receipt is not None:
                    session.put(receipt)
            case frames.Doing(job, what):
                if job in jobs:
                    jobs[job].doing(name, what)
            case frames.SmallUpload(start, data):
                complete = self._transfers.small(name, start, data)
                told = frames.UploadReceipt(start.digest, 0, complete=complete)
                # Of a small vector the site does nothing with it, so that it waits for the round's next record.
                soon = complete and 2 * start.size <= INLINE
                (session.put_soon if soon else session.put)(told)
            case frames.Goodbye():
                LOG.info("site %s: goodbye: %s", name, frame.code)
                session.end(None)
                self._hub.left(name, frame.code)
            case frames.Hello():
                raise MalformedMessage(
                    "session", found="a second Hello", expected="none", fault=name
                )
            case frames.Pong(number):
                session.answered(number)
            case frames.RosterSeen(number, word):
                self._roster_seen(name, session, number, word)
            case _:
                assert_never(frame)

    def _roster_seen(self, name: SiteId, session: SiteSession, number: int, word: str) -> None:
        """Show operators what a site made of a roster; a refusal is logged and audited."""
        session.roster = "" if word == "approved" else frames.ROSTER_WORDS[word]
        if session.roster:
            LOG.warning("site %s: roster %s (it has number %d)", name, session.roster, number)
        if word not in frames.ROSTER_TAKEN:
            self._sessions.site_refused(name, "roster", word)
        self._hub.changed()


async def room(found: JobRunner) -> None:
    """Wait while the queue of a job is full: nothing more of this session is read meanwhile."""
    while found.mailbox.backlog >= MOST_RECORDS and found.facts.outcome is None:  # noqa: ASYNC110 - rare
        await asyncio.sleep(0.01)
