"""Survivor lists and unmasking: split views, sites active and dropped, second answers (PROTOCOL C, D).

Here an update would be opened. Controls therefore go all the way: what the coordinator collects without
the check is combined, the masks are taken off, and the slots are compared bit for bit.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from kit import World, refuses, world_at

from fedcore.errors import (
    Conflicting,
    HeaderRefused,
    ListRefused,
    OutOfOrder,
    SignatureRefused,
    StateDiffers,
    ThresholdRefused,
    VectorRefused,
)
from fedcore.secagg.protocol import checks
from fedcore.secagg.protocol.effects import Persist, Send
from fedcore.secagg.protocol.messages import (
    MASK_ROOT,
    SELF_SEED,
    Confirm,
    Confirmations,
    Leave,
    SurvivorList,
    Unmask,
)
from fedcore.secagg.protocol.round import coordinator, site


def signs(world, name, request):
    """The control: the site signs this list."""
    confirm = world.receive(name, request)
    assert isinstance(confirm, Confirm)
    return confirm


def answers(world, name, request):
    """The control: the site's key shares go out."""
    unmask = world.receive(name, request)
    assert isinstance(unmask, Unmask)
    return unmask


# --------------------------------------------------------------------------------- survivor lists


@pytest.mark.parametrize(
    ("names", "error", "found"),
    [
        (("ann", "bob", "cat"), ThresholdRefused, "3 sites"),
        (("ann", "bob", "cat", "dan", "dan"), ListRefused, "twice"),
        (("ann", "ann", "bob", "cat", "dan", "eve"), ListRefused, "twice"),
        (("bob", "ann", "cat", "dan"), ListRefused, "another order"),
        (("ann", "cat", "dan", "eve"), ListRefused, "left out"),
    ],
)
def test_a_list_that_is_short_repeats_or_leaves_this_site_out(names, error, found, without):
    world = world_at("submit")
    request = world.survivor_list(names)
    refuses(world, "bob", request, error, found=found)
    without(checks, "members")
    without(site, "_check_own_submission")
    signs(world, "bob", request)


def test_a_survivor_that_never_shared(without):
    """U3 must lie within U2: for a site outside it nobody holds a share."""
    world = world_at("keys")
    world.shares = {n: world.receive(n, world.bundle()) for n in world.roster}
    four = world.roster[:4]
    for name in four:
        world.make_vector(
            name, world.step(name, site.MessageFromCoordinator(world.delivery(name, four)))
        )
    stranger = world.signed("eve", world.submits["ann"], site="eve")
    request = world.survivor_list((*four, "eve"), {"eve": stranger})
    refuses(world, "ann", request, ListRefused, found="'eve'", expected="a subset of 4 sites")
    without(checks, "members")
    signs(world, "ann", request)


def test_an_unknown_survivor(without):
    world = world_at("submit")
    stranger = replace(world.submits["eve"], site="mallory")
    request = replace(
        world.survivor_list(), submissions=(*world.survivor_list().submissions, stranger)
    )
    refuses(world, "ann", request, ListRefused, found="'mallory'")
    without(checks, "members")
    refuses(
        world, "ann", request, SignatureRefused, found="mallory", expected="a site of the roster"
    )
    without(checks, "check_signature")
    signs(world, "ann", request)


@pytest.mark.parametrize("field", ["digest", "size", "signature"])
def test_a_submission_swapped_under_anothers_name(field, without):
    world = world_at("submit")
    value = getattr(world.submits["bob"], field)
    lie = replace(
        world.submits["bob"], **{field: value + 1 if field == "size" else bytes(len(value))}
    )
    request = world.survivor_list(submits={"bob": lie})
    refuses(world, "ann", request, SignatureRefused, fault="bob")
    without(checks, "check_signature")
    signs(world, "ann", request)


def test_another_submission_of_this_very_site(without):
    """Even with its own good signature (its identity key leaked, or it ran twice)."""
    world = world_at("submit")
    other = world.signed("ann", world.submits["ann"], digest=b"o" * 32)
    request = world.survivor_list(submits={"ann": other})
    refuses(
        world, "ann", request, VectorRefused, found="another submission", expected="the one it sent"
    )
    without(site, "_check_own_submission")
    signs(world, "ann", request)


