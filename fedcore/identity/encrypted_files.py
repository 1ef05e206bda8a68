"""The private files of a party, encrypted with its keystore.

Invariant: every file is replaced whole, by one that was read back first, and the keystore is on disk before a file
needs it. So an encryption that was killed is repeated with the same command.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedcore.errors import BadInput
from fedcore.files.disk import sync_folder
from fedcore.identity.keystore import (
    RESTORE,
    Keystore,
    KeystoreFile,
    create_keystore,
    open_keystore,
)
from fedcore.identity.kit import is_encrypted, key_pem, read_key, read_limited, write_private
from fedcore.identity.passphrase import KeystoreSection
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.types import Json

ENCRYPTED, CLEAR, MISSING, IN_USE = "encrypted", "in clear", "missing", "in use"


@dataclass(frozen=True)
class PrivateFile:
    """One private file of a party. name: what it is, as `key.pem`; path: where it is, for a journal on a server the
    URL of its database without the password; state: ENCRYPTED, CLEAR, MISSING or IN_USE."""

    name: str
    path: Path | str
    state: str


def key_files(places: Mapping[str, Path]) -> list[PrivateFile]:
    """The key files at these places, as they are. Raises BadInput."""
    return [PrivateFile(name, path, _state(path)) for name, path in places.items()]


def state_of(sealed: Iterable[bool]) -> str:
    """The state of several files together, each encrypted or not: CLEAR where one of them is."""
    found = set(sealed)
    return MISSING if not found else ENCRYPTED if all(found) else CLEAR


def _state(path: Path) -> str:
    if not path.exists():
        return MISSING
    return ENCRYPTED if is_encrypted(read_limited(path)) else CLEAR


def required(section: KeystoreSection | None, file: Path) -> KeystoreSection:
    """The [keystore] of a file. Raises BadInput where there is none."""
    if section is None:
        raise BadInput(
            f"{file.name}: found no [keystore], expected one that names where the passphrase is",
            remedy='write [keystore] with unlock = "file:/run/secrets/site-passphrase", and put one there: '
            "(umask 077; openssl rand -base64 24 > FILE)",
        )
    return section


def encrypt_keys(
    section: KeystoreSection,
    party: str,
    files: Sequence[PrivateFile],
    others: Sequence[PrivateFile] = (),
) -> tuple[Keystore, bool, list[str]]:
    """Encrypt the key files that are in clear: the keystore, whether it was made now, and the paths.

    others: private files that are not keys. Raises BadInput, also where a file is encrypted with a keystore that is
    not here.
    """
    plain = [(each.name, Path(each.path)) for each in files if each.state == CLEAR]
    for _, path in plain:  # all of them before anything is changed
        read_key(path)
    if made := not section.file.exists():
        store = _create(section, party, [*files, *others])
    else:
        store = open_keystore(section, party)
    for each in files:
        if each.state == ENCRYPTED:
            read_key(Path(each.path), store.password(each.name))
    for name, path in plain:
        reencrypt(path, None, store.password(name))
    return store, made, [str(path) for _, path in plain]


def _create(section: KeystoreSection, party: str, files: Sequence[PrivateFile]) -> Keystore:
    """A new keystore, durable on return. Raises BadInput where files are encrypted: theirs is gone."""
    for each in files:
        if each.state == ENCRYPTED:
            raise BadInput(
                f"{section.file}: found no such file, expected the keystore that {each.path} is encrypted with",
                remedy=RESTORE,
            )
    found = create_keystore(section, party)
    sync_folder(section.file.parent)
    return found


def reencrypt(path: Path, before: SecretBytes | None, password: SecretBytes) -> None:
    """Encrypt one key file under a password: written beside, read back, renamed; durable on return. before: what
    opens it so far, None for one in clear. Raises BadInput."""
    key, beside = read_key(path, before), path.with_name(f".{path.name}.encrypted")
    beside.unlink(missing_ok=True)  # of an attempt that was killed
    write_private(beside, key_pem(key, password))
    if read_key(beside, password).public_key() != key.public_key():
        raise BadInput(f"{beside}: found another key than was written, expected that of {path}")
    beside.replace(path)
    for left in path.parent.glob(f".*{path.name}*.part"):
        left.unlink()  # of a command that was killed; while it made the key, it is in clear
    sync_folder(path.parent)


def encrypted_lines(found: Json) -> Iterator[str]:
    """What was encrypted, in words. found: with keystore, made, encrypted."""
    if found["made"]:
        yield f"made {found['keystore']}: it opens the private keys, with the passphrase"
    for path in found["encrypted"]:
        yield f"encrypted {path}"
    if not found["encrypted"]:
        yield "no private file was in clear"
    else:
        yield "copies of the files made before, and overwritten blocks of the disk, are still in clear"


def keystore_json(section: KeystoreSection | None, files: Sequence[PrivateFile]) -> Json:
    """What is encrypted, and with which keystore; needs no passphrase. Raises BadInput."""
    about: Json | None = None
    if section is not None and section.file.exists():
        found = KeystoreFile.read(section.file)
        about = {
            "version": found.version, "party": found.party, "made": found.made, "scrypt_n": found.n
        }  # fmt: skip
    return {
        "unlock": section.source if section is not None else None,
        "file": str(section.file) if section is not None else None, "keystore": about,
        "files": [{"name": f.name, "path": str(f.path), "state": f.state} for f in files],
    }  # fmt: skip


def keystore_lines(found: Json) -> Iterator[str]:
    """The same in words."""
    if found["file"] is None:
        yield "no [keystore]: private files are in clear, for this user only"
    else:
        about = found["keystore"]
        how = f"made {about['made']}, scrypt n = {about['scrypt_n']}" if about else MISSING
        yield f"keystore {found['file']}: {how}; passphrase from {found['unlock']}"
    for each in found["files"]:
        yield f"{each['state']:<9}  {each['path']}"
