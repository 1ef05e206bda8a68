"""The roster as the authority signs it: numbered, dated, with every site's pinned identity key.

    federation = "hospitals"
    number = 3                       # +1 at each change
    issued = 2026-11-30T14:05:00Z

    [sites]
    "cleveland" = { identity = "c0ffee..." }

    [signature]
    by = "..."                       # SHA-256 fingerprint of the authority's certificate
    value = "..."                    # base64, ECDSA P-256 with SHA-256 (FIPS 186-5, section 6)

Invariant: the signature covers federation, number, date and all sites in their order, each framed by its length
behind a label of its own, so it is valid for nothing else that the authority signs. A roster counts only after
`verify`. One without number and signature is a static roster (`fedcore up` writes it): whoever holds the file
trusts it as it is, and `read_pins` tells the two apart.
"""

from __future__ import annotations

import base64
import binascii
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedcore.errors import BadInput, RosterRefused, SignatureRefused
from fedcore.files import write_atomic
from fedcore.files.disk import make_folder
from fedcore.identity.authority import Authority
from fedcore.identity.identities import sites_of, sites_toml
from fedcore.identity.kit import read_limited
from fedcore.identity.peer import check_name
from fedcore.secagg.crypto.identity_key import roster_digest
from fedcore.secagg.crypto.symmetric import framed
from fedcore.types import SiteId

MOST_BYTES = 1 << 20
"""Of a roster file; a site has about 150."""

_LABEL = b"fedcore/1 signed roster"
_KEYS = {"federation", "number", "issued", "sites", "signature"}


