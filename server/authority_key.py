"""The authority's key, opened with its passphrase for as long as a command needs it.

Invariant: a passphrase comes from a file, from the environment or from a prompt, never from an argument: arguments can
be read in the list of processes. It is in no message.
"""

from __future__ import annotations

import os
from pathlib import Path

from fedcore_server.config import FederationConfig

from fedcore.errors import BadInput
from fedcore.identity.authority import Authority
from fedcore.identity.kit import AUTHORITY_FILE, KEY_FILE, read_limited
from fedcore.identity.passphrase import ask_passphrase, passphrase_in
from fedcore.identity.verify import fingerprint
from fedcore.secagg.crypto.secret import SecretBytes

PASSPHRASE_VARIABLE = "FEDCORE_AUTHORITY_PASSPHRASE"  # noqa: S105 - a variable's name


def find_passphrase(file: Path | None, *others: Path | None) -> SecretBytes | None:
    """From this file, else from the environment, else from the first of the other files; None without any. It is
    removed from the environment, which the processes that this one starts inherit. Raises BadInput for a file that
    others on this machine can read, or an empty one."""
    found = os.environ.pop(PASSPHRASE_VARIABLE, None)
    path = file or (
        next((each for each in others if each is not None), None) if not found else None
    )
    if path is not None:
        return passphrase_in(path)
    return SecretBytes(found.encode()) if found else None


def ask_authority_passphrase(*, new: bool = False) -> SecretBytes:
    """Ask at the terminal, twice for a new one. Raises BadInput without a terminal, or if the two differ."""
    otherwise = f"--passphrase-file FILE (mode 0600), or ${PASSPHRASE_VARIABLE}"
    return ask_passphrase("the authority", otherwise, new=new)


def authority_folder(config: FederationConfig, folder: Path | None) -> Path | None:
    """Where the authority is: the folder named, else that of federation.toml; None if no key is there."""
    found = folder or config.enrolment.authority
    return found if found is not None and (folder or (found / KEY_FILE).exists()) else None


def find_authority(config: FederationConfig) -> Authority | None:
    """The authority, if its key and its passphrase are here, for a process that cannot ask. Raises BadInput."""
    folder = authority_folder(config, None)
    passphrase = find_passphrase(None, config.enrolment.passphrase_file)
    if folder is None or passphrase is None:
        return None
    return open_authority(config, folder, passphrase)


def open_authority(config: FederationConfig, folder: Path, passphrase: SecretBytes) -> Authority:
    """The federation's authority, ready to sign. Raises BadInput, also for another federation's."""
    authority = Authority.load(folder, passphrase)
    expected = fingerprint(read_limited(config.kit / AUTHORITY_FILE))
    if authority.fingerprint != expected:
        raise BadInput(
            f"{folder}: found the authority {authority.fingerprint[:16]}..., expected {expected[:16]}..., "
            f"that of {config.name!r}",
            remedy="name the folder of this federation's authority: --authority FOLDER",
        )
    return authority
