"""The constant prediction: the most frequent training class or the training mean, by the metrics' own code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import fedcore
from fedcore.learning.constant import constant_values
from fedcore.learning.metrics import Scores, get

pytestmark = pytest.mark.usefixtures("no_drawings")


def values(names, trained_on, tested, columns):
    outputs = np.zeros(len(tested) if columns == 1 else (len(tested), columns))
    scores = Scores(outputs, np.asarray(tested), np.zeros(len(tested), dtype=np.int64))
    return constant_values(get(names), np.asarray(trained_on), scores)


@pytest.mark.parametrize("columns", [1, 2])
def test_two_classes_answer_the_one_that_trained_most(columns):
    found = values(("accuracy", "auc", "balanced_accuracy"), [1, 1, 1, 0], [0, 0, 0, 1, 1], columns)
    assert found == {"accuracy": 0.4, "auc": 0.5, "balanced_accuracy": 0.5}
    assert values(("accuracy",), [0, 1], [0, 0, 1], columns) == {"accuracy": 2 / 3}
    assert values(("accuracy",), [1.0, 1.0, 0.0], [1.0, 0.0], columns) == {"accuracy": 0.5}


def test_several_classes_and_one_that_no_site_trained_on():
    found = values(("accuracy", "auc", "balanced_accuracy"), [0, 2, 2, 2], [0, 1, 2, 2], 3)
    assert found == {"accuracy": 0.5, "auc": 0.5, "balanced_accuracy": 1 / 3}


def test_a_regression_answers_the_mean_of_its_training_targets():
    found = values(("mae", "mse"), [1.0, 2.0, 6.0], [3.0, 5.0], 1)
    assert found == {"mae": 1.0, "mse": 2.0}


def test_it_is_undefined_where_the_metric_is():
    assert values(("accuracy", "auc"), [0, 1, 1], [1, 1], 1) == {"accuracy": 1.0, "auc": None}


def task(data, **settings):
    whole = {"metrics": ("accuracy",), "loss": torch.nn.functional.cross_entropy}
    whole |= {"sites": {"a": 1, "b": 2, "c": 3}, "defaults": {"rounds": 1}}
    return fedcore.Task(
        name="small", data=data, model=lambda: torch.nn.Linear(3, 2), **whole | settings
    )


def run(found, tmp_path, **settings):
    return fedcore.simulate(
        found, protection="plain", resamples=0, out=tmp_path / "run", **settings
    ).result


def arrays(source):
    rng = np.random.default_rng(source)
    return rng.normal(size=(25, 3)).astype("f4"), (np.arange(25) % 5 == 0).astype(np.int64)


def dataset(source):
    x, y = arrays(source)
    return TensorDataset(torch.from_numpy(x), torch.from_numpy(y))


def predict(module, batch):
    x, y = batch
    return module(x), 1 - y


@pytest.mark.parametrize(
    ("data", "more"),
    [(arrays, {}), (dataset, {}), (arrays, {"predict": predict}), (dataset, {"predict": predict})],
)
def test_a_run_states_it_whatever_kind_its_rows_are_of(tmp_path, data, more):
    """Four of five rows are of one class, and a task that turns the classes round has the other one."""
    stated = run(task(data, **more), tmp_path).constant
    assert stated is not None and stated.predicts == "class"
    assert stated.metrics == {"accuracy": 0.8}


def test_a_run_of_a_regression_and_one_that_evaluates_itself(tmp_path):
    def heights(source):
        x, _ = arrays(source)
        return x, np.full(25, 170.0, dtype="f4")

    def squared(outputs, targets):
        return (outputs[:, 0] - targets).square().mean()

    of_values = task(
        heights, metrics=("mae",), loss=squared, predict=lambda m, b: (m(b[0])[:, :1], b[1])
    )
    stated = run(of_values, tmp_path, lr=1e-6).constant
    assert stated is not None and (stated.predicts, stated.metrics) == ("mean", {"mae": 0.0})
    own = task(arrays, metrics=("hits",), evaluate=lambda module, rows: {"hits": (1, 2)})
    assert fedcore.simulate(own, protection="plain", out=tmp_path / "own").result.constant is None


def test_a_comparison_states_the_mean_over_its_splits(tmp_path):
    found = fedcore.compare(
        task(arrays), seeds=1, folds=5, protection="plain", out=tmp_path / "compared"
    ).result
    assert found.constant is not None and found.constant.metrics == {"accuracy": 0.8}
    assert [cell.constant for cell in found.cells] == [found.constant] * 5
    assert "majority / chance" in (tmp_path / "compared" / "report.md").read_text()
