"""What a journal needs of a database: its tables, its statements, and what differs from one kind to the other.

Two kinds exist: an SQLite file of one party (`sqlite.py`), and a PostgreSQL database in which several parties
keep theirs (`postgresql.py`): there each row has the name of its party.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from sqlalchemy import (
    URL,
    BigInteger,
    Column,
    Connection,
    Executable,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    bindparam,
    delete,
    insert,
    select,
)
from sqlalchemy.engine import Dialect

from fedcore.errors import LeaseLost, StoreProblem

SCHEMA = 2
"""Increase it with every change of a table or of the byte form, and document here how the old one is read."""


class Database(Protocol):
    """An open database of one kind, with one connection. Its methods are called by one thread at a time."""

    connection: Connection
    name: str
    """How messages call it; without a password."""
    tables: Tables
    sealed: str
    """Name of the key that the contents of its rows are encrypted with; "" for none."""
    faults: tuple[type[Exception], ...]
    """What its calls raise where the database refuses."""

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""

    def close(self) -> None:
        """Close the connection and let another process open the journal. Idempotent."""

    def on_loss(self, tell: Callable[[LeaseLost], None]) -> None:
        """Call this once, from any thread, when another process may write this journal in place of this one."""

    def writing(self) -> AbstractContextManager[object]:
        """A transaction that is durable at its end, and refused where this process may not write any more."""

    def reading(self) -> AbstractContextManager[object]:
        """For a statement that only reads."""

    def run(self, statement: Compiled, *rows: Mapping[str, Any]) -> Any:
        """Execute a statement for every row, inside `writing`, `erasing` or `reading`. Returns the cursor."""

    def erasing(self) -> AbstractContextManager[object]:
        """As `writing`; afterwards removed data are gone as far as this kind of database can do that."""

    def numbers(self, count: int) -> list[int]:
        """The ids of the next records of this party, ascending, each given once. Inside a transaction."""

    def fault(self) -> str:
        """What an integrity check found, or ""."""

    def refused(self, doing: str, error: Exception) -> StoreProblem:
        """One of `faults` in one line, without the statement or its values."""


@dataclass(frozen=True)
class Tables:
    """The tables of a journal. by_party: they hold the rows of several parties, each with its party's name."""

    all: MetaData
    records: Table
    values: Table
    meta: Table
    by_party: bool

    def of(self, table: Table, party: str) -> tuple[Any, ...]:
        """The condition that a row is of this party; none in a database of one party."""
        return (table.c.party == party,) if self.by_party else ()


@cache
def tables(*, by_party: bool, schema: str | None = None) -> Tables:
    """The tables, described once in a process. schema: of PostgreSQL, where they are."""

    def party() -> list[Column[str]]:
        return [Column("party", String(300), primary_key=True)] if by_party else []

    every = MetaData(schema=schema)
    name = "party" if by_party else ""
    records = Table(
        "records", every,
        Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
        *([Column(name, String(300), nullable=False)] if name else []),
        Column("job", String(64), nullable=False),
        Column("stream", String(64), nullable=False),
        Column("kind", String(64), nullable=False),
        Column("body", LargeBinary, nullable=False),
        Column("created_at", Float, nullable=False),
    )  # fmt: skip
    order = [records.c[each] for each in (name, "job", "stream", "id") if each]
    Index("records_in_order", *order)
    values = Table(
        "kept_values", every, *party(),
        Column("job", String(64), primary_key=True),
        Column("key", String(64), primary_key=True),
        Column("body", LargeBinary, nullable=False),
    )  # fmt: skip
    meta = Table(
        "meta", every, *party(),
        Column("name", String(64), primary_key=True),
        Column("value", String(256), nullable=False),
    )  # fmt: skip
    return Tables(every, records, values, meta, by_party)


