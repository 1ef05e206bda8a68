"""The end of a round: sums that are not this sum, certificates that prove nothing, rollbacks (PROTOCOL R, T, S, E)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from kit import World, answer_of, refuses, world_at

from fedcore.errors import (
    HeaderRefused,
    ListRefused,
    OutOfOrder,
    ReleaseRefused,
    SecondSum,
    SignatureRefused,
    StaleEpoch,
    TagRefused,
    ThresholdRefused,
    VectorRefused,
)
from fedcore.secagg.crypto import pairwise
from fedcore.secagg.crypto.pairwise import pair_seed
from fedcore.secagg.crypto.sumtag import SumTag
from fedcore.secagg.protocol import checks, effects, messages, wire_form
from fedcore.secagg.protocol.messages import (
    COORDINATOR,
    RELEASE_REFUSED,
    SELF_SEED,
    Leave,
    Statement,
)
from fedcore.secagg.protocol.round import site


def asked_to_open(world, name):
    found = world.step(name, site.MessageFromCoordinator(world.aggregate()))
    return next(e for e in found if isinstance(e, effects.OpenSum))


def opened(world, asked, total, name="ann"):
    """A site's shell: check the tag, or tell the machine why not. Returns the effects."""
    tag = SumTag(world.group, asked.header, asked.state_tag)
    tagged = world.layout.tagged_slots
    try:
        tag.check(total[:tagged], world.layout.read_tag(total), asked.survivors)
    except TagRefused as error:
        return world.step(name, site.CheckFailed(error))
    return world.step(name, site.SumOpened(b"S" * 32, b"N" * 32))


SUMS = {
    "one site alone": lambda w: w.plain["bob"],
    "one site left out": lambda w: w.plain_sum(w.roster[1:]),
    "one site twice": lambda w: w.plain_sum((*w.roster, "bob")),
    "one site in another's place": lambda w: w.plain_sum((*w.roster[:4], "bob")),
    "one unit more": lambda w: w.ring(w.plain_sum(w.roster) + (np.arange(w.layout.slots) == 0)),
    "noise": lambda w: w.masked["bob"],
}


@pytest.mark.parametrize("lie", SUMS)
def test_a_wrong_sum_gets_the_one_uniform_refusal(lie, without):
    world = world_at("unmask")
    asked = asked_to_open(world, "ann")
    total = SUMS[lie](world).astype(np.uint64)
    control, stage = world.copy(), world.stages["ann"]
    found = opened(world, asked, total)
    told = [e.message for e in found if isinstance(e, effects.Send)]
    assert told == [Leave(world.h, "ann", RELEASE_REFUSED)], "the same bytes whatever was wrong"
    assert not any(isinstance(e, effects.Apply) for e in found)
    assert isinstance(world.stages["ann"], site.Halted)

    without(SumTag, "check")
    assert isinstance(answer_of(opened(control, asked, total)), Statement)
    assert isinstance(stage, site.Opening)


def test_the_right_sum_is_stated():
    world = world_at("unmask")
    found = opened(world, asked_to_open(world, "ann"), world.plain_sum(world.roster))
    assert isinstance(answer_of(found), Statement)


def test_after_a_refused_release_no_round_runs_until_a_new_key_epoch():
    world = world_at("open")
    world.step("ann", site.CheckFailed(TagRefused("sum")))
    halted = world.stages["ann"]
    later = replace(world.round_header, round=2)
    refuses(
        world, "ann", world.invitation("ann", later), OutOfOrder, fault="this site", found="Invited"
    )
    refuses(
        world, "ann", site.NewEpoch(1, b"k" * 32), StaleEpoch, found="1", expected="more than 1"
    )
    refuses(world, "ann", site.CheckFailed(TagRefused("again")), OutOfOrder, fault="this site")
    assert world.stages["ann"] is halted
    world.step("ann", site.NewEpoch(2, b"k" * 32))
    invited = world.invitation("ann", replace(later, epoch=2))
    refuses(world, "ann", invited, SecondSum, found="round 2")  # its sum may be known all the same
    free = replace(world.stages["ann"].standing, exposed=b"")
    world.stages["ann"] = site.Idle(free)
    assert answer_of(world.step("ann", invited)).key_id == b"k" * 32
    # Control: a plain departure does not end the epoch.
    other = world_at("confirm")
    other.step("ann", site.CheckFailed(TimeoutError("silence")))
    assert answer_of(other.step("ann", other.invitation("ann", later))) is not None


