"""A site's journal of a round: its records, and the stage that follows from each."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import reduce

from fedcore.errors import OutOfOrder
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol import effects, messages
from fedcore.secagg.protocol.effects import Persist, Send
from fedcore.secagg.protocol.messages import COORDINATOR, THIS_SITE
from fedcore.secagg.protocol.moves import Move
from fedcore.secagg.protocol.round.site import stages
from fedcore.secagg.protocol.round.site.events import SiteParams
from fedcore.secagg.protocol.round.site.stages import Exchange, SiteProgress, exchange
from fedcore.secagg.protocol.wire_form import decode, digest, record, type_name
from fedcore.types import SiteId


@record("Joined")
class Joined:
    """A round begins here, under masks: its number is used up with this record."""

    header: RoundHeader
    state_tag: bytes
    secrets: stages.Secrets
    keys: messages.Keys
    exchange: Exchange


@record("JoinedUnmasked")
class JoinedUnmasked:
    """A round begins here under `encrypted`: there is no key to agree on."""

    header: RoundHeader
    state_tag: bytes
    exchange: Exchange


@record("SharesMade")
class SharesMade:
    """The bundle is accepted, and the shares are made."""

    bundle: tuple[messages.Keys, ...]
    own: stages.HeldShares
    shares: messages.Shares
    exchange: Exchange


@record("DeliveryOpened")
class DeliveryOpened:
    """The others' shares are held, and the masks agreed."""

    cohort: tuple[SiteId, ...]
    held: tuple[stages.HeldShares, ...]
    masks: tuple[tuple[SecretBytes, int], ...]
    exchange: Exchange


@record("VectorSpooled")
class VectorSpooled:
    """The final chunks are on disk."""

    submit: messages.Submit


@record("ListSigned")
class ListSigned:
    """The one survivor list of this round."""

    submissions: tuple[messages.Submit, ...]
    confirm: messages.Confirm
    exchange: Exchange


@record("UnmaskAnswered")
class UnmaskAnswered:
    """The one answer of this round."""

    exchange: Exchange


@record("SumAnnounced")
class SumAnnounced:
    """Which sum this site was asked to open."""

    aggregate: messages.Aggregate
    exchange: Exchange


@record("SumStated")
class SumStated:
    """What this site found in it."""

    statement: messages.Statement


@record("KeysSentAhead")
class KeysSentAhead:
    """Keys for the round of this number are sent: it is used up, also where another round follows."""

    round: int


@record("Certified")
class Certified:
    """The release is proved; the new state is on disk beside this record."""

    certificate: messages.Certificate


@record("Departed")
class Departed:
    """This site left the round before its end."""

    stage: str


@record("ReleaseRefusedHere")
class ReleaseRefusedHere:
    """A release failed its checks: the key epoch ends here."""

    stage: str


@record("EpochInstalled")
class EpochInstalled:
    """A later key epoch."""

    epoch: int
    key_id: bytes


@record("CheckpointTaken")
class CheckpointTaken:
    """The state of a release this site missed."""

    certificate: messages.Certificate


@record("FolderFoundOld")
class FolderFoundOld:
    """This site signed in a round that its folder has no record of: an old copy was restored."""

    round: int


SiteEntry = (
    Joined | JoinedUnmasked | SharesMade | DeliveryOpened | VectorSpooled | ListSigned |
    UnmaskAnswered | SumAnnounced | SumStated | KeysSentAhead | Certified | Departed | ReleaseRefusedHere |
    EpochInstalled | CheckpointTaken | FolderFoundOld
)  # fmt: skip

SiteEffect = (
    Persist[SiteEntry] | Send[messages.SiteMessage] | effects.Warn | effects.MakeVector |
    effects.Upload | effects.OpenSum | effects.ShowNotice | effects.Apply | effects.Erase
)  # fmt: skip


