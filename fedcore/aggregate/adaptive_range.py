"""The quantiser's range R of the next round, from two protected counts (PROTOCOL Q).

Invariant: R is a power of two times its start, moves by one step a round at most, and follows from
integer sums alone, so every site computes the same R and a lying site can move it one step, no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from fedcore.plan import RangePlan
from fedcore.types import FloatVector

CALIBRATION_EXPONENTS = tuple(range(-16, 8))
"""24 powers of two, 2^-16 to 2^7."""

TOO_MANY_OVER = Fraction(1, 1000)
TOO_FEW_OVER_HALF = Fraction(1, 100_000)


def next_bound(bound: float, over: int, over_half: int, values: int, plan: RangePlan) -> float:
    """R of the next round. over, over_half: summed counts; values: survivors * d, above 0."""
    if not plan.adaptive or not values:
        return bound
    if Fraction(over, values) > TOO_MANY_OVER:
        return min(bound * 2, plan.highest)
    if Fraction(over_half, values) < TOO_FEW_OVER_HALF:
        return max(bound / 2, plan.lowest)
    return bound


def exceedance_counts(update: FloatVector) -> list[int]:
    """How many coordinates of a weighted update lie beyond each calibration power of two."""
    magnitude = np.abs(update)
    return [int(np.count_nonzero(magnitude > 2.0**exponent)) for exponent in CALIBRATION_EXPONENTS]


def calibrated_bound(counts: Sequence[int], values: int, plan: RangePlan) -> float:
    """R_0: the smallest power of two that at most one coordinate in a thousand exceeds."""
    for exponent, count in zip(CALIBRATION_EXPONENTS, counts, strict=True):
        if Fraction(count, max(values, 1)) <= TOO_MANY_OVER:
            return min(max(2.0**exponent, plan.lowest), plan.highest)
    return min(2.0 ** CALIBRATION_EXPONENTS[-1], plan.highest)
