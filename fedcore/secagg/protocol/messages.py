"""The messages of a round, in the order in which they are sent.

`header` is h, the digest of the round header, in every message. Signatures are Ed25519 over the record's
name and the message's byte form with an empty signature (PROTOCOL C). Invariant: no field holds a secret in
clear; vectors are named by size and digest, and uploaded apart.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Protocol, TypeVar

from fedcore.errors import SignatureRefused
from fedcore.secagg.crypto.hybrid import HybridPublic
from fedcore.secagg.crypto.identity_key import IdentityKey, verify
from fedcore.secagg.crypto.shared_work import once, shared_of
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol.wire_form import digest, record, type_name, unsigned, with_signature
from fedcore.types import SiteId

record("RoundHeader")(RoundHeader)
record("HybridPublic")(HybridPublic)

COORDINATOR, THIS_SITE = "coordinator", "this site"
"""Whose fault it is, where it is not another site's."""


@dataclass(frozen=True)
class FromOneSite:
    """Sent by `site`. header: the digest of the header of its round, or of its key epoch."""

    header: bytes
    site: SiteId


SEALED = "sealed"
"""Beside the type of a field that the coordinator passes on and cannot open."""


@dataclass(frozen=True)
class PublicKeys(FromOneSite):
    """A site's public keys of one round. self_seed_hash: SHA-256 of the self-seed, to check a rebuilt one."""

    channel: HybridPublic
    mask: HybridPublic
    self_seed_hash: bytes

    @property
    def public(self) -> tuple[bytes, ...]:
        """All public values, which must be distinct over all sites."""
        channel, mask = self.channel, self.mask
        return channel.x25519, channel.mlkem, mask.x25519, mask.mlkem, self.self_seed_hash


@record("Keys")
class Keys(PublicKeys):
    """A site joins: its public keys of this round, and what it starts from.

    state_tag: HMAC under G of the site's own state (PROTOCOL S). key_id: of the key epoch it holds (PROTOCOL E).
    """

    state_tag: bytes
    key_id: bytes
    signature: bytes


@record("Parcel")
class Parcel:
    """What `sender` has for `recipient`: the envelope with both key shares, and the pair-seed offer.

    A site's parcel to itself carries only the digests of the shares it keeps. offer is empty unless
    the sender stands before the recipient in the roster (PROTOCOL P). The share digests let the recipient
    check its shares, and the coordinator an answer to unmask.
    """

    sender: SiteId
    recipient: SiteId
    envelope: Annotated[bytes, SEALED]
    offer: bytes
    self_share_digest: bytes
    root_share_digest: bytes


@record("SharesHead")
class SharesHead(FromOneSite):
    """The signed list of one site's parcels: (recipient, digest of its parcel), in roster order."""

    parcels: tuple[tuple[SiteId, bytes], ...]
    signature: bytes


@record("Shares")
class Shares:
    """A site's key shares for every site of the bundle, sealed, with its signed list."""

    head: SharesHead
    parcels: tuple[Parcel, ...]

    @property
    def site(self) -> SiteId:
        return self.head.site


@record("Submit")
class Submit(FromOneSite):
    """A site's protected vector: SHA-256 over its chunks' digests, and its size in bytes.

    salt: that of its keystream, 32 bytes drawn for this vector (PROTOCOL X); b"" under any other cipher.
    """

    digest: bytes
    size: int
    state_tag: bytes
    key_id: bytes
    salt: bytes
    signature: bytes


@record("Confirm")
class Confirm(FromOneSite):
    """The one survivor list a site signs in a round.

    bundle: digest of the signed key bundle; cohort: of U2; survivors: (site, digest of its whole
    submission). next: digest of the signer's `NextKeys`, or b"" where it sends none.
    """

    bundle: bytes
    cohort: bytes
    survivors: tuple[tuple[SiteId, bytes], ...]
    next: bytes
    signature: bytes


@record("NextKeys")
class NextKeys(PublicKeys):
    """The public keys that a site will use in the round after this one, where all survivors go on. Its confirmation
    signs their digest; its `Keys` of that round, which name the state, contain the same."""


@record("Answer")
class Answer:
    """One key share of site `of`: of its self-seed if it survived, of its mask root if it did not."""

    of: SiteId
    kind: str
    share: bytes


SELF_SEED, MASK_ROOT = "self-seed", "mask root"


@record("Unmask")
class Unmask(FromOneSite):
    """For every site of U2 exactly one key share."""

    answers: tuple[Answer, ...]


