"""Checks that both roles make in the same way, and what both machines are built from."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from fedcore.errors import (
    Conflicting,
    HeaderRefused,
    KeyRefused,
    ListRefused,
    OutOfOrder,
    RosterRefused,
    ShareRefused,
    StaleEpoch,
    StateDiffers,
    ThresholdRefused,
    VectorRefused,
)
from fedcore.secagg.crypto.shamir import SHARE_BYTES
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protections import Protection
from fedcore.secagg.protocol.messages import (
    COORDINATOR,
    SELF_SEED,
    Certificate,
    Confirm,
    CoordinatorMessage,
    FromOneSite,
    Keys,
    Parcel,
    Shares,
    SharesHead,
    SiteMessage,
    Submit,
    check_signature,
)
from fedcore.secagg.protocol.wire_form import digest, encode, record, records, type_name, unsigned
from fedcore.types import SiteId

THIS_SITE = "this site"


@record("Exchange")
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
                    f"second {kind}", "other bytes than the first", "the same request", COORDINATOR
                )
            return past
    return None


@record("Standing")
class SiteProgress:
    """The progress of a site between rounds, which the next header must match.

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
        raise RosterRefused("roster", "a site twice", "each once", COORDINATOR)
    unknown = sorted(set(roster) - set(pins))
    if unknown:
        raise RosterRefused(
            "roster", f"the unpinned site {unknown[0]!r}", "pinned sites only", COORDINATOR,
            remedy="a site joins with a roster that this site's operator approved",
        )  # fmt: skip
    if list(roster) != [site for site in pins if site in roster]:
        raise RosterRefused("roster", "another order", "the order of the pinned sites", COORDINATOR)
    if len(roster) < least:
        raise RosterRefused(
            "roster", f"{len(roster)} sites", f"at least {least}", COORDINATOR,
            remedy="more sites connected at a time, or a lower protect.threshold in the job",
        )  # fmt: skip


def check_round_threshold(header: RoundHeader, planned: int) -> None:
    """t of a round is the plan's, however few sites are invited (PROTOCOL N). Raises ThresholdRefused."""
    if header.threshold != planned:
        raise ThresholdRefused("threshold", header.threshold, planned, COORDINATOR)


def check_protection(protection: str) -> None:
    """Masks or encryption, whatever the local plan allows. Raises HeaderRefused."""
    if not Protection.of(protection).protects:
        raise HeaderRefused(
            "protection", protection, "masks or encryption", COORDINATOR,
            remedy="`plain` exists inside one process only",
        )  # fmt: skip


def check_equal(*rows: tuple[str, object, object]) -> None:
    """Each (what, found, expected) agrees. Raises HeaderRefused for the first that does not."""
    for what, found, expected in rows:
        if found != expected:
            raise HeaderRefused(what, found, expected, COORDINATOR)


def check_grows(
    what: str, found: int, last: int, error: type[HeaderRefused | StaleEpoch] = HeaderRefused
) -> None:
    """A number is used once: the next one is above the last. Raises `error`."""
    if found <= last:
        raise error(what, found, f"more than {last}", COORDINATOR)


def check_header(found: bytes, header: RoundHeader, fault: str) -> None:
    """A message belongs to the round at hand. Raises HeaderRefused."""
    if found != header.digest:
        raise HeaderRefused(
            "message", "one of another round or plan",
            f"round {header.round} ({header.purpose}) of job {header.job}", fault,
        )  # fmt: skip


def check_sender(named: object, sender: SiteId) -> None:
    """A message names the site that sent it. Raises RosterRefused."""
    if named != sender:
        raise RosterRefused("message", f"one of {named!r} from {sender!r}", "its own", sender)


def check_members(
    found: Sequence[SiteId], allowed: Sequence[SiteId], threshold: int, what: str
) -> None:
    """A list of sites: a subset of `allowed`, each once, in its order, at least `threshold`.

    Raises ListRefused or ThresholdRefused, both the coordinator's fault.
    """
    if len(set(found)) != len(found):
        raise ListRefused(what, "a site twice", "each once", COORDINATOR)
    strange = sorted(set(found) - set(allowed))
    if strange:
        raise ListRefused(
            what, f"site {strange[0]!r}", f"a subset of {len(allowed)} sites", COORDINATOR
        )
    if list(found) != [site for site in allowed if site in set(found)]:
        raise ListRefused(what, "another order", "roster order", COORDINATOR)
    if len(found) < threshold:
        raise ThresholdRefused(what, f"{len(found)} sites", f"at least {threshold}", COORDINATOR)


