"""A lying site makes a sum that no honest vectors have: one uniform refusal everywhere (PROTOCOL U).

The tag holds for such a sum: it proves whose vectors were added, not what was in them. All parties here
are the real machines with real tags, masks and states; one site writes fields that its encoder never would.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from kit import world_at
from support.plans import round_plan
from test_notices import deployed

from fedcore.errors import ImpossibleSum, TagRefused
from fedcore.learning import released
from fedcore.learning.data.statistics import statistics_vector
from fedcore.learning.state import JobState
from fedcore.learning.stopwatch import Stopwatch
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.in_process import InProcessFederation
from fedcore.secagg.packing import field_width
from fedcore.secagg.plan import EXCEEDS, RangePlan, Wide
from fedcore.secagg.protocol import effects, messages
from fedcore.secagg.protocol.job.site.events import WorkFailed
from fedcore.secagg.protocol.round import site
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.secagg.summing import one_by_one

SITES = ("a", "b", "c", "d", "e")
LIAR, D, CAP = 4, 6, 1024
COUNTS = 13
"""So many counts of a metric that the weight and the coordinates are in slots below these, and not below marks: a sum
that overflows there adds one row to a count."""
TOP, WRAP = (1 << 16) - 1, 1 << field_width(16, len(SITES))
COLUMNS = (("age", 0.0, 120.0),)
WEIGHT, OVER, ACCURACY = D, D + 1, D + 3
"""Fields of an update vector behind its coordinates: one limb each, over_half_range in between."""


def plan_of(protection, counts=COUNTS):
    return round_plan(
        SITES, protection, parameters=D, max_examples=CAP, range=RangePlan(start=1.0),
        metric_sums=(Wide("metric:accuracy", counts, CAP.bit_length()),),
    )  # fmt: skip


HONEST = {"weight": [320], "over_range": [0], "over_half_range": [1], EXCEEDS: [0],
          "metric:accuracy": [30] * COUNTS}  # fmt: skip
ROW = {"count": [60], "sum": [60 * 30_000], "square": [60 * 30_000**2], "contributes": [1],
       "clipped": [0]}  # fmt: skip

REST = {"metric:accuracy": [30] * COUNTS, "exceeding": [D] * 3 + [0] * 21}

FIELDS = {
    "no weight at all": (WEIGHT, WRAP - 4 * 320, "weight"),
    "more weight than the cap": (WEIGHT, TOP, "weight"),
    "a coordinate above the range": (0, WRAP - 1 - 4 * (1 << 15), "coordinates"),
    "a coordinate below the range": (0, WRAP - 4 * (1 << 15), "coordinates"),
    "more coordinates over the range than there are": (OVER, 5 * D + 1, "over_range"),
    "more right answers than rows may be": (ACCURACY, 5 * CAP, "metric:accuracy"),
}
"""The field that the liar writes, what it puts there, and what the refusal names."""

ROWS = {
    "n S2 < S1^2": ROW | {"square": [0], "count": [CAP], "sum": [CAP * TOP]},
    "sums beyond the rows": ROW | {"count": [5], "sum": [(1 << 27) - 1]},
    "more clipped than rows": ROW | {"clipped": [CAP]},
}


class Town:
    """Five sites and their coordinator, a liar among them."""

    def __init__(self, protection):
        self.plan = plan_of(protection)
        self.epoch = InProcessFederation("job", self.plan)
        self.heard = []
        self.epoch.tap = self._tap
        self.state = JobState.initial(self.plan, np.zeros(D, dtype=np.float32))
        self.led_to = None

    def _tap(self, to, message):
        if to == messages.COORDINATOR:
            self.heard.append(message)

    def sum(self, purpose, lie=None):
        """One round; the state that its release leads to."""
        spec = self.plan.update_vector
        if purpose == "statistics":
            spec = statistics_vector(1, CAP)
        if purpose == "metrics":
            spec = self.plan.metrics_vector
        number = {"update": 1, "statistics": 0, "range": 0, "metrics": 10}[purpose]
        step = PlannedRound(purpose, number)
        if purpose == "range":
            spec = self.plan.range_vector

        def contribute(index):
            if purpose == "statistics":
                return np.empty(0, dtype=np.uint64), lie if lie and index == LIAR else ROW
            if purpose != "update":
                return np.empty(0, dtype=np.uint64), lie if lie and index == LIAR else REST
            return np.full(D, 1 << 15, dtype=np.uint64), HONEST

        def lead(opened, _):
            self.led_to = self.state.after(self.plan, step, opened, SITES, COLUMNS)
            return self.led_to.canonical()

        self.epoch.sum(spec, 1, one_by_one(contribute), b"state", Stopwatch(), lead=lead)
        return self.led_to

    def check_refused_alike(self, what):
        """Every site is halted, each with the same length of words, and the others can read why."""
        shells = self.epoch.shells
        assert all(isinstance(shell.stage, site.Halted) for shell in shells.values())
        words = [message for message in self.heard if isinstance(message, messages.Leave)]
        assert {word.site for word in words} == set(SITES)
        assert {word.code for word in words} == {messages.RELEASE_REFUSED}
        assert len({len(word.sealed) for word in words}) == 1 and words[0].sealed
        assert not any(isinstance(message, messages.Statement) for message in self.heard)
        causes = {
            shells["a"].secrets.read_notice(messages.Notice(word.header, word.site, word.sealed))
            for word in words
        }
        assert len(causes) == 1
        assert what in causes.pop()


def lying(without, field, value, purpose="update"):
    """The liar's encoder writes a field of its own: any w bits, where an honest one has at most b."""
    honest = Layout._join

    def join(self, coordinates, wides, place):
        data = honest(self, coordinates, wides, place)
        if place == LIAR and self.spec.purpose == purpose:
            data[field] = value
        return data

    without(Layout, _join=join)


