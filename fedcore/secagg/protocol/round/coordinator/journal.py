"""What the coordinator records of a round, the stage that follows from each record, and a step in the making."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from fedcore.errors import (
    OutOfOrder,
)
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol.effects import (
    Discard,
    FoldUpload,
    Persist,
    Rebuild,
    RemoveMasks,
    Send,
    Warn,
)
from fedcore.secagg.protocol.messages import (
    COORDINATOR,
    Aggregate,
    Certificate,
    Confirm,
    CoordinatorMessage,
    Keys,
    Shares,
    Statement,
    Submit,
    Unmask,
)
from fedcore.secagg.protocol.moves import Move
from fedcore.secagg.protocol.round.coordinator.events import CoordinatorParams
from fedcore.secagg.protocol.round.coordinator.stages import (
    Advertising,
    Between,
    Collecting,
    Confirming,
    CoordinatorStage,
    Failed,
    InRound,
    Released,
    Releasing,
    Sharing,
    Summing,
    Unmasking,
    exposed_sites,
)
from fedcore.secagg.protocol.shared import (
    survivors_of,
)
from fedcore.secagg.protocol.wire_form import record, type_name
from fedcore.types import SiteId


@record("RoundStarted")
@dataclass(frozen=True)
class RoundStarted:
    """A round number is used up."""

    header: RoundHeader
    size: int
    salt: int


@record("KeysTaken")
@dataclass(frozen=True)
class KeysTaken:
    """One site's keys."""

    keys: Keys


@record("BundleFixed")
@dataclass(frozen=True)
class BundleFixed:
    """U1; gone: sites that sent keys and are not in it."""

    bundle: tuple[Keys, ...]
    gone: tuple[SiteId, ...]


@record("SharesTaken")
@dataclass(frozen=True)
class SharesTaken:
    """One site's shares."""

    shares: Shares


@record("CohortFixed")
@dataclass(frozen=True)
class CohortFixed:
    """U2."""


@record("SubmissionTaken")
@dataclass(frozen=True)
class SubmissionTaken:
    """One site's vector, complete and verified; it is folded from here on."""

    submit: Submit


@record("ListFixed")
@dataclass(frozen=True)
class ListFixed:
    """U3, before anybody hears of it; gone: sites whose vectors started from another state."""

    submissions: tuple[Submit, ...]
    gone: tuple[SiteId, ...]


@record("ConfirmTaken")
@dataclass(frozen=True)
class ConfirmTaken:
    """One site's signature under U3."""

    confirm: Confirm


@record("ConfirmsFixed")
@dataclass(frozen=True)
class ConfirmsFixed:
    """Enough signatures; unmask is asked for from here on."""


@record("AnswerTaken")
@dataclass(frozen=True)
class AnswerTaken:
    """One site's key shares, each checked against its sender's signed digest."""

    unmask: Unmask


@record("MasksRebuilt")
@dataclass(frozen=True)
class MasksRebuilt:
    """What is to be subtracted from the sum."""

    masks: tuple[tuple[SecretBytes, int], ...]


@record("SumSpooled")
@dataclass(frozen=True)
class SumSpooled:
    """The sum without masks."""

    aggregate: Aggregate


@record("StatementTaken")
@dataclass(frozen=True)
class StatementTaken:
    """What one site found in the sum."""

    statement: Statement


@record("SiteGone")
@dataclass(frozen=True)
class SiteGone:
    """A site is gone. how: LOST (its connection), LEFT (it said so) or REFUSED (the release)."""

    site: SiteId
    how: int


LOST, LEFT, REFUSED = range(3)


@record("RoundReleased")
@dataclass(frozen=True)
class RoundReleased:
    """The certificate."""

    certificate: Certificate


@record("RoundGivenUp")
@dataclass(frozen=True)
class RoundGivenUp:
    """Too few sites."""

    stage: str
    left: int


CoordinatorEntry = (
    RoundStarted
    | KeysTaken
    | BundleFixed
    | SharesTaken
    | CohortFixed
    | SubmissionTaken
    | ListFixed
    | ConfirmTaken
    | ConfirmsFixed
    | AnswerTaken
    | MasksRebuilt
    | SumSpooled
    | StatementTaken
    | SiteGone
    | RoundReleased
    | RoundGivenUp
)

CoordinatorEffect = (
    Persist[CoordinatorEntry]
    | Send[CoordinatorMessage]
    | Warn
    | FoldUpload
    | Rebuild
    | RemoveMasks
    | Discard
)


