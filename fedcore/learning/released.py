"""From the integers of a released sum to the state they lead to: what every site computes alike.

Invariant: a function of the plan, the state before and the integers alone, in float64 operations that
round alike everywhere (PROTOCOL F), so that all sites sign the same next state (PROTOCOL R).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedcore.learning.adaptive_range import MOST_GROWTH, calibrated_bound, next_bound
from fedcore.learning.data.statistics import (
    Column,
    Statistics,
    finish_statistics,
    statistics_vector,
)
from fedcore.learning.optimisers import ServerState, apply_update, largest_step
from fedcore.learning.possible import (
    check_counts,
    check_finite,
    check_possible,
    check_powers,
    check_statistics,
)
from fedcore.secagg.encode.pack import Opened
from fedcore.secagg.encode.quantise import dequantise
from fedcore.secagg.plan import EXCEEDS, RoundPlan


def finished(
    plan: RoundPlan,
    columns: Sequence[Column],
    opened: Opened,
    contributors: int,
    *,
    allow_few_sites: bool,
) -> Statistics:
    """Means and spreads, from the sums of a `statistics` vector. contributors: sites in the sum.

    Raises ImpossibleSum, and Refused for a column of too few sites unless they are allowed.
    """
    names, ranges = [each[0] for each in columns], [(each[1], each[2]) for each in columns]
    spec = statistics_vector(len(names), plan.max_examples)
    check_possible(plan, spec, opened, contributors, check_statistics)
    return finish_statistics(names, ranges, opened.wides, allow_few_sites=allow_few_sites)


def calibrated(
    plan: RoundPlan, state: ServerState, opened: Opened, contributors: int
) -> ServerState:
    """The state with R_0, from the sums of a `range` vector. contributors: sites in the sum.

    Raises ImpossibleSum.
    """
    check_possible(plan, plan.range_vector, opened, contributors, check_powers)
    values = contributors * plan.coordinates
    found = calibrated_bound(opened.wides["exceeding"], values, plan.range)
    return replace(state, bound=found, first_bound=found)


def applied(plan: RoundPlan, state: ServerState, opened: Opened, contributors: int) -> ServerState:
    """The state after an `update` vector: dequantise, weighted mean, server step, range.

    contributors: sites in the sum. Raises ImpossibleSum.
    """
    check_possible(plan, plan.update_vector, opened, contributors, check_counts)
    sums = dequantise(opened.coordinates, plan.packing.bits, state.bound, contributors)
    mean = sums * (plan.max_examples / opened.wides["weight"][0])
    moved = apply_update(state, mean, plan.parameters, plan.server)
    bound = next_bound(
        state.bound,
        opened.wides["over_range"][0],
        opened.wides["over_half_range"][0],
        contributors * plan.coordinates,
        plan.range,
        first=state.first_bound,
        sites=sum(opened.wides[EXCEEDS]),
    )
    with np.errstate(over="ignore"):  # beyond float32 is infinity, which is refused
        check_finite([moved.model, *moved.moments.values()])
    return replace(moved, bound=bound)


def largest_move(plan: RoundPlan, first_bound: float) -> tuple[float, float]:
    """Bounds on what one released round adds to a parameter and to a buffer (PROTOCOL G).

    A sum of k updates is at most k R in every coordinate (another is refused), R never exceeds 4 R_0, and
    the weight that divides it is at least k steps.
    """
    bound = (
        min(first_bound * MOST_GROWTH, plan.range.highest) if plan.range.adaptive else first_bound
    )
    mean = bound * plan.max_examples / plan.weight_step
    return largest_step(plan.server, mean), mean
