"""site.toml: one site, its data and what its operator allows. Paths in it count from its folder.

site = "va"               coordinator = "hub.example.org:7443"        proxy = "none"
standbys = ["hub2.example.org:7443"]    # where another coordinator takes over; tried in turn
kit = "kit"               identity = "identity.pem"                   roster = "roster.toml"
folder = "state"          sandbox = "auto"                      task_network = false

[proxy]                   # in place of `proxy = ...`, for one that asks for a login: identity/proxies.py
url = "socks5://proxy.example.org:1080"
user = "site-va"          password = "file:/run/secrets/proxy-password"

[keystore]                # keys, journal and models encrypted at rest: where the passphrase is (docs/enrolment.md)
unlock = "file:/run/secrets/site-passphrase"

[split]                   # which rows train and which test: this site's choice, not the job's
method = "hash"           # by a keyed hash of each row; "folds" (seed, fold, folds) for rehearsals
test = 0.2                # the share to test on

[policy]                  # what jobs may ask of this site: policy.py has the keys and their defaults
protections = ["layered"]  # or, above the first table, policy = "policy.toml": these keys in a file of their own

[tasks.heart]             # a task this site takes part in, by the name jobs call it
task = "heart"            # where it is: as for `fedcore simulate --task`
sha256 = "..."            # `fed-site check` prints it
source = "va.csv"         # given to the task's `data`; written like a path, it counts from here

[tasks.cough]
flower_app = "cough-app"  # in place of `task`: the folder of a Flower app
sha256 = "..."
source = {partition-id = 0, num-partitions = 4}  # its node config
"""

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from fedcore_clients.policy import PolicySection
from fedcore_clients.policy_file import read_policy
from pydantic import BeforeValidator, Field

from fedcore.config import beside
from fedcore.errors import BadInput
from fedcore.files.toml import Section, read_tables, read_toml
from fedcore.identity.addresses import endpoint
from fedcore.identity.identities import IDENTITY_FILE, read_identity
from fedcore.identity.keystore import open_keystore
from fedcore.identity.kit import KEY_FILE, Kit
from fedcore.identity.passphrase import KeystoreSection
from fedcore.identity.preflight import CoordinatorAddress
from fedcore.learning.task_code import FLOWER
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.store.sealed_files import FileSealer
from fedcore.store.sealing import RowSealer
from fedcore.types import Json
from fedcore.wire.calls import KEEPALIVE_SECONDS, MOST_KEEPALIVE

POLICY_FILE, JOURNAL_FILE = "policy.toml", "journal.sqlite"


class SplitSection(Section):
    """[split]: method "hash": `test`, the share to test on, and `key`, 64 hex digits, made from the
    identity key where it is left out. method "folds": the deal of `fedcore simulate`, for rehearsals."""

    method: Literal["hash", "folds"] = "hash"
    key: str | None = Field(default=None, pattern="^[0-9a-f]{64}$", repr=False)
    test: float = Field(default=0.2, gt=0, lt=1)
    seed: int = Field(default=0, ge=0, lt=1 << 62)
    fold: int = Field(default=0, ge=0)
    folds: int = Field(default=5, ge=2)

    def of(self, identity: IdentityKey) -> Json:
        """The split as the training process gets it (`data/split.py`)."""
        if self.method == "folds":
            return {"method": "folds", "seed": self.seed, "fold": self.fold, "folds": self.folds}
        key = self.key or identity.derive(b"split of rows").hex()
        return {"method": "hash", "key": key, "test": self.test}


class TaskSection(Section):
    """[tasks.NAME]: what is installed, what it must hash to, and this site's data for it.

    flower_app: in place of `task`, the folder of a Flower app, whose node config is `source`."""

    task: str = ""
    flower_app: str | None = None
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    source: Any = None

    def placed(self, name: str, base: Path) -> "TaskSection":
        """With paths that count from a folder. Raises BadInput unless there is one of task and flower_app."""
        if bool(self.task) == bool(self.flower_app):
            raise BadInput(
                f"tasks.{name}: found {'task and flower_app' if self.task else 'neither task nor flower_app'}, "
                "expected one of them",
                remedy='task = "heart", or flower_app = "path/to/app"',
            )
        task = f"{FLOWER}{base / self.flower_app}" if self.flower_app else self.task
        return self.model_copy(update={"task": task, "source": beside(self.source, base)})


def _in_line(found: object) -> object:
    """The table of [policy]; the name of a file is read by `read_config`."""
    return {} if isinstance(found, str) else found


