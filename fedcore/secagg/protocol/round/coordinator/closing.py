"""The end of a stage: with enough answers, at its deadline, or with too few sites."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar, assert_never

from fedcore.errors import PeerRefused, ShareRefused
from fedcore.secagg.crypto import shamir
from fedcore.secagg.crypto.pairwise import MaskRoot, pair_mask, self_mask
from fedcore.secagg.protocol import effects, messages
from fedcore.secagg.protocol.effects import Mask
from fedcore.secagg.protocol.messages import survivors_of
from fedcore.secagg.protocol.round.coordinator import entries, stages
from fedcore.secagg.protocol.round.coordinator.entries import CoordinatorMove
from fedcore.secagg.protocol.round.coordinator.events import SumReady
from fedcore.secagg.protocol.round.coordinator.taking import parcels_of, started_from
from fedcore.types import SiteId

Joining = TypeVar("Joining", messages.Keys, messages.Submit)


def ask(move: CoordinatorMove, only: Sequence[SiteId] | None = None) -> None:
    """Send the message of the stage to all sites it is for, or again to those of them in `only`."""
    again = None if only is None else stages.announced_again(move.stage)
    for site in stages.asked(move.stage):
        if only is None or site in only:
            for message in (again, stages.request_for(move.stage, site)):
                if message is not None:
                    move.send(site, message)


def _common(items: Sequence[Joining]) -> tuple[tuple[Joining, ...], tuple[SiteId, ...]]:
    """The largest group with one state and one key epoch, and the sites that are not in it.

    A site with another state would make all others leave the round; it catches up instead.
    """
    start = Counter(map(started_from, items)).most_common(1)[0][0]
    same = tuple(each for each in items if started_from(each) == start)
    return same, tuple(each.site for each in items if each not in same)


def _close(move: CoordinatorMove, stage: stages.Waiting) -> None:
    """Record the end of a stage with what counts of it, and ask for what the next one waits for."""
    match stage:
        case stages.Advertising(keys=keys):
            bundle, late = _common(keys)
            if len(bundle) < stage.header.threshold:
                return _give_up(move, stage, len(bundle))
            move.record(entries.BundleFixed(bundle, late))
        case stages.Sharing():
            move.record(entries.CohortFixed())
        case stages.Collecting():
            submissions, late = _common(stage.submissions)
            if len(submissions) < stage.header.threshold:
                return _give_up(move, stage, len(submissions))
            move.record(entries.ListFixed(submissions, late))
            if late:  # under `encrypted` only: else a vector has the state of its site's keys
                move.do(effects.Rebuild(submissions))
            if isinstance(move.stage, stages.Summing):  # `encrypted`: no mask to remove
                move.do(effects.RemoveMasks(stage.header, survivors_of(submissions), ()))
        case stages.Confirming():
            move.record(entries.ConfirmsFixed())
        case stages.Unmasking():
            try:
                masks = rebuild_masks(stage)
            except PeerRefused as error:  # one dishonest site can end a round; the log names it
                move.do(effects.Warn(str(error)))
                return _give_up(move, stage, len(stage.answers))
            move.record(entries.MasksRebuilt(masks))
            move.do(effects.RemoveMasks(stage.header, survivors_of(stage.submissions), masks))
        case stages.Releasing():
            macs = Counter(map(stages.found_in, stage.statements)).most_common(1)[0][0]
            signed = [s for s in stage.statements if stages.found_in(s) == macs]
            signatures = tuple((s.site, s.signature) for s in signed)
            names = survivors_of(stage.submissions)
            found = messages.Certificate(stage.header, names, *macs, signatures)
            move.record(entries.RoundReleased(found))
        case _:
            assert_never(stage)
    return ask(move)


def _give_up(move: CoordinatorMove, stage: stages.InRound, left: int) -> None:
    name = stages.STAGE_NAMES[type(stage)]
    if isinstance(stage, stages.Summing) and not stage.header.layers.masks:
        name = "confirm"  # before the sum is announced
    if stages.exposed_sites(stage):
        text = f"round {stage.header.round} cannot be released, and its sum may be known"
        move.do(effects.Warn(f"{text}: no other round may follow it from the same state"))
    move.record(entries.RoundGivenUp(name, left))
    ask(move)
    move.do(effects.Discard(stage.header))


def settle(move: CoordinatorMove, now: float) -> None:
    """End the stage, and any that follows, if no site is waited for any more, or at its deadline.

    A stage that begins with too few sites, because some left while they were not waited for, ends too.
    """
    while isinstance(before := move.stage, stages.Waiting):
        _settle_one(move, before, now)
        if type(move.stage) is type(before):
            return
        give_time(move, now)


def give_time(move: CoordinatorMove, now: float) -> None:
    """The stage that begins now has its own timeout."""
    if isinstance(move.stage, stages.Waiting):
        move.stage = replace(move.stage, until=now + move.hub.timeout)


def _settle_one(move: CoordinatorMove, stage: stages.Waiting, now: float) -> None:
    needed, came, hoped = stage.header.threshold, stages.counted(stage), stages.in_sight(stage)
    late = now >= stage.until
    enough = isinstance(stage, stages.Collecting) and 0 < move.hub.enough <= came
    if hoped < needed:
        _give_up(move, stage, hoped)
    elif hoped == came or (enough and came >= needed):  # a later vector waits for the next round
        _close(move, stage)
    elif late and came >= needed:
        for site in stages.waiting_for(stage):
            move.record(entries.SiteGone(site, entries.LOST))
        assert isinstance(move.stage, stages.Waiting)
        _close(move, move.stage)
    elif late and not isinstance(stage, stages.Exposed):
        _give_up(move, stage, came)


def publish(move: CoordinatorMove, stage: stages.Summing, event: SumReady) -> None:
    """Announce the sum. Without masks no site had a part of it before: with too few sites left to open it
    the round is abandoned like one with too few confirmations."""
    there = [site for site in stages.members_of(stage) if site not in stage.gone]
    if not stage.header.layers.masks and len(there) < stage.header.threshold:
        _give_up(move, stage, len(there))
        return
    aggregate = messages.Aggregate(stage.header.digest, stage.submissions, event.digest, event.size)
    move.record(entries.SumSpooled(aggregate))
    ask(move)


def rebuild_masks(stage: stages.Unmasking) -> tuple[Mask, ...]:
    """Every mask that is still in the sum: the survivors' self masks, and the pairwise masks between a
    survivor and a site that shared and then dropped.

    Raises ShareRefused where what is rebuilt is not what its owner advertised.
    """
    header = stage.header
    survivors = survivors_of(stage.submissions)
    public = {keys.site: keys for keys in stage.bundle}
    shares: dict[SiteId, dict[int, bytes]] = {}
    for unmask in stage.answers:
        for answer in unmask.answers:
            shares.setdefault(answer.of, {})[header.place(unmask.site) + 1] = answer.share
    masks: list[Mask] = []
    parcels = parcels_of(stage.shares)
    for site, points in shares.items():
        secret = shamir.combine(points, header.threshold, owner=site)
        if site in survivors:
            _check_self_seed(secret, public[site])
            masks.append(self_mask(secret, site, header, public[site].state_tag))
            continue
        root = _checked_root(secret, public[site])
        for other in survivors:
            peer, offer = public[other], parcels[other, site].offer
            seed, sign = pair_mask(root, (site, other), peer.mask, offer, header, peer.state_tag)
            masks.append((seed, -sign))  # as the survivor added it
    return tuple(masks)


def _check_self_seed(secret: bytes, keys: messages.Keys) -> None:
    if hashlib.sha256(secret).digest() != keys.self_seed_hash:
        raise ShareRefused(
            "rebuilt self-seed", "another one", "the one its site committed to", keys.site
        )


def _checked_root(secret: bytes, keys: messages.Keys) -> MaskRoot:
    root = MaskRoot(secret)
    if root.keys.public != keys.mask:
        raise ShareRefused(
            "rebuilt mask root", "one of other keys", "the advertised mask keys", keys.site
        )
    return root
