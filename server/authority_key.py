"""The authority's key, opened with its passphrase for as long as a command needs it.

Invariant: a passphrase comes from a file, from the environment or from a prompt, never from an argument: arguments can
be read in the list of processes. It is in no message.
"""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path

from fedcore_server.config import FederationConfig

from fedcore.errors import BadInput
from fedcore.identity.authority import Authority
from fedcore.identity.kit import AUTHORITY_FILE, KEY_FILE, read_limited, read_private
from fedcore.identity.verify import fingerprint
from fedcore.secagg.crypto.secret import SecretBytes

PASSPHRASE_VARIABLE = "FEDCORE_AUTHORITY_PASSPHRASE"  # noqa: S105 - a variable's name
LEAST_CHARACTERS = 12
"""Of a new passphrase: a copied key file can be tried offline."""


def find_passphrase(file: Path | None, *others: Path | None) -> SecretBytes | None:
    """From this file, else from the environment, else from the first of the other files; None without any. Raises
    BadInput for a file that others on this machine can read, or an empty one."""
    found = os.environ.get(PASSPHRASE_VARIABLE)
    path = file or (
        next((each for each in others if each is not None), None) if not found else None
    )
    if path is not None:
        text = read_private(path).rstrip(b"\r\n")
        if not text:
            raise BadInput(f"{path}: found it empty, expected a passphrase")
        return SecretBytes(text)
    return SecretBytes(found.encode()) if found else None


def ask_passphrase(*, new: bool = False) -> SecretBytes:
    """Ask at the terminal, twice for a new one. Raises BadInput without a terminal, or if the two differ."""
    if not sys.stdin.isatty():
        raise BadInput(
            "passphrase of the authority: found none and no terminal to ask at, expected it",
            remedy=f"--passphrase-file FILE (mode 0600), or ${PASSPHRASE_VARIABLE}",
        )
    text = getpass.getpass("passphrase of the authority: ")
    if new and getpass.getpass("the same again: ") != text:
        raise BadInput("passphrase: found two that differ, expected the same twice")
    return SecretBytes(text.encode())


def check_new(passphrase: SecretBytes) -> SecretBytes:
    """A passphrase for a new key. Raises BadInput for a short one."""
    found = len(passphrase.reveal())
    if found < LEAST_CHARACTERS:
        raise BadInput(
            f"passphrase: found {found} characters, expected {LEAST_CHARACTERS} or more",
            remedy="openssl rand -base64 24 > FILE && chmod 600 FILE, and --passphrase-file FILE",
        )
    return passphrase


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