class SiteConfig(CoordinatorAddress):
    """A site as its operator runs it; paths are absolute. base: the file's folder. policy_file: the policy's own file,
    None where it is in this one. keepalive_seconds: between pings on a quiet connection.
    keep_secrets_days: how long the secrets of a job's key epochs stay after its end, for
    sites that missed its last release."""

    missing = "`fed-site join` makes a site in a folder; --config FILE names its site.toml"
    refused = dict.fromkeys(
        ("database", "database_file"),
        "a site's journal has secrets, which only a file in `folder` can erase: leave it out",
    )
    site: str
    kit: Path
    identity: Path
    roster: Path
    folder: Path
    base: Path
    file: Path
    sandbox: str = Field(
        default="auto", pattern="^(auto|none|bwrap|unshare|user:[A-Za-z_][A-Za-z0-9_.-]*)$"
    )
    task_network: bool = False
    patience_seconds: float = Field(default=1800.0, gt=0)
    keepalive_seconds: float = Field(default=KEEPALIVE_SECONDS, ge=0.2, le=MOST_KEEPALIVE)
    keep_secrets_days: float = Field(default=7.0, ge=0)
    spool_bytes: int | None = Field(default=None, ge=1 << 20)
    split: SplitSection = Field(default_factory=SplitSection)
    policy: Annotated[PolicySection, BeforeValidator(_in_line)] = Field(
        default_factory=PolicySection
    )
    policy_file: Path | None = None
    tasks: dict[str, TaskSection] = Field(default_factory=dict)
    keystore: KeystoreSection | None = None

    @property
    def party(self) -> str:
        """The party, as its journal and its keystore name it."""
        return f"site {self.site}"

    def password(self, name: str) -> SecretBytes | None:
        """Of this site's private file, as `key.pem`; None where keys are in clear. Raises BadInput."""
        return open_keystore(self.keystore, self.party).password(name) if self.keystore else None

    def row_sealer(self) -> RowSealer | None:
        """What the journal is encrypted with; None where it is in clear. Raises BadInput."""
        if self.keystore is None:
            return None
        return RowSealer(open_keystore(self.keystore, self.party).journal_key())

    def file_sealer(self) -> FileSealer | None:
        """What the states are encrypted with; None where they are in clear. Raises BadInput."""
        if self.keystore is None:
            return None
        return FileSealer(open_keystore(self.keystore, self.party).files_key())

    def ledger_sealer(self) -> RowSealer | None:
        """What the lines of the ledger are encrypted with; None where they are in clear. Raises BadInput."""
        if self.keystore is None:
            return None
        return RowSealer(open_keystore(self.keystore, self.party).files_key())

    def read_kit(self) -> Kit:
        """Certificate and key. Raises BadInput, CertificateRefused."""
        return Kit.load(self.kit, self.password(KEY_FILE))

    def read_identity(self) -> IdentityKey:
        """The signing key. Raises BadInput."""
        return read_identity(self.identity, self.password(IDENTITY_FILE))

    @property
    def hashes(self) -> dict[str, str]:
        """{name: SHA-256} of the tasks that may run here."""
        return {name: task.sha256 for name, task in self.tasks.items()}


def read_config(path: Path) -> SiteConfig:
    """The configuration of a file, with that of the policy. Raises BadInput with the key's path, and UnknownName."""
    try:
        found = read_toml(
            SiteConfig, path, paths=("kit", "identity", "roster", "folder"),
            base=str(path.resolve().parent), file=str(path.resolve()), policy_file=None,
        )  # fmt: skip
    except BadInput as error:
        if isinstance(error.__cause__, tomllib.TOMLDecodeError) and _has_both(path):
            raise _two_policies(path, "`policy = ...` and [policy]") from error
        raise
    for key, addresses in (("coordinator", (found.coordinator,)), ("standbys", found.standbys)):
        for each in addresses:
            endpoint(each, f"{path.name}: {key}")
    tasks = {name: task.placed(name, found.base) for name, task in found.tasks.items()}
    keystore = found.keystore and found.keystore.placed(path, f"{path.name}: keystore.unlock")
    proxy = found.proxy.placed(found.base, f"{path.name}: proxy")
    more = {"tasks": tasks, "keystore": keystore, "proxy": proxy}
    return found.model_copy(update=more | _policy_of(path, found.base))


def _policy_of(path: Path, base: Path) -> dict[str, object]:
    """Policy and its file, where it has one of its own. A policy.toml that nothing names is refused: its writer
    believes it to be in force."""
    named, beside = read_tables(path).get("policy"), base / POLICY_FILE
    if isinstance(named, str):
        return {"policy": read_policy(base / named), "policy_file": base / named}
    if beside.exists():
        what = f"{POLICY_FILE} beside it and {'[policy]' if named is not None else 'nothing that names it'}"
        raise _two_policies(path, what)
    return {}


def _has_both(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    return all(
        re.search(form, text, re.MULTILINE) for form in (r"^\s*policy\s*=", r"^\s*\[policy\]")
    )


def _two_policies(path: Path, found: str) -> BadInput:
    return BadInput(
        f"{path.name}: policy: found {found}, expected one place for the policy",
        remedy=f'write `policy = "{POLICY_FILE}"` above the first table, and its keys in that file only; or keep '
        f"[policy] and remove {POLICY_FILE}",
    )
