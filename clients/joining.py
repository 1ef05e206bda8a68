"""`fed-site join`: this site's keys are made here, its certificate and the signed roster are fetched.

Invariant: nothing is sent before the coordinator has shown the authority with the join line's fingerprint and has
proved, in its TLS handshake, that it holds a certificate of that authority. Private keys are written with mode 0600,
are never overwritten and never sent. An attempt that broke off is repeated with the same command: it sends the same
request, which `joining.json` keeps without the token.
"""

from __future__ import annotations

import json
import ssl
from dataclasses import dataclass
from datetime import datetime
from io import BufferedReader
from pathlib import Path

import tomli_w
from cryptography.hazmat.primitives.asymmetric import ec
from fedcore_clients.config import POLICY_FILE, read_config

from fedcore.audit.keys import SiteSigner
from fedcore.audit.lines import Fact
from fedcore.audit.trail import AuditTrail
from fedcore.config import beside
from fedcore.errors import AlreadyExists, BadInput, CertificateRefused
from fedcore.files import read_json, write_atomic, write_json
from fedcore.files.disk import make_folder
from fedcore.files.toml import read_tables
from fedcore.identity import kit
from fedcore.identity.addresses import authority_of
from fedcore.identity.identities import IDENTITY_FILE, ROSTER_FILE, create_identity, read_identity
from fedcore.identity.inspection import LOOK_SECONDS, inspected, presented
from fedcore.identity.join_messages import (
    MOST_ANSWER,
    JoinAnswer,
    JoinLine,
    JoinRefused,
    JoinRequest,
    check_authority,
)
from fedcore.identity.peer import peer_of
from fedcore.identity.proxies import Proxy, ProxySection
from fedcore.identity.signed_roster import SignedRoster, read_pins
from fedcore.identity.tunnel import connect
from fedcore.identity.verify import check_certificate, fingerprint
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.types import Json
from fedcore.wire.frames import SOFTWARE

ATTEMPT_FILE, SITE_FILE, KIT_FOLDER, STATE_FOLDER = "joining.json", "site.toml", "kit", "state"
ANSWER_SECONDS = 30.0


@dataclass(frozen=True)
class JoinedSite:
    """A site that joined. wrote: the files, by name, with what each is."""

    site: str
    federation: str
    roster: SignedRoster
    until: datetime
    wrote: dict[str, str]

    def lines(self, folder: Path) -> list[str]:
        """In words, for the person who joined it."""
        wide = max(map(len, self.wrote))
        config = folder / SITE_FILE
        return [
            f"site {self.site!r} is in {self.federation!r}: on roster {self.roster.number} of "
            f"{len(self.roster.sites)} sites, certificate until {self.until:%Y-%m-%d}",
            "",
            f"written in {folder.absolute()}",
            *(f"  {name:<{wide}}  {what}" for name, what in self.wrote.items()),
            "",
            "next",
            f"  fed-site check --config {config}",
            f"  fed-site run --config {config}",
        ]


@dataclass(frozen=True)
class AllowedTask:
    """[tasks.NAME] of the new site.toml."""

    name: str
    task: str
    sha256: str
    source: str


def begin(line: JoinLine, folder: Path) -> JoinRequest:
    """This site's request: keys are made, or those of an earlier attempt are used. Raises AlreadyExists, BadInput."""
    _require_new(folder)
    if (folder / ATTEMPT_FILE).exists():
        earlier, request = _attempt(folder)
        if earlier["site"] != line.site:
            raise BadInput(
                f"{folder}: found an attempt to join as {earlier['site']!r}, expected {line.site!r}",
                remedy="each site has a folder of its own: --out FOLDER",
            )
        try:
            request.check(line.fingerprint, line.token_key)
        except JoinRefused:  # another line, for the same site: the keys stay
            pass
        else:
            return request
    key, identity = _keys(folder)
    request = JoinRequest.create(line, key, identity)
    about = {"host": line.host, "site": line.site, "fingerprint": line.fingerprint}
    write_json(folder / ATTEMPT_FILE, {**about, "request": request.to_json()})
    return request


