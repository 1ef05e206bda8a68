"""What a site's machine of a round is given: its parameters, and the events it is stepped with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedcore.secagg.crypto.entropy import Entropy
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.plan import RoundHeader, RoundPlan
from fedcore.secagg.protocol.messages import (
    Announce,
    Certificate,
    CoordinatorMessage,
    Signed,
)
from fedcore.secagg.protocol.moves import Restarted, Tick
from fedcore.types import SiteId


@dataclass(frozen=True)
class SiteParams:
    """Who this site is and what it insists on; the same for a whole job.

    pins: {site: Ed25519 public key} of the federation's roster, as this site's operator approved it.
    minimum: the smallest cohort it takes part in, where the plan's threshold is lower. patience: seconds
    it waits at any stage; well above the coordinator's, which alone decides who is late: a site that
    gives up first leaves a good round. only_with: {purpose: sites}; a sum of this purpose is given with
    exactly these, because the ledger of this site has one over the same rows (PROTOCOL H, across jobs).
    """

    id: SiteId
    identity: IdentityKey
    pins: Mapping[SiteId, bytes]
    plan: RoundPlan
    federation: str
    job: str
    entropy: Entropy
    minimum: int = 3
    patience: float = 1800.0
    only_with: Mapping[str, tuple[SiteId, ...]] = field(default_factory=dict)

    @property
    def least(self) -> int:
        """The smallest cohort this site takes part in."""
        return max(self.minimum, self.plan.threshold)


@dataclass(frozen=True)
class Invited:
    """A round was announced. state_tag: HMAC under G of this site's own state for it (PROTOCOL S)."""

    announce: Announce
    state_tag: bytes


@dataclass(frozen=True)
class MessageFromCoordinator:
    """Any other message of the coordinator."""

    message: CoordinatorMessage


@dataclass(frozen=True)
class VectorMade:
    """The protected vector is spooled, its chunks on disk: its digest, size in bytes and salt."""

    digest: bytes
    size: int
    salt: bytes = b""


@dataclass(frozen=True)
class SumOpened:
    """The sum decrypted and its tag held; HMACs under G of the sum and of the state it leads to."""

    sum_mac: bytes
    state_mac: bytes


@dataclass(frozen=True)
class CheckFailed:
    """A step of this round raised, the tag did not hold, or somebody here said no: leave it.

    sealed: the cause under G for the other sites; all have one length.
    """

    error: Exception
    sealed: bytes = b""


@dataclass(frozen=True)
class Superseded:
    """A later round was announced while this one is open: the word that ended it was lost."""


@dataclass(frozen=True)
class Declined:
    """An invitation raised: the coordinator need not wait for this site."""

    header: RoundHeader


@dataclass(frozen=True)
class SessionRestored:
    """The connection is new: what was sent last may not have arrived."""


@dataclass(frozen=True)
class CaughtUp:
    """A certificate for a release this site missed; its state was unsealed and matches state_mac."""

    certificate: Certificate
    state_mac: bytes


@dataclass(frozen=True)
class OwnSignature:
    """The coordinator showed this site something (`said`) that it signed itself, of this round.

    other: it said something else itself in this very round.
    """

    said: Signed
    header: RoundHeader
    other: bool = False


@dataclass(frozen=True)
class NewEpoch:
    """A later key epoch is installed here."""

    epoch: int
    key_id: bytes


SiteEvent = (
    Invited
    | MessageFromCoordinator
    | VectorMade
    | SumOpened
    | CheckFailed
    | Superseded
    | Declined
    | SessionRestored
    | Restarted
    | Tick
    | CaughtUp
    | OwnSignature
    | NewEpoch
)