def check_keys(keys: Keys, header: RoundHeader, pins: Mapping[SiteId, bytes]) -> None:
    """One site's signed keys: of this round, well formed, of no small order."""
    check_header(keys.header, header, keys.site)
    if keys.site not in header.roster:
        raise RosterRefused("keys", f"of {keys.site!r}", "a site of the roster", COORDINATOR)
    check_signature(keys, pins)
    keys.channel.check(keys.site)
    keys.mask.check(keys.site)
    if len(keys.self_seed_hash) != 32:
        found = f"{len(keys.self_seed_hash)} bytes"
        raise KeyRefused("self-seed hash", found, 32, keys.site)


def check_distinct(keys: Iterable[tuple[SiteId, bytes]], what: str) -> None:
    """No public key appears twice in a bundle, not even as two keys of one site. Raises KeyRefused."""
    seen: dict[bytes, SiteId] = {}
    for site, public in keys:
        if public in seen:
            raise KeyRefused(what, f"a key of {seen[public]!r} again", "distinct keys", site)
        seen[public] = site


def check_same_state(items: Iterable[Keys | Submit], state_tag: bytes, key_id: bytes) -> None:
    """Every site starts from this site's own state under its own key epoch. Raises StateDiffers."""
    for item in items:
        if item.state_tag != state_tag:
            raise StateDiffers(
                "state tag", f"another one at {item.site!r}", "that of this site", item.site,
                remedy="whoever missed a release catches up from the sealed checkpoint",
            )  # fmt: skip
        if item.key_id != key_id:
            raise StateDiffers(
                "key id", f"another one at {item.site!r}", "that of this site", item.site,
                remedy="a new key epoch",
            )  # fmt: skip


def check_submission(
    submit: Submit, header: RoundHeader, pins: Mapping[SiteId, bytes], salt_bytes: int
) -> None:
    """One signed submission of this round, with a salt exactly where the plan's cipher takes one."""
    check_header(submit.header, header, submit.site)
    check_signature(submit, pins)
    if len(submit.salt) != salt_bytes:
        raise VectorRefused(
            "vector", f"a salt of {len(submit.salt)} bytes", f"{salt_bytes} bytes", submit.site,
            remedy="the plan's cipher decides: 32 under 'keystream', else none",
        )  # fmt: skip


def share_digest(header: bytes, of: SiteId, holder: SiteId, kind: str, share: bytes) -> bytes:
    """What a sender signs of one plaintext key share."""
    return digest((header, of, holder, kind, share))


def check_share(header: bytes, parcel: Parcel, kind: str, share: bytes, fault: str) -> None:
    """A key share is the one that the sender of its parcel signed. Raises ShareRefused."""
    signed = parcel.self_share_digest if kind == SELF_SEED else parcel.root_share_digest
    found = share_digest(header, parcel.sender, parcel.recipient, kind, share)
    if len(share) != SHARE_BYTES or found != signed:
        raise ShareRefused(
            f"{kind} share of {parcel.sender!r}", "one that differs from its signed digest",
            "the share its sender signed", fault,
        )  # fmt: skip


def check_head(
    head: SharesHead, header: RoundHeader, pins: Mapping[SiteId, bytes], joined: Sequence[SiteId]
) -> None:
    """A signed list of parcels of this round: one for each site of U1. Raises ShareRefused."""
    check_header(head.header, header, head.site)
    check_signature(head, pins)
    if [recipient for recipient, _ in head.parcels] != list(joined):
        raise ShareRefused(
            "shares", f"parcels for {len(head.parcels)} sites",
            f"one for each of the {len(joined)} that joined", head.site,
        )  # fmt: skip


S = TypeVar("S", bound=FromOneSite | Shares)


def in_order(roster: Sequence[SiteId], items: Iterable[S]) -> tuple[S, ...]:
    """Sorted by the place of the site in the roster."""
    places = {site: place for place, site in enumerate(roster)}
    return tuple(sorted(items, key=lambda item: places[item.site]))


def survivors_of(submissions: Iterable[Submit]) -> tuple[SiteId, ...]:
    """U3 by name."""
    return tuple(submit.site for submit in submissions)


def listed(submissions: Iterable[Submit]) -> tuple[tuple[SiteId, bytes], ...]:
    """U3 as a confirmation signs it: (site, digest of its whole submission). The digest covers the salt, so
    a site cannot have two valid submissions of one vector with different salts."""
    return tuple((submit.site, hashlib.sha256(unsigned(submit)).digest()) for submit in submissions)


def check_confirm(confirm: Confirm, own: Confirm, pins: Mapping[SiteId, bytes]) -> None:
    """Another site signed the very bytes that this one signed. Raises ListRefused."""
    check_signature(confirm, pins)
    for name in ("header", "bundle", "cohort", "survivors"):
        if getattr(confirm, name) != getattr(own, name):
            raise ListRefused(
                "confirmation", f"another {name} signed by {confirm.site!r}",
                "the list this site signed", COORDINATOR,
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
        raise ListRefused(what, "this site left out", "this site in it", COORDINATOR)
