"""The quantiser's range R of the next round, from two protected counts and one mark a site (PROTOCOL Q, G).

Invariant: R is a power of two times its start R_0, moves by one step a round at most, never exceeds
4 R_0, and follows from integer sums alone, so every site computes the same R. It grows only when at
least two sites exceed it, so one lying site cannot widen what it may then fill.

A calibrated R_0 is measured anew where the updates of every site in the sum have outgrown it (`outgrown`): so
updates that were tiny at calibration are not clipped for ever. R is then at most 4 times what every site was
seen to exceed, so a lying site gets no more of it than honest updates are large.
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

UNSEEN = 2.0**-6
"""R after a calibration that saw no update, once every site has one: what it is then is known of no site."""


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


def outgrown(over: int, values: int, plan: RangePlan, *, sites: int, survivors: int) -> bool:
    """Whether R_0 is to be measured anew: every survivor put the mark that it exceeds R, and more than half of
    all coordinates do. Not for a range that the job states: that one is public and stays.

    sites: how many put it. A lying site can claim any count, but not the marks of the honest ones.
    """
    every = sites == survivors >= LEAST_EXCEEDING
    return (
        plan.adaptive and plan.start is None and every and Fraction(over, values) > Fraction(1, 2)
    )


def measured_anew(bound: float, first: float, plan: RangePlan) -> tuple[float, float]:
    """(R, R_0) after a round in which the updates of all sites had outgrown R: 4 R, which also becomes R_0 unless
    it was larger. From the smallest R_0 there is, of a calibration that saw no update, UNSEEN at least."""
    least = UNSEEN if first <= 2.0 ** CALIBRATION_EXPONENTS[0] else 0.0
    grown = min(max(bound * MOST_GROWTH, least), plan.highest)
    return max(grown, bound), max(grown, first)


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