def ask(line: JoinLine, folder: Path, proxy: Proxy | None, now: datetime) -> JoinAnswer | None:
    """Send this site's request to the coordinator, once it has proved who it is; None: it waits for approval.

    Raises CertificateRefused where it has not, and nothing was sent; JoinRefused; BadInput.
    """
    _require_new(folder)
    where = authority_of(line.host, line.port)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # `_exchange` checks both
    with connect(line.host, line.port, proxy) as plain:
        plain.settimeout(ANSWER_SECONDS)
        try:
            with context.wrap_socket(plain, server_hostname=line.host) as secured:
                return _exchange(secured, line, folder, where, now)
        except (JoinRefused, CertificateRefused) as refused:
            word = refused.word if isinstance(refused, JoinRefused) else "not trusted"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _identity(folder)  # it signs the trail; a later attempt uses it
            _record(folder, line.site, "refused", what="to join", word=word, text=str(refused))
            raise
        except (ssl.SSLError, ConnectionError, TimeoutError) as error:
            theirs = presented(line.host, line.port, proxy, LOOK_SECONDS)
            if found := inspected(theirs, line.host, line.port):
                raise found from None
            raise BadInput(
                f"coordinator {where}: found no answer ({_reason(error)}), expected its port for joining",
                remedy="check that it runs, that the line has this port, and that nothing between ends TLS",
            ) from None


def _exchange(
    secured: ssl.SSLSocket, line: JoinLine, folder: Path, where: str, now: datetime
) -> JoinAnswer | None:
    theirs = secured.getpeercert(binary_form=True) or b""
    if found := inspected(theirs, line.host, line.port):
        raise found
    with secured.makefile("rb") as reader:
        try:
            authority = json.loads(_line(reader))["authority"].encode()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise BadInput(
                f"coordinator {where}: found something else there, expected a coordinator's port for joining",
                remedy="check the line; if it is right, something between answers in the coordinator's place",
            ) from None
        federation = check_authority(authority, line.fingerprint)
        shown = ssl.DER_cert_to_PEM_cert(theirs).encode()
        check_certificate(
            shown, authority, federation=federation, role="coordinator", now=now, host=line.host
        )
        request = begin(line, folder)
        secured.sendall(json.dumps(request.to_json()).encode() + b"\n")
        return JoinAnswer.parse(_line(reader), f"coordinator {where}")


def finish(
    folder: Path,
    answer: JoinAnswer,
    now: datetime,
    *,
    tasks: list[AllowedTask],
    proxy: ProxySection | None = None,
) -> JoinedSite:
    """Check the answer to this folder's request, and write the site's files. Raises CertificateRefused,
    SignatureRefused, RosterRefused, BadInput."""
    _require_new(folder)
    if not (folder / ATTEMPT_FILE).exists():
        raise BadInput(
            f"{folder}: found no request that was made here, expected one",
            remedy="fed-site join --request FILE 'LINE' makes one; use the same --out FOLDER for its answer",
        )
    about, request = _attempt(folder)
    key, identity = _keys(folder)
    site, host = about["site"], about["host"]
    roster = answer.check(about["fingerprint"], site, key.public_key(), identity.public, now)
    if request.identity != identity.public:
        raise BadInput(f"{folder}: found other keys than those of its request, expected the same")
    wrote = {
        f"{KIT_FOLDER}/{kit.KEY_FILE}": "private, made here: it never leaves this machine",
        IDENTITY_FILE: "private, made here: keep a backup where only you can read it",
        f"{KIT_FOLDER}/{kit.CERTIFICATE_FILE}": "this site's certificate",
        f"{KIT_FOLDER}/{kit.AUTHORITY_FILE}": "the federation's authority, by which the coordinator is known",
        ROSTER_FILE: "the signed roster: every site with its public key",
    }
    home = folder / KIT_FOLDER
    write_atomic(home / kit.AUTHORITY_FILE, answer.authority)
    write_atomic(folder / ROSTER_FILE, answer.roster)
    if not (folder / SITE_FILE).exists():
        text = site_toml(site, authority_of(host, answer.port), tasks, proxy or ProxySection())
        write_atomic(folder / SITE_FILE, text.encode())
        wrote[SITE_FILE] = "settings: which tasks may run here, and on which data"
        if not (folder / POLICY_FILE).exists():
            write_atomic(folder / POLICY_FILE, _POLICY.encode())
        wrote[POLICY_FILE] = "what jobs may ask of this site"
    _record(
        folder, site, "enrol", decision="joined", federation=roster.federation, roster=roster.number,
        serial=peer_of(answer.certificate).serial,
    )  # fmt: skip
    write_atomic(home / kit.CERTIFICATE_FILE, answer.certificate)  # last: now the site has joined
    (folder / ATTEMPT_FILE).unlink()
    peer = kit.Kit.load(home, _password(folder, kit.KEY_FILE)).peer
    return JoinedSite(site, peer.federation, roster, peer.ends, wrote)


