"""`keystore rotate`, `backup`, `restore` of every party: another passphrase, and copies of its keys.

A backup is one file: the keystore, which the passphrase of its time opens, and, encrypted with a key from it, the
private key files, which are encrypted themselves, and the certificates.
Invariants: a backup has no journal, no spool and no state: a site put back to an earlier moment of a round could answer
twice, and two answers reveal what one hides. `restore` overwrites nothing, and checks everything before it writes. Of
two commands at once one waits; killed at any moment, each is repeated.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from fedcore.errors import AlreadyExists, BadInput, EnvelopeRefused
from fedcore.files.disk import make_folder, sync_folder
from fedcore.files.lock import one_at_a_time
from fedcore.identity.keystore import Keystore, KeystoreFile
from fedcore.identity.kit import read_key, read_limited, read_private, write_private
from fedcore.identity.passphrase import KeystoreSection
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.types import Json

FORM = "fedcore keystore backup 1"


@dataclass(frozen=True)
class KeptKeys:
    """What a party's backup consists of. keystore: its file; keys: the private key files; public: certificates, in the
    order in which they are restored. opened: opens the keystore; passphrase: reads it; command: whose, as
    `fed-site keystore`."""

    party: str
    keystore: Path
    keys: Mapping[str, Path]
    public: Mapping[str, Path]
    opened: Callable[[], Keystore]
    passphrase: Callable[[], SecretBytes]
    command: str

    @property
    def places(self) -> dict[str, Path]:
        """Where the files of a backup belong, by name."""
        return {**self.keys, **self.public}

    def alone(self) -> AbstractContextManager[None]:
        """Wait for other commands that change the same files. Raises BadInput where one takes long."""
        lock = self.keystore.with_name(f".{self.keystore.name}.lock")
        return one_at_a_time(lock, str(self.keystore), remove=True)


def rotate(kept: KeptKeys, new: KeystoreSection, note: Callable[[], None] = lambda: None) -> Json:
    """Wrap the data key under a new passphrase; nothing else is touched. note: called before it is in force. Raises
    BadInput."""
    passphrase = new.read(new=True)
    with kept.alone():
        found = kept.opened().wrapped(passphrase)
        note()
        beside = kept.keystore.with_name(f".{kept.keystore.name}.rotated")
        beside.unlink(missing_ok=True)  # of an attempt that was killed
        write_private(beside, SecretBytes(found.to_bytes()))
        beside.replace(kept.keystore)
        sync_folder(kept.keystore.parent)
    return {"keystore": str(kept.keystore), "made": found.made, "unlock": new.source}


def back_up(kept: KeptKeys, out: Path) -> Json:
    """Write a backup of the keys. Raises AlreadyExists, BadInput, also for a key in clear."""
    with kept.alone():
        store = kept.opened()
        for name, path in kept.keys.items():
            read_key(path, store.password(name))
        files = {name: read_limited(path).decode() for name, path in kept.places.items()}
        keystore = read_private(kept.keystore).decode()
    sealed = base64.b64encode(store.seal_backup(json.dumps(files).encode())).decode()
    whole = {"form": FORM, "keystore": keystore, "sealed": sealed}
    write_private(out, SecretBytes(json.dumps(whole, indent=2).encode() + b"\n"))
    sync_folder(out.absolute().parent)
    return {"backup": str(out), "files": [kept.keystore.name, *files]}


def restore(kept: KeptKeys, path: Path) -> Json:
    """Put the files of a backup in their places. What is there already must be the same. Raises AlreadyExists,
    BadInput; then nothing was written."""
    keystore, sealed = _read(path, kept.command)
    found = KeystoreFile.parse(keystore, str(path))
    store = Keystore.unwrap(found, kept.party, kept.passphrase(), str(path))
    try:
        files: dict[str, str] = json.loads(store.open_backup(sealed))
    except EnvelopeRefused:
        raise _damaged(path, kept.command) from None
    wanted = {kept.keystore: keystore}
    wanted |= {place: files[name].encode() for name, place in kept.places.items()}
    make_folder(kept.keystore.parent)
    with kept.alone():
        for place, data in wanted.items():
            if place.exists() and read_limited(place) != data:
                raise AlreadyExists(
                    f"{place}: found another file there, expected none: a restore overwrites nothing",
                    remedy="move it away first, if the backup's is the one to use",
                )
        wrote = [place for place in wanted if not place.exists()]
        for place in wrote:
            make_folder(place.parent)
            write_private(place, SecretBytes(wanted[place]))
            sync_folder(place.parent)
    return {"restored": [str(place) for place in wrote]}


def _read(path: Path, command: str) -> tuple[bytes, bytes]:
    """Keystore and sealed files of a backup. Raises BadInput."""
    data = read_private(path)
    try:
        found = json.loads(data)
        if found["form"] == FORM:
            return found["keystore"].encode(), base64.b64decode(found["sealed"], validate=True)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise _damaged(path, command)


def _damaged(path: Path, command: str) -> BadInput:
    return BadInput(
        f"{path}: found something else, or it damaged, expected a backup of `{command} backup`",
        remedy="use another backup",
    )


def rotated_lines(found: Json) -> list[str]:
    """What `rotate` did, in words."""
    return [
        f"wrapped {found['keystore']} under the passphrase of {found['unlock']}",
        "let `unlock` give this passphrase before the next start; all that it opens is as it was",
        "older copies of the keystore still open with the old passphrase: if it leaked, make new keys",
    ]


def backed_up_lines(found: Json) -> list[str]:
    """What `backup` did, in words."""
    return [
        f"wrote {found['backup']}: {', '.join(found['files'])}",
        "it opens with the passphrase of now: keep that elsewhere",
    ]


def restored_lines(found: Json) -> list[str]:
    """What `restore` did, in words."""
    return [f"restored {each}" for each in found["restored"]] or ["everything was there already"]
