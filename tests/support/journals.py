"""Journals of both kinds for tests: an SQLite file, or a database on the test server (`postgres.py`)."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from fedcore.store.journal import Journal

AUTHORITY = "ab" * 32
LEASE_SECONDS = 0.4


def opened(where, party="va", authority=AUTHORITY, wait=lambda _: None, seconds=LEASE_SECONDS):
    """The journal at a path or a URL. A lease that another process has is waited for, unless wait is None."""
    if not str(where).startswith("postgresql"):
        return Journal.open(where, party=party)
    from fedcore.store.postgresql import PostgresqlDatabase

    database = PostgresqlDatabase.open(
        str(where), party=party, authority=authority, wait=wait, lease_seconds=seconds
    )
    return Journal(database, party)


class SqlitePlace:
    """where: what `opened` takes."""

    def __init__(self, folder):
        self.where = str(Path(folder) / "party" / "journal.db")

    def sql(self, *statements):
        """Run statements in it as another program would."""
        with sqlite3.connect(self.where) as database:
            for each in statements:
                database.execute(each)
        database.close()


class PostgresqlPlace:
    """where: what `opened` takes."""

    def __init__(self, server):
        self.server, self.name = server, server.database()
        self.where = server.url(self.name)

    def sql(self, *statements):
        """Run statements in it as another program would; the rows of the last."""
        return self.server.sql(self.name, "SET search_path = fedcore", *statements)
