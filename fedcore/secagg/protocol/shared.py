"""Checks that both roles make in the same way, and what both machines are built from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedcore.errors import (
    Conflicting,
    HeaderRefused,
    KeyRefused,
    ListRefused,
    OutOfOrder,
    RosterRefused,
    StateDiffers,
    ThresholdRefused,
    VectorRefused,
)
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protections import Protection
from fedcore.secagg.protocol.messages import (
    COORDINATOR,
    Certificate,
    Confirm,
    CoordinatorMessage,
    Keys,
    SiteMessage,
    Submit,
    check_signature,
)
from fedcore.secagg.protocol.wire_form import digest, encode, record, records, type_name, unsigned
from fedcore.types import SiteId

THIS_SITE = "this site"


@record("Exchange")
@dataclass(frozen=True)
class Exchange:
    """One request that was answered: its record's name, its digest, and the byte form of the answer (or b"").

    An identical request gets the identical answer again, a different one of the same type is refused.
    """

    kind: str
    request: bytes
    answer: bytes


History = tuple[Exchange, ...]


def exchange(request: CoordinatorMessage, answer: SiteMessage | None = None) -> Exchange:
    """The record of a request and its answer."""
    return Exchange(type_name(type(request)), digest(request), encode(answer) if answer else b"")


def answered(history: History, request: object) -> Exchange | None:
    """The earlier exchange of an identical request; None for a request of a type not seen yet.

    Raises Conflicting for a different request of a type already answered.
    """
    kind = type_name(type(request))
    for past in history:
        if past.kind == kind:
            if past.request != digest(request):
                raise Conflicting(
                    f"second {kind}", found="other bytes than the first", expected="the same request",
                    fault=COORDINATOR,
                )  # fmt: skip
            return past
    return None


@record("Standing")
@dataclass(frozen=True)
class SiteProgress:
    """Where a party stands between rounds: what it will insist on in the next header.

    epoch, key_id: the key epoch held. round: the last round number seen, abandoned ones included.
    certificate: hash of the last release certificate, "" before the first; released: its round.
    exposed: digest of the header of the round whose sum may be known and is not released yet, or b"".
    submitted: (purpose, training round) of the vectors sent under `encrypted` from the present state.
    proved: the highest round of which this site's own signature came back without a record of it here.
    Only a release ends the last three (PROTOCOL H, V): leaving a round or a key epoch does not.
    """

    epoch: int
    key_id: bytes
    round: int = 0
    certificate: str = ""
    released: int = 0
    exposed: bytes = b""
    submitted: tuple[tuple[str, int], ...] = ()
    proved: int = 0


def not_legal(
    found: type[object], legal: Iterable[type[object]], *, message: bool, fault: str
) -> OutOfOrder:
    """The refusal of a message, or of an event, that a stage does not take; it lists those it takes."""
    kinds = set(records().values())
    names = sorted(type_name(each) for each in legal if (each in kinds) is message)
    return OutOfOrder(
        "message" if message else "event", found=type_name(found), expected=" or ".join(names),
        fault=fault,
    )  # fmt: skip


def check_roster(header: RoundHeader, pins: Mapping[SiteId, bytes], least: int) -> None:
    """The cohort has at least `least` sites, all pinned, each once, in their order. Raises RosterRefused."""
    roster = header.roster
    if len(set(roster)) != len(roster):
        raise RosterRefused("roster", found="a site twice", expected="each once", fault=COORDINATOR)
    unknown = sorted(set(roster) - set(pins))
    if unknown:
        raise RosterRefused(
            "roster", found=f"the unpinned site {unknown[0]!r}", expected="pinned sites only",
            fault=COORDINATOR, remedy="a site joins with a roster that this site's operator approved",
        )  # fmt: skip
    if list(roster) != [site for site in pins if site in roster]:
        raise RosterRefused(
            "roster", found="another order", expected="the order of the pinned sites",
            fault=COORDINATOR,
        )  # fmt: skip
    if len(roster) < least:
        raise RosterRefused(
            "roster",
            found=f"{len(roster)} sites",
            expected=f"at least {least}",
            fault=COORDINATOR,
            remedy="more sites connected at a time, or a lower protect.threshold in the job",
        )


def check_round_threshold(header: RoundHeader, planned: int) -> None:
    """t of a round is the plan's, however few sites are invited (PROTOCOL N). Raises ThresholdRefused."""
    if header.threshold != planned:
        raise ThresholdRefused(
            "threshold", found=header.threshold, expected=planned, fault=COORDINATOR
        )


def check_protection(protection: str) -> None:
    """Masks or encryption, whatever a local plan says. Raises HeaderRefused."""
    if not Protection.of(protection).protects:
        raise HeaderRefused(
            "protection", found=protection, expected="masks or encryption", fault=COORDINATOR,
            remedy="`plain` exists inside one process only",
        )  # fmt: skip


def check_header(found: bytes, header: RoundHeader, fault: str) -> None:
    """A message belongs to the round at hand. Raises HeaderRefused."""
    if found != header.digest:
        raise HeaderRefused(
            "message", found="one of another round or plan",
            expected=f"round {header.round} ({header.purpose}) of job {header.job}", fault=fault,
        )  # fmt: skip


