"""F1, average precision, log-loss, top-k and calibration: scikit-learn's values from pooled rows, and from sums."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn import metrics as theirs
from sklearn.calibration import calibration_curve
from support.results import result_of
from torch import nn

import fedcore
from fedcore.errors import BadInput
from fedcore.learning.metric_sums import MetricTransport
from fedcore.learning.metrics import METRICS, get
from fedcore.learning.metrics.counting import CONFUSION_CLASSES
from fedcore.learning.metrics.definition import clipped_rows
from fedcore.learning.metrics.probability import CALIBRATION_BINS, LOSS_RANGE
from fedcore.learning.scoring import Scored
from fedcore.report import phrases, tables, terminal
from fedcore.results import ERRORS

pytestmark = pytest.mark.usefixtures("no_drawings")


def rows(columns, count=300, seed=0):
    """Outputs of `columns` per row and labels that they tell something of; some scores tie."""
    random = np.random.default_rng(seed)
    classes = max(2, columns)
    labels = random.integers(0, classes, count)
    outputs = np.round(random.normal(0, 1.5, (count, classes)) + 1.5 * np.eye(classes)[labels], 2)
    return (outputs[:, 1] - outputs[:, 0] if columns == 1 else outputs), labels


def probabilities(outputs):
    if outputs.ndim == 1:
        outputs = np.stack([np.zeros(len(outputs)), outputs], axis=1)
    return softmax(outputs, axis=1)


def expected(name, outputs, labels):
    found = probabilities(outputs)
    classes = found.shape[1]
    chosen = found.argmax(axis=1) if outputs.ndim == 2 else (outputs > 0).astype(int)
    if name == "f1":
        return theirs.f1_score(labels, chosen, average="binary" if classes == 2 else "macro")
    if name == "log_loss":
        return theirs.log_loss(labels, found, labels=range(classes))
    if name == "auprc":
        if classes == 2:
            score = outputs if outputs.ndim == 1 else outputs[:, 1] - outputs[:, 0]
            return theirs.average_precision_score(labels, score)
        return theirs.average_precision_score(np.eye(classes)[labels], log_softmax(outputs, axis=1))
    if name.startswith("top_"):
        return theirs.top_k_accuracy_score(labels, outputs, k=int(name.split("_")[1]))
    right, confidence = chosen == labels, found.max(axis=1)
    accuracy, sure = calibration_curve(right, confidence, n_bins=CALIBRATION_BINS)
    counts, _ = np.histogram(confidence, np.linspace(0, 1, CALIBRATION_BINS + 1))
    return float(np.abs(accuracy - sure) @ counts[counts > 0] / len(labels))


CASES = [
    *((name, columns) for name in ("f1", "log_loss", "auprc", "calibration_error") for columns in (1, 2, 4)),
    ("top_2_accuracy", 4), ("top_3_accuracy", 4), ("top_5_accuracy", 12), ("top_10_accuracy", 12),
]  # fmt: skip


@pytest.mark.parametrize(("name", "columns"), CASES)
def test_pooled_rows_give_scikit_learns_value(name, columns):
    outputs, labels = rows(columns)
    if name.startswith("top_"):
        # Of equal outputs scikit-learn takes the last.
        outputs = outputs + np.random.default_rng(1).normal(0, 1e-3, outputs.shape)
    metric = METRICS[name]
    assert metric.exact(outputs, labels) == pytest.approx(expected(name, outputs, labels), rel=1e-9)
    random = np.random.default_rng(2)
    counts = random.integers(0, 3, (3, len(labels)))
    taken = [np.repeat(np.arange(len(labels)), times) for times in counts]
    each = [expected(name, outputs[some], labels[some]) for some in taken]
    assert metric.exact_resampled(outputs, labels, counts) == pytest.approx(each, rel=1e-9)


@pytest.mark.parametrize(("name", "columns"), CASES)
def test_the_sums_of_sites_give_it_too(name, columns):
    outputs, labels = rows(columns)
    metric, site = METRICS[name], np.arange(len(labels)) % 3
    sums = sum(metric.sums(outputs[site == each], labels[site == each]) for each in range(3))
    assert sums.shape == (metric.size(columns),)
    value, exact = metric.finish(sums), metric.exact(outputs, labels)
    bound = metric.error_bound(sums) if metric.error_bound is not None else 2.0**-17
    assert abs(value - exact) <= bound
    assert name != "auprc" or bound < 0.03


def test_a_class_that_does_not_occur_is_in_no_mean():
    outputs, labels = rows(4)
    few = labels < 2
    kept = outputs[few] - np.array([0, 0, 1e3, 1e3])  # none predicted either
    assert METRICS["f1"].exact(kept, labels[few]) == pytest.approx(
        theirs.f1_score(labels[few], kept.argmax(axis=1), average="macro")
    )
    each = [
        theirs.average_precision_score(labels[few] == c, log_softmax(kept, axis=1)[:, c])
        for c in (0, 1)
    ]
    assert METRICS["auprc"].exact(kept, labels[few]) == pytest.approx(np.mean(each))


def test_undefined_and_extreme_cases():
    negative = np.array([-1.0, -2.0]), np.array([0, 0])
    assert METRICS["f1"].exact(*negative) is None, "class 1 neither occurs nor is predicted"
    assert METRICS["auprc"].exact(*negative) is None
    assert METRICS["auprc"].exact(np.array([-1.0, 2.0]), np.array([1, 1])) == 1.0
    wrong = np.array([-800.0, 800.0]), np.array([1, 0])
    assert METRICS["log_loss"].exact(*wrong) == 800.0
    sums = METRICS["log_loss"].sums(*wrong)
    assert METRICS["log_loss"].finish(sums) == LOSS_RANGE
    assert clipped_rows(sums) == 2
    sure = np.array([1e4, -1e4]), np.array([1, 0])
    assert METRICS["calibration_error"].exact(*sure) == 0.0
    assert METRICS["log_loss"].exact(*sure) == 0.0


def test_top_k_takes_the_first_of_equals_and_refuses_too_few_classes():
    outputs, labels = np.zeros((3, 4)), np.array([0, 1, 2])
    assert METRICS["top_2_accuracy"].exact(outputs, labels) == pytest.approx(2 / 3)
    for columns in (1, 2, 3):
        with pytest.raises(BadInput, match="expected more than 3 for top_3_accuracy"):
            METRICS["top_3_accuracy"].sums(np.zeros((3, columns)), np.zeros(3))


def test_directions_and_names_in_reports():
    lower = {name for name, metric in METRICS.items() if not metric.higher_is_better}
    assert lower == ERRORS == {"mse", "rmse", "mae", "log_loss", "calibration_error"}
    names = {name: phrases.metric_name(name) for name in METRICS}
    assert names["auprc"] == "AUPRC" and names["f1"] == "F1" and names["r2"] == "R2"
    assert names["log_loss"] == "log loss" and names["top_3_accuracy"] == "top 3 accuracy"


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_confusion_matrices_of_sites_add_up_to_scikit_learns(columns):
    outputs, labels = rows(columns)
    chosen = outputs.argmax(axis=1) if columns > 1 else (outputs > 0).astype(int)
    expected_matrix = theirs.confusion_matrix(labels, chosen)
    site = np.arange(len(labels)) % 3
    parts = [Scored(outputs[site == each], labels[site == each], None) for each in range(3)]
    transport = MetricTransport(get(("auc",)), (), columns, 512)
    assert np.array_equal(transport.confusion([*parts, None]), expected_matrix)
    assert transport.confusion([None]) is None
    assert MetricTransport(get(("mae",)), (), 1, 512).confusion(parts) is None
    many = MetricTransport(get(("auc",)), (), CONFUSION_CLASSES + 1, 512)
    assert many.confusion(parts) is None


@pytest.mark.parametrize("columns", [1, 2, 4, CONFUSION_CLASSES])
def test_its_sums_of_sites_are_exact_and_travel_only_where_they_are_asked_for(columns):
    outputs, labels = rows(columns)
    site, metrics = np.arange(len(labels)) % 3, get(("auc", "accuracy"))
    parts = [Scored(outputs[site == each], labels[site == each], None) for each in range(3)]
    silent, asked = (MetricTransport(metrics, (), columns, 512, each) for each in (False, True))
    assert asked.wides[:-1] == silent.wides
    assert (asked.wides[-1].count, asked.wides[-1].bits) == (max(2, columns) ** 2, 10)
    sums = [asked.sums(part) for part in (*parts, None)]
    total = {
        name: [*map(sum, zip(*(each[name] for each in sums), strict=True))] for name in sums[0]
    }
    assert asked.summed_confusion(total) == asked.confusion(parts)
    assert asked.finish(total, 4) == silent.finish(total, 4), "one number each"
    assert asked.summed_confusion(asked.sums(None)) is None
    assert silent.summed_confusion(silent.sums(parts[0])) is None
    assert set(silent.sums(parts[0])) == {wide.name for wide in silent.wides}


def classes_task(*metrics, classes=3, **more):
    def data(source):
        random = np.random.default_rng(source)
        y = random.integers(0, classes, 40)
        return random.normal(size=(40, classes)) + np.eye(classes)[y], y

    return fedcore.Task(
        name="t", data=data, model=fedcore.linear(classes, classes=classes), loss=nn.CrossEntropyLoss(),
        metrics=metrics, sites={"a": 1, "b": 2, "c": 3}, defaults={"rounds": 2}, **more,
    )  # fmt: skip


SETTINGS = {"protection": "plain", "resamples": 0}


@pytest.mark.parametrize(
    "named", [("confusion_matrix",), ("mae", "confusion_matrix"), ("confusion_matrix", "r2")]
)
def test_it_wants_a_metric_of_classes_beside_it(named):
    with pytest.raises(
        BadInput, match=r"confusion_matrix .*expected a metric of classes beside it"
    ):
        classes_task(*named)


def test_it_is_refused_of_too_many_classes_and_a_tasks_own_of_this_name_is_a_number(tmp_path):
    with pytest.raises(
        BadInput, match="found 33 classes, expected at most 32 for confusion_matrix"
    ):
        fedcore.simulate(
            classes_task("accuracy", "confusion_matrix", classes=33), out=tmp_path / "r", **SETTINGS
        )
    own = classes_task(
        "confusion_matrix", evaluate=lambda model, rows: {"confusion_matrix": (1.0, 2.0)}
    )
    assert own.scores == ("confusion_matrix",) and not own.has_confusion


def test_a_run_with_it_has_the_same_scores_and_shows_the_counts_of_the_protected_sum(tmp_path):
    asked = fedcore.simulate(
        classes_task("confusion_matrix", "accuracy"), out=tmp_path / "asked", resamples=0, arms="federated",
        protection="masked", validate=0.2,
    )  # fmt: skip
    silent = fedcore.simulate(
        classes_task("accuracy"), out=tmp_path / "silent", resamples=0, arms="federated", protection="masked",
        validate=0.2,
    )  # fmt: skip
    one, other = asked.result, silent.result
    assert one.metrics == other.metrics == ("accuracy",)
    assert one.model_sha256 == other.model_sha256
    assert one.arms == other.arms
    assert one.protected.confusion == one.arms["federated"].confusion
    assert one.protected.metrics == other.protected.metrics
    assert "protected_confusion" not in other.to_json()
    first = one.protected.confusion[0]
    line = rf"^0 +{first[0]} +{first[1]} +{first[2]} +{first[0] / sum(first):.3f}$"
    assert re.search(line, terminal.as_text(terminal.summary(one)), re.MULTILINE)
    assert "recall" not in terminal.as_text(terminal.summary(other))
    for page in ("report.md", "report.html"):
        text = (tmp_path / "asked" / page).read_text()
        assert "Confusion matrix" in text and "The protected sum gives the same counts." in text


def test_tables_of_the_matrix_for_many_classes_absent_sites_and_several_runs():
    matrix = (np.eye(8, dtype=int) * 3).tolist()
    matrix[7][7] = 0  # no row of this class
    arms = {"federated": {"accuracy": 1.0, "confusion": matrix}}
    about = {"arms": arms, "metrics": ["accuracy"], "sites": ["a", "b"]}
    whole = result_of(about, protected_confusion=matrix)
    (grid,) = tables.confusion([whole])
    assert [row[-1].text for row in grid.rows] == ["1.000"] * 7 + ["–"]
    assert "confusion matrix of 8 classes in the report" in terminal.as_text(
        terminal.summary(whole)
    )
    left = result_of(about, protected_confusion=[[2, 0], [0, 1]], protected_metrics_sites=["a"])
    assert "of the sites that stayed, counts 3 rows" in tables.confusion([left])[0].note
    assert len(tables.confusion([whole, left])) == 2
    assert tables.confusion([result_of({})]) == []
    assert (
        "gives other counts"
        in tables.confusion([result_of(about, protected_confusion=[[1]])])[0].note
    )


def test_a_run_keeps_the_confusion_matrix_of_every_arm(tmp_path):
    task = classes_task("accuracy")
    fedcore.simulate(task, out=tmp_path / "run", **SETTINGS)
    result = fedcore.load(tmp_path / "run", task).result
    for arm in result.arms.values():
        matrix = np.array(arm.confusion)
        assert matrix.shape == (3, 3)
        assert matrix.sum() == result.rows.test
        assert matrix.trace() / matrix.sum() == pytest.approx(arm.metrics["accuracy"])
