"""Metrics: known values, shapes, undefined cases and refusals."""

from __future__ import annotations

import numpy as np
import pytest

from fedcore.errors import BadInput, TaskFailed, UnknownName
from fedcore.learning import metrics as m
from fedcore.learning.metric_sums import MetricTransport
from fedcore.learning.metrics import definition, ranking
from fedcore.learning.scoring import Scored, pooled

CLASSIFICATION = (
    "accuracy", "auc", "auprc", "balanced_accuracy", "f1", "log_loss", "calibration_error"
)  # fmt: skip
REGRESSION = ("mse", "rmse", "mae", "r2")


def test_the_prediction_rule_is_above_zero_or_the_first_largest_logit() -> None:
    assert definition.predictions(np.array([-1.0, 0.0, 1e-9])).tolist() == [0, 0, 1]
    assert definition.predictions(np.array([[-1.0], [2.0]])).tolist() == [0, 1]
    assert definition.predictions(np.array([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0]])).tolist() == [0, 1]


def test_accuracy_and_balanced_accuracy_of_a_known_case() -> None:
    outputs = np.array([1.0, 1.0, 1.0, -1.0])
    targets = np.array([1, 1, 0, 0])
    assert m.METRICS["accuracy"].exact(outputs, targets) == 0.75
    # recall of class 1 is 1, of class 0 is 1/2
    assert m.METRICS["balanced_accuracy"].exact(outputs, targets) == 0.75
    assert m.METRICS["balanced_accuracy"].sums(outputs, targets).tolist() == [1, 2, 2, 2]
    assert m.METRICS["balanced_accuracy"].exact(outputs[:3], targets[:3]) == 0.5
    assert m.METRICS["accuracy"].exact(outputs[:3], targets[:3]) == 2 / 3


def test_balanced_accuracy_is_over_the_classes_that_have_rows() -> None:
    outputs = np.eye(3)[[0, 0, 1]]
    targets = np.array([0, 0, 0])
    sums = m.METRICS["balanced_accuracy"].sums(outputs, targets)
    assert m.METRICS["balanced_accuracy"].finish(sums) == 2 / 3


def test_auc_of_known_cases() -> None:
    auc = m.METRICS["auc"]
    targets = np.array([0, 0, 1, 1])
    assert auc.exact(np.array([-2.0, -1.0, 1.0, 2.0]), targets) == 1.0
    assert auc.exact(np.array([2.0, 1.0, -1.0, -2.0]), targets) == 0.0
    assert auc.exact(np.zeros(4), targets) == 0.5
    assert auc.exact(np.array([0.0, 1.0, 1.0, 2.0]), targets) == 0.875


