"""Metrics as sums that may leave a site, and the same metrics from pooled rows in a simulation.

A metric is a function from a site's test rows to non-negative integers, and a finish from their sum
to one number: rows never leave, and the sums travel as wide coordinates (PROTOCOL W).

Invariant: `sums` is additive over rows, so the finish of the sites' sums is the value over the
union of their rows; one row adds at most `cap_per_row` to any entry. `finish(sums(rows))` equals
`exact(rows)` for accuracy and balanced_accuracy, and is within a stated bound of it for the others.

Outputs are `(n,)`, `(n, 1)` or `(n, C)`. Classes come from this shape alone, so sites agree on the
layout without seeing each other's labels: one output means two classes, C outputs mean C classes.
The prediction rule: one logit above 0 is class 1; of several logits the largest wins (the first of
equals). Which rows are test rows, and running the model on them, is left to others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import BadInput, TaskFailed, UnknownName

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Values = NDArray[np.generic]
"""Numbers of any dtype: targets, or sums."""

BINS = 256
"""Bins of an AUC histogram, of equal width in the predicted probability (PROTOCOL W)."""

FRACTION_BITS = 16
"""Fixed point of the regression sums: a row's error is rounded to 2^-16 (PROTOCOL W)."""

ERROR_RANGE = 1 << 16
"""Largest absolute (mae) or squared (mse) error of a row; larger ones are clipped and counted."""

TARGET_RANGE = 1 << 8
"""Largest absolute target of a row in the sums of r2, in steps of the targets' scale; larger ones are clipped."""

_FIXED_ONE = 1 << FRACTION_BITS
_EDGES = np.arange(1, BINS) / BINS
_LOGIT_EDGES = np.log(_EDGES / (1 - _EDGES))
_LOG_EDGES = np.log(_EDGES)


@dataclass(frozen=True)
class Metric:
    """One metric.

    name: as written in a task and in result.json.
    size: `size(columns)`, the entries of `sums` for a model with that many outputs per row.
    sums: `sums(outputs, targets) -> (size,) int64`, non-negative, additive over rows and sites.
    finish: `finish(sums)`, the value over all rows summed; None where it is undefined.
    exact_resampled: `exact_resampled(outputs, targets, counts) -> (r,) float64`: the value over the
        rows taken `counts[i]` times each, one value per row of the `(r, n)` int64 matrix `counts`;
        NaN where it is undefined. It needs every row in one place: simulation only.
    cap_per_row: the most that one row can add to any entry of `sums`.
    higher_is_better: False for errors.
    of_values: True where targets are values to come near to, False where they are classes.
    unit_power: 1 for a value in the target's unit, 2 in its square; sums of such values are of scaled ones.
    """

    name: str
    size: Callable[[int], int]
    sums: Callable[[Floats, Values], Integers]
    finish: Callable[[Values], float | None]
    exact_resampled: Callable[[Floats, Values, Integers], Floats]
    cap_per_row: int = 1
    higher_is_better: bool = True
    of_values: bool = False
    unit_power: int = 0

    def exact(self, outputs: Floats, targets: Values) -> float | None:
        """The value over pooled rows, without binning or rounding; None where it is undefined."""
        each_once = np.ones((1, len(outputs)), dtype=np.int64)
        value = float(self.exact_resampled(outputs, targets, each_once)[0])
        return None if np.isnan(value) else value


def columns_of(outputs: Floats) -> int:
    """Outputs per row: 1 for `(n,)` and `(n, 1)`, C for `(n, C)`. Raises BadInput otherwise."""
    if outputs.ndim == 1:
        return 1
    if outputs.ndim == 2 and outputs.shape[1] > 0:
        return int(outputs.shape[1])
    raise BadInput(
        f"metrics: found outputs of shape {outputs.shape}, expected (rows,) or (rows, classes)",
        remedy="give the task an `evaluate` function for other shapes",
    )


def classes_of(outputs: Floats) -> int:
    """Classes that these outputs distinguish: two for one logit, else one per logit."""
    return max(2, columns_of(outputs))


def predictions(outputs: Floats) -> Integers:
    """(n,) int64 class indices: one logit > 0 is class 1; several logits: the first largest."""
    if columns_of(outputs) == 1:
        return (outputs.reshape(-1) > 0).astype(np.int64)
    return np.asarray(outputs.argmax(axis=1), dtype=np.int64)


