"""The journal of one party: typed records, on disk before anything that relies on them (PROTOCOL D).

A record belongs to a job and a stream ("round", "epoch"); a stream is read in the order of writing. Small
values (a state, a payload) have a key each and may be written in the same commit.
Invariants: `append` returns when the records would survive a power cut, and keeps all of them or none.
After `compact` and `forget` no file of the folder contains the removed data; after `trim` free pages
may contain it, until one of these or the next `open`. Only one process at a time can open a journal.

Records of a site hold the round's secrets. A DELETE does not erase them, and SQLite's secure_delete is not
enough: it clears freed cells, but not copies from earlier moves of rows between pages. In five of six random
histories a removed secret was still in the file. So the remaining data are rewritten (VACUUM) and the
write-ahead log, which holds everything twice, is truncated. That costs 1 ms and two fsyncs, and 5 ms for
every MB that remains: keep a large state in the spool, and its digest here. A coordinator has no round
secrets, so `trim` avoids both. A program cannot erase what a file system or an SSD keeps of overwritten
blocks: put the folder of a site on an encrypted disk.

SQLAlchemy Core, so that PostgreSQL can be added: everything specific to SQLite is in `_Sqlite`. One connection
is kept, and frequent statements are compiled once, because compiling took longer than the commit.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
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
from sqlalchemy.engine import Dialect, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import NullPool

from fedcore.errors import MalformedMessage, StoreFull, StoreProblem
from fedcore.files.lock import FileLock
from fedcore.secagg.protocol.wire_form import decode, encode, type_name
from fedcore.store.disk import FREE_SOME, make_folder, refusals, sync_folder

SCHEMA = 2
"""Increase it with every change of a table or of the byte form, and document here how the old one is read."""

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
"""Records fetched at a time, so that no cursor stays open between two `next` calls of a reader."""


class Journal:
    """A party's records on disk. Thread-safe: calls are serialised by a lock."""

    def __init__(self, engine: Engine, path: Path, lock: FileLock) -> None:
        self._path, self._lock = path, lock
        self._connection = engine.connect()
        self._sqlite = _Sqlite(self._connection)
        self._add, self._clear, self._change, self._new, self._get, self._remove = _compiled(
            engine.url.drivername
        )
        self._busy = threading.RLock()

    @classmethod
    def open(cls, where: Path | str, *, party: str) -> Journal:
        """Open or create the journal at a path, or at a URL `sqlite:///PATH`.

        Erases what a crash left of removed records. Raises StoreProblem: opened by another process, of
        another version, of another party, not a journal, not readable or writable.
        """
        path = _path_of(where)
        with contextlib.ExitStack() as undo:
            with refusals("journal", path):
                make_folder(path.parent)
                lock = _lock(path)
                undo.callback(lock.release)
                # SQLite creates its log with the mode of the database: both are for this user only.
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
            undo.callback(journal._connection.close)
            with journal._told("open"):
                journal._prepare(party)
            undo.pop_all()
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
                _TABLES.create_all(self._connection, checkfirst=bool(found))
                self._connection.execute(insert(_META), rows)
        self._sqlite.scrub()

    def close(self) -> None:
        """Close the journal and release its lock. Idempotent."""
        with self._busy:
            if not self._lock.released:
                self._connection.close()
                self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(
        self,
        job: str,
        stream: str,
        records: Sequence[Any],
        *,
        put: Mapping[str, bytes] | None = None,
    ) -> None:
        """Append records to a stream, in order, with values by key, in one commit that is durable on return.
        Raises StoreProblem or StoreFull; then nothing of it is kept."""
        with self._told("append"), self._connection.begin():
            self._insert(job, stream, records, put or {})

    def _insert(
        self, job: str, stream: str, records: Sequence[Any], put: Mapping[str, bytes]
    ) -> None:
        now = time.time()  # informative only
        rows = [
            {
                "job": job, "stream": stream, "kind": type_name(type(record)),
                "body": encode(record), "created_at": now,
            }
            for record in records
        ]  # fmt: skip
        if rows:
            self._add.run(self._connection, *rows)
        for key, value in put.items():
            row = {"of": job, "named": key, "value": value}
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
        """Replace all records of a stream by those to keep and erase the removed ones and the named values."""
        with self._told("compact"), self._erasing():
            self._replace(job, stream, keep, put, forget)

    def trim(
        self,
        job: str,
        stream: str,
        *,
        put: Mapping[str, bytes] | None = None,
        forget: Sequence[str] = (),
    ) -> None:
        """Remove all records of a stream and the named values in one commit, without erasing: not for secrets."""
        with self._told("trim"), self._connection.begin():
            self._replace(job, stream, (), put, forget)

    def forget(self, job: str, *keys: str) -> None:
        """Erase values. Keys without a value are ignored."""
        with self._told("forget"), self._erasing():
            self._forget(job, keys)

    def _replace(
        self,
        job: str,
        stream: str,
        keep: Sequence[Any],
        put: Mapping[str, bytes] | None,
        forget: Sequence[str],
    ) -> None:
        self._clear.run(self._connection, {"of": job, "named": stream})
        self._insert(job, stream, keep, put or {})
        self._forget(job, forget)

    def _forget(self, job: str, keys: Sequence[str]) -> None:
        if keys:
            self._remove.run(self._connection, *({"of": job, "named": key} for key in keys))

    @contextlib.contextmanager
    def _erasing(self) -> Iterator[None]:
        """A transaction whose removed data are erased from the files afterwards."""
        with self._sqlite.synced_at_the_end():
            with self._connection.begin():
                yield
            self._sqlite.scrub()

    def put(self, job: str, key: str, value: bytes) -> None:
        """Store a value under a key. The value that it replaces is erased only by `forget` or `compact`."""
        self.append(job, "", (), put={key: value})

    def read(self, job: str, stream: str) -> Iterator[Any]:
        """The records of a stream, oldest first. Raises StoreProblem for one that cannot be read."""
        last = -1
        while True:
            here = (_RECORDS.c.job == job, _RECORDS.c.stream == stream, _RECORDS.c.id > last)
            query = select(_RECORDS).where(*here).order_by(_RECORDS.c.id).limit(_PAGE)
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
                remedy="restore the journal, or start this party anew: it then takes no part in running rounds",
            ) from error
        kind = type_name(type(found))
        if kind != row.kind:
            raise StoreProblem(
                f"journal {self._path}: record {row.id}: found a {kind}, expected a {row.kind}"
            )
        return found

    def get(self, job: str, key: str) -> bytes | None:
        """The value of a key, or None. Raises StoreProblem, as all reads do."""
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
        """Every (job, stream) that has records, ordered by its first record."""
        query = select(_RECORDS.c.job, _RECORDS.c.stream).order_by(_RECORDS.c.id)
        with self._told("read"), self._connection.begin():
            rows = self._connection.execute(query)
            return list(dict.fromkeys((row.job, row.stream) for row in rows))

    def verify(self) -> int:
        """Check the file and decode every record; returns their number. Raises StoreProblem."""
        with self._told("verify"):
            fault = self._sqlite.fault()
        if fault:
            raise StoreProblem(
                f"journal {self._path}: found it damaged ({fault}), expected it whole"
            )
        return sum(1 for job, stream in self.streams() for _ in self.read(job, stream))

    @contextlib.contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        """Holds the lock, and raises errors of the database as StoreProblem, without any record's content."""
        with self._busy:
            if self._lock.released:
                raise StoreProblem(
                    f"journal {self._path}: {doing}: found it closed, expected it open"
                )
            try:
                yield
            except DBAPIError as error:
                raise _refused(doing, self._path, error) from error


