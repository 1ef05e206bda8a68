"""The journal of one party: typed records, on disk before anything that relies on them (PROTOCOL D).

A record belongs to a job and a stream ("round", "epoch"); a stream is read back in the order in which
it was written. Small values (a state, a payload) have a key each and may be put in the same commit.
Invariants: `append` returns when the records would survive a power cut, and keeps all of them or none.
What `compact`, `drop` and `forget` removed is in no file of the folder when they return; what `trim`
removed may be, in free pages, until one of these or the next `open`. One process at a time holds a
journal.

Records of a site hold the round's secrets, so removing them must be more than a DELETE, and more than
SQLite's secure_delete: that clears freed cells, but not what earlier moves of rows between pages copied.
In five of six random histories a removed secret was still in the file. So what stays is written anew
(VACUUM), and the write-ahead log, which holds everything twice, is cut to nothing. That costs 1 ms and
two syncs, and 5 ms more for every MB that stays: a large state belongs in the spool, and its digest here.
A coordinator has no secret of a round, and `trim` spares it both. What a file system or an SSD keeps of
overwritten blocks is beyond a program: round secrets want an encrypted disk.

SQLAlchemy Core, so that PostgreSQL can follow: all that is SQLite's own stands in `_Sqlite`. One connection
is kept, and what every round says is compiled once: SQLAlchemy's own way there took longer than the commit.
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
    Executable,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    bindparam,
    create_engine,
    delete,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import NullPool

from fedcore.errors import MalformedMessage, StoreFull, StoreProblem
from fedcore.secagg.protocol.wire_form import decode, encode, type_name
from fedcore.store.disk import FREE_SOME, make_folder, refusals, sync_folder

SCHEMA = 2
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
class JournalEntry:
    """Some records of one stream, and values put with them."""

    job: str
    stream: str
    records: Sequence[Any] = ()
    put: Mapping[str, bytes] = field(default_factory=dict, repr=False)


class Journal:
    """A party's records on disk. Thread-safe: calls wait for each other."""

    def __init__(self, engine: Engine, path: Path, lock: int) -> None:
        self._engine, self._path, self._lock = engine, path, lock
        self._connection = engine.connect()
        self._sqlite = _Sqlite(self._connection)
        self._add, self._clear, self._change, self._new, self._get, self._remove = (
            _Compiled(each, engine) for each in (_ADD, _CLEAR, _CHANGE, _NEW, _GET, _REMOVE)
        )
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
                URL.create("sqlite", database=str(path)), poolclass=NullPool, hide_parameters=True,
                connect_args={"check_same_thread": False},
            )  # fmt: skip
            try:
                journal = cls(engine, path, lock)
            except DBAPIError as error:
                raise _refused("open", path, error) from error
            try:
                with journal._told("open"):
                    journal._prepare(party)
            except BaseException:
                journal._connection.close()
                raise
        except BaseException:
            os.close(lock)
            raise
        return journal

    def _prepare(self, party: str) -> None:
        self._sqlite.tune()
        with self._connection.begin():
            found = set(inspect(self._connection).get_table_names())
        if found - set(_TABLES.tables):
            raise StoreProblem(
                f"journal {self._path}: found another program's tables, expected a journal",
                remedy="name another file",
            )
        meta = {}
        if _META.name in found:
            with self._connection.begin():
                meta = {row.name: row.value for row in self._connection.execute(select(_META))}
        if meta:
            _check_meta(meta, party, self._path)
        else:
            rows = [{"name": "version", "value": str(SCHEMA)}, {"name": "party", "value": party}]
            with self._connection.begin():
                _TABLES.create_all(self._connection)
                self._connection.execute(insert(_META), rows)
        self._sqlite.scrub()

    def close(self) -> None:
        """Give the journal back; a second call does nothing."""
        with self._busy:
            if self._lock >= 0:
                self._connection.close()
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
        self.write([JournalEntry(job, stream, records, put or {})])

    def write(self, entries: Iterable[JournalEntry]) -> None:
        """Several streams' records in one commit: what came in during one turn of an event loop."""
        with self._told("append"), self._connection.begin():
            for entry in entries:
                self._insert(entry)

    def _insert(self, entry: JournalEntry) -> None:
        now = time.time()  # for people who look into the file; nothing is decided by it
        rows = [
            {
                "job": entry.job, "stream": entry.stream, "kind": type_name(type(record)),
                "body": encode(record), "created_at": now,
            }
            for record in entry.records
        ]  # fmt: skip
        if rows:
            self._add.run(self._connection, *rows)
        for key, value in entry.put.items():
            row = {"of": entry.job, "named": key, "value": value}
            if not self._change.run(self._connection, row).rowcount:
                self._new.run(self._connection, row)

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
        with self._told("compact"), self._erasing():
            self._replace(JournalEntry(job, stream, keep, put or {}), forget)

    def trim(
        self,
        job: str,
        stream: str,
        *,
        put: Mapping[str, bytes] | None = None,
        forget: Sequence[str] = (),
    ) -> None:
        """Remove all records of a stream and the named values: one commit, for what is no secret."""
        with self._told("trim"), self._connection.begin():
            self._replace(JournalEntry(job, stream, (), put or {}), forget)

    def forget(self, job: str, *keys: str) -> None:
        """Remove values for good."""
        with self._told("forget"), self._erasing():
            self._forget(job, keys)

    def drop(self, job: str) -> None:
        """Remove everything of a job for good."""
        with self._told("drop"), self._erasing():
            for table in (_RECORDS, _VALUES):
                self._connection.execute(delete(table).where(table.c.job == job))

    def _replace(self, entry: JournalEntry, forget: Sequence[str]) -> None:
        self._clear.run(self._connection, {"of": entry.job, "named": entry.stream})
        self._insert(entry)
        self._forget(entry.job, forget)

    def _forget(self, job: str, keys: Sequence[str]) -> None:
        if keys:
            self._remove.run(self._connection, *({"of": job, "named": key} for key in keys))

    @contextlib.contextmanager
    def _erasing(self) -> Iterator[None]:
        """A transaction, and no trace of what it removes when it is over."""
        with self._sqlite.synced_at_the_end():
            with self._connection.begin():
                yield
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
            with self._told("read"), self._connection.begin():
                rows = self._connection.execute(query).all()
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
        kind = type_name(type(found))
        if kind != row.kind:
            raise StoreProblem(
                f"journal {self._path}: record {row.id}: found a {kind}, expected a {row.kind}"
            )
        return found

    def get(self, job: str, key: str) -> bytes | None:
        """The value of a key, or None."""
        with self._told("read"), self._connection.begin():
            row = {"of": job, "named": key}
            found: bytes | None = self._get.run(self._connection, row).scalar_one_or_none()
            return found

    def keys(self, job: str) -> list[str]:
        """The keys of a job that have a value, in order."""
        query = select(_VALUES.c.key).where(_VALUES.c.job == job).order_by(_VALUES.c.key)
        with self._told("read"), self._connection.begin():
            return list(self._connection.execute(query).scalars())

    def streams(self) -> list[tuple[str, str]]:
        """Every (job, stream) with records, by its first record: what a restart finds."""
        query = select(_RECORDS.c.job, _RECORDS.c.stream).order_by(_RECORDS.c.id)
        with self._told("read"), self._connection.begin():
            rows = self._connection.execute(query)
            return list(dict.fromkeys((row.job, row.stream) for row in rows))

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


