"""Checks that both roles make in the same way, read as `checks.members(...)`; each raises what it refuses."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from fedcore.errors import (
    HeaderRefused,
    KeyRefused,
    ListRefused,
    RosterRefused,
    ShareRefused,
    StateDiffers,
    ThresholdRefused,
    VectorRefused,
)
from fedcore.secagg.crypto.hybrid import HybridPublic
from fedcore.secagg.crypto.shamir import SHARE_BYTES
from fedcore.secagg.crypto.shared_work import shared_of
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protections import Protection
from fedcore.secagg.protocol import messages
from fedcore.secagg.protocol.messages import COORDINATOR, SELF_SEED, check_signature, share_digest
from fedcore.types import SiteId

Pins = Mapping[SiteId, bytes]
Sites = Sequence[SiteId]


def roster(header: RoundHeader, pins: Pins, least: int, me: SiteId | None = None) -> None:
    """The cohort has at least `least` sites, all pinned, each once, in their order, `me` among them.

    Raises RosterRefused, or ListRefused where `me` is missing.
    """
    sites = header.roster
    if len(set(sites)) != len(sites):
        raise RosterRefused("roster", "a site twice", "each once", COORDINATOR)
    unknown = sorted(set(sites) - set(pins))
    if unknown:
        raise RosterRefused(
            "roster", f"the unpinned site {unknown[0]!r}", "pinned sites only", COORDINATOR,
            remedy="a site joins with a roster that this site's operator approved",
        )  # fmt: skip
    if list(sites) != [site for site in pins if site in sites]:
        raise RosterRefused("roster", "another order", "the order of the pinned sites", COORDINATOR)
    if len(sites) < least:
        raise RosterRefused(
            "roster", f"{len(sites)} sites", f"at least {least}", COORDINATOR,
            remedy="more sites connected at a time, or a lower protect.threshold in the job",
        )  # fmt: skip
    _has(sites, me, "roster")


def _has(sites: Sites, me: SiteId | None, what: str) -> None:
    if me is not None and me not in sites:
        raise ListRefused(what, "this site left out", "this site in it", COORDINATOR)


def round_threshold(header: RoundHeader, planned: int) -> None:
    """t of a round is the plan's, however few sites are invited (PROTOCOL N). Raises ThresholdRefused."""
    if header.threshold != planned:
        raise ThresholdRefused("threshold", header.threshold, planned, COORDINATOR)


def protection(name: str) -> None:
    """Masks or encryption, whatever the local plan allows. Raises HeaderRefused."""
    if not Protection.of(name).protects:
        raise HeaderRefused(
            "protection", name, "masks or encryption", COORDINATOR,
            remedy="`plain` exists inside one process only",
        )  # fmt: skip


def equal(*rows: tuple[str, object, object]) -> None:
    """Each (what, found, expected) agrees. Raises HeaderRefused for the first that does not."""
    for what, found, expected in rows:
        if found != expected:
            raise HeaderRefused(what, found, expected, COORDINATOR)


def grows(what: str, found: int, last: int, error: type[HeaderRefused] = HeaderRefused) -> None:
    """A number is used once: the next one is above the last. Raises `error`."""
    if found <= last:
        raise error(what, found, f"more than {last}", COORDINATOR)


def of_round(found: bytes, header: RoundHeader, fault: str) -> None:
    """A message belongs to the round at hand. Raises HeaderRefused."""
    if found != header.digest:
        raise HeaderRefused(
            "message", "one of another round or plan",
            f"round {header.round} ({header.purpose}) of job {header.job}", fault,
        )  # fmt: skip


def sender(named: object, origin: SiteId) -> None:
    """A message names the site that sent it. Raises RosterRefused."""
    if named != origin:
        raise RosterRefused("message", f"one of {named!r} from {origin!r}", "its own", origin)


def members(
    found: Sites, allowed: Sites, threshold: int, what: str, me: SiteId | None = None
) -> None:
    """A list of sites: a subset of `allowed`, each once, in its order, at least `threshold`, `me` among them.

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
    _has(found, me, what)


def keys(keys: messages.Keys, header: RoundHeader, pins: Pins) -> None:
    """One site's signed keys: of this round, well formed, of no small order."""
    of_round(keys.header, header, keys.site)
    if keys.site not in header.roster:
        raise RosterRefused("keys", f"of {keys.site!r}", "a site of the roster", COORDINATOR)
    check_signature(keys, pins)
    well_formed(keys)


