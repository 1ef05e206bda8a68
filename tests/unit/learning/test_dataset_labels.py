"""What data sets say of their targets and batches: lists of labels, incomplete batches, missing and ragged targets."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from support.small_tasks import Items
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

import fedcore
from fedcore.config import build_job
from fedcore.errors import BadInput
from fedcore.experiment.prepare import prepare
from fedcore.learning.data.loading import load_rows
from fedcore.learning.data.rows import DatasetRows
from fedcore.learning.task import Task

pytestmark = pytest.mark.usefixtures("no_drawings")

LABELS = [index % 3 for index in range(60)]


class Listed(Dataset):
    """Counts how often an item is read; `shift` is what a transformation of the target adds."""

    def __init__(self, shift=0, **lists):
        self.reads, self.shift = 0, shift
        for name, values in lists.items():
            setattr(self, name, values)

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, index):
        self.reads += 1
        return torch.zeros(4), LABELS[index] + self.shift


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
@pytest.mark.parametrize("name", ["targets", "labels"])
def test_listed_labels_are_taken_without_reading_the_items(name, kind):
    dataset = Listed(**{name: kind(LABELS)})
    assert DatasetRows(dataset).labels().tolist() == LABELS
    assert dataset.reads == 3


def test_they_are_also_taken_through_subsets_and_concatenations():
    dataset = Listed(targets=LABELS)
    some = Subset(dataset, [5, 4, 3])
    rows = DatasetRows(ConcatDataset([some, dataset]))
    assert rows.take([0, 1, 2, 7]).labels().tolist() == [2, 1, 0, 1]
    assert dataset.reads == 6


@pytest.mark.parametrize(
    "lists",
    [
        {"targets": [label + 1 for label in LABELS]},  # before a transformation
        {"targets": LABELS[:-1]},
        {"targets": [[0], [1, 2]]},
        {"targets": [str(label) for label in LABELS]},
        {"targets": None},
        {"labels": lambda: LABELS},
        {},
    ],
)
def test_labels_are_read_where_what_is_listed_is_not_the_items_own(lists):
    dataset = Listed(**lists)
    assert DatasetRows(dataset).labels().tolist() == LABELS
    assert 60 <= dataset.reads <= 63


def test_a_run_is_prepared_with_a_few_reads_a_site():
    made = {}

    def data(source):
        made[source] = Listed(targets=LABELS)
        return made[source]

    task = Task(
        name="t",
        data=data,
        model=lambda: nn.Linear(4, 3),
        loss=nn.CrossEntropyLoss(),
        sites={"a": 1, "b": 2, "c": 3},
    )
    prepare(task, build_job(task.defaults, {"protection": "plain", "max_examples": 60}))
    assert all(dataset.reads < 30 for dataset in made.values())


class Recorder(nn.Module):
    """Records the sizes of its batches, by mode."""

    sizes: ClassVar[dict[bool, list[int]]] = {}

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 2)

    def forward(self, x):
        self.sizes.setdefault(self.training, []).append(len(x))
        return self.linear(x)


def loader(drop_last, rows=46):
    def data(source):
        random = np.random.default_rng(source)
        y = random.integers(0, 2, rows)
        x = (random.normal(size=(rows, 5)) + y[:, None]).astype("f4")
        pairs = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
        return DataLoader(pairs, batch_size=8, shuffle=True, drop_last=drop_last)

    return data


def dropping(data, **changes):
    given = {
        "loss": nn.CrossEntropyLoss(),
        "sites": {"a": 1, "b": 2, "c": 3},
        "defaults": {"rounds": 1},
    }
    return Task(name="t", data=data, model=Recorder, **given | changes)


@pytest.mark.parametrize(("drop_last", "incomplete"), [(True, False), (False, True)])
def test_drop_last_leaves_incomplete_batches_out_of_training_only(drop_last, incomplete, tmp_path):
    Recorder.sizes = {}
    found = fedcore.simulate(
        dropping(loader(drop_last)), out=tmp_path / "run", protection="plain", resamples=0
    )
    assert (set(Recorder.sizes[True]) != {8}) == incomplete
    assert any(size % 8 for size in Recorder.sizes[False])
    assert found.result.rows.test == sum(site.test_rows for site in found.result.per_site.values())
    steps = found.result.arms["federated"].gradient_steps
    train = [site.train_rows for site in found.result.per_site.values()]
    assert steps == sum(rows // 8 + (incomplete and rows % 8 > 0) for rows in train)


def test_a_site_without_a_whole_batch_is_refused():
    def data(source):
        return loader(True, rows=7 if source == 2 else 46)(source)

    task = dropping(data)
    with pytest.raises(BadInput, match=r"site b: found [56] training rows.*batch_size=8") as caught:
        prepare(task, build_job(task.defaults, {"protection": "plain"}))
    assert "drop_last=False" in caught.value.remedy
    own = dropping(data, train=lambda model, rows, fit: None)
    prepare(own, build_job(own.defaults, {"protection": "plain"}))


X = np.zeros((3, 2), dtype="f4")


@pytest.mark.parametrize(
    ("y", "found"),
    [
        (np.array([0, None, 1], dtype=object), "found 1 missing value in y (the first in row 2)"),
        (np.array([None, None, 1], dtype=object), "found 2 missing values in y (the first in row 1)"),
        (np.array([0, float("nan"), 1], dtype=object), "found 1 missing value in y (the first in row 2)"),
        (pd.array([0, 1, None]).to_numpy(dtype=object), "found 1 missing value in y (the first in row 3)"),
        (np.array([0.0, np.nan, 1.0]), "found 1 NaN or infinite value in y"),
        (np.array([[0], [0, 1], []], dtype=object), "found rows of 0 to 2 values in y"),
        (np.array([[0, 1], (0,), np.zeros(3)], dtype=object), "found rows of 1 to 3 values in y"),
        (np.array(["a", "b", "c"], dtype=object), "found y of dtype object, expected numbers"),
    ],
)  # fmt: skip
def test_missing_and_ragged_targets_of_arrays_are_named(y, found):
    task = Task(
        name="t", data=lambda _: (X, y), model=lambda: nn.Linear(2, 2), loss=nn.CrossEntropyLoss()
    )
    with pytest.raises(BadInput) as caught:
        load_rows(task, None, "north")
    assert str(caught.value).startswith(f"site north: {found}")
    assert caught.value.remedy


ZERO = torch.zeros(2)


@pytest.mark.parametrize(
    ("items", "found"),
    [
        ([(ZERO, 0), (ZERO, None)], "item 1: found None as its target"),
        ([{"x": ZERO, "label": 1}, {"x": ZERO, "label": None}], "item 1: found None as its target"),
        ([(ZERO, ZERO), (ZERO, torch.zeros(3))], "item 1: found a target of shape (3,) after one of shape (2,)"),
        ([(ZERO, [0, 1]), (ZERO, [0, 1]), (ZERO, [0])], "item 2: found a target of shape (1,) after one of shape (2,)"),
        ([(ZERO, 1), (ZERO, [[0], [0, 1]])], "item 1: found a target of rows of different lengths"),
    ],
)  # fmt: skip
def test_missing_and_ragged_targets_of_items_are_named(items, found):
    rows = DatasetRows(Items(items), site="site north")
    with pytest.raises(BadInput) as caught:
        next(rows.batches(8, None))
    assert str(caught.value).startswith(f"site north: {found}, expected targets of one shape")
    assert "collate_fn" in caught.value.remedy


def test_inputs_that_make_no_batch_stay_the_users_error():
    rows = DatasetRows(Items([(torch.zeros(2), 0), (torch.zeros(3), 1)]))
    with pytest.raises(RuntimeError, match="stack expects"):
        next(rows.batches(8, None))
