"""The journal of one party: typed records, on disk before anything that relies on them (PROTOCOL D).

A record belongs to a job and a stream ("round", "epoch"); a stream is read back in the order in which
it was written. Small values (a state, a payload) have a key each and may be put in the same commit.
Invariants: `append` returns when the records would survive a power cut, and keeps all of them or none.
What `compact`, `drop` and `forget` removed is in no file of the folder when they return. One process at
a time holds a journal.

Records of a site hold the round's secrets, so removing them must be more than a DELETE, and more than
SQLite's secure_delete: that clears freed cells, but not what earlier moves of rows between pages copied.
In five of six random histories a removed secret was still in the file. So what stays is written anew
(VACUUM), and the write-ahead log, which holds everything twice, is cut to nothing. That costs 2 ms, and
5 ms more for every MB that stays: a large state belongs in the spool, and its digest here. What a file
system or an SSD keeps of overwritten blocks is beyond a program: round secrets want an encrypted disk.

SQLAlchemy Core, so that PostgreSQL can follow: all that is SQLite's own stands in `_Sqlite`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from sqlalchemy import (
    URL,
    BigInteger,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    create_engine,
    delete,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import StaticPool

from fedcore.errors import MalformedMessage, StoreFull, StoreProblem
from fedcore.protocol.encoding import decode, encode
from fedcore.store.disk import FREE_SOME, make_folder, refusals, sync_folder

SCHEMA = 1
"""Raise it with every change of a table or of the byte form, and say here how the old one is read."""

_TABLES = MetaData()
_RECORDS = Table(
    "records", _TABLES,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("job", String(64), nullable=False),
    Column("stream", String(64), nullable=False),
    Column("kind", String(64), nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("created_at", Float, nullable=False),
)  # fmt: skip
Index("records_in_order", _RECORDS.c.job, _RECORDS.c.stream, _RECORDS.c.id)
_VALUES = Table(
    "kept_values", _TABLES,
    Column("job", String(64), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("body", LargeBinary, nullable=False),
)  # fmt: skip
_META = Table(
    "meta", _TABLES,
    Column("name", String(64), primary_key=True),
    Column("value", String(256), nullable=False),
)  # fmt: skip

_PAGE = 64
"""Records fetched at a time: no cursor stays open while a reader thinks."""


@dataclass(frozen=True)
class Entry:
    """Some records of one stream, and values put with them."""

    job: str
    stream: str
    records: Sequence[Any] = ()
    put: Mapping[str, bytes] = field(default_factory=dict, repr=False)


class Journal:
    """A party's records on disk. Thread-safe: calls wait for each other."""

    def __init__(self, engine: Engine, path: Path, lock: int) -> None:
        self._engine, self._path, self._lock = engine, path, lock
        self._sqlite = _Sqlite(engine)
        self._busy = threading.RLock()

    @classmethod
    def open(cls, where: Path | str, *, party: str) -> Journal:
        """Open or make the journal at a path, or at a URL `sqlite:///PATH`.

        What a crash left of removed records goes now. Raises StoreProblem: held by another process,
        of a newer version, of another party, not a journal, not readable or writable.
        """
        path = _path_of(where)
        with refusals("journal", path):
            make_folder(path.parent)
            lock = _hold(path)
        try:
            with refusals("journal", path):
                # SQLite gives its log the rights of the database: both are for this user only.
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
                sync_folder(path.parent)
            engine = create_engine(
                URL.create("sqlite", database=str(path)), poolclass=StaticPool, hide_parameters=True,
                connect_args={"check_same_thread": False},
            )  # fmt: skip
            journal = cls(engine, path, lock)
            try:
                with journal._told("open"):
                    journal._prepare(party)
            except BaseException:
                engine.dispose()
                raise
        except BaseException:
            os.close(lock)
            raise
        return journal

    def _prepare(self, party: str) -> None:
        self._sqlite.tune()
        found = set(inspect(self._engine).get_table_names())
        if found - set(_TABLES.tables):
            raise StoreProblem(
                f"journal {self._path}: found another program's tables, expected a journal",
                remedy="name another file",
            )
        meta = {}
        if _META.name in found:
            with self._engine.connect() as connection:
                meta = {row.name: row.value for row in connection.execute(select(_META))}
        if meta:
            _check_meta(meta, party, self._path)
        else:
            _TABLES.create_all(self._engine)
            rows = [{"name": "version", "value": str(SCHEMA)}, {"name": "party", "value": party}]
            with self._engine.begin() as connection:
                connection.execute(insert(_META), rows)
        self._sqlite.scrub()

    def close(self) -> None:
        """Give the journal back; a second call does nothing."""
        with self._busy:
            if self._lock >= 0:
                self._engine.dispose()
                os.close(self._lock)
                self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -------------------------------------------------------------------------------- writing

    def append(
        self,
        job: str,
        stream: str,
        records: Sequence[Any],
        *,
        put: Mapping[str, bytes] | None = None,
    ) -> None:
        """Add records to a stream, in order, with values beside them: one commit, durable on return.

        Raises StoreProblem or StoreFull, and then nothing of it is kept: the caller has not moved.
        """
        self.write([Entry(job, stream, records, put or {})])

    def write(self, entries: Iterable[Entry]) -> None:
        """Several streams' records in one commit: what came in during one turn of an event loop."""
        with self._told("append"), self._engine.begin() as connection:
            for entry in entries:
                _insert(connection, entry)

    def compact(
        self,
        job: str,
        stream: str,
        keep: Sequence[Any] = (),
        *,
        put: Mapping[str, bytes] | None = None,
        forget: Sequence[str] = (),
    ) -> None:
        """Replace all records of a stream by those to keep, and remove the named values: for good."""
        with self._told("compact"):
            with self._engine.begin() as connection:
                connection.execute(delete(_RECORDS).where(*_in(job, stream)))
                _insert(connection, Entry(job, stream, keep, put or {}))
                if forget:
                    gone = _VALUES.c.key.in_(list(forget))
                    connection.execute(delete(_VALUES).where(_VALUES.c.job == job, gone))
            self._sqlite.scrub()

    def forget(self, job: str, *keys: str) -> None:
        """Remove values for good."""
        with self._told("forget"):
            with self._engine.begin() as connection:
                gone = _VALUES.c.key.in_(keys)
                connection.execute(delete(_VALUES).where(_VALUES.c.job == job, gone))
            self._sqlite.scrub()

    def drop(self, job: str) -> None:
        """Remove everything of a job for good."""
        with self._told("drop"):
            with self._engine.begin() as connection:
                connection.execute(delete(_RECORDS).where(_RECORDS.c.job == job))
                connection.execute(delete(_VALUES).where(_VALUES.c.job == job))
            self._sqlite.scrub()

    def put(self, job: str, key: str, value: bytes) -> None:
        """Keep a value under a key; what it replaces is only gone for good after `forget` or `compact`."""
        self.append(job, "", (), put={key: value})

    # -------------------------------------------------------------------------------- reading

    def read(self, job: str, stream: str) -> Iterator[Any]:
        """The records of a stream, oldest first. Raises StoreProblem for one that cannot be read."""
        last = -1
        while True:
            query = (
                select(_RECORDS).where(*_in(job, stream), _RECORDS.c.id > last)
                .order_by(_RECORDS.c.id).limit(_PAGE)
            )  # fmt: skip
            with self._told("read"), self._engine.connect() as connection:
                rows = connection.execute(query).all()
            for row in rows:
                yield self._decoded(row)
                last = row.id
            if len(rows) < _PAGE:
                return

    def _decoded(self, row: Any) -> Any:
        try:
            found = decode(row.body, object)
        except MalformedMessage as error:
            raise StoreProblem(
                f"journal {self._path}: record {row.id} ({row.kind}): found {error.found}, "
                f"expected {error.expected}",
                remedy="restore the journal, or start this party anew: it then sits out running rounds",
            ) from error
        if type(found).__name__ != row.kind:
            raise StoreProblem(
                f"journal {self._path}: record {row.id}: found a {type(found).__name__}, "
                f"expected a {row.kind}"
            )
        return found

    def get(self, job: str, key: str) -> bytes | None:
        """The value of a key, or None."""
        query = select(_VALUES.c.body).where(_VALUES.c.job == job, _VALUES.c.key == key)
        with self._told("read"), self._engine.connect() as connection:
            found: bytes | None = connection.execute(query).scalar_one_or_none()
            return found

    def keys(self, job: str) -> list[str]:
        """The keys of a job that have a value, in order."""
        query = select(_VALUES.c.key).where(_VALUES.c.job == job).order_by(_VALUES.c.key)
        with self._told("read"), self._engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def streams(self) -> list[tuple[str, str]]:
        """Every (job, stream) with records, by its first record: what a restart finds."""
        query = select(_RECORDS.c.job, _RECORDS.c.stream).order_by(_RECORDS.c.id)
        with self._told("read"), self._engine.connect() as connection:
            return list(dict.fromkeys((row.job, row.stream) for row in connection.execute(query)))

    def verify(self) -> int:
        """Check the file and decode every record; how many there are. Raises StoreProblem."""
        with self._told("verify"):
            fault = self._sqlite.fault()
        if fault:
            raise StoreProblem(
                f"journal {self._path}: found it damaged ({fault}), expected it whole"
            )
        return sum(1 for job, stream in self.streams() for _ in self.read(job, stream))

    # -------------------------------------------------------------------------------- refusals

    @contextlib.contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        """One call at a time; what the database refuses, in one line without any record's content."""
        with self._busy:
            if self._lock < 0:
                raise StoreProblem(
                    f"journal {self._path}: {doing}: found it closed, expected it open"
                )
            try:
                yield
            except DBAPIError as error:
                raise _refused(doing, self._path, error) from error


