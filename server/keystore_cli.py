"""fed-coordinator keystore: the keys of the coordinator and of the authority, encrypted at rest and kept.

The coordinator's key is encrypted where federation.toml has a [keystore]; the authority's always is, with a keystore
in its own folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from fedcore_server.federation_cli import AsJson, AuthorityFolder, Config, Passphrase

from fedcore.cli.console import echo, emit
from fedcore.types import Json

if TYPE_CHECKING:
    from fedcore.identity.keystore_backup import KeptKeys


class Party(StrEnum):
    """Whose keystore."""

    COORDINATOR = "coordinator"
    AUTHORITY = "authority"


Of = Annotated[
    Party, typer.Option("--of", help="Whose keystore: that of [keystore], or the authority's.")
]
_HERE = Path("federation.toml")

keystore_app = typer.Typer(
    help="Encrypt the keys of coordinator and authority at rest.", no_args_is_help=True
)


@keystore_app.command("encrypt")
def encrypt_key(config: Config = _HERE, as_json: AsJson = False) -> None:
    """Encrypt kit/key.pem, with the passphrase that [keystore] names. Can be repeated if it was interrupted."""
    from fedcore_server.config import read_config

    from fedcore.identity.encrypted_files import (
        encrypt_keys,
        encrypted_lines,
        key_files,
        required,
    )
    from fedcore.identity.kit import KEY_FILE

    place = read_config(config)
    section, files = required(place.keystore, config), key_files({KEY_FILE: place.kit / KEY_FILE})
    _, made, done = encrypt_keys(section, place.party, files)
    lines = list(encrypted_lines({"keystore": str(section.file), "made": made, "encrypted": done}))
    if done:
        _note(config, "encrypt", Party.COORDINATOR)
        lines += [
            "next: restart a running coordinator; fed-coordinator keystore backup FILE, and a copy of the passphrase "
            "elsewhere"
        ]
    _print(as_json, {"keystore": str(section.file), "made": made, "encrypted": done}, lines)


@keystore_app.command("rotate")
def rotate_passphrase(
    new: Annotated[
        str, typer.Option("--new", help="Where the new passphrase is: as `unlock` in [keystore].")
    ] = "prompt",
    of: Of = Party.COORDINATOR,
    config: Config = _HERE,
    authority: AuthorityFolder = None,
    passphrase_file: Passphrase = None,
    as_json: AsJson = False,
) -> None:
    """Change the passphrase. Keys stay as they are."""
    from fedcore.identity.keystore_backup import rotate, rotated_lines
    from fedcore.identity.passphrase import KeystoreSection

    kept = _kept(of, config, authority, passphrase_file)
    section = KeystoreSection(unlock=new).placed(config, "--new")
    found = rotate(kept, section, lambda: _note(config, "rotate", of))
    _print(as_json, found, rotated_lines(found))


@keystore_app.command("backup")
def back_up_keys(
    file: Annotated[Path, typer.Argument(help="The file to write.")],
    of: Of = Party.COORDINATOR,
    config: Config = _HERE,
    authority: AuthorityFolder = None,
    passphrase_file: Passphrase = None,
    as_json: AsJson = False,
) -> None:
    """Write an encrypted copy of the keys. It opens with the passphrase of now."""
    from fedcore.identity.keystore_backup import back_up, backed_up_lines

    found = back_up(_kept(of, config, authority, passphrase_file), file)
    _note(config, "backup", of)
    _print(as_json, found, backed_up_lines(found))


@keystore_app.command("restore")
def restore_keys(
    file: Annotated[Path, typer.Argument(help="A file of `fed-coordinator keystore backup`.")],
    of: Of = Party.COORDINATOR,
    config: Config = _HERE,
    authority: AuthorityFolder = None,
    passphrase_file: Passphrase = None,
    as_json: AsJson = False,
) -> None:
    """Put the keys of a backup in their places. Overwrites nothing."""
    from fedcore.identity.keystore_backup import restore, restored_lines

    found = restore(_kept(of, config, authority, passphrase_file), file)
    if found["restored"]:
        _note(config, "restore", of)
    _print(as_json, found, restored_lines(found))


@keystore_app.command("status")
def show_keystore(config: Config = _HERE, as_json: AsJson = False) -> None:
    """Show how the keys of coordinator and authority are encrypted. Needs no passphrase."""
    from fedcore_server.authority_key import ASKED, authority_folder, find_unlock
    from fedcore_server.config import read_config

    from fedcore.identity.encrypted_files import key_files, keystore_json, keystore_lines
    from fedcore.identity.keystore import KEYSTORE_FILE
    from fedcore.identity.kit import KEY_FILE
    from fedcore.identity.passphrase import KeystoreSection

    place = read_config(config)
    found = keystore_json(place.keystore, key_files({KEY_FILE: place.kit / KEY_FILE}))
    lines, folder = [*keystore_lines(found)], authority_folder(place, None)
    if (token := place.enrolment.token) is not None:
        found["authority"] = {"token": str(token)}
        lines.append(f"authority: {token}")
    elif folder is not None:
        unlock = find_unlock(None, place.enrolment.unlock) or ASKED
        section = KeystoreSection(unlock=unlock, file=folder / KEYSTORE_FILE)
        found["authority"] = keystore_json(section, key_files({KEY_FILE: folder / KEY_FILE}))
        lines += ["authority", *keystore_lines(found["authority"])]
    _print(as_json, found, lines)


def _kept(of: Party, config: Path, authority: Path | None, file: Path | None) -> KeptKeys:
    """What is kept of a party. file: with the authority's passphrase."""
    from fedcore_server.authority_key import ASKED, find_unlock, kept_authority
    from fedcore_server.config import kept_coordinator, read_config

    place = read_config(config)
    if of is Party.COORDINATOR:
        return kept_coordinator(place, config)
    unlock = find_unlock(file, place.enrolment.unlock) or ASKED
    return kept_authority(place, authority, unlock)


def _note(config: Path, what: str, of: Party) -> None:
    """Leave a line about a command for the audit trail."""
    from datetime import UTC, datetime

    from fedcore_server.config import read_config
    from fedcore_server.federation import FederationFiles

    files = FederationFiles(read_config(config))
    files.note(f"keystore {what}", datetime.now(UTC), party=of.value)


def _print(as_json: bool, found: Json, lines: Iterable[str]) -> None:
    if as_json:
        emit(found)
        return
    for line in lines:
        echo(line)