def renewed(folder: Path, answer: JoinAnswer, now: datetime) -> JoinedSite:
    """Take a new certificate and the newest roster of an operator's file into a site that has joined.

    Raises CertificateRefused, SignatureRefused, RosterRefused, BadInput; then nothing is changed.
    """
    before = kit.Kit.load(folder / KIT_FOLDER, _password(folder, kit.KEY_FILE))
    key, identity = _keys(folder)
    known, site = fingerprint(before.authority_pem), before.peer.name
    roster = answer.check(known, site, key.public_key(), identity.public, now)
    _, seen = read_pins(folder / ROSTER_FILE, before.authority_pem, before.peer.federation)
    roster.verify(before.authority_pem, before.peer.federation, newest=seen.number if seen else 0)
    write_atomic(folder / ROSTER_FILE, answer.roster)
    write_atomic(folder / KIT_FOLDER / kit.CERTIFICATE_FILE, answer.certificate)
    wrote = {
        f"{KIT_FOLDER}/{kit.CERTIFICATE_FILE}": "the new certificate",
        ROSTER_FILE: "the newest roster",
    }
    return JoinedSite(site, before.peer.federation, roster, peer_of(answer.certificate).ends, wrote)


def has_joined(folder: Path) -> bool:
    """Whether a folder is that of a site that has joined."""
    return (folder / KIT_FOLDER / kit.CERTIFICATE_FILE).exists()


def read_answer(path: Path) -> JoinAnswer:
    """The answer in a file of `fed-coordinator approve`. Raises BadInput."""
    found = JoinAnswer.parse(kit.read_limited(path, "an answer"), str(path))
    if found is None:
        raise BadInput(f"{path}: found no answer yet, expected one of an approved site")
    return found


def find_task(task: str, source: str) -> AllowedTask:
    """A task with its hash, and this site's data for it; paths count from the current folder. Raises what `load_task`
    raises."""
    from fedcore.learning.task import load_task

    found, place = load_task(task), task.partition(":")[0]
    absolute = str(Path(place).absolute()) + task[len(place) :] if Path(place).is_file() else task
    return AllowedTask(found.name, absolute, found.digest(), str(beside(source, Path.cwd())))


def site_toml(site: str, coordinator: str, tasks: list[AllowedTask], proxy: ProxySection) -> str:
    """The settings of a new site, with what each of them is for."""
    through = proxy.written()
    simple = isinstance(through["proxy"], str)
    tables = [] if simple else [tomli_w.dumps(through)]
    tables += [
        f"[tasks.{each.name}]\n"
        + tomli_w.dumps({"task": each.task, "sha256": each.sha256, "source": each.source})
        for each in tasks
    ]
    text = _SETTINGS.format(
        names=tomli_w.dumps(
            {"site": site, "coordinator": coordinator} | (dict(through) if simple else {})
        ),
        key=KIT_FOLDER, identity=IDENTITY_FILE, roster=ROSTER_FILE, policy=POLICY_FILE,
        state=STATE_FOLDER,
    )  # fmt: skip
    return text + "\n" + "\n".join(tables if tasks else [*tables, _NO_TASK])


