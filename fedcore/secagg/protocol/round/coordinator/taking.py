"""The messages of the sites, and the checks that each must pass before it counts."""

from collections.abc import Iterable, Mapping, Sequence

from fedcore.errors import (
    Conflicting,
    ListRefused,
    ProtocolRefused,
    RosterRefused,
    ShareRefused,
    StateDiffers,
    VectorRefused,
)
from fedcore.secagg.crypto.sealed import NOTICE_LENGTH
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol import checks, effects, messages
from fedcore.secagg.protocol.messages import check_signature, listed, survivors_of
from fedcore.secagg.protocol.round.coordinator import entries, events, stages
from fedcore.secagg.protocol.round.coordinator.entries import CoordinatorMove
from fedcore.secagg.protocol.wire_form import digest, type_name
from fedcore.types import SiteId


def take_keys(move: CoordinatorMove, stage: stages.Advertising, keys: messages.Keys) -> None:
    """One site's keys. Raises a ProtocolRefused."""
    checks.keys(keys, stage.header, move.hub.pins)
    move.record(entries.KeysTaken(keys))


def check_ahead(
    hub: events.CoordinatorParams, header: RoundHeader, found: Sequence[messages.Keys]
) -> None:
    """Keys that were sent ahead: one of each site of the roster, of this round and of one state. Raises a
    ProtocolRefused."""
    checks.members([keys.site for keys in found], header.roster, len(header.roster), "keys ahead")
    for keys in found:
        checks.keys(keys, header, hub.pins)
        if started_from(keys) != started_from(found[0]):
            raise StateDiffers(
                "keys ahead", f"another state or key epoch at {keys.site!r}",
                f"that of {found[0].site!r}", keys.site,
            )  # fmt: skip


def ahead_of(
    hub: events.CoordinatorParams, header: RoundHeader, kept: Mapping[SiteId, messages.Keys]
) -> tuple[messages.Keys, ...]:
    """The keys with which this round can begin; none unless every site of its roster sent its keys ahead."""
    found = tuple(kept[site] for site in header.roster if site in kept)
    try:
        check_ahead(hub, header, found)
    except ProtocolRefused:
        return ()
    return found


def take_shares(move: CoordinatorMove, stage: stages.Sharing, shares: messages.Shares) -> None:
    """One site's shares: exactly the parcels it signed, one for each site of U1. Raises ShareRefused."""
    head = shares.head
    checks.head(head, stage.header, move.hub.pins, stages.members_of(stage))
    own = all(parcel.sender == head.site for parcel in shares.parcels)
    if not own or tuple((p.recipient, digest(p)) for p in shares.parcels) != head.parcels:
        raise ShareRefused(
            "shares", "parcels that differ from the signed list", "the signed ones", head.site
        )
    move.record(entries.SharesTaken(shares))


def take_vector(move: CoordinatorMove, stage: stages.Collecting, event: events.Uploaded) -> None:
    """One whole upload, of the signed digest and the planned size. Raises VectorRefused."""
    submit = event.submit
    checks.submission(submit, stage.header, move.hub.pins, stage.salt)
    for keys in stage.bundle:
        if keys.site == submit.site and started_from(keys) != started_from(submit):
            raise VectorRefused(
                "vector", "another state tag or key id than in its keys", "what the site joined with",
                submit.site,
            )  # fmt: skip
    if submit.size != stage.size or event.size != stage.size:
        raise VectorRefused("vector", f"{event.size} bytes", f"{stage.size} bytes", submit.site)
    if event.digest != submit.digest:
        raise VectorRefused(
            "vector", "other bytes than were signed", "the signed digest", submit.site
        )
    move.record(entries.SubmissionTaken(submit))
    move.do(effects.FoldUpload(submit))


def take_confirm(
    move: CoordinatorMove, stage: stages.Confirming, confirm: messages.Confirm
) -> None:
    """One signature under U3 as it was sent. Raises ListRefused."""
    checks.of_round(confirm.header, stage.header, confirm.site)
    check_signature(confirm, move.hub.pins)
    cohort = tuple(shares.head.site for shares in stage.shares)
    expected = (digest(stage.bundle), digest(cohort), listed(stage.submissions))
    if (confirm.bundle, confirm.cohort, confirm.survivors) != expected:
        raise ListRefused(
            "confirmation", "another list", "the survivor list that was sent", confirm.site
        )
    move.record(entries.ConfirmTaken(confirm))


