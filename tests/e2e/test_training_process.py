"""The site's training process: real, killed, and asked for what a round and its record need."""

from __future__ import annotations

import asyncio
import gc
import sys
import textwrap
import time

import numpy as np
import pytest
from deployment import PATIENCE
from fedcore_clients.trainer import Training, TrainingFailed
from support.preloaded import preloaded

from fedcore.config import build_job, plan_of
from fedcore.learning.data.split import FoldSplit
from fedcore.learning.guard import GuardRecord
from fedcore.learning.model import single_thread
from fedcore.learning.site import SiteTrainer
from fedcore.learning.state import JobState
from fedcore.learning.task import load_task
from fedcore.learning.tracking import Tracker
from fedcore.secagg.encode.pack import Opened
from fedcore.secagg.protocol.job.effects import Track
from fedcore.secagg.protocol.schedule import PlannedRound

SETTINGS = {
    "rounds": 2, "seed": 3, "max_examples": 512, "range": 0.0625, "standardise": "federated",
}  # fmt: skip
SPLIT = FoldSplit().to_json()
TASK = load_task("heart")
COMPLETE = {
    key: value
    for key, value in build_job(TASK.defaults, SETTINGS).to_json().items()
    if key not in {"task", "base"}
}
SOURCE = dict(TASK.sites)["va"]
STATISTICS, LAST = PlannedRound("statistics", 0), PlannedRound("metrics", 3)


def quick(**more):
    """A training process that starts at once."""
    return Training([preloaded().python, "-P", "-m", "fedcore_clients.worker"], **more)


async def asked(begin=quick, **changes):
    """Load, contribute twice with a kill between, track; then a job it does not know."""
    training = begin()
    try:
        about = {
            "task": "heart", "base": "/", "digest": TASK.digest(), "settings": COMPLETE, "split": SPLIT,
            "site": "va", "source": SOURCE, **changes,
        }  # fmt: skip
        loaded = await training.load_task("j", **about)
        plan = plan_of(build_job(COMPLETE), loaded.shape, ("a", "b", "va"), 512)
        state = JobState.initial(plan, loaded.initial)
        one = await training.contribute("j", plan, STATISTICS, state, GuardRecord())
        training.child.kill()
        while training.child.alive:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)
        two = await training.contribute("j", plan, STATISTICS, state, GuardRecord())
        own = Opened(two[0], two[1])
        state = state.after(plan, STATISTICS, own, ("va",), loaded.columns, allow_few_sites=True)
        zeros = {wide.name: [0] * wide.count for wide in plan.metric_sums}
        row = await training.track("j", plan, Track(LAST, zeros, 3, state, None), b"")
        await training.forget("j")
        return plan, state, one, two, row
    finally:
        await training.close()
        assert not training.child.alive


def test_it_computes_what_the_library_computes_and_survives_its_own_death():
    plan, state, one, two, row = asyncio.run(asked(Training))
    with single_thread():
        here = SiteTrainer.load(TASK, build_job(COMPLETE), "va", SOURCE, 512, FoldSplit())
        fields, wides = here.contribute(plan, STATISTICS, state)
        zeros = {wide.name: [0] * wide.count for wide in plan.metric_sums}
        expected = Tracker(here, plan).row(LAST, state, zeros, 3)
    for found in (one, two):
        assert np.array_equal(found[0], fields)
        assert {name: list(map(int, values)) for name, values in wides.items()} == found[1]
    assert row.to_json() == expected and row.alone["auc"] is not None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"digest": "0" * 64}, "task differs"),
        ({"source": "nowhere"}, "unable"),
        ({"task": "no/such/file.py"}, "unable"),
        ({"split": {"method": "by name"}}, "unable"),
    ],
)  # fmt: skip
def test_what_fails_leaves_one_word(changes, reason):
    with pytest.raises(TrainingFailed) as failed:
        asyncio.run(asked(**changes))
    assert failed.value.reason == reason == str(failed.value)


# ---------------------------------------------------------------------- what nobody waits for any more

SLOW = """
import time
from pathlib import Path
from fedcore.learning.task import Task

def data(source):
    with Path(__file__).with_name("asked").open("a") as file:
        file.write(source + " ")
    time.sleep({seconds})
    raise ValueError

task = Task(name="slow", data=data, model=lambda: None, loss=lambda model, batch: None)
"""


