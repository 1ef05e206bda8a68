"""The journal of one party: typed records, on disk before anything that relies on them (PROTOCOL D).

A record belongs to a job and a stream ("round", "epoch"); a stream is read in the order of writing. Small
values (a state, a payload) have a key each and may be written in the same commit.
Invariants: `append` returns when the records would survive a power cut, and keeps all of them or none. Only one
process at a time can write a journal. In an SQLite file no removed data are left after `compact` and `forget`;
after `trim` free pages may contain them, until one of these or the next `open`. PostgreSQL keeps removed data for
as long as it likes, so only a coordinator, which has no round secrets, may have its journal there. In both the
contents of the rows may be encrypted (`sealing.py`).

What differs between the two is in `sqlite.py` and `postgresql.py`. One connection is kept.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Select, Table, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from fedcore.errors import EnvelopeRefused, LeaseLost, MalformedMessage, StoreProblem
from fedcore.secagg.protocol.wire_form import decode, encode, type_name
from fedcore.store.database import Database, statements
from fedcore.store.sealing import RowSealer, unsealed
from fedcore.store.sqlite import SqliteFile

_PAGE = 64
"""Records fetched at a time, so that no cursor stays open between two `next` calls of a reader."""


class Journal:
    """A party's records on disk. Thread-safe: calls are serialised by a lock."""

    def __init__(self, database: Database, party: str, sealer: RowSealer | None = None) -> None:
        self._database, self._party, self._sealer = database, party, sealer
        self._connection, self._tables = database.connection, database.tables
        driver = database.connection.engine.url.drivername
        self._statements = statements(driver, database.tables)
        self._busy = threading.RLock()
        self.elsewhere = database.tables.by_party
        """Whether it is on a server, and not in the folder of this process."""

    @classmethod
    def open(cls, where: Path | str, *, party: str, sealer: RowSealer | None = None) -> Journal:
        """Open or create the journal at a path, or at a URL `sqlite:///PATH`. sealer: what its contents are encrypted
        with; None: they are in clear.

        Erases what a crash left of removed records. Raises StoreProblem: opened by another process, of
        another version, of another party, in clear or encrypted against expectation, not a journal, not readable or
        writable.
        """
        sealed = sealer.name if sealer is not None else ""
        return cls(SqliteFile.open(_path_of(where), party, sealed), party, sealer)

    def close(self) -> None:
        """Close the journal, so that another process can open it. Idempotent."""
        with self._busy:
            self._database.close()

    def on_loss(self, tell: Callable[[LeaseLost], None]) -> None:
        """Call this once, from any thread, when another process took this journal over: then every write here
        raises LeaseLost."""
        self._database.on_loss(tell)

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
        with self._told("append"), self._database.writing():
            self._insert(job, stream, records, put or {})

    def _insert(
        self, job: str, stream: str, records: Sequence[Any], put: Mapping[str, bytes]
    ) -> None:
        now = time.time()  # informative only
        rows: list[dict[str, Any]] = [
            {
                "party": self._party, "job": job, "stream": stream, "kind": type_name(type(record)),
                "body": encode(record), "created_at": now,
            }
            for record in records
        ]  # fmt: skip
        if rows and self._sealer is not None:
            for number, each in zip(self._database.numbers(len(rows)), rows, strict=True):
                place = (job, stream, each["kind"], number)
                each |= {"id": number, "body": self._sealer.record(each["body"], *place)}
        if rows:
            add = self._statements.add if self._sealer is None else self._statements.add_numbered
            self._database.run(add, *rows)
        if put:
            seal = (lambda value, *_: value) if self._sealer is None else self._sealer.value
            kept = [self._row(job, n) | {"value": seal(value, job, n)} for n, value in put.items()]
            self._database.run(self._statements.put, *kept)

    def _row(self, job: str, named: str) -> dict[str, Any]:
        return {"party": self._party, "of": job, "named": named}

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
        with self._told("compact"), self._database.erasing():
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
        with self._told("trim"), self._database.writing():
            self._replace(job, stream, (), put, forget)

    def forget(self, job: str, *keys: str) -> None:
        """Erase values. Keys without a value are ignored."""
        with self._told("forget"), self._database.erasing():
            self._forget(job, keys)

    def _replace(
        self,
        job: str,
        stream: str,
        keep: Sequence[Any],
        put: Mapping[str, bytes] | None,
        forget: Sequence[str],
    ) -> None:
        self._database.run(self._statements.clear, self._row(job, stream))
        self._insert(job, stream, keep, put or {})
        self._forget(job, forget)

    def _forget(self, job: str, keys: Sequence[str]) -> None:
        if keys:
            rows = (self._row(job, key) for key in keys)
            self._database.run(self._statements.remove, *rows)

    def put(self, job: str, key: str, value: bytes) -> None:
        """Store a value under a key. The value that it replaces is erased only by `forget` or `compact`."""
        self.append(job, "", (), put={key: value})

    def read(self, job: str, stream: str) -> Iterator[Any]:
        """The records of a stream, oldest first. Raises StoreProblem for one that cannot be read."""
        last, records = -1, self._tables.records
        while True:
            here = (records.c.job == job, records.c.stream == stream, records.c.id > last)
            query = self._mine(records).where(*here).order_by(records.c.id).limit(_PAGE)
            with self._told("read"), self._connection.begin():
                rows = self._connection.execute(query).all()
            for row in rows:
                yield self._decoded(row)
                last = row.id
            if len(rows) < _PAGE:
                return

    def _decoded(self, row: Any) -> Any:
        body = row.body
        if self._sealer is not None:
            try:
                body = self._sealer.open_record(body, row.job, row.stream, row.kind, row.id)
            except EnvelopeRefused:
                raise unsealed(self._database.name, f"record {row.id} ({row.kind})") from None
        try:
            found = decode(body, object)
        except MalformedMessage as error:
            raise StoreProblem(
                f"{self._database.name}: record {row.id} ({row.kind}): found {error.found}, "
                f"expected {error.expected}",
                remedy="restore the journal, or start this party anew: it then takes no part in running rounds",
            ) from error
        kind = type_name(type(found))
        if kind != row.kind:
            raise StoreProblem(
                f"{self._database.name}: record {row.id}: found a {kind}, expected a {row.kind}"
            )
        return found

    def get(self, job: str, key: str) -> bytes | None:
        """The value of a key, or None. Raises StoreProblem, as all reads do."""
        with self._told("read"), self._database.reading():
            row = self._database.run(self._statements.get, self._row(job, key)).fetchone()
        found: bytes | None = None if row is None else row[0]
        if found is None or self._sealer is None:
            return found
        try:
            return self._sealer.open_value(found, job, key)
        except EnvelopeRefused:
            raise unsealed(self._database.name, f"value {key} of job {job}") from None

    def keys(self, job: str) -> list[str]:
        """The keys of a job that have a value, in order."""
        values = self._tables.values
        query = self._mine(values, "key").where(values.c.job == job)
        with self._told("read"), self._connection.begin():
            return sorted(self._connection.execute(query).scalars())

    def streams(self) -> list[tuple[str, str]]:
        """Every (job, stream) that has records, ordered by its first record."""
        records = self._tables.records
        query = self._mine(records, "job", "stream").order_by(records.c.id)
        with self._told("read"), self._connection.begin():
            rows = self._connection.execute(query)
            return list(dict.fromkeys((row.job, row.stream) for row in rows))

    def _mine(self, table: Table, *columns: str) -> Select[Any]:
        """A query of this party's rows: these columns, or all."""
        found = select(*(table.c[each] for each in columns or table.c.keys()))
        return found.where(*self._tables.of(table, self._party))

    def verify(self) -> int:
        """Check the database and decode every record; returns their number. Raises StoreProblem."""
        with self._told("verify"):
            fault = self._database.fault()
        if fault:
            raise StoreProblem(
                f"{self._database.name}: found it damaged ({fault}), expected it whole"
            )
        return sum(1 for job, stream in self.streams() for _ in self.read(job, stream))

    @contextlib.contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        """Holds the lock, and raises errors of the database as StoreProblem, without any record's content."""
        with self._busy:
            if self._database.closed:
                raise StoreProblem(
                    f"{self._database.name}: {doing}: found it closed, expected it open"
                )
            try:
                yield
            except self._database.faults as error:
                raise self._database.refused(doing, error) from error


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
