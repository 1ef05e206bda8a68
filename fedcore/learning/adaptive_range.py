"""The quantiser's range R of the next round, from two protected counts and one mark a site (PROTOCOL Q, G).

Invariant: R is a power of two times its start R_0, moves by one step a round at most, never exceeds
4 R_0, and follows from integer sums alone, so every site computes the same R. It grows only when at
least two sites exceed it, so one lying site cannot widen what it may then fill.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from fedcore.secagg.plan import RangePlan
from fedcore.types import FloatVector

CALIBRATION_EXPONENTS = tuple(range(-16, 8))
"""24 powers of two, 2^-16 to 2^7."""

TOO_MANY_OVER = Fraction(1, 1000)
TOO_FEW_OVER_HALF = Fraction(1, 100_000)

MOST_GROWTH = 4.0
"""R over R_0: two doublings. A wider range gives a dishonest site more influence on the model."""

LEAST_EXCEEDING = 2
"""Sites that must exceed R before it grows."""


def exceeds(over: int, coordinates: int) -> bool:
    """Whether a site's own update exceeds R as the rule counts it: in more than 1 of 1,000 coordinates."""
    return Fraction(over, max(coordinates, 1)) > TOO_MANY_OVER


def next_bound(
    bound: float,
    over: int,
    over_half: int,
    values: int,
    plan: RangePlan,
    *,
    first: float,
    sites: int,
) -> float:
    """R of the next round. over, over_half: summed counts; values: survivors * d, above 0.

    first: R_0. sites: how many survivors put the mark that their update exceeds R.
    """
    if not plan.adaptive or not values:
        return bound
    if Fraction(over, values) > TOO_MANY_OVER:
        if sites < LEAST_EXCEEDING:
            return bound
        return max(bound, min(bound * 2, first * MOST_GROWTH, plan.highest))
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
