"""The coordinator in a round: `step(hub, stage, event, now) -> (stage, effects)`, the other machine.

It sees signed messages, sizes and digests, never a vector in clear, and holds no secret until the
survivors' answers let it rebuild the masks of one sum. Each stage ends when everybody it waits for has
answered or left, or at its deadline; with fewer than t sites left the round is abandoned, nothing is
opened, and the next one starts with fresh keys.
Once unmask is asked for (under `encrypted`: once the sum is announced) no deadline abandons a round: it
waits until t sites answered, and a site that went may come back. Only where too few can still answer does
the round end without a release, and then no other one follows it (PROTOCOL H).

Invariant: an upload is folded once, U3 is journalled before anybody hears of it, and each site's
secret of exactly one kind is asked for. `replay` of the journal gives the live stage.
Bonawitz et al. 2017 (ePrint 2017/281), figure 4.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, assert_never, get_args

from fedcore.errors import (
    Conflicting,
    HeaderRefused,
    ListRefused,
    OutOfOrder,
    PeerRefused,
    RosterRefused,
    SecondSum,
    ShareRefused,
    VectorRefused,
)
from fedcore.secagg.crypto import shamir
from fedcore.secagg.crypto.pairwise import (
    MaskRoot,
    open_offer,
    pair_secret,
    pair_seed,
    self_mask_seed,
)
from fedcore.secagg.crypto.sealed import NOTICE_LENGTH
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol.effects import (
    Discard,
    FoldUpload,
    Mask,
    Persist,
    Rebuild,
    RemoveMasks,
    Send,
    Warn,
)
from fedcore.secagg.protocol.messages import (
    COORDINATOR,
    MASK_ROOT,
    MATERIAL,
    RELEASE_REFUSED,
    SELF_SEED,
    Abandon,
    Aggregate,
    Announce,
    Certificate,
    Confirm,
    Confirmations,
    CoordinatorMessage,
    Delivery,
    KeyBundle,
    Keys,
    Leave,
    Notice,
    Parcel,
    Shares,
    SharesHead,
    SiteMessage,
    Statement,
    Submit,
    SurvivorList,
    Unmask,
    check_signature,
    site_of,
)
from fedcore.secagg.protocol.moves import Move, Restarted, Tick, on, table
from fedcore.secagg.protocol.round.site import share_digest
from fedcore.secagg.protocol.shared import (
    check_header,
    check_keys,
    check_submission,
    listed,
    not_legal,
    survivors_of,
)
from fedcore.secagg.protocol.wire_form import digest, record, type_name
from fedcore.types import SiteId


@dataclass(frozen=True)
class CoordinatorParams:
    """What the coordinator knows of a job. pins: {site: Ed25519 public key}; patience: seconds a stage
    waits for silent sites before it goes on without them.

    enough: over-selection: so many vectors (and at least t) end the wait for vectors; 0 for all.
    """

    pins: Mapping[SiteId, bytes]
    patience: float = 600.0
    enough: int = 0


# ------------------------------------------------------------------------------------ what happens


@dataclass(frozen=True)
class Start:
    """Begin a round. size: bytes of one protected vector, salt: of the salt beside it, which both follow
    from the plan."""

    header: RoundHeader
    size: int
    salt: int = 0


@dataclass(frozen=True)
class MessageFromSite:
    """A message of an authenticated site."""

    sender: SiteId
    message: SiteMessage


@dataclass(frozen=True)
class Uploaded:
    """A vector arrived whole: what the site signed, and what its chunks really hash to."""

    sender: SiteId
    submit: Submit
    digest: bytes
    size: int


@dataclass(frozen=True)
class Gone:
    """A site will not send any more at this stage. for_good: it is in this round no longer, as it says
    itself; else its connection is lost, and a round that has to be released takes it back."""

    site: SiteId
    for_good: bool = False


@dataclass(frozen=True)
class SumReady:
    """The masks are off the sum and it is spooled: its digest and size."""

    digest: bytes
    size: int


@dataclass(frozen=True)
class SiteReconnected:
    """A site is back: it gets again what this stage has for it."""

    site: SiteId


CoordinatorEvent = (
    Start | MessageFromSite | Uploaded | Gone | Tick | SumReady | Restarted | SiteReconnected
)


# -------------------------------------------------------------------------------------- the stages


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


# ------------------------------------------------------------------------- what the journal records


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
            return Failed(stage.header, name, left, _exposed(stage), refused)
    raise OutOfOrder(
        "journal", found=f"{type_name(type(entry))} after {type_name(type(stage))}",
        expected="a record this stage can have written", fault=COORDINATOR,
    )  # fmt: skip


def _exposed(stage: InRound) -> tuple[SiteId, ...]:
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


OfSite = TypeVar("OfSite", bound=Keys | Submit | Confirm | Unmask | Statement)
Joining = TypeVar("Joining", Keys, Submit)


def _in_order(header: RoundHeader, items: Iterable[OfSite]) -> tuple[OfSite, ...]:
    return tuple(sorted(items, key=lambda item: header.place(item.site)))


def _merged(old: tuple[SiteId, ...], new: Iterable[SiteId]) -> tuple[SiteId, ...]:
    return tuple(dict.fromkeys((*old, *new)))


def replay(start: CoordinatorStage, journal: Iterable[CoordinatorEntry]) -> CoordinatorStage:
    """The stage that the records of a journal lead to."""
    for entry in journal:
        start = evolve(start, entry)
    return start


# --------------------------------------------------------------------------------- the moves


@dataclass
class _CoordinatorMove(Move[CoordinatorStage, CoordinatorEntry, CoordinatorEffect]):
    """A step of this role."""

    hub: CoordinatorParams = field(kw_only=True)

    def send(self, site: SiteId, message: CoordinatorMessage) -> None:
        self.effects.append(Send(site, message))


def _start(move: _CoordinatorMove, stage: Between, event: Start) -> None:
    header = event.header
    if isinstance(stage, Failed) and stage.exposed:
        raise SecondSum(
            "round", found=f"one after round {stage.round}, whose sum may be known",
            expected="that round's release", fault=COORDINATOR,
        )  # fmt: skip
    if header.round <= stage.round:
        raise HeaderRefused(
            "round", found=header.round, expected=f"more than {stage.round}", fault=COORDINATOR
        )
    unknown = sorted(set(header.roster) - set(move.hub.pins))
    if unknown or len(set(header.roster)) != len(header.roster):
        raise RosterRefused(
            "roster", found=unknown[0] if unknown else "a site twice",
            expected="distinct pinned sites", fault=COORDINATOR,
        )  # fmt: skip
    if len(header.roster) < header.threshold:
        raise RosterRefused(
            "roster", found=f"{len(header.roster)} sites", expected=f"at least {header.threshold}",
            fault=COORDINATOR,
        )  # fmt: skip
    move.record(RoundStarted(header, event.size, event.salt))
    for site in header.roster:
        move.send(site, Announce(header))


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


def _came(stage: CoordinatorStage) -> tuple[SiteMessage, ...]:
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
    came = {site_of(message) for message in _came(stage)}
    missing = tuple(s for s in members_of(stage) if s not in came and not _out(stage, s))
    here = tuple(s for s in missing if s not in stage.gone)
    return here if _enough(stage, _counted(stage) + len(here)) else missing


def _out(stage: InRound, site: SiteId) -> bool:
    """Whether nothing more of this site can count at this stage."""
    return site in (stage.left if isinstance(stage, Exposed) else stage.gone)


def _left(stage: InRound) -> tuple[SiteId, ...]:
    """The sites that are in this round no longer; before vectors are waited for, whoever is gone."""
    return stage.gone if isinstance(stage, Advertising | Sharing) else stage.left


def _enough(stage: Waiting, count: int) -> bool:
    return not isinstance(stage, Exposed) or count >= stage.header.threshold


def _counted(stage: CoordinatorStage) -> int:
    """How many of the answers so far count towards t: statements have to say the same."""
    if isinstance(stage, Releasing):
        return max(Counter(map(_found_in, stage.statements)).values(), default=0)
    return len(_came(stage))


def in_sight(stage: CoordinatorStage) -> int:
    """How many answers count so far, and how many more this stage still hopes for."""
    return _counted(stage) + len(waiting_for(stage))


def _found_in(statement: Statement) -> tuple[bytes, bytes]:
    return statement.sum_mac, statement.state_mac


def is_first(stage: CoordinatorStage) -> bool:
    """Whether the stage is the one that a round begins with: whoever is waited for may not know of it yet."""
    if isinstance(stage, Collecting):
        return not stage.header.layers.masks
    return isinstance(stage, Advertising)


def _take_keys(move: _CoordinatorMove, stage: Advertising, keys: Keys) -> None:
    check_keys(keys, stage.header, move.hub.pins)
    move.record(KeysTaken(keys))


def _take_shares(move: _CoordinatorMove, stage: Sharing, shares: Shares) -> None:
    head = shares.head
    check_header(head.header, stage.header, head.site)
    check_signature(head, move.hub.pins)
    joined = list(members_of(stage))
    if [(p.recipient, digest(p)) for p in shares.parcels] != list(head.parcels):
        raise ShareRefused(
            "shares", found="parcels that differ from the signed list", expected="the signed ones",
            fault=head.site,
        )  # fmt: skip
    if [p.recipient for p in shares.parcels] != joined or any(
        p.sender != head.site for p in shares.parcels
    ):
        raise ShareRefused(
            "shares", found=f"parcels for {len(shares.parcels)} sites",
            expected=f"one for each of the {len(joined)} that joined", fault=head.site,
        )  # fmt: skip
    move.record(SharesTaken(shares))


def _take_vector(move: _CoordinatorMove, stage: Collecting, event: Uploaded) -> None:
    submit = event.submit
    check_submission(submit, stage.header, move.hub.pins, stage.salt)
    for keys in stage.bundle:
        if keys.site == submit.site and _started_from(keys) != _started_from(submit):
            raise VectorRefused(
                "vector", found="another state tag or key id than in its keys",
                expected="what the site joined with", fault=submit.site,
            )  # fmt: skip
    if submit.size != stage.size or event.size != stage.size:
        raise VectorRefused(
            "vector", found=f"{event.size} bytes", expected=f"{stage.size} bytes", fault=submit.site
        )
    if event.digest != submit.digest:
        raise VectorRefused(
            "vector", found="other bytes than were signed", expected="the signed digest",
            fault=submit.site,
        )  # fmt: skip
    move.record(SubmissionTaken(submit))
    move.do(FoldUpload(submit))


def _take_confirm(move: _CoordinatorMove, stage: Confirming, confirm: Confirm) -> None:
    check_header(confirm.header, stage.header, confirm.site)
    check_signature(confirm, move.hub.pins)
    cohort = tuple(shares.head.site for shares in stage.shares)
    expected = (digest(stage.bundle), digest(cohort), listed(stage.submissions))
    if (confirm.bundle, confirm.cohort, confirm.survivors) != expected:
        raise ListRefused(
            "confirmation", found="another list", expected="the survivor list that was sent",
            fault=confirm.site,
        )  # fmt: skip
    move.record(ConfirmTaken(confirm))


def _take_answer(move: _CoordinatorMove, stage: Unmasking, unmask: Unmask) -> None:
    header = stage.header
    check_header(unmask.header, header, unmask.site)
    survivors = set(survivors_of(stage.submissions))
    cohort = [shares.head.site for shares in stage.shares]
    expected = [(site, SELF_SEED if site in survivors else MASK_ROOT) for site in cohort]
    if [(answer.of, answer.kind) for answer in unmask.answers] != expected:
        raise ShareRefused(
            "unmask", found="shares of other sites or kinds", expected="exactly one of each site",
            fault=unmask.site,
        )  # fmt: skip
    parcels = _parcels(stage.shares)
    for answer in unmask.answers:
        parcel = parcels[answer.of, unmask.site]
        signed = parcel.self_share_digest if answer.kind == SELF_SEED else parcel.root_share_digest
        found = share_digest(header.digest, answer.of, unmask.site, answer.kind, answer.share)
        if found != signed:
            raise ShareRefused(
                f"{answer.kind} share of {answer.of!r}", found="one its sender did not sign",
                expected="the signed share", fault=unmask.site,
            )  # fmt: skip
    move.record(AnswerTaken(unmask))


def _parcels(shares: Iterable[Shares]) -> dict[tuple[SiteId, SiteId], Parcel]:
    return {(p.sender, p.recipient): p for each in shares for p in each.parcels}


def _take_statement(move: _CoordinatorMove, stage: Releasing, statement: Statement) -> None:
    check_header(statement.header, stage.header, statement.site)
    check_signature(statement, move.hub.pins)
    if statement.survivors != digest(survivors_of(stage.submissions)):
        raise ListRefused(
            "statement", found="another survivor list", expected="that of the sum",
            fault=statement.site,
        )  # fmt: skip
    move.record(StatementTaken(statement))


def _take_leave(move: _CoordinatorMove, stage: InRound, leave: Leave) -> None:
    check_header(leave.header, stage.header, leave.site)
    move.record(SiteGone(leave.site, REFUSED if leave.code == RELEASE_REFUSED else LEFT))
    if leave.code == MATERIAL:
        move.do(
            Warn(
                f"round {stage.header.round}: site {leave.site} left over another site's material; the "
                "sites' logs say whose"
            )
        )
    if 0 < len(leave.sealed) <= NOTICE_LENGTH:
        for site in members_of(stage):
            if site != leave.site:
                move.send(site, Notice(leave.header, leave.site, leave.sealed))


def _take_gone(move: _CoordinatorMove, stage: InRound, event: Gone) -> None:
    known = _left(stage) if event.for_good else stage.gone
    if event.site in stage.header.roster and event.site not in known:
        move.record(SiteGone(event.site, LEFT if event.for_good else LOST))


# ------------------------------------------------------------------------- the end of a stage


def _started_from(message: Keys | Submit) -> tuple[bytes, bytes]:
    return message.state_tag, message.key_id


def _common(messages: Sequence[Joining]) -> tuple[tuple[Joining, ...], tuple[SiteId, ...]]:
    """The largest group with one state and one key epoch, and the sites that are not in it.

    A site that starts from another state would only make the others leave; it catches up instead.
    """
    start = Counter(map(_started_from, messages)).most_common(1)[0][0]
    same = tuple(each for each in messages if _started_from(each) == start)
    return same, tuple(each.site for each in messages if each not in same)


def _close_keys(move: _CoordinatorMove, stage: Advertising) -> None:
    """Fix U1."""
    bundle, late = _common(stage.keys)
    if len(bundle) < stage.header.threshold:
        _give_up(move, stage, len(bundle))
        return
    move.record(BundleFixed(bundle, late))
    for site in members_of(move.stage):
        move.send(site, KeyBundle(stage.header.digest, bundle))


def _close_shares(move: _CoordinatorMove) -> None:
    move.record(CohortFixed())
    stage = move.stage
    assert isinstance(stage, Collecting)
    for site in members_of(stage):
        move.send(site, _delivery(stage, site))


def _delivery(stage: Collecting, to: SiteId) -> Delivery:
    heads: tuple[SharesHead, ...] = tuple(shares.head for shares in stage.shares)
    parcels = tuple(p for shares in stage.shares for p in shares.parcels if p.recipient == to)
    return Delivery(stage.header.digest, heads, parcels)


def _close_vectors(move: _CoordinatorMove, stage: Collecting) -> None:
    submissions, late = _common(stage.submissions)
    if len(submissions) < stage.header.threshold:
        _give_up(move, stage, len(submissions))
        return
    move.record(ListFixed(submissions, late))
    if late:  # only under `encrypted`: under masks a vector has the state of its site's keys
        move.do(Rebuild(submissions))
    survivors = survivors_of(submissions)
    if isinstance(move.stage, Summing):  # `encrypted`: no mask to remove
        move.do(RemoveMasks(stage.header, survivors, ()))
        return
    for site in survivors:
        move.send(site, SurvivorList(stage.header.digest, submissions))


def _close_confirms(move: _CoordinatorMove) -> None:
    move.record(ConfirmsFixed())
    stage = move.stage
    assert isinstance(stage, Unmasking)
    for confirm in stage.confirms:
        if not _out(stage, confirm.site):
            move.send(confirm.site, Confirmations(stage.header.digest, stage.confirms))


def _close_answers(move: _CoordinatorMove, stage: Unmasking) -> None:
    try:
        masks = rebuild_masks(stage)
    except PeerRefused as error:  # a lying site can spoil a round, and is named
        move.do(Warn(str(error)))
        _give_up(move, stage, len(stage.answers))
        return
    move.record(MasksRebuilt(masks))
    move.do(RemoveMasks(stage.header, survivors_of(stage.submissions), masks))


def _close_statements(move: _CoordinatorMove, stage: Releasing) -> None:
    macs = Counter(map(_found_in, stage.statements)).most_common(1)[0][0]
    signatures = tuple((s.site, s.signature) for s in stage.statements if _found_in(s) == macs)
    certificate = Certificate(stage.header, survivors_of(stage.submissions), *macs, signatures)
    move.record(RoundReleased(certificate))
    survivors = certificate.survivors
    for site in (*survivors, *(site for site in stage.header.roster if site not in survivors)):
        _tell_end(move, site)


def _tell_end(move: _CoordinatorMove, site: SiteId) -> None:
    """How the round ended, to one site of its roster: whoever is not in the sum leaves it now."""
    stage = move.stage
    if isinstance(stage, Released) and site in stage.certificate.survivors:
        move.send(site, stage.certificate)
    elif isinstance(stage, Released):
        move.send(site, Abandon(stage.header.digest, STAGE_NAMES[Collecting]))
    elif isinstance(stage, Failed):
        move.send(site, Abandon(stage.header.digest, stage.stage))


def _close(move: _CoordinatorMove, stage: Waiting) -> None:
    match stage:
        case Advertising():
            _close_keys(move, stage)
        case Sharing():
            _close_shares(move)
        case Collecting():
            _close_vectors(move, stage)
        case Confirming():
            _close_confirms(move)
        case Unmasking():
            _close_answers(move, stage)
        case Releasing():
            _close_statements(move, stage)
        case _:
            assert_never(stage)


def _give_up(move: _CoordinatorMove, stage: InRound, left: int) -> None:
    name = STAGE_NAMES[type(stage)]
    if isinstance(stage, Summing) and not stage.header.layers.masks:
        name = "confirm"  # before the sum is announced
    if _exposed(stage):
        text = f"round {stage.header.round} cannot be released, and its sum may be known"
        move.do(Warn(f"{text}: no other round may follow it from the same state"))
    move.record(RoundGivenUp(name, left))
    for site in stage.header.roster:
        _tell_end(move, site)
    move.do(Discard(stage.header))


def _settle(move: _CoordinatorMove, now: float) -> None:
    """End the stage, and any that follows, if nobody is waited for any more, or at its deadline.

    A stage that begins with too few sites, because some left while they were not waited for, ends too.
    """
    while isinstance(before := move.stage, Waiting):
        _settle_one(move, before, now)
        if type(move.stage) is type(before):
            return
        _give_time(move, now)


def _give_time(move: _CoordinatorMove, now: float) -> None:
    """The stage that begins now has its own patience."""
    if isinstance(move.stage, Waiting):
        move.stage = replace(move.stage, until=now + move.hub.patience)


def _settle_one(move: _CoordinatorMove, stage: Waiting, now: float) -> None:
    needed, came, hoped = stage.header.threshold, _counted(stage), in_sight(stage)
    if hoped < needed:
        _give_up(move, stage, hoped)
    elif hoped == came:
        _close(move, stage)
    elif isinstance(stage, Collecting) and 0 < move.hub.enough <= came >= needed:
        _close(move, stage)  # who comes later has an answer in the next round
    elif now >= stage.until and came >= needed:
        for site in waiting_for(stage):
            move.record(SiteGone(site, LOST))
        assert isinstance(move.stage, Waiting)
        _close(move, move.stage)
    elif now >= stage.until and not isinstance(stage, Exposed):
        _give_up(move, stage, came)


# --------------------------------------------------------------------------- rebuilding the masks


def rebuild_masks(stage: Unmasking) -> tuple[Mask, ...]:
    """Every mask that is still in the sum: the survivors' self masks, and the pairwise masks between
    a survivor and a site that shared and then dropped. Raises ShareRefused where what is rebuilt is
    not what its owner advertised."""
    header = stage.header
    survivors = survivors_of(stage.submissions)
    public = {keys.site: keys for keys in stage.bundle}
    shares: dict[SiteId, dict[int, bytes]] = {}
    for unmask in stage.answers:
        for answer in unmask.answers:
            shares.setdefault(answer.of, {})[header.place(unmask.site) + 1] = answer.share
    masks: list[Mask] = []
    offers = _parcels(stage.shares)
    for site, points in shares.items():
        secret = shamir.combine(points, header.threshold, owner=site)
        if site in survivors:
            masks.append(_self_mask(secret, public[site], header))
        else:
            root = _checked_root(secret, public[site])
            masks += [_pairwise(root, site, other, stage, public, offers) for other in survivors]
    return tuple(masks)


def _self_mask(secret: bytes, keys: Keys, header: RoundHeader) -> Mask:
    if hashlib.sha256(secret).digest() != keys.self_seed_hash:
        raise ShareRefused(
            "rebuilt self-seed", found="another one", expected="the one its site committed to",
            fault=keys.site,
        )  # fmt: skip
    seed = self_mask_seed(secret, site=keys.site, header=header.digest, state_tag=keys.state_tag)
    return SecretBytes(seed), 1


def _checked_root(secret: bytes, keys: Keys) -> MaskRoot:
    root = MaskRoot(secret)
    if root.keys.public != keys.mask:
        raise ShareRefused(
            "rebuilt mask root", found="one of other keys", expected="the advertised mask keys",
            fault=keys.site,
        )  # fmt: skip
    return root


def _pairwise(
    root: MaskRoot,
    dropped: SiteId,
    survivor: SiteId,
    stage: Unmasking,
    public: Mapping[SiteId, Keys],
    parcels: Mapping[tuple[SiteId, SiteId], Parcel],
) -> Mask:
    """The mask between a dropout and a survivor, with the sign it has in the survivor's vector."""
    header = stage.header
    lower = header.place(survivor) < header.place(dropped)
    if lower:
        offer = parcels[survivor, dropped].offer
        offered = open_offer(root, offer, sender=survivor, recipient=dropped, header=header.digest)
    else:
        offered = pair_secret(root, sender=dropped, recipient=survivor, header=header.digest)
    seed = pair_seed(
        root, public[survivor].mask, offered, mine=dropped, theirs=survivor, header=header.digest,
        state_tag=public[survivor].state_tag,
    )  # fmt: skip
    return SecretBytes(seed), 1 if lower else -1