_SETTINGS = """\
# One site of a federation. Paths count from this file's folder; docs/operations.md has every key.
{names}kit = "{key}"                  # certificate and key; the certificate is renewed by itself
identity = "{identity}"     # this site's signing key, made here
roster = "{roster}"
folder = "{state}"             # journal, models, ledger; needs room for a few models
policy = "{policy}"       # what jobs may ask of this site
"""

_POLICY = """\
# What jobs may ask of this site; a running site reads a change of this file by itself. docs/operations.md has every
# key; those left out have their defaults, which are restrictive.
jobs = "listed"              # the tasks of site.toml; "ask": every job waits for `fed-site approve JOB`
protections = ["layered"]    # no single site's update is ever readable by the coordinator
minimum_sites = 3            # of a job and of every round
"""

_NO_TASK = """\
# A task that may run here, with this site's data for it. `fed-site check` prints the hash to allow.
# [tasks.heart]
# task = "heart"             # or "path/to/task.py"
# sha256 = "..."             # of the code that you have read
# source = "data.csv"        # given to the task's `data`
"""


def _keys(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, IdentityKey]:
    """The TLS key and the identity key of a folder, made where they are missing. Raises BadInput."""
    home = folder / KIT_FOLDER
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    path, password = home / kit.KEY_FILE, _password(folder, kit.KEY_FILE)
    if not path.exists():
        kit.write_private(path, kit.key_pem(ec.generate_private_key(ec.SECP256R1()), password))
    key = kit.read_key(path, password)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadInput(f"{path}: found a key of another kind, expected EC P-256")
    return key, _identity(folder)


def _identity(folder: Path) -> IdentityKey:
    path, password = folder / IDENTITY_FILE, _password(folder, IDENTITY_FILE)
    return read_identity(path, password) if path.exists() else create_identity(path, password)


def _password(folder: Path, name: str) -> SecretBytes | None:
    """Of a private file, where a site.toml with [keystore] is in the folder already. Raises BadInput."""
    path = folder / SITE_FILE
    if not path.exists() or "keystore" not in read_tables(path):
        return None
    return read_config(path).password(name)


def _record(folder: Path, site: str, event: str, **facts: Fact) -> None:
    """A line in this site's audit trail; none before the site has the key that signs it. Raises StoreProblem."""
    if (folder / IDENTITY_FILE).exists():
        signer = SiteSigner(_identity(folder))
        opened = {"party": f"site {site}", "software": SOFTWARE}
        make_folder(folder / STATE_FOLDER)
        with AuditTrail.open(folder / STATE_FOLDER, signer, opened) as trail:
            trail.record(event, **facts)


def _attempt(folder: Path) -> tuple[Json, JoinRequest]:
    """The attempt that is under way in a folder. Raises BadInput."""
    path = folder / ATTEMPT_FILE
    found = read_json(path)
    try:
        about = {key: str(found[key]) for key in ("host", "site", "fingerprint")}
        return about, JoinRequest.parse(json.dumps(found["request"]).encode())
    except (KeyError, JoinRefused):
        raise BadInput(
            f"{path}: found something else, expected an attempt to join",
            remedy="delete this file and join again; the keys stay",
        ) from None


def _require_new(folder: Path) -> None:
    if has_joined(folder):
        raise AlreadyExists(
            f"{folder}: found a site that has joined already, expected a new one",
            remedy=f"fed-site check --config {folder / SITE_FILE}; to join with new keys, move {KIT_FOLDER}/ and "
            f"{IDENTITY_FILE} away first",
        )


def _line(reader: BufferedReader) -> bytes:
    return reader.readline(MOST_ANSWER + 1)


def _reason(error: OSError) -> str:
    return str(getattr(error, "reason", None) or error.strerror or "timed out")
