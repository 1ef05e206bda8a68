"""The header and the messages of a key epoch, and the checks that both roles make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedcore.errors import (
    StaleEpoch,
)
from fedcore.secagg.crypto.hybrid import HybridPublic
from fedcore.secagg.plan import PLAN_VERSION
from fedcore.secagg.protocol.messages import check_signature
from fedcore.secagg.protocol.wire_form import digest, record
from fedcore.types import SiteId


@record("EpochHeader")
@dataclass(frozen=True)
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


@record("EpochCall")
@dataclass(frozen=True)
class EpochCall:
    """Coordinator to sites: sign fresh keys for this epoch."""

    header: EpochHeader


@record("EpochKey")
@dataclass(frozen=True)
class EpochKey:
    """A site's fresh public keys for one epoch."""

    header: bytes
    site: SiteId
    key: HybridPublic
    signature: bytes


@record("EpochKeys")
@dataclass(frozen=True)
class EpochKeys:
    """Coordinator to the maker: everybody's signed epoch keys."""

    header: bytes
    keys: tuple[EpochKey, ...]


@record("Grant")
@dataclass(frozen=True)
class Grant:
    """The payload, sealed by `site` for one recipient's epoch key."""

    header: bytes
    site: SiteId
    recipient: SiteId
    recipient_key: bytes
    key_id: bytes
    envelope: bytes
    signature: bytes


@record("Grants")
@dataclass(frozen=True)
class Grants:
    """The maker to the coordinator: one grant for each other site."""

    header: bytes
    site: SiteId
    grants: tuple[Grant, ...]


@record("Granted")
@dataclass(frozen=True)
class Granted:
    """Coordinator to a site: its grant, the granter's signed epoch key, and who signed the key id.

    held: empty for the first recipients, who check the maker; at least t for a late joiner.
    """

    grant: Grant
    granter: EpochKey
    held: tuple[KeyHeld, ...]


@record("GrantRequest")
@dataclass(frozen=True)
class GrantRequest:
    """Coordinator to a holder: seal the payload for a late joiner."""

    key: EpochKey


@record("KeyHeld")
@dataclass(frozen=True)
class KeyHeld:
    """A site signs which payload it holds."""

    header: bytes
    site: SiteId
    key_id: bytes
    signature: bytes


SiteEpochMessage = EpochKey | Grants | Grant | KeyHeld

CoordinatorEpochMessage = EpochCall | EpochKeys | Granted | GrantRequest


def check_epoch_key(key: EpochKey, header: EpochHeader, pins: Mapping[SiteId, bytes]) -> None:
    """One signed epoch key of this epoch, well formed."""
    same_epoch(key.header, header, key.site)
    check_signature(key, pins)
    key.key.check(key.site)


def same_epoch(found: bytes, header: EpochHeader, fault: str) -> None:
    """A message belongs to the epoch at hand. Raises StaleEpoch."""
    if found != header.digest:
        raise StaleEpoch(
            "key epoch", found="a message of another one",
            expected=f"epoch {header.epoch} of job {header.job}", fault=fault,
        )  # fmt: skip
