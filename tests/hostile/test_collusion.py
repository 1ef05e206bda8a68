"""What colluding sites and the coordinator together can open: as many as the label says, and no more.

The label's number for an active coordinator is min(2t-n-1, t-2). With that many the target's vector
stays uniform even without its round's honest end; with t it opens (the control).
"""

from __future__ import annotations

import numpy as np
import pytest
from kit import refuses, world_at

from fedcore.errors import ListRefused, ThresholdRefused
from fedcore.secagg.protocol import checks
from fedcore.secagg.protocol.messages import MASK_ROOT, SELF_SEED

CASES = [(4, 3, 1), (5, 4, 2), (6, 5, 3), (7, 5, 2), (8, 6, 3)]


def tolerated(n, t):
    return min(2 * t - n - 1, t - 2)


def held_by(world, colluders):
    """Everything colluding sites have: shares, and the seeds of their own masks."""
    also = [(name, world.stages[name].held) for name in colluders]
    known = {seed for name in colluders for seed, _ in world.masks[name]}
    return also, known


@pytest.mark.parametrize(("n", "t", "c"), CASES)
def test_the_labels_number_of_colluding_sites_learns_nothing(n, t, c):
    """After an honest round: own shares, own masks, every answer. One honest other hides the target."""
    assert tolerated(n, t) == c
    world = world_at("confirm", n=n)
    assert world.t == t
    colluders, target = world.roster[n - c :], "ann"
    also, known = held_by(world, colluders)
    for name in world.roster:
        world.answers[name] = world.receive(name, world.confirmations())
    secrets = world.rebuilt(world.shares_held(world.answers.values(), also))
    assert (target, SELF_SEED) in secrets, "a survivor's self mask is taken off"
    assert (target, MASK_ROOT) not in secrets, "its pairwise masks are not"
    honest = set(world.roster) - set(colluders)
    open_masks = [world.self_mask(target, secrets[target, SELF_SEED])]
    open_masks += [mask for mask in world.masks[target] if mask[0] in known]
    rest = [m for m in world.masks[target] if m[0] not in {seed for seed, _ in open_masks}]
    assert len(rest) == len(honest) - 1 >= 1, "one unknown mask for each honest other"
    left = world.minus((target,), open_masks)
    assert np.mean(left == world.plain[target]) < 0.1
    # Only the sum over all honest sites comes out, and that is the round's result anyway.
    together = [world.self_mask(name, secrets[name, SELF_SEED]) for name in honest]
    together += [m for name in honest for m in world.masks[name] if m[0] in known]
    assert np.array_equal(world.minus(honest, together), world.plain_sum(honest))


@pytest.mark.parametrize(("n", "t", "c"), CASES)
def test_with_t_colluding_shares_it_opens(n, t, c):
    """The control: t sites that keep both shares hold root and self-seed of everybody."""
    world = world_at("confirm", n=n)
    also, known = held_by(world, world.roster[n - t :])
    secrets = world.rebuilt(world.shares_held((), also))
    assert {("ann", SELF_SEED), ("ann", MASK_ROOT)} <= set(secrets)
    opened = world.open_sum_of(("ann",), secrets, known)
    assert np.array_equal(opened, world.plain["ann"])
    also, known = held_by(world, world.roster[n - t + 1 :])
    fewer = world.rebuilt(world.shares_held((), also))
    assert not fewer, "with t - 1 there is nothing to combine"


def split(world, colluders, target):
    """Two lists, one with the target and one without; colluding sites sign both.

    Returns {list: (who signs it, confirmations)}; honest sites sign one each, as they must.
    """
    t = world.t
    without = tuple(name for name in world.roster if name != target)
    honest = [name for name in world.roster if name not in colluders and name != target]
    half = min(t - len(colluders), len(honest))
    groups = {world.roster: (target, *honest[half:]), without: tuple(honest[:half])}
    found = {}
    for names, signers in groups.items():
        confirms = {s: world.receive(s, world.survivor_list(names)) for s in signers}
        if signers:
            first = next(iter(confirms.values()))
            for liar in colluders:
                confirms[liar] = world.signed(liar, first, site=liar)
        found[names] = signers, confirms
    return found


def ask(world, names, confirms, signers):
    chosen = {name: confirms[name] for name in names if name in confirms}
    request = type(world.confirmations())(world.h, tuple(chosen.values()))
    return [world.receive(name, request) for name in signers]


@pytest.mark.parametrize(
    ("n", "t", "c"), [case for case in CASES if case[2] == 2 * case[1] - case[0] - 1]
)
def test_split_lists_need_one_colluder_more_than_the_label_says(n, t, c):
    """The bound is sharp: with 2t-n colluding sites, who sign two lists, the target's update opens."""
    target = "ann"
    world = world_at("submit", n=n)
    colluders = world.roster[n - c - 1 :]
    also, known = held_by(world, colluders)
    collected = []
    for names, (signers, confirms) in split(world, colluders, target).items():
        collected += ask(world, names, confirms, signers)
    secrets = world.rebuilt(world.shares_held(collected, also))
    assert {(target, SELF_SEED), (target, MASK_ROOT)} <= set(secrets)
    assert np.array_equal(world.open_sum_of((target,), secrets, known), world.plain[target])

    fewer = world_at("submit", n=n)
    colluders = fewer.roster[n - c :]
    lists = split(fewer, colluders, target)
    short = [names for names, (_, confirms) in lists.items() if len(confirms) < t]
    assert short, "with the label's number one of the two lists lacks a signature"
    for names in short:
        signers, confirms = lists[names]
        chosen = tuple(confirms[name] for name in names if name in confirms)
        request = type(fewer.confirmations())(fewer.h, chosen)
        refuses(fewer, signers[0], request, ThresholdRefused, found=f"{len(chosen)} sites")


def test_a_colluder_who_signs_the_other_list_convinces_nobody(without):
    world = world_at("submit", n=5)
    lists = split(world, ("dan", "eve"), "ann")
    (full, (signers, confirms)), (_, (_, others)) = lists.items()
    mixed = {**confirms, **{name: c for name, c in others.items() if name not in confirms}}
    request = type(world.confirmations())(world.h, tuple(mixed[n] for n in full if n in mixed))
    refuses(world, signers[0], request, ListRefused, found="another survivors")
    assert len(request.confirms) >= world.t
    without(checks, "confirm")
    assert world.receive(signers[0], request).site == signers[0]
