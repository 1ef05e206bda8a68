"""A journal's database as an SQLite file: one party's, opened by one process at a time.

Records of a site hold the round's secrets. A DELETE of rows does not erase them, and SQLite's secure_delete is not
enough: it clears freed cells and freed pages, but not copies from earlier moves of rows between pages. In five of
six random histories a removed secret was still in the file. So the tables are emptied as a whole, which frees, and so
clears, every page that they ever moved a row to, and what remains is written again, in the same commit. Then the
write-ahead log, which holds everything twice, is truncated. `VACUUM` does the same for twice the CPU time; it is used
when a journal is opened, and for free pages. An erasure costs 0.5 ms and two fsyncs, and 5 ms for every MB that
remains: keep a large state in the spool, and its digest here. A program cannot erase what a file system or an SSD
keeps of overwritten blocks: put the folder of a site on an encrypted disk.

SQLAlchemy makes tables and reads lists; the statements of every round go to Python's driver directly.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import URL, create_engine, insert, inspect, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from fedcore.errors import LeaseLost, StoreFull, StoreProblem
from fedcore.files.disk import FREE_SOME, make_folder, refusals, sync_folder
from fedcore.files.lock import FileLock
from fedcore.store.database import SCHEMA, Compiled, check_meta, check_sealed, tables


class JournalInUse(StoreProblem):
    """Another process has the journal open."""


class SqliteFile:
    """Everything specific to SQLite: the file and its lock, durability, erasing, integrity check."""

    faults: tuple[type[Exception], ...] = (DBAPIError, sqlite3.Error)

    def __init__(self, path: Path, lock: FileLock) -> None:
        self._path, self._lock = path, lock
        self.sealed = ""
        """Name of the key that its contents are encrypted with; "" for none."""
        self.name, self.tables = f"journal {path}", tables(by_party=False)
        engine = create_engine(
            URL.create("sqlite", database=str(path)), poolclass=NullPool, hide_parameters=True,
            connect_args={"check_same_thread": False},
        )  # fmt: skip
        self.connection = engine.connect()
        driver: Any = self.connection.connection.dbapi_connection
        self._driver: sqlite3.Connection = driver

    @classmethod
    def open(cls, path: Path, party: str, sealed: str | None = "") -> SqliteFile:
        """Open or create it, and erase what a crash left of removed data. sealed: the name of the key that its contents
        are encrypted with, "" for none, None for any. Raises StoreProblem: see `Journal.open`."""
        with contextlib.ExitStack() as undo:
            with refusals("journal", path):
                make_folder(path.parent)
                lock = _lock(path)
                undo.callback(lock.release)
                # SQLite creates its log with the mode of the database: both are for this user only.
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
                sync_folder(path.parent)
            try:
                found = cls(path, lock)
                undo.callback(found.connection.close)
                found._prepare(party, sealed)
            except cls.faults as error:
                raise _refused("open", path, error) from error
            undo.pop_all()
        return found

    def _prepare(self, party: str, sealed: str | None) -> None:
        every, meta = self.tables.all, self.tables.meta
        self.tune()
        with self.connection.begin():
            found = set(inspect(self.connection).get_table_names())
        if found - set(every.tables):
            raise StoreProblem(
                f"{self.name}: found another program's tables, expected a journal",
                remedy="name another file",
            )
        known = {}
        if meta.name in found:
            with self.connection.begin():
                known = {row.name: row.value for row in self.connection.execute(select(meta))}
        if known:
            check_meta(self.name, known, {"party": party})
            self.sealed = known.get("sealed", "")
            if sealed is not None:
                check_sealed(self.name, self.sealed, sealed)
        else:
            self.sealed = sealed or ""
            about = {"version": str(SCHEMA), "party": party}
            about |= {"sealed": self.sealed} if self.sealed else {}
            rows = [{"name": name, "value": value} for name, value in about.items()]
            with self.connection.begin():
                every.create_all(self.connection, checkfirst=bool(found))
                self.connection.execute(insert(meta), rows)
        self._run("VACUUM")
        self.scrub()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._lock.released

    def close(self) -> None:
        """Close the file and release its lock. Idempotent."""
        if not self._lock.released:
            self.connection.close()
            self._lock.release()

    def on_loss(self, tell: Callable[[LeaseLost], None]) -> None:
        """Never called: the system takes the lock of a process only when that ends."""

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction; durable at its end."""
        try:
            yield
            self._driver.commit()
        except BaseException:
            self._driver.rollback()
            raise

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """One statement alone needs no transaction."""
        return contextlib.nullcontext()

    def run(self, statement: Compiled, *rows: Mapping[str, Any]) -> sqlite3.Cursor:
        """Execute a statement for every row; the first one that writes begins a transaction."""
        if len(rows) == 1:
            return self._driver.execute(statement.text, statement.given(rows[0]))
        return self._driver.executemany(statement.text, map(statement.given, rows))

    @contextlib.contextmanager
    def erasing(self) -> Iterator[None]:
        """A transaction whose removed data are erased from the files afterwards."""
        with self.synced_at_the_end():
            with self.writing():
                yield
                self._rewrite()
            self.scrub()

    def numbers(self, count: int) -> list[int]:
        """The ids of the next records."""
        last = self._driver.execute("SELECT max(id) FROM records").fetchone()[0] or 0
        return list(range(last + 1, last + 1 + count))

    def _rewrite(self) -> None:
        """Empty the tables with content, and write again what was in them."""
        for table in (self.tables.records, self.tables.values):
            rows = self._driver.execute(f"SELECT * FROM {table.name}").fetchall()  # noqa: S608 - a name of this program
            # Without a condition: SQLite then frees the pages of the table and of its overflows, and clears them.
            self._driver.execute(f"DELETE FROM {table.name}")  # noqa: S608
            places = ", ".join("?" * len(table.columns))
            self._driver.executemany(f"INSERT INTO {table.name} VALUES ({places})", rows)  # noqa: S608

    def refused(self, doing: str, error: Exception) -> StoreProblem:
        """An error of SQLite in one line."""
        return _refused(doing, self._path, error)

    def tune(self) -> None:
        """One fsync of the log per commit; temporary tables stay in memory. Exclusive locking, because a
        reader in another process would prevent truncating the log."""
        self._run(
            "PRAGMA locking_mode=EXCLUSIVE",
            "PRAGMA journal_mode=WAL",
            "PRAGMA synchronous=FULL",
            "PRAGMA fullfsync=ON",  # macOS: fsync alone does not flush the drive's cache
            "PRAGMA temp_store=MEMORY",
            "PRAGMA secure_delete=ON",  # zeros in every page and cell that is freed
        )

    def scrub(self) -> None:
        """Copy the log into the file and truncate it: it has older forms of the pages."""
        self._run("PRAGMA wal_checkpoint(TRUNCATE)")

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
            row = self._driver.execute(statement).fetchone()
            found = None if row is None else row[0]
        return found


def _lock(path: Path) -> FileLock:
    """The journal's lock. Raises StoreProblem with the id of the process that has it."""

    def refusal(holder: str) -> StoreProblem:
        return JournalInUse(
            f"journal {path}: found process {holder} using it, expected no other process",
            remedy="one process to a party: stop that one, or give this one a folder of its own",
        )

    return FileLock(path.with_name(path.name + ".lock"), refusal)


def _refused(doing: str, path: Path, error: Exception) -> StoreProblem:
    cause = error.orig if isinstance(error, DBAPIError) else error
    reason = str(cause)  # that of a DBAPIError would contain the statement
    name = getattr(cause, "sqlite_errorname", "")
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
