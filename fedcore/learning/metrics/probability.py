"""Metrics of the predicted probabilities: log-loss, and the expected calibration error."""

from __future__ import annotations

import numpy as np

from fedcore.learning.metrics.definition import (
    FIXED_ONE,
    Floats,
    Integers,
    Metric,
    Values,
    columns_of,
    fixed_point_finish,
    fixed_point_sums,
    labels_of,
    mean_of,
    predictions,
    ratio,
)

LOSS_RANGE = 1 << 6
"""Largest log-loss of a row in sums; larger ones are clipped and counted. A probability of 2^-92."""

CALIBRATION_BINS = 15
"""Bins of equal width in the confidence (Guo et al. 2017, section 2)."""


def _log_probabilities(outputs: Floats) -> Floats:
    """(n, classes) float64: of one logit, log-sigmoid of its negative and of itself, else the log-softmax."""
    if columns_of(outputs) == 1:
        logit = outputs.reshape(-1)
        return -np.stack([np.logaddexp(0.0, logit), np.logaddexp(0.0, -logit)], axis=1)
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _log_losses(outputs: Floats, targets: Values) -> Floats:
    """(n,) -log of the probability of each row's class, in nats."""
    labels = labels_of(outputs, targets)
    found = -np.take_along_axis(_log_probabilities(outputs), labels[:, None], axis=1)[:, 0]
    return np.maximum(found, 0.0)


def _calibration_parts(outputs: Floats, targets: Values) -> tuple[Integers, Floats, Floats]:
    """Per row its bin, whether its prediction is right (0 or 1), and the predicted probability of it.

    Bin i holds confidences in (i/15, (i+1)/15].
    """
    right = (predictions(outputs) == labels_of(outputs, targets)).astype(np.float64)
    confidence = np.exp(_log_probabilities(outputs)).max(axis=1, initial=0.0)
    bins = np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1
    return np.clip(bins, 0, CALIBRATION_BINS - 1), right, confidence


def _calibration_sums(outputs: Floats, targets: Values) -> Integers:
    """Per bin: [rows, rows predicted right, sum of confidences in units of 2^-16]."""
    bins, right, confidence = _calibration_parts(outputs, targets)
    fixed = np.rint(confidence * FIXED_ONE).astype(np.int64)
    sums = np.zeros((CALIBRATION_BINS, 3), dtype=np.int64)
    np.add.at(sums, bins, np.stack([np.ones_like(fixed), right.astype(np.int64), fixed], axis=1))
    return sums.reshape(-1)


def _calibration_finish(sums: Values) -> float | None:
    """Sum over the bins of |accuracy - mean confidence|, weighted by their rows; within 2^-17 of the exact one."""
    rows, right, fixed = np.asarray(sums, dtype=np.int64).reshape(-1, 3).T
    total = int(rows.sum())
    return int(np.abs(right * FIXED_ONE - fixed).sum()) / FIXED_ONE / total if total else None


def _calibration_resampled(outputs: Floats, targets: Values, counts: Integers) -> Floats:
    bins, right, confidence = _calibration_parts(outputs, targets)
    times, apart = counts.astype(np.float64), np.zeros(len(counts))
    for each in range(CALIBRATION_BINS):
        apart += np.abs(times @ ((right - confidence) * (bins == each)))
    return ratio(apart, times.sum(axis=1))


METRICS = (
    Metric(
        "log_loss",
        lambda columns: 3,
        lambda outputs, targets: fixed_point_sums(_log_losses(outputs, targets), LOSS_RANGE),
        fixed_point_finish,
        lambda outputs, targets, counts: mean_of(_log_losses(outputs, targets), counts),
        cap_per_row=LOSS_RANGE * FIXED_ONE,
        higher_is_better=False,
        clips=True,
    ),
    Metric(
        "calibration_error",
        lambda columns: 3 * CALIBRATION_BINS,
        _calibration_sums,
        _calibration_finish,
        _calibration_resampled,
        cap_per_row=FIXED_ONE,
        higher_is_better=False,
    ),
)
