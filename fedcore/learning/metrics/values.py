"""Metrics of a regression: errors of one output per row, and the share of the variance that is explained."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fedcore.errors import BadInput
from fedcore.learning.metrics.definition import (
    FIXED_ONE,
    Floats,
    Integers,
    Metric,
    Values,
    columns_of,
    fixed_point_finish,
    fixed_point_sums,
    mean_of,
    one_per_row,
    ratio,
    require_finite,
)

ERROR_RANGE = 1 << 16
"""Largest absolute (mae) or squared (mse) error of a row; larger ones are clipped and counted."""

TARGET_RANGE = 1 << 8
"""Largest absolute target of a row in the sums of r2, in steps of the targets' scale; larger ones are clipped."""


def _errors(outputs: Floats, targets: Values) -> Floats:
    """(n,) float64, output - target of a regression with one output per row."""
    if columns_of(outputs) != 1:
        raise BadInput(
            f"metrics: found {columns_of(outputs)} outputs per row, expected 1 for mse and mae",
            remedy="accuracy, auc and the other metrics of classes take several outputs per row",
        )
    require_finite(outputs)
    flat = one_per_row(targets, len(outputs)).astype(np.float64)
    if not np.isfinite(flat).all():
        raise BadInput("targets: found NaN or Inf, expected finite numbers")
    return np.asarray(outputs.reshape(-1) - flat, dtype=np.float64)


def _squared(outputs: Floats, targets: Values) -> Floats:
    return np.square(_errors(outputs, targets))


def _absolute(outputs: Floats, targets: Values) -> Floats:
    return np.abs(_errors(outputs, targets))


def _root_finish(sums: Values) -> float | None:
    mean = fixed_point_finish(sums)
    return None if mean is None else math.sqrt(mean)


def _r2_sums(outputs: Floats, targets: Values) -> Integers:
    """[squared errors, rows, rows clipped, targets + 256, squared targets], fixed point but for the counts. Errors
    are clipped as those of mse, targets to 256."""
    errors = fixed_point_sums(_squared(outputs, targets), ERROR_RANGE)
    values = targets.reshape(-1).astype(np.float64)
    errors[2] = np.count_nonzero(
        (np.abs(values) > TARGET_RANGE) | (_squared(outputs, targets) > ERROR_RANGE)
    )
    values = np.clip(values, -TARGET_RANGE, TARGET_RANGE)
    shifted = np.rint((values + TARGET_RANGE) * FIXED_ONE).astype(np.int64)
    squares = np.rint(np.square(values) * FIXED_ONE).astype(np.int64)
    return np.array([*errors, shifted.sum(), squares.sum()], dtype=np.int64)


def _r2_finish(sums: Values) -> float | None:
    """1 - squared errors / squared deviations from the mean; None for less than two different targets."""
    squared, rows, _, shifted, squares = (int(entry) for entry in sums)
    total = shifted - rows * TARGET_RANGE * FIXED_ONE
    # n S2 - S1^2 in integers, so that a large mean costs no digits; rounding may leave some of equal targets.
    deviations = rows * squares * FIXED_ONE - total * total
    if deviations <= rows * rows * FIXED_ONE:
        return None
    return 1 - squared * rows * FIXED_ONE / deviations


def _r2_resampled(outputs: Floats, targets: Values, counts: Integers) -> Floats:
    squared, times = _squared(outputs, targets), counts.astype(np.float64)
    values, rows = targets.reshape(-1).astype(np.float64), times.sum(axis=1)
    means = np.nan_to_num(ratio(times @ values, rows))
    deviations = (times * np.square(values - means[:, None])).sum(axis=1)
    # Equal targets differ from their mean by its rounding.
    rounding = 8 * np.finfo(np.float64).eps * np.abs(values).max(initial=0.0)
    return 1 - ratio(times @ squared, np.where(deviations > rows * rounding**2, deviations, 0.0))


def _regression(
    name: str,
    errors: Callable[[Floats, Values], Floats],
    unit_power: int,
    finish: Callable[[Values], float | None] = fixed_point_finish,
    then: Callable[[Floats], Floats] = lambda mean: mean,
) -> Metric:
    """The mean of the rows' errors, of which `finish` and `then` make the value."""
    return Metric(
        name,
        lambda columns: 3,
        lambda outputs, targets: fixed_point_sums(errors(outputs, targets), ERROR_RANGE),
        finish,
        lambda outputs, targets, counts: then(mean_of(errors(outputs, targets), counts)),
        cap_per_row=ERROR_RANGE * FIXED_ONE,
        higher_is_better=False,
        of_values=True,
        unit_power=unit_power,
        clips=True,
    )


METRICS = (
    _regression("mse", _squared, 2),
    _regression("rmse", _squared, 1, _root_finish, np.sqrt),
    _regression("mae", _absolute, 1),
    Metric(
        "r2",
        lambda columns: 5,
        _r2_sums,
        _r2_finish,
        _r2_resampled,
        cap_per_row=ERROR_RANGE * FIXED_ONE,
        of_values=True,
        clips=True,
    ),
)