def evolve(stage: CoordinatorStage, entry: CoordinatorEntry) -> CoordinatorStage:
    """The stage after a journal record."""
    match entry:
        case RoundStarted(header, size, salt) if isinstance(stage, Between):
            if header.layers.masks:
                return Advertising(header, size, salt)
            return Collecting(header, size, salt, (), ())
        case KeysTaken(keys) if isinstance(stage, Advertising):
            return replace(stage, keys=_in_order(stage.header, (*stage.keys, keys)))
        case BundleFixed(bundle, gone) if isinstance(stage, Advertising):
            gone = _merged(stage.gone, gone)
            return Sharing(stage.header, stage.size, stage.salt, bundle, (), gone)
        case SharesTaken(shares) if isinstance(stage, Sharing):
            place = stage.header.place
            sent = sorted((*stage.shares, shares), key=lambda each: place(each.head.site))
            return replace(stage, shares=tuple(sent))
        case CohortFixed() if isinstance(stage, Sharing):
            return Collecting(
                stage.header, stage.size, stage.salt, stage.bundle, stage.shares, (), stage.gone
            )
        case SubmissionTaken(submit) if isinstance(stage, Collecting):
            found = _in_order(stage.header, (*stage.submissions, submit))
            return replace(stage, submissions=found)
        case ListFixed(submissions, late) if isinstance(stage, Collecting):
            gone, left = _merged(stage.gone, late), _merged(stage.left, late)
            if not stage.header.layers.masks:
                return Summing(stage.header, submissions, (), gone, left)
            return Confirming(stage.header, stage.bundle, stage.shares, submissions, (), gone, left)
        case ConfirmTaken(confirm) if isinstance(stage, Confirming):
            return replace(stage, confirms=_in_order(stage.header, (*stage.confirms, confirm)))
        case ConfirmsFixed() if isinstance(stage, Confirming):
            signed = {confirm.site for confirm in stage.confirms}
            others = [site for site in survivors_of(stage.submissions) if site not in signed]
            return Unmasking(
                stage.header, stage.bundle, stage.shares, stage.submissions, stage.confirms, (),
                stage.gone, _merged(stage.left, others),
            )  # fmt: skip
        case AnswerTaken(unmask) if isinstance(stage, Unmasking):
            return replace(stage, answers=_in_order(stage.header, (*stage.answers, unmask)))
        case MasksRebuilt(masks) if isinstance(stage, Unmasking):
            return Summing(stage.header, stage.submissions, masks, stage.gone, stage.left)
        case SumSpooled(aggregate) if isinstance(stage, Summing):
            gone, left = stage.gone, stage.left
            return Releasing(stage.header, stage.submissions, aggregate, (), gone, left)
        case StatementTaken(statement) if isinstance(stage, Releasing):
            return replace(
                stage, statements=_in_order(stage.header, (*stage.statements, statement))
            )
        case SiteGone(site, how) if isinstance(stage, InRound):
            stage = replace(stage, gone=_merged(stage.gone, (site,)))
            if how != LOST and not isinstance(stage, Advertising | Sharing):
                stage = replace(stage, left=_merged(stage.left, (site,)))
            if how == REFUSED and isinstance(stage, Releasing):
                stage = replace(stage, refused=_merged(stage.refused, (site,)))
            return stage
        case RoundReleased(certificate) if isinstance(stage, Releasing):
            return Released(stage.header, certificate, stage.refused)
        case RoundGivenUp(name, left) if isinstance(stage, InRound):
            refused = stage.refused if isinstance(stage, Releasing) else ()
            return Failed(stage.header, name, left, exposed_sites(stage), refused)
    raise OutOfOrder(
        "journal", found=f"{type_name(type(entry))} after {type_name(type(stage))}",
        expected="a record this stage can have written", fault=COORDINATOR,
    )  # fmt: skip


OfSite = TypeVar("OfSite", bound=Keys | Submit | Confirm | Unmask | Statement)


def _in_order(header: RoundHeader, items: Iterable[OfSite]) -> tuple[OfSite, ...]:
    return tuple(sorted(items, key=lambda item: header.place(item.site)))


def _merged(old: tuple[SiteId, ...], new: Iterable[SiteId]) -> tuple[SiteId, ...]:
    return tuple(dict.fromkeys((*old, *new)))


def replay(start: CoordinatorStage, journal: Iterable[CoordinatorEntry]) -> CoordinatorStage:
    """The stage that the records of a journal lead to."""
    for entry in journal:
        start = evolve(start, entry)
    return start


@dataclass
class CoordinatorMove(Move[CoordinatorStage, CoordinatorEntry, CoordinatorEffect]):
    """A step of this role."""

    hub: CoordinatorParams = field(kw_only=True)

    def send(self, site: SiteId, message: CoordinatorMessage) -> None:
        self.effects.append(Send(site, message))