class _Compiled:
    """A statement in the database's own words, made once."""

    def __init__(self, statement: Executable, engine: Engine) -> None:
        compiled: Any = statement.compile(engine)  # type: ignore[attr-defined]
        self._text, self._names = str(compiled), compiled.positiontup

    def run(self, connection: Connection, *rows: Mapping[str, Any]) -> Any:
        """Execute it for every row."""
        names = self._names
        given = [tuple(row[n] for n in names) if names else dict(row) for row in rows]
        return connection.exec_driver_sql(self._text, given[0] if len(given) == 1 else given)


_ADD = insert(_RECORDS).values(
    {name: bindparam(name) for name in ("job", "stream", "kind", "body", "created_at")}
)
_PLACE = (_VALUES.c.job == bindparam("of"), _VALUES.c.key == bindparam("named"))
_CHANGE = update(_VALUES).where(*_PLACE).values(body=bindparam("value"))
_NEW = insert(_VALUES).values(job=bindparam("of"), key=bindparam("named"), body=bindparam("value"))
_REMOVE = delete(_VALUES).where(*_PLACE)
_CLEAR = delete(_RECORDS).where(
    _RECORDS.c.job == bindparam("of"), _RECORDS.c.stream == bindparam("named")
)
_GET = select(_VALUES.c.body).where(*_PLACE)


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

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

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

    @contextlib.contextmanager
    def synced_at_the_end(self) -> Iterator[None]:
        """For commits that a scrub follows: it syncs the log before it copies it into the file, and the
        file before it cuts the log, so the syncs of the commits between would add nothing."""
        self._run("PRAGMA synchronous=NORMAL")
        try:
            yield
        finally:
            self._run("PRAGMA synchronous=FULL")

    def fault(self) -> str:
        """What is wrong with the file, or nothing."""
        found = self._run("PRAGMA integrity_check(1)")
        return "" if found == "ok" else str(found)

    def _run(self, *statements: str) -> Any:
        """One after the other, outside any transaction; the first value the last of them gives."""
        found = None
        for statement in statements:
            # Python's driver begins no transaction for these words, whatever SQLAlchemy calls it.
            with self._connection.begin():
                result = self._connection.exec_driver_sql(statement)
                found = result.scalar() if result.returns_rows else None
        return found
