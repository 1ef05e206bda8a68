"""The second port of a coordinator, where sites join: they have no certificate yet, so gRPC's port refuses them.

One exchange a connection, JSON lines over TLS 1.3 with the coordinator's own certificate: the authority's certificate,
then the site's request, then the answer: joined, waiting, or one word of refusal (`identity/join_messages.py`).

Invariant: what an unknown peer can cost is bounded: connections at once, in all and of one address, seconds of one
connection, and bytes of a request. A request is answered only after its token is verified; what is refused changes
nothing, and the log has the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fedcore_server.authority_key import PASSPHRASE_VARIABLE
from fedcore_server.config import FederationConfig
from fedcore_server.federation import Enrolment, FederationFiles
from fedcore_server.tls import listen_sockets

from fedcore.audit.seldom import Seldom
from fedcore.audit.trail import NoTrail, Recorder
from fedcore.errors import FedcoreError, Refused, StoreProblem, printable
from fedcore.identity.authority import Authority
from fedcore.identity.join_messages import MOST_REQUEST, JoinRefused, JoinRequest
from fedcore.identity.kit import Kit, KitFile
from fedcore.identity.peer import peer_of
from fedcore.types import Json

LOG = logging.getLogger("fedcore.coordinator.enrolment")

MOST_CONNECTIONS, MOST_OF_ADDRESS = 32, 8
"""Connections at once: others wait in the system's queue, and those of one address beyond its share are closed."""

SECONDS = 15.0
"""Timeout of a whole exchange, handshake included."""


@dataclass
class Enrolments:
    """Answers requests to join, and to renew. authority: None where its key is not open in this process. automatic:
    whether requests with a valid token are granted at once. audit: the coordinator's trail. refusals: those that are
    recorded there."""

    files: FederationFiles
    authority: Authority | None
    clock: Callable[[], datetime]
    automatic: bool = True
    audit: Recorder = field(default_factory=NoTrail)
    refusals: Seldom = field(default_factory=Seldom)

    def answer(self, data: bytes) -> Json:
        """The answer to a request of any origin. Blocking: it waits for the federation's lock and reads files."""
        site = "unknown"
        try:
            request = JoinRequest.parse(data)
            site = request.site
            found = self.files.ask(request, self.clock())
            if found.state == "asked" and self.automatic and self.authority is not None:
                found = self.files.approve(site, self.authority, self.clock())
            return self._granted(found)
        except JoinRefused as refused:
            LOG.warning("site %s: refused to join (%s)", printable(site, 64), refused.word)
            if self.refusals.allows(
                (refused.word, site)
            ):  # whoever reaches the port can be refused
                self._record("refused", printable(site, 64), refused.word)
            return {"state": "refused", "word": refused.word}
        except FedcoreError as error:
            LOG.warning("site %s: its request to join was not answered: %s", site, error)
            return {"state": "refused", "word": "busy"}

    def _granted(self, found: Enrolment) -> Json:
        if found.state == "asked":
            LOG.warning(
                "site %s asks to join and waits: fed-coordinator approve %s", found.site, found.site
            )
            self._record("enrol", found.site, "waits")
            return {"state": "waiting"}
        answer = self.files.answer(found)
        if found.state == "approved":
            LOG.info("site %s joined: it is on roster %d", found.site, self.files.roster().number)
        self._record("enrol", found.site, "joined", serial=found.serials[-1])
        return answer.to_json()

    def renew(self, site: str, csr: bytes) -> bytes:
        """A new certificate (PEM) for a site that is connected. Blocking. Raises Refused, JoinRefused."""
        if self.authority is None:
            raise Refused(
                "renewal: found the authority's key not open at the coordinator, expected it open",
                remedy="the operator renews by a file: fed-coordinator renew SITE --answer FILE",
            )
        found = self.files.renew(site, csr, self.authority, self.clock())
        peer = peer_of(found.certificate)
        LOG.info("site %s: its certificate is renewed, until %s", site, f"{peer.ends:%Y-%m-%d}")
        self._record("enrol", site, "renewed", serial=peer.serial)
        return found.certificate

    def no_request(self, address: str) -> None:
        """Record a connection that ended before it asked for anything, as that of a site which does not accept this
        coordinator's certificate does."""
        LOG.info("connection of %s ended without a request", address)
        if self.refusals.allows(("no request", address)):
            try:
                self.audit.record("refused", what="to join", word="no request", address=address)
            except StoreProblem as error:
                LOG.warning("refused: not recorded: %s", error)

    def _record(self, event: str, site: str, decision: str, **facts: str) -> None:
        self.audit.record(event, site=site, decision=decision, **facts)