@pytest.mark.parametrize(
    "stage", ["keys", "shares", "submit", "confirm", "unmask", "open", "state"]
)
def test_a_sites_last_word_names_no_reason(stage):
    """Attack 3: the coordinator learns that a site left, and not which check failed."""
    world = world_at(stage)
    words = []
    for problem in (TagRefused("sum"), ValueError("coordinate 17 is 3.5"), TimeoutError("late")):
        _, found = site.step(
            world.members["ann"], world.stages["ann"], site.CheckFailed(problem), 0.0
        )
        words.append([e for e in found if isinstance(e, effects.Send)])
    assert words[0] == words[1] == words[2]
    assert len(words[0]) == 1


def test_a_sum_for_another_list_than_the_signed_one():
    world = world_at("unmask")
    request = world.aggregate(world.roster[:4])
    refuses(world, "ann", request, ListRefused, found="another survivor list")
    four = replace(world.stages["ann"], submissions=request.submissions)
    world.stages["ann"] = four  # control: a site that signed that list opens it
    world.step("ann", site.MessageFromCoordinator(request))
    assert isinstance(world.stages["ann"], site.Opening)


def test_a_sum_of_another_round(without):
    world = world_at("unmask")
    request = replace(world.aggregate(), header=b"o" * 32)
    refuses(world, "ann", request, HeaderRefused, expected="round 1")
    without(checks, "of_round")
    world.step("ann", site.MessageFromCoordinator(request))
    assert isinstance(world.stages["ann"], site.Opening)


def test_a_sum_before_anybody_confirmed():
    """Under masks the sum comes after unmask only: it would skip the agreement on survivors."""
    world = world_at("submit")
    refuses(world, "ann", world.aggregate(), OutOfOrder, found="Aggregate", expected="SurvivorList")
    other = world_at("submit", protection="encrypted")
    other.step("ann", site.MessageFromCoordinator(other.aggregate()))
    assert isinstance(other.stages["ann"], site.Opening), "control: `encrypted` has no such stage"


ENCRYPTED_LISTS = [
    (("bob", "cat", "dan", "eve"), ListRefused, "left out"),
    (("ann", "bob", "cat"), ThresholdRefused, "3 sites"),
    (("ann", "bob", "cat", "dan", "dan"), ListRefused, "twice"),
]


@pytest.mark.parametrize(("names", "error", "found"), ENCRYPTED_LISTS)
def test_encrypted_a_sum_for_a_list_without_this_site_or_below_t(names, error, found, without):
    world = world_at("submit", protection="encrypted")
    request = world.aggregate(names)
    refuses(world, "ann", request, error, found=found)
    without(checks, "members")
    without(site, "_check_own_submission")
    world.step("ann", site.MessageFromCoordinator(request))
    assert isinstance(world.stages["ann"], site.Opening)


def test_encrypted_a_sum_with_another_submission_of_this_site():
    world = world_at("submit", protection="encrypted")
    world.submits["ann"] = world.signed("ann", world.submits["ann"], digest=b"o" * 32)
    refuses(world, "ann", world.aggregate(), VectorRefused, found="another submission")


# ---------------------------------------------------------------------------------- certificates


def released(world, name, certificate):
    """The control: the new state is applied."""
    found = world.step(name, site.MessageFromCoordinator(certificate))
    assert [type(e) for e in found] == [effects.Persist, effects.Apply, effects.Erase]


def test_nothing_is_applied_before_the_certificate_and_then_once():
    world = world_at("state")
    certificate = world.certificate()
    for stage in ("submit", "confirm", "unmask", "open"):
        early = world_at(stage)
        refuses(early, "ann", certificate, OutOfOrder, found="Certificate")
    released(world, "ann", certificate)
    done = world.stages["ann"]
    assert world.step("ann", site.MessageFromCoordinator(certificate)) == (), (
        "heard again, applied once"
    )
    assert world.stages["ann"] is done
    refuses(world, "ann", replace(certificate, sum_mac=b"x" * 32), OutOfOrder, found="Certificate")


