"""`fed-site keystore`: encrypt this site's private keys and its journal at rest, and show which of them are.

Invariant: `encrypt` may be killed at any moment and is repeated with the same command. Until it is done, `fed-site
run` refuses to start, and names the file that is still in clear.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedcore_clients.config import JOURNAL_FILE, SiteConfig
from fedcore_clients.status import runs

from fedcore.audit.keys import SiteSigner
from fedcore.audit.trail import AuditTrail
from fedcore.errors import Refused
from fedcore.identity import encrypted_files
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
)
from fedcore.identity.identities import IDENTITY_FILE
from fedcore.identity.kit import KEY_FILE
from fedcore.store.sealing import RowSealer, encrypt_journal, is_sealed
from fedcore.types import Json
from fedcore.wire.frames import SOFTWARE


def private_files(config: SiteConfig) -> list[PrivateFile]:
    """The site's key files, as they are. Raises BadInput."""
    return key_files({KEY_FILE: config.kit / KEY_FILE, IDENTITY_FILE: config.identity})


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
    section = required(config.keystore, config.file)
    require_stopped(config)
    files, journal = private_files(config), journal_of(config)
    store, made, done = encrypt_keys(section, config.party, files, [journal])
    if journal.state != MISSING:
        sealer = RowSealer(store.journal_key())
        done += [str(journal.path)] if encrypt_journal(journal.path, config.party, sealer) else []
    if done and config.identity.exists():
        note(config, "encrypted at rest", tuple(Path(each).name for each in done))
    return {"keystore": str(section.file), "made": made, "encrypted": done}


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
    found = keystore_json(config.keystore, [*files, journal])
    states = {each.state for each in files}
    whole = found["keystore"] is not None and journal.state != CLEAR and states == {ENCRYPTED}
    return {"site": config.site, **found, "at_rest": whole}


def keystore_lines(found: Json) -> Iterator[str]:
    """The status in words."""
    yield from encrypted_files.keystore_lines(found)
    if found["file"] is not None and not found["at_rest"]:
        yield "hint: fed-site keystore encrypt"
