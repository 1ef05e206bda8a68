"""The table of the coordinator's legal moves, and `step`."""

from __future__ import annotations

from fedcore.errors import (
    HeaderRefused,
    RosterRefused,
    SecondSum,
)
from fedcore.secagg.protocol.effects import (
    Rebuild,
    RemoveMasks,
)
from fedcore.secagg.protocol.messages import (
    COORDINATOR,
    Announce,
    Confirm,
    Confirmations,
    KeyBundle,
    Keys,
    Leave,
    Shares,
    Statement,
    SurvivorList,
    Unmask,
)
from fedcore.secagg.protocol.moves import Restarted, Tick, on, table
from fedcore.secagg.protocol.round.coordinator import closing, taking
from fedcore.secagg.protocol.round.coordinator.events import (
    CoordinatorEvent,
    CoordinatorParams,
    Gone,
    MessageFromSite,
    SiteReconnected,
    Start,
    SumReady,
    Uploaded,
)
from fedcore.secagg.protocol.round.coordinator.journal import (
    CoordinatorEffect,
    CoordinatorMove,
    RoundStarted,
    evolve,
)
from fedcore.secagg.protocol.round.coordinator.stages import (
    ALL,
    BETWEEN,
    IN_ROUND,
    Advertising,
    Between,
    Collecting,
    Confirming,
    CoordinatorStage,
    Ended,
    Exposed,
    Failed,
    InRound,
    Ready,
    Released,
    Releasing,
    Sharing,
    Summing,
    Unmasking,
    is_out,
    members_of,
    waiting_for,
)
from fedcore.secagg.protocol.shared import (
    not_legal,
    survivors_of,
)


def _start(move: CoordinatorMove, stage: Between, event: Start) -> None:
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


def _stay(move: CoordinatorMove, stage: CoordinatorStage, _: Tick) -> None:
    """What is due by the clock follows every event."""


def _restart(move: CoordinatorMove, stage: CoordinatorStage, _: Restarted) -> None:
    """Everybody gets again what this stage has for them; an unfinished sum is made from the spool."""
    if isinstance(stage, Collecting | Confirming | Unmasking | Summing):
        move.do(Rebuild(stage.submissions))
    if isinstance(stage, Summing):
        move.do(RemoveMasks(stage.header, survivors_of(stage.submissions), stage.masks))
    if isinstance(stage, Ended):  # the crash may have come before anybody was told
        for site in stage.header.roster:
            closing.tell_end(move, site)
    for site in waiting_for(stage):
        _repeat(move, stage, SiteReconnected(site))


def _repeat(move: CoordinatorMove, stage: CoordinatorStage, event: SiteReconnected) -> None:
    site = event.site
    if isinstance(stage, Ended) and site in stage.header.roster:
        closing.tell_end(move, site)
    if isinstance(stage, Between) or site not in members_of(stage):
        return
    if isinstance(stage, Exposed) and is_out(stage, site):
        return
    match stage:
        case Advertising():
            move.send(site, Announce(stage.header))
        case Sharing():
            move.send(site, KeyBundle(stage.header.digest, stage.bundle))
        case Collecting() if stage.header.layers.masks:
            move.send(site, closing.delivery_for(stage, site))
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
    on(Advertising, Keys, taking.take_keys, Sharing, Failed),
    on(Sharing, Shares, taking.take_shares, Collecting, Failed),
    on(Collecting, Uploaded, taking.take_vector, Confirming, Summing, Failed),
    on(Confirming, Confirm, taking.take_confirm, Unmasking, Failed),
    on(Unmasking, Unmask, taking.take_answer, Summing, Failed),
    on(Summing, SumReady, closing.publish, Releasing, Failed),
    on(Releasing, Statement, taking.take_statement, Released, Failed),
    on(Released, Start, _start, Advertising, Collecting),
    on(Failed, Start, _start, Advertising, Collecting),
    on(IN_ROUND, Leave, taking.take_leave, Failed),
    on(IN_ROUND, Gone, taking.take_gone, Failed),
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
        if taking.seen_before(stage, event):
            return stage, ()
    move = CoordinatorMove(stage, evolve, hub=hub)
    handle, _ = legal[kind]
    handle(move, stage, found)
    if type(move.stage) is not type(stage) or kind is Restarted:
        closing.give_time(move, now)
    if kind is not SiteReconnected:
        closing.settle(move, now)
    return move.stage, tuple(move.effects)
