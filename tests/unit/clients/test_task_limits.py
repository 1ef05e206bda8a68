"""cpu_threads and memory_mb of a policy: they hold in the real training process, whatever the task does."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys

import pytest
from fedcore_clients.app import InstalledTasks
from fedcore_clients.policy import PolicySection
from fedcore_clients.resources import ran_out
from fedcore_clients.trainer import Training, TrainingFailed
from pydantic import ValidationError
from support.policies import policy_of
from support.preloaded import preloaded

from fedcore.config import build_job
from fedcore.learning.data.split import FoldSplit
from fedcore.learning.task import load_task

TASK = """
import os, resource
import numpy as np, torch, fedcore

def data(source):
    if source == "greedy":
        return np.ones((1 << 28, 3), np.float64), np.arange(1 << 28)
    if source == "tensors":
        torch.ones(1 << 31)
    if source == "higher":
        resource.setrlimit(resource.RLIMIT_DATA, (1 << 40, 1 << 40))
    open(source, "w").write(str(len(os.sched_getaffinity(0))))
    return np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32), np.arange(20) % 2

task = fedcore.Task(
    name="small", data=data, model=lambda: torch.nn.Linear(3, 1), metrics=("accuracy",),
    loss=lambda out, y: torch.nn.functional.binary_cross_entropy_with_logits(out.squeeze(1), y.float()),
    sites={"a": 1, "b": 2, "c": 3},
)
"""


class Limited(Training):
    """A training process of one CPU and 1.5 GiB."""

    memory_mb = 1536

    def limits(self):
        return {"threads": 1, "memory_mb": self.memory_mb}


def test_a_task_that_takes_too_much_memory_fails_with_one_line_and_the_process_goes_on(
    tmp_path, caplog
):
    (tmp_path / "small.py").write_text(TASK)
    settings = build_job({"max_examples": 64}).to_json()
    about = {
        "task": "small.py", "base": str(tmp_path), "digest": load_task("small.py", tmp_path).digest(),
        "settings": {k: v for k, v in settings.items() if k not in {"task", "base"}},
        "site": "a", "split": FoldSplit().to_json(),
    }  # fmt: skip

    async def play():
        training = Limited([preloaded().python, "-P", "-m", "fedcore_clients.worker"])
        try:
            await training.start()
            process = training.child.pid
            for source in ("greedy", "tensors"):
                caplog.clear()
                with pytest.raises(TrainingFailed):
                    await training.load_task("j", source=source, **about)
                (line,) = caplog.messages
                assert "more than memory_mb = 1536 of this site's policy" in line
                assert "\n" not in line and "hint:" in line
            with caplog.at_level(logging.ERROR), pytest.raises(TrainingFailed):
                await training.load_task("j", source="higher", **about)
            assert (
                "not allowed to raise maximum limit" in caplog.text or "ValueError" in caplog.text
            )
            cpus = tmp_path / "cpus"
            await training.load_task("j", source=str(cpus), **about)
            assert cpus.read_text() == "1" and training.child.pid == process
        finally:
            await training.close()

    asyncio.run(play())


CHILD = """
import mmap, os, threading
from fedcore_clients.resources import limit
threading.Thread(target=threading.Event().wait, daemon=True).start()
limit({threads}, {memory})
limit(None, 1 << 20)  # a higher one changes nothing
cpus = {{len(os.sched_getaffinity(int(tid))) for tid in os.listdir("/proc/self/task")}}
try:
    mmap.mmap(-1, 1 << 30, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    print(max(cpus), "given")
except OSError:
    print(max(cpus), "refused")
"""


@pytest.mark.parametrize(
    ("threads", "memory", "said"),
    [(1, 512, "1 refused"), (1000, 4096, " given")],
)
def test_limits_are_of_every_thread_and_are_not_raised_again(threads, memory, said):
    code = CHILD.format(threads=threads, memory=memory)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert said in done.stdout


def test_the_training_process_gets_the_limits_of_the_policy_in_force(tmp_path):
    policy = policy_of()
    tasks = InstalledTasks.__new__(InstalledTasks)
    tasks._policy = policy
    assert tasks.limits() == {}
    policy.rules = policy_of(cpu_threads=2).rules
    assert tasks.limits() == {"threads": 2, "memory_mb": None}
    for wrong in ({"cpu_threads": 0}, {"memory_mb": 100}, {"memory_mb": "2 GB"}):
        with pytest.raises(ValidationError):
            PolicySection(**wrong)


def test_memory_is_found_behind_the_error_of_a_task():
    inner = RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    )
    outer = ValueError("data failed")
    assert not ran_out(outer)
    outer.__cause__ = inner
    assert ran_out(outer) and ran_out(MemoryError())
