"""A saved model: found again from anywhere, and fed as in training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fedcore
from fedcore.errors import BadInput
from fedcore.learning.data.arrays import array_layout
from fedcore.learning.data.loading import load_rows
from fedcore.learning.data.statistics import Statistics
from fedcore.learning.saved import FILE, load_model, model_bytes
from fedcore.learning.task import Task

TASK_FILE = """
import numpy as np, torch, fedcore
def data(source):
    random = np.random.default_rng(source)
    x = random.normal(size=(20, 3))
    return x, (x.sum(axis=1) > 0).astype(int)
task = fedcore.Task(name="mine", data=data, model=lambda: torch.nn.Linear(3, 2),
    loss=torch.nn.CrossEntropyLoss(), sites={"a": 1, "b": 2, "c": 3})
"""
X = np.random.default_rng(0).normal(size=(5, 3))


def make_task(**changes):
    given = {
        "name": "t",
        "data": lambda source: source,
        "model": lambda: nn.Linear(3, 2),
        "loss": nn.functional.cross_entropy,
    }
    return Task(**given | changes)


def saved(folder, task, statistics=None, layout=None):
    torch.manual_seed(0)
    module = task.model().eval()
    (folder / FILE).write_bytes(model_bytes(module, task, statistics, layout))
    return module, load_model(folder, task)


def softmax(module, x):
    with torch.no_grad():
        return torch.softmax(module(x).double(), dim=1).numpy()


@pytest.fixture
def run_of_a_file(tmp_path, monkeypatch):
    """A run made in project/ with a relative task file; afterwards we stand in elsewhere/."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    (project / "task.py").write_text(TASK_FILE)
    (project / "job.toml").write_text('task = "task.py"\n[round]\nrounds = 1\n')
    monkeypatch.chdir(elsewhere)
    arms = {"protection": "plain", "track.arms": ["federated"]}
    return fedcore.simulate(job=project / "job.toml", out=tmp_path / "run", **arms)


def test_the_task_comes_from_where_the_run_found_it(run_of_a_file):
    direct = run_of_a_file.predict(X)
    assert direct.shape == (5, 2)
    np.testing.assert_array_equal(fedcore.load(run_of_a_file.directory).predict(X), direct)


def test_a_stranger_s_file_of_that_name_is_never_executed(run_of_a_file, tmp_path):
    stranger = tmp_path / "elsewhere" / "task.py"
    stranger.write_text("raise SystemExit('executed')")
    assert fedcore.load(run_of_a_file.directory).predict(X).shape == (5, 2)
    (run_of_a_file.directory / "job.json").unlink()
    with pytest.raises(BadInput, match=r"found no file .*/run/task\.py"):
        fedcore.load(run_of_a_file.directory).predict(X)


def test_rows_are_converted_as_for_training(tmp_path):
    module, loaded = saved(tmp_path, make_task())
    expected = softmax(module, torch.from_numpy(X.astype("f4")))
    for rows in (X, X.astype("f4"), X.tolist(), torch.from_numpy(X), torch.from_numpy(X).float()):
        np.testing.assert_allclose(loaded.predict(rows), expected, rtol=1e-12)
    whole = np.arange(6).reshape(2, 3)
    expected = softmax(module, torch.from_numpy(whole.astype("f4")))
    for rows in (whole, whole.tolist(), whole.astype("u1"), np.asfortranarray(whole)):
        np.testing.assert_allclose(loaded.predict(rows), expected, rtol=1e-12)


def test_tensors_of_integers_stay_token_ids(tmp_path):
    task = make_task(model=lambda: nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Linear(8, 2)))
    module, loaded = saved(tmp_path, task)
    tokens = torch.tensor([[1, 2, 3, 4]])
    np.testing.assert_allclose(loaded.predict(tokens), softmax(module, tokens), rtol=1e-12)


def test_a_model_in_double_precision_gets_double_rows(tmp_path):
    _, loaded = saved(tmp_path, make_task(model=lambda: nn.Linear(3, 2).double()))
    assert loaded.predict(X).shape == (5, 2)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([["a", "b", "c"]], "predict: found X of dtype <U1, expected numbers"),
        ([[1.0, 2.0], [3.0]], "predict: found rows that make no array"),
        ([[1.0, float("nan"), 2.0]], "predict: found 1 NaN or infinite value in X column 1"),
    ],
)
def test_rows_that_training_would_refuse(tmp_path, rows, says):
    _, loaded = saved(tmp_path, make_task())
    with pytest.raises(BadInput) as caught:
        loaded.predict(rows)
    assert says in str(caught.value)


RANGES = ((0, 10), fedcore.number(-5, 5, may_be_missing=True))
STATISTICS = Statistics(
    ("x0", "x1"), np.array([4.0, 0.5]), np.array([2.0, 3.0]), (9, 9), (3, 3), (0, 0)
)


def test_raw_arrays_are_standardised_as_in_training(tmp_path):
    task = make_task(statistics=RANGES)
    raw = np.array([[1.0, 2.0], [9.0, np.nan], [np.nan, -4.0]])
    rows, _ = load_rows(task, (raw, np.array([0, 1, 0])), "a")
    module, loaded = saved(tmp_path, task, STATISTICS, array_layout(RANGES))
    expected = softmax(module, rows.standardise(STATISTICS).x)
    for given in (raw, raw.tolist(), torch.from_numpy(raw)):
        np.testing.assert_allclose(loaded.predict(given), expected, rtol=1e-12)
    for wrong in (raw[:, :1], raw[0], np.full((1, 2), np.inf)):
        with pytest.raises(BadInput, match="predict: found"):
            loaded.predict(wrong)


def test_a_run_of_an_array_task_with_statistics_predicts_raw_rows(tmp_path):
    random = np.random.default_rng(0)

    def data(source):
        x = random.normal([5, 0], [2, 1], size=(40, 2))
        x[::7, 1] = np.nan
        return x, (x[:, 0] > 5).astype(int)

    task = make_task(data=data, statistics=RANGES, sites={"a": 1, "b": 2, "c": 3})
    run = fedcore.simulate(task, rounds=3, lr=0.5, protection="plain", out=tmp_path / "run")
    raw = np.array([[9.0, 0.0], [1.0, np.nan]])
    direct = run.predict(raw)
    np.testing.assert_array_equal(fedcore.load(tmp_path / "run", task=task).predict(raw), direct)
    assert direct[0].argmax() == 1 and direct[1].argmax() == 0
