"""The header and the messages of a key epoch, and the checks that both roles make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from fedcore.errors import StaleEpoch
from fedcore.secagg.crypto.hybrid import HybridPublic
from fedcore.secagg.plan import PLAN_VERSION
from fedcore.secagg.protocol.messages import SEALED, FromOneSite, Signed, check_signature
from fedcore.secagg.protocol.wire_form import digest, record
from fedcore.types import SiteId


@record("EpochHeader")
class EpochHeader:
    """What a key epoch belongs to. roster: every pinned site; threshold: signed key ids a late joiner
    asks for; maker: the site whose payload it will be."""

    federation: str
    job: str
    epoch: int
    roster: tuple[SiteId, ...]
    pins: str
    threshold: int
    plan_digest: str
    maker: SiteId
    version: int = PLAN_VERSION

    @property
    def digest(self) -> bytes:
        """32 bytes, in every message of the epoch."""
        return digest(self)


@dataclass(frozen=True)
class InEpoch:
    """A stage of a key epoch, whose number is used up."""

    header: EpochHeader

    @property
    def epoch(self) -> int:
        return self.header.epoch


@record("EpochCall")
class EpochCall:
    """Coordinator to sites: sign fresh keys for this epoch."""

    header: EpochHeader


@record("EpochKey")
class EpochKey(FromOneSite):
    """A site's fresh public keys for one epoch."""

    key: HybridPublic
    signature: bytes


@record("EpochKeys")
class EpochKeys:
    """Coordinator to the maker: the signed epoch keys of all sites."""

    header: bytes
    keys: tuple[EpochKey, ...]


@record("Grant")
class Grant(FromOneSite):
    """The payload, sealed by `site` for one recipient's epoch key."""

    recipient: SiteId
    recipient_key: bytes
    key_id: bytes
    envelope: Annotated[bytes, SEALED]
    signature: bytes


@record("Grants")
class Grants(FromOneSite):
    """The maker to the coordinator: one grant for each other site."""

    grants: tuple[Grant, ...]


@record("Granted")
class Granted:
    """Coordinator to a site: its grant, the granter's signed epoch key, and who signed the key id.

    held: empty for the first recipients, who check the maker; at least t for a late joiner.
    """

    grant: Grant
    granter: EpochKey
    held: tuple[KeyHeld, ...]


@record("GrantRequest")
class GrantRequest:
    """Coordinator to a holder: seal the payload for a late joiner."""

    key: EpochKey


@record("KeyHeld")
class KeyHeld(FromOneSite):
    """A site signs which payload it holds."""

    key_id: bytes
    signature: bytes


SiteEpochMessage = EpochKey | Grants | Grant | KeyHeld

CoordinatorEpochMessage = EpochCall | EpochKeys | Granted | GrantRequest


def check_epoch(found: bytes, header: EpochHeader, fault: str) -> None:
    """A message belongs to the epoch at hand. Raises StaleEpoch."""
    if found != header.digest:
        raise StaleEpoch(
            "key epoch", "a message of another one", f"epoch {header.epoch} of job {header.job}",
            fault,
        )  # fmt: skip


def check_signed(message: Signed, header: EpochHeader, pins: Mapping[SiteId, bytes]) -> None:
    """A message of this epoch, signed by the site it names. Raises StaleEpoch or SignatureRefused."""
    check_epoch(message.header, header, message.site)
    check_signature(message, pins)


def check_epoch_key(key: EpochKey, header: EpochHeader, pins: Mapping[SiteId, bytes]) -> None:
    """One signed epoch key of this epoch, well formed. Raises KeyRefused too."""
    check_signed(key, header, pins)
    key.key.check(key.site)
