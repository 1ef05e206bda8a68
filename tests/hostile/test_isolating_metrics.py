"""What barely changes between two released rounds shows an absent site's share (PROTOCOL H).

Class counts of test rows ride in every update vector. With other sites in the next round, the difference
of two sums is about those that are in one of them only.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from fedcore_clients.round_work import RoundWork
from kit import world_at
from test_impossible_sums import CAP, HONEST, D, plan_of
from test_notices import deployed

from fedcore.learning.state import JobState, without_metrics
from fedcore.secagg.encode.pack import Opened
from fedcore.secagg.label import Terms, collusion
from fedcore.secagg.plan import EXCEEDS, METRIC, Wide
from fedcore.secagg.protocol.effects import MakeVector
from fedcore.secagg.protocol.job.site.participation import Agreed
from fedcore.secagg.protocol.schedule import PlannedRound

PLAN = replace(plan_of("layered", counts=2), threshold=3)
ROSTER = PLAN.sites
LEAST = 2 + collusion(Terms.of_plan(PLAN)).active
ROWS = {name: [10 * k, 20 + k] for k, name in enumerate(ROSTER, start=1)}
"""Each site's two metric integers, the same in every round."""


class Rounds:
    """Rounds of honest sites by the state rule alone; `held` keeps (survivors, metric sums) of each."""

    def __init__(self, *, rule=True):
        self.state = JobState.initial(PLAN, np.zeros(D, dtype=np.float32))
        self.rule, self.held = rule, []

    def round(self, cohort, survivors=None):
        survivors = survivors or cohort
        withheld = self.rule and self.state.isolates(cohort, LEAST)
        sums = {name: [0] * len(value) for name, value in HONEST.items()}
        sums["metric:accuracy"] = [0, 0]
        for site in survivors:
            wides = HONEST | {"metric:accuracy": ROWS[site]}
            wides = without_metrics(PLAN, wides) if withheld else wides
            sums = {n: [a + b for a, b in zip(sums[n], wides[n], strict=True)] for n in sums}
        fields = np.full(D, len(survivors) << 15, dtype=np.uint64)
        step = PlannedRound("update", len(self.held) + 1)
        self.state = self.state.after(PLAN, step, Opened(fields, sums), survivors)
        self.held.append((survivors, sums["metric:accuracy"]))
        return sums["metric:accuracy"]


def without(*sites):
    return tuple(site for site in ROSTER if site not in sites)


def shown_rows(rounds):
    """The sites whose own integers somebody finds as the difference of two rounds' sums."""
    return {
        site
        for _, one in rounds.held
        for _, other in rounds.held
        for site, rows in ROWS.items()
        if np.array_equal(np.subtract(one, other), rows)
    }


def test_a_site_that_misses_a_round_does_not_show_its_class_counts():
    rounds = Rounds()
    assert rounds.round(ROSTER) == [150, 115]
    assert rounds.round(without("d")) == [0, 0]
    assert rounds.round(ROSTER) == [150, 115], "the same sites as before isolate nobody"
    assert shown_rows(rounds) == set()
    control = Rounds(rule=False)
    control.round(ROSTER), control.round(without("d"))
    assert shown_rows(control) == {"d"}


def test_the_rule_counts_colluding_sites_and_looks_at_every_earlier_release():
    """c of the sites in the difference may be the coordinator's own: two honest ones must be left."""
    assert LEAST == 2 and Terms.of_plan(PLAN).threshold == 3
    rounds = Rounds()
    rounds.round(ROSTER)
    assert rounds.round(without("d", "e")) != [0, 0], "two sites apart hide each other"
    assert rounds.round(without("e")) == [0, 0], "one apart from both"
    assert rounds.state.shown == (tuple(ROSTER), without("d", "e"))
    assert not rounds.state.isolates(ROSTER, 2) and rounds.state.isolates(ROSTER, 3)
    strict = plan_of("layered", counts=2)
    assert 2 + collusion(Terms.of_plan(strict)).active == 4


def test_the_survivors_of_a_release_count_and_not_its_cohort():
    """A site that left during a round is not in its sum: the next sum with it would show it."""
    rounds = Rounds()
    rounds.round(ROSTER, survivors=without("c"))
    assert rounds.round(ROSTER) == [0, 0]
    assert rounds.round(without("c")) != [0, 0]


def test_what_was_shown_is_in_the_state_that_all_sites_must_share():
    one, other = Rounds(), Rounds()
    one.round(ROSTER), other.round(ROSTER, survivors=without("c"))
    assert one.state.canonical() != replace(one.state, shown=()).canonical()
    assert JobState.from_bytes(other.state.to_bytes()).shown == (without("c"),)


def answering(found):
    async def contribute(*_):
        return found

    return contribute


@pytest.mark.parametrize("rule", [True, False])
def test_a_deployed_site_puts_zeros_for_its_metrics(tmp_path, without, rule):
    """The real `JobWork`, between its training process and its vector."""
    packed = []
    world = world_at("state")
    for found in deployed(world, "cat", tmp_path):
        metric = Wide(METRIC + "accuracy", 2, CAP.bit_length())
        plan = replace(world.plan, metric_sums=(metric,))
        start = JobState.initial(plan, np.zeros(12, dtype=np.float32))
        state = replace(start, shown=(tuple(world.roster[:4]),))

        class Work(RoundWork):
            def protect(self, asked, found):
                packed.append(found)
                return [b"chunk"], b"", {}

        made = Work("cat", Agreed(plan, 0, ()), None, state)
        if not rule:
            without(JobState, isolates=lambda *_: False)
        fields = np.ones(12, dtype=np.uint64)
        wides = {"weight": [100], EXCEEDS: [0], metric.name: [30, 40]}
        work = found.work
        work.contributor = type("Trained", (), {"contribute": answering((fields, wides))})()
        work.link = type("Link", (), {"doing": lambda *_: None, "say": lambda *_: None})()
        work.round_work = lambda: made  # noqa: B023 - used before the next one is made
        asyncio.run(work.make_vector(MakeVector(world.round_header, b"", ())))
        (sent,) = packed
        assert sent[0] is fields
        assert sent[1] == wides | {metric.name: [0, 0] if rule else [30, 40]}
