"""The coordinator's private files, encrypted at rest as [keystore] of federation.toml says: its key, its journal, and
the models that jobs gave it; and an operator's key, as [keystore] of operator.toml says.

A journal on a database server is not among them: what is encrypted there is the server's matter.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from fedcore_server.config import JOURNAL_FILE, FederationConfig, OperatorConfig
from fedcore_server.sealed_models import JOBS_FOLDER, all_models, seal_models

from fedcore.files.disk import OTHERS
from fedcore.identity.encrypted_files import (
    CLEAR,
    ENCRYPTED,
    IN_USE,
    MISSING,
    PrivateFile,
    encrypt_keys,
    key_files,
    required,
)
from fedcore.identity.kit import KEY_FILE
from fedcore.store.sealed_files import FileSealer, is_sealed_file
from fedcore.store.sealing import RowSealer, encrypt_journal, is_sealed
from fedcore.store.sqlite import JournalInUse
from fedcore.types import Json


def own_key(place: FederationConfig | OperatorConfig) -> list[PrivateFile]:
    """The key of coordinator or operator, as it is. Raises BadInput."""
    return key_files({KEY_FILE: place.kit / KEY_FILE})


def _journal(config: FederationConfig) -> list[PrivateFile]:
    """The journal in the coordinator's folder, as it is. Raises StoreProblem, also where a process has it open."""
    path = config.folder / JOURNAL_FILE
    if config.database is not None or not path.exists():
        return []
    state = ENCRYPTED if is_sealed(path, config.party) else CLEAR
    return [PrivateFile(JOURNAL_FILE, path, state)]


def _models(config: FederationConfig) -> PrivateFile:
    """The models of all jobs, as they are: CLEAR where one of them is."""
    sealed = {is_sealed_file(path) for path in all_models(config.folder)}
    state = MISSING if not sealed else ENCRYPTED if all(sealed) else CLEAR
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
    journal, models = _journal(config), _models(config)
    store, made, done = encrypt_keys(section, config.party, own_key(config), [*journal, models])
    for each in journal:
        if encrypt_journal(each.path, config.party, RowSealer(store.journal_key())):
            done.append(str(each.path))
    done += map(str, seal_models(config.folder, FileSealer(store.files_key())))
    return {"keystore": str(section.file), "made": made, "encrypted": done}


def encrypt_operator(place: OperatorConfig, file: Path) -> Json:
    """Encrypt an operator's key; what was done. file: operator.toml. Raises BadInput, CertificateRefused."""
    section = required(place.keystore, file)
    os.umask(OTHERS)
    _, made, done = encrypt_keys(section, place.party, own_key(place))
    return {"keystore": str(section.file), "made": made, "encrypted": done}