@dataclass(frozen=True)
class SignedRoster:
    """One roster of a federation. number: 1, 2, ...; issued: UTC, whole seconds; sites: {site: 32-byte public key}.

    by: SHA-256 fingerprint of the authority's certificate, in hex; signature: DER; both empty before `sign`.
    """

    federation: str
    number: int
    issued: datetime
    sites: Mapping[SiteId, bytes]
    by: str = ""
    signature: bytes = b""

    @property
    def digest(self) -> str:
        """Hex SHA-256 over the sites and their keys in order, as jobs and sessions name the roster."""
        return roster_digest(self.sites)

    def sign(self, authority: Authority) -> SignedRoster:
        """This roster with the authority's signature. Raises BadInput, RosterRefused for what cannot be a roster."""
        roster_digest(self.sites)
        if self.federation != authority.federation or self.number < 1:
            raise BadInput(
                f"roster: found number {self.number} of {self.federation!r}, expected 1 or more "
                f"of {authority.federation!r}"
            )
        ready = replace(self, issued=self.issued.astimezone(UTC).replace(microsecond=0))
        return replace(
            ready, by=authority.fingerprint, signature=authority.sign(_signed_bytes(ready))
        )

    def to_toml(self) -> bytes:
        """The file's bytes. Raises BadInput for a name of a site that a certificate cannot hold."""
        return (
            f'federation = "{self.federation}"\n'
            f"number = {self.number}\n"
            f"issued = {self.issued:%Y-%m-%dT%H:%M:%SZ}\n\n"
            f"{sites_toml(self.sites)}\n"
            "[signature]\n"
            f'by = "{self.by}"\n'
            f'value = "{base64.b64encode(self.signature).decode()}"\n'
        ).encode()

    def save(self, path: Path) -> None:
        """Replace the file atomically. Raises BadInput, OSError."""
        write_atomic(path, self.to_toml())

    @classmethod
    def parse(cls, data: bytes, where: str = "roster") -> SignedRoster:
        """A roster from a file's bytes, of any origin, not yet verified. Raises BadInput that names the entry, and
        SignatureRefused for one without signature."""
        found = _tables(data, where)
        if "signature" not in found:
            raise SignatureRefused(
                where, "no signature", "one of the federation's authority", "coordinator",
                remedy=_ASK,
            )  # fmt: skip
        if set(found) != _KEYS:
            raise BadInput(
                f"{where}: found {', '.join(map(repr, found))}, expected {', '.join(sorted(_KEYS))}"
            )
        number, issued, federation = found["number"], found["issued"], found["federation"]
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number < 1 << 63:
            raise BadInput(f"{where}: number: found {number!r}, expected 1 or more")
        if not isinstance(issued, datetime) or issued.tzinfo is None or issued.microsecond:
            raise BadInput(f"{where}: issued: found {issued!s}, expected a date with time in UTC")
        if not isinstance(federation, str):
            raise BadInput(f"{where}: federation: found {federation!r}, expected its name")
        check_name(f"{where}: federation", federation)
        by, value = _signature(found["signature"], where)
        return cls(federation, number, issued.astimezone(UTC), sites_of(found, where), by, value)

    def verify(self, authority_pem: bytes, federation: str, *, newest: int = 0) -> None:
        """Return if this is a roster of `federation` that its authority signed, not older than number `newest`.

        authority_pem: the trusted certificates. Raises SignatureRefused (another authority, or altered), and
        RosterRefused (another federation, or an older number).
        """
        what = f"roster {self.number} of {self.federation!r}"
        if self.federation != federation:
            raise RosterRefused(
                what, f"federation {self.federation!r}", repr(federation), "coordinator",
                remedy="use the roster of this federation",
            )  # fmt: skip
        trusted = {
            each.fingerprint(hashes.SHA256()).hex(): each
            for each in x509.load_pem_x509_certificates(authority_pem)
        }
        authority = trusted.get(self.by)
        if authority is None:
            raise SignatureRefused(
                what, f"a signature of another authority ({self.by[:16]}...)",
                f"one of {', '.join(f'{each[:16]}...' for each in trusted)}", "coordinator",
                remedy=_ASK,
            )  # fmt: skip
        public = authority.public_key()
        try:
            if not isinstance(public, ec.EllipticCurvePublicKey):
                raise InvalidSignature
            public.verify(self.signature, _signed_bytes(self), ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            raise SignatureRefused(
                what, "a signature that does not verify", "the authority's over this very roster",
                "coordinator", remedy=f"it was altered after signing: {_ASK}",
            ) from None  # fmt: skip
        if self.number < newest:
            raise RosterRefused(
                what, f"number {self.number}", f"{newest} or newer, the newest seen here",
                "coordinator", remedy="an older roster may list a site that was removed since",
            )  # fmt: skip

    def changes(self, before: Mapping[SiteId, bytes]) -> list[str]:
        """What differs from an earlier roster's sites, in words: see `changes_of`."""
        return changes_of(self.sites, before)


_ASK = "ask the operator for the newest roster.toml, and compare the fingerprint of authority.pem"


def read_pins(
    path: Path, authority_pem: bytes, federation: str
) -> tuple[dict[SiteId, bytes], SignedRoster | None]:
    """The sites of a roster file with their keys, and the signed roster, verified; None for a static one.

    Raises BadInput that names the entry, SignatureRefused, RosterRefused.
    """
    data = read_limited(path, "a roster")
    tables = _tables(data, str(path))
    if set(tables) <= {"sites"}:
        return sites_of(tables, str(path)), None
    found = SignedRoster.parse(data, str(path))
    found.verify(authority_pem, federation)
    return dict(found.sites), found


def keep_roster(folder: Path, roster: SignedRoster) -> None:
    """Keep a roster under its number: what its sites signed can be verified after they have left. Raises OSError."""
    path = folder / f"{roster.number}.toml"
    if not path.exists():
        make_folder(folder)
        roster.save(path)


class KeptPin(NamedTuple):
    """A site with a key that it has or had. until: when the first roster without it was signed, UTC, in the form of an
    audit line's time without fractions; "" where the newest one has it."""

    site: SiteId
    key: bytes
    until: str = ""


def kept_pins(
    folder: Path, authority_pem: bytes, federation: str, pins: Mapping[SiteId, bytes]
) -> list[KeptPin]:
    """The sites of a roster and of all rosters that were kept, each with each key that it had, the newest roster first.
    pins: of the roster that is read now. A file that the federation's authority did not sign counts for nothing."""
    known: dict[tuple[SiteId, bytes], str] = {}
    numbers = (int(path.stem) for path in folder.glob("*.toml") if path.stem.isdecimal())
    after = ""
    for number in sorted(numbers, reverse=True):
        with suppress(BadInput, SignatureRefused, RosterRefused):
            found, roster = read_pins(folder / f"{number}.toml", authority_pem, federation)
            for pin in found.items():
                known.setdefault(pin, after)
            after = f"{roster.issued:%Y-%m-%dT%H:%M:%SZ}" if roster is not None else after
    now = {pin: known.get(pin, "") for pin in pins.items()}
    return [KeptPin(*pin, until) for pin, until in (now | known).items()]


def changes_of(sites: Mapping[SiteId, bytes], before: Mapping[SiteId, bytes]) -> list[str]:
    """What differs from an earlier roster's sites, in words, one kind a line; empty if nothing does."""
    added = [site for site in sites if site not in before]
    removed = [site for site in before if site not in sites]
    both = [site for site in sites if site in before]
    rekeyed = [site for site in both if sites[site] != before[site]]
    found = [
        f"{_count(names)} {what}: {', '.join(names)}"
        for names, what in (
            (added, "added"), (removed, "removed"), (rekeyed, "with another identity key"),
        )
        if names
    ]  # fmt: skip
    if both != [site for site in before if site in sites]:
        found.append("the order of the sites differs")
    return found


def _signed_bytes(roster: SignedRoster) -> bytes:
    """What the signature is over. Its first byte is no tag of DER, so it is never the body of a certificate."""
    entries = (part for site, key in roster.sites.items() for part in (site.encode(), key))
    issued, number = int(roster.issued.timestamp()), roster.number.to_bytes(8, "little")
    return framed(
        _LABEL, roster.federation.encode(), number, issued.to_bytes(8, "little", signed=True),
        *entries,
    )  # fmt: skip


def _tables(data: bytes, where: str) -> dict[str, Any]:
    if len(data) > MOST_BYTES:
        raise BadInput(f"{where}: found {len(data)} bytes, expected at most {MOST_BYTES}")
    try:
        return tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"{where}: it cannot be read as TOML ({error})") from None


def _signature(found: object, where: str) -> tuple[str, bytes]:
    """The fingerprint and the signature's bytes of [signature]. Raises BadInput."""
    if not isinstance(found, dict) or set(found) != {"by", "value"}:
        raise BadInput(f"{where}: signature: found other keys, expected by and value")
    by, value = found["by"], found["value"]
    if not isinstance(by, str) or not re.fullmatch("[0-9a-f]{64}", by):
        raise BadInput(f"{where}: signature.by: expected a SHA-256 fingerprint in hexadecimal")
    try:
        return by, base64.b64decode(value, validate=True)
    except (TypeError, binascii.Error, ValueError):
        raise BadInput(f"{where}: signature.value: expected base64") from None


def _count(names: list[SiteId]) -> str:
    return f"{len(names)} site{'s' if len(names) > 1 else ''}"