class Compiled:
    """A statement in the words of one database: compiling it took longer than the commit."""

    def __init__(self, statement: Executable, dialect: Dialect, ends: str = "") -> None:
        """ends: words behind it."""
        compiled: Any = statement.compile(dialect=dialect)  # type: ignore[attr-defined]
        self.text, self._ordered = str(compiled) + ends, compiled.positiontup
        self._names = self._ordered or list(compiled.params)

    def given(self, row: Mapping[str, Any]) -> Any:
        """The parameters, from a row by name; names that the statement does not use are ignored."""
        names = self._names
        return tuple(row[n] for n in names) if self._ordered else {n: row[n] for n in names}


class Statements:
    """The frequent statements. Parameters: of: the job; named: the stream or the key; value; party where rows
    have one; for `add_numbered` the columns of a record, for `add` all but its id."""

    def __init__(self, dialect: Dialect, found: Tables) -> None:
        records, values = found.records, found.values

        def mine(table: Table, column: str) -> tuple[Any, ...]:
            here = (table.c.job == bindparam("of"), table.c[column] == bindparam("named"))
            return (table.c.party == bindparam("party"), *here) if found.by_party else here

        party: dict[str, Any] = {"party": bindparam("party")} if found.by_party else {}
        columns: dict[str, Any] = {c.name: bindparam(c.name) for c in records.c}
        place = mine(values, "key")
        new: dict[str, Any] = {
            "job": bindparam("of"),
            "key": bindparam("named"),
            "body": bindparam("value"),
        }
        self.add_numbered = Compiled(insert(records).values(columns), dialect)
        del columns["id"]
        self.add = Compiled(insert(records).values(columns), dialect)
        self.clear = Compiled(delete(records).where(*mine(records, "stream")), dialect)
        # SQLite and PostgreSQL have the same words for it, SQLAlchemy a class for each.
        key = ", ".join(column.name for column in values.primary_key)
        or_change = f" ON CONFLICT ({key}) DO UPDATE SET body = excluded.body"
        self.put = Compiled(insert(values).values(new | party), dialect, or_change)
        self.get = Compiled(select(values.c.body).where(*place), dialect)
        self.remove = Compiled(delete(values).where(*place), dialect)


@cache
def statements(driver: str, found: Tables) -> Statements:
    """The statements of every journal of this kind of database, compiled once in a process."""
    return Statements(URL.create(driver).get_dialect()(), found)


def check_meta(name: str, meta: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Raises StoreProblem unless a journal's version is ours and it is of the expected party (`party`), or of
    the expected federation (`authority`: SHA-256 of its certificate)."""
    version = meta.get("version", "")
    if version != str(SCHEMA):
        raise StoreProblem(
            f"{name}: found version {version or 'none'}, expected {SCHEMA}",
            remedy="another Fedcore wrote it: run that one, or name another file or database",
        )
    for key, value in expected.items():
        if meta.get(key) == value:
            continue
        if key == "authority":
            raise StoreProblem(
                f"{name}: found the journal of another federation of this name, whose authority is "
                f"{str(meta.get(key))[:16]}, expected {value[:16]}",
                remedy="give this federation another name or another database",
            )
        raise StoreProblem(
            f"{name}: found the journal of {meta.get(key)!r}, expected {value!r}",
            remedy="give every party a folder of its own",
        )


def check_sealed(name: str, found: str, expected: str) -> None:
    """Raise StoreProblem unless a journal's contents are encrypted with the expected key, or in clear for "".
    found, expected: names of keys."""
    if found == expected:
        return
    if not found:
        words = "it in clear, expected it encrypted"
        remedy = "`keystore encrypt` of fed-site, or of fed-coordinator, encrypts it"
    elif not expected:
        words = "it encrypted, expected it in clear"
        remedy = (
            "[keystore] in site.toml, or federation.toml, names what opens it (docs/enrolment.md)"
        )
    else:
        words = "it encrypted with another keystore's key, expected this one's"
        remedy = "restore the keystore of this party (`keystore restore`), or start it anew with an empty journal"
    raise StoreProblem(f"{name}: found {words}", remedy=remedy)
