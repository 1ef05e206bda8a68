"""Exact intervals for shares, and how many rows a false positive rate takes."""

from __future__ import annotations

import math

LEVEL = 0.95


def share_interval(hits: int, trials: int, level: float = LEVEL) -> tuple[float, float]:
    """The interval of Clopper and Pearson (1934) for a share of `hits` in `trials`, each end with (1 - level) / 2
    beyond it; (0, 1) without trials."""
    from scipy.special import betaincinv

    if trials == 0:
        return 0.0, 1.0
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else float(betaincinv(hits, trials - hits + 1, tail))
    high = 1.0 if hits == trials else float(betaincinv(hits + 1, trials - hits, 1 - tail))
    return low, high


def least_non_members(rate: float) -> int:
    """Rows that were not trained on which a claim of this false positive rate takes: with none of them accepted, the
    rate is below it with a confidence of 95 %. 299 for 1 %, 2,995 for 0.1 %."""
    return math.ceil(math.log(1 - LEVEL) / math.log1p(-rate))
