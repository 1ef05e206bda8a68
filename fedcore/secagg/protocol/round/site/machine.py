"""The table of a site's legal moves, and `step`."""

from __future__ import annotations

from dataclasses import replace

from fedcore.secagg.protocol.effects import (
    Send,
)
from fedcore.secagg.protocol.messages import (
    COORDINATOR,
    Abandon,
    Aggregate,
    Certificate,
    Confirmations,
    Delivery,
    KeyBundle,
    Notice,
    SiteMessage,
    SurvivorList,
)
from fedcore.secagg.protocol.moves import Restarted, Tick, on, table
from fedcore.secagg.protocol.round.site import between, joining, leaving, releasing, sharing
from fedcore.secagg.protocol.round.site.events import (
    CaughtUp,
    CheckFailed,
    Declined,
    Invited,
    MessageFromCoordinator,
    NewEpoch,
    OwnSignature,
    SessionRestored,
    SiteEvent,
    SiteParams,
    SumOpened,
    Superseded,
    VectorMade,
)
from fedcore.secagg.protocol.round.site.journal import SiteEffect, SiteMove, evolve
from fedcore.secagg.protocol.round.site.stages import (
    BETWEEN,
    IN_ROUND,
    Advertised,
    Answered,
    Confirmed,
    Halted,
    Idle,
    InRound,
    Masking,
    Opening,
    Shared,
    SiteStage,
    Stated,
    Submitted,
    Waiting,
)
from fedcore.secagg.protocol.shared import (
    THIS_SITE,
    Exchange,
    answered,
    not_legal,
)
from fedcore.secagg.protocol.wire_form import decode, type_name


def _stay(move: SiteMove, stage: SiteStage, event: Tick | SessionRestored | Restarted) -> None:
    """Nothing is due."""


MOVES = table(
    on(Idle, Invited, joining.join_round, Advertised, Masking),
    on(BETWEEN, NewEpoch, between.install_epoch, Idle),
    on(Idle, CaughtUp, between.catch_up, Idle),
    on(Idle, Certificate, between.check_certified),
    on(BETWEEN, OwnSignature, between.look_at_own_signature),
    on(BETWEEN, Declined, between.decline),
    on(BETWEEN, Abandon, between.ignore_abandon),
    on(BETWEEN, Notice, between.ignore_notice),
    on(BETWEEN, Tick, _stay),
    on(BETWEEN, SessionRestored, _stay),
    on(BETWEEN, Restarted, _stay),
    on(Advertised, KeyBundle, sharing.share_secrets, Shared),
    on(Shared, Delivery, sharing.open_shares, Masking),
    on(Masking, VectorMade, releasing.submit_vector, Submitted),
    on(Submitted, SurvivorList, releasing.confirm_list, Confirmed),
    on(Submitted, Aggregate, releasing.begin_opening, Opening),
    on(Confirmed, Confirmations, releasing.answer_unmask, Answered),
    on(Confirmed, Aggregate, releasing.begin_opening, Opening),
    on(Answered, Aggregate, releasing.begin_opening, Opening),
    on(Opening, SumOpened, releasing.state_sum, Stated),
    on(Stated, Certificate, releasing.release, Idle),
    on(IN_ROUND, Abandon, leaving.abandon, Idle),
    on(IN_ROUND, CheckFailed, leaving.refuse, Idle, Halted),
    on(IN_ROUND, Superseded, leaving.supersede, Idle),
    on(IN_ROUND, Tick, _stay, Idle),
    on(IN_ROUND, SessionRestored, leaving.resend),
    on(IN_ROUND, Restarted, leaving.restart, Idle),
    on(IN_ROUND, Notice, leaving.show_notice),
)


def step(
    member: SiteParams, stage: SiteStage, event: SiteEvent, now: float
) -> tuple[SiteStage, tuple[SiteEffect, ...]]:
    """One event. Raises a ProtocolRefused and changes nothing where the event is not legal here.

    now: seconds of a clock that never goes back; after `patience` at one stage the site leaves, if it is
    not exposed by then.
    """
    if isinstance(event, Tick) and isinstance(stage, Waiting) and now >= stage.until:
        event = CheckFailed(TimeoutError(f"no progress at {type_name(type(stage))}"))
    found = event.message if isinstance(event, MessageFromCoordinator) else event
    if isinstance(stage, InRound):
        request = event.announce if isinstance(event, Invited) else found
        past = answered(stage.history, request)
        if past is not None:
            return stage, _said_again(past)
    kind, legal = type(found), MOVES[type(stage)]
    if kind not in legal:
        said = isinstance(event, MessageFromCoordinator)
        raise not_legal(kind, legal, message=said, fault=COORDINATOR if said else THIS_SITE)
    move = SiteMove(stage, evolve, member=member)
    handle, _ = legal[kind]
    handle(move, stage, found)
    return _timed(move.stage, stage, event, now, member.patience), tuple(move.effects)


def _said_again(past: Exchange) -> tuple[SiteEffect, ...]:
    if not past.answer:
        return ()
    answer = decode(past.answer, object)
    assert isinstance(answer, SiteMessage)
    return (Send(COORDINATOR, answer),)


def _timed(
    new: SiteStage, old: SiteStage, event: SiteEvent, now: float, patience: float
) -> SiteStage:
    """Every stage before exposure has its own patience; so has one that comes from a journal."""
    if not isinstance(new, Waiting) or (new is old and not isinstance(event, Restarted)):
        return new
    return replace(new, until=now + patience)
