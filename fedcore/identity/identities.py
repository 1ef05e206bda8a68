"""Signing keys on disk, and the roster that pins their public halves.

`identity.pem` has a site's Ed25519 key (PKCS8, RFC 8410), made at the site and never sent.
`roster.toml` has the public keys of all sites, the same file for every party:

    [sites]
    cleveland = { identity = "c0ffee..." }   # 32 bytes, hexadecimal or base64

Invariant: the order of the file is the order of the roster, which its digest covers (PROTOCOL E), and
no key is in it twice. The plan decides how many sites a round needs.
"""

import base64
import binascii
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedcore.errors import BadInput, RosterRefused
from fedcore.files import write_atomic
from fedcore.files.toml import read_tables
from fedcore.identity.kit import key_pem, read_key, write_private
from fedcore.identity.peer import check_name, check_sites
from fedcore.secagg.crypto.identity_key import PUBLIC_BYTES, IdentityKey, roster_digest
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.types import SiteId

IDENTITY_FILE = "identity.pem"
ROSTER_FILE = "roster.toml"


def create_identity(path: Path, password: SecretBytes | None = None) -> IdentityKey:
    """Draw a signing key and write it, encrypted where there is a password. Raises AlreadyExists, BadInput."""
    raw = os.urandom(PUBLIC_BYTES)
    write_private(path, key_pem(Ed25519PrivateKey.from_private_bytes(raw), password))
    return IdentityKey(raw)


def read_identity(path: Path, password: SecretBytes | None = None) -> IdentityKey:
    """The signing key in a file. password: of an encrypted one. Raises BadInput."""
    key = read_key(path, password)
    if not isinstance(key, Ed25519PrivateKey):
        raise BadInput(
            f"{path}: found a key of another kind, expected Ed25519",
            remedy="the identity key is not the certificate's key",
        )
    return IdentityKey(key.private_bytes_raw())


def write_roster(path: Path, roster: Mapping[SiteId, bytes]) -> None:
    """Write public keys of sites, in the mapping's order. Raises BadInput, RosterRefused."""
    roster_digest(roster)
    write_atomic(path, sites_toml(roster).encode())


def sites_toml(roster: Mapping[SiteId, bytes]) -> str:
    """The table [sites], in the mapping's order. Raises BadInput."""
    lines = [
        f'"{check_name("site", site)}" = {{ identity = "{key.hex()}" }}\n'
        for site, key in roster.items()
    ]
    return "".join(["[sites]\n", *lines])


def read_roster(path: Path) -> dict[SiteId, bytes]:
    """{site: 32-byte public key} of a static roster, in the file's order. Raises BadInput that names the entry."""
    found = read_tables(path)
    if set(found) != {"sites"}:
        raise BadInput(
            f"{path}: found {', '.join(map(repr, found)) or 'nothing'}, expected one table [sites]"
        )
    return sites_of(found, str(path))


def sites_of(tables: Mapping[str, Any], where: str) -> dict[SiteId, bytes]:
    """{site: 32-byte public key} of a roster's tables, in their order. Raises BadInput that names the entry."""
    sites = tables.get("sites")
    if not isinstance(sites, dict):
        raise BadInput(f"{where}: found {_kind(sites)} as sites, expected one table [sites]")
    roster = {
        SiteId(check_name(f"{where}: sites", name)): _public(f"{where}: sites.{name}", entry)
        for name, entry in sites.items()
    }
    check_sites(roster, f"{where}: sites", deployed=True)
    try:
        roster_digest(roster)
    except RosterRefused as refused:
        raise BadInput(
            f"{where}: sites.{refused.fault}: found {refused.found}, expected {refused.expected}",
            remedy="each site makes its own identity key and hands out only the public half",
        ) from None
    return roster


def _public(where: str, entry: Any) -> bytes:
    if not isinstance(entry, dict) or set(entry) != {"identity"}:
        raise BadInput(f"{where}: found {_kind(entry)}, expected {{ identity = PUBLIC_KEY }} alone")
    text = entry["identity"]
    if isinstance(text, str):
        if re.fullmatch("[0-9A-Fa-f]{64}", text):
            return bytes.fromhex(text)
        try:
            raw = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        if len(raw) == PUBLIC_BYTES:
            return raw
    raise BadInput(
        f"{where}.identity: found {_kind(text)}, expected 32 bytes as 64 hexadecimal digits or in base64"
    )


def _kind(value: object) -> str:
    """A description that does not quote the value: it may be a private key, pasted by mistake."""
    return f"a text of {len(value)} characters" if isinstance(value, str) else type(value).__name__