def _require_finite(outputs: Floats) -> None:
    bad = int(np.count_nonzero(~np.isfinite(outputs)))
    if bad:
        raise TaskFailed(
            f"model outputs: found {bad} of {outputs.size} not finite, expected finite numbers",
            remedy="a smaller train.lr usually keeps the model from diverging",
        )


def _one_per_row(targets: Values, rows: int) -> Values:
    if targets.shape not in ((rows,), (rows, 1)):
        raise BadInput(
            f"metrics: found targets of shape {targets.shape}, expected ({rows},)",
            remedy="give the task an `evaluate` function for other shapes",
        )
    return targets.reshape(-1)


def _labels(outputs: Floats, targets: Values) -> Integers:
    """(n,) int64 class indices below `classes_of(outputs)`, from integer or 0.0/1.0 targets."""
    _require_finite(outputs)
    return class_labels(_one_per_row(targets, len(outputs)), classes_of(outputs))


def class_labels(targets: Values, classes: int, where: str = "") -> Integers:
    """(n,) int64 class indices below `classes`, from (n,) or (n, 1) integers or whole floats. where: begins the
    messages, such as `site a: `. Raises BadInput, which names one-hot rows, several labels a row, -1 and 1, and
    classes counted from 1."""
    if targets.shape not in ((len(targets),), (len(targets), 1)):
        raise _not_one_label(targets, where)
    flat = targets.reshape(-1)
    with np.errstate(invalid="ignore"):  # NaN becomes an arbitrary integer, refused just below
        labels = flat.astype(np.int64)
    wrong = np.flatnonzero((labels != flat) | (labels < 0) | (labels >= classes))
    if not len(wrong):
        return labels
    remedy = "the model's last layer has one output per class (or one for two classes)"
    if np.isin(flat, (-1, 1)).all():
        remedy = "(y + 1) // 2 in task.data; a loss on margins takes 2 * targets - 1"
    elif (labels == flat).all() and labels.min() == 1 and labels.max() == classes:
        remedy = "y - 1 in task.data: classes count from 0"
    raise BadInput(
        f"{where}targets: found {flat[wrong[0]].item()!r} in {len(wrong)} of {len(flat)} rows, "
        f"expected class indices 0..{classes - 1}",
        remedy=remedy,
    )


def _not_one_label(targets: Values, where: str) -> BadInput:
    what = "rows"
    remedy = (
        "give the task its own evaluate(model, rows) -> {metric: (total, count)} for other shapes"
    )
    if targets.ndim == 2 and targets.size and np.isin(targets, (0, 1)).all():
        what = "rows of several labels"
        if (targets.sum(axis=1) == 1).all():
            what, remedy = "one-hot rows", "y.argmax(1) in task.data gives class indices"
    return BadInput(
        f"{where}targets: found {what} of shape {targets.shape}, expected one class index per row",
        remedy=remedy,
    )


def _errors(outputs: Floats, targets: Values) -> Floats:
    """(n,) float64, output - target of a regression with one output per row."""
    if columns_of(outputs) != 1:
        raise BadInput(
            f"metrics: found {columns_of(outputs)} outputs per row, expected 1 for mse and mae",
            remedy="accuracy, balanced_accuracy and auc take several outputs per row",
        )
    _require_finite(outputs)
    flat = _one_per_row(targets, len(outputs)).astype(np.float64)
    if not np.isfinite(flat).all():
        raise BadInput("targets: found NaN or Inf, expected finite numbers")
    return np.asarray(outputs.reshape(-1) - flat, dtype=np.float64)


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Element-wise quotient, NaN where the denominator is 0."""
    quotient = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator > 0)
    return quotient


def _mean_of(values: Floats | NDArray[np.bool_], counts: Integers) -> Floats:
    """(r,) float64 mean of the rows' values, per row of counts."""
    return _ratio(counts.astype(np.float64) @ values, counts.sum(axis=1).astype(np.float64))


def _accuracy_sums(outputs: Floats, targets: Values) -> Integers:
    """[rows predicted right, rows]."""
    labels = _labels(outputs, targets)
    return np.array([np.count_nonzero(predictions(outputs) == labels), len(labels)], dtype=np.int64)


