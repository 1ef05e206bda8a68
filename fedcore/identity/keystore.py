"""The keystore of a party: one random data key, wrapped under a passphrase, from which the passwords of its private
key files are derived.

`cryptography` 50 encrypts a PKCS8 key with PBKDF2 of 2048 iterations (`BestAvailableEncryption`): against a passphrase
that a person chose, a guess costs 1 ms. So the passphrase goes through scrypt (RFC 7914; n = 2^17, r = 8: 128 MiB and
0.5 s a guess) and opens the data key, which is sealed with ChaCha20-Poly1305. The key files stay standard encrypted
PKCS8, which OpenSSL reads itself, so that no key in clear is ever in a temporary file. Their passwords have 256 bits,
derived from the data key: no key derivation has to slow down guessing these.

Invariants: everything in the keystore's file is authenticated, its scrypt parameters too, and weaker ones are refused.
A password opens one file of one party. A changed passphrase changes this file only. The checksum finds damage before
a passphrase is asked for; only the seal finds an attacker's change.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from fedcore.errors import BadInput, EnvelopeRefused
from fedcore.files import stamp_of
from fedcore.identity.kit import read_private, write_private
from fedcore.identity.passphrase import KeystoreSection
from fedcore.secagg.crypto.secret import Secret, SecretBytes
from fedcore.secagg.crypto.symmetric import (
    BOX_OVERHEAD,
    KEY_BYTES,
    Label,
    derive,
    open_box,
    seal_box,
)

VERSION = 1
LEAST_N, MOST_N = 1 << 17, 1 << 20
"""Of scrypt's cost n: below, guesses are too cheap; above, opening takes more than 1 GiB of memory."""

SCRYPT_R, SCRYPT_P, SALT_BYTES = 8, 1, 32
KEYSTORE_FILE = "keystore.json"
RESTORE = "restore it from a backup of this party: without it the key files cannot be opened"


