"""A site whose guard trips leaves its job for good, the others learn why, and the coordinator one word."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import pytest
from fedcore_clients.trainer import Training, TrainingFailed
from test_training_process import COMPLETE, SOURCE, SPLIT, STATISTICS, TASK
from town import SITES, scene

from fedcore.config import build_job, plan_of
from fedcore.errors import GuardTripped
from fedcore.learning.guard import GuardMemory, GuardRecord, GuardRules
from fedcore.learning.state import JobState
from fedcore.secagg.crypto.sealed import NOTICE_LENGTH
from fedcore.secagg.encode.pack import Layout, Opened
from fedcore.secagg.protocol import job_messages, messages
from fedcore.secagg.protocol.job.coordinator.events import MessageReceived
from fedcore.secagg.protocol.job.coordinator.facts import Limits
from fedcore.secagg.protocol.schedule import PlannedRound

CAUSE = "the loss on its own training rows exceeded 1.5 times the best so far for 2 rounds in a row"
TRIPPED = GuardTripped(("b",), 1, CAUSE, found="0.91, above 0.87; best 0.58")


def heard(found):
    """Everything that the sites say to the coordinator from now on, as (site, message)."""
    said, put = [], found.hub.put

    def listening(event):
        if isinstance(event, MessageReceived):
            said.append((event.site, event.message))
        put(event)

    found.hub.put = listening
    return said


def leaves(said, site):
    return [m for n, m in said if n == site and isinstance(m, messages.Leave)]


def words(said, site):
    return [m.reason for n, m in said if n == site and isinstance(m, job_messages.SiteUnavailable)]


def test_a_job_that_too_many_sites_left_ends_and_does_not_wait_for_them(tmp_path, pool):
    """They said that they cannot take part: the coordinator waits `gather` seconds, not a day."""

    async def play(found):
        await found.first_round()
        found.trouble["b"], found.trouble["c"] = [TRIPPED], [TRIPPED]
        await found.run(until=lambda: found.hub.facts.outcome is not None, seconds=60)
        assert found.hub.facts.outcome.outcome == "abandoned"
        assert "cannot take part: b (" in found.hub.facts.outcome.text

    limits = Limits(stage=5.0, gather=0.3, minimum=3, grace=0.3, enough=86_400.0)
    scene(tmp_path, pool, play, limits=limits, rounds=400)


@pytest.mark.parametrize("protection", ["masked", "encrypted"])
def test_a_tripped_site_leaves_for_good_and_the_others_go_on(tmp_path, pool, protection, caplog):
    caplog.set_level(logging.INFO)

    async def play(found):
        found.trouble_at["b", "update", 2] = TRIPPED
        for name in SITES:
            found.start(name)
        found.start_hub()
        said = heard(found)  # before anything is said
        await found.run(until=lambda: leaves(said, "b"), seconds=50)
        # The process ends after that; the next one neither reads rows nor says that it is there.
        await found.kill("b")
        found.start("b")
        contributor = found.sites["b"].contributor
        await found.run(seconds=60)
        assert not contributor.loaded
        assert found.sites["b"].job.part.left == str(TRIPPED)
        assert found.sites["b"].job.part.last_error == str(TRIPPED)
        assert set(words(said, "b")) == {"unable"}
        after = [row for row in found.rounds() if row["round"] > 1 and row["survivors"]]
        assert after, "the others went on"
        assert all(row["survivors"] == ["a", "c", "d"] for row in after)
        # It is not given the model that it left the job for.
        done = found.sites["b"].job.state.done
        assert done.training_round <= 1
        expected = await found.expected()
        for name in ("a", "c", "d"):
            assert found.sites[name].job.state.canonical() == expected.canonical()
        assert {len(leave.sealed) for leave in leaves(said, "b") if leave.sealed} == {NOTICE_LENGTH}
        assert all(leave.code == messages.LEFT for leave in leaves(said, "b"))

    scene(tmp_path, pool, play, protection=protection, rounds=4)
    lines = [record.getMessage() for record in caplog.records]
    told = f"site b refused: guard: it leaves the job after round 1: {CAUSE}"
    assert lines.count(told) == 3, "each of the others has it in its own log"
    assert [line for line in lines if "best 0.58" in line and line.startswith("job job: guard")]
    # The numbers are in the site's own log, its status and nowhere else.
    assert not [line for line in lines if "best 0.58" in line and "site b leaves" not in line]


def test_the_coordinator_cannot_tell_a_tripped_guard_from_a_failing_task(tmp_path, pool):
    """The same word, the same kind of message, the same length."""
    seen = {}

    def play_with(trouble):
        async def play(found):
            await found.first_round()
            said = heard(found)
            found.trouble["b"] = [trouble]
            await found.run(until=lambda: leaves(said, "b"), seconds=50)
            seen[type(trouble)] = (
                set(words(said, "b")),
                {(leave.code, len(leave.sealed)) for leave in leaves(said, "b")},
            )

        return play

    for trouble in (TRIPPED, TrainingFailed("unable")):
        scene(tmp_path / type(trouble).__name__, pool, play_with(trouble), rounds=4)
    assert seen[GuardTripped] == seen[TrainingFailed]
    assert seen[GuardTripped] == ({"unable"}, {("left", NOTICE_LENGTH)})


def test_what_the_guard_remembers_outlasts_the_process(tmp_path, pool):
    async def play(found):
        await found.first_round()
        for name in SITES:
            found.sites[name].work.guard.memory = GuardMemory(1.0, 0.5, 1, 1)
        await found.run(until=lambda: len(found.hub.facts.rounds.known) >= 2, seconds=50)
        await found.kill("c")
        found.start("c")
        assert found.sites["c"].work.guard.memory == GuardMemory(1.0, 0.5, 1, 1)
        await found.run(seconds=60)

    scene(tmp_path, pool, play, rounds=4)


def test_the_training_process_judges_the_state_and_says_why():
    """In the process that has the rows; a fresh one goes on from what the site kept."""

    async def asked():
        training, record = Training(), GuardRecord(GuardRules(1.5, 1))
        try:
            about = {
                "task": "heart", "base": "/", "digest": TASK.digest(), "settings": COMPLETE,
                "site": "va", "source": SOURCE, "split": SPLIT,
            }  # fmt: skip
            loaded = await training.load_task("j", **about)
            plan = plan_of(build_job(COMPLETE), loaded.shape, ("a", "b", "va"), 512)
            state = JobState.initial(plan, loaded.initial)
            if loaded.shape.features:  # columns that are scaled by statistics
                sums = await training.contribute("j", plan, STATISTICS, state, record)
                state = state.after(
                    plan, STATISTICS, Opened(*sums), ("va",), loaded.columns, allow_few_sites=True
                )
            await training.contribute("j", plan, PlannedRound("update", 1), state, record)
            first = record.memory
            worse = state.server.parameters.copy()
            worse[-1] += 9.0
            far = moved(state, worse)
            with pytest.raises(GuardTripped) as tripped:
                await training.contribute("j", plan, PlannedRound("update", 2), far, record)
            return first, record.memory, tripped.value
        finally:
            await training.close()

    first, memory, tripped = asyncio.run(asked())
    assert first == GuardMemory(first.first, first.first, 0, 0)
    assert memory.strikes == 1
    assert memory.judged == 1
    assert (tripped.sites, tripped.round) == (("va",), 1)
    assert "the loss on its own training rows" in tripped.cause


def moved(state, parameters):
    """The state after round 1 as a liar would have it."""
    server = replace(state.server, parameters=parameters)
    return replace(state, server=server, done=PlannedRound("update", 1))


def test_a_deployed_site_refuses_a_sum_with_a_mark_that_it_did_not_put(
    tmp_path, pool, caplog, without
):
    """d puts the mark of a, too: a finds it and says no; the tag holds, since it is d's own vector."""
    caplog.set_level(logging.INFO)
    real = Layout._join

    def join(layout, coordinates, wides, place):
        data = real(layout, coordinates, wides, place)
        if place == SITES.index("d") and layout.spec.marks:
            data[len(data) - 2 * layout.sites + SITES.index("a")] += 1
        return data

    without(Layout, _join=join)

    def refused():
        return [
            r
            for r in caplog.records
            if "in this site's place that it did not put" in r.getMessage()
        ]

    async def play(found):
        for name in SITES:
            found.start(name)
        found.start_hub()
        await found.run(until=refused, seconds=60)

    scene(tmp_path, pool, play, rounds=4)
    assert {r.name for r in refused()} == {"fedcore.site.job"}
