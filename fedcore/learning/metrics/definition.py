"""Metrics as sums that may leave a site, and the same metrics from pooled rows in a simulation.

A metric is a function from a site's test rows to non-negative integers, and a finish from their sum
to one number: rows never leave, and the sums travel as wide coordinates (PROTOCOL W).

Invariant: `sums` is additive over rows, so the finish of the sites' sums is the value over the
union of their rows; one row adds at most `cap_per_row` to any entry. `finish(sums(rows))` equals
`exact(rows)` for metrics that count classes, and is within a stated bound of it for the others.

Outputs are `(n,)`, `(n, 1)` or `(n, C)`. Classes come from this shape alone, so sites agree on the
layout without seeing each other's labels: one output means two classes, C outputs mean C classes.
The prediction rule: one logit above 0 is class 1; of several logits the largest wins (the first of
equals). Which rows are test rows, and running the model on them, is left to others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import BadInput, TaskFailed

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Values = NDArray[np.generic]
"""Numbers of any dtype: targets, or sums."""

FRACTION_BITS = 16
"""Fixed point of sums that are no counts: a row's error is rounded to 2^-16 (PROTOCOL W)."""

FIXED_ONE = 1 << FRACTION_BITS


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
    clips: whether `sums[2]` counts rows beyond the range of the sums (`clipped_rows`).
    error_bound: `error_bound(sums)`, a bound on |finish(sums) - exact| where sums are histograms.
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
    clips: bool = False
    error_bound: Callable[[Values], float | None] | None = None

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


def require_finite(outputs: Floats) -> None:
    """Raise TaskFailed for NaN or infinity."""
    bad = int(np.count_nonzero(~np.isfinite(outputs)))
    if bad:
        raise TaskFailed(
            f"model outputs: found {bad} of {outputs.size} not finite, expected finite numbers",
            remedy="a smaller train.lr usually keeps the model from diverging",
        )


def one_per_row(targets: Values, rows: int) -> Values:
    """(rows,) from (rows,) or (rows, 1). Raises BadInput for another shape."""
    if targets.shape not in ((rows,), (rows, 1)):
        raise BadInput(
            f"metrics: found targets of shape {targets.shape}, expected ({rows},)",
            remedy="give the task an `evaluate` function for other shapes",
        )
    return targets.reshape(-1)


def labels_of(outputs: Floats, targets: Values) -> Integers:
    """(n,) int64 class indices below `classes_of(outputs)`, from integer or 0.0/1.0 targets."""
    require_finite(outputs)
    return class_labels(one_per_row(targets, len(outputs)), classes_of(outputs))


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


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Element-wise quotient, NaN where the denominator is 0."""
    quotient = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator > 0)
    return quotient


def mean_of(values: Floats | NDArray[np.bool_], counts: Integers) -> Floats:
    """(r,) float64 mean of the rows' values, per row of counts."""
    return ratio(counts.astype(np.float64) @ values, counts.sum(axis=1).astype(np.float64))


def fixed_point_sums(error: Floats, most: int) -> Integers:
    """[sum of the rows' errors in units of 2^-16, rows, rows clipped to `most`]."""
    fixed = np.rint(np.minimum(error, most) * FIXED_ONE).astype(np.int64)
    clipped = np.count_nonzero(error > most)
    return np.array([fixed.sum(), len(error), clipped], dtype=np.int64)


def fixed_point_finish(sums: Values) -> float | None:
    """The mean error, within 2^-17 of the exact one; too small if `clipped_rows(sums)` > 0."""
    total, rows, _ = (int(entry) for entry in sums)
    return total / FIXED_ONE / rows if rows else None


def clipped_rows(sums: Values) -> int:
    """Rows of the sums of a metric that `clips` whose error or target was beyond its range."""
    return int(sums[2])
