"""federation.toml: the coordinator of a federation, and its limits. Paths in it are relative to its folder.

name = "hospitals"          roster = "roster.toml"        kit = "kit"         folder = "state"
listen = ["::"]             port = 7443                   revoked = "revoked.txt"
keepalive_seconds = 20      # a ping on a connection that was quiet for so long; at most 60
metrics_port = 9443         # Prometheus counters, on 127.0.0.1 only; off without it
database = "postgresql://user@host/name"   # for the journal; without it an SQLite file in `folder`
database_file = "database-url"             # in place of it: a file with the URL, for one with a password
enrol_port = 7444           # where sites join (`fed-coordinator invite`); off without it
[enrolment]                 host = "hub.example.org"      approval = "automatic"  # or "manual"
authority = "authority"     unlock = "file:/run/secrets/authority"          certificate_days = 90
key = "pkcs11:token=..."    # the authority's key is in a token, and `unlock` gives its PIN
[keystore]                  unlock = "file:/run/secrets/hub-passphrase"     # key, journal, models: encrypted at rest
[limits]                    stage_seconds, gather_seconds, minimum_sites, enough_vectors, ...

operator.toml: the coordinator of an operator's commands.

coordinator = "hub.example.org:7443"    kit = "kit"    proxy = "none"
[keystore]                  unlock = "prompt"           # kit/key.pem encrypted at rest
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from fedcore.errors import BadInput
from fedcore.files.toml import Section, read_toml
from fedcore.identity.addresses import endpoint
from fedcore.identity.encrypted_files import required
from fedcore.identity.keystore import Keystore, open_keystore
from fedcore.identity.keystore_backup import KeptKeys
from fedcore.identity.kit import (
    AUTHORITY_FILE,
    CERTIFICATE_FILE,
    KEY_FILE,
    Kit,
    read_private,
)
from fedcore.identity.passphrase import KeystoreSection
from fedcore.identity.preflight import CoordinatorAddress
from fedcore.identity.proxies import ProxySection
from fedcore.identity.tokens import TokenUri
from fedcore.store.sealed_files import FileSealer
from fedcore.wire.calls import KEEPALIVE_SECONDS, MOST_KEEPALIVE

if TYPE_CHECKING:
    from fedcore.store.sealing import RowSealer

JOURNAL_FILE = "journal.sqlite"
OPERATOR_FILE = "operator.toml"
OPERATOR_VARIABLE = "FEDCORE_OPERATOR"
METRICS_FILE = "metrics.jsonl"
"""Of a result: public metrics, one row a release (`fedcore/files/` names the other files)."""


class LimitsSection(Section):
    """[limits]: timeouts in seconds, the smallest cohort, disk space, fold workers.

    enough_vectors: over-selection: so many vectors of a round end the wait for those of slower sites.
    most_...: what operators may submit: rounds, epochs and rows of one step of one job, jobs that are not over,
    and jobs that are kept of one operator's certificates, over or not.
    """

    stage_seconds: float = Field(default=600.0, gt=0)
    gather_seconds: float = Field(default=60.0, ge=0)
    grace_seconds: float = Field(default=60.0, ge=0)
    enough_seconds: float = Field(default=86_400.0, gt=0)
    minimum_sites: int = Field(default=3, ge=3)
    enough_vectors: int | None = None
    spool_bytes: int | None = Field(default=None, ge=1 << 20)
    fold_workers: int = Field(default=1, ge=1, le=64)
    most_rounds: int = Field(default=10_000, ge=1)
    most_epochs: int = Field(default=1_000, ge=1)
    most_batch: int = Field(default=1 << 20, ge=1)
    most_queued: int = Field(default=100, ge=1)
    most_kept: int = Field(default=1_000, ge=1)


class EnrolmentSection(Section):
    """[enrolment]: how sites join. host: by which they reach the coordinator. approval: whether a request with a valid
    token is granted at once, which needs the authority's key open, or waits for `fed-coordinator approve`.

    authority: folder of the authority, where it is on this machine; unlock: where the passphrase of its key is, as in
    [keystore]; passphrase_file: the same as unlock = "file:..."; key: the URI of a key in a token, where `unlock` gives
    the PIN (`identity/tokens.py`). certificate_days: how long a site's certificate is valid.
    """

    host: str = ""
    approval: Literal["automatic", "manual"] = "automatic"
    authority: Path | None = None
    passphrase_file: Path | None = None
    unlock: str | None = Field(default=None, repr=False)
    key: str | None = Field(default=None, repr=False)
    certificate_days: float = Field(default=90.0, gt=0, le=3650)

    @property
    def token(self) -> TokenUri | None:
        """Where the authority's key is, if it is in a token. Raises BadInput."""
        return None if self.key is None else TokenUri.parse(self.key, "enrolment.key")

    def placed(self, path: Path) -> "EnrolmentSection":
        """With paths that count from the folder of the file that it stands in. Raises BadInput."""
        if self.unlock is not None and self.passphrase_file is not None:
            raise BadInput(
                f"{path.name}: enrolment: found unlock and passphrase_file, expected one of them",
                remedy='keep unlock = "file:PATH" and remove passphrase_file',
            )
        if self.key is not None:
            TokenUri.parse(self.key, f"{path.name}: enrolment.key")
        unlock = self.unlock or (self.passphrase_file and f"file:{self.passphrase_file}")
        if unlock:
            placed = KeystoreSection(unlock=unlock).placed(path, f"{path.name}: enrolment.unlock")
            unlock = placed.unlock
        authority = self.authority and path.resolve().parent / self.authority
        return self.model_copy(
            update={"authority": authority, "unlock": unlock or None, "passphrase_file": None}
        )


