"""How much was lost against pooling the data, where, and how sure that is.

A gap is a difference of two arms on the same test rows; positive means lost, for errors (mse, mae)
too. `total = federation + quantisation + protection`, because each part is the difference of two
neighbours on one line: centralised, federated_float, federated_integer, federated. The arm
`federated_integer` is the run with the same plan and the plain integer sum. In a job with privacy another arm is on
the line before it, `federated_quantised`, whose vectors are clipped and rounded but have no noise: the part `privacy`
is what the noise costs.

Invariant: the point estimate is the plain difference over all test rows; resampling only adds the
interval. Arms with equal outputs have a gap of exactly 0 with a zero-width interval.

One run: paired percentile bootstrap over test rows (Efron and Tibshirani 1993, ch. 13): the same
resampled rows in both arms, so what makes a row hard cancels. It measures what other test rows would
have changed, not what other training rows would have. Rows that belong together are drawn together, since they
tell less than as many rows by themselves (Field and Welsh 2007, "Bootstrapping clustered data").
Several splits: Nadeau and Bengio 2003,
"Inference for the Generalization Error", Machine Learning 52, 239-281: splits share rows, so their
differences are correlated and the ordinary t interval is far too narrow.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import BadInput
from fedcore.learning.metrics import METRICS, Scores
from fedcore.learning.metrics.definition import Metric
from fedcore.learning.task import Task
from fedcore.results import ByMetric, Interval, SiteResult, SplitResult, Spread

PARTS: dict[str, tuple[str, str]] = {
    "total": ("centralised", "federated"),
    "federation": ("centralised", "federated_float"),
    "quantisation": ("federated_float", "federated_integer"),
    "protection": ("federated_integer", "federated"),
}
"""Part of the gap -> (arm that should be better, arm that lost)."""

PRIVATE_PARTS: dict[str, tuple[str, str]] = {
    **PARTS,
    "quantisation": ("federated_float", "federated_quantised"),
    "privacy": ("federated_quantised", "federated_integer"),
}
"""The same of a job with privacy, whose `quantisation` is clipping and rounding without noise."""

BESIDE = {"local_only": ("centralised", "local_only")}
"""In addition to the parts of the gap: what training alone loses against pooling."""

_CONFIDENCE = 0.95
_BLOCK = 1 << 20
"""Resampled rows held at once, so that memory does not grow with the number of resamples."""

T = TypeVar("T")


def bootstrap_gap(
    scores_by_arm: Mapping[str, Scores],
    metrics: Sequence[Metric],
    resamples: int = 1000,
    seed: int = 0,
    parts: Mapping[str, tuple[str, str]] = PARTS,
    groups: NDArray[np.int64] | None = None,
) -> dict[str, dict[str, Interval]]:
    """{part: {metric: Interval}} by a paired percentile bootstrap over test rows.

    Rows of all arms are aligned: row i is the same row in each. A part one of whose arms is missing
    has no entries. Resamples in which a metric is undefined (AUC of one class) are left out; with
    less than half of them left there is no interval. groups: (rows,) 0, 1, 2, ..., rows that are drawn together;
    None: each by itself. `parts` takes other pairs of arms as well,
    such as `{"local_only": ("centralised", "local_only")}`. Raises BadInput when rows differ.
    """
    wanted = {part: pair for part, pair in parts.items() if {*pair} <= scores_by_arm.keys()}
    arms = {arm: scores_by_arm[arm] for pair in wanted.values() for arm in pair}
    _require_aligned(arms)
    rows = len(next(iter(arms.values()))) if arms else 0
    values = _resampled_values(arms, metrics, rows, resamples, seed, groups)
    drawn = f"{rows} test rows"
    if groups is not None:
        drawn = f"{int(groups.max(initial=-1)) + 1} groups of {drawn}"
    method = f"95 % paired bootstrap over {drawn}, {resamples} resamples"
    gaps: dict[str, dict[str, Interval]] = {part: {} for part in parts}
    for part, (better, worse) in wanted.items():
        for metric in metrics:
            one, other = (values[arm][metric.name] for arm in (better, worse))
            lost = one - other if metric.higher_is_better else other - one
            low, high = _percentiles(lost[1:])
            mean = None if np.isnan(lost[0]) else float(lost[0])
            gaps[part][metric.name] = Interval(mean, low, high, method, rows)
    return gaps


def _require_aligned(arms: Mapping[str, Scores]) -> None:
    for arm, scores in arms.items():
        name, reference = next(iter(arms.items()))
        same = np.array_equal(scores.targets, reference.targets)
        if not (same and np.array_equal(scores.sites, reference.sites)):
            raise BadInput(
                f"gap: found other test rows in arm {arm} ({len(scores)}) than in {name} "
                f"({len(reference)}), expected the same rows in the same order"
            )


def _resampled_values(
    arms: Mapping[str, Scores],
    metrics: Sequence[Metric],
    rows: int,
    resamples: int,
    seed: int,
    groups: NDArray[np.int64] | None,
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """{arm: {metric: (1 + resamples,)}}: entry 0 is over every row once, NaN is undefined."""
    # Equal outputs share one computation: their gap is then exactly 0 by construction, not by trusting
    # a matrix product to round alike twice.
    twins = {
        arm: next((a for a in arms if np.array_equal(arms[a].outputs, own.outputs)), arm)
        for arm, own in arms.items()
    }
    values: dict[str, dict[str, list[NDArray[np.float64]]]] = {
        arm: {metric.name: [] for metric in metrics} for arm in twins.values()
    }
    for counts in _row_counts(rows, resamples, np.random.default_rng(seed), groups):
        for arm, by_metric in values.items():
            outputs, targets = arms[arm].outputs, arms[arm].targets
            for metric in metrics:
                by_metric[metric.name].append(metric.exact_resampled(outputs, targets, counts))
    return {
        arm: {name: np.concatenate(blocks) for name, blocks in values[twin].items()}
        for arm, twin in twins.items()
    }


def _row_counts(
    rows: int, resamples: int, rng: np.random.Generator, groups: NDArray[np.int64] | None = None
) -> Iterable[NDArray[np.int64]]:
    """Blocks of (r, rows) int64: how often each row is drawn. The first block is every row once."""
    yield np.ones((1, rows), dtype=np.int64)
    if rows == 0:
        yield np.zeros((resamples, 0), dtype=np.int64)
        return
    block, units = max(1, _BLOCK // rows), rows if groups is None else int(groups.max()) + 1
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = rng.integers(0, units, size=(size, units)) + units * np.arange(size)[:, None]
        counts = np.bincount(drawn.reshape(-1), minlength=size * units)
        of_units = counts.reshape(size, units).astype(np.int64)
        yield of_units if groups is None else of_units[:, groups]


def _percentiles(lost: NDArray[np.float64]) -> tuple[float | None, float | None]:
    defined = lost[~np.isnan(lost)]
    if len(defined) == 0 or 2 * len(defined) < len(lost):
        return None, None
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


def lower_is_better(task: Task) -> list[str]:
    """The task's metrics that are errors: built-in ones, and those it declares of its own."""
    built_in = METRICS if task.evaluate is None else {}
    errors = {name for name, metric in built_in.items() if not metric.higher_is_better}
    return [name for name in task.metrics if name in errors.union(task.lower_is_better)]


