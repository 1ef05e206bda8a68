"""`fed-site keystore`: this site's keys, journal and states encrypted at rest, another passphrase, backups.

Invariant: `encrypt` may be killed at any moment and is repeated with the same command. Until it is done, `fed-site
run` refuses to start, and names the file that is still in clear.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fedcore_clients.config import JOURNAL_FILE, SiteConfig
from fedcore_clients.ledger import LEDGER_FILE, is_sealed_ledger, seal_ledger
from fedcore_clients.state_files import STATES, all_states, seal_states
from fedcore_clients.status import runs

from fedcore.audit.keys import SiteSigner
from fedcore.audit.trail import AuditTrail
from fedcore.errors import Refused
from fedcore.files.disk import OTHERS
from fedcore.identity import encrypted_files, keystore_backup
from fedcore.identity.encrypted_files import (
    CLEAR,
    ENCRYPTED,
    IN_USE,
    MISSING,
    PrivateFile,
    encrypt_keys,
    key_files,
    keystore_json,
    required,
    state_of,
)
from fedcore.identity.identities import IDENTITY_FILE
from fedcore.identity.keystore import open_keystore
from fedcore.identity.keystore_backup import KeptKeys
from fedcore.identity.kit import AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE
from fedcore.identity.passphrase import KeystoreSection
from fedcore.store.sealed_files import FileSealer, is_sealed_file
from fedcore.store.sealing import RowSealer, encrypt_journal, is_sealed
from fedcore.types import Json
from fedcore.wire.frames import SOFTWARE


def private_files(config: SiteConfig) -> list[PrivateFile]:
    """The site's key files, as they are. Raises BadInput."""
    return key_files({KEY_FILE: config.kit / KEY_FILE, IDENTITY_FILE: config.identity})


def journal_of(config: SiteConfig) -> PrivateFile:
    """The site's journal, as it is. Raises StoreProblem, also where another process has it open."""
    path = config.folder / JOURNAL_FILE
    state = state_of([is_sealed(path, config.party)] if path.exists() else [])
    return PrivateFile(JOURNAL_FILE, path, state)


def states_of(config: SiteConfig) -> PrivateFile:
    """The states of all jobs, as they are."""
    state = state_of(is_sealed_file(path) for path in all_states(config.folder))
    return PrivateFile(STATES, config.folder / STATES, state)


def ledger_of(config: SiteConfig) -> PrivateFile:
    """The ledger, as it is."""
    sealed = is_sealed_ledger(config.folder)
    state = state_of([] if sealed is None else [sealed])
    return PrivateFile(LEDGER_FILE, config.folder / LEDGER_FILE, state)


def encrypt(config: SiteConfig) -> Json:
    """Encrypt keys, journal and states that are in clear, with a new keystore if there is none; what was done.

    Raises BadInput, StoreProblem, and Refused while this site runs.
    """
    section = required(config.keystore, config.file)
    require_stopped(config)
    os.umask(OTHERS)
    files, journal = private_files(config), journal_of(config)
    others = [journal, states_of(config), ledger_of(config)]
    store, made, done = encrypt_keys(section, config.party, files, others)
    if journal.state != MISSING:
        path, sealer = config.folder / JOURNAL_FILE, RowSealer(store.journal_key())
        done += [str(path)] if encrypt_journal(path, config.party, sealer) else []
    if seal_states(config.folder, FileSealer(store.files_key())):
        done.append(str(config.folder / STATES))
    if seal_ledger(config.folder, RowSealer(store.files_key())):
        done.append(str(config.folder / LEDGER_FILE))
    if done and config.identity.exists():
        note(config, "encrypted at rest", tuple(Path(each).name for each in done))
    return {"keystore": str(section.file), "made": made, "encrypted": done}


def _kept(config: SiteConfig) -> KeptKeys:
    """Of this site; the certificate is last: with it the site is there."""
    section, kit, party = required(config.keystore, config.file), config.kit, config.party
    return KeptKeys(
        party, section.file, {KEY_FILE: kit / KEY_FILE, IDENTITY_FILE: config.identity},
        {name: kit / name for name in (AUTHORITY_FILE, CERTIFICATE_FILE)},
        lambda: open_keystore(section, party), section.read, "fed-site keystore",
    )  # fmt: skip


def rotate(config: SiteConfig, unlock: str) -> Json:
    """Wrap the data key under a new passphrase; keys and journal are not touched. unlock: where the new passphrase is,
    as in [keystore]. Raises BadInput, Refused."""
    kept = _kept(config)
    require_stopped(config)
    new = KeystoreSection(unlock=unlock).placed(config.file, "--new")
    return keystore_backup.rotate(
        kept, new, lambda: note(config, "a new passphrase", (kept.keystore.name,))
    )


def back_up(config: SiteConfig, out: Path) -> Json:
    """Write a backup of the site's keys. Raises AlreadyExists, BadInput, also for a key in clear."""
    kept = _kept(config)
    config.read_kit()
    return keystore_backup.back_up(kept, out)


def restore(config: SiteConfig, path: Path) -> Json:
    """Put the files of a backup in their places. What is there already must be the same. Raises AlreadyExists,
    BadInput, Refused; then nothing was written."""
    kept = _kept(config)
    require_stopped(config)
    found = keystore_backup.restore(kept, path)
    if found["restored"]:
        names = tuple(Path(each).name for each in found["restored"])
        note(config, "restored from a backup", names)
    return found


def note(config: SiteConfig, word: str, files: tuple[str, ...]) -> None:
    """Record in this site's audit trail what was done with its private files. Raises BadInput, StoreProblem."""
    opened = {"party": config.party, "software": SOFTWARE}
    with AuditTrail.open(config.folder, SiteSigner(config.read_identity()), opened) as trail:
        trail.record("key", what="private files", word=word, files=files)


def require_stopped(config: SiteConfig) -> None:
    """Raise Refused while this site runs."""
    if runs(config.folder):
        raise Refused(
            f"site {config.site}: found its process running, expected it stopped: it has the files open",
            remedy="stop fed-site run, and start it again afterwards",
        )


def encrypted_lines(found: Json) -> Iterator[str]:
    """What `encrypt` did, in words."""
    yield from encrypted_files.encrypted_lines(found)
    if found["made"]:
        yield "next: fed-site keystore backup FILE, and a copy of the passphrase elsewhere: if one is lost, this site"
        yield "  has to join again, with new keys"


def keystore_status(config: SiteConfig) -> Json:
    """What is encrypted, and with which keystore; needs no passphrase. Raises BadInput, StoreProblem."""
    files = private_files(config)
    path, running = config.folder / JOURNAL_FILE, runs(config.folder)
    journal = PrivateFile(JOURNAL_FILE, path, IN_USE) if running else journal_of(config)
    others = [states_of(config), ledger_of(config), journal]
    found = keystore_json(config.keystore, [*files, *others])
    clear = any(each.state == CLEAR for each in others)
    whole = found["keystore"] is not None and not clear and {f.state for f in files} == {ENCRYPTED}
    return {"site": config.site, **found, "at_rest": whole}


def keystore_lines(found: Json) -> Iterator[str]:
    """The status in words."""
    yield from encrypted_files.keystore_lines(found)
    if found["file"] is not None and not found["at_rest"]:
        yield "hint: fed-site keystore encrypt"