class FederationConfig(Section):
    """A federation as its coordinator runs it; paths are absolute. keepalive_seconds: between pings on a quiet
    connection."""

    missing = "`fed-coordinator init NAME --host HOST` makes a federation; --config FILE names its federation.toml"
    name: str
    roster: Path
    kit: Path
    folder: Path
    listen: tuple[str, ...] = ("::",)
    port: int = Field(default=7443, ge=0, lt=65536)
    keepalive_seconds: float = Field(default=KEEPALIVE_SECONDS, ge=0.2, le=MOST_KEEPALIVE)
    metrics_port: int | None = Field(default=None, ge=0, lt=65536)
    enrol_port: int | None = Field(default=None, ge=0, lt=65536)
    revoked: Path | None = None
    database: str | None = Field(default=None, repr=False)
    database_file: Path | None = None
    enrolment: EnrolmentSection = EnrolmentSection()
    keystore: KeystoreSection | None = None
    limits: LimitsSection = LimitsSection()

    @property
    def party(self) -> str:
        """The party, as its journal and its keystore name it."""
        return f"coordinator of {self.name}"

    def opened_keystore(self) -> Keystore | None:
        """What key, journal and models are encrypted with; None where they are in clear. Raises BadInput."""
        return None if self.keystore is None else open_keystore(self.keystore, self.party)

    def read_kit(self) -> Kit:
        """Certificate and key. Raises BadInput, CertificateRefused."""
        found = self.opened_keystore()
        return Kit.load(self.kit, None if found is None else found.password(KEY_FILE))

    def row_sealer(self) -> "RowSealer | None":
        """What the contents of the journal are encrypted with, in `folder` or on a server. Raises BadInput."""
        from fedcore.store.sealing import (
            RowSealer,
        )  # not for operators' commands: SQLAlchemy takes long

        found = self.opened_keystore()
        return None if found is None else RowSealer(found.journal_key())

    def file_sealer(self) -> FileSealer | None:
        """What the models below `jobs/` are encrypted with. Raises BadInput."""
        found = self.opened_keystore()
        return None if found is None else FileSealer(found.files_key())


