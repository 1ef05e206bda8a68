"""The files with which one party authenticates: its certificate, its key, the authority.

Invariant: a key file is readable by its owner (and at most by its group, as mounted secrets are), is never
overwritten, and is written atomically. Where it is encrypted (`identity/keystore.py`), it is decrypted in memory
only. A kit whose key does not belong to its certificate does not load.
"""

from __future__ import annotations

import logging
import os
import ssl
import stat
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from fedcore.errors import AlreadyExists, BadInput, CertificateRefused, FedcoreError
from fedcore.files import WatchedFile
from fedcore.identity.peer import Peer, peer_of, read_certificate
from fedcore.identity.verify import check_certificate
from fedcore.secagg.crypto.secret import SecretBytes

LOG = logging.getLogger("fedcore.identity")

AUTHORITY_FILE = "authority.pem"
CERTIFICATE_FILE = "certificate.pem"
KEY_FILE = "key.pem"

_TOO_OPEN = stat.S_IRWXO | stat.S_IWGRP | stat.S_IXGRP
_LARGEST = 1 << 20
"""Bytes of a file; a certificate has about a thousand."""


@dataclass(frozen=True)
class PublicKit:
    """A party's certificate and its authority, without the key: enough to verify what the authority signed."""

    peer: Peer
    authority_pem: bytes
    certificate_pem: bytes

    @classmethod
    def load(cls, folder: Path) -> PublicKit:
        """Those in a folder. Raises BadInput, CertificateRefused, naming the file."""
        authority, certificate = folder / AUTHORITY_FILE, folder / CERTIFICATE_FILE
        authority_pem, certificate_pem = read_limited(authority), read_limited(certificate)
        for path, pem in ((authority, authority_pem), (certificate, certificate_pem)):
            try:
                x509.load_pem_x509_certificates(pem)
            except ValueError:
                raise BadInput(f"{path}: found no certificate, expected one in PEM form") from None
        try:
            peer = peer_of(certificate_pem)
        except CertificateRefused as refused:
            raise CertificateRefused(
                f"{certificate}: {refused}", check=refused.check, remedy=refused.remedy
            ) from None
        return cls(peer, authority_pem, certificate_pem)


@dataclass(frozen=True)
class Kit:
    """A party's files as they were when read. peer: the party that the certificate names; key_pem: in clear; password:
    what opens the key's file, where that is encrypted."""

    peer: Peer
    authority_pem: bytes
    certificate_pem: bytes
    key_pem: SecretBytes
    certificate_path: Path
    key_path: Path
    password: SecretBytes | None = None

    @classmethod
    def load(cls, folder: Path, password: SecretBytes | None = None) -> Kit:
        """The kit in a folder. password: of an encrypted key. Raises BadInput, CertificateRefused, naming the file."""
        certificate, key = folder / CERTIFICATE_FILE, folder / KEY_FILE
        private, public = read_key(key, password), PublicKit.load(folder)
        if read_certificate(public.certificate_pem).public_key() != private.public_key():
            raise BadInput(
                f"{key}: found the key of another certificate, expected that of {certificate}",
                remedy="a certificate and its key are issued together; copy both files",
            )
        return cls(
            public.peer, public.authority_pem, public.certificate_pem, key_pem(private),
            certificate, key, password,
        )  # fmt: skip

    def check(self, role: str, now: datetime) -> None:
        """Every check of the party's own certificate, for this role. Raises CertificateRefused."""
        authority, federation = self.authority_pem, self.peer.federation
        check_certificate(
            self.certificate_pem, authority, federation=federation, role=role, now=now
        )

    def load_into(self, context: ssl.SSLContext) -> None:
        """Use certificate and key for TLS, from their files: OpenSSL decrypts the key itself. Raises OSError."""
        password = self.password.reveal() if self.password is not None else ""  # "": it never asks
        context.load_cert_chain(self.certificate_path, self.key_path, password)


