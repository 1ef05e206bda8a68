"""Wide integers as b-bit limbs, one per field, so that their sums recombine exactly (PROTOCOL W).

Invariant: a limb is below 2^b, so a sum of n fits a field; recombining the summed limbs gives the sum
of the integers, because `sum_i sum_j 2^(b j) limb_ij = sum_j 2^(b j) sum_i limb_ij`.
"""

from collections.abc import Sequence
from operator import index as index_of

import numpy as np

from fedcore.errors import BadInput
from fedcore.types import Fields


def limb_count(wide_bits: int, bits: int) -> int:
    """ceil(L / b): the number of fields for one integer of L = `wide_bits` bits."""
    return -(-wide_bits // bits)


def to_limbs(values: Sequence[int], wide_bits: int, bits: int) -> Fields:
    """(m,) integers in [0, 2^wide_bits) to (m * ceil(L / b),) fields, least significant limb first.

    Works on Python integers, since L may exceed 64. Raises BadInput outside the range, TypeError for a
    float, whose fraction would be lost.
    """
    count = limb_count(wide_bits, bits)
    mask = (1 << bits) - 1
    limbs = np.empty(len(values) * count, dtype=np.uint64)
    for index, value in enumerate(values):
        integer = index_of(value)
        if not 0 <= integer < 1 << wide_bits:
            raise BadInput(
                f"wide coordinate {index}: found a value outside its public cap of {wide_bits} bits",
                remedy="raise the cap it comes from (protect.max_examples, or the task's ranges)",
            )
        for limb in range(count):
            limbs[index * count + limb] = (integer >> (limb * bits)) & mask
    return limbs


def from_limbs(total: Fields, wide_bits: int, bits: int) -> list[int]:
    """(m * ceil(L / b),) summed limbs to m exact Python integers: the inverse of `to_limbs` under addition."""
    count = limb_count(wide_bits, bits)
    rows = total.reshape(-1, count).tolist()
    return [sum(limb << (place * bits) for place, limb in enumerate(row)) for row in rows]
