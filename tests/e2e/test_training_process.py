"""The site's training process: real, killed, and asked for what a round and its record need."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from fedcore_clients.training import Training, TrainingFailed

from fedcore.aggregate.jobstate import JobState
from fedcore.comparison.localsite import LocalSite
from fedcore.comparison.tracking import Tracker
from fedcore.config import build_job, plan_of
from fedcore.encode.pack import Opened
from fedcore.learn.flat import single_thread
from fedcore.protocol.course import Step
from fedcore.task import load_task

SETTINGS = {"rounds": 2, "seed": 3, "max_examples": 512, "range": 0.0625}
TASK = load_task("heart")
COMPLETE = {
    key: value
    for key, value in build_job(TASK.defaults, SETTINGS).to_json().items()
    if key not in {"task", "base"}
}
SOURCE = dict(TASK.sites)["va"]
STATISTICS, LAST = Step("statistics", 0), Step("metrics", 3)


async def asked(**changes):
    """Load, contribute twice with a kill between, track; then a job it does not know."""
    training = Training()
    try:
        about = {
            "task": "heart", "base": "/", "digest": TASK.digest(), "settings": COMPLETE,
            "site": "va", "source": SOURCE, **changes,
        }  # fmt: skip
        loaded = await training.load("j", **about)
        plan = plan_of(build_job(COMPLETE), loaded.shape, ("a", "b", "va"), 512)
        state = JobState.initial(plan, loaded.initial)
        one = await training.contribute("j", plan, STATISTICS, state)
        training._process.kill()
        await training._process.wait()
        two = await training.contribute("j", plan, STATISTICS, state)
        own = Opened(two[0], two[1])
        state = state.after(plan, STATISTICS, own, 1, loaded.columns, allow_few_sites=True)
        zeros = {wide.name: [0] * wide.count for wide in plan.metric_sums}
        row = await training.track("j", plan, LAST, state, zeros, 3)
        await training.forget("j")
        return plan, state, one, two, row
    finally:
        await training.close()
        assert training._process is None


def test_it_computes_what_the_library_computes_and_survives_its_own_death():
    plan, state, one, two, row = asyncio.run(asked())
    with single_thread():
        here = LocalSite(TASK, build_job(COMPLETE), "va", SOURCE, 512)
        fields, wides = here.contribute(plan, STATISTICS, state)
        zeros = {wide.name: [0] * wide.count for wide in plan.metric_sums}
        expected = Tracker(here, plan).row(LAST, state, zeros, 3)
    for found in (one, two):
        assert np.array_equal(found[0], fields)
        assert {name: list(map(int, values)) for name, values in wides.items()} == found[1]
    assert row == expected and row["alone"]["auc"] is not None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"digest": "0" * 64}, "task differs"),
        ({"source": "nowhere"}, "bad data"),
        ({"task": "no/such/file.py"}, "bad data"),
        ({"settings": {**COMPLETE, "protect": {**COMPLETE["protect"], "max_examples": 20}}},
         "too many rows"),
    ],
)  # fmt: skip
def test_what_fails_leaves_one_word(changes, reason):
    with pytest.raises(TrainingFailed) as failed:
        asyncio.run(asked(**changes))
    assert failed.value.reason == reason == str(failed.value)
