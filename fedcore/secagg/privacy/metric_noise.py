"""Noise for the sums of a job's metrics: one more Gaussian release each time, of the job's own budget.

A test row adds a vector of bounded L2 norm to the sums of a metric (`ROW_NORMS`). With k metrics each is scaled to the
norm 1 / sqrt(k), so the sums of all of them together have sensitivity 1, and noise of `metric_multiplier`. Sums are
integers: multiplied by `grain` where a share would otherwise be below 4 units, with a share of noise, and with
`reach` added, so that no site's value is negative. Grain and reach are public; what is made of the opened sums
afterwards is post-processing.

Invariant: the sums of any test rows and of these rows with one more differ by 1 at most in the scaled norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedcore.errors import PlanRefused
from fedcore.secagg.privacy import noise

if TYPE_CHECKING:
    from fedcore.secagg.plan import Wide
    from fedcore.secagg.privacy.privacy_plan import PrivacyPlan

MERGED = 16
"""Bins of a histogram of scores that become one: with noise in each, 16 are better than 256."""

HISTOGRAM = "auc"
_HISTOGRAM_ENTRIES = 512
"""Entries of a histogram metric for each class: 256 bins of rows of the class, and of others."""

ROW_NORMS = {
    "accuracy": 2, "balanced_accuracy": 2, "f1": 3, "top_2_accuracy": 2, "top_3_accuracy": 2, "top_5_accuracy": 2,
    "top_10_accuracy": 2, HISTOGRAM: 1,
}  # fmt: skip
"""{metric that may have noise: the square of the L2 norm of what a test row adds to its sums}; of a histogram, for each
class."""


@dataclass(frozen=True)
class MetricNoise:
    """Of one metric's sums. grain: what a count is multiplied by; sigma: of one site's share; reach: its largest
    magnitude, which is added to every sum."""

    grain: int
    sigma: float
    reach: int


def _norm2(metric: str, count: int, bins: int) -> int:
    return ROW_NORMS[metric] * (count // (2 * bins) if metric == HISTOGRAM else 1)


def _noise(privacy: PrivacyPlan, norm2: int, metrics: int, threshold: int) -> MetricNoise:
    one = privacy.metric_multiplier * math.sqrt(norm2 * metrics / privacy.shares(threshold))
    grain = max(1, math.ceil(noise.LEAST_SIGMA / one))
    return MetricNoise(grain, grain * one, noise.reach_of(grain * one))


def with_room(sums: Sequence[Wide], privacy: PrivacyPlan, threshold: int) -> tuple[Wide, ...]:
    """The wide integers of a plan whose metrics have noise, from those of its task. Raises PlanRefused for a metric
    of which a row may change the sums by more than is known."""
    found = []
    for wide in sums:
        if wide.metric not in ROW_NORMS:
            raise PlanRefused(
                f"privacy.metric_share: found the metric {wide.name.partition(':')[2]!r}, expected "
                f"{', '.join(ROW_NORMS)}",
                remedy="name these in the task's metrics, or leave metric_share out: scores then stay at the sites",
            )
        histogram = wide.metric == HISTOGRAM
        count = wide.count // MERGED if histogram else wide.count
        norm2 = _norm2(wide.metric, wide.count, _HISTOGRAM_ENTRIES // 2)
        each = _noise(privacy, norm2, len(sums), threshold)
        if each.sigma > noise.MOST_SIGMA:
            raise PlanRefused(
                f"privacy.metric_share: found noise of {each.sigma:.3g} rows, expected at most {noise.MOST_SIGMA:g}",
                remedy="a larger share or epsilon, or no judge: metrics are then released once",
            )
        most = ((1 << wide.bits) - 1) * each.grain + 2 * each.reach
        found.append(replace(wide, count=count, bits=most.bit_length()))
    return tuple(found)


def noise_of(sums: Sequence[Wide], privacy: PrivacyPlan, threshold: int) -> dict[str, MetricNoise]:
    """{name of a wide integer of such a plan: its noise}; empty where metrics have none."""
    if not privacy.metric_share:
        return {}
    bins = _HISTOGRAM_ENTRIES // 2 // MERGED
    return {
        wide.name: _noise(
            privacy, _norm2(wide.metric, wide.count, bins), len(sums), threshold
        )
        for wide in sums
    }  # fmt: skip