def evolve(stage: stages.SiteStage, entry: SiteEntry) -> stages.SiteStage:
    """The stage after a journal record. Raises OutOfOrder for a record that it cannot have written."""
    match entry:
        case Joined(header, tag, secrets, keys, first) if isinstance(stage, stages.Idle):
            used = replace(stage.standing, round=header.round)
            return stages.Advertised(used, header, tag, secrets, keys, (first,))
        case JoinedUnmasked(header, tag, first) if isinstance(stage, stages.Idle):
            used = replace(stage.standing, round=header.round)
            return stages.Masking(used, header, tag, b"", header.roster, (), (), (first,))
        case SharesMade(bundle, own, shares, last) if isinstance(stage, stages.Advertised):
            history = (*stage.history, last)
            return stages.Shared(*stage.begun, stage.secrets, bundle, own, shares, history)
        case DeliveryOpened(cohort, held, masks, last) if isinstance(stage, stages.Shared):
            bundle_digest, history = digest(stage.bundle), (*stage.history, last)
            return stages.Masking(*stage.begun, bundle_digest, cohort, held, masks, history)
        case VectorSpooled(submit) if isinstance(stage, stages.Masking):
            sent = replace(stage, standing=_sent(stage.standing, stage.header))
            return stages.Submitted(
                *sent.begun, stage.bundle, stage.cohort, stage.held, submit, stage.history
            )
        case ListSigned(listed, confirm, last) if isinstance(stage, stages.Submitted):
            history = (*stage.history, last)
            return stages.Confirmed(
                *stage.begun, stage.cohort, stage.held, listed, confirm, history
            )
        case UnmaskAnswered(last) if isinstance(stage, stages.Confirmed):
            exposed = replace(stage.standing, exposed=stage.header.digest)
            return stages.Answered(
                exposed, *stage.begun[1:], stage.submissions, (*stage.history, last)
            )
        case SumAnnounced(aggregate, last) if isinstance(
            stage, stages.Submitted | stages.Confirmed | stages.Answered
        ):
            exposed = replace(stage.standing, exposed=stage.header.digest)
            history = (*stage.history, last)
            return stages.Opening(
                exposed, *stage.begun[1:], aggregate.submissions, aggregate, history
            )
        case SumStated(statement) if isinstance(stage, stages.Opening):
            history = (*stage.history[:-1], exchange(stage.aggregate, statement))
            return stages.Stated(
                stage.standing, stage.header, stage.submissions, statement, history
            )
        case KeysSentAhead(number) if isinstance(stage, stages.Stated):
            return replace(stage, standing=replace(stage.standing, round=number))
        case Certified(certificate) if isinstance(stage, stages.Stated):
            return stages.Idle(_released(stage.standing, certificate))
        case CheckpointTaken(certificate) if isinstance(stage, stages.Idle):
            return stages.Idle(_released(stage.standing, certificate))
        case Departed() if isinstance(stage, stages.InRound):
            return stages.Idle(stage.standing)
        case ReleaseRefusedHere() if isinstance(stage, stages.InRound):
            return stages.Halted(stage.standing)
        case EpochInstalled(epoch, key_id) if isinstance(stage, stages.Between):
            return stages.Idle(replace(stage.standing, epoch=epoch, key_id=key_id))
        case FolderFoundOld(number) if isinstance(stage, stages.Between):
            at = stage.standing
            proved, last_seen = max(at.proved, number), max(at.round, number)
            return replace(stage, standing=replace(at, proved=proved, round=last_seen))
    raise OutOfOrder(
        "journal", f"{type_name(type(entry))} after {type_name(type(stage))}",
        "a record this stage can have written", THIS_SITE,
    )  # fmt: skip


def _sent(standing: SiteProgress, header: RoundHeader) -> SiteProgress:
    """Without masks a vector that was sent is all that a colluding site needs, opened or not."""
    if header.layers.masks:
        return standing
    return replace(
        standing, submitted=(*standing.submitted, (header.purpose, header.training_round))
    )


def _released(standing: SiteProgress, certificate: messages.Certificate) -> SiteProgress:
    """The state is another one now, so nothing that bound this site to the one before does."""
    number = certificate.header.round
    return replace(
        standing, certificate=certificate.hash, released=number, exposed=b"", submitted=(),
        round=max(standing.round, number),
        proved=standing.proved if standing.proved > number else 0,
    )  # fmt: skip


def replay(start: stages.SiteStage, journal: Iterable[SiteEntry]) -> stages.SiteStage:
    """The stage that the records of a journal lead to."""
    return reduce(evolve, journal, start)


@dataclass
class SiteMove(Move[stages.SiteStage, SiteEntry, SiteEffect]):
    """A step of this role."""

    member: SiteParams = field(kw_only=True)

    def send(self, message: messages.SiteMessage) -> None:
        self.effects.append(Send(COORDINATOR, message))

    def leave(self, header: RoundHeader, code: str = messages.LEFT, sealed: bytes = b"") -> None:
        self.send(messages.Leave(header.digest, self.member.id, code, sealed))

    def answer_again(self, past: Exchange) -> None:
        """Send the stored answer to a request, if there was one."""
        if past.answer:
            answer = decode(past.answer, object)
            assert isinstance(answer, messages.SiteMessage)
            self.send(answer)
