"""The table of a site's legal moves, and `step`."""

from dataclasses import replace

from fedcore.secagg.protocol import messages
from fedcore.secagg.protocol.messages import COORDINATOR, THIS_SITE
from fedcore.secagg.protocol.moves import Restarted, Tick, ignore, not_legal, on, table
from fedcore.secagg.protocol.round.site import (
    between,
    events,
    following,
    releasing,
    sharing,
    stages,
)
from fedcore.secagg.protocol.round.site.entries import SiteEffect, SiteMove, evolve
from fedcore.secagg.protocol.round.site.stages import answered
from fedcore.secagg.protocol.wire_form import type_name

MOVES = table(
    on(
        stages.Idle,
        events.Invited,
        between.join_round,
        stages.Advertised,
        stages.Shared,
        stages.Masking,
    ),
    on(stages.BETWEEN, events.NewEpoch, between.install_epoch, stages.Idle),
    on(stages.Idle, events.CaughtUp, between.catch_up, stages.Idle),
    on(stages.Idle, messages.Certificate, between.check_certified),
    on(stages.BETWEEN, events.OwnSignature, between.look_at_own_signature),
    on(stages.BETWEEN, events.Declined, between.decline),
    on(stages.BETWEEN, messages.Abandon, ignore),  # sent to sites that left, too
    on(stages.BETWEEN, messages.Notice, ignore),  # of a round that this site has left
    on(stages.BETWEEN, Tick, ignore),
    on(stages.BETWEEN, events.SessionRestored, between.session_restored),
    on(stages.BETWEEN, Restarted, ignore),
    on(stages.Advertised, messages.KeyBundle, sharing.share_secrets, stages.Shared),
    on(stages.Shared, messages.Delivery, sharing.open_shares, stages.Masking),
    on(stages.Masking, events.VectorMade, releasing.submit_vector, stages.Submitted),
    on(stages.Submitted, messages.SurvivorList, releasing.confirm_list, stages.Confirmed),
    on(stages.Submitted, messages.Aggregate, releasing.begin_opening, stages.Opening),
    on(stages.Confirmed, messages.Confirmations, releasing.answer_unmask, stages.Answered),
    on(stages.Confirmed, messages.Aggregate, releasing.begin_opening, stages.Opening),
    on(stages.Answered, messages.Aggregate, releasing.begin_opening, stages.Opening),
    on(stages.EXPOSED, messages.NextBundle, following.take_bundle),
    on(stages.BETWEEN, messages.NextBundle, ignore),  # this round has ended here
    on(stages.Opening, events.SumOpened, releasing.state_sum, stages.Stated),
    on(stages.Stated, messages.Certificate, releasing.release, stages.Idle),
    on(stages.IN_ROUND, messages.Abandon, releasing.abandon, stages.Idle),
    on(stages.IN_ROUND, events.CheckFailed, releasing.refuse, stages.Idle, stages.Halted),
    on(stages.IN_ROUND, events.Superseded, releasing.depart, stages.Idle),
    on(stages.IN_ROUND, Tick, ignore, stages.Idle),
    on(stages.IN_ROUND, events.SessionRestored, releasing.resend),
    on(stages.IN_ROUND, Restarted, releasing.restart, stages.Idle),
    on(stages.IN_ROUND, messages.Notice, releasing.show_notice),
)


def step(
    member: events.SiteParams, stage: stages.SiteStage, event: events.SiteEvent, now: float
) -> tuple[stages.SiteStage, tuple[SiteEffect, ...]]:
    """One event. Raises a ProtocolRefused and changes nothing where the event is not legal here.

    now: seconds of a clock that never goes back; after `timeout` at one stage the site leaves, if it is
    not exposed by then.
    """
    if isinstance(event, Tick) and isinstance(stage, stages.Waiting) and now >= stage.until:
        event = events.CheckFailed(TimeoutError(f"no progress at {type_name(type(stage))}"))
    found = event.message if isinstance(event, events.MessageFromCoordinator) else event
    move = SiteMove(stage, evolve, member=member)
    if isinstance(stage, stages.InRound):
        request = event.announce if isinstance(event, events.Invited) else found
        past = answered(stage.history, request)
        if past is not None:
            move.answer_again(past)
            return stage, tuple(move.effects)
    kind, legal = type(found), MOVES[type(stage)]
    if kind not in legal:
        said = found is not event
        raise not_legal(kind, legal, message=said, fault=COORDINATOR if said else THIS_SITE)
    handle, _ = legal[kind]
    handle(move, stage, found)
    new = move.stage
    # Every stage before exposure has its own timeout; so has one that comes from a journal.
    if isinstance(new, stages.Waiting) and (new is not stage or kind is Restarted):
        new = replace(new, until=now + member.timeout)
    return new, tuple(move.effects)