def _accuracy_finish(sums: Values) -> float | None:
    right, rows = (int(entry) for entry in sums)
    return right / rows if rows else None


def _accuracy_resampled(outputs: Floats, targets: Values, counts: Integers) -> Floats:
    return _mean_of(predictions(outputs) == _labels(outputs, targets), counts)


def _balanced_sums(outputs: Floats, targets: Values) -> Integers:
    """[right of class 0, rows of class 0, right of class 1, rows of class 1, ...]."""
    labels, classes = _labels(outputs, targets), classes_of(outputs)
    right = predictions(outputs) == labels
    pairs = (np.bincount(labels[right], minlength=classes), np.bincount(labels, minlength=classes))
    return np.stack(pairs, axis=1).reshape(-1).astype(np.int64)


def _balanced_finish(sums: Values) -> float | None:
    """Unweighted mean recall over the classes that have rows; None without rows."""
    pairs = np.asarray(sums, dtype=np.int64).reshape(-1, 2)
    present = [(int(right), int(rows)) for right, rows in pairs if rows]
    # One after the other, as `_balanced_resampled` adds: `sum` of floats rounds otherwise from Python
    # 3.12 on, `math.fsum` otherwise from three classes on, and both results are compared bit for bit.
    total = 0.0
    for right, rows in present:
        total += right / rows
    return total / len(present) if present else None


def _balanced_resampled(outputs: Floats, targets: Values, counts: Integers) -> Floats:
    labels, times = _labels(outputs, targets), counts.astype(np.float64)
    right = predictions(outputs) == labels
    total, present = np.zeros(len(counts)), np.zeros(len(counts))
    for label in range(classes_of(outputs)):
        of_class = labels == label
        rows = times @ of_class
        total += np.nan_to_num(_ratio(times @ (of_class & right), rows))
        present += rows > 0
    return _ratio(total, present)


def _class_scores(outputs: Floats) -> list[Floats]:
    """One (n,) score per one-vs-rest problem: a single one for two classes, else one per class.

    Two classes: the logit, or the difference of the two logits. More: the log of the softmax.
    Each is a strictly increasing function of the predicted probability of its class.
    """
    columns = columns_of(outputs)
    if columns == 1:
        return [outputs.reshape(-1)]
    if columns == 2:
        return [outputs[:, 1] - outputs[:, 0]]
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return list(log_softmax.T)


def _one_vs_rest(outputs: Floats, targets: Values) -> list[tuple[Floats, NDArray[np.bool_]]]:
    """(scores, is the class) of each one-vs-rest problem; for two classes only that of class 1."""
    labels, scores = _labels(outputs, targets), _class_scores(outputs)
    first = 1 if len(scores) == 1 else 0
    return [(score, labels == first + index) for index, score in enumerate(scores)]


def _auc_size(columns: int) -> int:
    return 2 * BINS * (1 if columns <= 2 else columns)


def _auc_sums(outputs: Floats, targets: Values) -> Integers:
    """Per one-vs-rest problem: 256 counts of negatives, then 256 of positives.

    Bin b holds predicted probabilities in [b/256, (b+1)/256). The edges are compared on the score's
    own scale (logit, or log of the softmax), which keeps the order of rows exactly.
    """
    edges = _LOGIT_EDGES if columns_of(outputs) <= 2 else _LOG_EDGES
    histograms = []
    for score, positive in _one_vs_rest(outputs, targets):
        bins = np.searchsorted(edges, score, side="right")
        histograms.append(np.bincount(bins[~positive], minlength=BINS))
        histograms.append(np.bincount(bins[positive], minlength=BINS))
    return np.concatenate(histograms).astype(np.int64)


def _auc_finish(sums: Values) -> float | None:
    """Trapezoid area, rows of one bin counting as ties (1/2): see `auc_error_bound`.

    With more than two classes: the unweighted mean over the classes that have both positives and
    negatives. None if there is no such class, that is if all rows are of one class.
    """
    return _mean_of_problems(sums, lambda n, p: p * (2 * np.cumsum(n) - n))


def auc_error_bound(sums: Values) -> float | None:
    """Largest |binned - exact| AUC these histograms allow: 1/2 * sum_b p_b n_b / (P N).

    Only pairs that share a bin are misjudged, and each by at most 1/2, since the binned value gives
    it 1/2 and the exact one 0, 1/2 or 1. Averaged over the classes as the value is.
    """
    return _mean_of_problems(sums, lambda n, p: n * p)