@record("Statement")
class Statement(FromOneSite):
    """What a site found in the opened sum (PROTOCOL R): keyed digests of the sum and of the state it leads to."""

    survivors: bytes
    sum_mac: bytes
    state_mac: bytes
    signature: bytes


@record("Leave")
class Leave(FromOneSite):
    """A site leaves the round. `code` is LEFT, MATERIAL or RELEASE_REFUSED: nothing more reaches the
    coordinator.

    MATERIAL: what another site signed for this one does not open or is not what it signed; it depends on
    no row. sealed: the cause, for the other sites, under G and of one length whatever it is
    (`crypto/sealed.py`); empty where nothing was refused.
    """

    code: str
    sealed: Annotated[bytes, SEALED] = b""


LEFT, MATERIAL, RELEASE_REFUSED = "left", "another site's material", "release refused"


@record("Announce")
class Announce:
    """A round begins, for the sites of the header's roster.

    keys: the key bundle (U1), where every site of the roster sent its keys ahead, with its statement of the round
    before; the next message of a site is then its shares. Empty where keys are asked for.
    """

    header: RoundHeader
    keys: tuple[Keys, ...] = ()


@record("KeyBundle")
class KeyBundle:
    """U1: the signed keys of the sites that joined, in roster order."""

    header: bytes
    keys: tuple[Keys, ...]


@record("Delivery")
class Delivery:
    """U2: the signed heads of all sites that shared, and the recipient's parcel of each."""

    header: bytes
    heads: tuple[SharesHead, ...]
    parcels: tuple[Parcel, ...]


@record("SurvivorList")
class SurvivorList:
    """U3: the signed submissions that are in the sum, in roster order."""

    header: bytes
    submissions: tuple[Submit, ...]


@record("Confirmations")
class Confirmations:
    """The signed survivor lists of at least t survivors, over identical bytes."""

    header: bytes
    confirms: tuple[Confirm, ...]


@record("NextBundle")
class NextBundle:
    """The public keys of all survivors for the round after this one, each of the digest in its site's confirmation:
    a site can share its secrets of that round while this one is released."""

    header: bytes
    keys: tuple[NextKeys, ...]


@record("Aggregate")
class Aggregate:
    """The sum is ready for download: of exactly these submissions."""

    header: bytes
    submissions: tuple[Submit, ...]
    digest: bytes
    size: int


@record("Certificate")
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
        said = self._survivors, self.sum_mac, self.state_mac
        return Statement(self.header.digest, site, *said, signature)

    @cached_property
    def _survivors(self) -> bytes:
        """Made once: for every signature anew, checking would grow with the square of the sites."""
        return digest(self.survivors)

    @cached_property
    def hash(self) -> str:
        """Hex SHA-256 over what is certified, without the signatures; the next header contains it."""
        return digest((self.header, self.survivors, self.sum_mac, self.state_mac)).hex()


@record("Abandon")
class Abandon:
    """The coordinator gives the round up at `stage`."""

    header: bytes
    stage: str


@record("Notice")
class Notice(FromOneSite):
    """Why another site left the round, as it sealed it: for the sites' own logs."""

    sealed: bytes


SiteMessage = Keys | Shares | Submit | Confirm | NextKeys | Unmask | Statement | Leave
CoordinatorMessage = (
    Announce | KeyBundle | Delivery | SurvivorList | Confirmations | NextBundle | Aggregate |
    Certificate | Notice | Abandon
)  # fmt: skip
RoundMessage = SiteMessage | CoordinatorMessage


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
    return with_signature(message, identity.sign(label, unsigned(message)))


def check_signature(message: Signed, pins: Mapping[SiteId, bytes]) -> None:
    """Verify a signed message under the pinned key of the site it names. Raises SignatureRefused."""
    if message.site not in pins:
        raise SignatureRefused(
            "signature", f"one by {message.site!r}", "a site of the roster", COORDINATOR
        )
    public = pins[message.site]

    def check() -> None:
        label = type_name(type(message)).encode()
        verify(public, label, unsigned(message), message.signature, signer=message.site)

    shared_of(message, (check_signature, public), check)


@once
def share_digest(header: bytes, of: SiteId, holder: SiteId, kind: str, share: bytes) -> bytes:
    """What a sender signs of one plaintext key share."""
    return digest((header, of, holder, kind, share))


Sent = TypeVar("Sent", bound=FromOneSite | Shares)


def in_order(roster: Sequence[SiteId], items: Iterable[Sent]) -> tuple[Sent, ...]:
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
