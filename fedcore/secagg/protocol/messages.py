"""What the two roles say to each other in a round, in the order in which they say it.

`header` is h, the digest of the round header, in every message. Signatures are Ed25519 over the
record's name and the message's byte form without them (PROTOCOL C). Invariant: no field of a message holds a
secret in clear; bulk vectors are named by size and digest and travel elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, replace
from functools import cached_property
from typing import ClassVar, Protocol, TypeVar

from fedcore.errors import SignatureRefused
from fedcore.secagg.crypto.hybrid import HybridPublic
from fedcore.secagg.crypto.identity_key import IdentityKey, verify
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol.wire_form import digest, record, type_name, unsigned
from fedcore.types import SiteId

record("RoundHeader")(RoundHeader)
record("HybridPublic")(HybridPublic)

COORDINATOR = "coordinator"
"""Whose fault it is, where it is not a site's."""


# ------------------------------------------------------------------------------------ from a site


@record("Keys")
@dataclass(frozen=True)
class Keys:
    """A site joins: its public keys of this round, and what it starts from.

    self_seed_hash: SHA-256 of the self-seed, so that a rebuilt one can be checked.
    state_tag: HMAC under G of the site's own state (PROTOCOL S). key_id: of the key epoch it holds (PROTOCOL E).
    """

    header: bytes
    site: SiteId
    channel: HybridPublic
    mask: HybridPublic
    self_seed_hash: bytes
    state_tag: bytes
    key_id: bytes
    signature: bytes


@record("Parcel")
@dataclass(frozen=True)
class Parcel:
    """What `sender` has for `recipient`: the envelope with both key shares, and the pair-seed offer.

    A site's parcel to itself carries only the digests of the shares it keeps. offer is empty unless
    the sender stands before the recipient in the roster (PROTOCOL P). The share digests let the recipient
    check its shares, and the coordinator an answer to unmask.
    """

    sender: SiteId
    recipient: SiteId
    envelope: bytes
    offer: bytes
    self_share_digest: bytes
    root_share_digest: bytes


@record("SharesHead")
@dataclass(frozen=True)
class SharesHead:
    """The signed list of one site's parcels: (recipient, digest of its parcel), in roster order."""

    header: bytes
    site: SiteId
    parcels: tuple[tuple[SiteId, bytes], ...]
    signature: bytes


@record("Shares")
@dataclass(frozen=True)
class Shares:
    """A site's key shares for every site of the bundle, sealed, with its signed list."""

    head: SharesHead
    parcels: tuple[Parcel, ...]


@record("Submit")
@dataclass(frozen=True)
class Submit:
    """A site's protected vector: SHA-256 over its chunks' digests, and its size in bytes.

    salt: that of its keystream, 32 bytes drawn for this vector (PROTOCOL X); b"" under any other cipher.
    """

    header: bytes
    site: SiteId
    digest: bytes
    size: int
    state_tag: bytes
    key_id: bytes
    salt: bytes
    signature: bytes


@record("Confirm")
@dataclass(frozen=True)
class Confirm:
    """The one survivor list a site signs in a round.

    bundle: digest of the signed key bundle; cohort: of U2; survivors: (site, digest of all that its
    submission says, its vector and salt among it).
    """

    header: bytes
    site: SiteId
    bundle: bytes
    cohort: bytes
    survivors: tuple[tuple[SiteId, bytes], ...]
    signature: bytes


@record("Answer")
@dataclass(frozen=True)
class Answer:
    """One key share of site `of`: of its self-seed if it survived, of its mask root if it did not."""

    of: SiteId
    kind: str
    share: bytes


SELF_SEED, MASK_ROOT = "self-seed", "mask root"


@record("Unmask")
@dataclass(frozen=True)
class Unmask:
    """For every site of U2 exactly one key share."""

    header: bytes
    site: SiteId
    answers: tuple[Answer, ...]


@record("Statement")
@dataclass(frozen=True)
class Statement:
    """What a site found in the opened sum (PROTOCOL R): keyed digests of the sum and of the state it leads to."""

    header: bytes
    site: SiteId
    survivors: bytes
    sum_mac: bytes
    state_mac: bytes
    signature: bytes


@record("Leave")
@dataclass(frozen=True)
class Leave:
    """A site leaves the round. `code` is LEFT, MATERIAL or RELEASE_REFUSED: nothing more reaches the
    coordinator.

    MATERIAL: what another site signed for this one does not open or is not what it signed; it depends on
    no row. sealed: the cause, for the other sites, under G and of one length whatever it is
    (`crypto/sealed.py`); empty where nothing was refused.
    """

    header: bytes
    site: SiteId
    code: str
    sealed: bytes = b""