def test_a_submission_of_another_round(without):
    world = world_at("submit")
    other = replace(world.round_header, round=2).digest
    lie = world.signed("bob", world.submits["bob"], header=other)
    refuses(world, "ann", world.survivor_list(submits={"bob": lie}), HeaderRefused, fault="bob")
    refuses(
        world,
        "ann",
        replace(world.survivor_list(), header=other),
        HeaderRefused,
        expected="round 1",
    )
    without(checks, "of_round")
    signs(world, "ann", world.survivor_list(submits={"bob": lie}))


@pytest.mark.parametrize("field", ["state_tag", "key_id"])
def test_a_survivor_that_started_from_another_state(field, without):
    world = world_at("submit")
    lie = world.signed("bob", world.submits["bob"], **{field: b"x" * 32})
    request = world.survivor_list(submits={"bob": lie})
    refuses(world, "ann", request, StateDiffers, fault="bob", found="another one at 'bob'")
    without(checks, "same_state")
    signs(world, "ann", request)


def test_a_second_and_different_survivor_list():
    world = world_at("confirm")
    again = world.step("ann", site.MessageFromCoordinator(world.survivor_list()))
    assert again == (Send("coordinator", world.confirms["ann"]),), (
        "the same request, the same bytes"
    )
    refuses(world, "ann", world.survivor_list(world.roster[:4]), Conflicting, found="other bytes")
    # Control: without its journal the site would sign the second list as well.
    forgetful = world_at("submit")
    assert (
        signs(forgetful, "ann", forgetful.survivor_list(world.roster[:4])) != world.confirms["ann"]
    )


# --------------------------------------------------------------------------------------- unmasking


def test_for_every_site_of_the_cohort_exactly_one_share_leaves():
    """A site named active and dropped: the request has one list, so nobody can be on two; and of each
    site's two shares the answer has one, for every possible list."""
    for count, n in ((4, 5), (5, 5), (6, 7), (5, 7)):
        world = world_at("submit", n=n)
        for names in itertools.islice(itertools.combinations(world.roster, count), 0, None, 3):
            fresh = world.copy()
            request = fresh.survivor_list(names)
            fresh.confirms = {name: signs(fresh, name, request) for name in names}
            for name in names:
                held = {each.of: each for each in fresh.stages[name].held}
                found = answers(fresh, name, fresh.confirmations())
                assert [a.of for a in found.answers] == list(world.roster)
                assert len(found.answers) == len({a.of for a in found.answers})
                for a in found.answers:
                    survived = a.of in names
                    assert a.kind == (SELF_SEED if survived else MASK_ROOT)
                    mine = held[a.of].self_share if survived else held[a.of].root_share
                    other = held[a.of].root_share if survived else held[a.of].self_share
                    assert a.share == mine.reveal() != other.reveal()
                kept = fresh.stages[name]
                assert not hasattr(kept, "held"), "the other share is gone"


def split_world(n, threshold):
    """Every site of a world whose coordinator asks each to sign a list of its own choosing."""
    return world_at("submit", n=n, threshold=threshold)


def tell(world, lists):
    """Confirmations by everybody under the list it was told."""
    for name, names in lists.items():
        world.confirms[name] = signs(world, name, world.survivor_list(names))


