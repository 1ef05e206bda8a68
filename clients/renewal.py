"""This site's certificate, renewed before it ends and taken into use without a restart.

When a third of its time is left, the session asks the coordinator for a new one (call `Renew`), for the same key; when
half of it is left already, where the operator has made a new key (`next_key.py`). What comes is checked and written
over certificate.pem; so is what an operator's file brings (`fed-site join --answer`). A changed file is taken into use
by a new session, between two rounds if there is time.

Invariant: a certificate is used only after every check, for this site and its own key; the one before stays in use
otherwise.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import grpc.aio
from fedcore_clients.channel import Offline
from fedcore_clients.next_key import key_in_use, next_key, take_next
from fedcore_clients.session import Session

from fedcore.errors import BadInput, FedcoreError, printable
from fedcore.files import write_atomic
from fedcore.identity.join_messages import check_own, make_csr
from fedcore.identity.kit import Kit, KitFile
from fedcore.identity.peer import Peer, peer_of, read_certificate
from fedcore.wire import calls, frames
from fedcore.wire.refusals import told

LOG = logging.getLogger("fedcore.site")

CHECK_SECONDS = 1.0
RETRY = timedelta(hours=1)
"""After a renewal that was refused or failed; less where the certificate ends sooner."""


class Renewal:
    """One site's. busy: whether a job is in a round now; note: records in the site's audit trail."""

    def __init__(
        self, kit: Kit, session: Session, busy: Callable[[], bool], note: Callable[..., None]
    ) -> None:
        self._kits, self._session, self._busy, self._note = KitFile(kit), session, busy, note
        self._not_before = datetime.min.replace(tzinfo=UTC)

    async def run(self) -> None:
        """Look every second, until cancelled."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            try:
                await self.step(datetime.now(UTC))
            except (FedcoreError, OSError) as error:
                LOG.warning("certificate not renewed: %s", error)

    async def step(self, now: datetime) -> None:
        """Ask for a new certificate if it is time, and take a new one into use. Raises FedcoreError, OSError."""
        session = self._session
        if self._kits.refresh() or session.kit is not self._kits.current:
            left, life = _time(session.kit, now)
            if not self._busy() or left < life / 10:
                kit, peer = self._kits.current, self._kits.current.peer
                same = key_of(kit) == key_of(session.kit)
                self._note(
                    "key", what="certificate", serial=peer.serial, until=f"{peer.ends:%Y-%m-%d}",
                    tls_key="the same" if same else "a new one",
                )  # fmt: skip
                await session.use(kit)
            return
        left, life = _time(self._kits.current, now)
        due = due_at(self._kits.current.peer, new_key=next_key(self._kits.current) is not None)
        if now > due and now >= self._not_before and session.since is not None:
            self._not_before = now + min(RETRY, max(left / 20, timedelta(seconds=1)))
            await self._renew(now)

    async def _renew(self, now: datetime) -> None:
        kit = self._kits.current
        site, new = kit.peer.name, next_key(kit)
        key = new or key_in_use(kit)
        try:
            reply = await self._session.ask(calls.RENEW, frames.RenewRequest(make_csr(site, key)))
        except Offline:
            return
        except grpc.aio.AioRpcError as error:
            found = told(error.code().name, error.details() or "")
            raise found or BadInput(f"renewal: {printable(error.details() or '')}") from None
        check_own(reply.certificate, kit.authority_pem, site, key.public_key(), now)
        if peer_of(reply.certificate).ends <= kit.peer.ends:
            raise BadInput("renewal: found a certificate that ends no later, expected a longer one")
        if new is None:
            write_atomic(kit.certificate_path, reply.certificate)
        else:
            take_next(kit.certificate_path.parent, reply.certificate)


def key_of(kit: Kit) -> object:
    """The public key of its certificate."""
    return read_certificate(kit.certificate_pem).public_key()


def due_at(peer: Peer, *, new_key: bool) -> datetime:
    """From when on the next certificate is asked for. The coordinator issues none for a new key before half of the
    time is over."""
    return peer.ends - (peer.ends - peer.begins) / (2 if new_key else 3)


def _time(kit: Kit, now: datetime) -> tuple[timedelta, timedelta]:
    """What is left of a certificate's time, and all of it."""
    return kit.peer.ends - now, kit.peer.ends - kit.peer.begins
