"""Random sequences of rounds, cohorts, aborts, restarts and key epochs against one honest site (PROTOCOL H).

All other sites collude with the coordinator: they join whatever is announced, forget what they did, and
sign what it wants. Invariant, whatever the order: of each state the honest site helps to open at most one
sum that holds its vector; under `encrypted`, where a colluder opens any vector, it sends one for each step.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kit import STAGES, World

from fedcore.errors import PeerRefused, TagRefused
from fedcore.secagg.protocol import effects
from fedcore.secagg.protocol.messages import Abandon
from fedcore.secagg.protocol.round import site
from fedcore.secagg.protocol.round.site import SiteProgress

ANN, OTHERS, LONG = "ann", ("bob", "cat", "dan"), 1e12

ENDS = {
    "the coordinator gives it up": lambda run, w: run.step(
        w, site.MessageFromCoordinator(Abandon(w.h, "release"))
    ),
    "another round is announced": lambda run, w: run.step(w, site.Superseded()),
    "a check fails": lambda run, w: run.step(w, site.CheckFailed(TagRefused("sum"))),
    "time passes": lambda run, w: run.step(w, site.Tick(), LONG),
    "the process is new": lambda run, w: run.restart(w),
    "the round is released": lambda run, w: run.step(
        w, site.MessageFromCoordinator(w.certificate())
    ),
    "the others release it": lambda run, w: run.catch_up(w),
}
"""How a round ends for the honest site, as far as its rules let it."""

ROUNDS = st.fixed_dictionaries(
    {
        "cohort": st.sets(st.sampled_from(OTHERS), min_size=2),
        "dropped": st.none() | st.sampled_from(OTHERS),
        "until": st.sampled_from(STAGES[1:]) | st.sampled_from(["unmask", "state"]),
        "restarts_at": st.none() | st.none() | st.sampled_from(STAGES[1:]),
        "ends": st.lists(
            st.sampled_from(sorted(ENDS)) | st.just("the round is released"), min_size=1, max_size=3
        ),
        "step": st.sampled_from([("update", 1), ("update", 2), ("metrics", 2)]),
        "new_epoch": st.booleans(),
    }
)
"""One round as a coordinator wants it; it is played as far as the honest site takes part."""


class Run:
    """The honest site through a sequence of rounds: its stage, its journal, and what it gave away."""

    def __init__(self, protection):
        self.protection = protection
        self.first = World(4, protection=protection)
        self.stage = self.first.stages[ANN]
        self.base, self.records = self.stage, []
        self.number, self.epoch = 0, 1
        self.opened, self.sent = {}, {}

    # ----------------------------------------------------------------------------- the honest site

    def step(self, world, event, now=0.0):
        """One step of the real machine, with its journal. Raises what the machine raises."""
        found = world.step(ANN, event, now)
        return self.took(world, found)

    def took(self, world, found):
        """Keep what a step recorded: in memory as on disk."""
        self.stage = world.stages[ANN]
        for effect in found:
            if isinstance(effect, effects.Persist):
                self.records.append(effect.record)
                self.count(world, effect.record)
        if not isinstance(self.stage, site.IN_ROUND):
            self.base, self.records = self.stage, []
        return found

    def count(self, world, record):
        """What leaves with this record."""
        header = world.round_header
        state = header.certificate
        if isinstance(record, site.UnmaskAnswered | site.SumAnnounced):
            self.opened.setdefault(state, set()).add(header.digest)
        if isinstance(record, site.VectorSpooled):
            step = state, header.purpose, header.training_round
            self.sent.setdefault(step, set()).add(record.submit.digest + header.digest)

    def restart(self, world):
        """A new process, from what the journal has."""
        world.stages[ANN] = site.replay(self.base, list(self.records))
        return self.step(world, site.Restarted())

    def catch_up(self, world):
        """The colluding sites sign a release of the round, and its checkpoint comes."""
        certificate = world.certificate(signers=tuple(n for n in world.statements if n != ANN))
        self.step(world, site.CaughtUp(certificate, certificate.state_mac))

    def new_epoch(self):
        self.epoch += 1
        event = site.NewEpoch(self.epoch, self.first.key_id)
        self.stage, _ = site.step(self.first.members[ANN], self.stage, event, 0.0)
        self.base, self.records = self.stage, []

    # ------------------------------------------------------------------------------- the coordinator

    def world(self, cohort, step):
        """A round for these sites; the others start it as if there had been none before."""
        first, standing = self.first, self.stage.standing
        world = first.copy()
        world.round_header = replace(
            first.round_header, round=self.number, epoch=standing.epoch, purpose=step[0],
            training_round=step[1], certificate=standing.certificate,
            roster=tuple(n for n in first.roster if n == ANN or n in cohort),
        )  # fmt: skip
        fresh = SiteProgress(standing.epoch, standing.key_id, certificate=standing.certificate)
        world.stages = {name: site.Idle(fresh) for name in first.roster}
        world.stages[ANN] = self.stage
        return world

    def play(self, asked):
        """One round, as far as it goes."""
        self.number += 1
        if asked["new_epoch"] and not isinstance(self.stage, site.IN_ROUND):
            self.new_epoch()
        world = self.world(asked["cohort"], asked["step"])
        try:
            self.advance(world, asked)
        except PeerRefused:  # what its shell does then
            if isinstance(self.stage, site.IN_ROUND) and not isinstance(self.stage, site.EXPOSED):
                self.step(world, site.CheckFailed(TagRefused("sum")))
        for end in asked["ends"]:
            try:
                ENDS[end](self, world)
            except (PeerRefused, StopIteration):
                continue
        if isinstance(self.stage, site.IN_ROUND):  # the word that ended it comes at last
            self.step(world, site.MessageFromCoordinator(Abandon(world.h, "release")))

    def advance(self, world, asked):
        """Everybody to the next stage, one after the other, until the one that is wanted."""
        names = world.round_header.roster
        for before, stage in pairwise(STAGES):
            if stage == "confirm" and asked["dropped"] in names and len(names) > 3:
                names = tuple(name for name in names if name != asked["dropped"])
                world.submits = {name: world.submits[name] for name in names}
            for name in sorted(names, key=lambda name: name == ANN):  # the honest one comes last
                if name == ANN:
                    self.watched(world, stage, before)
                else:
                    world.advance(stage, (name,), after=before)
            if stage == asked["restarts_at"]:
                self.restart(world)
            if stage == asked["until"]:
                return

    def watched(self, world, stage, before):
        """The honest site's own step of a stage, through `took`."""
        real = world.step

        def step(name, event, now=0.0):
            return self.took(world, real(name, event, now))

        world.step = step
        try:
            world.advance(stage, (ANN,), after=before)
        finally:
            del world.step


def check(run):
    assert all(len(sums) == 1 for sums in run.opened.values()), "a second sum of one state"
    if run.protection == "encrypted":
        assert all(len(vectors) == 1 for vectors in run.sent.values()), (
            "a second vector of one step"
        )


def search(protection, **more):
    """Look for a sequence that breaks the invariant."""

    @settings(deadline=None, max_examples=60, **more)
    @given(st.lists(ROUNDS, min_size=1, max_size=6))
    def play(rounds):
        run = Run(protection)
        for asked in rounds:
            run.play(asked)
            check(run)

    play()


# Some 5 s: 60 sequences of up to six rounds, with the keys and shares of four sites each.
@pytest.mark.parametrize("protection", ["masked", "encrypted"])
def test_no_sequence_opens_two_sums_of_one_state(protection):
    search(protection)


@pytest.mark.parametrize("protection", ["masked", "encrypted"])
def test_control_without_the_rule_such_a_sequence_is_found(protection, without):
    without(site, "_check_one_sum")
    with pytest.raises(AssertionError, match="a second"):
        search(protection, phases=[Phase.generate], derandomize=True, database=None)
