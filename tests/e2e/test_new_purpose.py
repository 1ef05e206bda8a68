"""Another purpose of a round is one entry of the registry, in one file: this one. No other purpose names it."""

from __future__ import annotations

import numpy as np
import pytest
from town import SITES, scene

from fedcore.config import build_job, plan_of
from fedcore.learning.data.split import FoldSplit
from fedcore.learning.model import single_thread
from fedcore.learning.released import check_possible
from fedcore.learning.site import SiteTrainer
from fedcore.learning.state import JobState
from fedcore.learning.task import load_task
from fedcore.secagg.encode.pack import Opened
from fedcore.secagg.label import Terms, leaving_of
from fedcore.secagg.plan import VectorSpec
from fedcore.secagg.protocol import schedule
from fedcore.secagg.purposes import PURPOSES, Purpose

seen = []


def vector(plan, columns=0):
    return VectorSpec("baseline", 0, plan.metric_sums)


def keep(plan, state, found):
    check_possible(plan, vector(plan), found)
    seen.append(found.opened.wides)
    return state


BASELINE = Purpose(
    "baseline",
    rounds=lambda plan, columns: range(1, 2),
    vector=vector,
    contribute=lambda site, plan, step, state: site.metrics(plan, step, state),
    apply=keep,
    leaving=lambda job, terms: "baseline (one sum): this site's metrics of a model that nobody has trained",
    measures=True,
    needed=True,
)  # fmt: skip
"""The metrics of the initial model, before it is trained."""


@pytest.fixture
def registered():
    before = dict(PURPOSES)
    others = [each for each in PURPOSES.values() if not each.measures]
    PURPOSES.clear()
    PURPOSES.update({each.name: each for each in (*others, BASELINE, *before.values())})
    yield
    PURPOSES.clear()
    PURPOSES.update(before)
    seen.clear()


def by_hand():
    """(job, steps, last state) of a job whose sites and sums are in this process."""
    task, steps = load_task("heart"), []
    job = build_job(task.defaults, {"rounds": 2, "seed": 4, "protection": "plain"})
    with single_thread():
        sites = [
            SiteTrainer.load(task, job, name, source, 512, FoldSplit(4))
            for name, source in task.sites.items()
        ]
        plan = plan_of(job, sites[0].shape, tuple(task.sites), 512)
        state, step = JobState.initial(plan, sites[0].initial), schedule.first_step(plan, 0)
        while step is not None:
            steps.append((step.purpose, step.training_round))
            found = [site.contribute(plan, step, state) for site in sites]
            sums = {
                name: [sum(map(int, each)) for each in zip(*(w[name] for _, w in found), strict=True)]
                for name in found[0][1]
            }  # fmt: skip
            opened = Opened(sum(fields.astype(np.uint64) for fields, _ in found), sums)
            state = state.after(plan, step, opened, plan.sites)
            step = schedule.step_after(plan, 0, step, released=True)
    return job, steps, state


def test_a_registered_purpose_has_its_round_and_leaves_the_others_as_they_are(registered):
    job, steps, state = by_hand()
    assert steps == [("range", 0), ("baseline", 1), ("update", 1), ("update", 2), ("metrics", 3)]
    (wides,) = seen
    assert wides["metric:accuracy"][0] > 0
    assert "a model that nobody has trained" in "\n".join(leaving_of(job, Terms.of_job(job, 4)))
    del PURPOSES["baseline"]
    _, others, control = by_hand()
    assert others == [each for each in steps if each[0] != "baseline"]
    assert (state.model_sha256, state.shown) == (control.model_sha256, control.shown)


@pytest.mark.parametrize("protection", ["masked", "encrypted"])
def test_a_deployed_job_has_its_round_before_training(registered, tmp_path, pool, protection):
    async def play(found):
        found.start_hub()
        for name in SITES:
            found.start(name)
        await found.run()
        await found.check()
        assert [row["purpose"] for row in found.rounds()] == [
            "baseline", "update", "update", "metrics",
        ]  # fmt: skip

    scene(tmp_path, pool, play, protection=protection)
