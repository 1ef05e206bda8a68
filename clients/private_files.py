"""`fed-site keystore`: encrypt this site's private keys and its journal at rest, and show which of them are.

Invariant: every file is replaced whole, by one that was read back first, and the keystore is on disk before a file
needs it. So `encrypt` may be killed at any moment and is repeated with the same command. Until it is done, `fed-site
run` refuses to start, and names the file that is still in clear.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedcore_clients.config import JOURNAL_FILE, SiteConfig
from fedcore_clients.status import runs

import fedcore
from fedcore.audit.keys import SiteSigner
from fedcore.audit.trail import AuditTrail
from fedcore.errors import BadInput, Refused
from fedcore.files.disk import sync_folder
from fedcore.identity.identities import IDENTITY_FILE
from fedcore.identity.keystore import (
    RESTORE,
    Keystore,
    KeystoreFile,
    create_keystore,
    open_keystore,
)
from fedcore.identity.kit import (
    KEY_FILE,
    is_encrypted,
    key_pem,
    read_key,
    read_limited,
    write_private,
)
from fedcore.identity.passphrase import KeystoreSection
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.store.sealing import RowSealer, encrypt_journal, is_sealed
from fedcore.types import Json

ENCRYPTED, CLEAR, MISSING, IN_USE = "encrypted", "in clear", "missing", "in use"


@dataclass(frozen=True)
class PrivateFile:
    """One private file of a site. name: what it is, as `key.pem`; state: ENCRYPTED, CLEAR or MISSING."""

    name: str
    path: Path
    state: str


def private_files(config: SiteConfig) -> list[PrivateFile]:
    """The site's private files, as they are. Raises BadInput."""
    places = {KEY_FILE: config.kit / KEY_FILE, IDENTITY_FILE: config.identity}
    return [PrivateFile(name, path, _state(path)) for name, path in places.items()]


def _state(path: Path) -> str:
    if not path.exists():
        return MISSING
    return ENCRYPTED if is_encrypted(read_limited(path)) else CLEAR


def journal_of(config: SiteConfig) -> PrivateFile:
    """The site's journal, as it is. Raises StoreProblem, also where another process has it open."""
    path, state = config.folder / JOURNAL_FILE, MISSING
    if path.exists():
        state = ENCRYPTED if is_sealed(path, config.party) else CLEAR
    return PrivateFile(JOURNAL_FILE, path, state)


def encrypt(config: SiteConfig) -> Json:
    """Encrypt the private files and the journal that are in clear, with a new keystore if there is none; what was done.

    Raises BadInput, StoreProblem, and Refused while this site runs.
    """
    section = keystore_section(config)
    require_stopped(config)
    files, journal = private_files(config), journal_of(config)
    plain = [each for each in files if each.state == CLEAR]
    for each in plain:  # all of them before anything is changed
        read_key(each.path)
    if made := not section.file.exists():
        store = _create(config, section, [*files, journal])
    else:
        store = open_keystore(section, config.party)
    for each in files:
        if each.state == ENCRYPTED:
            read_key(each.path, store.password(each.name))
    for each in plain:
        _replace(each.path, store.password(each.name))
    done = [str(each.path) for each in plain]
    if journal.state != MISSING:
        sealer = RowSealer(store.journal_key())
        done += [str(journal.path)] if encrypt_journal(journal.path, config.party, sealer) else []
    if done and config.identity.exists():
        note(config, "encrypted at rest", tuple(Path(each).name for each in done))
    return {"keystore": str(section.file), "made": made, "encrypted": done}


def note(config: SiteConfig, word: str, files: tuple[str, ...]) -> None:
    """Record in this site's audit trail what was done with its private files. Raises BadInput, StoreProblem."""
    opened = {"party": config.party, "software": fedcore.__version__}
    with AuditTrail.open(config.folder, SiteSigner(config.read_identity()), opened) as trail:
        trail.record("key", what="private files", word=word, files=files)


