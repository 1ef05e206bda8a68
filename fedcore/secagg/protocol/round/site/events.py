"""The parameters and the events of a site's machine of a round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedcore.secagg.crypto.entropy import Entropy
from fedcore.secagg.crypto.identity_key import IdentityKey, roster_digest
from fedcore.secagg.plan import RoundHeader, RoundPlan
from fedcore.secagg.protocol import messages
from fedcore.secagg.protocol.moves import Restarted, Tick
from fedcore.types import SiteId

if TYPE_CHECKING:
    from fedcore.secagg.protocol.epoch.messages import EpochHeader


@dataclass(frozen=True)
class SiteParams:
    """A site's identity and its conditions, for a whole job.

    pins: {site: Ed25519 public key} of the federation's roster, as this site's operator approved it.
    minimum: the smallest cohort it takes part in, if the plan's threshold is lower. timeout: how long it waits
    at any stage, in seconds; well above the coordinator's, or the site leaves a round that is still good.
    only_with: {purpose: sites}; a sum of this purpose is given with exactly these, because the ledger of
    this site has one over the same rows (PROTOCOL H, across jobs). ahead: keys and shares for the round after this
    one are sent while this one is released, where coordinator and sites are apart.
    """

    id: SiteId
    identity: IdentityKey
    pins: Mapping[SiteId, bytes]
    plan: RoundPlan
    federation: str
    job: str
    entropy: Entropy
    minimum: int = 3
    timeout: float = 1800.0
    only_with: Mapping[str, tuple[SiteId, ...]] = field(default_factory=dict)
    ahead: bool = False

    @property
    def least(self) -> int:
        return max(self.minimum, self.plan.threshold)

    def same_job(self, header: RoundHeader | EpochHeader) -> tuple[tuple[str, object, object], ...]:
        """(what, found, expected) of all that binds a header to this federation and job (PROTOCOL J)."""
        return (
            ("federation", header.federation, self.federation),
            ("job", header.job, self.job),
            ("plan digest", header.plan_digest, self.plan.digest),
            ("pinned keys", header.pins, roster_digest(self.pins)),
        )


@dataclass(frozen=True)
class Invited:
    """A round was announced. state_tag: HMAC under G of this site's own state for it (PROTOCOL S)."""

    announce: messages.Announce
    state_tag: bytes


@dataclass(frozen=True)
class MessageFromCoordinator:
    """Any other message of the coordinator."""

    message: messages.CoordinatorMessage


@dataclass(frozen=True)
class VectorMade:
    """The protected vector is spooled, its chunks on disk: its digest, size in bytes and salt."""

    digest: bytes
    size: int
    salt: bytes = b""


@dataclass(frozen=True)
class Following:
    """The round that follows the release of this one, with its survivors as cohort: its header, which names the
    certificate that this sum leads to, and the HMAC under G of the state after this one."""

    header: RoundHeader
    state_tag: bytes


@dataclass(frozen=True)
class SumOpened:
    """The sum decrypted and its tag held; HMACs under G of the sum and of the state it leads to.

    following: the round to send keys ahead for; None where none follows, or under `encrypted`.
    """

    sum_mac: bytes
    state_mac: bytes
    following: Following | None = None


@dataclass(frozen=True)
class CheckFailed:
    """A step of this round raised, the tag was wrong, or the site's policy refused it: leave the round.

    sealed: the cause under G for the other sites, of one length whatever the cause.
    """

    error: Exception
    sealed: bytes = b""


@dataclass(frozen=True)
class Superseded:
    """A later round was announced while this one is open: the message that ended it was lost."""


@dataclass(frozen=True)
class Declined:
    """A check of the invitation failed: the coordinator need not wait for this site."""

    header: RoundHeader


@dataclass(frozen=True)
class SessionRestored:
    """The connection is new: what was sent last may not have arrived."""


@dataclass(frozen=True)
class CaughtUp:
    """A certificate for a release this site missed; its state was unsealed and matches state_mac."""

    certificate: messages.Certificate
    state_mac: bytes


@dataclass(frozen=True)
class OwnSignature:
    """The coordinator sent back a message (`said`) of this round that this site signed.

    other: it differs from the one that this site has a record of.
    """

    said: messages.Signed
    header: RoundHeader
    other: bool = False


@dataclass(frozen=True)
class NewEpoch:
    """A later key epoch is installed here."""

    epoch: int
    key_id: bytes


SiteEvent = (
    Invited | MessageFromCoordinator | VectorMade | SumOpened | CheckFailed | Superseded |
    Declined | SessionRestored | Restarted | Tick | CaughtUp | OwnSignature | NewEpoch
)  # fmt: skip
