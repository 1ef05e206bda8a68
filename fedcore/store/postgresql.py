"""A journal's database on a PostgreSQL server: that of several federations' coordinators, by name of the party.

The password comes from the URL or from libpq's password file ($PGPASSFILE, ~/.pgpass), and is in no message.
PostgreSQL keeps removed rows until it vacuums, and its write-ahead log and backups have them for longer: nothing
here erases, so no secret of a round may be in such a journal (a coordinator has none). Whoever administers the
server, or has a copy of it, reads what is in clear; with a keystore the contents of the rows are encrypted
(`sealing.py`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    CursorResult,
    Engine,
    bindparam,
    create_engine,
    func,
    inspect,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.engine import RootTransaction, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateSchema

from fedcore.errors import BadInput, LeaseLost, StoreFull, StoreProblem, require_extra
from fedcore.files.disk import FREE_SOME
from fedcore.store.database import SCHEMA, Compiled, Tables, check_meta, check_sealed, tables
from fedcore.store.lease import IDLE_SECONDS, LEASE_SECONDS, LEASES, Lease, holder_of, take

LOG = logging.getLogger("fedcore.store")

EXPECTED = "postgresql://USER@HOST:PORT/DATABASE"
_EXAMPLE = "postgresql://fedcore@db.example.org/fedcore, with the password in $PGPASSFILE"

_SCHEMA_NAME = "fedcore"
_TABLES = tables(by_party=True, schema=_SCHEMA_NAME)

_PREPARING = 7_443_001
"""Key of the advisory lock under which the tables are made: two coordinators may begin at once."""

_SETTINGS = {
    "synchronous_commit": "on",
    "default_transaction_isolation": r"read\ committed",  # the check of the lease reads its newest row
    "idle_in_transaction_session_timeout": f"{IDLE_SECONDS * 1000:.0f}",
    "tcp_user_timeout": "6000",
}

_OPTIONS: dict[str, Any] = {
    "connect_timeout": 5, "keepalives_idle": 3, "keepalives_interval": 1, "keepalives_count": 3,
    "tcp_user_timeout": 6000, "application_name": "fed-coordinator",
}  # fmt: skip

POLL_SECONDS = 0.5
"""Between two looks of a standby at the lease, at most."""

_HINTS = (
    ("password authentication failed", "check user and password: in the URL, or in the file $PGPASSFILE"),
    ("no password supplied", "write the password into database_file or into the file $PGPASSFILE"),
    ("does not exist", "create it first: createdb, createuser (docs/operations.md)"),
    ("no pg_hba.conf entry", "allow this user, database and address in the server's pg_hba.conf"),
    ("permission denied", f"CREATE SCHEMA {_SCHEMA_NAME} AUTHORIZATION <user>, in this database"),
    ("refused", "is the server running, and is this its port?"),
    ("No such file", "is the server running, and is this its socket's folder?"),
    ("resolve host", "check the host's name in the URL"),
    ("timeout", "is there a firewall between this machine and the server?"),
    ("invalid connection option", f"after '?' come options of libpq only; expected {EXPECTED}"),
)  # fmt: skip


_NEXT = select(
    func.nextval(func.pg_get_serial_sequence(f"{_SCHEMA_NAME}.records", "id"))
).select_from(func.generate_series(1, bindparam("count")))
"""An id that was drawn is given to nobody else, also where the transaction is undone."""

NUMBERS_AT_ONCE = 64
"""Ids drawn in one statement: it costs as much as one."""


class PostgresqlDatabase:
    """A party's journal on a server, and the lease to write it."""

    faults: tuple[type[Exception], ...] = (DBAPIError,)

    def __init__(self, url: URL, party: str) -> None:
        self.name, self._url, self._party = shown(url), url, party
        self.tables: Tables = _TABLES
        self.engine = _engine(url)
        self.lease: Lease | None = None
        self.closed, self.sealed = False, ""
        self._numbers: list[int] = []
        self.connection: Connection = self.engine.connect()

    @classmethod
    def open(
        cls,
        url: str,
        *,
        party: str,
        authority: str,
        wait: Callable[[str], None] | None = None,
        lease_seconds: float = LEASE_SECONDS,
        sealed: str | None = "",
    ) -> PostgresqlDatabase:
        """Connect, make the tables if there are none, and take the lease.

        authority: SHA-256 of the certificate of the federation's authority, in hex: another federation of the same
        name is refused. wait: called with one line where another process has the lease; then this one waits for it
        as a standby, for as long as it takes. sealed: the name of the key that the contents of the rows are
        encrypted with, "" for none, None for any: compared before the wait, so that a standby that cannot read is not
        waited for in vain, and after it. Raises BadInput for a URL that cannot be used and without the
        driver, StoreProblem: no server, no such database, wrong password, another version, another
        federation's journal, and without `wait` a lease that another process has.
        """
        found = read_url(url)
        require_extra("database", "postgresql", "psycopg")
        with contextlib.ExitStack() as undo:
            try:
                database = cls(found, party)
                undo.callback(database.close)
                database._prepare(authority, sealed)
                fence = database._wait_for_lease(wait, lease_seconds)
                database._check_sealed(sealed)
            except DBAPIError as error:
                raise _refused(found, "open", error) from None  # the cause may quote the URL
            name = database.name
            database.lease = Lease(database.engine, name, party, fence, lease_seconds)
            undo.pop_all()
        return database

    def _prepare(self, authority: str, sealed: str | None) -> None:
        meta = _TABLES.meta
        with self.connection.begin():
            self.connection.execute(select(func.pg_advisory_xact_lock(_PREPARING)))
            if not inspect(self.connection).has_schema(_SCHEMA_NAME):
                self.connection.execute(CreateSchema(_SCHEMA_NAME))
            there = set(inspect(self.connection).get_table_names(schema=_SCHEMA_NAME))
            if not there:
                _TABLES.all.create_all(self.connection)
                LEASES.create(self.connection)
            elif "meta" not in there:
                raise StoreProblem(
                    f"{self.name}: found a schema {_SCHEMA_NAME!r} of another program, expected a journal",
                    remedy="name another database",
                )
            ours = {("", "version"): str(SCHEMA), (self._party, "authority"): authority}
            rows = [{"party": p, "name": n, "value": v} for (p, n), v in ours.items()]
            if there:
                rows = rows[1:]  # the version is that of whoever made the tables
            query = select(meta).where(meta.c.party.in_(["", self._party]))
            known = {(r.party, r.name): r.value for r in self.connection.execute(query)}
            found = {name: value for (_, name), value in known.items()}
            if there:
                check_meta(self.name, {"version": "", **found}, {})
            self.connection.execute(insert(meta).values(rows).on_conflict_do_nothing())
            check_meta(self.name, {"version": str(SCHEMA), "authority": authority, **found},
                       {"authority": authority})  # fmt: skip
            if sealed and "authority" not in found:
                row = {"party": self._party, "name": "sealed", "value": sealed}
                self.connection.execute(insert(meta).values(row))
        self._check_sealed(sealed)

    def _check_sealed(self, expected: str | None) -> None:
        with self.connection.begin():
            self.sealed = _sealed_of(self.connection, self._party)
        if expected is not None:
            check_sealed(self.name, self.sealed, expected)

    def _wait_for_lease(self, wait: Callable[[str], None] | None, seconds: float) -> int:
        told, trouble = False, ""
        while True:
            try:
                fence = take(self.connection, self._party, seconds)
                if fence is not None:
                    return fence
                holder, trouble = holder_of(self.connection, self._party), ""
            except OperationalError as error:
                if not told:
                    raise
                # A server that restarts is asked again, for as long as it takes: a standby that ended here would
                # be missing when the coordinator loses its lease over the same restart.
                now = str(_refused(self._url, "standby", error))
                if now != trouble:
                    LOG.warning("%s; it is asked again", now)
                holder, trouble = "", now
            if wait is None:
                raise StoreProblem(
                    f"{self.name}: found {holder} with the lease of {self._party!r}, expected no other process",
                    remedy="stop that one, or give this federation a name of its own",
                )
            if not told:
                wait(f"standby of {self._party}: {holder} has the lease; waiting to take over")
                told = True
            time.sleep(min(POLL_SECONDS, seconds / 4))

    def on_loss(self, tell: Callable[[LeaseLost], None]) -> None:
        """Call this once when the lease is lost."""
        assert self.lease is not None
        self.lease.on_loss(tell)

    def close(self) -> None:
        """Close the connection and release the lease. Idempotent."""
        if not self.closed:
            self.closed = True
            if self.lease is not None:
                self.lease.release()
            self.connection.close()
            self.engine.dispose()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction that begins with the check of the lease. Raises LeaseLost."""
        assert self.lease is not None
        with self.connection.begin():
            self.lease.check(self.connection)
            yield

    erasing = writing

    def numbers(self, count: int) -> list[int]:
        """The ids of the next records: those of later calls, of this process or another one, are larger."""
        if len(self._numbers) < count:
            drawn = {"count": max(count, NUMBERS_AT_ONCE)}
            self._numbers = list(self.connection.execute(_NEXT, drawn).scalars())
        taken, self._numbers = self._numbers[:count], self._numbers[count:]
        return taken

    def rewrite(self) -> None:
        """Write the tables anew, without removed and replaced rows: in clear, these are then only in the server's
        write-ahead log and in backups. Other parties wait meanwhile. Raises StoreProblem."""
        try:
            engine = self.engine.execution_options(isolation_level="AUTOCOMMIT")
            with engine.connect() as connection:
                for table in (_TABLES.records, _TABLES.values):
                    connection.execute(text(f"VACUUM (FULL) {table.fullname}"))
        except DBAPIError as error:
            raise self.refused("rewrite", error) from None

    def reading(self) -> RootTransaction:
        """A transaction; without one the connection would stay in an older one."""
        return self.connection.begin()

    def run(self, statement: Compiled, *rows: Mapping[str, Any]) -> CursorResult[Any]:
        """Execute a statement for every row."""
        given = [statement.given(row) for row in rows]
        return self.connection.exec_driver_sql(
            statement.text, given[0] if len(given) == 1 else given
        )

    def fault(self) -> str:
        """Always "": the server checks its own files (amcheck, data checksums)."""
        return ""

    def refused(self, doing: str, error: Exception) -> StoreProblem:
        """An error of the server or of the connection in one line, without statement, values or password."""
        assert isinstance(error, DBAPIError)
        return _refused(self._url, doing, error)


def _sealed_of(connection: Connection, party: str) -> str:
    meta = _TABLES.meta
    query = select(meta.c.value).where(meta.c.party == party, meta.c.name == "sealed")
    return connection.execute(query).scalar_one_or_none() or ""


def sealed_at(url: str, party: str) -> str | None:
    """The name of the key that the contents of this party's journal are encrypted with, "" for none; None where it has
    no journal there yet. Changes nothing, also while a coordinator serves. Raises BadInput, StoreProblem."""
    found, meta = read_url(url), _TABLES.meta
    require_extra("database", "postgresql", "psycopg")
    try:
        with _engine(found).connect() as connection:
            if "meta" not in inspect(connection).get_table_names(schema=_SCHEMA_NAME):
                return None
            named = select(func.count()).select_from(meta).where(meta.c.party == party)
            return _sealed_of(connection, party) if connection.execute(named).scalar_one() else None
    except DBAPIError as error:
        raise _refused(found, "read", error) from None


def read_url(text_: str) -> URL:
    """A URL of a PostgreSQL database. Raises BadInput, without any of the text, which may hold a password."""
    wrong, hint = "database: found {}, expected " + EXPECTED, "such as " + _EXAMPLE
    try:
        url = make_url(text_.strip())
    except (ArgumentError, ValueError):
        raise BadInput(wrong.format("a URL that cannot be read"), remedy=hint) from None
    if url.get_backend_name() not in {"postgresql", "postgres"}:
        raise BadInput(
            wrong.format("a URL of another database than PostgreSQL"),
            remedy="leave `database` out for an SQLite file in the coordinator's folder",
        )
    if url.drivername not in {"postgresql", "postgres", "postgresql+psycopg"}:
        raise BadInput(
            wrong.format("a driver that is not known"), remedy="only psycopg is supported"
        )
    if text_.count("@") > 1:
        raise BadInput(
            wrong.format("more than one '@'"),
            remedy="write @ : / ? # % of a password as %40 %3A %2F %3F %23 %25, or keep it in $PGPASSFILE",
        )
    if not url.database:
        raise BadInput(wrong.format("a URL without the database's name"), remedy=hint)
    if any("password" in key.lower() for key in url.query):
        raise BadInput(
            wrong.format("a password after '?'"), remedy="postgresql://USER:PASSWORD@HOST/DATABASE"
        )
    return url.set(drivername="postgresql+psycopg")


def shown(url: URL) -> str:
    """The URL as messages have it: without password and options."""
    return URL.create(
        "postgresql", url.username, None, url.host, url.port, url.database
    ).render_as_string()


def _engine(url: URL) -> Engine:
    options = " ".join(f"-c {name}={value}" for name, value in _SETTINGS.items())
    given = url.query.get("options", "")
    if given:
        options = f"{given if isinstance(given, str) else ' '.join(given)} {options}"
    mine = {name: value for name, value in _OPTIONS.items() if name not in url.query}
    return create_engine(
        url.difference_update_query(["options"]), poolclass=NullPool, hide_parameters=True,
        connect_args={**mine, "options": options},
    )  # fmt: skip


def _refused(url: URL, doing: str, error: DBAPIError) -> StoreProblem:
    reason = " ".join(str(error.orig).split())[:400]
    if url.password:
        reason = reason.replace(str(url.password), "***")
    state = getattr(error.orig, "sqlstate", None) or ""
    what = f"{shown(url)}: {doing}: found"
    if state in {"53100", "53200", "54000"}:
        return StoreFull(f"{what} no room ({reason}), expected some", remedy=FREE_SOME)
    remedy = next((hint for word, hint in _HINTS if word in reason), "")
    return StoreProblem(f"{what} it refused ({reason})", remedy=remedy)
