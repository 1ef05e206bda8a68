"""What a sum of honest vectors can be; anything else is refused before it leads to a state (PROTOCOL U).

A dishonest site can put any integers into its fields. The sum tag holds for such a sum, since it proves whose
vectors were added and not what was in them. Here the opened integers are compared with public caps, so
that an impossible sum is one uniform refusal at every site instead of NaN, a crash or a hang at some.

Invariant: a function of the plan and the integers alone, so all sites refuse the same sums.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from fedcore.errors import ImpossibleSum
from fedcore.learning.data.statistics import FIXED_POINT_BITS, MIN_OBSERVED, SUMS
from fedcore.secagg.encode.pack import Opened
from fedcore.secagg.plan import RoundPlan, VectorSpec


def check_possible(
    plan: RoundPlan,
    spec: VectorSpec,
    opened: Opened,
    contributors: int,
    then: Callable[[Opened], None] = lambda _: None,
) -> None:
    """Raise ImpossibleSum where no vectors of `contributors` honest sites have this sum.

    spec: what the vectors hold. Checked: every coordinate within contributors * R; every wide integer
    within contributors times its cap; and what `then` checks of this kind of vector.
    """
    coordinates, top = opened.coordinates, (1 << plan.packing.bits) - 1
    if len(coordinates):
        low, high = int(coordinates.min()), int(coordinates.max())
        if low < contributors or high > contributors * top:
            expected = f"{contributors} to {contributors * top}"
            raise _impossible("coordinates", f"one from {low} to {high}", expected)
    for wide in spec.wides:
        most = contributors * _cap(plan, wide.name, wide.bits)
        found = max(opened.wides[wide.name], default=0)
        if found > most:
            raise _impossible(wide.name, found, f"at most {most}")
    then(opened)


def _cap(plan: RoundPlan, name: str, bits: int) -> int:
    """The largest honest value of one site: the public cap that its bits were made of, where it is known."""
    if bits == plan.weight_bits:
        return plan.max_examples
    if name in {"over_range", "over_half_range", "exceeding"}:
        return plan.coordinates
    return (1 << bits) - 1


def check_counts(opened: Opened) -> None:
    """Of an update: the weight at least 1, and not more coordinates over R than over R / 2."""
    wides = opened.wides
    if wides["weight"][0] < 1:
        raise _impossible("weight", wides["weight"][0], "at least 1")
    over, over_half = wides["over_range"][0], wides["over_half_range"][0]
    if over > over_half:
        raise _impossible("over_range", over, f"at most over_half_range, {over_half}")


def check_powers(opened: Opened) -> None:
    """Of a calibration: counts that decrease over the powers of two."""
    counts = opened.wides["exceeding"]
    if any(later > earlier for earlier, later in pairwise(counts)):
        raise _impossible("exceeding", "a count that grows", "fewer beyond larger powers of two")


def check_statistics(opened: Opened) -> None:
    """Of statistics, v in [0, top] for each observed row: S1 <= n top, S2 <= top S1, and Cauchy-Schwarz."""
    top, wides = (1 << FIXED_POINT_BITS) - 1, opened.wides
    for count, total, squares, sites, clipped in zip(*(wides[n] for n in SUMS), strict=True):
        for holds, found, expected in (
            (count >= MIN_OBSERVED * sites, f"{count} rows", f"{MIN_OBSERVED} a site"),
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