def _in(job: str, stream: str) -> tuple[Any, ...]:
    return (_RECORDS.c.job == job, _RECORDS.c.stream == stream)


def _insert(connection: Connection, entry: Entry) -> None:
    now = time.time()  # for people who look into the file; nothing is decided by it
    rows = [
        {
            "job": entry.job, "stream": entry.stream, "kind": type(record).__name__,
            "body": encode(record), "created_at": now,
        }
        for record in entry.records
    ]  # fmt: skip
    if rows:
        connection.execute(insert(_RECORDS), rows)
    for key, value in entry.put.items():
        place = (_VALUES.c.job == entry.job, _VALUES.c.key == key)
        if not connection.execute(update(_VALUES).where(*place).values(body=value)).rowcount:
            connection.execute(insert(_VALUES).values(job=entry.job, key=key, body=value))


def _path_of(where: Path | str) -> Path:
    if isinstance(where, Path) or "://" not in where:
        return Path(where).absolute()
    try:
        url = make_url(where)
    except ArgumentError as error:
        raise StoreProblem(
            "journal: found a URL that cannot be read, expected sqlite:///PATH"
        ) from error
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        raise StoreProblem(
            f"journal: found a URL of {url.get_backend_name()}, expected sqlite:///PATH",
            remedy="this version keeps journals in SQLite files only",
        )
    return Path(url.database).absolute()