def take_answer(move: CoordinatorMove, stage: stages.Unmasking, unmask: messages.Unmask) -> None:
    """Exactly one key share of each site of U2, as its sender signed it. Raises ShareRefused."""
    header, site = stage.header, unmask.site
    checks.of_round(unmask.header, header, site)
    survivors = survivors_of(stage.submissions)
    cohort = [shares.head.site for shares in stage.shares]
    expected = [
        (of, messages.SELF_SEED if of in survivors else messages.MASK_ROOT) for of in cohort
    ]
    if [(answer.of, answer.kind) for answer in unmask.answers] != expected:
        raise ShareRefused(
            "unmask", "shares of other sites or kinds", "exactly one of each site", site
        )
    parcels = {p.sender: p for each in stage.shares for p in each.parcels if p.recipient == site}
    for answer in unmask.answers:
        checks.share(header.digest, parcels[answer.of], answer.kind, answer.share, site)
    move.record(entries.AnswerTaken(unmask))


def parcels_of(shares: Iterable[messages.Shares]) -> dict[tuple[SiteId, SiteId], messages.Parcel]:
    """The parcels by (sender, recipient)."""
    return {(p.sender, p.recipient): p for each in shares for p in each.parcels}


def take_statement(
    move: CoordinatorMove, stage: stages.Releasing, statement: messages.Statement
) -> None:
    """What one site found in the sum of exactly U3. Raises ListRefused."""
    checks.of_round(statement.header, stage.header, statement.site)
    check_signature(statement, move.hub.pins)
    if statement.survivors != digest(survivors_of(stage.submissions)):
        raise ListRefused("statement", "another survivor list", "that of the sum", statement.site)
    move.record(entries.StatementTaken(statement))


def take_leave(move: CoordinatorMove, stage: stages.InRound, leave: messages.Leave) -> None:
    """A site leaves; its sealed reason goes to the other sites."""
    checks.of_round(leave.header, stage.header, leave.site)
    refused = leave.code == messages.RELEASE_REFUSED
    move.record(entries.SiteGone(leave.site, entries.REFUSED if refused else entries.LEFT))
    if leave.code == messages.MATERIAL:
        left = f"round {stage.header.round}: site {leave.site} left over another site's material"
        move.do(effects.Warn(f"{left}; the sites' logs name it"))
    if 0 < len(leave.sealed) <= NOTICE_LENGTH:
        for site in stages.members_of(stage):
            if site != leave.site:
                move.send(site, messages.Notice(leave.header, leave.site, leave.sealed))


def take_gone(move: CoordinatorMove, stage: stages.InRound, event: events.Gone) -> None:
    """A connection is lost, or a site left without a message."""
    known = stages.sites_left(stage) if event.for_good else stage.gone
    if event.site in stage.header.roster and event.site not in known:
        move.record(entries.SiteGone(event.site, entries.LEFT if event.for_good else entries.LOST))


def started_from(message: messages.Keys | messages.Submit) -> tuple[bytes, bytes]:
    """The state and the key epoch that a site started from."""
    return message.state_tag, message.key_id


def seen_before(stage: stages.InRound, event: events.MessageFromSite | events.Uploaded) -> bool:
    """Whether this message was received before.

    Raises Conflicting for a second, different one, and RosterRefused for one of a site not waited for.
    """
    message = event.submit if isinstance(event, events.Uploaded) else event.message
    sender = event.sender
    checks.sender(message.site, sender)
    if isinstance(message, messages.Leave):
        return sender in stages.sites_left(stage) or sender not in stage.header.roster
    if sender not in stages.members_of(stage) or stages.is_out(stage, sender):
        raise RosterRefused(
            "message", f"{type_name(type(message))} of a site not waited for",
            f"one of {len(stages.members_of(stage))} sites", sender,
        )  # fmt: skip
    earlier = next((past for past in stages.received_in(stage) if past.site == sender), None)
    if earlier not in (None, message):
        raise Conflicting(
            f"second {type_name(type(message))}", "other bytes than the first", "one a round", sender,
        )  # fmt: skip
    return earlier is not None
