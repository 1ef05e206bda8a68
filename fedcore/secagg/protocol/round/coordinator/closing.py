"""The end of a stage: with enough answers, at its deadline, or with too few sites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar, assert_never

from fedcore.errors import (
    PeerRefused,
)
from fedcore.secagg.protocol.effects import (
    Discard,
    Rebuild,
    RemoveMasks,
    Warn,
)
from fedcore.secagg.protocol.messages import (
    Abandon,
    Aggregate,
    Certificate,
    Confirmations,
    Delivery,
    KeyBundle,
    Keys,
    SharesHead,
    Submit,
    SurvivorList,
)
from fedcore.secagg.protocol.round.coordinator.events import SumReady
from fedcore.secagg.protocol.round.coordinator.journal import (
    LOST,
    BundleFixed,
    CohortFixed,
    ConfirmsFixed,
    CoordinatorMove,
    ListFixed,
    MasksRebuilt,
    RoundGivenUp,
    RoundReleased,
    SiteGone,
    SumSpooled,
)
from fedcore.secagg.protocol.round.coordinator.stages import (
    STAGE_NAMES,
    Advertising,
    Collecting,
    Confirming,
    Exposed,
    Failed,
    InRound,
    Released,
    Releasing,
    Sharing,
    Summing,
    Unmasking,
    Waiting,
    counted,
    exposed_sites,
    found_in,
    in_sight,
    is_out,
    members_of,
    waiting_for,
)
from fedcore.secagg.protocol.round.coordinator.taking import started_from
from fedcore.secagg.protocol.round.coordinator.unmasking import rebuild_masks
from fedcore.secagg.protocol.shared import (
    survivors_of,
)
from fedcore.types import SiteId

Joining = TypeVar("Joining", Keys, Submit)


def _common(messages: Sequence[Joining]) -> tuple[tuple[Joining, ...], tuple[SiteId, ...]]:
    """The largest group with one state and one key epoch, and the sites that are not in it.

    A site that starts from another state would only make the others leave; it catches up instead.
    """
    start = Counter(map(started_from, messages)).most_common(1)[0][0]
    same = tuple(each for each in messages if started_from(each) == start)
    return same, tuple(each.site for each in messages if each not in same)


def _close_keys(move: CoordinatorMove, stage: Advertising) -> None:
    """Fix U1."""
    bundle, late = _common(stage.keys)
    if len(bundle) < stage.header.threshold:
        _give_up(move, stage, len(bundle))
        return
    move.record(BundleFixed(bundle, late))
    for site in members_of(move.stage):
        move.send(site, KeyBundle(stage.header.digest, bundle))


def _close_shares(move: CoordinatorMove) -> None:
    move.record(CohortFixed())
    stage = move.stage
    assert isinstance(stage, Collecting)
    for site in members_of(stage):
        move.send(site, delivery_for(stage, site))


def delivery_for(stage: Collecting, to: SiteId) -> Delivery:
    """What U2 has for one site: all signed heads, and its own parcels."""
    heads: tuple[SharesHead, ...] = tuple(shares.head for shares in stage.shares)
    parcels = tuple(p for shares in stage.shares for p in shares.parcels if p.recipient == to)
    return Delivery(stage.header.digest, heads, parcels)


def _close_vectors(move: CoordinatorMove, stage: Collecting) -> None:
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


def _close_confirms(move: CoordinatorMove) -> None:
    move.record(ConfirmsFixed())
    stage = move.stage
    assert isinstance(stage, Unmasking)
    for confirm in stage.confirms:
        if not is_out(stage, confirm.site):
            move.send(confirm.site, Confirmations(stage.header.digest, stage.confirms))


def _close_answers(move: CoordinatorMove, stage: Unmasking) -> None:
    try:
        masks = rebuild_masks(stage)
    except PeerRefused as error:  # a lying site can spoil a round, and is named
        move.do(Warn(str(error)))
        _give_up(move, stage, len(stage.answers))
        return
    move.record(MasksRebuilt(masks))
    move.do(RemoveMasks(stage.header, survivors_of(stage.submissions), masks))


def _close_statements(move: CoordinatorMove, stage: Releasing) -> None:
    macs = Counter(map(found_in, stage.statements)).most_common(1)[0][0]
    signatures = tuple((s.site, s.signature) for s in stage.statements if found_in(s) == macs)
    certificate = Certificate(stage.header, survivors_of(stage.submissions), *macs, signatures)
    move.record(RoundReleased(certificate))
    survivors = certificate.survivors
    for site in (*survivors, *(site for site in stage.header.roster if site not in survivors)):
        tell_end(move, site)


def tell_end(move: CoordinatorMove, site: SiteId) -> None:
    """How the round ended, to one site of its roster: whoever is not in the sum leaves it now."""
    stage = move.stage
    if isinstance(stage, Released) and site in stage.certificate.survivors:
        move.send(site, stage.certificate)
    elif isinstance(stage, Released):
        move.send(site, Abandon(stage.header.digest, STAGE_NAMES[Collecting]))
    elif isinstance(stage, Failed):
        move.send(site, Abandon(stage.header.digest, stage.stage))


def _close(move: CoordinatorMove, stage: Waiting) -> None:
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


def _give_up(move: CoordinatorMove, stage: InRound, left: int) -> None:
    name = STAGE_NAMES[type(stage)]
    if isinstance(stage, Summing) and not stage.header.layers.masks:
        name = "confirm"  # before the sum is announced
    if exposed_sites(stage):
        text = f"round {stage.header.round} cannot be released, and its sum may be known"
        move.do(Warn(f"{text}: no other round may follow it from the same state"))
    move.record(RoundGivenUp(name, left))
    for site in stage.header.roster:
        tell_end(move, site)
    move.do(Discard(stage.header))


def settle(move: CoordinatorMove, now: float) -> None:
    """End the stage, and any that follows, if nobody is waited for any more, or at its deadline.

    A stage that begins with too few sites, because some left while they were not waited for, ends too.
    """
    while isinstance(before := move.stage, Waiting):
        _settle_one(move, before, now)
        if type(move.stage) is type(before):
            return
        give_time(move, now)


def give_time(move: CoordinatorMove, now: float) -> None:
    """The stage that begins now has its own patience."""
    if isinstance(move.stage, Waiting):
        move.stage = replace(move.stage, until=now + move.hub.patience)


def _settle_one(move: CoordinatorMove, stage: Waiting, now: float) -> None:
    needed, came, hoped = stage.header.threshold, counted(stage), in_sight(stage)
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


def publish(move: CoordinatorMove, stage: Summing, event: SumReady) -> None:
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