def test_split_survivor_lists(without):
    """Nine lists' worth of attack 7: seven sites, t = 4, every site told of another list.

    Without the comparison of what was signed, five sites' mask roots and the others' self-seeds come
    together, and the sum of just two updates lies open, although t = 4. With it nobody unmasks.
    """
    world = split_world(7, 4)
    targets = ("ann", "bob")
    others = world.roster[2:]
    dropped = {name: set() for name in world.roster}
    for place, name in enumerate(itertools.islice(itertools.cycle(others), 5 * 4)):
        # each of the five is "dropped" for four sites other than itself, three at most for each teller
        tellers = sorted((t for t in world.roster if t != name), key=lambda t: len(dropped[t]))
        teller = next(t for t in tellers if name not in dropped[t] and len(dropped[t]) < 3)
        dropped[teller].add(name)
        assert place < 20
    lists = {t: tuple(n for n in world.roster if n not in dropped[t]) for t in world.roster}
    tell(world, lists)
    assert len({c.survivors for c in world.confirms.values()}) > 1

    for name, names in lists.items():
        refuses(world, name, world.confirmations(names), ListRefused, found="another survivors")
        if len(names) > 4:  # a list without those who disagree is not long enough either
            same = [n for n in names if lists[n] == names]
            refuses(world, name, world.confirmations(same), ThresholdRefused)

    without(checks, "confirm")
    collected = [answers(world, name, world.confirmations(names)) for name, names in lists.items()]
    secrets = world.rebuilt(world.shares_held(collected))
    assert {(name, MASK_ROOT) for name in others} <= set(secrets)
    assert {(name, SELF_SEED) for name in targets} <= set(secrets)
    opened = world.open_sum_of(targets, secrets)
    assert np.array_equal(opened, world.plain_sum(targets)), "two updates' sum, bit for bit"
    # whoever of the two colludes subtracts its own, and the other's update is left
    assert np.array_equal(world.ring(opened - world.plain["bob"]), world.plain["ann"])


def test_two_sites_told_two_lists_do_not_unmask(without):
    world = split_world(5, 0)
    lists = dict.fromkeys(world.roster, world.roster)
    lists["ann"] = lists["bob"] = ("ann", "bob", "cat", "dan")
    tell(world, lists)
    refuses(world, "ann", world.confirmations(lists["ann"]), ListRefused, found="'cat'")
    refuses(world, "cat", world.confirmations(), ListRefused, found="'ann'")
    without(checks, "confirm")
    kinds = Counter()
    for name in ("ann", "cat"):
        kinds.update(
            (a.of, a.kind) for a in answers(world, name, world.confirmations(lists[name])).answers
        )
    assert kinds["eve", SELF_SEED] == kinds["eve", MASK_ROOT] == 1, (
        "control: both kinds of one site"
    )


@pytest.mark.parametrize("field", ["bundle", "cohort", "header"])
def test_confirmations_over_another_bundle_or_cohort(field, without):
    """Split views earlier in the round show here: all was signed together."""
    world = world_at("confirm")
    lie = world.signed("bob", world.confirms["bob"], **{field: b"x" * 32})
    request = world.confirmations(confirms={"bob": lie})
    refuses(world, "ann", request, ListRefused, found=f"another {field} signed by 'bob'")
    without(checks, "confirm")
    answers(world, "ann", request)


@pytest.mark.parametrize(
    ("names", "error", "found"),
    [
        (("ann", "bob", "cat"), ThresholdRefused, "3 sites"),
        (("ann", "bob", "cat", "cat"), ListRefused, "twice"),
        (("bob", "cat", "dan", "eve"), ListRefused, "left out"),
        (("ann", "cat", "bob", "dan"), ListRefused, "another order"),
    ],
)
def test_too_few_or_repeated_signatures(names, error, found, without):
    world = world_at("confirm")
    request = world.confirmations(names)
    refuses(world, "ann", request, error, found=found)
    without(checks, "members")
    answers(world, "ann", request)


def test_a_forged_confirmation(without):
    world = world_at("confirm")
    forged = replace(world.confirms["ann"], site="bob")
    request = world.confirmations(confirms={"bob": forged})
    refuses(world, "ann", request, SignatureRefused, fault="bob")
    without(checks, "check_signature")
    answers(world, "ann", request)


def test_a_confirmation_by_a_site_that_is_not_a_survivor(without):
    world = world_at("submit")
    four = world.roster[:4]
    tell(world, dict.fromkeys(four, four))
    eve = world.signed("eve", world.confirms["dan"], site="eve")
    request = replace(world.confirmations(), confirms=(*world.confirmations().confirms, eve))
    refuses(world, "ann", request, ListRefused, found="'eve'")
    without(checks, "members")
    answers(world, "ann", request)


def test_confirmations_of_another_round(without):
    world = world_at("confirm")
    request = Confirmations(b"o" * 32, world.confirmations().confirms)
    refuses(world, "ann", request, HeaderRefused, expected="round 1")
    without(checks, "of_round")
    answers(world, "ann", request)