# --------------------------------------------------------------------------------- the table


def _publish(move: _CoordinatorMove, stage: Summing, event: SumReady) -> None:
    """Announce the sum. Without masks nothing is known of it before: with too few sites left to open it
    the round is abandoned like one with too few confirmations."""
    there = [site for site in members_of(stage) if site not in stage.gone]
    if not stage.header.layers.masks and len(there) < stage.header.threshold:
        _give_up(move, stage, len(there))
        return
    aggregate = Aggregate(stage.header.digest, stage.submissions, event.digest, event.size)
    move.record(SumSpooled(aggregate))
    for site in survivors_of(stage.submissions):
        if site not in stage.left:
            move.send(site, aggregate)


def _stay(move: _CoordinatorMove, stage: CoordinatorStage, _: Tick) -> None:
    """What is due by the clock follows every event."""


def _restart(move: _CoordinatorMove, stage: CoordinatorStage, _: Restarted) -> None:
    """Everybody gets again what this stage has for them; an unfinished sum is made from the spool."""
    if isinstance(stage, Collecting | Confirming | Unmasking | Summing):
        move.do(Rebuild(stage.submissions))
    if isinstance(stage, Summing):
        move.do(RemoveMasks(stage.header, survivors_of(stage.submissions), stage.masks))
    if isinstance(stage, Ended):  # the crash may have come before anybody was told
        for site in stage.header.roster:
            _tell_end(move, site)
    for site in waiting_for(stage):
        _repeat(move, stage, SiteReconnected(site))