def _mean_of_problems(
    sums: Values, doubled: Callable[[Integers, Integers], Integers]
) -> float | None:
    """Mean of `sum of doubled(negatives, positives) / 2 P N` over the problems with both; None without one."""
    found = []
    for negatives, positives in np.asarray(sums, dtype=np.int64).reshape(-1, 2, BINS):
        pairs = int(negatives.sum()) * int(positives.sum())
        if pairs:
            found.append(int(doubled(negatives, positives).sum()) / (2 * pairs))
    return math.fsum(found) / len(found) if found else None


def _auc_resampled(outputs: Floats, targets: Values, counts: Integers) -> Floats:
    """The tie-aware rank statistic (Mann and Whitney 1947); macro one-vs-rest above two classes."""
    total, defined = np.zeros(len(counts)), np.zeros(len(counts))
    for score, positive in _one_vs_rest(outputs, targets):
        area = _rank_statistic(score, positive, counts)
        total += np.nan_to_num(area)
        defined += ~np.isnan(area)
    return _ratio(total, defined)


def _rank_statistic(score: Floats, positive: NDArray[np.bool_], counts: Integers) -> Floats:
    """(r,) float64 P(positive above negative) + P(tie)/2 per row of counts; NaN for one class.

    Doubled wins are integers (a positive beats each negative below it twice, a tied one once), so
    equal orders give equal bits.
    """
    order = np.argsort(score, kind="stable")
    ordered = score[order]
    at = order[positive[order]]
    below = np.searchsorted(ordered, score[at], side="left")
    not_above = np.searchsorted(ordered, score[at], side="right")
    # seen[:, i] is the number of negatives among the i lowest rows.
    seen = np.zeros((len(counts), len(score) + 1), dtype=np.int64)
    np.cumsum(counts[:, order] * ~positive[order], axis=1, out=seen[:, 1:])
    positives = counts[:, at]
    doubled = (positives * (seen[:, below] + seen[:, not_above])).sum(axis=1)
    pairs = 2 * positives.sum(axis=1) * seen[:, -1]
    return _ratio(doubled.astype(np.float64), pairs.astype(np.float64))


def _fixed_point_sums(error: Floats) -> Integers:
    """[sum of the rows' errors in units of 2^-16, rows, rows clipped to ERROR_RANGE]."""
    fixed = np.rint(np.minimum(error, ERROR_RANGE) * _FIXED_ONE).astype(np.int64)
    clipped = np.count_nonzero(error > ERROR_RANGE)
    return np.array([fixed.sum(), len(error), clipped], dtype=np.int64)


def _fixed_point_finish(sums: Values) -> float | None:
    """The mean error, within 2^-17 of the exact one; too small if `clipped_rows(sums)` > 0."""
    total, rows, _ = (int(entry) for entry in sums)
    return total / _FIXED_ONE / rows if rows else None


def clipped_rows(sums: Values) -> int:
    """Rows of a regression's sum whose error or target was beyond its range."""
    return int(sums[2])


def _squared(outputs: Floats, targets: Values) -> Floats:
    return np.square(_errors(outputs, targets))


def _absolute(outputs: Floats, targets: Values) -> Floats:
    return np.abs(_errors(outputs, targets))


def _root_finish(sums: Values) -> float | None:
    mean = _fixed_point_finish(sums)
    return None if mean is None else math.sqrt(mean)


def _r2_sums(outputs: Floats, targets: Values) -> Integers:
    """[squared errors, rows, rows clipped, targets + 256, squared targets], fixed point but for the counts. Errors
    are clipped as those of mse, targets to 256."""
    errors = _fixed_point_sums(_squared(outputs, targets))
    values = targets.reshape(-1).astype(np.float64)
    errors[2] = np.count_nonzero(
        (np.abs(values) > TARGET_RANGE) | (_squared(outputs, targets) > ERROR_RANGE)
    )
    values = np.clip(values, -TARGET_RANGE, TARGET_RANGE)
    shifted = np.rint((values + TARGET_RANGE) * _FIXED_ONE).astype(np.int64)
    squares = np.rint(np.square(values) * _FIXED_ONE).astype(np.int64)
    return np.array([*errors, shifted.sum(), squares.sum()], dtype=np.int64)


