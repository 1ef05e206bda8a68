"""What a site records of a round, the stage that follows from each record, and a step in the making."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from fedcore.errors import (
    OutOfOrder,
)
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol.effects import (
    Apply,
    Erase,
    MakeVector,
    OpenSum,
    Persist,
    Send,
    ShowNotice,
    Upload,
    Warn,
)
from fedcore.secagg.protocol.messages import (
    COORDINATOR,
    Aggregate,
    Certificate,
    Confirm,
    Keys,
    Shares,
    SiteMessage,
    Statement,
    Submit,
)
from fedcore.secagg.protocol.moves import Move
from fedcore.secagg.protocol.round.site.events import SiteParams
from fedcore.secagg.protocol.round.site.stages import (
    Advertised,
    Answered,
    Confirmed,
    Halted,
    HeldShares,
    Idle,
    InRound,
    Masking,
    Opening,
    Secrets,
    Shared,
    SiteStage,
    Stated,
    Submitted,
)
from fedcore.secagg.protocol.shared import (
    THIS_SITE,
    Exchange,
    SiteProgress,
    exchange,
)
from fedcore.secagg.protocol.wire_form import digest, record, type_name
from fedcore.types import SiteId


@record("Joined")
@dataclass(frozen=True)
class Joined:
    """A round begins here, under masks: its number is used up with this record."""

    header: RoundHeader
    state_tag: bytes
    secrets: Secrets
    keys: Keys
    exchange: Exchange


@record("JoinedUnmasked")
@dataclass(frozen=True)
class JoinedUnmasked:
    """A round begins here under `encrypted`: there is no key to agree on."""

    header: RoundHeader
    state_tag: bytes
    exchange: Exchange


@record("SharesMade")
@dataclass(frozen=True)
class SharesMade:
    """The bundle is accepted, and the shares are made."""

    bundle: tuple[Keys, ...]
    own: HeldShares
    shares: Shares
    exchange: Exchange


@record("DeliveryOpened")
@dataclass(frozen=True)
class DeliveryOpened:
    """The others' shares are held, and the masks agreed."""

    cohort: tuple[SiteId, ...]
    held: tuple[HeldShares, ...]
    masks: tuple[tuple[SecretBytes, int], ...]
    exchange: Exchange


@record("VectorSpooled")
@dataclass(frozen=True)
class VectorSpooled:
    """The final chunks are on disk."""

    submit: Submit


@record("ListSigned")
@dataclass(frozen=True)
class ListSigned:
    """The one survivor list of this round."""

    submissions: tuple[Submit, ...]
    confirm: Confirm
    exchange: Exchange


@record("UnmaskAnswered")
@dataclass(frozen=True)
class UnmaskAnswered:
    """The one answer of this round."""

    exchange: Exchange


@record("SumAnnounced")
@dataclass(frozen=True)
class SumAnnounced:
    """Which sum this site was asked to open."""

    aggregate: Aggregate
    exchange: Exchange


@record("SumStated")
@dataclass(frozen=True)
class SumStated:
    """What this site found in it."""

    statement: Statement


@record("Certified")
@dataclass(frozen=True)
class Certified:
    """The release is proved; the new state is on disk beside this record."""

    certificate: Certificate


@record("Departed")
@dataclass(frozen=True)
class Departed:
    """This site left the round before its end."""

    stage: str


@record("ReleaseRefusedHere")
@dataclass(frozen=True)
class ReleaseRefusedHere:
    """A release failed its checks: the key epoch ends here."""

    stage: str


@record("EpochInstalled")
@dataclass(frozen=True)
class EpochInstalled:
    """A later key epoch."""

    epoch: int
    key_id: bytes


@record("CheckpointTaken")
@dataclass(frozen=True)
class CheckpointTaken:
    """The state of a release this site missed."""

    certificate: Certificate


@record("FolderFoundOld")
@dataclass(frozen=True)
class FolderFoundOld:
    """This site signed in a round that its folder does not know: it was put back to an earlier time."""

    round: int


SiteEntry = (
    Joined
    | JoinedUnmasked
    | SharesMade
    | DeliveryOpened
    | VectorSpooled
    | ListSigned
    | UnmaskAnswered
    | SumAnnounced
    | SumStated
    | Certified
    | Departed
    | ReleaseRefusedHere
    | EpochInstalled
    | CheckpointTaken
    | FolderFoundOld
)

SiteEffect = (
    Persist[SiteEntry]
    | Send[SiteMessage]
    | Warn
    | MakeVector
    | Upload
    | OpenSum
    | ShowNotice
    | Apply
    | Erase
)


