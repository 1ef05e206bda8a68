"""The messages of the sites: what is checked before one of them counts."""

from __future__ import annotations

from collections.abc import Iterable

from fedcore.errors import (
    Conflicting,
    ListRefused,
    RosterRefused,
    ShareRefused,
    VectorRefused,
)
from fedcore.secagg.crypto.sealed import NOTICE_LENGTH
from fedcore.secagg.protocol.effects import (
    FoldUpload,
    Warn,
)
from fedcore.secagg.protocol.messages import (
    MASK_ROOT,
    MATERIAL,
    RELEASE_REFUSED,
    SELF_SEED,
    Confirm,
    Keys,
    Leave,
    Notice,
    Parcel,
    Shares,
    Statement,
    Submit,
    Unmask,
    check_signature,
    site_of,
)
from fedcore.secagg.protocol.round.coordinator.events import Gone, MessageFromSite, Uploaded
from fedcore.secagg.protocol.round.coordinator.journal import (
    LEFT,
    LOST,
    REFUSED,
    AnswerTaken,
    ConfirmTaken,
    CoordinatorMove,
    KeysTaken,
    SharesTaken,
    SiteGone,
    StatementTaken,
    SubmissionTaken,
)
from fedcore.secagg.protocol.round.coordinator.stages import (
    Advertising,
    Collecting,
    Confirming,
    InRound,
    Releasing,
    Sharing,
    Unmasking,
    is_out,
    members_of,
    received_in,
    sites_left,
)
from fedcore.secagg.protocol.shared import (
    check_header,
    check_keys,
    check_submission,
    listed,
    share_digest,
    survivors_of,
)
from fedcore.secagg.protocol.wire_form import digest, type_name
from fedcore.types import SiteId


def take_keys(move: CoordinatorMove, stage: Advertising, keys: Keys) -> None:
    """One site's keys. Raises a ProtocolRefused."""
    check_keys(keys, stage.header, move.hub.pins)
    move.record(KeysTaken(keys))


def take_shares(move: CoordinatorMove, stage: Sharing, shares: Shares) -> None:
    """One site's shares: exactly the parcels it signed, one for each site of U1. Raises ShareRefused."""
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


def take_vector(move: CoordinatorMove, stage: Collecting, event: Uploaded) -> None:
    """One whole upload, of the signed digest and the planned size. Raises VectorRefused."""
    submit = event.submit
    check_submission(submit, stage.header, move.hub.pins, stage.salt)
    for keys in stage.bundle:
        if keys.site == submit.site and started_from(keys) != started_from(submit):
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


def take_confirm(move: CoordinatorMove, stage: Confirming, confirm: Confirm) -> None:
    """One signature under U3 as it was sent. Raises ListRefused."""
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


def take_answer(move: CoordinatorMove, stage: Unmasking, unmask: Unmask) -> None:
    """Exactly one key share of each site of U2, as its sender signed it. Raises ShareRefused."""
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
    parcels = parcels_of(stage.shares)
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


def parcels_of(shares: Iterable[Shares]) -> dict[tuple[SiteId, SiteId], Parcel]:
    """The parcels by (sender, recipient)."""
    return {(p.sender, p.recipient): p for each in shares for p in each.parcels}


def take_statement(move: CoordinatorMove, stage: Releasing, statement: Statement) -> None:
    """What one site found in the sum of exactly U3. Raises ListRefused."""
    check_header(statement.header, stage.header, statement.site)
    check_signature(statement, move.hub.pins)
    if statement.survivors != digest(survivors_of(stage.submissions)):
        raise ListRefused(
            "statement", found="another survivor list", expected="that of the sum",
            fault=statement.site,
        )  # fmt: skip
    move.record(StatementTaken(statement))


def take_leave(move: CoordinatorMove, stage: InRound, leave: Leave) -> None:
    """A site leaves; its sealed reason goes to the other sites."""
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


def take_gone(move: CoordinatorMove, stage: InRound, event: Gone) -> None:
    """A connection is lost, or a site left without a message."""
    known = sites_left(stage) if event.for_good else stage.gone
    if event.site in stage.header.roster and event.site not in known:
        move.record(SiteGone(event.site, LEFT if event.for_good else LOST))


def started_from(message: Keys | Submit) -> tuple[bytes, bytes]:
    """The state and the key epoch that a site started from."""
    return message.state_tag, message.key_id


def seen_before(stage: InRound, event: MessageFromSite | Uploaded) -> bool:
    """Whether this very message came already. Raises for a second, different one, or a stranger's."""
    message = event.submit if isinstance(event, Uploaded) else event.message
    site, sender = site_of(message), event.sender
    if site != sender:
        raise RosterRefused(
            "message", found=f"one of {site!r} from {sender!r}", expected="its own", fault=sender
        )
    if isinstance(message, Leave):
        return sender in sites_left(stage) or sender not in stage.header.roster
    if sender not in members_of(stage) or is_out(stage, sender):
        raise RosterRefused(
            "message", found=f"{type_name(type(message))} of a site not waited for",
            expected=f"one of {len(members_of(stage))} sites", fault=sender,
        )  # fmt: skip
    for past in received_in(stage):
        if site_of(past) == site:
            if past != message:
                raise Conflicting(
                    f"second {type_name(type(message))}", found="other bytes than the first",
                    expected="one a round", fault=sender,
                )  # fmt: skip
            return True
    return False
