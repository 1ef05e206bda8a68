"""The stages of a round at the coordinator, and for which sites each of them waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol.messages import (
    Aggregate,
    Certificate,
    Confirm,
    Keys,
    Shares,
    SiteMessage,
    Statement,
    Submit,
    Unmask,
    site_of,
)
from fedcore.secagg.protocol.shared import (
    survivors_of,
)
from fedcore.secagg.protocol.wire_form import record
from fedcore.types import SiteId


def _until() -> float:
    return field(default=0.0, compare=False, metadata={"byte_form": False})


@record("Ready")
@dataclass(frozen=True)
class Ready:
    """Between rounds. round: the last number used."""

    round: int = 0


@record("Advertising")
@dataclass(frozen=True)
class Advertising:
    """Waiting for keys."""

    header: RoundHeader
    size: int
    salt: int
    keys: tuple[Keys, ...] = ()
    gone: tuple[SiteId, ...] = ()
    until: float = _until()


@record("Sharing")
@dataclass(frozen=True)
class Sharing:
    """Waiting for shares of the sites in the bundle (U1)."""

    header: RoundHeader
    size: int
    salt: int
    bundle: tuple[Keys, ...]
    shares: tuple[Shares, ...] = ()
    gone: tuple[SiteId, ...] = ()
    until: float = _until()


@record("Collecting")
@dataclass(frozen=True)
class Collecting:
    """Waiting for vectors of the sites that shared (U2; under `encrypted` of the whole roster).

    left: of those gone, the sites that said so: from here on they cannot help to open the sum.
    """

    header: RoundHeader
    size: int
    salt: int
    bundle: tuple[Keys, ...]
    shares: tuple[Shares, ...]
    submissions: tuple[Submit, ...] = ()
    gone: tuple[SiteId, ...] = ()
    left: tuple[SiteId, ...] = ()
    until: float = _until()


@record("Confirming")
@dataclass(frozen=True)
class Confirming:
    """Waiting for signatures under the one survivor list (U3)."""

    header: RoundHeader
    bundle: tuple[Keys, ...]
    shares: tuple[Shares, ...]
    submissions: tuple[Submit, ...]
    confirms: tuple[Confirm, ...] = ()
    gone: tuple[SiteId, ...] = ()
    left: tuple[SiteId, ...] = ()
    until: float = _until()


@record("Unmasking")
@dataclass(frozen=True)
class Unmasking:
    """Waiting for the key shares of the survivors that confirmed; the others count as `left`."""

    header: RoundHeader
    bundle: tuple[Keys, ...]
    shares: tuple[Shares, ...]
    submissions: tuple[Submit, ...]
    confirms: tuple[Confirm, ...]
    answers: tuple[Unmask, ...] = ()
    gone: tuple[SiteId, ...] = ()
    left: tuple[SiteId, ...] = ()
    until: float = _until()


@record("Summing")
@dataclass(frozen=True)
class Summing:
    """The masks are being taken off the sum. masks: of every survivor, and left by every dropout."""

    header: RoundHeader
    submissions: tuple[Submit, ...]
    masks: tuple[tuple[SecretBytes, int], ...]
    gone: tuple[SiteId, ...] = ()
    left: tuple[SiteId, ...] = ()
    until: float = _until()


@record("Releasing")
@dataclass(frozen=True)
class Releasing:
    """Waiting for the survivors' statements about the sum."""

    header: RoundHeader
    submissions: tuple[Submit, ...]
    aggregate: Aggregate
    statements: tuple[Statement, ...] = ()
    gone: tuple[SiteId, ...] = ()
    left: tuple[SiteId, ...] = ()
    refused: tuple[SiteId, ...] = ()
    until: float = _until()


@record("Released")
@dataclass(frozen=True)
class Released:
    """The round ended with a certificate."""

    header: RoundHeader
    certificate: Certificate
    refused: tuple[SiteId, ...] = ()

    @property
    def round(self) -> int:
        """The number used up."""
        return self.header.round


@record("Abandoned")
@dataclass(frozen=True)
class Failed:
    """The round ended without one. exposed: sites that may have helped to open its sum; if there are any,
    no other round follows from the same state (PROTOCOL H).

    refused: sites that refused the release; they take part in no further round of this key epoch.
    """

    header: RoundHeader
    stage: str
    left: int
    exposed: tuple[SiteId, ...]
    refused: tuple[SiteId, ...] = ()

    @property
    def round(self) -> int:
        """The number used up."""
        return self.header.round


