"""Who is in a round: over-selection, and statistics that need more sites than came first."""

from __future__ import annotations

import asyncio
import types
from dataclasses import replace

import numpy as np
import pytest
from fedcore_clients.bench import Drawn
from fedcore_clients.training import Loaded
from fedcore_server.jobs import Limits
from town import SITES, scene

from fedcore.data.statistics import site_sums
from fedcore.plan import canonical

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
        await found.run(until=lambda: len(found.hub.rounds.known) >= 2, seconds=50)
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

    async def contribute(self, job, plan, step, state):
        if step.purpose == "statistics":
            sums = site_sums(rows, [(low, high) for _, low, high in COLUMNS])
            return np.empty(0, dtype=np.uint64), sums
        return await Drawn.contribute(self, job, plan, step, state)

    contributor.load = types.MethodType(load, contributor)
    contributor.contribute = types.MethodType(contribute, contributor)


def test_refused_statistics_wait_for_a_further_site(tmp_path, pool):
    async def play(found):
        for name in ("a", "b", "c"):
            found.start(name)
            surveyed(found, name, observed=name != "c")
        found.start_hub()
        told = "refused the statistics of 3 sites"
        await found.run(until=lambda: told in found.hub.progress.text, seconds=30)
        assert "tried again with 4" in found.hub.progress.text
        await found.run(until=lambda: found.hub.progress.waiting_for == ("d",))
        epoch = found.hub.epoch.epoch
        await asyncio.sleep(4 * limits.gather)
        assert len(found.hub.rounds.known) == 1, "with three it would be refused again"
        assert found.hub.epoch.epoch == epoch
        found.start("d")
        surveyed(found, "d", observed=True)
        await found.run(seconds=30)
        rows = found.rounds()
        assert [row["purpose"] for row in rows[:3]] == ["statistics", "statistics", "update"]
        assert rows[0]["abandoned"]["stage"] == "release"
        assert rows[1]["survivors"] == list(SITES)
        assert found.hub.outcome.outcome == "finished"
        models = {name: each.state.canonical() for name, each in found.sites.items()}
        assert len(set(models.values())) == 1
        assert found.hub.progress.text == ""

    limits = Limits(stage=20.0, gather=0.5, minimum=3, grace=5.0, enough=60.0)
    scene(tmp_path, pool, play, limits=limits)


def test_refused_statistics_end_the_job_if_nobody_else_comes(tmp_path, pool):
    async def play(found):
        for name in ("a", "b", "c"):
            found.start(name)
            surveyed(found, name, observed=name != "c")
        found.start_hub()
        await found.run(seconds=30)
        assert len(found.rounds()) == 1
        assert found.hub.outcome.outcome == "abandoned"
        assert "too few for a round, which needs 4" in found.hub.outcome.text
        assert "refused the statistics of 3 sites" in found.hub.outcome.text

    limits = Limits(stage=20.0, gather=0.3, minimum=3, grace=5.0, enough=3.0)
    scene(tmp_path, pool, play, limits=limits)


def asking(found, threshold):
    """The job with this threshold, before the coordinator begins it."""
    settings = found.settings | {"protect": found.settings["protect"] | {"threshold": threshold}}
    found.settings, found.offer = settings, replace(found.offer, settings=canonical(settings))


def test_a_smaller_cohort_does_not_lower_the_threshold(tmp_path, pool):
    """t = 4 of 4 and three sites there: nothing begins before the fourth comes, `minimum` or not."""

    async def play(found):
        asking(found, 4)
        for name in ("a", "b", "c"):
            found.start(name)
        found.start_hub()
        await found.run(until=lambda: found.hub.progress.waiting_for == ("d",), seconds=30)
        await asyncio.sleep(4 * limits.gather)
        assert found.hub.plan is None and found.hub.rounds.known == []
        found.start("d")
        await found.run(seconds=50)
        assert found.hub.outcome.outcome == "finished"
        assert found.hub.certificate.header.threshold == found.hub.plan.threshold == 4
        await found.check()

    limits = Limits(stage=20.0, gather=0.3, minimum=3, grace=5.0, enough=60.0)
    scene(tmp_path, pool, play, limits=limits)


def test_rounds_without_an_absent_site_keep_the_plans_threshold(tmp_path, pool):
    async def play(found):
        for name in ("a", "b", "c"):
            found.start(name)
        found.start_hub()
        await found.run(seconds=50)
        assert found.hub.outcome.outcome == "finished"
        header = found.hub.certificate.header
        assert (header.roster, header.threshold) == (("a", "b", "c"), found.hub.plan.threshold)

    limits = Limits(stage=20.0, gather=0.3, minimum=3, grace=5.0, enough=60.0)
    scene(tmp_path, pool, play, limits=limits)