def unchecked(without):
    without(released, "check_possible")


@pytest.mark.parametrize("protection", ["encrypted", "masked", "layered"])
@pytest.mark.parametrize("lie", FIELDS)
def test_a_site_that_makes_an_impossible_update_is_refused_by_all_alike(protection, lie, without):
    assert Town(protection).sum("update").done == PlannedRound("update", 1)  # control: honest sites
    field, value, what = FIELDS[lie]
    lying(without, field, value)
    town = Town(protection)
    with pytest.raises(ImpossibleSum, match=what):
        town.sum("update")
    town.check_refused_alike(what)
    unchecked(without)  # control: the rule switched off
    if lie == "no weight at all":  # then it is a fault of the arithmetic, and still one refusal
        town = Town(protection)
        with pytest.raises(ZeroDivisionError):
            town.sum("update")
        town.check_refused_alike("division by zero")
    else:
        without(released, "check_finite")
        assert Town(protection).sum("update").done == PlannedRound("update", 1)


def test_a_field_that_overflows_into_a_mark_is_refused_by_all_alike(without):
    lying(without, OVER + 1, WRAP - 4)  # above it is the mark of a site
    town = Town("layered")
    with pytest.raises(TagRefused, match="contributor marks"):
        town.sum("update")
    town.check_refused_alike("contributor marks")


@pytest.mark.parametrize("purpose", ["range", "metrics"])
def test_the_sums_of_the_other_rounds_are_held_against_their_caps_too(purpose, without):
    assert Town("masked").sum(purpose).done.purpose == purpose  # control: honest sites
    lying(without, 0, TOP, purpose)
    town = Town("masked")
    with pytest.raises(ImpossibleSum):
        town.sum(purpose)
    town.check_refused_alike("sum: ")
    unchecked(without)
    assert Town("masked").sum(purpose).done.purpose == purpose


def test_counts_that_grow_with_the_power_of_two_are_refused():
    town, growing = Town("masked"), REST | {"exceeding": [0] * 23 + [D]}
    with pytest.raises(ImpossibleSum, match="exceeding: found a count that grows"):
        town.sum("range", growing)
    town.check_refused_alike("grows")


def test_a_model_that_is_not_finite_is_refused():
    town = Town("masked")
    server = replace(town.state.server, parameters=np.full(D, 1e39))  # beyond float32
    town.state = replace(town.state, server=server)
    with pytest.raises(ImpossibleSum, match="NaN or infinity"):
        town.sum("update")
    town.check_refused_alike("finite")


@pytest.mark.filterwarnings("ignore:invalid value encountered in sqrt")
@pytest.mark.parametrize("lie", ROWS)
def test_a_site_that_makes_impossible_statistics_is_refused_by_all_alike(lie, without):
    assert Town("layered").sum("statistics").statistics.count == (300,)  # control
    town = Town("layered")
    with pytest.raises(ImpossibleSum, match="statistics"):
        town.sum("statistics", ROWS[lie])
    town.check_refused_alike("statistics")
    unchecked(without)
    town = Town("layered")
    if lie != "more clipped than rows":  # NaN as a spread, which no state's canonical form can hold
        with pytest.raises(ValueError, match="not JSON compliant"):
            town.sum("statistics", ROWS[lie])
        assert np.isnan(town.led_to.statistics.std).any()
    else:
        assert town.sum("statistics", ROWS[lie]).done == PlannedRound("statistics", 0)


def test_a_deployed_site_refuses_alike_whatever_a_sum_makes_its_program_raise(tmp_path, without):
    """Before, only three classes were caught: the site said nothing, and all waited for its timeout."""
    world = world_at("state")
    for found in deployed(world, "cat", tmp_path):
        asked = effects.OpenSum(
            world.round_header, world.roster, (b"",) * 5, b"t" * 32, b"d" * 32, 1
        )

        work, rounds = found.work, found.job.parts.rounds
        work.link = type("Link", (), {"doing": lambda *_: None})()
        sealed = []
        for error in (ZeroDivisionError("division by zero"), KeyError("x"), MemoryError()):
            without(work, round_work=raising(error))
            event = asyncio.run(work.open_sum(asked))
            assert isinstance(event, WorkFailed) and event.error is error
            sealed.append(rounds.sealed(event.told))
        assert len({len(each) for each in sealed}) == 1 and sealed[0]
        without(work, round_work=raising(OSError("no space left")))
        with pytest.raises(OSError, match="no space"):  # the disk is not the sum: it is tried again
            asyncio.run(work.open_sum(asked))


def raising(error):
    def work(*_):
        raise error

    return work
