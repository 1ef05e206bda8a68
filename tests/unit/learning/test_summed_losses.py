"""A loss that adds up the rows of a batch is reported for each row, as one that takes their mean is."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fedcore
from fedcore.config import build_job
from fedcore.experiment.prepare import prepare
from fedcore.learning.task import Task

pytestmark = pytest.mark.usefixtures("no_drawings")
functional = nn.functional


def data(source):
    random = np.random.default_rng(source)
    y = random.integers(0, 2, 50)
    return (random.normal(size=(50, 3)) + y[:, None]).astype("f4"), y


def loader(source):
    x, y = data(source)
    return DataLoader(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), batch_size=16)


def made(loss, read=data):
    return Task(
        name="t", data=read, model=lambda: nn.Linear(3, 2), loss=loss, sites={"a": 1, "b": 2, "c": 3},
        defaults={"rounds": 1, "lr": 1e-9},
    )  # fmt: skip


def losses(loss, tmp_path, read=data):
    found = fedcore.simulate(made(loss, read), out=tmp_path, protection="plain", resamples=0)
    return [(row["loss"], row["train_loss"]) for row in found.rounds]


@pytest.mark.parametrize("read", [data, loader])
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(reduction="sum"),
        partial(functional.cross_entropy, reduction="sum"),
        lambda o, t: functional.cross_entropy(o, t, reduction="none").sum(),
        lambda o, t: -functional.log_softmax(o, 1).gather(1, t[:, None]).sum(),
    ],
)
def test_losses_of_every_arm_are_per_row(loss, read, tmp_path):
    mean = losses(nn.CrossEntropyLoss(), tmp_path / "mean", read)
    found = losses(loss, tmp_path / "sum", read)
    assert np.array(found) == pytest.approx(np.array(mean), rel=1e-5)


def test_only_a_sum_counts_as_one():
    def takes_up_to_64_rows(outputs, targets):
        if len(outputs) > 64:
            raise ValueError("found too many rows")
        return functional.cross_entropy(outputs, targets, reduction="sum")

    def adds(loss):
        task = made(loss)
        sites = prepare(task, build_job(task.defaults, {"protection": "plain"})).sites
        return [site.train.adds_rows for site in sites]

    assert adds(nn.CrossEntropyLoss(reduction="sum")) == [True] * 3
    for loss in (
        nn.CrossEntropyLoss(),
        lambda o, t: (o * 0).sum(),
        lambda o, t: functional.cross_entropy(o, t, reduction="sum") / len(o) ** 0.5,
        takes_up_to_64_rows,
    ):
        assert adds(loss) == [False] * 3
