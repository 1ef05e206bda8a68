"""The table of the coordinator's legal moves, and `step`."""

from fedcore.errors import KeyRefused, SecondSum
from fedcore.secagg.protocol import checks, effects, messages
from fedcore.secagg.protocol.messages import COORDINATOR, survivors_of
from fedcore.secagg.protocol.moves import Restarted, Tick, ignore, not_legal, on, table
from fedcore.secagg.protocol.round.coordinator import closing, entries, events, stages, taking
from fedcore.secagg.protocol.round.coordinator.entries import CoordinatorMove, evolve


def _start(move: CoordinatorMove, stage: stages.Between, event: events.Start) -> None:
    header = event.header
    if isinstance(stage, stages.Failed) and stage.exposed:
        raise SecondSum(
            "round", f"one after round {stage.round}, whose sum may be known", "that round's release",
            COORDINATOR,
        )  # fmt: skip
    checks.grows("round", header.round, stage.round)
    checks.roster(header, move.hub.pins, header.threshold)
    if event.keys:
        if not isinstance(stage, stages.Released):
            raise KeyRefused(
                "keys ahead", "some", "none: no release is before this round", COORDINATOR
            )
        taking.check_ahead(move.hub, header, event.keys)
    move.record(entries.RoundStarted(header, event.size, event.salt))
    if event.keys:
        move.record(entries.BundleFixed(event.keys, ()))
    closing.ask(move)


def _restart(move: CoordinatorMove, stage: stages.CoordinatorStage, _: Restarted) -> None:
    """Send again what this stage has for the sites; make an unfinished sum from the spool."""
    if isinstance(stage, stages.Collecting | stages.Confirming | stages.Unmasking | stages.Summing):
        move.do(effects.Rebuild(stage.submissions))
    if isinstance(stage, stages.Summing):
        move.do(effects.RemoveMasks(stage.header, survivors_of(stage.submissions), stage.masks))
    ended = isinstance(stage, stages.Ended)  # the crash may have come before any site was told
    closing.ask(move, None if ended else stages.waiting_for(stage))


def _repeat(move: CoordinatorMove, _: object, event: events.SiteReconnected) -> None:
    closing.ask(move, (event.site,))


MOVES = table(
    on(stages.Ready, events.Start, _start, stages.Advertising, stages.Collecting),
    on(stages.Advertising, messages.Keys, taking.take_keys, stages.Sharing, stages.Failed),
    on(stages.Sharing, messages.Shares, taking.take_shares, stages.Collecting, stages.Failed),
    on(
        stages.Collecting, events.Uploaded, taking.take_vector,
        stages.Confirming, stages.Summing, stages.Failed,
    ),
    on(stages.Confirming, messages.Confirm, taking.take_confirm, stages.Unmasking, stages.Failed),
    on(stages.Unmasking, messages.Unmask, taking.take_answer, stages.Summing, stages.Failed),
    on(stages.Summing, events.SumReady, closing.publish, stages.Releasing, stages.Failed),
    on(stages.Releasing, messages.Statement, taking.take_statement, stages.Released, stages.Failed),
    on(stages.Released, events.Start, _start, stages.Advertising, stages.Sharing, stages.Collecting),
    on(stages.Failed, events.Start, _start, stages.Advertising, stages.Collecting),
    on(stages.IN_ROUND, messages.Leave, taking.take_leave, stages.Failed),
    on(stages.IN_ROUND, events.Gone, taking.take_gone, stages.Failed),
    on(stages.IN_ROUND, Tick, ignore, stages.Failed),  # `settle` follows every event
    on(stages.BETWEEN, Tick, ignore),
    on(stages.ALL, Restarted, _restart),
    on(stages.ALL, events.SiteReconnected, _repeat),
)  # fmt: skip
"""A site's leaving, or time, may also end a stage: then the stage goes where its message would lead."""


def step(
    hub: events.CoordinatorParams,
    stage: stages.CoordinatorStage,
    event: events.CoordinatorEvent,
    now: float,
) -> tuple[stages.CoordinatorStage, tuple[entries.CoordinatorEffect, ...]]:
    """One event. Raises a ProtocolRefused and changes nothing where the event is not legal here.

    now: seconds of a clock that never goes back.
    """
    found = event.message if isinstance(event, events.MessageFromSite) else event
    kind, legal = type(found), MOVES[type(stage)]
    sender = event.sender if isinstance(event, events.MessageFromSite | events.Uploaded) else None
    if kind not in legal:
        raise not_legal(kind, legal, message=bool(sender), fault=sender or COORDINATOR)
    if isinstance(event, events.MessageFromSite | events.Uploaded):
        assert isinstance(stage, stages.InRound)  # no message is legal between rounds
        if taking.seen_before(stage, event):
            return stage, ()
    move = CoordinatorMove(stage, evolve, hub=hub)
    handle, _ = legal[kind]
    handle(move, stage, found)
    if type(move.stage) is not type(stage) or kind is Restarted:
        closing.give_time(move, now)
    if kind is not events.SiteReconnected:
        closing.settle(move, now)
    return move.stage, tuple(move.effects)