def open_enrolments(
    config: FederationConfig, authority: Authority | None, audit: Recorder
) -> Enrolments | None:
    """What answers sites that join or renew; None without an `enrol_port`. authority: None where its key is not open
    here."""
    if config.enrol_port is None:
        return None
    automatic = config.enrolment.approval == "automatic"
    if authority is None:
        LOG.warning(
            "the authority's key is not open here, so requests to join wait for `fed-coordinator approve SITE` and "
            "certificates are renewed by files; to open it, set passphrase_file under [enrolment], or $%s",
            PASSPHRASE_VARIABLE,
        )  # fmt: skip
    else:
        audit.record("key", what="the authority's key", word="open", sha256=authority.fingerprint)
    return Enrolments(
        FederationFiles(config), authority, lambda: datetime.now(UTC), automatic, audit
    )


@contextlib.asynccontextmanager
async def enrolling(
    config: FederationConfig, kit: Kit, enrolments: Enrolments | None
) -> AsyncIterator[None]:
    """Let sites join while inside, where federation.toml has an `enrol_port`. Raises BadInput for a port that cannot be
    bound."""
    if enrolments is None or config.enrol_port is None:
        yield
        return
    async with listening(enrolments, kit, config.listen, config.enrol_port) as port:
        granted = enrolments.automatic and enrolments.authority is not None
        how = "are granted" if granted else "wait for `fed-coordinator approve SITE`"
        LOG.info("sites join at port %d; requests with a valid line %s", port, how)
        yield


@contextlib.asynccontextmanager
async def listening(
    enrolments: Enrolments, kit: Kit, hosts: Sequence[str], port: int
) -> AsyncIterator[int]:
    """Serve requests while inside; the port (a free one for 0). Raises BadInput where it cannot be bound."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    kits = KitFile(kit)
    kit.load_into(context)
    context.num_tickets = 0
    sockets = listen_sockets(hosts, port)
    room, of_address = asyncio.Semaphore(MOST_CONNECTIONS), Counter[str]()
    open_now: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()

    async def exchange(connection: socket.socket, address: str) -> None:
        try:
            if kits.refresh():
                kits.current.load_into(context)
            async with asyncio.timeout(SECONDS):
                await _exchange(enrolments, context, connection)
        except (OSError, EOFError, TimeoutError):
            enrolments.no_request(address)
        except Exception:
            LOG.exception("a request to join ended by an internal error")
        finally:
            connection.close()
            of_address[address] -= 1
            room.release()

    async def accept(listener: socket.socket) -> None:
        while True:
            await room.acquire()
            try:
                connection, peer = await loop.sock_accept(listener)
            except OSError as error:
                room.release()
                LOG.warning("no connection accepted: %s", error)
                await asyncio.sleep(1.0)
                continue
            address = str(peer[0])
            if of_address[address] >= MOST_OF_ADDRESS:
                connection.close()
                room.release()
                continue
            of_address[address] += 1
            task = loop.create_task(exchange(connection, address))
            open_now.add(task)
            task.add_done_callback(open_now.discard)

    accepting = [loop.create_task(accept(each)) for each in sockets]
    try:
        yield sockets[0].getsockname()[1]
    finally:
        for task in (*accepting, *open_now):
            task.cancel()
        await asyncio.gather(*accepting, *open_now, return_exceptions=True)
        for each in sockets:
            each.close()


async def _exchange(
    enrolments: Enrolments, context: ssl.SSLContext, connection: socket.socket
) -> None:
    """One handshake, one request, one answer. Raises EOFError where the peer sends no whole line."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=MOST_REQUEST)
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, connection, ssl=context)
    writer = asyncio.StreamWriter(transport, protocol, reader, loop)
    try:
        writer.write(_line({"authority": enrolments.files.authority_pem.decode()}))
        try:
            data = await reader.readuntil(b"\n")
        except asyncio.LimitOverrunError:
            LOG.warning("a request of more than %d bytes was not read", MOST_REQUEST)
            answer: Json = {"state": "refused", "word": "request"}
        else:
            answer = await asyncio.to_thread(enrolments.answer, data)
        writer.write(_line(answer))
        await writer.drain()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _line(value: Json) -> bytes:
    return json.dumps(value).encode() + b"\n"