Exposed = Unmasking | Releasing
"""Stages that end with enough answers, or when too few can still come; never by a deadline alone."""

Waiting = Advertising | Sharing | Collecting | Confirming | Exposed

InRound = Waiting | Summing

Ended = Released | Failed

Between = Ready | Ended

CoordinatorStage = Between | InRound

BETWEEN: tuple[type[Between], ...] = get_args(Between)

IN_ROUND: tuple[type[InRound], ...] = get_args(InRound)

EXPOSED: tuple[type[Exposed], ...] = get_args(Exposed)

ALL: tuple[type[CoordinatorStage], ...] = get_args(CoordinatorStage)

STAGE_NAMES: Mapping[type[CoordinatorStage], str] = {
    Advertising: "keys",
    Sharing: "shares",
    Collecting: "submit",
    Confirming: "confirm",
    Unmasking: "unmask",
    Summing: "unmask",
    Releasing: "release",
}
"""What the coordinator waits for at each stage, in the words of `absences.STAGES`."""


def exposed_sites(stage: InRound) -> tuple[SiteId, ...]:
    """The sites that may have helped to open the sum of this round (PROTOCOL H)."""
    match stage:
        case Unmasking():  # whoever was asked and is there may have answered
            answered = {answer.site for answer in stage.answers}
            return tuple(
                s for s in survivors_of(stage.submissions) if s in answered or s not in stage.left
            )
        case Summing() if not stage.header.layers.masks:
            return ()  # without masks nothing is asked of a site before the sum is there
        case Summing() | Releasing():
            return survivors_of(stage.submissions)
    return ()


def members_of(stage: CoordinatorStage) -> tuple[SiteId, ...]:
    """Whose message a stage takes: the roster, then U1, U2, U3."""
    match stage:
        case Advertising():
            return stage.header.roster
        case Sharing():
            return tuple(keys.site for keys in stage.bundle)
        case Collecting():
            shared = tuple(shares.head.site for shares in stage.shares)
            return shared if stage.header.layers.masks else stage.header.roster
        case Confirming() | Unmasking() | Releasing() | Summing():
            return survivors_of(stage.submissions)
    return ()


def received_in(stage: CoordinatorStage) -> tuple[SiteMessage, ...]:
    """What this stage has received so far."""
    match stage:
        case Advertising():
            return stage.keys
        case Sharing():
            return stage.shares
        case Collecting():
            return stage.submissions
        case Confirming():
            return stage.confirms
        case Unmasking():
            return stage.answers
        case Releasing():
            return stage.statements
    return ()


def waiting_for(stage: CoordinatorStage) -> tuple[SiteId, ...]:
    """The sites this stage still hopes to hear from: what a person waits for.

    Where a round has to be released it cannot do without the sites whose connection is lost, as long as
    those that are there are too few.
    """
    if not isinstance(stage, Waiting):
        return ()
    came = {site_of(message) for message in received_in(stage)}
    missing = tuple(s for s in members_of(stage) if s not in came and not is_out(stage, s))
    here = tuple(s for s in missing if s not in stage.gone)
    return here if _enough(stage, counted(stage) + len(here)) else missing


def is_out(stage: InRound, site: SiteId) -> bool:
    """Whether nothing more of this site can count at this stage."""
    return site in (stage.left if isinstance(stage, Exposed) else stage.gone)


def sites_left(stage: InRound) -> tuple[SiteId, ...]:
    """The sites that are in this round no longer; before vectors are waited for, whoever is gone."""
    return stage.gone if isinstance(stage, Advertising | Sharing) else stage.left


def _enough(stage: Waiting, count: int) -> bool:
    return not isinstance(stage, Exposed) or count >= stage.header.threshold


def counted(stage: CoordinatorStage) -> int:
    """How many of the answers so far count towards t: statements have to say the same."""
    if isinstance(stage, Releasing):
        return max(Counter(map(found_in, stage.statements)).values(), default=0)
    return len(received_in(stage))


def in_sight(stage: CoordinatorStage) -> int:
    """How many answers count so far, and how many more this stage still hopes for."""
    return counted(stage) + len(waiting_for(stage))


def found_in(statement: Statement) -> tuple[bytes, bytes]:
    """What one site found in the sum: the HMACs of the sum and of the state after it."""
    return statement.sum_mac, statement.state_mac


def is_first(stage: CoordinatorStage) -> bool:
    """Whether the stage is the one that a round begins with: whoever is waited for may not know of it yet."""
    if isinstance(stage, Collecting):
        return not stage.header.layers.masks
    return isinstance(stage, Advertising)