LEFT, MATERIAL, RELEASE_REFUSED = "left", "another site's material", "release refused"


# ----------------------------------------------------------------------------- from the coordinator


@record("Announce")
@dataclass(frozen=True)
class Announce:
    """A round begins, for the sites of the header's roster."""

    header: RoundHeader


@record("KeyBundle")
@dataclass(frozen=True)
class KeyBundle:
    """U1: the signed keys of the sites that joined, in roster order."""

    header: bytes
    keys: tuple[Keys, ...]


@record("Delivery")
@dataclass(frozen=True)
class Delivery:
    """U2: the signed heads of all sites that shared, and the recipient's parcel of each."""

    header: bytes
    heads: tuple[SharesHead, ...]
    parcels: tuple[Parcel, ...]


@record("SurvivorList")
@dataclass(frozen=True)
class SurvivorList:
    """U3: the signed submissions that are in the sum, in roster order."""

    header: bytes
    submissions: tuple[Submit, ...]


@record("Confirmations")
@dataclass(frozen=True)
class Confirmations:
    """The signed survivor lists of at least t survivors, over identical bytes."""

    header: bytes
    confirms: tuple[Confirm, ...]


@record("Aggregate")
@dataclass(frozen=True)
class Aggregate:
    """The sum is ready for download: of exactly these submissions."""

    header: bytes
    submissions: tuple[Submit, ...]
    digest: bytes
    size: int


@record("Certificate")
@dataclass(frozen=True)
class Certificate:
    """The release certificate (PROTOCOL R): identical statements of at least t listed survivors.

    It carries the whole header, so that a late joiner can check it with the pinned keys alone.
    """

    header: RoundHeader
    survivors: tuple[SiteId, ...]
    sum_mac: bytes
    state_mac: bytes
    signatures: tuple[tuple[SiteId, bytes], ...]

    def statement(self, site: SiteId, signature: bytes) -> Statement:
        """The statement a signature of the certificate belongs to."""
        return Statement(
            self.header.digest,
            site,
            self._survivors,
            self.sum_mac,
            self.state_mac,
            signature,
        )

    @cached_property
    def _survivors(self) -> bytes:
        """Made once: for every signature anew, checking would grow with the square of the sites."""
        return digest(self.survivors)

    @property
    def hash(self) -> str:
        """Hex SHA-256 over what is certified, whoever signed it: what the next header names."""
        return digest((self.header, self.survivors, self.sum_mac, self.state_mac)).hex()


@record("Abandon")
@dataclass(frozen=True)
class Abandon:
    """The coordinator gives the round up at `stage`."""

    header: bytes
    stage: str


@record("Notice")
@dataclass(frozen=True)
class Notice:
    """Why another site left the round, as it sealed it: for the sites' own logs."""

    header: bytes
    site: SiteId
    sealed: bytes


SiteMessage = Keys | Shares | Submit | Confirm | Unmask | Statement | Leave
CoordinatorMessage = (
    Announce
    | KeyBundle
    | Delivery
    | SurvivorList
    | Confirmations
    | Aggregate
    | Certificate
    | Notice
    | Abandon
)
RoundMessage = SiteMessage | CoordinatorMessage


def site_of(message: SiteMessage) -> SiteId:
    """The site that sent it, by its own word."""
    return message.head.site if isinstance(message, Shares) else message.site


class Signed(Protocol):
    """Keys, SharesHead, Submit, Confirm, Statement, and what `epoch` signs."""

    __dataclass_fields__: ClassVar[dict[str, Field[object]]]

    @property
    def header(self) -> bytes: ...
    @property
    def site(self) -> SiteId: ...
    @property
    def signature(self) -> bytes: ...


S = TypeVar("S", bound=Signed)


def sign(message: S, identity: IdentityKey) -> S:
    """The message with its signature."""
    label = type_name(type(message)).encode()
    return replace(message, signature=identity.sign(label, unsigned(message)))


def check_signature(message: Signed, pins: Mapping[SiteId, bytes]) -> None:
    """Verify a signed message under the pinned key of the site it names. Raises SignatureRefused."""
    if message.site not in pins:
        raise SignatureRefused(
            "signature", found=f"one by {message.site!r}", expected="a site of the roster",
            fault=COORDINATOR,
        )  # fmt: skip
    label = type_name(type(message)).encode()
    verify(pins[message.site], label, unsigned(message), message.signature, signer=message.site)