def _repeat(move: _CoordinatorMove, stage: CoordinatorStage, event: SiteReconnected) -> None:
    site = event.site
    if isinstance(stage, Ended) and site in stage.header.roster:
        _tell_end(move, site)
    if isinstance(stage, Between) or site not in members_of(stage):
        return
    if isinstance(stage, Exposed) and _out(stage, site):
        return
    match stage:
        case Advertising():
            move.send(site, Announce(stage.header))
        case Sharing():
            move.send(site, KeyBundle(stage.header.digest, stage.bundle))
        case Collecting() if stage.header.layers.masks:
            move.send(site, _delivery(stage, site))
        case Collecting():
            move.send(site, Announce(stage.header))
        case Confirming():
            move.send(site, SurvivorList(stage.header.digest, stage.submissions))
        case Unmasking():
            move.send(site, Confirmations(stage.header.digest, stage.confirms))
        case Releasing():
            move.send(site, stage.aggregate)


MOVES = table(
    on(Ready, Start, _start, Advertising, Collecting),
    on(Advertising, Keys, _take_keys, Sharing, Failed),
    on(Sharing, Shares, _take_shares, Collecting, Failed),
    on(Collecting, Uploaded, _take_vector, Confirming, Summing, Failed),
    on(Confirming, Confirm, _take_confirm, Unmasking, Failed),
    on(Unmasking, Unmask, _take_answer, Summing, Failed),
    on(Summing, SumReady, _publish, Releasing, Failed),
    on(Releasing, Statement, _take_statement, Released, Failed),
    on(Released, Start, _start, Advertising, Collecting),
    on(Failed, Start, _start, Advertising, Collecting),
    on(IN_ROUND, Leave, _take_leave, Failed),
    on(IN_ROUND, Gone, _take_gone, Failed),
    on(IN_ROUND, Tick, _stay, Failed),
    on(BETWEEN, Tick, _stay),
    on(ALL, Restarted, _restart),
    on(ALL, SiteReconnected, _repeat),
)
"""A site's leaving, or time, may also end a stage: then the stage goes where its message would lead."""