class _Compiled:
    """A statement in the words of one database."""

    def __init__(self, statement: Executable, dialect: Dialect) -> None:
        compiled: Any = statement.compile(dialect=dialect)  # type: ignore[attr-defined]
        self._text, self._names = str(compiled), compiled.positiontup

    def run(self, connection: Connection, *rows: Mapping[str, Any]) -> Any:
        """Execute it for every row."""
        names = self._names
        given = [tuple(row[n] for n in names) if names else dict(row) for row in rows]
        return connection.exec_driver_sql(self._text, given[0] if len(given) == 1 else given)


_ADD = insert(_RECORDS).values({c.name: bindparam(c.name) for c in _RECORDS.c if c.name != "id"})
_PLACE = (_VALUES.c.job == bindparam("of"), _VALUES.c.key == bindparam("named"))
_CHANGE = update(_VALUES).where(*_PLACE).values(body=bindparam("value"))
_NEW = insert(_VALUES).values(job=bindparam("of"), key=bindparam("named"), body=bindparam("value"))
_REMOVE = delete(_VALUES).where(*_PLACE)
_CLEAR = delete(_RECORDS).where(
    _RECORDS.c.job == bindparam("of"), _RECORDS.c.stream == bindparam("named")
)
_GET = select(_VALUES.c.body).where(*_PLACE)


@cache
def _compiled(driver: str) -> tuple[_Compiled, ...]:
    """The statements of every journal of this kind of database, compiled once in a process."""
    dialect = URL.create(driver).get_dialect()()
    return tuple(_Compiled(each, dialect) for each in (_ADD, _CLEAR, _CHANGE, _NEW, _GET, _REMOVE))


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


def _lock(path: Path) -> FileLock:
    """The journal's lock. Raises StoreProblem with the id of the process that has it."""

    def refusal(holder: str) -> StoreProblem:
        return StoreProblem(
            f"journal {path}: found process {holder} using it, expected no other process",
            remedy="one process to a party: stop that one, or give this one a folder of its own",
        )

    return FileLock(path.with_name(path.name + ".lock"), refusal)


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
    reason = str(error.orig)  # str(error) would contain the statement
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
    """Everything specific to SQLite: durability, erasing, integrity check."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def tune(self) -> None:
        """One fsync of the log per commit; temporary tables stay in memory. Exclusive locking, because a
        reader in another process would prevent truncating the log."""
        self._run(
            "PRAGMA locking_mode=EXCLUSIVE",
            "PRAGMA journal_mode=WAL",
            "PRAGMA synchronous=FULL",
            "PRAGMA fullfsync=ON",  # macOS: fsync alone does not flush the drive's cache
            "PRAGMA temp_store=MEMORY",
        )

    def scrub(self) -> None:
        """Rewrite the remaining data and truncate the log: afterwards no file contains removed data."""
        self._run("VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)")

    @contextlib.contextmanager
    def synced_at_the_end(self) -> Iterator[None]:
        """For commits before a scrub. The scrub fsyncs the log before it copies it into the file, and the file
        before it truncates the log, so an fsync for each of these commits would be redundant."""
        self._run("PRAGMA synchronous=NORMAL")
        try:
            yield
        finally:
            self._run("PRAGMA synchronous=FULL")

    def fault(self) -> str:
        """What the integrity check found, or ""."""
        found = self._run("PRAGMA integrity_check(1)")
        return "" if found == "ok" else str(found)

    def _run(self, *statements: str) -> Any:
        """Execute statements in order, outside any transaction; returns the first value of the last one."""
        found = None
        for statement in statements:
            # Python's driver begins no transaction for these statements, although SQLAlchemy does.
            with self._connection.begin():
                result = self._connection.exec_driver_sql(statement)
                found = result.scalar() if result.returns_rows else None
        return found
