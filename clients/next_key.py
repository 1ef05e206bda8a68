"""A site's next TLS key: made here, and taken into use together with the certificate that is issued for it.

Invariant: key and certificate in use always fit. The two new ones are on disk beside them first, then each takes its
place, the key before the certificate; killed in between, the next start of the site finishes it.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from fedcore_clients.config import SiteConfig

from fedcore.errors import BadInput
from fedcore.files import write_atomic
from fedcore.files.disk import sync_folder
from fedcore.identity.kit import (
    CERTIFICATE_FILE,
    KEY_FILE,
    Kit,
    key_pem,
    read_key,
    write_private,
)

NEXT_KEY, NEXT_CERTIFICATE = "key-next.pem", "certificate-next.pem"


def make_next_key(config: SiteConfig) -> bool:
    """Make the next key, encrypted as the present one is; False where one waits already. Raises BadInput."""
    path = config.kit / NEXT_KEY
    if path.exists():
        return False
    write_private(path, key_pem(ec.generate_private_key(ec.SECP256R1()), config.password(KEY_FILE)))
    return True


def next_key(kit: Kit) -> ec.EllipticCurvePrivateKey | None:
    """The key that waits for its certificate, if there is one. Raises BadInput."""
    path = kit.key_path.with_name(NEXT_KEY)
    return _read(path, kit) if path.exists() else None


def key_in_use(kit: Kit) -> ec.EllipticCurvePrivateKey:
    """The key of this kit. Raises BadInput."""
    return _read(kit.key_path, kit)


def _read(path: Path, kit: Kit) -> ec.EllipticCurvePrivateKey:
    key = read_key(path, kit.password)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadInput(f"{path}: found a key of another kind, expected EC P-256")
    return key


def take_next(folder: Path, certificate: bytes) -> None:
    """The certificate (PEM) that was issued for the next key, and this key, are the site's. Raises OSError."""
    write_atomic(folder / NEXT_CERTIFICATE, certificate)
    finish(folder)


def finish(folder: Path) -> None:
    """Do the rest of a `take_next` that was interrupted; no-op otherwise. Raises OSError."""
    if not (folder / NEXT_CERTIFICATE).exists():
        return
    if (folder / NEXT_KEY).exists():
        (folder / NEXT_KEY).replace(folder / KEY_FILE)
        sync_folder(folder)
    (folder / NEXT_CERTIFICATE).replace(folder / CERTIFICATE_FILE)
    sync_folder(folder)