def check_members(
    found: Sequence[SiteId], allowed: Sequence[SiteId], threshold: int, what: str
) -> None:
    """A list of sites: a subset of `allowed`, each once, in its order, at least `threshold`.

    Raises ListRefused or ThresholdRefused, both the coordinator's fault.
    """
    if len(set(found)) != len(found):
        raise ListRefused(what, found="a site twice", expected="each once", fault=COORDINATOR)
    strange = sorted(set(found) - set(allowed))
    if strange:
        raise ListRefused(
            what, found=f"site {strange[0]!r}", expected=f"a subset of {len(allowed)} sites",
            fault=COORDINATOR,
        )  # fmt: skip
    if list(found) != [site for site in allowed if site in set(found)]:
        raise ListRefused(what, found="another order", expected="roster order", fault=COORDINATOR)
    if len(found) < threshold:
        raise ThresholdRefused(
            what, found=f"{len(found)} sites", expected=f"at least {threshold}", fault=COORDINATOR
        )


def check_keys(keys: Keys, header: RoundHeader, pins: Mapping[SiteId, bytes]) -> None:
    """One site's signed keys: of this round, well formed, of no small order."""
    check_header(keys.header, header, keys.site)
    if keys.site not in header.roster:
        raise RosterRefused(
            "keys", found=f"of {keys.site!r}", expected="a site of the roster", fault=COORDINATOR
        )
    check_signature(keys, pins)
    keys.channel.check(keys.site)
    keys.mask.check(keys.site)
    if len(keys.self_seed_hash) != 32:
        raise KeyRefused(
            "self-seed hash",
            found=f"{len(keys.self_seed_hash)} bytes",
            expected=32,
            fault=keys.site,
        )


def check_distinct(bundle: Iterable[Keys]) -> None:
    """No public key appears twice in a bundle, not even as a channel and a mask key of one site."""
    seen: dict[bytes, SiteId] = {}
    for keys in bundle:
        for public in (
            keys.channel.x25519,
            keys.channel.mlkem,
            keys.mask.x25519,
            keys.mask.mlkem,
            keys.self_seed_hash,
        ):
            if public in seen:
                raise KeyRefused(
                    "key bundle", found=f"a key of {seen[public]!r} again", expected="distinct keys",
                    fault=keys.site,
                )  # fmt: skip
            seen[public] = keys.site


def check_same_state(items: Iterable[Keys | Submit], state_tag: bytes, key_id: bytes) -> None:
    """Every site starts from this site's own state under its own key epoch. Raises StateDiffers."""
    for item in items:
        if item.state_tag != state_tag:
            raise StateDiffers(
                "state tag", found=f"another one at {item.site!r}", expected="that of this site",
                fault=item.site,
                remedy="whoever missed a release catches up from the sealed checkpoint",
            )  # fmt: skip
        if item.key_id != key_id:
            raise StateDiffers(
                "key id", found=f"another one at {item.site!r}", expected="that of this site",
                fault=item.site, remedy="a new key epoch",
            )  # fmt: skip


def check_submission(
    submit: Submit, header: RoundHeader, pins: Mapping[SiteId, bytes], salt_bytes: int
) -> None:
    """One signed submission of this round, with a salt exactly where the plan's cipher takes one."""
    check_header(submit.header, header, submit.site)
    check_signature(submit, pins)
    if len(submit.salt) != salt_bytes:
        raise VectorRefused(
            "vector", found=f"a salt of {len(submit.salt)} bytes", expected=f"{salt_bytes} bytes",
            fault=submit.site, remedy="the plan's cipher decides: 32 under 'keystream', else none",
        )  # fmt: skip


def share_digest(header: bytes, of: SiteId, holder: SiteId, kind: str, share: bytes) -> bytes:
    """What a sender signs of one plaintext key share."""
    return digest((header, of, holder, kind, share))


def survivors_of(submissions: Iterable[Submit]) -> tuple[SiteId, ...]:
    """U3 by name."""
    return tuple(submit.site for submit in submissions)


def listed(submissions: Iterable[Submit]) -> tuple[tuple[SiteId, bytes], ...]:
    """U3 as a confirmation signs it: of each submission all it says, so that a site cannot have signed
    two of one vector with different salts."""
    return tuple((submit.site, hashlib.sha256(unsigned(submit)).digest()) for submit in submissions)


def check_confirm(confirm: Confirm, own: Confirm, pins: Mapping[SiteId, bytes]) -> None:
    """Another site signed the very bytes that this one signed."""
    check_signature(confirm, pins)
    same = ("header", "bundle", "cohort", "survivors")
    for name in same:
        if getattr(confirm, name) != getattr(own, name):
            raise ListRefused(
                "confirmation", found=f"another {name} signed by {confirm.site!r}",
                expected="the list this site signed", fault=COORDINATOR,
            )  # fmt: skip


def check_certificate(
    certificate: Certificate, header: RoundHeader, pins: Mapping[SiteId, bytes]
) -> None:
    """At least t distinct listed survivors signed it. Raises the error of the first check that fails."""
    check_header(certificate.header.digest, header, COORDINATOR)
    check_members(certificate.survivors, header.roster, header.threshold, "certificate")
    signers = [site for site, _ in certificate.signatures]
    check_members(signers, certificate.survivors, header.threshold, "certificate's signers")
    for site, signature in certificate.signatures:
        check_signature(certificate.statement(site, signature), pins)


def refuse_missing(site: SiteId, members: Sequence[SiteId], what: str) -> None:
    """This site must be among the members itself. Raises ListRefused."""
    if site not in members:
        raise ListRefused(
            what, found="this site left out", expected="this site in it", fault=COORDINATOR
        )
