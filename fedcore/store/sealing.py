"""The contents of a journal's rows, encrypted under a key of its party.

A row's content is 32 bytes of salt and a ChaCha20-Poly1305 box under a key of its own, HKDF(key, salt).
Invariant: a content opens only in its own place: a record in its job, stream, kind and row, a value under its job and
key. So rows cannot be swapped, reordered or renamed, neither in a copied file nor by the administrator of a database
server. In clear are the names of parties, jobs, streams, kinds and keys, times, and lengths. Not detected: rows that
are missing, and a value or a whole journal put back to an earlier time.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from sqlalchemy import insert, select, update

from fedcore.errors import StoreProblem
from fedcore.secagg.crypto.secret import Secret, SecretBytes
from fedcore.secagg.crypto.symmetric import Label, derive, framed, open_box, seal_box
from fedcore.store.database import Database, check_sealed
from fedcore.store.sqlite import SqliteFile

SALT_BYTES = 32


class RowSealer(Secret):
    """Seals and opens contents. Prints redacted. name: of the key, 16 hex digits; not secret."""

    __slots__ = ("_key", "name")

    def __init__(self, key: SecretBytes) -> None:
        """key: 32 bytes."""
        self._key = key.reveal()
        self.name = derive(self._key, Label.JOURNAL_NAME, length=8).hex()

    def record(self, content: bytes, job: str, stream: str, kind: str, row: int) -> bytes:
        """Seal a record."""
        return self._seal(content, "record", job, stream, kind, str(row))

    def value(self, content: bytes, job: str, key: str) -> bytes:
        """Seal a value."""
        return self._seal(content, "value", job, key)

    def open_record(self, sealed: bytes, job: str, stream: str, kind: str, row: int) -> bytes:
        """The inverse of `record`. Raises EnvelopeRefused in any other place."""
        return self._open(sealed, "record", job, stream, kind, str(row))

    def open_value(self, sealed: bytes, job: str, key: str) -> bytes:
        """The inverse of `value`. Raises EnvelopeRefused in any other place."""
        return self._open(sealed, "value", job, key)

    def _seal(self, content: bytes, *place: str) -> bytes:
        salt = os.urandom(SALT_BYTES)
        return salt + seal_box(self._of(salt), content, _context(place))

    def _open(self, sealed: bytes, *place: str) -> bytes:
        salt, box = sealed[:SALT_BYTES], sealed[SALT_BYTES:]
        return open_box(self._of(salt), box, _context(place), sender="journal")

    def _of(self, salt: bytes) -> bytes:
        return derive(self._key, Label.JOURNAL_ROW, salt=salt)


def _context(place: tuple[str, ...]) -> bytes:
    return framed(*(part.encode() for part in place))


def unsealed(name: str, row: str) -> StoreProblem:
    """For a row of the journal of this name whose content does not open in its place."""
    return StoreProblem(
        f"{name}: {row}: found a content that was not encrypted for this place, expected its own",
        remedy="the journal was damaged or changed by another program: start this party anew with an empty folder; "
        "it then takes no part in running rounds",
    )


def is_sealed(path: Path, party: str) -> bool:
    """Whether the contents of a journal are encrypted. Raises StoreProblem."""
    with contextlib.closing(SqliteFile.open(path, party, sealed=None)) as file:
        return bool(file.sealed)


def encrypt_journal(path: Path, party: str, sealer: RowSealer) -> bool:
    """Encrypt a journal that is in clear, all of it or nothing, and erase what was in clear from its files; False
    where that was done before. Raises StoreProblem."""
    with contextlib.closing(SqliteFile.open(path, party, sealed=None)) as file:
        return encrypt_rows(file, party, sealer)


def encrypt_rows(database: Database, party: str, sealer: RowSealer) -> bool:
    """Encrypt the contents of this party's rows, all of them in one transaction, where they are in clear; False where
    that was done before. Raises StoreProblem."""
    if database.sealed:
        check_sealed(database.name, database.sealed, sealer.name)
        return False
    try:
        with database.erasing():
            _encrypt_rows(database, party, sealer)
    except database.faults as error:
        raise database.refused("encrypt", error) from None  # its cause would quote contents
    database.sealed = sealer.name
    return True


def _encrypt_rows(database: Database, party: str, sealer: RowSealer) -> None:
    found, run = database.tables, database.connection.execute
    records, values = found.records, found.values
    name = {"party": party} if found.by_party else {}
    for row in run(select(records.c.id).where(*found.of(records, party))).scalars().all():
        each = run(select(records).where(records.c.id == row)).one()
        sealed = sealer.record(each.body, each.job, each.stream, each.kind, row)
        run(update(records).where(records.c.id == row).values(body=sealed))
    for job, key in run(select(values.c.job, values.c.key).where(*found.of(values, party))).all():
        place = (*found.of(values, party), values.c.job == job, values.c.key == key)
        content = run(select(values.c.body).where(*place)).scalar_one()
        run(update(values).where(*place).values(body=sealer.value(content, job, key)))
    run(insert(found.meta), [{**name, "name": "sealed", "value": sealer.name}])
