"""The coordinator's private files, encrypted at rest as [keystore] of federation.toml says: its key, its journal, and
the models that jobs gave it; and an operator's key, as [keystore] of operator.toml says.

A journal on a database server is encrypted by the same keystore: every coordinator of the federation has a copy of it.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fedcore_server.config import JOURNAL_FILE, FederationConfig, OperatorConfig
from fedcore_server.sealed_models import JOBS_FOLDER, all_models, seal_models

from fedcore.files.disk import OTHERS
from fedcore.identity.encrypted_files import (
    IN_USE,
    PrivateFile,
    encrypt_keys,
    key_files,
    required,
    state_of,
)
from fedcore.identity.kit import AUTHORITY_FILE, KEY_FILE, read_limited
from fedcore.identity.verify import fingerprint
from fedcore.store.sealed_files import FileSealer, is_sealed_file
from fedcore.store.sealing import RowSealer, encrypt_journal, encrypt_rows, is_sealed
from fedcore.store.sqlite import JournalInUse
from fedcore.types import Json

if TYPE_CHECKING:
    from fedcore.store.postgresql import PostgresqlDatabase


def own_key(place: FederationConfig | OperatorConfig) -> list[PrivateFile]:
    """The key of coordinator or operator, as it is. Raises BadInput."""
    return key_files({KEY_FILE: place.kit / KEY_FILE})


def _journal(config: FederationConfig) -> list[PrivateFile]:
    """The journal, as it is, or none. Raises BadInput, StoreProblem, also where a process has the file open."""
    if config.database is not None:
        from fedcore.store.postgresql import read_url, sealed_at, shown

        key = sealed_at(config.database, config.party)
        where = shown(read_url(config.database))
        return [] if key is None else [PrivateFile("journal", where, state_of([bool(key)]))]
    path = config.folder / JOURNAL_FILE
    if not path.exists():
        return []
    return [PrivateFile(JOURNAL_FILE, path, state_of([is_sealed(path, config.party)]))]


@contextmanager
def _database(config: FederationConfig) -> Iterator["PostgresqlDatabase | None"]:
    """The journal's database on a server while no coordinator serves; None for a file. Raises FedcoreError."""
    if config.database is None:
        yield None
        return
    from fedcore.store.postgresql import PostgresqlDatabase

    authority = fingerprint(read_limited(config.kit / AUTHORITY_FILE))
    opened = PostgresqlDatabase.open(
        config.database, party=config.party, authority=authority, sealed=None
    )
    with closing(opened):
        yield opened


def _models(config: FederationConfig) -> PrivateFile:
    """The models of all jobs, as they are."""
    state = state_of(is_sealed_file(path) for path in all_models(config.folder))
    return PrivateFile(JOBS_FOLDER, config.folder / JOBS_FOLDER, state)


def private_files(config: FederationConfig) -> Sequence[PrivateFile]:
    """All of them, as they are. Raises BadInput, StoreProblem."""
    try:
        journal = _journal(config)
    except JournalInUse:
        journal = [PrivateFile(JOURNAL_FILE, config.folder / JOURNAL_FILE, IN_USE)]
    return [*own_key(config), *journal, _models(config)]


def encrypt(config: FederationConfig, file: Path) -> Json:
    """Encrypt what is in clear, with a new keystore if there is none; what was done. file: federation.toml.

    Raises BadInput, and StoreProblem, also while the coordinator runs.
    """
    section = required(config.keystore, file)
    os.umask(OTHERS)
    with _database(config) as database:  # first: nothing is changed while a coordinator serves
        journal = [*_journal(config), _models(config)]
        store, made, done = encrypt_keys(section, config.party, own_key(config), journal)
        sealer, file = RowSealer(store.journal_key()), config.folder / JOURNAL_FILE
        if database is not None:
            done += [database.name] if encrypt_rows(database, config.party, sealer) else []
            database.rewrite()  # also where a command before was killed between the two
        elif file.exists() and encrypt_journal(file, config.party, sealer):
            done.append(str(file))
        done += map(str, seal_models(config.folder, FileSealer(store.files_key())))
    return {
        "keystore": str(section.file), "made": made, "encrypted": done,
        "on_server": database is not None,
    }  # fmt: skip


def encrypt_operator(place: OperatorConfig, file: Path) -> Json:
    """Encrypt an operator's key; what was done. file: operator.toml. Raises BadInput, CertificateRefused."""
    section = required(place.keystore, file)
    os.umask(OTHERS)
    _, made, done = encrypt_keys(section, place.party, own_key(place))
    return {"keystore": str(section.file), "made": made, "encrypted": done}