class Slow:
    """A training process, and a task whose rows take so long to read."""

    def __init__(self, folder, seconds, **more):
        self.file, self.asked = folder / "slow.py", folder / "asked"
        self.file.write_text(textwrap.dedent(SLOW.format(seconds=seconds)))
        self.training, self.loads = quick(**more), []

    async def begin(self):
        """Start the process and learn the task's digest."""
        self.digest = (await self.training.task_digest(str(self.file), "/"))[1]
        self.pid = self.training.child.pid

    def load(self, source, job="j"):
        load = self.training.load_task(
            job, task=str(self.file), base="/", digest=self.digest, settings=COMPLETE,
            site="va", source=source, split=SPLIT,
        )  # fmt: skip
        self.loads.append(asyncio.create_task(load))
        return self.loads[-1]

    async def reads(self, source):
        """Until the process is at it."""
        while not (self.asked.exists() and source in self.asked.read_text()):  # noqa: ASYNC110 - a file
            await asyncio.sleep(0.01)

    async def overtake(self, task):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def play(folder, seconds, scene, **more):
    async def begin():
        slow = Slow(folder, seconds, **more)
        try:
            await slow.begin()
            async with asyncio.timeout(PATIENCE):
                await scene(slow)
        finally:
            async with asyncio.timeout(PATIENCE):
                await slow.training.close()
                await asyncio.gather(*slow.loads, return_exceptions=True)

    asyncio.run(begin())


def test_an_overtaken_request_is_answered_to_its_end_and_the_next_gets_its_own_answer(tmp_path):
    async def scene(slow):
        first = slow.load("first")
        await slow.reads("first")
        never, after = slow.load("never"), slow.load("after")
        await asyncio.sleep(0.05)
        await slow.overtake(never)
        await slow.overtake(first)
        with pytest.raises(TrainingFailed) as failed:
            await after
        assert failed.value.reason == "unable"
        assert slow.asked.read_text() == "first after "  # what had not begun was never asked
        assert await slow.training.task_digest(str(slow.file), "/") == ("slow", slow.digest)
        assert slow.training.child.pid == slow.pid

    play(tmp_path, 0.5, scene)


def test_a_task_that_hangs_keeps_the_next_request_only_so_long(tmp_path):
    async def scene(slow):
        hangs = slow.load("hangs")
        await slow.reads("hangs")
        await slow.overtake(hangs)
        begun = time.monotonic()
        assert await slow.training.task_digest(str(slow.file), "/") == ("slow", slow.digest)
        assert time.monotonic() - begun >= 0.3 and slow.training.child.pid != slow.pid

    play(tmp_path, 1000, scene, overtaken_seconds=0.4)


def test_somebody_who_still_waits_is_not_hurried(tmp_path, caplog):
    async def scene(slow):
        first = slow.load("first")
        await slow.reads("first")
        await slow.overtake(first)
        after = slow.load("after")  # in a new process, since the first was ended
        with pytest.raises(TrainingFailed) as failed:
            await after
        assert failed.value.reason == "unable"
        # The first; the task raised after.
        assert caplog.text.count("found its end by signal 9, expected an answer; it was asked") == 1

    play(tmp_path, 0.5, scene, overtaken_seconds=0.1)


def test_a_process_that_dies_at_the_end_of_a_job_is_no_fault(tmp_path):
    async def scene(slow):
        child = slow.training.child
        child.kill()
        while child.alive:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)
        # A process that answers nothing: one forked by `preloaded` may answer until its end is seen.
        command, child.command = (
            child.command,
            [sys.executable, "-c", "import signal; signal.pause()"],
        )
        await slow.training.start()
        child.command = command
        slow.training._loads["j"] = {}
        child.kill()  # and the loop has not heard of it
        await slow.training.forget("j")
        assert await slow.training.task_digest(str(slow.file), "/") == ("slow", slow.digest)

    play(tmp_path, 0, scene)


def test_the_end_of_a_job_and_of_the_site_wait_for_nobody(tmp_path, caplog):
    async def scene(slow):
        slow.training._loads["j"] = {}
        hangs = slow.load("hangs")
        await slow.reads("hangs")
        await slow.overtake(hangs)
        await slow.training.forget("j")
        assert await slow.training.task_digest(str(slow.file), "/") == ("slow", slow.digest)
        assert slow.training.child.pid != slow.pid
        slow.load("again")
        await asyncio.sleep(0.1)

    # `play` allows less than the task takes, and so does `close`, with a request under way.
    play(tmp_path, 1000, scene, overtaken_seconds=1e6)
    gc.collect()  # asyncio tells of an end that nobody looked at when it is forgotten
    assert not [record for record in caplog.records if record.name == "asyncio"]
