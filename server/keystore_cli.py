"""fed-coordinator keystore: what coordinator, authority and operators have is encrypted at rest, and its keys are kept.

The coordinator's key, journal and models are encrypted where federation.toml has a [keystore], an operator's key where
operator.toml has one; the authority's key always is, with a keystore in its own folder.
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
    OPERATOR = "operator"


Of = Annotated[
    Party,
    typer.Option(
        "--of", help="Whose keystore: that of federation.toml, the authority's, an operator's."
    ),
]
OperatorFile = Annotated[
    Path | None,
    typer.Option(
        "--operator", help="The operator's file; default: $FEDCORE_OPERATOR, or operator.toml here."
    ),
]
_HERE = Path("federation.toml")

keystore_app = typer.Typer(
    help="Encrypt what coordinator, authority and operators keep.", no_args_is_help=True
)


@keystore_app.command("encrypt")
def encrypt_key(
    of: Of = Party.COORDINATOR,
    config: Config = _HERE,
    operator: OperatorFile = None,
    as_json: AsJson = False,
) -> None:
    """Encrypt the coordinator's key, journal and models. Or an operator's key; may be repeated."""
    from fedcore_server.config import find_place, read_config
    from fedcore_server.private_files import encrypt, encrypt_operator

    from fedcore.errors import BadInput
    from fedcore.identity.encrypted_files import encrypted_lines

    if of is Party.AUTHORITY:
        raise BadInput(
            "--of: found 'authority', whose key is always encrypted, expected coordinator or operator",
            remedy="fed-coordinator keystore status",
        )
    if of is Party.OPERATOR:
        found = encrypt_operator(find_place(None, None, operator), _operator_file(operator))
    else:
        found = encrypt(read_config(config), config)
    lines = list(encrypted_lines(found))
    if found.get("on_server"):
        lines.append(
            "the database server's write-ahead log and backups keep what was in clear there until they are replaced"
        )
    if found["encrypted"]:
        _note(config, "encrypt", of)
        which = "" if of is Party.COORDINATOR else f" --of {of}"
        lines += [
            f"next: fed-coordinator keystore backup FILE{which}, and a copy of the passphrase elsewhere"
        ]
    _print(as_json, found, lines)


@keystore_app.command("rotate")
def rotate_passphrase(
    new: Annotated[
        str, typer.Option("--new", help="Where the new passphrase is: as `unlock` in [keystore].")
    ] = "prompt",
    of: Of = Party.COORDINATOR,
    config: Config = _HERE,
    authority: AuthorityFolder = None,
    passphrase_file: Passphrase = None,
    operator: OperatorFile = None,
    as_json: AsJson = False,
) -> None:
    """Change the passphrase. Keys stay as they are."""
    from fedcore.identity.keystore_backup import rotate, rotated_lines
    from fedcore.identity.passphrase import KeystoreSection

    kept = _kept(of, config, authority, passphrase_file, operator)
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
    operator: OperatorFile = None,
    as_json: AsJson = False,
) -> None:
    """Write an encrypted copy of the keys. It opens with the passphrase of now."""
    from fedcore.identity.keystore_backup import back_up, backed_up_lines

    found = back_up(_kept(of, config, authority, passphrase_file, operator), file)
    _note(config, "backup", of)
    _print(as_json, found, backed_up_lines(found))


@keystore_app.command("restore")
def restore_keys(
    file: Annotated[Path, typer.Argument(help="A file of `fed-coordinator keystore backup`.")],
    of: Of = Party.COORDINATOR,
    config: Config = _HERE,
    authority: AuthorityFolder = None,
    passphrase_file: Passphrase = None,
    operator: OperatorFile = None,
    as_json: AsJson = False,
) -> None:
    """Put the keys of a backup in their places. Overwrites nothing."""
    from fedcore.identity.keystore_backup import restore, restored_lines

    found = restore(_kept(of, config, authority, passphrase_file, operator), file)
    if found["restored"]:
        _note(config, "restore", of)
    _print(as_json, found, restored_lines(found))


@keystore_app.command("status")
def show_keystore(
    config: Config = _HERE, operator: OperatorFile = None, as_json: AsJson = False
) -> None:
    """Show what of coordinator, authority and operator is encrypted. Needs no passphrase."""
    from fedcore_server.authority_key import ASKED, authority_folder, find_unlock
    from fedcore_server.config import OPERATOR_FILE, find_place, read_config
    from fedcore_server.private_files import own_key, private_files

    from fedcore.identity.encrypted_files import key_files, keystore_json, keystore_lines
    from fedcore.identity.keystore import KEYSTORE_FILE
    from fedcore.identity.kit import KEY_FILE
    from fedcore.identity.passphrase import KeystoreSection

    place = read_config(config)
    found = keystore_json(place.keystore, private_files(place))
    lines, folder = [*keystore_lines(found)], authority_folder(place, None)
    if (token := place.enrolment.token) is not None:
        found["authority"] = {"token": str(token)}
        lines.append(f"authority: {token}")
    elif folder is not None:
        unlock = find_unlock(None, place.enrolment.unlock) or ASKED
        section = KeystoreSection(unlock=unlock, file=folder / KEYSTORE_FILE)
        found["authority"] = keystore_json(section, key_files({KEY_FILE: folder / KEY_FILE}))
        lines += ["authority", *keystore_lines(found["authority"])]
    own = operator or config.absolute().parent / "operator" / OPERATOR_FILE
    if own.is_file():
        called = find_place(None, None, own)
        found["operator"] = keystore_json(called.keystore, own_key(called))
        lines += ["operator", *keystore_lines(found["operator"])]
    _print(as_json, found, lines)


def _operator_file(named: Path | None) -> Path:
    from fedcore_server.config import OPERATOR_FILE

    return named or Path(OPERATOR_FILE)


def _kept(
    of: Party, config: Path, authority: Path | None, file: Path | None, operator: Path | None
) -> KeptKeys:
    """What is kept of a party. file: with the authority's passphrase; operator: operator.toml."""
    from fedcore_server.authority_key import ASKED, find_unlock, kept_authority
    from fedcore_server.config import find_place, kept_coordinator, kept_operator, read_config

    if of is Party.OPERATOR:
        return kept_operator(find_place(None, None, operator), _operator_file(operator))
    place = read_config(config)
    if of is Party.COORDINATOR:
        return kept_coordinator(place, config)
    unlock = find_unlock(file, place.enrolment.unlock) or ASKED
    return kept_authority(place, authority, unlock)


def _note(config: Path, what: str, of: Party) -> None:
    """Leave a line about a command for the coordinator's audit trail; an operator's own machine has none."""
    from datetime import UTC, datetime

    from fedcore_server.config import read_config
    from fedcore_server.federation import FederationFiles

    if of is Party.OPERATOR:
        return
    files = FederationFiles(read_config(config))
    files.note(f"keystore {what}", datetime.now(UTC), party=of.value)


def _print(as_json: bool, found: Json, lines: Iterable[str]) -> None:
    if as_json:
        emit(found)
        return
    for line in lines:
        echo(line)
