"""The calls of sites beside transfers: a session, and the check of a Hello without one."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import assert_never

from fedcore_server.coordinator import Coordinator
from fedcore_server.job_runner import JobRunner
from fedcore_server.sessions import (
    EVICTED_GOODBYE,
    FIRST_FRAME_SECONDS,
    SiteSession,
    goodbye,
    welcome,
    with_timeouts,
)
from fedcore_server.transfers import Transfers

from fedcore.errors import BadInput, MalformedMessage, PeerRefused, VersionRefused
from fedcore.identity.peer import Peer
from fedcore.secagg.crypto.identity_key import roster_digest
from fedcore.secagg.protocol.job.coordinator.events import MessageReceived, SiteConnected, SiteLeft
from fedcore.types import SiteId
from fedcore.wire import calls, frames
from fedcore.wire.records import FROM_ANY_SITE, TO_COORDINATOR, unpack_record

LOG = logging.getLogger("fedcore.coordinator")

MOST_RECORDS = 64
"""Records in the queue of a job beyond which sessions are not read: flow control slows the senders."""


class SiteApi:
    """`Session` and `Check` of one coordinator."""

    def __init__(self, hub: Coordinator, transfers: Transfers) -> None:
        self._hub, self._sessions, self._transfers = hub, hub.sessions, transfers
        self._pins = roster_digest(hub.context.pins)

    async def check(self, _: Peer, hello: frames.Hello) -> frames.Welcome:
        """The answer of a session to this Hello. Raises BadInput for another roster."""
        if hello.pins != self._pins:
            raise BadInput(
                "roster: found other identity keys pinned at the site than here",
                remedy="both must have the same roster.toml",
            )
        return welcome(self._hub.context.federation)

    async def session(self, peer: Peer, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The serialised frames for one site, until its session ends."""
        name = SiteId(peer.name)
        if name in self._sessions.evicted:
            yield calls.SESSION.gives.pack(EVICTED_GOODBYE)
            return
        session = SiteSession(peer)
        self._sessions.last_peers[name] = peer
        reader = asyncio.get_running_loop().create_task(self._read(name, session, requests))
        try:
            while (data := await session.next()) is not None:
                yield data
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader
            if self._sessions.open.get(name) is session:
                del self._sessions.open[name]
                LOG.info("site %s: session over", name)
                self._hub.changed()

    async def _read(
        self, name: SiteId, session: SiteSession, requests: AsyncIterator[bytes]
    ) -> None:
        try:
            async for data in with_timeouts(
                requests, lambda: None if session.begun else FIRST_FRAME_SECONDS
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
            LOG.info("site %s: session without a first frame, ended", name)
        except VersionRefused as error:
            session.end(goodbye("version", error))
        except PeerRefused as error:
            LOG.warning("site %s: %s", name, error)
            session.end(goodbye("malformed", error))
        except Exception:
            LOG.exception("site %s: session ended by an internal error", name)
        finally:
            session.end(None)

    def _begin(self, name: SiteId, session: SiteSession, frame: frames.FromSite) -> bool:
        """Whether the first frame begins the session; otherwise it is over."""
        if not isinstance(frame, frames.Hello):
            raise MalformedMessage(
                "session", found=type(frame).__name__, expected="Hello first", fault=name
            )
        if frame.pins != self._pins:
            session.end(
                frames.Goodbye("roster", "the identity keys pinned here and at the site differ")
            )
            return False
        self._sessions.begin(name, session)
        LOG.info("site %s: connected (%s)", name, frame.software)
        found = self._hub.running()
        if found is not None:
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
                if found is not None and (found.facts.outcome is not None or found is running):
                    await room(found)
                    table = (
                        TO_COORDINATOR
                        if found.machine.epochs.asks_for_grants(name)
                        else FROM_ANY_SITE
                    )
                    pins = len(self._hub.context.pins)
                    message = unpack_record(frame, table, sender=name, sites=pins)
                    found.put(MessageReceived(name, message))
            case frames.Doing(job, what):
                if job in jobs:
                    jobs[job].doing(name, what)
            case frames.SmallUpload(start, data):
                complete = self._transfers.small(name, start, data)
                session.put(frames.UploadReceipt(start.digest, 0, complete=complete))
            case frames.Goodbye():
                LOG.info("site %s: goodbye: %s", name, frame.code)
                session.end(None)
                if running is not None:
                    running.put(SiteLeft(name))
            case frames.Hello():
                raise MalformedMessage(
                    "session", found="a second Hello", expected="none", fault=name
                )
            case frames.Pong():
                pass
            case _:
                assert_never(frame)


async def room(found: JobRunner) -> None:
    """Wait while the queue of a job is full: nothing more of this session is read meanwhile."""
    while found.mailbox.backlog >= MOST_RECORDS and found.facts.outcome is None:  # noqa: ASYNC110 - rare
        await asyncio.sleep(0.01)
