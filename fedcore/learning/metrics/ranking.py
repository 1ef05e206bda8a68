"""Metrics of the order of scores: areas under the ROC curve and under the precision-recall curve.

As sums they are histograms of 256 bins of equal width in the predicted probability, with a bound on the error of
what is made of them. Pooled rows give the exact values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from fedcore.learning.metrics.definition import (
    Floats,
    Integers,
    Metric,
    Values,
    columns_of,
    labels_of,
    ratio,
)

BINS = 256
"""Bins of an AUC histogram, of equal width in the predicted probability (PROTOCOL W)."""

_EDGES = np.arange(1, BINS) / BINS
_LOGIT_EDGES = np.log(_EDGES / (1 - _EDGES))
_LOG_EDGES = np.log(_EDGES)


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
    labels, scores = labels_of(outputs, targets), _class_scores(outputs)
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
    negatives. None if there is no such class, that is if all rows are of one class. Within 0 and 1 for bins with noise
    in them, too, of which some are negative.
    """
    found = _mean_of_problems(sums, lambda n, p: p * (2 * np.cumsum(n) - n))
    return None if found is None else min(1.0, max(0.0, found))


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
    return ratio(total, defined)


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
    return ratio(doubled.astype(np.float64), pairs.astype(np.float64))


def _precision_finish(sums: Values) -> float | None:
    """Average precision, sum over the bins of precision times the recall gained (Davis and Goadrich 2006), the rows
    of one bin counting as ties; more than two classes: its mean over the classes that have positives."""
    found = [float((share * precision).sum()) for share, precision, _, _ in _precision_curves(sums)]
    return math.fsum(found) / len(found) if found else None


def precision_error_bound(sums: Values) -> float | None:
    """Largest |binned - exact| average precision that these histograms allow.

    In a bin every positive has at most the precision with no negative of the bin above it, and at least that of
    the first positive below all of them.
    """
    curves = list(_precision_curves(sums))
    if not curves:
        return None
    bounds = []
    for share, precision, lowest, highest in curves:
        above, below = (share * (highest - precision)).sum(), (share * (precision - lowest)).sum()
        bounds.append(max(float(above), float(below)))
    return math.fsum(bounds) / len(bounds)


def _precision_curves(sums: Values) -> Iterator[tuple[Floats, Floats, Floats, Floats]]:
    """Per problem with positives, from the highest bin that has some: the share of the positives in it, the precision
    down to it, and the least and the greatest that a positive in it may have."""
    for negatives, positives in np.asarray(sums, dtype=np.int64).reshape(-1, 2, BINS)[:, :, ::-1]:
        total = int(positives.sum())
        if not total:
            continue
        some = positives > 0
        right, wrong = np.cumsum(positives)[some], np.cumsum(negatives)[some]
        own, others = positives[some], negatives[some]
        lowest = (right - own + 1) / (right - own + 1 + wrong)
        yield own / total, right / (right + wrong), lowest, right / (right + wrong - others)


def _precision_resampled(outputs: Floats, targets: Values, counts: Integers) -> Floats:
    """Average precision over the distinct scores; macro one-vs-rest above two classes."""
    total, defined = np.zeros(len(counts)), np.zeros(len(counts))
    for score, positive in _one_vs_rest(outputs, targets):
        order = np.argsort(-score, kind="stable")
        last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True)[: len(order)])
        times = counts[:, order]
        right = np.cumsum(times * positive[order], axis=1)[:, last]
        every = np.cumsum(times, axis=1)[:, last]
        gained = np.diff(right, axis=1, prepend=0)
        precision = np.nan_to_num(ratio(right.astype(np.float64), every.astype(np.float64)))
        positives = (counts @ positive).astype(np.float64)
        total += np.nan_to_num(ratio((gained * precision).sum(axis=1), positives))
        defined += positives > 0
    return ratio(total, defined)


METRICS = (
    Metric("auc", _auc_size, _auc_sums, _auc_finish, _auc_resampled, error_bound=auc_error_bound),
    Metric(
        "auprc",
        _auc_size,
        _auc_sums,
        _precision_finish,
        _precision_resampled,
        error_bound=precision_error_bound,
    ),
)
