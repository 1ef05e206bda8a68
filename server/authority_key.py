"""The authority's key, opened with its passphrase for as long as a command needs it.

Invariant: a passphrase comes from a file, from the environment, from a command or from a prompt, never from an
argument: arguments can be read in the list of processes. It is in no message.
"""

from __future__ import annotations

import os
from pathlib import Path

from fedcore_server.config import FederationConfig

from fedcore.errors import BadInput
from fedcore.identity.authority import Authority
from fedcore.identity.authority_files import (
    authority_party,
    open_authority_files,
    open_token_authority,
)
from fedcore.identity.keystore import KEYSTORE_FILE, Keystore
from fedcore.identity.keystore_backup import KeptKeys
from fedcore.identity.kit import AUTHORITY_FILE, KEY_FILE, read_limited
from fedcore.identity.passphrase import KeystoreSection
from fedcore.identity.verify import fingerprint
from fedcore.secagg.crypto.secret import SecretBytes

PASSPHRASE_VARIABLE = "FEDCORE_AUTHORITY_PASSPHRASE"  # noqa: S105 - a variable's name
ASKED = "prompt"


def find_unlock(file: Path | None, unlock: str | None) -> str | None:
    """Where the passphrase is: in this file, else in the environment, else where federation.toml says; None where
    nothing names a place."""
    if file is not None:
        return f"file:{file.absolute()}"
    return f"env:{PASSPHRASE_VARIABLE}" if os.environ.get(PASSPHRASE_VARIABLE) else unlock


def read_passphrase(unlock: str, *, new: bool = False) -> SecretBytes:
    """The passphrase at this place; asked for at the terminal, twice for a new one. Raises BadInput, also for a file
    that others on this machine can read."""
    otherwise = f"--passphrase-file FILE (mode 0600), or ${PASSPHRASE_VARIABLE}"
    return KeystoreSection(unlock=unlock).read(new=new, of="the authority", otherwise=otherwise)


def authority_folder(config: FederationConfig, folder: Path | None) -> Path | None:
    """Where the authority is: the folder named, else that of federation.toml; None if its key is neither there nor in a
    token."""
    found = folder or config.enrolment.authority
    if found is None:
        return None
    there = config.enrolment.key is not None or (found / KEY_FILE).exists()
    return found if folder or there else None


def required_folder(config: FederationConfig, folder: Path | None) -> Path:
    """The same. Raises BadInput where no key is there."""
    found = authority_folder(config, folder)
    if found is None:
        raise BadInput(
            "authority: found no key on this machine, expected one to sign with",
            remedy="name its folder, also on a drive: --authority FOLDER",
        )
    return found


def find_authority(config: FederationConfig) -> Authority | None:
    """The authority, if its key and its passphrase are here, for a process that asks only where federation.toml says
    so. Raises BadInput."""
    folder, unlock = authority_folder(config, None), find_unlock(None, config.enrolment.unlock)
    if folder is None or unlock is None:
        return None
    return open_authority(config, folder, unlock)


def open_authority(config: FederationConfig, folder: Path, unlock: str) -> Authority:
    """The federation's authority, ready to sign. unlock: where its passphrase is. Raises BadInput, also for another
    federation's."""
    token = config.enrolment.token
    if token is None:
        return open_keys(config, folder, unlock)[0]
    _require_own(config, folder)
    return open_token_authority(folder, token, lambda: read_passphrase(unlock))


def open_keys(
    config: FederationConfig, folder: Path, unlock: str
) -> tuple[Authority, Keystore | None]:
    """The same for a key in files, with its keystore; None for a key of an earlier form in a folder that cannot be
    written."""
    _require_own(config, folder)
    return open_authority_files(folder, lambda: read_passphrase(unlock))


def _require_own(config: FederationConfig, folder: Path) -> None:
    """Raise BadInput for the folder of another federation's authority."""
    expected = fingerprint(read_limited(config.kit / AUTHORITY_FILE))
    found = fingerprint(read_limited(folder / AUTHORITY_FILE))
    if found != expected:
        raise BadInput(
            f"{folder}: found the authority {found[:16]}..., expected {expected[:16]}..., "
            f"that of {config.name!r}",
            remedy="name the folder of this federation's authority: --authority FOLDER",
        )


def kept_authority(config: FederationConfig, folder: Path | None, unlock: str) -> KeptKeys:
    """What a backup of the authority's keys consists of. folder, unlock: as above. Raises BadInput."""
    found = folder or config.enrolment.authority
    if (token := config.enrolment.token) is not None:
        raise BadInput(
            f"authority: found its {token}, expected it in files that a keystore opens",
            remedy="change its PIN, and back it up, by the token's own means",
        )
    if found is None:
        raise BadInput(
            "authority: found no folder of it in federation.toml, expected one",
            remedy="name its folder, also on a drive: --authority FOLDER",
        )

    def opened() -> Keystore:
        store = open_keys(config, found, unlock)[1]
        if store is None:
            raise BadInput(f"{found}: found it read-only, expected a folder that can be written")
        return store

    known = found if (found / AUTHORITY_FILE).exists() else config.kit
    return KeptKeys(
        authority_party(known), found / KEYSTORE_FILE, {KEY_FILE: found / KEY_FILE},
        {AUTHORITY_FILE: found / AUTHORITY_FILE}, opened, lambda: read_passphrase(unlock),
        "fed-coordinator keystore",
    )  # fmt: skip
