"""A site's folder with keys of its own and a [keystore], and a cheap scrypt for tests."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from fedcore_clients.config import SiteConfig, read_config

from fedcore.identity import keystore
from fedcore.identity.authority import Authority
from fedcore.identity.identities import create_identity, write_roster
from fedcore.secagg.crypto.identity_key import IdentityKey

PASSPHRASE = "correct horse battery staple"
AUTHORITY = Authority.create("heart", datetime.now(UTC))


def cheap_scrypt(monkeypatch):
    """Lower the cost of a guess, which is half a second otherwise."""
    monkeypatch.setattr(keystore, "LEAST_N", 1 << 4)


def passphrase_file(folder: Path, text: str = PASSPHRASE) -> Path:
    """In a folder that is made."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "passphrase"
    path.write_text(f"{text}\n")
    path.chmod(0o600)
    return path


def new_site(folder: Path, unlock: str | None = None, name: str = "va") -> SiteConfig:
    """A site whose keys are in clear; its [keystore] names a file beside the folder unless `unlock` is given."""
    unlock = unlock or f"file:{passphrase_file(folder.parent / 'secrets')}"
    AUTHORITY.issue("site", name, datetime.now(UTC)).save(folder / "kit")
    pins = {name: create_identity(folder / "identity.pem").public}
    write_roster(folder / "roster.toml", pins | {n: IdentityKey().public for n in ("b", "c")})
    (folder / "site.toml").write_text(
        f'site = "{name}"\ncoordinator = "127.0.0.1:1"\nkit = "kit"\nidentity = "identity.pem"\n'
        f'roster = "roster.toml"\nfolder = "state"\n[keystore]\nunlock = {unlock!r}\n'
    )
    return read_config(folder / "site.toml")
