"""Exported models: one file that takes raw rows and gives the scores of the run's model, without Fedcore."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import nn

import fedcore
from fedcore.errors import BadInput, Refused
from fedcore.experiment.export import export
from fedcore.learning.data.arrays import array_layout
from fedcore.learning.data.statistics import Statistics
from fedcore.learning.exported import script
from fedcore.learning.saved import FILE, load_model, model_bytes
from fedcore.learning.task import Task

NUMBERS = {
    "age": fedcore.number(0, 120),
    "chol": fedcore.number(50, 700, missing=(0, -1)),
    "dose": fedcore.number(0, 8, may_be_missing=True),
}
CATEGORIES = {
    "smoker": fedcore.category("never", "former"),
    "sex": fedcore.category("f", "m", "x", may_be_missing=True),
}
MIXED = {"smoker": CATEGORIES["smoker"], **NUMBERS, "sex": CATEGORIES["sex"]}
RAW = {
    "smoker": ["former", "pipe", "never"],
    "age": [40.5, 0, 130],
    "chol": [0, -1, 233],
    "dose": [1.5, None, 0],
    "sex": ["x", None, "other"],
}
CODES = {
    "smoker": [1, 2, 0],
    "age": [40.5, 0, 130],
    "chol": [0, -1, 233],
    "dose": [1.5, np.nan, 0],
    "sex": [2, np.nan, 9],
}


class Keywords(nn.Linear):
    """TorchScript does not compile it, and records it well."""

    def forward(self, *inputs, **_):
        return super().forward(inputs[0])


class Branching(Keywords):
    """What it computes depends on values, which a recording loses."""

    def forward(self, *inputs, **_):
        outputs = super().forward(inputs[0])
        return outputs if float(inputs[0].sum()) > 0 else outputs * 0 + 5


class Counting(Keywords):
    """No recording is possible: its output is no tensor while one runs."""

    def forward(self, *inputs, **_):
        if torch.jit.is_tracing():
            raise RuntimeError("not while recording\nsecond line")
        return super().forward(inputs[0])


def task_of(model, metric="accuracy", **changes):
    given = {"data": lambda source: source, "loss": nn.functional.mse_loss, **changes}
    return Task(name="t", model=model, metrics=(metric,), **given)


def saved(folder, task, statistics=None, layout=None):
    torch.manual_seed(0)
    (folder / FILE).write_bytes(model_bytes(task.model(), task, statistics, layout))
    return load_model(folder, task)


def saved_table(folder, columns, outputs=1, metric="accuracy", **declared):
    read = fedcore.table(target="y", columns=columns, **declared)
    scale = Statistics.of_ranges(read.layout.names, read.layout.ranges)
    wide = len(read.columns)

    def model():
        return nn.Sequential(nn.Linear(wide, 4), nn.Tanh(), nn.Linear(4, outputs))

    return saved(folder, task_of(model, metric, data=read), scale, read.layout)


def read_back(data):
    return torch.jit.load(io.BytesIO(data))


@pytest.mark.parametrize("columns", [MIXED, NUMBERS, CATEGORIES])
@pytest.mark.parametrize(("outputs", "metric"), [(1, "auc"), (3, "accuracy"), (1, "mae")])
def test_raw_rows_of_a_table_get_the_scores_of_the_run_s_model(tmp_path, columns, outputs, metric):
    model = saved_table(tmp_path, columns, outputs, metric)
    exported = read_back(script(model))
    codes = torch.tensor(np.stack([CODES[name] for name in columns], axis=1))
    found = exported(codes)
    expected = model.predict({name: RAW[name] for name in columns})
    assert found.dtype == torch.float64 and not found.requires_grad
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert exported.columns == list(columns)
    assert exported.categories == {n: list(s.values) for n, s in columns.items() if n in CATEGORIES}
    assert exported.classes == ([] if metric == "mae" else [str(i) for i in range(max(2, outputs))])


def test_names_of_classes_are_in_the_file(tmp_path):
    model = saved_table(tmp_path, MIXED, 2, classes=("healthy", "ill"))
    assert read_back(script(model)).classes == ["healthy", "ill"]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("age", np.nan, "found a missing value in column age"),
        ("smoker", np.nan, "found a missing value in column smoker"),
        ("dose", np.inf, "found an infinite value"),
        (None, None, r"found rows of shape \[3, 4\], expected \(n, 5\)"),
    ],
)
def test_the_file_refuses_what_the_run_s_model_refuses(tmp_path, name, value, says):
    exported = read_back(script(saved_table(tmp_path, MIXED)))
    codes = torch.tensor(np.stack([CODES[each] for each in MIXED], axis=1))
    if name is None:
        codes = codes[:, 1:]
    else:
        codes[1, list(MIXED).index(name)] = value
    with pytest.raises(torch.jit.Error, match=says):
        exported(codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_raw_arrays_with_declared_ranges(tmp_path, dtype):
    ranges = ((0, 10), fedcore.number(-5, 5, may_be_missing=True))
    layout = array_layout(ranges)
    scale = Statistics(layout.names, np.array([4, 0.5]), np.array([2, 3]), (9, 9), (3, 3), (0, 0))
    task = task_of(lambda: nn.Linear(3, 2).to(dtype), statistics=ranges)
    model, rows = saved(tmp_path, task, scale, layout), np.array([[1, 2], [9, np.nan], [np.nan, 0]])
    exported = read_back(script(model, rows))
    np.testing.assert_allclose(exported(torch.tensor(rows)).numpy(), model.predict(rows), rtol=1e-6)
    assert exported.columns == ["x0", "x1"] and exported.categories == {}


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (lambda: nn.Linear(3, 2), np.eye(3)),
        (lambda: nn.Linear(3, 2).double(), np.eye(3)),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), np.ones((4, 1, 3, 3))),
        (lambda: nn.Sequential(nn.Embedding(9, 1), nn.Flatten()), np.array([[1, 2], [3, 8]])),
        (lambda: Keywords(3, 2), np.eye(3)),
    ],
    ids=["floats", "doubles", "images", "embedded", "recorded"],
)
def test_arrays_as_they_are(tmp_path, make, rows):
    model = saved(tmp_path, task_of(make))
    found = read_back(script(model, rows))(model.inputs(rows)).numpy()
    np.testing.assert_allclose(found, model.predict(rows), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "rows", "says"),
    [
        (lambda: Branching(3, 2), np.array([[1.0, 1, 1], [-9, -9, 2]]), "found scores up to"),
        (lambda: Counting(3, 2), np.eye(3), r"RuntimeError: not while recording\)"),
    ],
)
def test_what_torchscript_cannot_hold_is_refused_and_nothing_written(tmp_path, make, rows, says):
    model = saved(tmp_path, task_of(make, "mae"))
    with pytest.raises(Refused, match=says) as refused:
        export(model, tmp_path, rows=rows)
    assert "\n" not in str(refused.value) and refused.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_rows_are_asked_for_where_none_can_be_made(tmp_path):
    model = saved(tmp_path, task_of(lambda: nn.Linear(3, 2)))
    with pytest.raises(BadInput, match="found no rows to check the exported model on"):
        export(model, tmp_path)


TASK_FILE = """
import numpy as np, torch, fedcore
def data(source):
    x = np.random.default_rng(source).normal(size=(20, 3))
    return x, (x.sum(axis=1) > 0).astype(int)
task = fedcore.Task(name="mine", data=data, model=lambda: torch.nn.Linear(3, 2),
    loss=torch.nn.CrossEntropyLoss(), sites={"a": 1, "b": 2, "c": 3})
"""


@pytest.mark.usefixtures("no_drawings")
def test_a_run_of_arrays_is_checked_on_its_own_rows(tmp_path):
    (tmp_path / "task.py").write_text(TASK_FILE)
    settings = {"protection": "plain", "arms": ["federated"], "rounds": 1, "resamples": 0}
    run = fedcore.simulate(str(tmp_path / "task.py"), out=tmp_path / "run", **settings)
    path = run.export()
    assert path == tmp_path / "run" / "model.pt"
    rows = np.random.default_rng(5).normal(size=(9, 3))
    found = torch.jit.load(path)(torch.tensor(rows, dtype=torch.float32))
    np.testing.assert_allclose(found.numpy(), run.predict(rows), rtol=1e-6)
    assert run.export(tmp_path / "other.pt", rows=rows).read_bytes()[:2] == b"PK"
