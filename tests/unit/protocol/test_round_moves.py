"""The tables of legal moves against what the machines do: nothing outside, everything inside reached.

Rounds are played in random order with absences, departures, crashes, refusals and lies, and every step
of both machines is held against the table.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import get_args

import pytest
from support.parties import HUB, KEY_ID, STATE, Parties, hashed, kind_of

from fedcore.errors import OutOfOrder, ProtocolRefused, RoundAbandoned, SecondSum
from fedcore.secagg.protocol import messages
from fedcore.secagg.protocol.absences import STAGES
from fedcore.secagg.protocol.moves import not_legal
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.round.site import answered
from fedcore.secagg.protocol.wire_form import encode

MACHINES = {"site": site, "coordinator": coordinator}
ENDED = coordinator.Ready | coordinator.Released | coordinator.Failed


def disturb(parties, draw):
    """Something that happens while messages are under way."""
    name = draw.choice(parties.sites)
    what = draw.randrange(7)
    in_round = isinstance(parties.stages[name], site.IN_ROUND)
    if what == 0 and in_round:
        parties.crash(name)
    elif what == 1:
        if not isinstance(parties.stages[HUB], ENDED):
            parties.crash(HUB)
    elif what == 2 and not isinstance(parties.stages[HUB], ENDED):
        parties.step(HUB, coordinator.Gone(name))
    elif what == 3 and in_round:
        parties.deliver(name, site.CheckFailed(RuntimeError("an operator says no")))
    elif what == 4 and in_round:
        parties.step(name, site.Tick())
    elif what == 5 and in_round:
        parties.step(name, site.SessionRestored())
    elif not isinstance(parties.stages[HUB], ENDED):
        parties.step(HUB, coordinator.Tick())


def lose_one(parties, name, kind):
    """The first message of this type does not reach this site."""
    heard, lost = parties.absent, []

    def absent(to, event):
        if to == name and not lost and isinstance(getattr(event, "message", None), kind):
            lost.append(event)
            return True
        return heard(to, event)

    parties.absent = absent


def random_rounds(seed):
    """Two rounds of a random cohort, with everything that may happen; returns the parties."""
    draw = random.Random(seed)
    protection = "encrypted" if seed % 4 == 3 else "masked"
    parties = Parties(draw.randint(3, 5), protection=protection, ahead=seed % 4 == 0)
    if seed % 5 == 0:
        lose_one(parties, draw.choice(parties.sites), messages.Confirmations)
    for _ in range(2):
        gone = draw.sample(parties.sites, draw.choice([0, 0, 1, 1, 2]))
        some = draw.sample(parties.sites, 2)
        parties.refusers = set(some[:1]) if draw.random() < 0.1 else set()
        parties.contrary = set(some) if draw.random() < 0.15 else set()
        parties.tags = dict.fromkeys(some, b"x" * 32) if draw.random() < 0.1 else {}
        parties.begin(**{name: draw.choice(STAGES) for name in gone})
        trouble = draw.choice([0, 0, 0.03, 0.1])
        while parties.queue:
            count = draw.randint(1, 9)
            stop = len(parties.log) + count
            parties.pump(draw.randrange, until=lambda stop=stop: len(parties.log) >= stop)
            if draw.random() < trouble * count:
                disturb(parties, draw)
        last = parties.finish(draw.randrange)
        if isinstance(last, coordinator.Released):
            halted = {n for n in parties.sites if isinstance(parties.stages[n], site.Halted)}
            if halted:
                break
            parties.catch_up()
        elif last.exposed:
            break  # no other round may follow it
    return parties


SEEDS = range(60)
PLAYED = {}


def played(seed):
    if seed not in PLAYED:
        PLAYED[seed] = random_rounds(seed)
    return PLAYED[seed]


def machine_of(step):
    return coordinator if step.who == HUB else site


def event_of(step):
    """What its table calls the event: the type of a received message, else of the event."""
    event = step.event
    received = isinstance(event, site.MessageFromCoordinator | coordinator.MessageFromSite)
    return type(event.message) if received else type(event)


def common(machine):
    """What every stage of a round takes."""
    return set.intersection(*(set(machine.MOVES[stage]) for stage in machine.IN_ROUND))


def allowed(step):
    """Stages the table lets this step end in, besides the one it began in."""
    machine, kind = machine_of(step), event_of(step)
    moves = machine.MOVES[type(step.before)]
    targets = set(moves[kind][1])
    if machine is coordinator and kind in {messages.Leave, coordinator.Gone, coordinator.Tick}:
        ends = [t for k, (_, t) in moves.items() if k not in common(machine)]
        targets |= {stage for found in ends for stage in found}
    return targets


@pytest.mark.parametrize("seed", SEEDS)
def test_every_step_of_random_rounds_is_in_the_table(seed):
    parties = played(seed)
    for step in parties.log:
        if type(step.before) is not type(step.after):
            assert type(step.after) in allowed(step), (type(step.before), event_of(step))
    assert all(isinstance(error, ProtocolRefused) for _, _, error in parties.refusals if error)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_rounds_end_and_leave_nobody_behind(seed):
    parties = played(seed)
    assert isinstance(parties.stages[HUB], coordinator.Released | coordinator.Failed)
    for name in parties.sites:
        assert isinstance(parties.stages[name], site.Idle | site.Halted)
        standing = parties.stages[name].standing
        assert standing.released <= standing.round <= parties.stages[HUB].round + parties.ahead
        made = [(s.after.header.round, type(s.after)) for s in parties.log if s.who == name
                if isinstance(s.after, site.Masking) and not isinstance(s.before, site.Masking)]  # fmt: skip
        assert len(made) == len(set(made)), "one vector a round"


def test_random_rounds_reach_every_stage_and_both_ends():
    seen = {"site": set(), "coordinator": set()}
    edges = {"site": set(), "coordinator": set()}
    for seed in SEEDS:
        for step in played(seed).log:
            name = "coordinator" if step.who == HUB else "site"
            seen[name] |= {type(step.before), type(step.after)}
            if type(step.before) is not type(step.after):
                edges[name].add((type(step.before), event_of(step), type(step.after)))
    for name, machine in MACHINES.items():
        assert seen[name] == set(machine.MOVES)
        own = {  # what leads on by a message or by the shell's own work
            (before, kind, after)
            for before, moves in machine.MOVES.items()
            for kind, (_, targets) in moves.items()
            for after in targets
            if kind not in common(machine)
            if before not in {site.Halted, coordinator.Released, coordinator.Failed}
            and after not in {site.Idle, coordinator.Failed} and before is not after
        }  # fmt: skip
        assert own and own <= edges[name], own - edges[name]


# --------------------------------------------------------------------- what is not in the table


def samples():
    """A stage of each type and an event of each type, of both machines, from the same round."""
    found = {"site": ({}, {}), "coordinator": ({}, {})}
    for protection, absences in (("masked", {}), ("masked", {"s01": "keys", "s02": "keys"})):
        parties = Parties(3, protection=protection, ahead=not absences)
        parties.play(**absences)
        for step in parties.log:
            if step.who not in {HUB, "s00"}:
                continue
            stages, events = found["coordinator" if step.who == HUB else "site"]
            stages.setdefault(type(step.before), step.before)
            stages.setdefault(type(step.after), step.after)
            events.setdefault(event_of(step), step.event)
        first = found.setdefault("parties", parties)
    parties = first
    certificate = found["coordinator"][0][coordinator.Released].certificate
    stages, events = found["site"]
    stages[site.Halted] = site.Halted(stages[site.Idle].standing)
    for event in (
        site.CheckFailed(RoundAbandoned("keys", 1, 2)), site.SessionRestored(),
        site.Restarted(), site.Tick(), site.CaughtUp(certificate, certificate.state_mac),
        site.NewEpoch(2, hashed("key")), site.Invited(messages.Announce(parties.header()), STATE),
        site.Superseded(), site.Declined(parties.header()),
        site.OwnSignature(certificate.statement(*certificate.signatures[0]), certificate.header),
        site.MessageFromCoordinator(messages.Notice(certificate.header.digest, "s01", b"sealed")),
        site.MessageFromCoordinator(messages.Leave(b"h", "s01", "left")), site.MessageFromCoordinator("anything"),
        site.MessageFromCoordinator(certificate), site.MessageFromCoordinator(None),
    ):  # fmt: skip
        events.setdefault(kind_of(event), event)
    stages, events = found["coordinator"]
    leave = messages.Leave(certificate.header.digest, "s00", "left")
    for event in (
        coordinator.Restarted(), coordinator.SiteReconnected("s00"), coordinator.Gone("s00"),
        coordinator.Tick(), coordinator.MessageFromSite("s00", leave),
    ):  # fmt: skip
        events.setdefault(kind_of(event), event)
    for kind, event in found["site"][1].items():  # nobody may say the coordinator's part to it
        if isinstance(event, site.MessageFromCoordinator) and kind not in events:
            events[kind] = coordinator.MessageFromSite("s00", event.message)
    for kind, event in list(found["coordinator"][1].items()):  # or a site's to a site
        if isinstance(event, coordinator.MessageFromSite) and kind not in found["site"][1]:
            found["site"][1][kind] = site.MessageFromCoordinator(event.message)
    submit = next(s.event.submit for s in parties.log if event_of(s) is coordinator.Uploaded) if any(
        event_of(s) is coordinator.Uploaded for s in parties.log
    ) else found["coordinator"][1][coordinator.Uploaded].submit  # fmt: skip
    events[messages.Submit] = coordinator.MessageFromSite(submit.site, submit)
    return found, parties


SAMPLES, PARTIES = samples()


def try_step(machine, stage, event):
    if machine is site:
        return site.step(PARTIES.members["s00"], stage, event, 0.0)
    return coordinator.step(PARTIES.hub, stage, event, 0.0)


@pytest.mark.parametrize("name", MACHINES)
def test_there_is_a_sample_of_every_stage_and_of_every_event(name):
    stages, events = SAMPLES[name]
    machine = MACHINES[name]
    assert set(stages) == set(machine.MOVES)
    assert set(events) >= {kind for moves in machine.MOVES.values() for kind in moves}


@pytest.mark.parametrize("name", MACHINES)
def test_whatever_is_not_in_the_table_is_refused_and_changes_nothing(name):
    machine = MACHINES[name]
    stages, events = SAMPLES[name]
    refused = repeated = 0
    for kind_of_stage, stage in stages.items():
        for kind, event in events.items():
            if kind in machine.MOVES[kind_of_stage]:
                continue
            before = encode(stage)
            request = getattr(event, "announce", getattr(event, "message", event))
            past = None
            if request is not None and machine is site:
                try:
                    past = answered(getattr(stage, "history", ()), request)
                except ProtocolRefused:
                    past = request  # of another round: refused below, as Conflicting
            if past is not None:  # an earlier request of this round: its answer, and no move
                repeated += 1
                try:
                    assert try_step(machine, stage, event)[0] is stage
                except ProtocolRefused:
                    assert past is request
            else:
                refused += 1
                with pytest.raises(OutOfOrder):
                    try_step(machine, stage, event)
            assert encode(stage) == before
    assert refused > 60 and bool(repeated) == (machine is site)


def is_exposed(kind):
    return kind in {*site.EXPOSED, *coordinator.EXPOSED}


@pytest.mark.parametrize(
    "kind", [k for k in site.IN_ROUND if not is_exposed(k)], ids=lambda kind: kind.__name__
)
def test_a_site_waits_at_no_stage_before_exposure_for_ever(kind):
    """Its timeout starts with the stage; then it leaves and says only that."""
    member = PARTIES.members["s00"]
    stage = replace(SAMPLES["site"][0][kind], until=50.0)
    same, found = site.step(member, stage, site.Tick(), 49.9)
    assert same is stage and not found
    after, found = site.step(member, stage, site.Tick(), 50.0)
    assert isinstance(after, site.Idle)
    assert [e.message for e in found if hasattr(e, "message")] == [
        messages.Leave(stage.header.digest, "s00", "left")
    ]
    assert isinstance(site.step(member, stage, site.Restarted(), 70.0)[0], site.Idle)


@pytest.mark.parametrize("kind", site.EXPOSED, ids=lambda kind: kind.__name__)
def test_an_exposed_site_waits_for_the_release_and_for_nothing_else(kind):
    member, stage = PARTIES.members["s00"], SAMPLES["site"][0][kind]
    assert stage.standing.exposed == stage.header.digest and not isinstance(stage, site.Waiting)
    assert site.step(member, stage, site.Tick(), 1e12) == (stage, ())
    same, found = site.step(member, stage, site.Restarted(), 0.0)
    assert same is stage and found, "a new process says again what it said"


def test_a_vector_without_masks_waits_through_a_restart_with_a_timeout_of_its_own():
    parties = Parties(3, protection="encrypted")
    parties.play()
    stage = next(s.after for s in parties.log if isinstance(s.after, site.Submitted))
    member = parties.members[stage.submit.site]
    again, found = site.step(member, stage, site.Restarted(), 70.0)
    assert again.until == 70.0 + member.timeout and found


def test_every_stage_of_real_rounds_has_its_own_deadline():
    parties = Parties(3)
    parties.now = 1000.0
    parties.play()
    for step in parties.log:
        if isinstance(step.after, site.Waiting):
            assert step.after.until == 1000.0 + parties.members["s00"].timeout
        if isinstance(step.after, coordinator.Waiting):
            assert step.after.until == 1000.0 + parties.hub.timeout


@pytest.mark.parametrize(
    "kind",
    [k for k in get_args(coordinator.Waiting) if not is_exposed(k)],
    ids=lambda kind: kind.__name__,
)
def test_the_coordinator_waits_at_no_stage_before_exposure_for_ever(kind):
    """With nobody there it abandons at the deadline, with who is left."""
    parties = Parties(3)
    parties.play()
    stage = next(
        s.after for s in parties.log if type(s.after) is kind and type(s.before) is not kind
    )
    stage = replace(stage, until=50.0)
    same, found = coordinator.step(parties.hub, stage, coordinator.Tick(), 49.9)
    assert same is stage and not found
    after, found = coordinator.step(parties.hub, stage, coordinator.Tick(), 50.0)
    assert isinstance(after, coordinator.Failed) and after.left == 0
    assert after.stage == coordinator.STAGE_NAMES[kind]
    told = [e.to for e in found if hasattr(e, "message")]
    assert told == list(parties.sites)


@pytest.mark.parametrize("kind", coordinator.EXPOSED, ids=lambda kind: kind.__name__)
def test_a_round_whose_sum_may_be_known_waits_until_enough_are_back(kind):
    parties = Parties(4)
    parties.play()
    stage = next(
        s.after for s in parties.log if type(s.after) is kind and type(s.before) is not kind
    )
    step = coordinator.step
    for name in parties.sites:
        stage, _ = step(parties.hub, stage, coordinator.Gone(name), 0.0)
    assert coordinator.step(parties.hub, stage, coordinator.Tick(), 1e12) == (stage, ())
    assert coordinator.waiting_for(stage) == parties.sites
    _, found = step(parties.hub, stage, coordinator.SiteReconnected("s02"), 0.0)
    (again,) = [e.message for e in found if hasattr(e, "message")]
    assert isinstance(again, messages.Confirmations | messages.Aggregate)
    sent = {
        s.event.sender: s.event for s in parties.log
        if s.who == HUB and type(s.before) is kind and isinstance(s.event, coordinator.MessageFromSite)
    }  # fmt: skip
    for name in ("s00", "s01", "s02"):  # three of them are enough, whoever was gone
        assert type(stage) is kind
        stage, _ = step(parties.hub, stage, sent[name], 0.0)
    assert type(stage) is not kind and not isinstance(stage, coordinator.Failed)


@pytest.mark.parametrize("kind", coordinator.EXPOSED, ids=lambda kind: kind.__name__)
def test_where_too_few_can_answer_the_round_ends_and_no_other_one_follows(kind):
    """Sites that say that they are in the round no longer cannot come back to it."""
    parties = Parties(4)
    parties.play()
    stages = [s.after for s in parties.log if type(s.after) is kind]
    stage = stages[1]  # one answer is there
    first = coordinator.received_in(stage)[0].site
    left = [name for name in parties.sites if name != first]
    step = coordinator.step
    stage, _ = step(parties.hub, stage, coordinator.Gone(left[0], for_good=True), 0.0)
    assert type(stage) is kind
    leave = messages.Leave(stage.header.digest, left[1], "left")
    stage, found = step(parties.hub, stage, coordinator.MessageFromSite(left[1], leave), 0.0)
    assert isinstance(stage, coordinator.Failed) and first in stage.exposed
    assert any("its sum may be known" in getattr(effect, "text", "") for effect in found)
    header = replace(stage.header, round=stage.round + 1, training_round=stage.round + 1)
    with pytest.raises(SecondSum, match="whose sum may be known"):
        step(parties.hub, stage, coordinator.Start(header, 1), 0.0)


def test_where_no_site_can_have_answered_another_round_may_follow():
    """All that were asked left before; a site that left after its answer would have been heard."""
    parties = Parties(4)
    parties.play()
    asked = next(s.after for s in parties.log if isinstance(s.after, coordinator.Unmasking))
    stage = replace(asked, left=parties.sites[:2])
    gone = coordinator.Gone("s02", for_good=True)
    some, _ = coordinator.step(parties.hub, stage, gone, 0.0)
    assert some.exposed == ("s03",)
    stage, _ = coordinator.step(parties.hub, replace(stage, left=parties.sites[:3]), gone, 0.0)
    assert stage.exposed == ("s03",)
    stage, _ = coordinator.step(
        parties.hub, replace(asked, left=parties.sites), coordinator.Tick(), 0.0
    )
    assert isinstance(stage, coordinator.Failed) and stage.exposed == ()
    header = replace(stage.header, round=stage.round + 1)
    after, _ = coordinator.step(parties.hub, stage, coordinator.Start(header, 1), 0.0)
    assert isinstance(after, coordinator.Advertising)


def test_a_sum_is_asked_for_only_after_a_list_was_signed():
    """The one row of the table that depends on the protection."""
    masked, encrypted = Parties(3), Parties(3, protection="encrypted")
    for parties in (masked, encrypted):
        parties.play()
    submitted = [
        next(s.after for s in p.log if s.who == "s00" and isinstance(s.after, site.Submitted))
        for p in (masked, encrypted)
    ]
    sums = [next(m for s in p.log for m in s.sent if isinstance(m, messages.Aggregate))
            for p in (masked, encrypted)]  # fmt: skip
    with pytest.raises(OutOfOrder, match="SurvivorList first"):
        site.step(masked.members["s00"], submitted[0], site.MessageFromCoordinator(sums[0]), 0.0)
    wanted = messages.SurvivorList(sums[1].header, sums[1].submissions)
    with pytest.raises(OutOfOrder, match="none under `encrypted`"):
        site.step(encrypted.members["s00"], submitted[1], site.MessageFromCoordinator(wanted), 0.0)
    opening, _ = site.step(
        encrypted.members["s00"], submitted[1], site.MessageFromCoordinator(sums[1]), 0.0
    )
    assert isinstance(opening, site.Opening)


def test_after_a_refused_release_a_site_sits_out_until_a_new_key_epoch():
    parties = Parties(4)
    parties.refusers = {"s02"}
    assert isinstance(parties.play(), coordinator.Released)
    assert parties.stages[HUB].refused == ("s02",)
    invited = site.Invited(messages.Announce(parties.header()), STATE)
    with pytest.raises(OutOfOrder):
        parties.step("s02", invited)
    parties.step("s02", site.NewEpoch(2, KEY_ID))
    assert isinstance(parties.stages["s02"], site.Idle)


def test_where_no_message_is_legal_the_refusal_says_none():
    error = not_legal(messages.Statement, [site.Tick], message=True, fault="va")
    assert "found Statement, expected none" in str(error)
    error = not_legal(
        messages.Statement, [messages.Confirm, messages.Submit], message=True, fault="va"
    )
    assert "expected Confirm or Submit" in str(error)
