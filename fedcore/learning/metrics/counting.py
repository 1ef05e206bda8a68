"""Metrics that count right and wrong classes: exact as sums."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import BadInput
from fedcore.learning.metrics.definition import (
    Floats,
    Integers,
    Metric,
    Values,
    classes_of,
    columns_of,
    labels_of,
    mean_of,
    predictions,
    ratio,
)


def _accuracy_sums(outputs: Floats, targets: Values) -> Integers:
    """[rows predicted right, rows]."""
    labels = labels_of(outputs, targets)
    return np.array([np.count_nonzero(predictions(outputs) == labels), len(labels)], dtype=np.int64)


def _accuracy_finish(sums: Values) -> float | None:
    right, rows = (int(entry) for entry in sums)
    return right / rows if rows else None


def _accuracy_resampled(outputs: Floats, targets: Values, counts: Integers) -> Floats:
    return mean_of(predictions(outputs) == labels_of(outputs, targets), counts)


def _balanced_sums(outputs: Floats, targets: Values) -> Integers:
    """[right of class 0, rows of class 0, right of class 1, rows of class 1, ...]."""
    labels, classes = labels_of(outputs, targets), classes_of(outputs)
    right = predictions(outputs) == labels
    pairs = (np.bincount(labels[right], minlength=classes), np.bincount(labels, minlength=classes))
    return np.stack(pairs, axis=1).reshape(-1).astype(np.int64)


def _balanced_finish(sums: Values) -> float | None:
    """Unweighted mean recall over the classes that have rows; None without rows."""
    pairs = np.asarray(sums, dtype=np.int64).reshape(-1, 2)
    present = [(int(right), int(rows)) for right, rows in pairs if rows]
    return _added([right / rows for right, rows in present]) / len(present) if present else None


def _balanced_resampled(outputs: Floats, targets: Values, counts: Integers) -> Floats:
    labels, times = labels_of(outputs, targets), counts.astype(np.float64)
    right = predictions(outputs) == labels
    total, present = np.zeros(len(counts)), np.zeros(len(counts))
    for label in range(classes_of(outputs)):
        of_class = labels == label
        rows = times @ of_class
        total += np.nan_to_num(ratio(times @ (of_class & right), rows))
        present += rows > 0
    return ratio(total, present)


def _f1_classes(columns: int) -> int:
    """Classes that F1 is of: class 1 alone where there are two."""
    return 1 if columns <= 2 else columns


def _f1_parts(
    outputs: Floats, targets: Values
) -> list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """(predicted as the class, of the class) of each class that F1 is of."""
    labels, chosen, classes = (
        labels_of(outputs, targets),
        predictions(outputs),
        _f1_classes(columns_of(outputs)),
    )
    names = [1] if classes == 1 else range(classes)
    return [(chosen == name, labels == name) for name in names]


def _f1_sums(outputs: Floats, targets: Values) -> Integers:
    """Per class: [rows of it that were predicted, rows predicted as it, rows of it]."""
    parts = _f1_parts(outputs, targets)
    counts = [(np.count_nonzero(p & a), np.count_nonzero(p), np.count_nonzero(a)) for p, a in parts]
    return np.array(counts, dtype=np.int64).reshape(-1)


def _f1_finish(sums: Values) -> float | None:
    """2 TP / (predicted + actual) of class 1, or its mean over the classes that occur; None where none does."""
    found = [
        2 * int(right) / int(predicted + actual)
        for right, predicted, actual in np.asarray(sums, dtype=np.int64).reshape(-1, 3)
        if predicted + actual
    ]
    return _added(found) / len(found) if found else None


def _f1_resampled(outputs: Floats, targets: Values, counts: Integers) -> Floats:
    times, total, present = counts.astype(np.float64), np.zeros(len(counts)), np.zeros(len(counts))
    for predicted, actual in _f1_parts(outputs, targets):
        both = times @ predicted + times @ actual
        total += np.nan_to_num(ratio(2 * (times @ (predicted & actual)), both))
        present += both > 0
    return ratio(total, present)


def _added(values: list[float]) -> float:
    """From left to right, as the resampled values are: `sum` of floats rounds otherwise from Python 3.12 on,
    `math.fsum` otherwise from three on, and both results are compared bit for bit."""
    total = 0.0
    for value in values:
        total += value
    return total


def _among_first(k: int, outputs: Floats, targets: Values) -> NDArray[np.bool_]:
    """Whether each row's class is among its k largest outputs, of equals the first."""
    if columns_of(outputs) <= k:
        raise BadInput(
            f"metrics: found {classes_of(outputs)} classes, expected more than {k} for top_{k}_accuracy",
            remedy="with so few classes every answer is among them: name accuracy",
        )
    labels = labels_of(outputs, targets)
    own = np.take_along_axis(outputs, labels[:, None], axis=1)
    before = (outputs > own) | ((outputs == own) & (np.arange(outputs.shape[1]) < labels[:, None]))
    return np.asarray(before.sum(axis=1) < k)


def _top_sums(k: int, outputs: Floats, targets: Values) -> Integers:
    """[rows whose class is among the first k, rows]."""
    found = _among_first(k, outputs, targets)
    return np.array([np.count_nonzero(found), len(found)], dtype=np.int64)


def _top_resampled(k: int, outputs: Floats, targets: Values, counts: Integers) -> Floats:
    return mean_of(_among_first(k, outputs, targets), counts)


CONFUSION = "confusion_matrix"
"""The name by which a task asks for the confusion matrix over its sites: the one metric that is no single number."""

CONFUSION_CLASSES = 32
"""Most classes of which a confusion matrix is kept: its size is their square."""


def confusion_size(columns: int) -> int:
    """Entries of the matrix for a model with that many outputs per row."""
    return max(2, columns) ** 2


def confusion_sums(outputs: Floats, targets: Values) -> Integers:
    """(classes * classes,) rows of each class, by the class predicted; additive over rows and sites."""
    labels, classes = labels_of(outputs, targets), classes_of(outputs)
    pairs = labels * classes + predictions(outputs)
    return np.bincount(pairs, minlength=classes * classes).astype(np.int64)


def confusion_finish(sums: Values) -> tuple[tuple[int, ...], ...]:
    """The matrix: one row for each true class, one column for each predicted one."""
    classes = math.isqrt(len(sums))
    return tuple(tuple(map(int, row)) for row in np.asarray(sums).reshape(classes, classes))


METRICS = (
    Metric("accuracy", lambda columns: 2, _accuracy_sums, _accuracy_finish, _accuracy_resampled),
    Metric(
        "balanced_accuracy",
        lambda columns: 2 * max(2, columns),
        _balanced_sums,
        _balanced_finish,
        _balanced_resampled,
    ),
    Metric("f1", lambda columns: 3 * _f1_classes(columns), _f1_sums, _f1_finish, _f1_resampled),
    *(
        Metric(
            f"top_{k}_accuracy",
            lambda columns: 2,
            partial(_top_sums, k),
            _accuracy_finish,
            partial(_top_resampled, k),
        )
        for k in (2, 3, 5, 10)
    ),
)
