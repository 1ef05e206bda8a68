"""From the integers of a released sum to the state they lead to: what every site computes alike.

Invariant: a function of the plan, the state before and the integers alone, in float64 operations that
round alike everywhere (PROTOCOL F), so that all sites sign the same next state (PROTOCOL R).

What no honest vectors can add up to is refused first (PROTOCOL U): a dishonest site can put any integers into
its fields, and the sum tag holds for them, since it proves whose vectors were added and not what was in them.
The opened integers are compared with public caps, so that an impossible sum is one uniform refusal at every
site instead of NaN, a crash or a hang at some.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from fedcore.errors import ImpossibleSum
from fedcore.learning.adaptive_range import (
    MOST_GROWTH,
    calibrated_bound,
    measured_anew,
    next_bound,
    outgrown,
)
from fedcore.learning.data import statistics
from fedcore.learning.optimisers import ServerState, largest_step
from fedcore.learning.robust import trimmed_mean
from fedcore.learning.rules import rules_of
from fedcore.learning.rules.parts import Summed
from fedcore.secagg.encode.pack import Opened
from fedcore.secagg.encode.quantise import dequantise
from fedcore.secagg.plan import EXCEEDS, WEIGHT, RoundPlan, VectorSpec
from fedcore.secagg.privacy.privacy_plan import SITE
from fedcore.types import Fields, SiteId, WideVector

if TYPE_CHECKING:
    from fedcore.learning.state import JobState


@dataclass(frozen=True)
class OpenedSum:
    """An opened sum, and what it takes to make a state of it.

    survivors: the sites in the sum. columns: those of federated statistics. allow_few_sites: whether a
    column that fewer than 3 sites have is taken. round: the training round.
    """

    opened: Opened
    survivors: Sequence[SiteId]
    columns: Sequence[statistics.Column] = ()
    allow_few_sites: bool = False
    round: int = 0


def standardised(plan: RoundPlan, state: JobState, found: OpenedSum) -> JobState:
    """The state with means and spreads, from the sums of a `statistics` vector.

    Raises ImpossibleSum, and Refused for a column of too few sites unless they are allowed.
    """
    spec = statistics.statistics_vector(len(found.columns), plan.max_examples)
    check_possible(plan, spec, found, _check_statistics)
    names, ranges = [name for name, *_ in found.columns], [(a, b) for _, a, b in found.columns]
    made = statistics.finish_statistics(
        names, ranges, found.opened.wides, allow_few_sites=found.allow_few_sites
    )
    return replace(state, statistics=made)


def calibrated(plan: RoundPlan, state: JobState, found: OpenedSum) -> JobState:
    """The state with R_0, from the sums of a `range` vector. Raises ImpossibleSum."""
    check_possible(plan, plan.range_vector, found, _check_powers)
    values = len(found.survivors) * plan.coordinates
    bound = calibrated_bound(found.opened.wides["exceeding"], values, plan.range)
    return replace(state, server=replace(state.server, bound=bound, first_bound=bound))


def applied(plan: RoundPlan, state: JobState, found: OpenedSum) -> JobState:
    """The state after an `update` vector: dequantise, weighted mean, server step, range. Raises ImpossibleSum."""
    check_possible(plan, plan.update_vector, found, _check_counts)
    server, opened, contributors = state.server, found.opened, len(found.survivors)
    mean = _mean(plan, opened, server.bound, found.survivors)
    if plan.privacy is not None and plan.privacy.unit != SITE:
        mean = decayed(plan, server, mean)
    moved = rules_of(plan.train).apply(plan, server, mean, Summed(contributors, found.round))
    over, over_half = opened.wides["over_range"][0], opened.wides["over_half_range"][0]
    values, first = contributors * plan.coordinates, server.first_bound
    marked = sum(opened.wides[EXCEEDS])
    if outgrown(over, values, plan.range, sites=marked, survivors=contributors):
        bound, first = measured_anew(server.bound, first, plan.range)
    else:
        bound = next_bound(
            server.bound, over, over_half, values, plan.range, first=first, sites=marked
        )
    with np.errstate(over="ignore"):  # beyond float32 is infinity, which is refused
        check_finite([moved.model, *moved.moments.values()])
    return replace(state, server=replace(moved, bound=bound, first_bound=first))


def decayed(plan: RoundPlan, server: ServerState, mean: WideVector) -> WideVector:
    """A step along gradients of rows, with that of the penalty, which is known to all: it is not in the sum and costs
    no privacy."""
    if not plan.train.weight_decay:
        return mean
    return mean - server.parameters * (plan.train.lr * plan.train.weight_decay)


def _mean(plan: RoundPlan, opened: Opened, bound: float, survivors: Sequence[SiteId]) -> WideVector:
    """(d,) float64: the weighted mean of what the sites sent; with groups, the trimmed mean of those of the groups."""
    parts = _parts(plan, opened, survivors)
    weights = opened.wides[WEIGHT]
    means = [
        dequantise(part, plan.packing.bits, bound, count) * (plan.max_examples / weight)
        for (part, count), weight in zip(parts, weights, strict=True)
    ]
    return means[0] if plan.server.groups is None else trimmed_mean(means, plan.server.groups.trim)


def _parts(
    plan: RoundPlan, opened: Opened, survivors: Sequence[SiteId]
) -> list[tuple[Fields, int]]:
    """(coordinates of one sum, its sites): one pair, or one for each group."""
    if plan.server.groups is None or not len(opened.coordinates):
        return [(opened.coordinates, len(survivors))]
    counts = [len(group) for group in plan.server.groups.survivors(survivors)]
    parts = opened.coordinates.reshape(len(counts), -1)
    return list(zip(parts, counts, strict=True))


def measured(plan: RoundPlan, state: JobState, found: OpenedSum) -> JobState:
    """The same state, after the sums of a `metrics` vector. Raises ImpossibleSum."""
    check_possible(plan, plan.metrics_vector, found)
    return state


def largest_move(plan: RoundPlan, first_bound: float) -> tuple[float, float]:
    """Bounds on what one released round adds to a parameter and to a buffer (PROTOCOL G).

    A sum of k updates is at most k R in every coordinate (another is refused), R never exceeds 4 R_0, and
    the weight that divides it is at least k steps.
    """
    bound = (
        min(first_bound * MOST_GROWTH, plan.range.highest) if plan.range.adaptive else first_bound
    )
    mean = bound * plan.max_examples / plan.weight_step
    step = largest_step(plan.server, mean)
    return rules_of(plan.train).largest_step(plan, step, mean), mean


def check_possible(
    plan: RoundPlan,
    spec: VectorSpec,
    found: OpenedSum,
    then: Callable[[Opened], None] = lambda _: None,
) -> None:
    """Raise ImpossibleSum where no vectors of so many honest sites have this sum.

    spec: what the vectors hold. Checked: every coordinate within sites * R; every wide integer within sites
    times its cap; and what `then` checks of this kind of vector.
    """
    opened, contributors = found.opened, len(found.survivors)
    coordinates, top = opened.coordinates, (1 << plan.packing.bits) - 1
    if len(coordinates):
        for part, count in _parts(plan, opened, found.survivors):
            low, high = int(part.min()), int(part.max())
            if low < count or high > count * top:
                expected = f"{count} to {count * top}"
                raise _impossible("coordinates", f"one from {low} to {high}", expected)
    for wide in spec.wides:
        most = contributors * _cap(plan, wide.name, wide.bits)
        largest = max(opened.wides[wide.name], default=0)
        if largest > most:
            raise _impossible(wide.name, largest, f"at most {most}")
    then(opened)


def _cap(plan: RoundPlan, name: str, bits: int) -> int:
    """The largest honest value of one site: the public cap that its bits were made of, where it is known."""
    if name in {"over_range", "over_half_range", "exceeding"}:
        return plan.coordinates
    if bits == plan.weight_bits and name not in plan.metric_noise:
        return plan.max_examples
    return (1 << bits) - 1


def _check_counts(opened: Opened) -> None:
    """Of an update: the weight at least 1, and not more coordinates over R than over R / 2."""
    wides = opened.wides
    if min(wides[WEIGHT]) < 1:
        raise _impossible(WEIGHT, min(wides[WEIGHT]), "at least 1")
    over, over_half = wides["over_range"][0], wides["over_half_range"][0]
    if over > over_half:
        raise _impossible("over_range", over, f"at most over_half_range, {over_half}")


def _check_powers(opened: Opened) -> None:
    """Of a calibration: counts that decrease over the powers of two."""
    counts = opened.wides["exceeding"]
    if any(later > earlier for earlier, later in pairwise(counts)):
        raise _impossible("exceeding", "a count that grows", "fewer beyond larger powers of two")


def _check_statistics(opened: Opened) -> None:
    """Of statistics, v in [0, top] for each observed row: S1 <= n top, S2 <= top S1, and Cauchy-Schwarz."""
    top, wides = (1 << statistics.FIXED_POINT_BITS) - 1, opened.wides
    for count, total, squares, sites, clipped in zip(
        *(wides[n] for n in statistics.SUMS), strict=True
    ):
        for holds, found, expected in (
            (
                count >= statistics.MIN_OBSERVED * sites,
                f"{count} rows",
                f"{statistics.MIN_OBSERVED} a site",
            ),
            (sites or not count, f"{count} rows of no site", "none"),
            (total <= count * top, f"S1 = {total}", f"at most {count * top}"),
            (squares <= total * top, f"S2 = {squares}", f"at most {total * top}"),
            (count * squares >= total * total, "n S2 < S1^2", "n S2 >= S1^2"),
            (clipped <= count, f"{clipped} clipped", f"at most {count}"),
        ):
            if not holds:
                raise _impossible("statistics", found, expected)


def check_finite(vectors: Sequence[np.ndarray[tuple[int], np.dtype[np.floating]]]) -> None:
    """Raise ImpossibleSum for a state with NaN or infinity."""
    if not all(np.isfinite(vector).all() for vector in vectors):
        raise _impossible("state", "NaN or infinity", "finite numbers")


def _impossible(what: str, found: object, expected: object) -> ImpossibleSum:
    return ImpossibleSum(f"sum: {what}", found=found, expected=expected, fault="a site in the sum")
