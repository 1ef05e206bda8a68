"""Properties of every metric: additive sums, caps, error bounds, agreement with slow references."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from fedcore.learning import metrics as m
from fedcore.learning.metrics import definition, ranking

NAMES = [
    name
    for name in m.METRICS
    if name not in {"top_2_accuracy", "top_5_accuracy", "top_10_accuracy"}
]
Rows = tuple[np.ndarray, np.ndarray]
FEW = settings(max_examples=60, deadline=None)

# Few distinct logits make ties likely; wide ones reach the outer bins.
LOGITS = st.one_of(
    st.sampled_from([-3.0, -0.5, 0.0, 0.25, 2.0]),
    st.floats(-40, 40, allow_subnormal=False),
)


@st.composite
def classified_rows(draw: st.DrawFn, min_rows: int = 0) -> Rows:
    """Outputs (n,), (n, 1), (n, 2) or (n, 3) with targets of the classes they imply."""
    shape = draw(st.sampled_from([(), (1,), (2,), (3,)]))
    rows = draw(st.integers(min_rows, 40))
    width = int(np.prod(shape, dtype=int))
    values = draw(st.lists(LOGITS, min_size=rows * width, max_size=rows * width))
    classes = 3 if shape == (3,) else 2
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows))
    outputs = np.array(values, dtype=np.float64).reshape(rows, *shape)
    return outputs, np.array(labels, dtype=np.int64)


@st.composite
def regression_rows(draw: st.DrawFn) -> Rows:
    values = st.floats(-1e4, 1e4, allow_subnormal=False)
    pairs = draw(st.lists(st.tuples(values, values), max_size=30))
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


@st.composite
def many_classes(draw: st.DrawFn, classes: int) -> Rows:
    rows = draw(st.integers(0, 12))
    values = draw(st.lists(LOGITS, min_size=rows * classes, max_size=rows * classes))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows))
    return np.array(values, dtype=np.float64).reshape(rows, classes), np.array(
        labels, dtype=np.int64
    )


def rows_for(name: str) -> st.SearchStrategy[Rows]:
    if name.startswith("top_"):
        return many_classes(int(name.split("_")[1]) + 2)
    return regression_rows() if m.METRICS[name].of_values else classified_rows()


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@FEW
def test_sums_of_the_parts_are_the_sum_of_the_whole(name: str, data: st.DataObject) -> None:
    metric = m.METRICS[name]
    outputs, targets = data.draw(rows_for(name))
    sites = np.array(
        data.draw(st.lists(st.integers(0, 3), min_size=len(targets), max_size=len(targets))),
        dtype=np.int64,
    )
    whole = metric.sums(outputs, targets)
    parts = [metric.sums(outputs[sites == s], targets[sites == s]) for s in range(4)]
    assert np.array_equal(whole, np.sum(parts, axis=0))
    assert whole.dtype == np.int64
    assert whole.shape == (metric.size(definition.columns_of(outputs)),)
    assert whole.min() >= 0
    assert whole.max() <= len(targets) * metric.cap_per_row


@given(classified_rows())
@FEW
def test_finish_of_the_counting_metrics_is_exact(rows: Rows) -> None:
    for name in ("accuracy", "balanced_accuracy", "f1"):
        metric = m.METRICS[name]
        assert metric.finish(metric.sums(*rows)) == metric.exact(*rows)


def test_balanced_accuracy_of_three_classes_is_added_in_one_order() -> None:
    """A correctly rounded sum of these three recalls has another last bit than the sum from left to right."""
    rows = np.repeat([0, 1, 2], [20, 6, 8])
    chosen = np.concatenate([[0] * 15 + [1] * 5, [1] + [0] * 5, [2] + [0] * 7])
    outputs = np.eye(3)[chosen]
    metric = m.METRICS["balanced_accuracy"]
    assert metric.sums(outputs, rows).tolist() == [15, 20, 1, 6, 1, 8]
    assert metric.finish(metric.sums(outputs, rows)) == metric.exact(outputs, rows)


@given(classified_rows())
@FEW
def test_binned_areas_are_within_their_bounds_of_the_exact_ones(rows: Rows) -> None:
    for name in ("auc", "auprc"):
        within_its_bound(m.METRICS[name], rows)


def within_its_bound(metric: definition.Metric, rows: Rows) -> None:
    assert metric.error_bound is not None
    sums = metric.sums(*rows)
    binned, exact, bound = metric.finish(sums), metric.exact(*rows), metric.error_bound(sums)
    if exact is None:
        assert binned is None
        assert bound is None
        return
    assert binned is not None
    assert bound is not None
    assert abs(binned - exact) <= bound + 1e-12


def test_the_auc_bound_is_reached() -> None:
    """One positive above one negative in the same bin: 1/2 instead of 1."""
    auc = m.METRICS["auc"]
    outputs, targets = np.array([1e-4, 2e-4]), np.array([0, 1])
    sums = auc.sums(outputs, targets)
    assert auc.exact(outputs, targets) == 1.0
    assert auc.finish(sums) == 0.5
    assert ranking.auc_error_bound(sums) == 0.5


def slow_auc(score: np.ndarray, positive: np.ndarray) -> float | None:
    """Every pair, one by one."""
    wins = [
        1.0 if up > down else 0.5 if up == down else 0.0
        for up in score[positive]
        for down in score[~positive]
    ]
    return sum(wins) / len(wins) if wins else None


@given(classified_rows())
@FEW
def test_exact_auc_is_the_rank_statistic(rows: Rows) -> None:
    outputs, targets = rows
    columns = definition.columns_of(outputs)
    exact = m.METRICS["auc"].exact(outputs, targets)
    if columns <= 2:
        flat = outputs.reshape(-1) if columns == 1 else outputs[:, 1] - outputs[:, 0]
        expected = slow_auc(flat, targets == 1)
        if expected is not None:
            assert roc_auc_score(targets, flat) == pytest.approx(expected, abs=1e-12)
    else:
        shifted = outputs - outputs.max(axis=1, keepdims=True)
        scores = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        areas = [slow_auc(scores[:, c], targets == c) for c in range(3)]
        defined = [area for area in areas if area is not None]
        expected = sum(defined) / len(defined) if defined else None
    assert exact == (None if expected is None else pytest.approx(expected, abs=1e-12))


@given(st.integers(0, 2**32 - 1))
@FEW
def test_multiclass_auc_and_balanced_accuracy_agree_with_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    outputs = rng.integers(-3, 4, size=(60, 4)).astype(np.float64)
    targets = np.concatenate([np.arange(4), rng.integers(0, 4, size=56)])
    softmax = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
    # Rounded so that scores equal in exact arithmetic tie in both computations.
    by_sklearn = [roc_auc_score(targets == c, softmax[:, c].round(12)) for c in range(4)]
    assert m.METRICS["auc"].exact(outputs, targets) == pytest.approx(np.mean(by_sklearn), abs=2e-3)
    assert m.METRICS["balanced_accuracy"].exact(outputs, targets) == pytest.approx(
        balanced_accuracy_score(targets, outputs.argmax(axis=1)), abs=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@FEW
def test_resampling_by_counts_is_repeating_the_rows(name: str, data: st.DataObject) -> None:
    metric = m.METRICS[name]
    outputs, targets = data.draw(rows_for(name))
    rows = len(targets)
    times = data.draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows))
    counts = np.array([times], dtype=np.int64)
    value = metric.exact_resampled(outputs, targets, counts)[0]
    repeated = metric.exact(np.repeat(outputs, times, axis=0), np.repeat(targets, times))
    assert np.isnan(value) if repeated is None else value == pytest.approx(repeated, rel=1e-12)


@pytest.mark.parametrize("name", ["mse", "mae"])
@given(rows=regression_rows())
@FEW
def test_fixed_point_errors_are_within_half_a_step_unless_clipped(name: str, rows: Rows) -> None:
    metric = m.METRICS[name]
    sums = metric.sums(*rows)
    finished, exact = metric.finish(sums), metric.exact(*rows)
    if exact is None or finished is None:
        assert exact is finished
    elif definition.clipped_rows(sums):
        assert finished < exact
    else:
        assert abs(finished - exact) <= 2.0 ** -(definition.FRACTION_BITS + 1) * (1 + 1e-9) + 1e-9