def test_auc_bins_are_equal_widths_of_the_predicted_probability() -> None:
    probabilities = (np.arange(ranking.BINS) + 0.5) / ranking.BINS
    logits = np.log(probabilities / (1 - probabilities))
    targets = np.arange(ranking.BINS) % 2
    binary = m.METRICS["auc"].sums(logits, targets).reshape(2, ranking.BINS)
    assert binary[0].tolist() == [1, 0] * (ranking.BINS // 2)
    assert binary[1].tolist() == [0, 1] * (ranking.BINS // 2)
    two = np.stack([np.full(ranking.BINS, 7.0), logits + 7.0], axis=1)
    assert np.array_equal(m.METRICS["auc"].sums(two, targets).reshape(2, ranking.BINS), binary)
    # Three logits with softmax (p, (1-p)/2, (1-p)/2): class 0 is binned by p as well.
    rest = np.log((1 - probabilities) / 2)
    three = np.stack([np.log(probabilities), rest, rest], axis=1)
    histograms = m.METRICS["auc"].sums(three, 1 - targets).reshape(3, 2, ranking.BINS)
    assert np.array_equal(histograms[0], binary)


def test_extreme_logits_land_in_the_outer_bins() -> None:
    sums = (
        m.METRICS["auc"].sums(np.array([-1e300, 1e300]), np.array([0, 1])).reshape(2, ranking.BINS)
    )
    assert sums[0, 0] == 1
    assert sums[1, -1] == 1


def test_a_class_that_no_row_has_is_left_out_of_the_macro_mean() -> None:
    outputs = np.array([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
    targets = np.array([0, 1, 0])
    assert m.METRICS["auc"].exact(outputs, targets) == 1.0
    assert m.METRICS["auc"].finish(m.METRICS["auc"].sums(outputs, targets)) == 1.0


@pytest.mark.parametrize("outputs", [np.array([1.0, 2.0]), np.ones((2, 2)), np.ones((2, 3))])
def test_auc_of_one_class_is_undefined(outputs: np.ndarray) -> None:
    targets = np.array([1, 1])
    auc = m.METRICS["auc"]
    assert auc.exact(outputs, targets) is None
    assert auc.finish(auc.sums(outputs, targets)) is None
    assert ranking.auc_error_bound(auc.sums(outputs, targets)) is None


@pytest.mark.parametrize("name", [*CLASSIFICATION, *REGRESSION])
def test_no_rows_are_undefined_not_an_error(name: str) -> None:
    metric = m.METRICS[name]
    outputs, targets = np.zeros((0, 1)), np.zeros(0)
    assert metric.exact(outputs, targets) is None
    assert metric.finish(metric.sums(outputs, targets)) is None
    assert metric.finish(np.zeros(metric.size(1), dtype=np.int64)) is None


def test_regression_errors_and_their_clipping() -> None:
    outputs, targets = np.array([1.0, 2.0, 5.0]), np.array([0.0, 2.0, 2.0])
    assert m.METRICS["mse"].exact(outputs, targets) == pytest.approx(10 / 3)
    assert m.METRICS["mae"].exact(outputs, targets) == pytest.approx(4 / 3)
    sums = m.METRICS["mse"].sums(np.array([1.0, 1e9]), np.zeros(2))
    assert definition.clipped_rows(sums) == 1
    assert sums[0] == m.METRICS["mse"].cap_per_row + (1 << definition.FRACTION_BITS)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_targets_may_be_float_columns(name: str) -> None:
    """A one-logit loss (BCE) wants (n, 1) float targets."""
    outputs = np.array([[0.5], [-0.5], [0.1]])
    metric = m.METRICS[name]
    assert np.array_equal(
        metric.sums(outputs, np.array([[1.0], [0.0], [0.0]])),
        metric.sums(outputs.reshape(-1), np.array([1, 0, 0])),
    )


@pytest.mark.parametrize("targets", [[0, 2], [0, -1], [0.5, 1.0], [np.nan, 1.0]])
@pytest.mark.parametrize("name", CLASSIFICATION)
def test_targets_that_are_no_class_of_the_model_are_refused(name: str, targets: list) -> None:
    with pytest.raises(BadInput, match=r"expected class indices 0\.\.1"):
        m.METRICS[name].sums(np.array([0.0, 1.0]), np.array(targets))


@pytest.mark.parametrize("name", [*CLASSIFICATION, *REGRESSION])
def test_outputs_that_are_not_finite_are_the_tasks_failure(name: str) -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(TaskFailed, match="1 of 2 not finite"):
            m.METRICS[name].sums(np.array([0.0, bad]), np.array([0, 1]))


def test_shapes_that_no_metric_reads_are_refused() -> None:
    with pytest.raises(BadInput, match="shape"):
        m.METRICS["accuracy"].sums(np.zeros((2, 3, 4)), np.zeros(2))
    with pytest.raises(BadInput, match="targets of shape"):
        m.METRICS["accuracy"].sums(np.zeros((2, 3)), np.zeros((2, 3)))
    with pytest.raises(BadInput, match="3 outputs per row"):
        m.METRICS["mse"].sums(np.zeros((2, 3)), np.zeros(2))


def test_unknown_metrics_name_the_nearest() -> None:
    with pytest.raises(UnknownName) as caught:
        m.get(["auc", "acuracy"])
    assert "accuracy" in caught.value.remedy
    assert [metric.name for metric in m.get(("auc", "accuracy"))] == ["auc", "accuracy"]


def test_scores_are_pooled_and_taken_apart_by_site() -> None:
    a = Scored(np.array([1.0, -1.0]), np.array([1, 0]), None)
    b = Scored(np.array([1.0]), np.array([0]), None)
    transport = MetricTransport(m.get(("accuracy", "auc")), (), 1, 3)
    assert transport.values([a, None, b]) == {"accuracy": 2 / 3, "auc": 0.75}
    found = pooled([a, None, b])
    assert found is not None
    assert found.sites.tolist() == [0, 0, 2]
    by_site = [transport.values([each]) for each in (a, None, b)]
    undefined = {"accuracy": None, "auc": None}
    assert by_site == [{"accuracy": 1.0, "auc": 1.0}, undefined, {"accuracy": 0.0, "auc": None}]
    assert m.site_mean(by_site) == {"accuracy": 0.5, "auc": 1.0}
    assert m.site_mean([{"auc": None}]) == {"auc": None}
    assert m.site_mean([]) == {}


def test_scores_of_unequal_lengths_or_shapes_are_refused() -> None:
    one = np.zeros(1, dtype=np.int64)
    with pytest.raises(BadInput, match="found 2 outputs, 1 targets"):
        m.Scores(np.zeros(2), one, one)
    with pytest.raises(BadInput, match="2 different shapes"):
        pooled([Scored(np.zeros(1), one, None), Scored(np.zeros((1, 3)), one, None)])
    assert pooled([]) is None
