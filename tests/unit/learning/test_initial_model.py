"""Sites whose models do not begin alike are found before the first round, frozen parameters and buffers included."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedcore_clients.trainer import Training, TrainingFailed
from torch import nn

from fedcore.config import build_job
from fedcore.learning.data.split import FoldSplit
from fedcore.learning.model import FlatModel
from fedcore.learning.site import SiteTrainer
from fedcore.learning.task import Task
from fedcore.secagg.plan import INITIAL_PARTS
from fedcore.types import SiteId


class Body(nn.Module):
    """What its builder passes is in a frozen layer, in a buffer that stays, or in the first values of the head."""

    def __init__(self, part="", shift=0.0):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 2)
        self.register_buffer("perm", torch.arange(4))
        self.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
        self.register_buffer("hidden", torch.zeros(2, dtype=torch.int8), persistent=False)
        with torch.no_grad():
            for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
                if name == part:
                    tensor.add_(shift)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x))[:, self.perm % 4])


def digests(*given):
    torch.manual_seed(1)
    return FlatModel(Body(*given)).digests()


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ("head.weight", 0), ("body.weight", 1), ("body.bias", 1), ("perm", 2), ("phase", 2), ("hidden", 2),
    ],
)  # fmt: skip
def test_each_part_of_a_model_has_a_digest_of_its_own(changed, part):
    same, other = digests(), digests(changed, 1)
    assert same == digests() and len(same) == len(INITIAL_PARTS)
    assert [k for k in range(3) if same[k] != other[k]] == [part]


def test_renaming_and_other_types_change_it():
    torch.manual_seed(1)
    double = FlatModel(Body().double()).digests()
    assert all(a != b for a, b in zip(digests()[:2], double[:2], strict=True))


def data(source):
    rng = np.random.default_rng(source)
    return rng.normal(size=(20, 3)).astype("f4"), np.arange(20) % 2


def trainer(part="", shift=0.0):
    task = Task("t", data, lambda: Body(part, shift), nn.functional.cross_entropy)
    job = build_job({}, {"task": "t", "protect": {"max_examples": 32}})
    return SiteTrainer.load(task, job, SiteId("a"), 1, 32, FoldSplit())


def test_a_deployed_site_puts_them_into_its_survey():
    one, other, another = trainer().shape, trainer("body.weight", 1).shape, trainer("perm", 1).shape
    assert one.initial_differs(trainer().shape) == ""
    assert one.initial_differs(other) == "frozen parameters"
    assert other.initial_differs(another) == "frozen parameters and buffers that stay"
    assert one.initial_differs(replace(other, parameters=5)) == "", "it differs in more than that"


UNLIKE = """
import os
import numpy as np, torch, fedcore
def model():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    net[0].requires_grad_(False).weight.fill_(os.getpid())
    return net
def data(source):
    return np.random.default_rng(source).normal(size=(20, 3)).astype("f4"), np.arange(20) % 2
task = fedcore.Task("unlike", data, model, torch.nn.functional.cross_entropy)
"""


def test_a_new_training_process_with_another_model_is_refused(tmp_path):
    (tmp_path / "task.py").write_text(UNLIKE)
    settings = build_job({}, {"task": "t", "protect": {"max_examples": 32}}).to_json()

    async def killed_between():
        training = Training()
        try:
            _, digest = await training.task_digest("task.py", str(tmp_path))
            await training.load_task(
                "job", task="task.py", base=str(tmp_path), digest=digest, settings=settings, site="a",
                source=1, split=FoldSplit().to_json(),
            )  # fmt: skip
            first = training.child.pid
            training.child.kill()
            await asyncio.to_thread(training.child._process.wait)
            with pytest.raises(TrainingFailed, match="unable"):
                await training._ask({"do": "export", "job": "job"}, [b""], needs="job")
            assert training.child.pid != first
        finally:
            await training.close()

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("fedcore.site.training")
    logger.addHandler(handler)
    try:
        asyncio.run(killed_between())
    finally:
        logger.removeHandler(handler)
    assert said == [
        "job job: found other frozen parameters at the start in a new training process, expected the model of "
        "the one before"
    ]
