"""A federation's files as its operators change them: invitations, approvals, the signed roster, revocations.

    authority/       authority.pem and key.pem, encrypted; may be kept on another machine
    kit/, operator/  certificates and keys of the coordinator and of the operator
    roster.toml      signed and numbered (`identity/signed_roster.py`)
    revoked.txt      serial numbers of revoked certificates (`identity/revocation.py`)
    enrolment/       SITE.json: where each site is on its way in; rosters/: every roster that was signed;
                     commands.jsonl: commands that the coordinator's audit trail does not have yet

Invariant: every change is made under one lock, from the files as they are then, and replaces each file atomically. So
commands and the serving process may run at once, none of them has to be restarted, and a command that was killed can
be repeated. What a site needs to be admitted stands in the roster before its certificate is handed out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.asymmetric import ec
from fedcore_server.config import FederationConfig

from fedcore.audit import noted
from fedcore.audit.lines import Fact
from fedcore.errors import BadInput, Refused, UnknownName
from fedcore.files import read_json, write_atomic, write_json
from fedcore.files.lock import one_at_a_time
from fedcore.identity.authority import Authority
from fedcore.identity.join_messages import JoinAnswer, JoinLine, JoinRefused, JoinRequest, read_csr
from fedcore.identity.kit import AUTHORITY_FILE, CERTIFICATE_FILE, PublicKit, read_limited
from fedcore.identity.peer import Peer, check_sites, peer_of, read_certificate
from fedcore.identity.revocation import EMPTY
from fedcore.identity.signed_roster import SignedRoster, keep_roster, read_pins
from fedcore.identity.verify import fingerprint
from fedcore.types import SiteId

ENROLMENT_FOLDER = "enrolment"
ROSTERS_FOLDER = "rosters"

State = Literal["invited", "asked", "approved", "joined", "revoked"]


@dataclass(frozen=True)
class Enrolment:
    """One site on its way in. Times: ISO 8601, UTC. token_key: public half of the token's key, hex.

    invited -> asked (its request is here) -> approved (its certificate is made) -> joined (it was handed out);
    revoked at any time. serials: of all its certificates, lower-case hex; certificate: the newest, PEM.
    """

    site: str
    state: State
    invited: str
    expires: str
    token_key: str
    request: str = ""
    certificate: str = ""
    serials: tuple[str, ...] = ()

    @property
    def peer(self) -> Peer | None:
        """The party of its newest certificate."""
        return peer_of(self.certificate.encode()) if self.certificate else None

    @property
    def asked(self) -> JoinRequest:
        """Its request."""
        return JoinRequest.parse(self.request.encode())


class FederationFiles:
    """The files of one federation."""

    def __init__(self, config: FederationConfig) -> None:
        """Raises BadInput where no authority's certificate is found."""
        self.config = config
        self.authority_pem = read_limited(config.kit / AUTHORITY_FILE)
        self.fingerprint = fingerprint(self.authority_pem)
        self._folder = config.roster.parent / ENROLMENT_FOLDER

    # ---------------------------------------------------------------------------------------- reading

    def roster(self) -> SignedRoster:
        """The newest roster, verified. Raises BadInput for a static one, SignatureRefused, RosterRefused."""
        _, found = read_pins(self.config.roster, self.authority_pem, self.config.name)
        if found is None:
            raise BadInput(
                f"{self.config.roster}: found a roster without signature, expected one that "
                "`fed-coordinator init` began",
                remedy="a federation that `fedcore up` wrote is for development: make one with `fed-coordinator init`",
            )
        return found

    def enrolments(self) -> dict[str, Enrolment]:
        """{site: where it is on its way in}, by name."""
        paths = sorted(self._folder.glob("[!.]*.json"))
        return {path.stem: _read(path) for path in paths}

    def enrolment(self, site: str) -> Enrolment:
        """One site's. Raises UnknownName."""
        path = self._path(site)
        if not path.exists():
            known = self.enrolments()
            remedy = "" if known else f"no site was invited yet: fed-coordinator invite {site}"
            raise UnknownName("site", site, known, remedy=remedy)
        return _read(path)

    def requested(self, site: str) -> JoinRequest:
        """The request of a site that asked. Raises UnknownName, Refused."""
        found = self.enrolment(site)
        if not found.request or found.state == "revoked":
            raise Refused(
                f"site {site!r}: found it {found.state}, expected a request of it",
                remedy="the site runs `fed-site join` with its line first, or sends a file: --request FILE",
            )
        return found.asked

    # ---------------------------------------------------------------------------------------- changes

    def invite(self, site: str, days: float, now: datetime) -> tuple[JoinLine, bool]:
        """A new join line for a site, and whether it replaces an older one. Raises BadInput, Refused."""
        config = self.config
        if config.enrol_port is None or not config.enrolment.host:
            raise BadInput(
                "federation.toml: found no enrol_port, or no host under [enrolment], expected both",
                remedy="they are the port where sites join, and the name by which they reach it",
            )
        with self._locked():
            roster, known = self.roster(), self.enrolments()
            check_sites({*known, *roster.sites, site}, "site", deployed=True)
            before = known.get(site)
            if SiteId(site) in roster.sites:
                raise Refused(
                    f"site {site!r}: found it on roster {roster.number}, expected a site that has not joined",
                    remedy=f"for a site that lost its keys: fed-coordinator revoke {site}, then invite it again",
                )
            line = JoinLine.create(config.enrolment.host, config.enrol_port, site, self.fingerprint)
            self._write(
                Enrolment(
                    site, "invited", _iso(now), _iso(now + timedelta(days=days)), line.token_key.hex(),
                    serials=before.serials if before else (),
                )
            )  # fmt: skip
        return line, before is not None and before.state in ("invited", "asked")

    def ask(self, request: JoinRequest, now: datetime) -> Enrolment:
        """Record a request whose token, CSR and signatures are right; one that is known is not recorded again.

        Raises JoinRefused.
        """
        with self._locked():
            path = self._path(request.site)
            found = _read(path) if path.exists() else None
            if found is None or found.state == "revoked":
                raise JoinRefused("token")
            request.check(self.fingerprint, bytes.fromhex(found.token_key))
            if found.state != "invited":
                if found.asked != request:
                    raise JoinRefused("used")
                return found
            if now > datetime.fromisoformat(found.expires):
                raise JoinRefused("expired")
            if self._joined(request.site):
                raise JoinRefused("joined")
            asked = replace(found, state="asked", request=json.dumps(request.to_json()))
            self._write(asked)
            return asked

    def approve(self, site: str, authority: Authority, now: datetime) -> Enrolment:
        """Put a site that asked on the roster, and make its certificate; again for one that was approved. Raises
        Refused where it has not asked, UnknownName, RosterRefused for an identity key that another site has."""
        with self._locked():
            found = self.enrolment(site)
            if found.state in ("approved", "joined"):
                return found
            asked = self.requested(site)
            public = asked.check(self.fingerprint, bytes.fromhex(found.token_key))
            self._sign({**self.roster().sites, SiteId(site): asked.identity}, authority, now)
            certified = self._certified(found, authority.certify(
                public, "site", site, now, days=self.config.enrolment.certificate_days
            ))  # fmt: skip
            approved = replace(certified, state="approved")
            self._write(approved)
            return approved

    def answer(self, found: Enrolment) -> JoinAnswer:
        """What an approved site receives; it counts as joined from now on. Raises JoinRefused for one that was revoked
        meanwhile."""
        with self._locked():
            found = self.enrolment(found.site)
            if found.state not in ("approved", "joined"):
                raise JoinRefused("token")
            self._write(replace(found, state="joined"))
            return self._answer(found)

    def renew(
        self, site: str, csr: bytes | None, authority: Authority, now: datetime
    ) -> JoinAnswer:
        """A new certificate for a site that joined. csr: DER, for a new key; None: for the key it has.

        A site that asks again soon, because the answer was lost, gets the same certificate. Raises Refused for a site
        that has not joined, or asks with another key soon; JoinRefused for a CSR that is malformed or another's.
        """
        with self._locked():
            found = self.enrolment(site)
            newest = found.peer
            if newest is None or found.state not in ("approved", "joined"):
                raise Refused(f"site {site!r}: found it {found.state}, expected one that joined")
            held = read_certificate(found.certificate.encode()).public_key()
            public = held if csr is None else read_csr(csr, site)
            assert isinstance(public, ec.EllipticCurvePublicKey)
            if csr is not None and newest.ends - now > (newest.ends - newest.begins) / 2:
                if public == held:
                    return self._answer(found)
                raise Refused(
                    f"site {site!r}: found a certificate in the first half of its time, expected one that ends soon",
                    remedy="for a key that was lost or read by others: fed-coordinator revoke, then invite again",
                )
            pem = authority.certify(
                public, "site", site, now, days=self.config.enrolment.certificate_days
            )
            renewed = self._certified(found, pem)
            self._write(renewed)
            return self._answer(renewed)

    def revoke(self, site: str) -> int:
        """Revoke all certificates of a site and its invitation; returns how many certificates. The authority is not
        needed: until `sign_roster` the roster lists the site still. Raises UnknownName."""
        with self._locked():
            found = self.enrolment(site)
            self._revoke(found)
            self._write(replace(found, state="revoked"))
            return len(found.serials)

    def sign_roster(self, authority: Authority, now: datetime) -> SignedRoster:
        """The roster without the sites that were revoked."""
        with self._locked():
            known = self.enrolments()
            gone = {name for name, found in known.items() if found.state == "revoked"}
            rest = {name: key for name, key in self.roster().sites.items() if name not in gone}
            return self._sign(rest, authority, now)

    def renew_own(
        self, authority: Authority, hosts: list[str], now: datetime, days: float
    ) -> list[Peer]:
        """New certificates, with the keys they have, for the coordinator (and further hosts) and the operator, where
        their kits are here."""
        with self._locked():
            renewed = []
            for folder in (self.config.kit, self.config.roster.parent / "operator" / "kit"):
                if (folder / CERTIFICATE_FILE).exists():
                    kit = PublicKit.load(folder)
                    pem = authority.renew(kit.certificate_pem, now, hosts=hosts, days=days)
                    write_atomic(folder / CERTIFICATE_FILE, pem)
                    renewed.append(peer_of(pem))
            return renewed

    # ---------------------------------------------------------------------------------------- audit

    def note(self, call: str, now: datetime, **facts: Fact) -> None:
        """Leave a line about a command for the coordinator's audit trail: only the serving process, if there is one,
        has it open."""
        noted.leave_note(self._folder, call, now, **facts)

    def take_notes(self, record: Callable[..., None]) -> None:
        """Record the commands since the last call. Raises StoreProblem."""
        noted.take_notes(self._folder, record)

    # ---------------------------------------------------------------------------------------- parts

    def _answer(self, found: Enrolment) -> JoinAnswer:
        pem = found.certificate.encode()
        return JoinAnswer(self.authority_pem, pem, self.roster().to_toml(), self.config.port)

    def _certified(self, found: Enrolment, pem: bytes) -> Enrolment:
        serials = (*found.serials, peer_of(pem).serial)
        return replace(found, certificate=pem.decode(), serials=serials)

    def _joined(self, site: str) -> bool:
        return SiteId(site) in self.roster().sites

    def _sign(
        self, sites: dict[SiteId, bytes], authority: Authority, now: datetime
    ) -> SignedRoster:
        """The roster of these sites, with the next number where they differ from the present ones."""
        before = self.roster()
        if list(before.sites.items()) == list(sites.items()):
            return before
        after = SignedRoster(before.federation, before.number + 1, now, sites).sign(authority)
        after.verify(self.authority_pem, before.federation)
        rosters = self._folder / ROSTERS_FOLDER
        keep_roster(rosters, before)
        after.save(self.config.roster)
        keep_roster(rosters, after)
        return after

    def _revoke(self, found: Enrolment) -> None:
        path = self.config.revoked
        if path is None:
            raise BadInput(
                "federation.toml: found no `revoked`, expected the list of revoked certificates",
                remedy='write revoked = "revoked.txt" into it and restart the coordinator once',
            )
        text = read_limited(path, "a list of serial numbers") if path.exists() else EMPTY
        known = text.decode().split()
        lines = [f"{serial}  # {found.site}\n" for serial in found.serials if serial not in known]
        end = b"" if text.endswith(b"\n") else b"\n"
        write_atomic(path, text + end + "".join(lines).encode())

    def _path(self, site: str) -> Path:
        check_sites([site], "site", deployed=True)
        return self._folder / f"{site}.json"

    def _write(self, found: Enrolment) -> None:
        write_json(self._path(found.site), asdict(found))

    def _locked(self) -> AbstractContextManager[None]:
        """Hold the federation's lock. Raises BadInput where another command has it for long."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        return one_at_a_time(self._folder / ".lock", "federation")


def _read(path: Path) -> Enrolment:
    found = read_json(path)
    try:
        return Enrolment(**{**found, "serials": tuple(found["serials"])})
    except (TypeError, KeyError):
        raise BadInput(f"{path}: found other keys than an invitation has") from None


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds")
