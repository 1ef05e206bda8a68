"""The lease of a party's journal in PostgreSQL: only one process at a time may write it.

Invariant: a process that lost its lease writes nothing more, also if it was paused while another took over.
Taking the lease adds 1 to its fencing number; every transaction that writes first locks the row of the lease and
finds the number that this process took (M. Kleppmann, "How to do distributed locking", 2016). So a takeover waits
for a transaction under way, and a later one finds another number. A holder that stops inside a transaction does not
block the takeover: the server ends its session after IDLE_SECONDS, and with it the transaction.

Times are those of the database's clock, so the clocks of the machines do not matter.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    DateTime,
    Engine,
    MetaData,
    String,
    Table,
    func,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError

from fedcore.errors import LeaseLost

LOG = logging.getLogger("fedcore.store")

LEASE_SECONDS = 6.0
"""How long a lease lasts: a standby takes over so long after the last renewal. It is renewed four times as often,
and so is one that lasts longer."""

IDLE_SECONDS = 2.0
"""After so long without a statement inside a transaction the server ends the session (a paused holder)."""

_LOCK_NOT_AVAILABLE = "55P03"

LEASES = Table(
    "leases", MetaData(schema="fedcore"),
    Column("party", String(300), primary_key=True),
    Column("fence", BigInteger, nullable=False),
    Column("holder", String(300), nullable=False),
    Column("expires", DateTime(timezone=True), nullable=False),
)  # fmt: skip


def holder_name() -> str:
    """This process, as the lease names its holder."""
    return f"process {os.getpid()} on {socket.gethostname()}"[:300]


def _until(seconds: float) -> object:
    return func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, seconds)


def take(connection: Connection, party: str, seconds: float) -> int | None:
    """Take a lease that is free or has expired; its fencing number, or None where another process has it.

    Raises DBAPIError.
    """
    nobody = {"party": party, "fence": 0, "holder": "", "expires": text("'-infinity'::timestamptz")}
    free = (LEASES.c.party == party, LEASES.c.expires < func.clock_timestamp())
    try:
        with connection.begin():
            connection.execute(text("SET LOCAL lock_timeout = '1s'"))  # a transaction of its holder
            connection.execute(insert(LEASES).values(nobody).on_conflict_do_nothing())
            found = connection.execute(
                update(LEASES).where(*free)
                .values(fence=LEASES.c.fence + 1, holder=holder_name(), expires=_until(seconds))
                .returning(LEASES.c.fence)
            )  # fmt: skip
            return found.scalar_one_or_none()
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) == _LOCK_NOT_AVAILABLE:
            return None
        raise


def holder_of(connection: Connection, party: str) -> str:
    """The process that took this party's lease last. Raises DBAPIError."""
    with connection.begin():
        query = select(LEASES.c.holder).where(LEASES.c.party == party)
        return connection.execute(query).scalar_one_or_none() or "nobody"


class Lease:
    """A lease that this process took, renewed by a thread with a connection of its own until `release`.

    name: of the database, in messages. seconds: how long it lasts without a renewal.
    """

    def __init__(self, engine: Engine, name: str, party: str, fence: int, seconds: float) -> None:
        self._engine, self._name, self._party = engine, name, party
        self._connection: Connection | None = None
        self.fence, self._seconds = fence, seconds
        self._lost: LeaseLost | None = None
        self._on_loss: Callable[[LeaseLost], None] = lambda _: None
        self._known = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_on, name="lease", daemon=True)
        self._thread.start()

    def on_loss(self, tell: Callable[[LeaseLost], None]) -> None:
        """Call this once when the lease is lost, from another thread; at once if it is lost already."""
        with self._known:
            self._on_loss = tell
        if self._lost is not None:
            tell(self._lost)

    def check(self, connection: Connection) -> None:
        """Lock the row of the lease until the end of this connection's transaction, which may then write.
        Raises LeaseLost."""
        if self._lost is not None:
            raise self._lost
        mine = (LEASES.c.party == self._party, LEASES.c.fence == self.fence)
        query = select(LEASES.c.fence).where(*mine).with_for_update(read=True)
        if connection.execute(query).scalar_one_or_none() is None:
            raise self._lose("found that another process took it over")

    def release(self) -> None:
        """Let another process take it at once. Idempotent; never raises a DBAPIError."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        if self._lost is None:
            try:
                self._set_end(text("'-infinity'::timestamptz"))
            except DBAPIError as error:
                LOG.warning(
                    "%s: its lease ends by itself (%s)", self._name, type(error.orig).__name__
                )
        if self._connection is not None:
            self._connection.close()

    def _set_end(self, expires: object) -> bool:
        """Set when it expires; False where it is another process's."""
        mine = (LEASES.c.party == self._party, LEASES.c.fence == self.fence)
        if self._connection is None:
            self._connection = self._engine.connect()
        with self._connection.begin():  # connects again where the connection was lost
            changed = update(LEASES).where(*mine).values(expires=expires)
            return self._connection.execute(changed).rowcount == 1

    def _renew_on(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(min(self._seconds, LEASE_SECONDS) / 4):
            asked = time.monotonic()
            try:
                if not self._set_end(_until(self._seconds)):
                    self._lose("found that another process took it over")
                    return
                last = asked
            except DBAPIError as error:
                late = time.monotonic() - last
                if late > self._seconds:
                    why = " ".join(str(error.orig).split())
                    self._lose(f"found no way to renew it for {late:.0f} s ({why})")
                    return

    def _lose(self, why: str) -> LeaseLost:
        with self._known:
            first = self._lost is None
            self._lost = self._lost or LeaseLost(
                f"{self._name}: lease of {self._party!r}: {why}, expected to hold it",
                remedy="nothing of what the other process wrote is lost; start this one again as a standby",
            )
            tell = self._on_loss
        if first:
            tell(self._lost)
        return self._lost
