"""`fed-site keystore rotate`, `backup`, `restore`: another passphrase, and copies of a site's keys.

A backup is one file: the keystore, which the passphrase of its time opens, and, encrypted with a key from it, the
private files, which are encrypted themselves, the certificate and the authority.
Invariants: a backup has no journal, no spool and no state: a site put back to an earlier moment of a round could answer
twice, and two answers reveal what one hides. `restore` overwrites nothing, and checks everything before it writes.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

from fedcore_clients.config import SiteConfig
from fedcore_clients.private_files import note, private_files, require_stopped

from fedcore.errors import AlreadyExists, BadInput, EnvelopeRefused
from fedcore.files.disk import make_folder, sync_folder
from fedcore.identity.encrypted_files import CLEAR, required
from fedcore.identity.identities import IDENTITY_FILE
from fedcore.identity.keystore import Keystore, KeystoreFile, open_keystore
from fedcore.identity.kit import (
    AUTHORITY_FILE,
    CERTIFICATE_FILE,
    KEY_FILE,
    read_limited,
    read_private,
    write_private,
)
from fedcore.identity.passphrase import KeystoreSection
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.types import Json

FORM = "fedcore keystore backup 1"


def rotate(config: SiteConfig, unlock: str) -> Json:
    """Wrap the data key under a new passphrase; keys and journal are not touched. unlock: where the new passphrase is,
    as in [keystore]. Raises BadInput, Refused."""
    section = required(config.keystore, config.file)
    require_stopped(config)
    new = KeystoreSection(unlock=unlock, file=section.file).placed(config.file, "--new")
    store = open_keystore(section, config.party)
    found = store.wrapped(new.read(new=True))
    note(config, "a new passphrase", (section.file.name,))
    beside = section.file.with_name(f".{section.file.name}.rotated")
    beside.unlink(missing_ok=True)  # of an attempt that was killed
    write_private(beside, SecretBytes(found.to_bytes()))
    beside.replace(section.file)
    sync_folder(section.file.parent)
    return {"keystore": str(section.file), "made": found.made, "unlock": new.source}


def _places(config: SiteConfig) -> dict[str, Path]:
    """Where the files of a backup belong, by name; the certificate last: with it the site is there."""
    return {
        KEY_FILE: config.kit / KEY_FILE, IDENTITY_FILE: config.identity,
        AUTHORITY_FILE: config.kit / AUTHORITY_FILE, CERTIFICATE_FILE: config.kit / CERTIFICATE_FILE,
    }  # fmt: skip


def back_up(config: SiteConfig, out: Path) -> Json:
    """Write a backup of the site's keys. Raises AlreadyExists, BadInput, also for a key in clear."""
    section = required(config.keystore, config.file)
    store = open_keystore(section, config.party)
    for each in private_files(config):
        if each.state == CLEAR:
            raise BadInput(
                f"{each.path}: found a key in clear, expected it encrypted",
                remedy="fed-site keystore encrypt",
            )
    config.read_kit()
    config.read_identity()
    files = {name: read_limited(path).decode() for name, path in _places(config).items()}
    whole = {
        "form": FORM, "keystore": read_private(section.file).decode(),
        "sealed": base64.b64encode(store.seal_backup(json.dumps(files).encode())).decode(),
    }  # fmt: skip
    write_private(out, SecretBytes(json.dumps(whole, indent=2).encode() + b"\n"))
    sync_folder(out.absolute().parent)
    return {"backup": str(out), "files": [section.file.name, *files]}


def restore(config: SiteConfig, path: Path) -> Json:
    """Put the files of a backup in their places. What is there already must be the same. Raises AlreadyExists,
    BadInput, Refused; then nothing was written."""
    section = required(config.keystore, config.file)
    require_stopped(config)
    kept, sealed = _read(path)
    store = Keystore.unwrap(
        KeystoreFile.parse(kept, str(path)), config.party, section.read(), str(path)
    )
    try:
        files: dict[str, str] = json.loads(store.open_backup(sealed))
    except EnvelopeRefused:
        raise _damaged(path) from None
    wanted = {section.file: kept}
    wanted |= {place: files[name].encode() for name, place in _places(config).items()}
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
    if wrote:
        note(config, "restored from a backup", tuple(place.name for place in wrote))
    return {"restored": [str(place) for place in wrote]}


def _read(path: Path) -> tuple[bytes, bytes]:
    """Keystore and sealed files of a backup. Raises BadInput."""
    data = read_private(path)
    try:
        found = json.loads(data)
        if found["form"] == FORM:
            return found["keystore"].encode(), base64.b64decode(found["sealed"], validate=True)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise _damaged(path)


def _damaged(path: Path) -> BadInput:
    return BadInput(
        f"{path}: found something else, or it damaged, expected a backup of `fed-site keystore backup`",
        remedy="use another backup; without one, join again with new keys",
    )


def rotated_lines(found: Json) -> list[str]:
    """What `rotate` did, in words."""
    return [
        f"wrapped {found['keystore']} under the passphrase of {found['unlock']}",
        "let `unlock` under [keystore] give this passphrase before the next start; keys and journal are as they were",
        "older copies of the keystore still open with the old passphrase: if it leaked, join again with new keys",
    ]


def backed_up_lines(found: Json) -> list[str]:
    """What `backup` did, in words."""
    return [
        f"wrote {found['backup']}: {', '.join(found['files'])}",
        "it opens with the passphrase of now: keep that elsewhere",
        "the journal is not in it: a site put back to an earlier moment of a round could answer twice",
    ]


def restored_lines(found: Json) -> list[str]:
    """What `restore` did, in words."""
    return [*(f"restored {each}" for each in found["restored"]), "next: fed-site check"]