def step(
    hub: CoordinatorParams, stage: CoordinatorStage, event: CoordinatorEvent, now: float
) -> tuple[CoordinatorStage, tuple[CoordinatorEffect, ...]]:
    """One event. Raises a ProtocolRefused and changes nothing where the event is not legal here.

    now: seconds of a clock that never goes back.
    """
    found = event.message if isinstance(event, MessageFromSite) else event
    kind, legal = type(found), MOVES[type(stage)]
    sender = event.sender if isinstance(event, MessageFromSite | Uploaded) else None
    if kind not in legal:
        raise not_legal(kind, legal, message=bool(sender), fault=sender or COORDINATOR)
    if isinstance(event, MessageFromSite | Uploaded):
        assert isinstance(stage, InRound)  # no message is legal between rounds
        if _seen_before(stage, event):
            return stage, ()
    move = _CoordinatorMove(stage, evolve, hub=hub)
    handle, _ = legal[kind]
    handle(move, stage, found)
    if type(move.stage) is not type(stage) or kind is Restarted:
        _give_time(move, now)
    if kind is not SiteReconnected:
        _settle(move, now)
    return move.stage, tuple(move.effects)


def _seen_before(stage: InRound, event: MessageFromSite | Uploaded) -> bool:
    """Whether this very message came already. Raises for a second, different one, or a stranger's."""
    message = event.submit if isinstance(event, Uploaded) else event.message
    site, sender = site_of(message), event.sender
    if site != sender:
        raise RosterRefused(
            "message", found=f"one of {site!r} from {sender!r}", expected="its own", fault=sender
        )
    if isinstance(message, Leave):
        return sender in _left(stage) or sender not in stage.header.roster
    if sender not in members_of(stage) or _out(stage, sender):
        raise RosterRefused(
            "message", found=f"{type_name(type(message))} of a site not waited for",
            expected=f"one of {len(members_of(stage))} sites", fault=sender,
        )  # fmt: skip
    for past in _came(stage):
        if site_of(past) == site:
            if past != message:
                raise Conflicting(
                    f"second {type_name(type(message))}", found="other bytes than the first",
                    expected="one a round", fault=sender,
                )  # fmt: skip
            return True
    return False
