"""The coordinator's journal of a round: its records, and the stage that follows from each."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import reduce

from fedcore.errors import OutOfOrder
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol import effects, messages
from fedcore.secagg.protocol.effects import Persist, Send
from fedcore.secagg.protocol.messages import COORDINATOR, in_order, survivors_of
from fedcore.secagg.protocol.moves import Move
from fedcore.secagg.protocol.round.coordinator import stages
from fedcore.secagg.protocol.round.coordinator.events import CoordinatorParams
from fedcore.secagg.protocol.wire_form import record, type_name
from fedcore.types import SiteId


@record("RoundStarted")
class RoundStarted:
    """A round number is used up."""

    header: RoundHeader
    size: int
    salt: int


@record("KeysTaken")
class KeysTaken:
    """One site's keys."""

    keys: messages.Keys


@record("BundleFixed")
class BundleFixed:
    """U1; gone: sites that sent keys and are not in it."""

    bundle: tuple[messages.Keys, ...]
    gone: tuple[SiteId, ...]


@record("SharesTaken")
class SharesTaken:
    """One site's shares."""

    shares: messages.Shares


@record("CohortFixed")
class CohortFixed:
    """U2."""


@record("SubmissionTaken")
class SubmissionTaken:
    """One site's vector, complete and verified; it is folded from here on."""

    submit: messages.Submit


@record("ListFixed")
class ListFixed:
    """U3, on disk before it is sent. gone: sites whose vectors started from another state."""

    submissions: tuple[messages.Submit, ...]
    gone: tuple[SiteId, ...]


@record("ConfirmTaken")
class ConfirmTaken:
    """One site's signature under U3."""

    confirm: messages.Confirm


@record("ConfirmsFixed")
class ConfirmsFixed:
    """Enough signatures; unmask is asked for from here on."""


@record("AnswerTaken")
class AnswerTaken:
    """One site's key shares, each checked against its sender's signed digest."""

    unmask: messages.Unmask


@record("MasksRebuilt")
class MasksRebuilt:
    """What is to be subtracted from the sum."""

    masks: tuple[tuple[SecretBytes, int], ...]


@record("SumSpooled")
class SumSpooled:
    """The sum without masks."""

    aggregate: messages.Aggregate


@record("StatementTaken")
class StatementTaken:
    """What one site found in the sum."""

    statement: messages.Statement


@record("SiteGone")
class SiteGone:
    """A site is gone. how: LOST (its connection), LEFT (by its own message) or REFUSED (the release)."""

    site: SiteId
    how: int


LOST, LEFT, REFUSED = range(3)


@record("RoundReleased")
class RoundReleased:
    """The certificate."""

    certificate: messages.Certificate


@record("RoundGivenUp")
class RoundGivenUp:
    """Too few sites."""

    stage: str
    left: int


CoordinatorEntry = (
    RoundStarted | KeysTaken | BundleFixed | SharesTaken | CohortFixed | SubmissionTaken |
    ListFixed | ConfirmTaken | ConfirmsFixed | AnswerTaken | MasksRebuilt | SumSpooled |
    StatementTaken | SiteGone | RoundReleased | RoundGivenUp
)  # fmt: skip

CoordinatorEffect = (
    Persist[CoordinatorEntry] | Send[messages.CoordinatorMessage] | effects.Warn |
    effects.FoldUpload | effects.Rebuild | effects.RemoveMasks | effects.Discard
)  # fmt: skip


