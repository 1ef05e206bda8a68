"""The sites' sessions: which calls are admitted, which sessions are open, and what is queued in them.

Invariant: a call is admitted by its certificate before a frame of it is read; the certificate of an open session is
checked again every second, that of a transfer at every part. A site has one session, of one process: that of another
process is refused while the first one answers, and so are transfers and renewals outside of the session. The queue of
a session is bounded.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from fedcore_server.context import CoordinatorContext
from fedcore_server.probes import Counts
from fedcore_server.tls import Gate, ServicerContext, address_of, refuse

from fedcore.audit.lines import Fact
from fedcore.audit.seldom import Seldom
from fedcore.errors import CertificateRefused, StoreProblem, printable
from fedcore.identity.peer import Peer
from fedcore.secagg.protocol.job_messages import ToSite
from fedcore.store.spool import Stored
from fedcore.types import SiteId
from fedcore.wire import calls, frames
from fedcore.wire.codec import MOST_TOGETHER, TOGETHER, in_messages
from fedcore.wire.limits import INLINE
from fedcore.wire.records import TO_SITE, pack_record

LOG = logging.getLogger("fedcore.coordinator")

MOST_FRAMES, MOST_BYTES = 4096, 64 << 20
"""Limits of the queue of a site that does not read; beyond them its session ends, and it reconnects."""

FIRST_FRAME_SECONDS = 10.0
"""Timeout of a call without its first frame."""

PROBE_SECONDS = 5.0
"""How long the process of an open session may take to answer when another one comes as the same site: a ping is
answered at once, also while the site trains, so that only a dead connection takes longer."""

SOON_SECONDS = 0.05
"""How long a frame waits for another one, where nothing waits for it."""

EVICTED = "evicted"
"""Why a site that an operator evicted is `unable`, and the code of its Goodbye."""

WITHDRAWN = {"revoked": "its certificate was revoked", "roster": "removed from the roster"}
"""{check that its certificate fails: why a site is `unable`}, until it connects again."""

EVICTED_GOODBYE = frames.Goodbye(EVICTED, "an operator sent this site away")


@dataclass
class SiteSession:
    """One open session: the queue of its frames, and when it began. Times: seconds since 1970.

    over: no more frames are queued; begun: its Hello was accepted; waiting: bytes in the queue. connection: the peer
    of its call, as gRPC has it; before: that of the site's session before; instance: of the site's process, random.
    """

    peer: Peer
    connection: str = ""
    before: str = ""
    instance: bytes = b""
    out: asyncio.Queue[bytes | None] = field(default_factory=lambda: asyncio.Queue(MOST_FRAMES))
    since: float = field(default_factory=time.time)
    last_seen: float = field(default_factory=time.time)
    over: bool = False
    begun: bool = False
    waiting: int = 0
    roster: str = ""
    """What the site made of the newest roster, in words; empty where it took it."""
    _soon: tuple[frames.ToSite, asyncio.TimerHandle] | None = None
    _probes: dict[int, asyncio.Event] = field(default_factory=dict)
    """{number of a ping: its pong has come}."""

    @property
    def address(self) -> str:
        """Where it comes from."""
        return address_of(self.connection)

    def put(self, frame: frames.ToSite) -> None:
        """Queue a frame; a full queue ends the session."""
        self.put_packed(calls.SESSION.gives.pack(frame))

    def put_packed(self, data: bytes) -> None:
        """Queue a serialised frame."""
        if self._soon is not None:
            self._send_soon()
        if self.over:
            return
        if self.out.full() or self.waiting + len(data) > MOST_BYTES:
            LOG.warning("%s: found %d frames unread, session ended", self.peer, self.out.qsize())
            self.end(None)
            return
        self.waiting += len(data)
        self.out.put_nowait(data)

    def put_soon(self, frame: frames.ToSite) -> None:
        """Queue a frame before the next one, or after SOON_SECONDS: one that nothing waits for."""
        if self._soon is not None:
            self._send_soon()
        later = asyncio.get_running_loop().call_later(SOON_SECONDS, self._send_soon)
        self._soon = frame, later

    def _send_soon(self) -> None:
        found, self._soon = self._soon, None
        if found is not None:
            found[1].cancel()
            self.put(found[0])

    async def next(self) -> bytes | None:
        """The next frame to send; None after the last one."""
        if self.over and self.out.empty():
            return None
        data = await self.out.get()
        self.waiting -= len(data or b"")
        return data

    async def messages(self) -> AsyncIterator[bytes]:
        """The messages to send, until the session is over: frames that are in the queue together are sent together."""
        last = False
        while not last and (data := await self.next()) is not None:
            found, size = [data], len(data)
            await asyncio.sleep(0)  # for what the same turn has to say
            while not self.out.empty() and len(found) < MOST_TOGETHER and size <= TOGETHER:
                more = self.out.get_nowait()
                if more is None:
                    last = True
                    break
                self.waiting -= len(more)
                found.append(more)
                size += len(more)
            for message in in_messages(found):
                yield message

    async def answers(self, seconds: float) -> bool:
        """Whether the process at the other end answers a ping within this time."""
        if self.over:
            return False
        number, heard = secrets.randbits(48), asyncio.Event()
        self._probes[number] = heard
        self.put(frames.Ping(number))
        try:
            async with asyncio.timeout(seconds):
                await heard.wait()
        except TimeoutError:
            return False
        finally:
            del self._probes[number]
        return not self.over

    def answered(self, number: int) -> None:
        """A pong has come."""
        if number in self._probes:
            self._probes[number].set()

    def gone(self) -> None:
        """Its call is over: nobody waits for an answer of it any longer."""
        self.over = True
        for heard in self._probes.values():
            heard.set()

    def end(self, goodbye: frames.Goodbye | None) -> None:
        """Queue this last frame and no more."""
        self._send_soon()
        if goodbye is not None:
            self.put(goodbye)
        self.over = True
        with contextlib.suppress(asyncio.QueueFull):
            self.out.put_nowait(None)


class Sessions:
    """Admission of calls, and the open sessions; jobs send by `say` and `push`."""

    def __init__(self, context: CoordinatorContext, gate: Gate) -> None:
        self.context, self.gate = context, gate
        self.counts = Counts()
        self.open: dict[SiteId, SiteSession] = {}
        self.last_peers: dict[SiteId, Peer] = {}
        """The certificate of each site's last session: it may be revoked while the site is away."""
        kept = context.journal.get("coordinator", "evicted")
        self.evicted: set[str] = set(json.loads(kept)) if kept else set()
        kept = context.journal.get("coordinator", "away")
        self.away: dict[str, str] = json.loads(kept) if kept else {}
        """{site: why it is away, of `frames.AWAY`}, where its operator says so."""
        self.seconds: dict[SiteId, str] = {}
        """Where and when a second process came as a site last, in words."""
        self._connections: dict[SiteId, str] = {}
        """Of each site's last session."""
        self.probe_seconds = PROBE_SECONDS
        self._refusals, self._clones = Seldom(), Seldom()
        """Apart, so that no flood of refused calls keeps a second process of a site out of the trail."""
        self._packed: tuple[str, ToSite | None, bytes] = "", None, b""
        """The last job, message and serialised frame: the same message usually goes to all sites."""

    async def admit(self, context: ServicerContext, call: calls.Call[Any, Any]) -> Peer:
        """The peer that makes this call; ends the call with a refusal if it may not."""
        peer = None
        try:
            peer = self.gate.admit(context, call.roles)
            if call is not calls.SESSION:
                self._not_evicted(peer)
            if call.beside_session and self._of_another_process(peer, context.peer()):
                raise self._outside(peer, context.peer())
            return peer
        except CertificateRefused as error:
            self.counts.refused += 1
            LOG.warning("%s: %s", call.name, error)
            self.refused(call.name, error, error.check, peer)
            await refuse(context, error)

    def still(self, peer: Peer, connection: str) -> None:
        """Check what can change while a transfer runs. Raises CertificateRefused, also where the site has a session on
        another connection by now: then nobody is told, since this may be what its own broken one left behind."""
        self.gate.still(peer)
        self._not_evicted(peer)
        if self._of_another_process(peer, connection):
            raise _not_of_session(peer, connection, self.open[SiteId(peer.name)])

    def _not_evicted(self, peer: Peer) -> None:
        if peer.role == calls.SITE and peer.name in self.evicted:
            raise CertificateRefused(
                f"site {peer.name!r}: found it evicted by an operator, expected one in the federation",
                check="roster",
                remedy="ask the operator why: `fed-coordinator evict SITE --undo` lets it in again",
            )

    def _of_another_process(self, peer: Peer, connection: str) -> bool:
        """Whether the site of a call has a session, and the call is not on its connection: what is sent could then be
        another process's, and a renewed certificate for a key of its own."""
        session = self.open.get(SiteId(peer.name))
        return session is not None and session.connection != connection

    def _outside(self, peer: Peer, connection: str) -> CertificateRefused:
        """The refusal of a call outside of the site's session; operators and the site's process are told."""
        session = self.open[SiteId(peer.name)]
        if connection != session.before:  # else it was on its way when the site reconnected
            self._tell_second(SiteId(peer.name), address_of(connection), session)
        return _not_of_session(peer, connection, session)

    def refused(self, call: str, error: Exception, word: str, peer: Peer | None = None) -> None:
        """Record a refused call: one of the same kind in a minute."""
        who = {} if peer is None else {"by": peer.name, "certificate": peer.fingerprint}
        if self._refusals.allows((call, str(error))):
            self.note("refused", call=call, word=word, text=printable(str(error), 400), **who)

    def site_refused(self, site: SiteId, what: str, word: str, **facts: Fact) -> None:
        """Record what a site refused, in the word that it gave: one of the same kind in a minute."""
        if self._refusals.allows((site, what, word, *facts.items())):
            self.note("refused", site=site, what=what, why=word, **facts)

    def note(self, event: str, **facts: Fact) -> None:
        """Record what no message relies on; where the disk refuses it, the log has it."""
        try:
            self.context.audit.record(event, **facts)
        except StoreProblem as error:
            LOG.warning("%s: not recorded: %s", event, error)

    def evict(self, site: str, *, undo: bool) -> None:
        """Evict a site or admit it again, in the journal first. Raises StoreProblem."""
        evicted = self.evicted - {site} if undo else self.evicted | {site}
        self.context.journal.put("coordinator", "evicted", json.dumps(sorted(evicted)).encode())
        if undo:
            self.evicted.remove(site)
            return
        self.evicted.add(site)
        if (session := self.open.get(SiteId(site))) is not None:
            session.end(EVICTED_GOODBYE)

    def note_away(self, site: SiteId, code: str) -> None:
        """Why a site is away, also for the next process; "" for one that is back."""
        before = self.away.get(site, "")
        self.away = {n: c for n, c in self.away.items() if n != site} | (
            {site: code} if code else {}
        )
        if code != before:
            self.context.journal.put("coordinator", "away", json.dumps(self.away).encode())

    async def second(self, name: SiteId, session: SiteSession) -> frames.Goodbye | None:
        """The refusal of a session where another process of the site has one and answers; else None, and the session
        may begin before anything else is awaited. A process that reconnects, or whose connection is dead, is let in."""
        while (before := self.open.get(name)) is not None and before.instance != session.instance:
            alive = await before.answers(self.probe_seconds)
            if self.open.get(name) is not before:
                continue
            return self._cloned(name, session, before) if alive else None
        return None

    def _cloned(self, name: SiteId, session: SiteSession, before: SiteSession) -> frames.Goodbye:
        """Tell everybody that two processes have one identity: operators, the log, the trail, and both processes."""
        since = datetime.fromtimestamp(before.since, UTC)
        text = (
            f"another process is connected as {name} from {before.address} since "
            f"{since:%Y-%m-%d %H:%M:%S} UTC"
        )
        if self._tell_second(name, session.address, before):
            LOG.error(
                "site %s: refused a second process from %s: %s; if only one is the site's, revoke it and have it join "
                "again with new keys", name, session.address, text,
            )  # fmt: skip
            about = {"certificate": session.peer.fingerprint, "address": session.address}
            self.note(
                "refused", call=calls.SESSION.name, word="cloned", site=name, text=text, **about
            )
        return frames.Goodbye("cloned", text)

    def _tell_second(self, name: SiteId, address: str, before: SiteSession) -> bool:
        """Count a second process and show it to operators; to the site's own process, log and trail once a minute for
        each address: whether now."""
        now = time.time()
        self.counts.cloned += 1
        at = f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M:%S} UTC"
        self.seconds[name] = f"refused a second process from {address} at {at}"
        if not self._clones.allows((name, address)):
            return False
        before.put(frames.SecondProcess(address, int(now * 1000)))
        return True

    def begin(self, name: SiteId, session: SiteSession) -> None:
        """This is the site's session from now on; an older one ends."""
        before = self.open.get(name)
        if before is not None:
            before.end(frames.Goodbye("replaced", "a newer session of this site"))
        session.before = self._connections.get(name, "")
        self.open[name], self._connections[name] = session, session.connection
        self.note_away(name, "")
        self.counts.sessions += 1
        about = {"certificate": session.peer.fingerprint, "serial": session.peer.serial}
        about |= {"address": session.address}
        self.note("connect", site=name, word="begins", **about)
        session.put(welcome(self.context))

    def check(self, ping: frames.Ping | None) -> None:
        """End sessions whose certificate no longer counts; send the others the ping."""
        for session in list(self.open.values()):
            try:
                self.gate.still(session.peer)
            except CertificateRefused as error:
                LOG.warning("%s", error)
                if session.over:
                    continue
                code = error.check if error.check in ("revoked", "expired") else "roster"
                about = {"certificate": session.peer.fingerprint}
                self.note(
                    "refused", call=calls.SESSION.name, word=code, site=session.peer.name, **about
                )
                session.end(goodbye(code, error))
            else:
                if ping is not None:
                    session.put(ping)

    def withdrawn(self) -> dict[SiteId, str]:
        """{site: why} of sites that were sent away since their last session: of WITHDRAWN; other
        certificates that do not count are forgotten."""
        found = {}
        for name, peer in list(self.last_peers.items()):
            try:
                self.gate.still(peer)
            except CertificateRefused as error:
                if error.check in WITHDRAWN:
                    found[name] = WITHDRAWN[error.check]
                else:
                    del self.last_peers[name]
        return found

    def close(self) -> None:
        """The process stops: every session ends, and the sites reconnect to the next process."""
        for session in list(self.open.values()):
            session.end(frames.Goodbye("stopping", "the coordinator stops"))

    def broadcast(self, frame: frames.ToSite, sites: Collection[SiteId]) -> None:
        """Queue a frame in the session of each of these sites that has one."""
        data = calls.SESSION.gives.pack(frame)
        for name, session in list(self.open.items()):
            if name in sites:
                session.put_packed(data)

    def connected(self) -> Collection[SiteId]:
        """Sites with a session now; membership tests are constant time."""
        return {name for name, session in self.open.items() if not session.over}

    def say(self, site: SiteId, job: str, message: ToSite) -> None:
        """Send a record if the site has a session."""
        session = self.open.get(site)
        if session is None:
            return
        if self._packed[:2] != (job, message):
            frame = calls.SESSION.gives.pack(pack_record(job, message, TO_SITE))
            self._packed = job, message, frame
        session.put_packed(self._packed[2])

    def push(self, site: SiteId, job: str, what: str, stored: Stored) -> None:
        """Send a small sum or checkpoint without a request."""
        session = self.open.get(site)
        if session is None or stored.travels > INLINE:
            return
        start = frames.DownloadStart(job, what, stored.digest)
        data = stored.path.read_bytes()
        self.counts.bytes_out += len(data)
        session.put(frames.SmallDownload(start, data))


def _not_of_session(peer: Peer, connection: str, session: SiteSession) -> CertificateRefused:
    return CertificateRefused(
        f"site {peer.name!r}: found a call from {address_of(connection)} outside of its session from "
        f"{session.address}, expected it on the same connection",
        check="cloned",
        remedy="one process to a site: stop one of them",
    )


def welcome(context: CoordinatorContext) -> frames.Welcome:
    """The answer to a Hello that is accepted now."""
    number = context.rosters.current.number
    return frames.Welcome(context.federation, int(time.time() * 1000), number)


def goodbye(code: str, error: Exception) -> frames.Goodbye:
    """The end of a session for an error, in one line of at most 200 characters."""
    return frames.Goodbye(code, printable(str(error), 200))


async def with_timeouts(
    requests: AsyncIterator[bytes], seconds: Callable[[], float | None]
) -> AsyncIterator[bytes]:
    """The requests of a stream; `seconds` gives the timeout of each. Raises TimeoutError."""
    coming = aiter(requests)
    while True:
        try:
            yield await asyncio.wait_for(anext(coming), seconds())
        except StopAsyncIteration:
            return