def plain_gaps(
    values: Mapping[str, ByMetric],
    better: str,
    worse: str,
    names: Sequence[str],
    errors: Sequence[str],
) -> dict[str, Interval]:
    """Differences without an interval: a task's own `evaluate` gives no per-row values."""
    if better not in values or worse not in values:
        return {}
    method = "difference; no interval, since task.evaluate gives no per-row values"
    found = {}
    for name in names:
        a, b = values[better][name], values[worse][name]
        mean = None if a is None or b is None else (b - a if name in errors else a - b)
        found[name] = Interval(mean, None, None, method, 0)
    return found


def nadeau_bengio(differences: Sequence[float], test_fraction_ratio: float) -> Interval:
    """The corrected resampled t interval: mean +- t_{J-1} * sqrt(var * (1/J + n_test/n_train)).

    differences: one per split (seed and fold), each over that split's test rows; var has J - 1 in
    its denominator. test_fraction_ratio: n_test / n_train, 1/(folds - 1) under k folds. With J = 1
    there is no interval; with J = 0 no mean either. Raises BadInput unless the ratio is positive.
    """
    if not test_fraction_ratio > 0:
        raise BadInput(f"test/train ratio: found {test_fraction_ratio}, expected a number above 0")
    splits = len(differences)
    method = f"95 % Nadeau-Bengio corrected t over {splits} splits"
    if splits == 0:
        return Interval(None, None, None, method, 0)
    values = np.asarray(differences, dtype=np.float64)
    # The mean of equal numbers can differ from them in its last bit; here it must not.
    constant = bool((values == values[0]).all())
    mean = float(values[0] if constant else values.mean())
    if splits == 1:
        return Interval(mean, None, None, method, 1)
    from scipy.special import (
        stdtrit,  # of scipy.stats, which takes a second to import, it is `t.ppf`
    )

    variance = 0.0 if constant else float(values.var(ddof=1))
    error = float(np.sqrt(variance * (1 / splits + test_fraction_ratio)))
    reach = float(stdtrit(splits - 1, (1 + _CONFIDENCE) / 2)) * error
    return Interval(mean, mean - reach, mean + reach, method, splits)


def over_splits(
    cells: Sequence[SplitResult], test_fraction_ratio: float
) -> tuple[dict[str, dict[str, Spread]], dict[str, dict[str, Interval]], dict[str, SiteResult]]:
    """(arms, gap, per site) of all splits: means with corrected intervals (`nadeau_bengio`), and the standard
    deviation of the arms; per site only means, since sites have few rows.

    A value of None is left out of its own summary, whose `n` is the number of splits in it.
    """

    def interval(values: Sequence[float]) -> Interval:
        return nadeau_bengio(values, test_fraction_ratio)

    def spread(values: Sequence[float]) -> Spread:
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return Spread(**vars(interval(values)), sd=sd)

    def of_site(name: str) -> SiteResult:
        found = (cell.per_site[name] for cell in cells if name in cell.per_site)
        return SiteResult(arms=_collect(found, lambda v: float(np.mean(v)) if v else None))

    return (
        _collect((cell.arms for cell in cells), spread),
        _collect((cell.gap for cell in cells), interval),
        {name: of_site(name) for name in dict.fromkeys(n for c in cells for n in c.per_site)},
    )


def _collect(
    tables: Iterable[Mapping[str, ByMetric]], summary: Callable[[Sequence[float]], T]
) -> dict[str, dict[str, T]]:
    """{row: {metric: summary of its values that are not None}} over tables {row: {metric: value}}, order kept."""
    found: dict[str, dict[str, list[float]]] = {}
    for table in tables:
        for name, by_metric in table.items():
            for metric, value in by_metric.items():
                values = found.setdefault(name, {}).setdefault(metric, [])
                if value is not None:
                    values.append(float(value))
    return {
        name: {metric: summary(values) for metric, values in by_metric.items()}
        for name, by_metric in found.items()
    }