def require_stopped(config: SiteConfig) -> None:
    """Raise Refused while this site runs."""
    if runs(config.folder):
        raise Refused(
            f"site {config.site}: found its process running, expected it stopped: it has the files open",
            remedy="stop fed-site run, and start it again afterwards",
        )


def keystore_section(config: SiteConfig) -> KeystoreSection:
    """Its [keystore]. Raises BadInput without one."""
    if config.keystore is None:
        raise BadInput(
            f"{config.file.name}: found no [keystore], expected one that names where the passphrase is",
            remedy='write [keystore] with unlock = "file:/run/secrets/site-passphrase", and put one there: '
            "(umask 077; openssl rand -base64 24 > FILE)",
        )
    return config.keystore


def _create(config: SiteConfig, section: KeystoreSection, files: list[PrivateFile]) -> Keystore:
    """A new keystore, durable on return. Raises BadInput where files are encrypted: theirs is gone."""
    for each in files:
        if each.state == ENCRYPTED:
            raise BadInput(
                f"{section.file}: found no such file, expected the keystore that {each.path} is encrypted with",
                remedy=RESTORE,
            )
    found = create_keystore(section, config.party)
    sync_folder(section.file.parent)
    return found


def _replace(path: Path, password: SecretBytes) -> None:
    """Encrypt one key file: written beside, read back, renamed; durable on return. Raises BadInput."""
    key, beside = read_key(path), path.with_name(f".{path.name}.encrypted")
    beside.unlink(missing_ok=True)  # of an attempt that was killed
    write_private(beside, key_pem(key, password))
    if read_key(beside, password).public_key() != key.public_key():
        raise BadInput(f"{beside}: found another key than was written, expected that of {path}")
    beside.replace(path)
    for left in path.parent.glob(f".*{path.name}*.part"):
        left.unlink()  # of a command that was killed; while it made the key, it is in clear
    sync_folder(path.parent)


def encrypted_lines(found: Json) -> Iterator[str]:
    """What `encrypt` did, in words."""
    if found["made"]:
        yield f"made {found['keystore']}: it opens the private keys, with the passphrase"
    for path in found["encrypted"]:
        yield f"encrypted {path}"
    if not found["encrypted"]:
        yield "no private file was in clear"
    if found["made"]:
        yield "next: fed-site keystore backup FILE, and a copy of the passphrase elsewhere: if one is lost, this site"
        yield "  has to join again, with new keys"
    if found["encrypted"]:
        yield "copies of the key files made before, and overwritten blocks of the disk, are still in clear"


def keystore_status(config: SiteConfig) -> Json:
    """What is encrypted, and with which keystore; needs no passphrase. Raises BadInput, StoreProblem."""
    section, files = config.keystore, private_files(config)
    journal = IN_USE if runs(config.folder) else journal_of(config).state
    about: Json | None = None
    if section is not None and section.file.exists():
        found = KeystoreFile.read(section.file)
        about = {
            "version": found.version,
            "party": found.party,
            "made": found.made,
            "scrypt_n": found.n,
        }
    return {
        "site": config.site, "unlock": section.source if section is not None else None,
        "file": str(section.file) if section is not None else None, "keystore": about,
        "files": [{"name": f.name, "path": str(f.path), "state": f.state} for f in files],
        "journal": {"path": str(config.folder / JOURNAL_FILE), "state": journal},
        "at_rest": about is not None and journal != CLEAR
        and all(f.state == ENCRYPTED for f in files),
    }  # fmt: skip


def keystore_lines(found: Json) -> Iterator[str]:
    """The status in words."""
    if found["file"] is None:
        yield "no [keystore] in site.toml: private keys and journal are in clear, for this user only"
    else:
        about = found["keystore"]
        how = f"made {about['made']}, scrypt n = {about['scrypt_n']}" if about else MISSING
        yield f"keystore {found['file']}: {how}; passphrase from {found['unlock']}"
    for each in (*found["files"], found["journal"]):
        yield f"{each['state']:<9}  {each['path']}"
    if found["file"] is not None and not found["at_rest"]:
        yield "hint: fed-site keystore encrypt"