def _hold(path: Path) -> int:
    """Take the journal's lock, which the system takes back when this process ends, however it ends."""
    handle = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(handle, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise StoreProblem(
            f"journal {path}: found process {holder} using it, expected nobody",
            remedy="one process to a party: stop that one, or give this one a folder of its own",
        ) from error
    except OSError:
        os.close(handle)
        raise
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    return handle


def _check_meta(meta: Mapping[str, str], party: str, path: Path) -> None:
    version = meta.get("version", "")
    if version != str(SCHEMA):
        raise StoreProblem(
            f"journal {path}: found version {version or 'none'}, expected {SCHEMA}",
            remedy="another Fedcore wrote it: run that one, or name another file",
        )
    if meta.get("party") != party:
        raise StoreProblem(
            f"journal {path}: found the journal of {meta.get('party')!r}, expected {party!r}",
            remedy="give every party a folder of its own",
        )


def _refused(doing: str, path: Path, error: DBAPIError) -> StoreProblem:
    reason = str(error.orig)  # and not str(error), which holds the statement
    name = getattr(error.orig, "sqlite_errorname", "")
    what = f"journal {path}: {doing}"
    if name == "SQLITE_FULL":
        return StoreFull(f"{what}: found no room ({reason}), expected some", remedy=FREE_SOME)
    remedy = {
        "SQLITE_NOTADB": "the file is no journal: name another one",
        "SQLITE_CORRUPT": "the file is damaged: check the disk, then start this party anew",
    }.get(name, "")
    if name.startswith("SQLITE_IOERR"):
        remedy = "is the disk full or failing? nothing of this step was kept"
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN")):
        remedy = f"give this user the right to write to {path.parent}, or name another folder"
    return StoreProblem(f"{what}: found it refused ({reason})", remedy=remedy)


class _Sqlite:
    """Everything that is SQLite's own: how it is made durable, emptied and checked."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def tune(self) -> None:
        """A commit is one sync of the log; temporary copies stay in memory.

        Exclusive, because another process that reads would keep the log from being cut.
        """
        self._run(
            "PRAGMA locking_mode=EXCLUSIVE",
            "PRAGMA journal_mode=WAL",
            "PRAGMA synchronous=FULL",
            "PRAGMA fullfsync=ON",  # macOS: fsync alone does not reach the platter
            "PRAGMA temp_store=MEMORY",
        )

    def scrub(self) -> None:
        """Write what is left anew and cut the log: no removed byte is in any file afterwards."""
        self._run("VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)")

    def fault(self) -> str:
        """What is wrong with the file, or nothing."""
        found = self._run("PRAGMA integrity_check(1)")
        return "" if found == "ok" else str(found)

    def _run(self, *statements: str) -> Any:
        """One after the other, outside any transaction; the first value the last of them gives."""
        found = None
        with self._engine.connect() as connection:
            plain = connection.execution_options(isolation_level="AUTOCOMMIT")
            for statement in statements:
                result = plain.exec_driver_sql(statement)
                found = result.scalar() if result.returns_rows else None
        return found