@pytest.mark.parametrize(
    ("signers", "error", "found"),
    [
        (("ann", "bob", "cat"), ThresholdRefused, "3 sites"),
        (("ann", "bob", "cat", "cat"), ListRefused, "twice"),
        (("ann", "ann", "ann", "ann"), ListRefused, "twice"),
    ],
)
def test_a_certificate_with_fewer_than_t_signers(signers, error, found, without):
    world = world_at("state")
    certificate = world.certificate(signers)
    refuses(world, "ann", certificate, error, found=found)
    without(checks, "members")
    released(world, "ann", certificate)


def test_a_certificate_with_a_forged_signer(without):
    world = world_at("state")
    forged = world.statements["ann"].signature
    signatures = (*world.certificate().signatures[:4], ("eve", forged))
    certificate = world.certificate(signatures=signatures)
    refuses(world, "ann", certificate, SignatureRefused, fault="eve")
    without(checks, "check_signature")
    released(world, "ann", certificate)


def test_a_certificate_signed_by_a_stranger():
    world = world_at("state")
    signatures = (*world.certificate().signatures[:4], ("mallory", b"m" * 64))
    refuses(world, "ann", world.certificate(signatures=signatures), ListRefused, found="'mallory'")


@pytest.mark.parametrize("field", ["sum_mac", "state_mac"])
def test_a_certificate_for_another_sum_or_state(field):
    """Signed by t others who colluded or were misled: it is not what this site found."""
    world = world_at("state")
    lie = {n: world.signed(n, s, **{field: b"x" * 32}) for n, s in world.statements.items()}
    signatures = tuple((n, s.signature) for n, s in lie.items() if n != "ann")
    certificate = world.certificate(signatures=signatures, **{field: b"x" * 32})
    refuses(world, "ann", certificate, ReleaseRefused, found="another sum, state or survivor list")
    stage = world.stages["ann"]
    world.stages["ann"] = replace(stage, statement=lie["ann"])
    released(world, "ann", certificate)


def test_a_certificate_for_other_survivors():
    world = world_at("state")
    four = world.roster[:4]
    lie = {
        n: world.signed(n, s, survivors=wire_form.digest(four)) for n, s in world.statements.items()
    }
    signatures = tuple((n, lie[n].signature) for n in four)
    certificate = world.certificate(survivors=four, signatures=signatures)
    refuses(world, "eve", certificate, ReleaseRefused, found="another sum")
    world.stages["eve"] = replace(world.stages["eve"], statement=lie["eve"])
    released(world, "eve", certificate)


def test_a_certificate_of_another_round(without):
    world = world_at("state")
    other = replace(world.round_header, round=2)
    lie = {n: world.signed(n, s, header=other.digest) for n, s in world.statements.items()}
    signatures = tuple((n, s.signature) for n, s in lie.items())
    certificate = world.certificate(header=other, signatures=signatures)
    refuses(world, "ann", certificate, HeaderRefused, expected="round 1")
    without(checks, "certificate")
    refuses(world, "ann", certificate, ReleaseRefused)  # and its own statement is not in it


# ------------------------------------------------------------------------- checkpoints and rollback


def late(world, released=0, number=0):
    stage = site.Idle(
        replace(world_at("idle").stages["ann"].standing, released=released, round=number)
    )
    world.stages["ann"] = stage


def test_a_late_joiner_takes_the_certified_state_and_no_older_one():
    world = world_at("state")
    certificate = world.certificate()
    late(world)
    found = world.step("ann", site.CaughtUp(certificate, certificate.state_mac))
    assert any(isinstance(e, effects.Apply) for e in found)
    assert world.stages["ann"].standing.certificate == certificate.hash
    event = site.CaughtUp(certificate, certificate.state_mac)
    for released_before in (1, 7):
        late(world, released_before, released_before)
        refuses(
            world, "ann", event, HeaderRefused, found="round 1", expected=f"after {released_before}"
        )