def evolve(stage: SiteStage, entry: SiteEntry) -> SiteStage:
    """The stage after a journal record. Total on what `step` records, and on nothing else."""
    match entry:
        case Joined(header, tag, secrets, keys, first) if isinstance(stage, Idle):
            return Advertised(_used(stage.standing, header), header, tag, secrets, keys, (first,))
        case JoinedUnmasked(header, tag, first) if isinstance(stage, Idle):
            standing = _used(stage.standing, header)
            return Masking(standing, header, tag, b"", header.roster, (), (), (first,))
        case SharesMade(bundle, own, shares, last) if isinstance(stage, Advertised):
            return Shared(
                stage.standing, stage.header, stage.state_tag, stage.secrets, bundle, own, shares,
                (*stage.history, last),
            )  # fmt: skip
        case DeliveryOpened(cohort, held, masks, last) if isinstance(stage, Shared):
            return Masking(
                stage.standing, stage.header, stage.state_tag, digest(stage.bundle), cohort, held,
                masks, (*stage.history, last),
            )  # fmt: skip
        case VectorSpooled(submit) if isinstance(stage, Masking):
            return Submitted(
                _sent(stage.standing, stage.header), stage.header, stage.state_tag, stage.bundle,
                stage.cohort, stage.held, submit, stage.history,
            )  # fmt: skip
        case ListSigned(submissions, confirm, last) if isinstance(stage, Submitted):
            return Confirmed(
                stage.standing, stage.header, stage.state_tag, stage.cohort, stage.held, submissions,
                confirm, (*stage.history, last),
            )  # fmt: skip
        case UnmaskAnswered(last) if isinstance(stage, Confirmed):
            return Answered(
                _exposed(stage.standing, stage.header), stage.header, stage.state_tag,
                stage.submissions, (*stage.history, last),
            )  # fmt: skip
        case SumAnnounced(aggregate, last) if isinstance(stage, Answered | Confirmed | Submitted):
            return Opening(
                _exposed(stage.standing, stage.header), stage.header, stage.state_tag,
                aggregate.submissions, aggregate, (*stage.history, last),
            )  # fmt: skip
        case SumStated(statement) if isinstance(stage, Opening):
            last = exchange(stage.aggregate, statement)
            return Stated(
                stage.standing, stage.header, stage.submissions, statement,
                (*stage.history[:-1], last),
            )  # fmt: skip
        case Certified(certificate) if isinstance(stage, Stated):
            return Idle(_released(stage.standing, certificate))
        case Departed() if isinstance(stage, InRound):
            return Idle(stage.standing)
        case ReleaseRefusedHere() if isinstance(stage, InRound):
            return Halted(stage.standing)
        case EpochInstalled(epoch, key_id) if isinstance(stage, Idle | Halted):
            return Idle(replace(stage.standing, epoch=epoch, key_id=key_id))
        case CheckpointTaken(certificate) if isinstance(stage, Idle):
            return Idle(_released(stage.standing, certificate))
        case FolderFoundOld(number) if isinstance(stage, Idle | Halted):
            return replace(stage, standing=_proved(stage.standing, number))
    raise OutOfOrder(
        "journal", found=f"{type_name(type(entry))} after {type_name(type(stage))}",
        expected="a record this stage can have written", fault=THIS_SITE,
    )  # fmt: skip


def _used(standing: SiteProgress, header: RoundHeader) -> SiteProgress:
    return replace(standing, round=header.round)


def _sent(standing: SiteProgress, header: RoundHeader) -> SiteProgress:
    """Without masks a vector that was sent is all that a colluding site needs, opened or not."""
    if header.layers.masks:
        return standing
    return replace(standing, submitted=(*standing.submitted, purpose_and_round(header)))


def purpose_and_round(header: RoundHeader) -> tuple[str, int]:
    """Which step of the job a round is for."""
    return header.purpose, header.training_round


def _exposed(standing: SiteProgress, header: RoundHeader) -> SiteProgress:
    return replace(standing, exposed=header.digest)


def _proved(standing: SiteProgress, number: int) -> SiteProgress:
    return replace(standing, proved=max(standing.proved, number), round=max(standing.round, number))


def _released(standing: SiteProgress, certificate: Certificate) -> SiteProgress:
    """The state is another one now, so nothing that bound this site to the one before does."""
    number = certificate.header.round
    return replace(
        standing, certificate=certificate.hash, released=number, exposed=b"", submitted=(),
        round=max(standing.round, number),
        proved=standing.proved if standing.proved > number else 0,
    )  # fmt: skip


def replay(start: SiteStage, journal: Iterable[SiteEntry]) -> SiteStage:
    """The stage that the records of a journal lead to."""
    for entry in journal:
        start = evolve(start, entry)
    return start


@dataclass
class SiteMove(Move[SiteStage, SiteEntry, SiteEffect]):
    """A step of this role."""

    member: SiteParams = field(kw_only=True)

    def send(self, message: SiteMessage) -> None:
        self.effects.append(Send(COORDINATOR, message))
