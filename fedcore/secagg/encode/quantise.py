"""Floats to b-bit unsigned fields by stochastic rounding, and the sum of such fields back to floats.

Invariant: a field is in [1, 2^b - 1]; zero maps to the offset 2^(b-1) exactly, so the absence of an
update adds no noise. Rounding is unbiased, with an error of at most one step `R / (2^(b-1) - 1)` for each
coordinate. Clipped coordinates are counted (PROTOCOL Q).
Stochastic rounding: Gupta et al. 2015 (arXiv 1502.02551), section 3.
"""

from dataclasses import dataclass

import numpy as np

from fedcore.errors import BadInput
from fedcore.types import Fields, WideVector

BLOCK = 1 << 16
"""Coordinates per pass: the float64 temporaries of one pass stay in cache."""


@dataclass(frozen=True)
class Quantised:
    """fields: (d,) uint64 in [1, 2^b - 1]; over / over_half: coordinates beyond R and beyond R / 2."""

    fields: Fields
    over: int
    over_half: int


def step_size(bits: int, bound: float) -> float:
    """The quantisation step R / (2^(b-1) - 1): the distance between neighbouring levels. bound: R."""
    return bound / ((1 << (bits - 1)) - 1)


def quantise(
    values: WideVector | np.ndarray[tuple[int], np.dtype[np.float32]],
    bits: int,
    bound: float,
    rng: np.random.Generator,
) -> Quantised:
    """Map (d,) floats, clipped to [-bound, bound], to unsigned b-bit fields.

    values: (d,) float32 or float64; bits: 2 to 24; rng: for the stochastic rounding.
    `E[dequantise(quantise(x))] = x` for |x| <= bound. Raises BadInput on NaN or infinity.
    """
    levels = (1 << (bits - 1)) - 1
    offset = 1 << (bits - 1)
    fields = np.empty(len(values), dtype=np.uint64)
    over = over_half = 0
    for start in range(0, len(values), BLOCK):
        block = np.asarray(values[start : start + BLOCK], dtype=np.float64)
        magnitude = np.abs(block)
        largest = magnitude.max(initial=0.0)
        if not np.isfinite(largest):
            where = start + int(np.flatnonzero(~np.isfinite(block))[0])
            raise BadInput(
                f"update: found NaN or infinity at coordinate {where}, expected finite numbers",
                remedy="lower train.lr, or look for NaN in the site's data",
            )
        if largest > bound / 2:
            over += int(np.count_nonzero(magnitude > bound))
            over_half += int(np.count_nonzero(magnitude > bound / 2))
        scaled = np.clip(block, -bound, bound) if largest > bound else block
        scaled = scaled * (levels / bound)
        scaled += rng.random(len(block))
        np.floor(scaled, out=scaled)
        if largest > 0.99 * bound:
            # x = bound with u close to 1 may round up to levels + 1 through the last bit of the
            # product. Further inside, that last bit is far smaller than what is missing to a step.
            np.clip(scaled, -levels, levels, out=scaled)
        scaled += offset
        fields[start : start + BLOCK] = scaled.astype(np.uint64)
    return Quantised(fields, over, over_half)


def dequantise(total: Fields, bits: int, bound: float, contributors: int) -> WideVector:
    """The sum of `contributors` quantised vectors as float64, inverse of `quantise` under addition.

    The offsets are subtracted as integers, so the only float operations are one conversion and one
    product per coordinate (PROTOCOL F). The error is less than `contributors * step`.
    """
    offset = contributors << (bits - 1)
    centred = total.astype(np.int64) - offset
    return centred.astype(np.float64) * step_size(bits, bound)