@dataclass(frozen=True)
class KeystoreFile:
    """A keystore's file as it was read. party: whose keys; made: ISO 8601, UTC; n: of scrypt; salt, wrapped: hex;
    checksum: hex SHA-256 of all the rest."""

    version: int
    party: str
    made: str
    n: int
    salt: str
    wrapped: str
    checksum: str

    @classmethod
    def read(cls, path: Path) -> KeystoreFile:
        """Raises BadInput for one that is missing, damaged, readable by others, or of another version."""
        if not path.exists():
            raise BadInput(
                f"{path}: found no such file, expected the keystore that opens the private keys",
                remedy="`keystore encrypt` makes it; if keys are encrypted already, restore it from a backup",
            )
        return cls.parse(read_private(path), str(path))

    @classmethod
    def parse(cls, data: bytes, where: str) -> KeystoreFile:
        """Raises BadInput for a damaged one, or of another version. where: for messages."""
        try:
            tables = json.loads(data)
            if tables["version"] != VERSION:
                raise BadInput(
                    f"{where}: found version {tables['version']!r}, expected {VERSION}",
                    remedy="use the Fedcore that wrote it, or a newer one",
                )
            found = cls(**tables)
            sizes = len(bytes.fromhex(found.salt)), len(bytes.fromhex(found.wrapped))
            whole = (
                sizes == (SALT_BYTES, KEY_BYTES + BOX_OVERHEAD)
                and found.checksum == found._sum()
                and LEAST_N <= found.n <= MOST_N
                and found.n.bit_count() == 1
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            whole = False
        if not whole:
            raise BadInput(f"{where}: found it damaged, expected a keystore", remedy=RESTORE)
        return found

    def to_bytes(self) -> bytes:
        """The file, with its checksum."""
        whole = replace(self, checksum=self._sum())
        return json.dumps(asdict(whole), indent=2).encode() + b"\n"

    def header(self) -> bytes:
        """What the seal covers beside the data key."""
        rest = {k: v for k, v in asdict(self).items() if k not in {"wrapped", "checksum"}}
        return json.dumps(rest, sort_keys=True).encode()

    def _sum(self) -> str:
        return hashlib.sha256(self.header() + self.wrapped.encode()).hexdigest()

    def wrapping_key(self, passphrase: SecretBytes) -> bytes:
        """32 bytes; takes half a second."""
        kdf = Scrypt(bytes.fromhex(self.salt), KEY_BYTES, self.n, SCRYPT_R, SCRYPT_P)
        return kdf.derive(passphrase.reveal())


class Keystore(Secret):
    """A keystore that was opened. Prints redacted."""

    __slots__ = ("_data_key", "_party")

    def __init__(self, party: str, data_key: bytes) -> None:
        self._party, self._data_key = party, data_key

    @classmethod
    def create(cls, path: Path, party: str, passphrase: SecretBytes) -> Keystore:
        """A new data key, wrapped in a new file. Raises AlreadyExists, BadInput."""
        found = cls(party, os.urandom(KEY_BYTES))
        write_private(path, SecretBytes(found.wrapped(passphrase).to_bytes()))
        return found

    def wrapped(self, passphrase: SecretBytes) -> KeystoreFile:
        """The file that this passphrase opens; takes half a second."""
        made, salt = datetime.now(UTC).isoformat(timespec="seconds"), os.urandom(SALT_BYTES).hex()
        found = KeystoreFile(VERSION, self._party, made, LEAST_N, salt, "", "")
        sealed = seal_box(found.wrapping_key(passphrase), self._data_key, found.header())
        return replace(found, wrapped=sealed.hex())

    @classmethod
    def load(cls, path: Path, party: str, passphrase: SecretBytes) -> Keystore:
        """The keystore in a file. Raises BadInput, also for another party's and for another passphrase."""
        return cls.unwrap(KeystoreFile.read(path), party, passphrase, str(path))

    @classmethod
    def unwrap(
        cls, found: KeystoreFile, party: str, passphrase: SecretBytes, where: str
    ) -> Keystore:
        """The keystore of a file that was read; otherwise as `load`. where: for messages."""
        if found.party != party:
            raise BadInput(
                f"{where}: found the keystore of {found.party}, expected that of {party}",
                remedy="each party has a keystore of its own: restore the right file",
            )
        try:
            sealed = bytes.fromhex(found.wrapped)
            data_key = open_box(
                found.wrapping_key(passphrase), sealed, found.header(), sender="keystore"
            )
        except EnvelopeRefused:
            raise BadInput(
                f"{where}: found a keystore that this passphrase does not open",
                remedy="look at the passphrase, its spaces too; a restored file needs the passphrase of its time",
            ) from None
        return cls(party, data_key)

    def password(self, name: str) -> SecretBytes:
        """Of a private file: 64 characters. name: what the file is, as `key.pem`."""
        key = derive(self._data_key, Label.KEY_FILE, self._party.encode(), name.encode())
        return SecretBytes(key.hex().encode())

    def seal_backup(self, content: bytes) -> bytes:
        """Encrypt a backup: 32 bytes of salt, then the box."""
        salt = os.urandom(SALT_BYTES)
        return salt + seal_box(self._backup_key(salt), content, self._party.encode())

    def open_backup(self, sealed: bytes) -> bytes:
        """The inverse. Raises EnvelopeRefused."""
        salt, box = sealed[:SALT_BYTES], sealed[SALT_BYTES:]
        return open_box(self._backup_key(salt), box, self._party.encode(), sender="backup")

    def _backup_key(self, salt: bytes) -> bytes:
        return derive(self._data_key, Label.BACKUP, salt=salt)

    def files_key(self) -> SecretBytes:
        """32 bytes: what the party's files are encrypted with."""
        return SecretBytes(derive(self._data_key, Label.FILES, self._party.encode()))

    def journal_key(self) -> SecretBytes:
        """32 bytes: what the party's journal is encrypted with."""
        return SecretBytes(derive(self._data_key, Label.JOURNAL, self._party.encode()))


_opened: dict[tuple[Path, tuple[int, ...], str], Keystore] = {}
"""Of this process: a passphrase is asked for once, and a variable that has it is removed."""


def create_keystore(section: KeystoreSection, party: str) -> Keystore:
    """A new keystore where a party's [keystore] names one. Raises AlreadyExists, BadInput."""
    found = Keystore.create(section.file, party, section.read(new=True))
    _opened[_version(section)] = found
    return found


def open_keystore(section: KeystoreSection, party: str) -> Keystore:
    """The keystore that a party's [keystore] names, opened once in a process. Raises BadInput."""
    KeystoreFile.read(section.file)  # its faults come before a question at the terminal
    known = _version(section)
    if known not in _opened:
        _opened[known] = Keystore.load(section.file, party, section.read())
    return _opened[known]


def _version(section: KeystoreSection) -> tuple[Path, tuple[int, ...], str]:
    return section.file, stamp_of(section.file), section.unlock