@pytest.mark.parametrize(
    "lie",
    [
        "state", "signers", "repeated", "forged", "stranger", "no survivor", "federation", "job",
        "plan", "pins", "cohort", "unpinned", "threshold", "smaller cohort's threshold",
    ],
)  # fmt: skip
def test_a_checkpoint_that_its_certificate_does_not_prove(lie, without):
    world = world_at("state")
    good = world.certificate()
    names = world.roster

    def resigned(**changes):
        header = replace(good.header, **changes)
        lies = {n: world.signed(n, world.statements[n], header=header.digest) for n in names}
        return replace(
            good, header=header, signatures=tuple((n, s.signature) for n, s in lies.items())
        )

    certificate, error, check = {
        "state": (good, ReleaseRefused, None),
        "signers": (world.certificate(names[:3]), ThresholdRefused, "certificate"),
        "forged": (replace(good, sum_mac=b"x" * 32), SignatureRefused, "certificate"),
        "repeated": (
            world.certificate(("ann", "bob", "cat", "cat")), ListRefused, "certificate",
        ),
        "stranger": (
            replace(good, signatures=(*good.signatures[:3], ("mallory", b"m" * 64))), ListRefused,
            "certificate",
        ),
        "no survivor": (  # eve signed as well, and is not in the sum
            replace(good, survivors=names[:4]), ListRefused, "certificate",
        ),
        "federation": (resigned(federation="another"), HeaderRefused, "equal"),
        "plan": (resigned(plan_digest="0" * 64), HeaderRefused, "equal"),
        "unpinned": (
            resigned(roster=(*names[:4], "mallory")), checks.RosterRefused, "roster",
        ),
        "smaller cohort's threshold": (
            replace(resigned(roster=names[:4], threshold=2), survivors=names[:4]), ThresholdRefused,
            "round_threshold",
        ),
        "job": (resigned(job="job2"), HeaderRefused, "equal"),
        "pins": (resigned(pins="0" * 64), HeaderRefused, "equal"),
        "cohort": (
            replace(resigned(roster=("ann", "bob", "cat")), survivors=("ann", "bob", "cat")),
            checks.RosterRefused, "roster",
        ),
        "threshold": (resigned(threshold=1), ThresholdRefused, "round_threshold"),
    }[lie]  # fmt: skip
    late(world)
    mac = b"other state" if lie == "state" else certificate.state_mac
    fault = "ann" if lie == "forged" else COORDINATOR
    refuses(world, "ann", site.CaughtUp(certificate, mac), error, fault=fault)
    if check:
        without(checks, check)
    if lie in {"cohort", "unpinned", "smaller cohort's threshold"}:
        without(checks, "round_threshold", "certificate")
    found = world.step("ann", site.CaughtUp(certificate, certificate.state_mac))
    assert any(isinstance(e, effects.Apply) for e in found)


def test_a_checkpoint_may_skip_releases_but_never_go_back():
    """An older release is as well signed as the newest: only what is held already tells them apart."""
    world = world_at("state")
    old = world.certificate()
    header = replace(world.round_header, round=5, certificate="c" * 64)
    lies = {n: world.signed(n, s, header=header.digest) for n, s in world.statements.items()}
    new = replace(old, header=header, signatures=tuple((n, s.signature) for n, s in lies.items()))
    late(world)
    world.step("ann", site.CaughtUp(new, new.state_mac))
    standing = world.stages["ann"].standing
    assert (standing.released, standing.round, standing.certificate) == (5, 5, new.hash)
    for again in (old, new):
        refuses(
            world, "ann", site.CaughtUp(again, again.state_mac), HeaderRefused, expected="after 5"
        )
    late(world)  # the control: a site that forgot what it holds takes the older one
    world.step("ann", site.CaughtUp(old, old.state_mac))
    assert world.stages["ann"].standing.released == 1


@pytest.mark.parametrize("stage", ["keys", "submit", "unmask", "state"])
def test_a_checkpoint_is_not_taken_within_a_round(stage):
    """The state a vector was made from stays what it was until the round has ended."""
    world = world_at(stage)
    certificate = world_at("state").certificate()
    event = site.CaughtUp(certificate, certificate.state_mac)
    refuses(world, "ann", event, OutOfOrder, fault="this site", found="CaughtUp")
    halted = world_at("open")
    halted.step("ann", site.CheckFailed(TagRefused("sum")))
    refuses(halted, "ann", event, OutOfOrder, fault="this site", found="CaughtUp")


