"""`fed-coordinator init`: the folder of a new federation, written whole or not at all.

Invariant: the authority's key is on disk only encrypted with the passphrase; every other key is readable by its owner
only.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedcore_server.config import OPERATOR_FILE
from fedcore_server.federation import ENROLMENT_FOLDER

from fedcore.errors import AlreadyExists, BadInput
from fedcore.files import write_atomic
from fedcore.identity.addresses import authority_of
from fedcore.identity.authority import LOOPBACK, Authority, host_name
from fedcore.identity.authority_files import save_authority, save_token_authority
from fedcore.identity.identities import ROSTER_FILE
from fedcore.identity.peer import Peer, check_name
from fedcore.identity.revocation import EMPTY
from fedcore.identity.signed_roster import SignedRoster
from fedcore.identity.tokens import TokenUri, make_token_key
from fedcore.secagg.crypto.secret import SecretBytes

FEDERATION_FILE, REVOKED_FILE = "federation.toml", "revoked.txt"
OWN_DAYS = 365.0
"""How long the certificates of the coordinator and the operator are valid."""


@dataclass(frozen=True)
class NewFederation:
    """What was made. hosts: by which sites reach the coordinator."""

    folder: Path
    fingerprint: str
    hosts: tuple[str, ...]
    port: int
    enrol_port: int
    coordinator: Peer
    operator: Peer
    token: TokenUri | None = None

    def lines(self) -> list[str]:
        """In words, for the person who made it."""
        name, until = self.coordinator.federation, f"{self.coordinator.ends:%Y-%m-%d}"
        config = self.folder / FEDERATION_FILE
        key, secret = "its key is encrypted with the passphrase", "passphrase"
        safe = "with the passphrase it can name any party; keep a copy offline, or move it there"
        if self.token is not None:
            key, secret, safe = (
                f"its {self.token}",
                "PIN",
                "the certificate; its key is in its token",
            )
        return [
            f"federation {name!r} is ready in {self.folder}",
            "",
            "made there",
            f"  federation.toml  the coordinator's settings: port {self.port}, and {self.enrol_port} to join",
            f"  authority/       the certificate authority; {key}",
            f"  kit/             the coordinator's certificate and key, for {', '.join(self.hosts)}, until {until}",
            f"  operator/        certificate and key of the operator's commands, until {self.operator.ends:%Y-%m-%d}",
            "  roster.toml      the signed roster, number 1, without sites; revoked.txt: no certificate is revoked",
            "",
            "keep safe",
            f"  the {secret}: nothing can replace it",
            f"  authority/: {safe}",
            "  kit/key.pem and operator/kit/key.pem: they stay on this machine",
            "",
            "fingerprint of the authority, to read to the sites by telephone",
            f"  {spaced(self.fingerprint)}",
            "",
            "next",
            f"  fed-coordinator serve --config {config}",
            f"  fed-coordinator invite SITE --config {config}",
        ]


def spaced(fingerprint: str) -> str:
    """A fingerprint in groups of four digits, for people."""
    return " ".join(fingerprint[at : at + 4] for at in range(0, len(fingerprint), 4))


def create(
    name: str,
    folder: Path,
    hosts: Sequence[str],
    passphrase: SecretBytes,
    now: datetime,
    *,
    port: int,
    enrol_port: int,
    approval: str,
    metrics_port: int | None = None,
    unlock: str = "",
    key: str = "",
) -> NewFederation:
    """Make the folder. hosts: DNS names and addresses by which sites reach the coordinator, the first one for join
    lines; metrics_port: of the counters, None for none; unlock: where the serving process finds the passphrase, ""
    where it does not; key: the URI of a key that is made in a token, whose PIN the passphrase is then. Raises
    AlreadyExists, BadInput, StoreProblem."""
    check_name("federation", name)
    token = TokenUri.parse(key, "--key") if key else None
    for host in hosts:
        host_name(host)
    authority_of(hosts[0], port)
    if port == enrol_port:
        raise BadInput(f"--enrol-port: found {port}, the port of the sites, expected another one")
    if metrics_port in (port, enrol_port):
        raise BadInput(
            f"--metrics-port: found {metrics_port}, a port of the sites, expected another one"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AlreadyExists(
            f"{folder}: found something there already, expected a new or an empty folder",
            remedy="name another one with --out FOLDER: keys are never overwritten",
        )
    folder = folder.absolute()
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    settings = _SETTINGS.format(
        name=name, host=hosts[0], port=port, enrol_port=enrol_port, approval=approval,
        listen=f"listen = {json.dumps(_addresses(hosts))}",
        metrics="" if metrics_port is None else _METRICS.format(metrics_port),
        unlock=f"unlock = {json.dumps(unlock)}" if unlock else _NO_UNLOCK,
        key=f"key = {json.dumps(key)}\n" if key else "",
    )  # fmt: skip
    place = f'coordinator = "{authority_of(hosts[0], port)}"\nkit = "kit"\n'
    try:
        beside.mkdir(mode=0o700, parents=True)
        made = _write(name, beside, tuple(hosts), passphrase, now, token)
        write_atomic(beside / FEDERATION_FILE, settings.encode())
        write_atomic(beside / "operator" / OPERATOR_FILE, place.encode())
        beside.replace(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return NewFederation(folder, made[0], tuple(hosts), port, enrol_port, *made[1:], token)


def _addresses(hosts: Sequence[str]) -> list[str]:
    """The addresses to listen on: those of this machine alone where sites are told no other."""
    if not set(hosts) <= set(LOOPBACK):
        return ["::"]
    own = LOOPBACK[1:]  # "localhost" is one or the other, as the resolver of a site has it
    return [address for address in own if address in hosts or "localhost" in hosts]


def _write(
    name: str,
    folder: Path,
    hosts: tuple[str, ...],
    passphrase: SecretBytes,
    now: datetime,
    token: TokenUri | None,
) -> tuple[str, Peer, Peer]:
    if token is None:
        authority = Authority.create(name, now)
        save_authority(authority, folder / "authority", passphrase)
    else:
        authority = Authority.create(name, now, key=make_token_key(token, lambda: passphrase))
        save_token_authority(authority, folder / "authority")
    together = tuple(dict.fromkeys((*hosts, *LOOPBACK)))
    coordinator = authority.issue("coordinator", "coordinator", now, hosts=together, days=OWN_DAYS)
    operator = authority.issue("operator", "operator", now, days=OWN_DAYS)
    peers = [
        issued.save(folder / where).peer
        for issued, where in ((coordinator, "kit"), (operator, "operator/kit"))
    ]
    for each in (ENROLMENT_FOLDER, "state"):
        (folder / each).mkdir(mode=0o700)
    SignedRoster(name, 1, now, {}).sign(authority).save(folder / ROSTER_FILE)
    write_atomic(folder / REVOKED_FILE, EMPTY)
    return authority.fingerprint, peers[0], peers[1]


_METRICS = "metrics_port = {}          # counters for Prometheus, on 127.0.0.1 only\n"
_NO_UNLOCK = '# unlock = "file:/run/secrets/authority-passphrase"'
_SETTINGS = """\
# The coordinator of a federation; docs/operations.md has every key. Paths count from this file's folder.
name = "{name}"
roster = "roster.toml"       # signed: changed by `fed-coordinator approve` and `revoke`, not by hand
revoked = "revoked.txt"
kit = "kit"
folder = "state"             # journal and spool
{listen}
port = {port}                  # sites and operators, with certificates
enrol_port = {enrol_port}            # sites that join, without certificates yet
{metrics}
[enrolment]
host = "{host}"              # by which sites reach this machine; stands in join lines
approval = "{approval}"      # "automatic": a valid join line is enough; "manual": `fed-coordinator approve SITE`
authority = "authority"
{key}certificate_days = 90        # of a site's certificate, which is renewed by itself before it ends
# For automatic approval and renewal the serving process opens the authority's key, with a passphrase from
# $FEDCORE_AUTHORITY_PASSPHRASE or from here: "file:PATH" (mode 0600), "env:NAME", "command:PROGRAM ARGUMENTS" or
# "prompt". Without one, requests wait for `approve`.
{unlock}
"""
