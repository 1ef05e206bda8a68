"""Who is in a round: over-selection, and rounds whose sum may be known when sites go."""

from __future__ import annotations

import asyncio
import types
from dataclasses import replace

import numpy as np
import pytest
from fedcore_clients.bench_sites import Drawn
from fedcore_clients.trainer import Loaded
from town import SITES, scene

from fedcore.learning.data.statistics import site_sums
from fedcore.secagg.protocol.job.coordinator.facts import Limits
from fedcore.secagg.protocol.messages import Statement
from fedcore.secagg.protocol.round import coordinator

COLUMNS = (("age", 0.0, 100.0), ("chol", 0.0, 600.0))


def slow(found, site, release):
    """From now on this site trains until `release` is set."""
    contributor = found.sites[site].contributor
    contribute = contributor.contribute

    async def late(self, *args):
        await release.wait()
        return await contribute(*args)

    contributor.contribute = types.MethodType(late, contributor)


@pytest.mark.parametrize("protection", ["layered", "encrypted"])
def test_enough_vectors_end_the_wait_for_a_slow_site(tmp_path, pool, protection):
    async def play(found):
        release = asyncio.Event()
        for name in SITES:
            found.start(name)
        slow(found, "d", release)
        found.start_hub()
        await found.run(until=lambda: len(found.hub.facts.rounds.known) >= 2, seconds=50)
        release.set()
        await found.run(seconds=50)
        rows = found.rounds()
        assert rows[0]["survivors"] == rows[1]["survivors"] == ["a", "b", "c"]
        assert not any("abandoned" in row for row in rows)
        await found.check()

    # No deadline can be what ended the wait: it is longer than the whole test.
    patient = Limits(stage=600.0, gather=30.0, minimum=3, grace=600.0, vectors=3)
    scene(tmp_path, pool, play, limits=patient, protection=protection, rounds=4)


def surveyed(found, site, observed):
    """A site with two columns; the second is there in some hospitals only."""
    contributor = found.sites[site].contributor
    rows = np.random.default_rng(1).uniform(0, 100, (20, 2))
    if not observed:
        rows[:, 1] = np.nan

    async def load(self, *args):
        self.loaded = True
        loaded = await Drawn.load(self, *args)
        return Loaded(replace(loaded.shape, features=2), COLUMNS, loaded.initial, loaded.rows)

    async def contribute(self, job, plan, step, state, record):
        if step.purpose == "statistics":
            sums = site_sums(rows, [(low, high) for _, low, high in COLUMNS])
            return np.empty(0, dtype=np.uint64), sums
        return await Drawn.contribute(self, job, plan, step, state)

    contributor.load = types.MethodType(load, contributor)
    contributor.contribute = types.MethodType(contribute, contributor)


def test_refused_statistics_end_the_job_and_are_not_tried_with_other_sites(tmp_path, pool):
    """Their sum was opened: with another cohort the difference would be one site's statistics."""

    async def play(found):
        for name in ("a", "b", "c"):
            found.start(name)
            surveyed(found, name, observed=name != "c")
        found.start_hub()
        await found.run(seconds=30)
        (row,) = found.rounds()
        assert row["purpose"] == "statistics" and row["abandoned"]["stage"] == "release"
        assert row["abandoned"]["exposed"] == ["a", "b", "c"]
        assert found.hub.facts.outcome.outcome == "abandoned"
        assert "refused the release (the logs of the sites say why)" in found.hub.facts.outcome.text
        assert "no other may be taken from the same state" in found.hub.facts.outcome.text
        exposed = [found.sites[name].job.stage.standing.exposed for name in ("a", "b", "c")]
        assert all(exposed)

    limits = Limits(stage=20.0, gather=0.3, minimum=3, grace=5.0, enough=3.0)
    scene(tmp_path, pool, play, limits=limits)


def test_a_round_whose_sum_may_be_known_waits_for_sites_that_come_back(tmp_path, pool):
    """Two of the three sites it needs are gone after they answered; nothing is abandoned, nothing repeated."""

    async def play(found):
        for name in ("a", "b", "c"):
            found.start(name)
        found.start_hub()
        await found.run(until=lambda: len(found.hub.facts.rounds.known) >= 1)
        await found.run(until=lambda: isinstance(found.hub.facts.stage, coordinator.EXPOSED))
        number = found.hub.facts.stage.header.round
        for name in ("b", "c"):
            await found.kill(name)
        await asyncio.sleep(4 * limits.stage)
        assert found.hub.facts.outcome is None and found.hub.facts.stage.header.round == number
        for name in ("b", "c"):
            found.start(name)
        await found.run(
            until=lambda: found.hub.facts.outcome is not None or number < numbers(found)
        )
        rows = [row for row in found.hub.facts.rounds.known if row["number"] == number]
        exposed = [site for row in rows for site in row.get("abandoned", {}).get("exposed", ())]
        if exposed:  # they had not answered yet, and a new process does not
            assert found.hub.facts.outcome.outcome == "abandoned"
        else:
            assert rows[0]["survivors"] == ["a", "b", "c"]
            await found.run()
            await found.check(("a", "b", "c"))

    def numbers(found):
        return found.hub.facts.rounds.known[-1]["number"] if found.hub.facts.rounds.known else 0

    limits = Limits(stage=0.5, gather=0.3, minimum=3, grace=0.3, enough=60.0)
    scene(tmp_path, pool, play, limits=limits, rounds=4)


def test_a_release_that_nobody_comes_back_for_ends_the_job(tmp_path, pool):
    async def play(found):
        def silent(sender, receiver, message):
            if isinstance(message, Statement) and sender in ("b", "c"):
                found.mute.add(sender)  # this does not arrive, nor anything later
            return message

        for name in ("a", "b", "c"):
            found.start(name)
        found.start_hub()
        await found.run(until=lambda: len(found.hub.facts.rounds.known) >= 1)
        found.passing = silent
        await found.run(until=lambda: found.mute == {"b", "c"})
        for name in ("b", "c"):
            await found.kill(name)
        await found.run(until=lambda: found.hub.facts.outcome is not None)
        assert found.hub.facts.outcome.outcome == "abandoned"
        assert "did not come back to release it" in found.hub.facts.outcome.text

    limits = Limits(stage=0.5, gather=0.3, minimum=3, grace=0.3, enough=2.0)
    scene(tmp_path, pool, play, limits=limits, rounds=40)
