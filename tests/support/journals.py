"""Journals of both kinds for tests: an SQLite file, or a database on the test server (`postgres.py`)."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from fedcore.store.journal import Journal
from fedcore.store.sealing import encrypt_journal, encrypt_rows, is_sealed

AUTHORITY = "ab" * 32
LEASE_SECONDS = 0.4


def opened(
    where, party="va", authority=AUTHORITY, wait=lambda _: None, seconds=LEASE_SECONDS, sealer=None
):
    """The journal at a path or a URL. A lease that another process has is waited for, unless wait is None."""
    if not str(where).startswith("postgresql"):
        return Journal.open(where, party=party, sealer=sealer)
    from fedcore.store.postgresql import PostgresqlDatabase

    database = PostgresqlDatabase.open(
        str(where), party=party, authority=authority, wait=wait, lease_seconds=seconds,
        sealed=sealer.name if sealer is not None else "",
    )  # fmt: skip
    return Journal(database, party, sealer)


class SqlitePlace:
    """where: what `opened` takes."""

    def __init__(self, folder):
        self.where = str(Path(folder) / "party" / "journal.db")

    def encrypt(self, sealer):
        """Encrypt its contents; whether they were in clear."""
        return encrypt_journal(Path(self.where), "va", sealer)

    def sealed(self):
        """Whether its contents are encrypted."""
        return is_sealed(Path(self.where), "va")

    def on_disk(self):
        """What is in its files."""
        path = Path(self.where)
        return b"".join(each.read_bytes() for each in path.parent.glob(f"{path.name}*"))

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

    def encrypt(self, sealer):
        """Encrypt its contents; whether they were in clear."""
        from fedcore.store.postgresql import PostgresqlDatabase

        database = PostgresqlDatabase.open(
            self.where, party="va", authority=AUTHORITY, wait=lambda _: None, sealed=None,
            lease_seconds=LEASE_SECONDS,
        )  # fmt: skip
        with contextlib.closing(database):
            found = encrypt_rows(database, "va", sealer)
            database.rewrite()
            return found

    def sealed(self):
        """Whether its contents are encrypted."""
        from fedcore.store.postgresql import sealed_at

        return bool(sealed_at(self.where, "va"))

    def on_disk(self):
        """What is in the files of its tables; the server's log has more."""
        found = self.server.sql(
            self.name,
            "CHECKPOINT",
            "SELECT oid FROM pg_database WHERE datname = current_database()",
        )
        folder = self.server.folder / "data" / "base" / str(found[0][0])
        return b"".join(each.read_bytes() for each in folder.iterdir())

    def sql(self, *statements):
        """Run statements in it as another program would; the rows of the last."""
        return self.server.sql(self.name, "SET search_path = fedcore", *statements)