def evolve(stage: stages.CoordinatorStage, entry: CoordinatorEntry) -> stages.CoordinatorStage:
    """The stage after a journal record. Raises OutOfOrder for a record that it cannot have written."""
    match entry:
        case RoundStarted(header, size, salt) if isinstance(stage, stages.Between):
            if header.layers.masks:
                return stages.Advertising(header, size, salt)
            return stages.Collecting(header, size, salt, (), ())
        case KeysTaken(keys) if isinstance(stage, stages.Advertising):
            return replace(stage, keys=in_order(stage.header.roster, (*stage.keys, keys)))
        case BundleFixed(bundle, gone) if isinstance(stage, stages.Advertising):
            gone, ahead = _merged(stage.gone, gone), int(not stage.keys)
            return stages.Sharing(stage.header, stage.size, stage.salt, bundle, (), gone, ahead)
        case SharesTaken(shares) if isinstance(stage, stages.Sharing):
            return replace(stage, shares=in_order(stage.header.roster, (*stage.shares, shares)))
        case CohortFixed() if isinstance(stage, stages.Sharing):
            begun = stage.header, stage.size, stage.salt, stage.bundle, stage.shares
            return stages.Collecting(*begun, (), stage.gone, ahead=stage.ahead)
        case SubmissionTaken(submit) if isinstance(stage, stages.Collecting):
            found = in_order(stage.header.roster, (*stage.submissions, submit))
            return replace(stage, submissions=found)
        case ListFixed(submissions, late) if isinstance(stage, stages.Collecting):
            gone, left = _merged(stage.gone, late), _merged(stage.left, late)
            if not stage.header.layers.masks:
                return stages.Summing(stage.header, submissions, (), gone, left)
            return stages.Confirming(
                stage.header, stage.bundle, stage.shares, submissions, (), gone, left
            )
        case ConfirmTaken(confirm) if isinstance(stage, stages.Confirming):
            return replace(
                stage, confirms=in_order(stage.header.roster, (*stage.confirms, confirm))
            )
        case ConfirmsFixed() if isinstance(stage, stages.Confirming):
            signed = {confirm.site for confirm in stage.confirms}
            others = [site for site in survivors_of(stage.submissions) if site not in signed]
            return stages.Unmasking(
                stage.header, stage.bundle, stage.shares, stage.submissions, stage.confirms, (),
                stage.gone, _merged(stage.left, others),
            )  # fmt: skip
        case AnswerTaken(unmask) if isinstance(stage, stages.Unmasking):
            return replace(stage, answers=in_order(stage.header.roster, (*stage.answers, unmask)))
        case MasksRebuilt(masks) if isinstance(stage, stages.Unmasking):
            return stages.Summing(stage.header, stage.submissions, masks, stage.gone, stage.left)
        case SumSpooled(aggregate) if isinstance(stage, stages.Summing):
            gone, left = stage.gone, stage.left
            return stages.Releasing(stage.header, stage.submissions, aggregate, (), gone, left)
        case StatementTaken(statement) if isinstance(stage, stages.Releasing):
            return replace(
                stage, statements=in_order(stage.header.roster, (*stage.statements, statement))
            )
        case SiteGone(site, how) if isinstance(stage, stages.InRound):
            stage = replace(stage, gone=_merged(stage.gone, (site,)))
            if how != LOST and not isinstance(stage, stages.Advertising | stages.Sharing):
                stage = replace(stage, left=_merged(stage.left, (site,)))
            if how == REFUSED and isinstance(stage, stages.Releasing):
                stage = replace(stage, refused=_merged(stage.refused, (site,)))
            return stage
        case RoundReleased(certificate) if isinstance(stage, stages.Releasing):
            return stages.Released(stage.header, certificate, stage.refused)
        case RoundGivenUp(name, left) if isinstance(stage, stages.InRound):
            refused = stage.refused if isinstance(stage, stages.Releasing) else ()
            return stages.Failed(stage.header, name, left, stages.exposed_sites(stage), refused)
    raise OutOfOrder(
        "journal", f"{type_name(type(entry))} after {type_name(type(stage))}",
        "a record this stage can have written", COORDINATOR,
    )  # fmt: skip


def _merged(old: tuple[SiteId, ...], new: Iterable[SiteId]) -> tuple[SiteId, ...]:
    return tuple(dict.fromkeys((*old, *new)))


def replay(
    start: stages.CoordinatorStage, journal: Iterable[CoordinatorEntry]
) -> stages.CoordinatorStage:
    """The stage that the records of a journal lead to."""
    return reduce(evolve, journal, start)


def without_vectors(
    stage: stages.CoordinatorStage, journal: Iterable[CoordinatorEntry], lost: Collection[SiteId]
) -> list[CoordinatorEntry] | None:
    """The records of the round at this stage less the vectors of these sites, which have not sent their last
    one then, and send it again when they connect. None once sites were sent the list of survivors, for there is
    no second list in a round."""
    listed = not isinstance(stage, stages.Collecting)
    if listed and (not isinstance(stage, stages.Summing) or stage.header.layers.masks):
        return None
    return [
        entry
        for entry in journal
        if not isinstance(entry, ListFixed)
        and not (isinstance(entry, SubmissionTaken) and entry.submit.site in lost)
    ]


@dataclass
class CoordinatorMove(Move[stages.CoordinatorStage, CoordinatorEntry, CoordinatorEffect]):
    """A step of this role."""

    hub: CoordinatorParams = field(kw_only=True)

    def send(self, site: SiteId, message: messages.CoordinatorMessage) -> None:
        self.effects.append(Send(site, message))
