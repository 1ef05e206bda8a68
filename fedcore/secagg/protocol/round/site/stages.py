"""The stages of a site in a round: each holds only what is true in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol.messages import (
    Aggregate,
    Confirm,
    Keys,
    Shares,
    Statement,
    Submit,
)
from fedcore.secagg.protocol.shared import (
    History,
    SiteProgress,
)
from fedcore.secagg.protocol.wire_form import record
from fedcore.types import SiteId


def _until() -> float:
    return field(default=0.0, compare=False, metadata={"byte_form": False})


@record("Secrets")
@dataclass(frozen=True)
class Secrets:
    """The round's own secrets: mask root, self-seed, and the channel key of the envelopes."""

    root: SecretBytes
    self_seed: SecretBytes
    channel: SecretBytes


@record("Held")
@dataclass(frozen=True)
class HeldShares:
    """Two key shares of one site, kept until unmask asks for exactly one of them."""

    of: SiteId
    self_share: SecretBytes
    root_share: SecretBytes


@record("Idle")
@dataclass(frozen=True)
class Idle:
    """Between rounds."""

    standing: SiteProgress


@record("Halted")
@dataclass(frozen=True)
class Halted:
    """A release was refused: no further round under this key epoch (PROTOCOL R)."""

    standing: SiteProgress


@record("Advertised")
@dataclass(frozen=True)
class Advertised:
    """Keys are sent; the bundle is awaited."""

    standing: SiteProgress
    header: RoundHeader
    state_tag: bytes
    secrets: Secrets
    keys: Keys
    history: History
    until: float = _until()


@record("Shared")
@dataclass(frozen=True)
class Shared:
    """Shares are sent; the others' are awaited. own: the shares kept of this site's own secrets."""

    standing: SiteProgress
    header: RoundHeader
    state_tag: bytes
    secrets: Secrets
    bundle: tuple[Keys, ...]
    own: HeldShares
    shares: Shares
    history: History
    until: float = _until()


@record("Masking")
@dataclass(frozen=True)
class Masking:
    """The vector is being made. masks: (seed, sign) of each; mask root and self-seed are gone."""

    standing: SiteProgress
    header: RoundHeader
    state_tag: bytes
    bundle: bytes
    cohort: tuple[SiteId, ...]
    held: tuple[HeldShares, ...]
    masks: tuple[tuple[SecretBytes, int], ...]
    history: History
    until: float = _until()


@record("Submitted")
@dataclass(frozen=True)
class Submitted:
    """The vector is on its way; the survivor list is awaited. The masks are gone."""

    standing: SiteProgress
    header: RoundHeader
    state_tag: bytes
    bundle: bytes
    cohort: tuple[SiteId, ...]
    held: tuple[HeldShares, ...]
    submit: Submit
    history: History
    until: float = _until()


@record("Confirmed")
@dataclass(frozen=True)
class Confirmed:
    """One survivor list is signed; the others' signatures are awaited."""

    standing: SiteProgress
    header: RoundHeader
    state_tag: bytes
    cohort: tuple[SiteId, ...]
    held: tuple[HeldShares, ...]
    submissions: tuple[Submit, ...]
    confirm: Confirm
    history: History
    until: float = _until()


@record("Answered")
@dataclass(frozen=True)
class Answered:
    """Unmask is answered, so the round counts as released; the sum is awaited. The shares are gone."""

    standing: SiteProgress
    header: RoundHeader
    state_tag: bytes
    submissions: tuple[Submit, ...]
    history: History


@record("Opening")
@dataclass(frozen=True)
class Opening:
    """The sum is being opened and its tag checked."""

    standing: SiteProgress
    header: RoundHeader
    state_tag: bytes
    submissions: tuple[Submit, ...]
    aggregate: Aggregate
    history: History


@record("Stated")
@dataclass(frozen=True)
class Stated:
    """What the sum leads to is signed; the certificate is awaited, and nothing is applied before it."""

    standing: SiteProgress
    header: RoundHeader
    submissions: tuple[Submit, ...]
    statement: Statement
    history: History


Waiting = Advertised | Shared | Masking | Submitted | Confirmed
"""Stages that end by themselves, after the site's patience."""

Exposed = Answered | Opening | Stated
"""Stages after unmask was answered: the coordinator may hold this round's sum. They have no timeout:
leaving such a round helps nobody, because no other round may follow it from the same state."""

InRound = Waiting | Exposed

SiteStage = Idle | Halted | InRound

BETWEEN: tuple[type[Idle | Halted], ...] = (Idle, Halted)

IN_ROUND: tuple[type[InRound], ...] = get_args(InRound)

EXPOSED: tuple[type[Exposed], ...] = get_args(Exposed)


def waits(stage: SiteStage) -> bool:
    """Whether a stage ends by itself, after the site's patience."""
    return isinstance(stage, Waiting)