def _r2_finish(sums: Values) -> float | None:
    """1 - squared errors / squared deviations from the mean; None for less than two different targets."""
    squared, rows, _, shifted, squares = (int(entry) for entry in sums)
    total = shifted - rows * TARGET_RANGE * _FIXED_ONE
    # n S2 - S1^2 in integers, so that a large mean costs no digits; rounding may leave some of equal targets.
    deviations = rows * squares * _FIXED_ONE - total * total
    if deviations <= rows * rows * _FIXED_ONE:
        return None
    return 1 - squared * rows * _FIXED_ONE / deviations


def _r2_resampled(outputs: Floats, targets: Values, counts: Integers) -> Floats:
    squared, times = _squared(outputs, targets), counts.astype(np.float64)
    values, rows = targets.reshape(-1).astype(np.float64), times.sum(axis=1)
    means = np.nan_to_num(_ratio(times @ values, rows))
    deviations = (times * np.square(values - means[:, None])).sum(axis=1)
    # Equal targets differ from their mean by its rounding.
    rounding = 8 * np.finfo(np.float64).eps * np.abs(values).max(initial=0.0)
    return 1 - _ratio(times @ squared, np.where(deviations > rows * rounding**2, deviations, 0.0))


def _regression(
    name: str,
    errors: Callable[[Floats, Values], Floats],
    unit_power: int,
    finish: Callable[[Values], float | None] = _fixed_point_finish,
    then: Callable[[Floats], Floats] = lambda mean: mean,
) -> Metric:
    """The mean of the rows' errors, of which `finish` and `then` make the value."""
    return Metric(
        name,
        lambda columns: 3,
        lambda outputs, targets: _fixed_point_sums(errors(outputs, targets)),
        finish,
        lambda outputs, targets, counts: then(_mean_of(errors(outputs, targets), counts)),
        cap_per_row=ERROR_RANGE * _FIXED_ONE,
        higher_is_better=False,
        of_values=True,
        unit_power=unit_power,
    )


_ALL = (
    Metric("accuracy", lambda columns: 2, _accuracy_sums, _accuracy_finish, _accuracy_resampled),
    Metric("auc", _auc_size, _auc_sums, _auc_finish, _auc_resampled),
    Metric(
        "balanced_accuracy",
        lambda columns: 2 * max(2, columns),
        _balanced_sums,
        _balanced_finish,
        _balanced_resampled,
    ),
    _regression("mse", _squared, 2),
    _regression("rmse", _squared, 1, _root_finish, np.sqrt),
    _regression("mae", _absolute, 1),
    Metric(
        "r2",
        lambda columns: 5,
        _r2_sums,
        _r2_finish,
        _r2_resampled,
        cap_per_row=ERROR_RANGE * _FIXED_ONE,
        of_values=True,
    ),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
"""Every metric a task can name. A task with an `evaluate` function brings its own."""


def get(names: Iterable[str]) -> tuple[Metric, ...]:
    """The metrics of these names, in their order. Raises UnknownName."""
    found = tuple(names)
    for name in found:
        if name not in METRICS:
            raise UnknownName("metric", name, METRICS)
    return tuple(METRICS[name] for name in found)


@dataclass(frozen=True)
class Scores:
    """One arm's outputs on the union of test rows, pooled: exists in simulation only.

    outputs: `(n,)` or `(n, C)` float64; targets: `(n,)` class indices or values; sites: `(n,)`
    int64, the index of the site each row belongs to. Raises BadInput when lengths differ.
    """

    outputs: Floats = field(repr=False)
    targets: Values = field(repr=False)
    sites: Integers = field(repr=False)

    def __post_init__(self) -> None:
        lengths = (len(self.outputs), len(self.targets), len(self.sites))
        if len(set(lengths)) != 1:
            raise BadInput(
                f"scores: found {lengths[0]} outputs, {lengths[1]} targets and {lengths[2]} sites, "
                "expected one of each per row"
            )

    def __len__(self) -> int:
        return len(self.targets)


def site_mean(sites: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Unweighted mean over sites of each metric, over the sites where it is defined; else None."""
    means: dict[str, float | None] = {}
    for name in sites[0] if sites else ():
        defined = [value for site in sites if (value := site[name]) is not None]
        means[name] = sum(defined) / len(defined) if defined else None
    return means
