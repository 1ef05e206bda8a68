"""The folder of a federation's authority, whose key is encrypted with a keystore of its own.

    keystore.json  opens with the passphrase (`keystore.py`: scrypt, then ChaCha20-Poly1305)
    key.pem        PKCS8 under a password of 256 bits from the keystore
    authority.pem  the certificate, which is public

Where the key is in a token (`tokens.py`), only the certificate is here.
In an earlier form there was no keystore: `key.pem` was encrypted with the passphrase itself, by PBKDF2 of 2048
iterations, 1 ms a guess. Invariant: such a key is opened, and encrypted anew under a keystore before it is used; where
the folder cannot be written, that is logged. Killed at any moment, the next opening completes it: the keystore is
there first, and the same passphrase opens both forms.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from fedcore.errors import BadInput
from fedcore.files import write_atomic
from fedcore.files.disk import make_folder, sync_folder
from fedcore.files.lock import one_at_a_time
from fedcore.identity.authority import Authority, federation_of
from fedcore.identity.encrypted_files import reencrypt
from fedcore.identity.keystore import KEYSTORE_FILE, RESTORE, Keystore, KeystoreFile
from fedcore.identity.kit import (
    AUTHORITY_FILE,
    KEY_FILE,
    is_encrypted,
    read_key,
    read_limited,
    read_private,
)
from fedcore.identity.tokens import TokenUri, open_token_key
from fedcore.secagg.crypto.secret import SecretBytes

LOG = logging.getLogger("fedcore.identity")


def authority_party(folder: Path) -> str:
    """The party that the keystore of an authority names. Raises BadInput, CertificateRefused."""
    return f"authority of {federation_of(read_limited(folder / AUTHORITY_FILE))}"


def save_authority(authority: Authority, folder: Path, passphrase: SecretBytes) -> None:
    """Write a new authority. Raises AlreadyExists, BadInput."""
    make_folder(folder)
    party = f"authority of {authority.federation}"
    store = Keystore.create(folder / KEYSTORE_FILE, party, passphrase)
    sync_folder(folder)
    authority.save(folder, store.password(KEY_FILE))


def save_token_authority(authority: Authority, folder: Path) -> None:
    """Write the certificate of a new authority whose key is in a token. Raises BadInput."""
    make_folder(folder)
    write_atomic(folder / AUTHORITY_FILE, authority.certificate_pem)


def open_token_authority(folder: Path, uri: TokenUri, pin: Callable[[], SecretBytes]) -> Authority:
    """The authority of a folder, with its key in a token. Raises BadInput, StoreProblem."""
    pem = read_limited(folder / AUTHORITY_FILE)
    return Authority.of(pem, open_token_key(uri, pin), str(uri))


def open_authority_files(
    folder: Path, passphrase: Callable[[], SecretBytes]
) -> tuple[Authority, Keystore | None]:
    """The authority in a folder, and its keystore; None for a key of an earlier version whose folder cannot be written.

    passphrase: called once. Raises BadInput for a damaged or missing file, one that others can read, or another
    passphrase.
    """
    path, kept, party = folder / KEY_FILE, folder / KEYSTORE_FILE, authority_party(folder)
    _check_key(path)
    there = KeystoreFile.read(kept) if kept.exists() else None  # its faults come before a question
    secret = passphrase()
    store = Keystore.unwrap(there, party, secret, str(kept)) if there is not None else None
    if store is None or not _opens(path, store.password(KEY_FILE)):
        if not _opens(path, secret):
            raise _closed(path, store)
        store = _converted(folder, party, secret)
    key = read_key(path, store.password(KEY_FILE) if store is not None else secret)
    return Authority.of(read_limited(folder / AUTHORITY_FILE), key, str(path)), store


def _closed(path: Path, store: Keystore | None) -> BadInput:
    if store is not None:
        return BadInput(
            f"{path}: found a key that its keystore does not open, expected one of {KEYSTORE_FILE}",
            remedy="it is damaged, or of another keystore: restore both from one backup",
        )
    return BadInput(
        f"{path}: found a key that this passphrase does not open",
        remedy=f"look at the passphrase, its spaces too; where {KEYSTORE_FILE} was beside the key: {RESTORE}",
    )


def _check_key(path: Path) -> None:
    """Raise BadInput for a key that is missing, in clear, or readable by others."""
    if not is_encrypted(read_private(path)):
        raise BadInput(
            f"{path}: found a key in clear, or none, expected it encrypted",
            remedy="the authority of `fedcore up` is for one machine: make a federation with `fed-coordinator init`",
        )


def _opens(path: Path, password: SecretBytes) -> bool:
    try:
        read_key(path, password)
    except BadInput:
        return False
    return True


def _converted(folder: Path, party: str, passphrase: SecretBytes) -> Keystore | None:
    """The keystore of a key that the passphrase itself opens, made where there is none; the key is encrypted anew. None
    where the folder cannot be written."""
    kept, path = folder / KEYSTORE_FILE, folder / KEY_FILE
    try:
        with one_at_a_time(folder / ".lock", "authority", remove=True):
            if not kept.exists():
                Keystore.create(kept, party, passphrase)
                sync_folder(folder)
            store = Keystore.load(kept, party, passphrase)
            if _opens(path, passphrase):  # not by another command meanwhile
                reencrypt(path, passphrase, store.password(KEY_FILE))
                LOG.warning(
                    "%s: encrypted anew, with %s beside it: copy both; copies of the old file open with the "
                    "passphrase, at 1 ms a guess",
                    path, kept.name,
                )  # fmt: skip
    except (OSError, BadInput) as error:
        LOG.warning(
            "%s: found a key of an earlier version, at 1 ms a guess of its passphrase, and it cannot be encrypted "
            "anew (%s): give this user the right to write to its folder once",
            path, error,
        )  # fmt: skip
        return None
    return store