def well_formed(keys: messages.PublicKeys) -> None:
    """Public keys of the right lengths and of no small order. Raises KeyRefused."""
    for public in (keys.channel, keys.mask):
        shared_of(public, (HybridPublic, keys.site), partial(public.check, keys.site))
    if len(keys.self_seed_hash) != 32:
        found = f"{len(keys.self_seed_hash)} bytes"
        raise KeyRefused("self-seed hash", found, 32, keys.site)


def distinct(keys: Iterable[tuple[SiteId, bytes]], what: str) -> None:
    """No public key appears twice in a bundle, not even as two keys of one site. Raises KeyRefused."""
    seen: dict[bytes, SiteId] = {}
    for site, public in keys:
        if public in seen:
            raise KeyRefused(what, f"a key of {seen[public]!r} again", "distinct keys", site)
        seen[public] = site


def same_state(
    items: Iterable[messages.Keys | messages.Submit], state_tag: bytes, key_id: bytes
) -> None:
    """Every site starts from this site's own state under its own key epoch. Raises StateDiffers."""
    missed = "whoever missed a release catches up from the sealed checkpoint"
    for item in items:
        for what, found, expected, remedy in (
            ("state tag", item.state_tag, state_tag, missed),
            ("key id", item.key_id, key_id, "a new key epoch"),
        ):
            if found != expected:
                other = f"another one at {item.site!r}"
                raise StateDiffers(what, other, "that of this site", item.site, remedy=remedy)


def submission(submit: messages.Submit, header: RoundHeader, pins: Pins, salt_bytes: int) -> None:
    """One signed submission of this round, with a salt exactly where the plan's cipher takes one."""
    of_round(submit.header, header, submit.site)
    check_signature(submit, pins)
    if len(submit.salt) != salt_bytes:
        raise VectorRefused(
            "vector", f"a salt of {len(submit.salt)} bytes", f"{salt_bytes} bytes", submit.site,
            remedy="the plan's cipher decides: 32 under 'keystream', else none",
        )  # fmt: skip


def share(header: bytes, parcel: messages.Parcel, kind: str, share: bytes, fault: str) -> None:
    """A key share is the one that the sender of its parcel signed. Raises ShareRefused."""
    signed = parcel.self_share_digest if kind == SELF_SEED else parcel.root_share_digest
    found = share_digest(header, parcel.sender, parcel.recipient, kind, share)
    if len(share) != SHARE_BYTES or found != signed:
        raise ShareRefused(
            f"{kind} share of {parcel.sender!r}", "one that differs from its signed digest",
            "the share its sender signed", fault,
        )  # fmt: skip


def head(head: messages.SharesHead, header: RoundHeader, pins: Pins, joined: Sites) -> None:
    """A signed list of parcels of this round: one for each site of U1. Raises ShareRefused."""
    of_round(head.header, header, head.site)
    check_signature(head, pins)
    recipients = shared_of(head, _recipients, lambda: _recipients(head))
    if recipients != list(joined):
        raise ShareRefused(
            "shares", f"parcels for {len(head.parcels)} sites",
            f"one for each of the {len(joined)} that joined", head.site,
        )  # fmt: skip


def _recipients(head: messages.SharesHead) -> list[SiteId]:
    return [recipient for recipient, _ in head.parcels]


def confirm(confirm: messages.Confirm, own: messages.Confirm, pins: Pins) -> None:
    """Another site signed the very bytes that this one signed. Raises ListRefused."""
    check_signature(confirm, pins)
    for name in ("header", "bundle", "cohort", "survivors"):
        if getattr(confirm, name) != getattr(own, name):
            raise ListRefused(
                "confirmation", f"another {name} signed by {confirm.site!r}",
                "the list this site signed", COORDINATOR,
            )  # fmt: skip


def certificate(certificate: messages.Certificate, header: RoundHeader, pins: Pins) -> None:
    """At least t distinct listed survivors signed it. Raises the error of the first check that fails."""
    of_round(certificate.header.digest, header, COORDINATOR)
    members(certificate.survivors, header.roster, header.threshold, "certificate")
    signers = [site for site, _ in certificate.signatures]
    members(signers, certificate.survivors, header.threshold, "certificate's signers")

    def check() -> None:
        for site, signature in certificate.signatures:
            check_signature(certificate.statement(site, signature), pins)

    shared_of(certificate, (members, tuple(pins.items())), check)