# ------------------------------------------------------------------------------ a smaller cohort


def smaller(*names, threshold=3):
    """A round to which only these sites of five are invited, under a plan with this threshold."""
    world = World(5, threshold)
    world.round_header = replace(world.round_header, roster=names)
    return world


def test_a_smaller_cohort_releases_its_own_sum_and_the_others_catch_up():
    """Four of five at t = 3: an exact sum, a certificate that three signatures make good."""
    four = ("ann", "bob", "cat", "dan")
    world = smaller(*four)
    world.advance("unmask", four)
    secrets = world.rebuilt(world.shares_held(world.answers.values()))
    masks = [world.self_mask(name, secrets[name, SELF_SEED]) for name in four]
    assert np.array_equal(world.minus(four, masks), world.plain_sum(four))
    for stage in ("open", "state"):
        for name in four:
            getattr(world, f"_{stage}")(name, True)
    certificate = world.certificate(("ann", "bob", "cat"))
    released(world, "dan", certificate)
    world.step("eve", site.CaughtUp(certificate, certificate.state_mac))
    assert world.stages["eve"].standing == world.stages["dan"].standing
    refuses(smaller(*four), "eve", world.invitation("eve"), ListRefused, found="left out")


@pytest.mark.parametrize(("names", "threshold"), [(("ann", "bob", "cat"), 4), (("ann", "bob"), 3)])
def test_a_cohort_below_its_threshold_or_the_minimum(names, threshold):
    """Three of five run at t = 3 only (all must stay), two not at all."""
    world = smaller(*names, threshold=threshold)
    refuses(
        world, "ann", world.invitation("ann"), checks.RosterRefused,
        found=f"{len(names)} sites", expected=f"at least {threshold}",
    )  # fmt: skip
    whole = smaller("ann", "bob", "cat")
    assert answer_of(whole.step("ann", whole.invitation("ann"))) is not None, "control"


# ---------------------------------------------------------------- different models, to different sites


def misled():
    """eve was given another model; everybody still shares (after which tags are compared)."""
    world = World()
    world.states["eve"] = b"a model made for eve alone"
    return world


def test_different_models_to_different_sites_and_who_differs_is_named():
    world = misled().advance("keys")
    refuses(
        world, "ann", world.bundle(), checks.StateDiffers, fault="eve", found="another one at 'eve'"
    )
    refuses(world, "eve", world.bundle(), checks.StateDiffers, fault="ann")


@pytest.mark.parametrize("bound", [True, False])
def test_masks_of_different_models_do_not_cancel(bound, without):
    """Even if the comparison is removed: every seed binds the site's own tag. Control: unbound seeds."""
    without(checks, "same_state")
    if not bound:
        without(pairwise, pair_seed=lambda *a, state_tag, **k: pair_seed(*a, state_tag=b"", **k))
    world = misled().advance("submit")
    own = [world.masks[name][0] for name in world.roster]
    same = np.array_equal(world.minus(world.roster, own), world.plain_sum(world.roster))
    assert same is not bound


def test_weights_and_updates_never_travel_in_clear():
    """security.md (f): the weight is in the protected vector; no message of a round has a field for it."""
    world = world_at("state")
    sent = [
        world.keys,
        world.shares,
        world.submits,
        world.confirms,
        world.answers,
        world.statements,
    ]
    data = b"".join(wire_form.encode(m) for kind in sent for m in kind.values())
    clear = world.plain["ann"].tobytes()
    assert clear[:24] not in data and world.masked["ann"].tobytes()[:24] not in data
    assert {m for kind in sent for m in map(type, kind.values())} <= set(
        messages.SiteMessage.__args__
    )
    fields = {f for t in messages.SiteMessage.__args__ for f in t.__dataclass_fields__}
    assert not fields & {"weight", "examples", "rows", "loss", "metrics", "range", "clip", "scale"}