def read_config(path: Path) -> FederationConfig:
    """The configuration of a file. Raises BadInput with the key's path, and UnknownName."""
    paths = ("roster", "kit", "folder", "revoked", "database_file")
    found = read_toml(FederationConfig, path, paths=paths)
    placed = found.enrolment.placed(path)
    keystore = found.keystore and found.keystore.placed(path, f"{path.name}: keystore.unlock")
    more = {"enrolment": placed, "keystore": keystore, "database": _database(path, found)}
    return found.model_copy(update=more)


def kept_coordinator(config: FederationConfig, path: Path) -> KeptKeys:
    """What a backup of the coordinator's keys consists of. path: of federation.toml. Raises BadInput without a
    [keystore]."""
    return _kept(required(config.keystore, path), config.party, config.kit)


def _kept(section: KeystoreSection, party: str, kit: Path) -> KeptKeys:
    return KeptKeys(
        party, section.file, {KEY_FILE: kit / KEY_FILE},
        {name: kit / name for name in (AUTHORITY_FILE, CERTIFICATE_FILE)},
        lambda: open_keystore(section, party), section.read, "fed-coordinator keystore",
    )  # fmt: skip


def _database(path: Path, found: FederationConfig) -> str | None:
    """The URL of the database; None for the SQLite file. Raises BadInput."""
    if found.database is None and found.database_file is None:
        return None
    if found.database is not None and found.database_file is not None:
        raise BadInput(f"{path.name}: found database and database_file, expected one of them")
    # A URL with a password is a key: only this user may read the file.
    if found.database_file is not None:
        url = read_private(found.database_file).decode(errors="replace").strip()
    else:
        url = found.database or ""
        if re.search(r"//[^/@]*:[^/@]*@", url):
            read_private(path)
    return url


class OperatorConfig(CoordinatorAddress):
    """The coordinator that an operator calls, and the folder of the certificate. keystore: what its key is encrypted
    with."""

    missing = "`fed-coordinator init` writes one into operator/; --operator FILE or $FEDCORE_OPERATOR names it"
    kit: Path
    keystore: KeystoreSection | None = None
    party: ClassVar = "operator"
    """As its keystore names it: of whose name is no matter, since each keystore has a key of its own."""

    def read_kit(self) -> Kit:
        """Certificate and key. Raises BadInput, CertificateRefused."""
        if self.keystore is None:
            return Kit.load(self.kit)
        return Kit.load(self.kit, open_keystore(self.keystore, self.party).password(KEY_FILE))


def kept_operator(place: OperatorConfig, path: Path) -> KeptKeys:
    """What a backup of an operator's key consists of. path: of operator.toml. Raises BadInput without a [keystore]."""
    return _kept(required(place.keystore, path), place.party, place.kit)


def find_place(coordinator: str | None, kit: Path | None, file: Path | None) -> OperatorConfig:
    """From options, else from operator.toml: `--operator`, $FEDCORE_OPERATOR, or in this folder. Raises BadInput
    where something is missing."""
    named = file or (Path(os.environ[OPERATOR_VARIABLE]) if os.getenv(OPERATOR_VARIABLE) else None)
    if named is None and (coordinator is None or kit is None) and Path(OPERATOR_FILE).is_file():
        named = Path(OPERATOR_FILE)
    proxy, keystore = ProxySection(), None
    if named is not None:
        found = read_toml(OperatorConfig, named, paths=("kit",))
        if kit is None and found.keystore is not None:  # it is of that kit, and of no other
            keystore = found.keystore.placed(named, f"{named.name}: keystore.unlock")
        coordinator, kit = coordinator or found.coordinator, kit or found.kit
        proxy = found.proxy.placed(named.resolve().parent, f"{named.name}: proxy")
    if coordinator is None or kit is None:
        missing = "--coordinator HOST:PORT" if coordinator is None else "--kit FOLDER"
        raise BadInput(
            f"operator: found no {missing}, expected it or an {OPERATOR_FILE}",
            remedy=f"write `coordinator` and `kit` into {OPERATOR_FILE} in this folder, or name the file "
            f"with --operator or ${OPERATOR_VARIABLE}",
        )
    endpoint(coordinator)
    return OperatorConfig(coordinator=coordinator, kit=kit, proxy=proxy, keystore=keystore)
