"""A site's metric sums with its share of noise in them, and what the opened sums say.

Bins of a histogram of scores are merged before, `MERGED` to one, and stand in the first of them afterwards: areas are
of the order of bins alone, so nothing else has to know of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedcore.learning.metrics.ranking import BINS
from fedcore.secagg.crypto.entropy import Entropy
from fedcore.secagg.plan import METRIC, RoundPlan
from fedcore.secagg.privacy.metric_noise import HISTOGRAM, MERGED
from fedcore.secagg.privacy.noise import draw

Sums = Mapping[str, Sequence[int]]

_HISTOGRAM = METRIC + HISTOGRAM

_WIDTH = {METRIC + "f1": 3}
"""Counts of a class, of which the first is the part of the others that is right; 2 where it is not here."""


def with_metric_noise(plan: RoundPlan, sums: Sums, entropy: Entropy) -> dict[str, list[int]]:
    """One site's metric sums as they travel: each times the grain, plus a share of noise, plus the reach."""
    found = {}
    for wide in plan.metric_sums:
        values, noise = np.asarray(sums[wide.name], dtype=np.int64), plan.metric_noise[wide.name]
        if wide.name == _HISTOGRAM:
            values = values.reshape(-1, MERGED).sum(axis=1)
        values = values * noise.grain + draw(wide.count, noise.sigma, entropy) + noise.reach
        assert 0 <= values.min() <= values.max() < 1 << wide.bits  # `metric_noise.with_room`
        found[wide.name] = values.tolist()
    return found


def without_offset(plan: RoundPlan, sums: Sums, sites: int) -> Sums:
    """The opened sums of so many sites as estimates of `grain` times the counts, none of them negative but bins of a
    histogram. As they are where the plan has no noise in its metrics; zeros where no site contributed any."""
    if not plan.metric_noise:
        return sums
    found = dict(sums)
    for name, noise in plan.metric_noise.items():
        if name not in sums:
            continue
        values = np.asarray(sums[name], dtype=np.int64)
        values = values - sites * noise.reach if values.any() else values
        found[name] = (_spread if name == _HISTOGRAM else _possible)(name, values).tolist()
    return found


def _possible(name: str, values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts as rows could have them: none negative, and not more rows right than there are."""
    groups = np.maximum(values, 0).reshape(-1, _WIDTH.get(name, 2))
    groups[:, 0] = groups.min(axis=1)
    return groups.reshape(-1)


def _spread(_: str, merged: NDArray[np.int64]) -> NDArray[np.int64]:
    """A histogram of all bins from one of merged bins; zeros for a class with no more than noise on one side."""
    found = np.zeros((len(merged), MERGED), dtype=np.int64)
    found[:, 0] = merged
    by_class = found.reshape(-1, 2, BINS)
    return np.where((by_class.sum(axis=2) > 0).all(axis=1)[:, None, None], by_class, 0).reshape(-1)