def test_a_second_and_different_unmask_request():
    """Control: a site that forgot its first answer gives the other kind too, and an update opens."""
    world = world_at("unmask")
    again = world.step("ann", site.MessageFromCoordinator(world.confirmations()))
    assert again == (Send("coordinator", world.answers["ann"]),), "the same request, the same bytes"
    for other in (
        world.confirmations(world.roster[:4]),
        world.confirmations(world.roster[:4][::-1]),
    ):
        refuses(world, "ann", other, Conflicting, found="other bytes")

    forgetful = world_at("submit")  # the same world, as it was before: no journal
    tell(forgetful, dict.fromkeys(world.roster[:4], world.roster[:4]))
    four = forgetful.confirmations()
    second = [answers(forgetful, name, four) for name in world.roster[:4]]
    found = world.shares_held([*world.answers.values(), *second])
    opened = world.open_sum_of(("eve",), world.rebuilt(found))
    assert np.array_equal(opened, world.plain["eve"]), "both secrets of eve, and her update"
    first = world.rebuilt(world.shares_held(world.answers.values()))
    assert ("eve", MASK_ROOT) not in first, "which one answer does not give"


def test_an_unmask_request_before_any_list_is_signed():
    world = world_at("confirm")
    request = world.confirmations()
    early = world_at("submit")
    refuses(early, "ann", request, OutOfOrder, found="Confirmations", expected="SurvivorList")
    late = world_at("unmask")
    refuses(late, "ann", replace(world.survivor_list(), header=b"x" * 32), Conflicting)


def test_the_answer_is_on_disk_before_it_is_sent():
    """PROTOCOL D: otherwise a crash in between would let the site answer a second time."""
    for stage, message in (("submit", "survivor_list"), ("confirm", "confirmations")):
        world = world_at(stage)
        found = world.step("ann", site.MessageFromCoordinator(getattr(world, message)()))
        kinds = [type(effect) for effect in found]
        assert kinds == [Persist, Send]
        restarted = site.replay(world_at(stage).stages["ann"], [found[0].record])
        _, again = site.step(world.members["ann"], restarted, site.Restarted(), 0.0)
        if stage == "confirm":
            assert again == (found[1],)
        else:  # a new process signs nothing of a round: its folder may be an older one
            assert [e.message for e in again if isinstance(e, Send)] == [
                Leave(world.h, "ann", "left")
            ]


def test_a_survivor_gone_at_unmask_while_another_dropped_before_submit():
    """Attack 5: the pair seed of the two is still recovered, and the sum is exact. The real coordinator."""
    world = world_at("shares", n=7)
    dropped, gone = "cat", "fay"
    left = tuple(n for n in world.roster if n != dropped)
    for name in left:
        world.make_vector(name, world.step(name, site.MessageFromCoordinator(world.delivery(name))))
    tell(world, dict.fromkeys(left, left))
    for name in left:
        if name != gone:
            world.answers[name] = answers(world, name, world.confirmations())
    masks = [(seed.reveal(), sign) for seed, sign in coordinator.rebuild_masks(world.unmasking())]
    assert np.array_equal(world.minus(left, masks), world.plain_sum(left))
    # Control: without that one pair's seed the sum is noise.
    pairs = [m for m in masks if any(m[0] == seed for seed, _ in world.masks[gone])]
    lost = next(m for m in pairs if m[0] != world.masks[gone][0][0])
    masks.remove(lost)
    assert np.mean(world.minus(left, masks) == world.plain_sum(left)) < 0.1


def test_a_survivor_list_under_encrypted_is_refused():
    world = world_at("submit", protection="encrypted")
    request = SurvivorList(world.h, tuple(world.submits.values()))
    refuses(world, "ann", request, OutOfOrder, found="SurvivorList", expected="none")


def test_leaving_a_round_after_unmask_warns_that_its_sum_may_be_known():
    world = world_at("unmask")
    found = world.step("ann", site.CheckFailed(TimeoutError("nobody came back")))
    assert any("that sum may be known" in getattr(effect, "text", "") for effect in found)
    quiet = World().advance("shares").step("ann", site.CheckFailed(TimeoutError("early")))
    assert not any(hasattr(effect, "text") for effect in quiet)