class KitFile:
    """A kit whose files may be replaced while a process runs; `current` is the one to use for new connections."""

    def __init__(self, kit: Kit) -> None:
        self.current = kit
        self._file = WatchedFile(kit.certificate_path)
        self._file.known()

    def refresh(self) -> bool:
        """Reload the kit if its certificate's file changed; True if it did. Costs one stat.

        A kit that cannot be loaded, or is of another party, is logged once and changes nothing.
        """
        before = self.current
        if not self._file.changed():
            return False
        try:
            found = Kit.load(before.certificate_path.parent, before.password)
            found.check(before.peer.role, datetime.now(UTC))
        except FedcoreError as error:
            LOG.error("%s; the certificate read before stays in use", error)  # noqa: TRY400 - one line
            return False
        if (found.peer.role, found.peer.name) != (before.peer.role, before.peer.name):
            LOG.error(
                "%s: found it of %s; the one before stays in use",
                before.certificate_path,
                found.peer,
            )
            return False
        self.current = found
        LOG.info("new certificate of %s, until %s", found.peer, f"{found.peer.ends:%Y-%m-%d %H:%M}")
        return True


def read_key(path: Path, password: SecretBytes | None = None) -> PrivateKeyTypes:
    """A private key in PEM form. password: of an encrypted one. Raises BadInput, also for one others can read, and for
    one in clear where there is a password."""
    data = read_private(path)
    try:
        return serialization.load_pem_private_key(
            data, password.reveal() if password is not None else None
        )
    except TypeError:
        if password is None:
            raise BadInput(
                f"{path}: found a key under a passphrase, expected one without",
                remedy="[keystore] in site.toml, federation.toml or operator.toml names what opens it "
                "(docs/enrolment.md)",
            ) from None
        raise BadInput(
            f"{path}: found a key in clear, expected it encrypted, as [keystore] says",
            remedy="`keystore encrypt` of fed-site, or of fed-coordinator, encrypts it",
        ) from None
    except ValueError:
        if is_encrypted(data):
            raise BadInput(
                f"{path}: found a key that the keystore does not open, expected one of this keystore",
                remedy="it is damaged, or of another keystore: restore both from one backup, or join with new keys",
            ) from None
        raise BadInput(f"{path}: found no private key, expected one in PEM form") from None


def is_encrypted(data: bytes) -> bool:
    """Whether a key's file is encrypted."""
    return b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in data


def read_private(path: Path) -> bytes:
    """A file with a key. Raises BadInput, also for one others can read."""
    data = read_limited(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & _TOO_OPEN:
        raise BadInput(
            f"{path}: found mode {mode:04o}, expected 0600: others on this machine can read the key",
            remedy=f"chmod 600 {path}",
        )
    return data


def key_pem(key: PrivateKeyTypes, passphrase: SecretBytes | None = None) -> SecretBytes:
    """A private key in PEM form (PKCS8), encrypted where there is a passphrase."""
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    sealed: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        sealed = serialization.BestAvailableEncryption(passphrase.reveal())
    return SecretBytes(key.private_bytes(encoding, form, sealed))


def write_private(path: Path, secret: SecretBytes) -> None:
    """Write a file with mode 0600 atomically. Raises AlreadyExists, BadInput."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with suppress(FileNotFoundError):
            beside.unlink()  # left by a killed process with the same id
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(secret.reveal())
                file.flush()
                os.fsync(descriptor)
            os.link(beside, path)  # unlike a rename, it never replaces an existing key
        finally:
            beside.unlink()
    except FileExistsError:
        raise AlreadyExists(
            f"{path}: found a key already, expected none: it is never overwritten",
            remedy="keep it, or move it away first",
        ) from None
    except OSError as error:
        raise BadInput(f"{path}: it cannot be written ({error.strerror})") from error


def read_limited(path: Path, expected: str = "a certificate or a key") -> bytes:
    """A file of at most _LARGEST bytes. expected: what it should be. Raises BadInput."""
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise BadInput(f"{path}: it cannot be read ({error.strerror})") from error
    if len(data) > _LARGEST:
        raise BadInput(f"{path}: found more than {_LARGEST} bytes, expected {expected}")
    return data
