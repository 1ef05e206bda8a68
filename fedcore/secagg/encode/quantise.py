"""Floats to b-bit unsigned fields by stochastic rounding, and the sum of such fields back to floats.

Invariant: a field is in [1, 2^b - 1]; zero maps to the offset 2^(b-1) exactly, so the absence of an
update adds no noise. Rounding is unbiased, with an error of at most one step `R / (2^(b-1) - 1)` for each
coordinate. Clipped coordinates are counted (PROTOCOL Q).
Stochastic rounding: Gupta et al. 2015 (arXiv 1502.02551), section 3.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import BadInput
from fedcore.types import Fields, WideVector

BLOCK = 1 << 16
"""Coordinates per pass: the float64 temporaries of one pass stay in cache."""

SUM_BLOCK = 1 << 15
"""Values per pass over many sites, for the same reason: smaller, since a pass has the uniforms beside them."""


@dataclass(frozen=True)
class Quantised:
    """fields: (d,) uint64 in [1, 2^b - 1]; over / over_half: coordinates beyond R and beyond R / 2."""

    fields: Fields
    over: int
    over_half: int


@dataclass(frozen=True)
class QuantisedSum:
    """Of k vectors. total: (d,) uint64, the sum of their fields; over, over_half: (k,), as of `Quantised`."""

    total: Fields
    over: NDArray[np.int64]
    over_half: NDArray[np.int64]


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
    offset = 1 << (bits - 1)
    fields = np.empty(len(values), dtype=np.uint64)
    over = over_half = 0
    for start in range(0, len(values), BLOCK):
        # A copy, which is then worked on in place.
        block = np.array(values[start : start + BLOCK], dtype=np.float64)
        largest = _largest(block, start)
        if largest > bound / 2:
            magnitude = np.abs(block)
            over += int(np.count_nonzero(magnitude > bound))
            over_half += int(np.count_nonzero(magnitude > bound / 2))
        _to_levels(block, bits, bound, rng.random(len(block)), largest)
        block += offset
        fields[start : start + BLOCK] = block.astype(np.uint64)
    return Quantised(fields, over, over_half)


def quantise_sum(
    values: NDArray[np.float32],
    factors: NDArray[np.float64],
    bits: int,
    bound: float,
    rngs: Sequence[np.random.Generator],
) -> QuantisedSum:
    """The sum of the fields that `quantise` makes of each row times its factor, with the generator of that row.

    values: (k, d) float32; factors: (k,) float64; bits: 2 to 24, and k at most 2^28. No field is stored: k sites are
    rounded a block at a time, and their sum, a whole number below 2^53, is exact in float64. Raises BadInput on NaN or
    infinity.
    """
    count, width = values.shape
    total = np.zeros(width)
    over, over_half = np.zeros((2, count), dtype=np.int64)
    columns = min(width, SUM_BLOCK)
    rows = max(1, SUM_BLOCK // max(1, columns))
    uniforms = np.empty((min(rows, count), columns))
    for start in range(0, width, SUM_BLOCK):
        part = slice(start, min(start + SUM_BLOCK, width))
        for row in range(0, count, rows):
            some = slice(row, min(row + rows, count))
            block = np.multiply(values[some, part], factors[some, None], dtype=np.float64)
            largest = _largest(block, start)
            if largest > bound / 2:
                magnitude = np.abs(block)
                over[some] += np.count_nonzero(magnitude > bound, axis=1)
                over_half[some] += np.count_nonzero(magnitude > bound / 2, axis=1)
            drawn = uniforms[: block.shape[0], : block.shape[1]]
            for place, rng in enumerate(rngs[some]):
                rng.random(out=drawn[place])
            _to_levels(block, bits, bound, drawn, largest)
            total[part] += block.sum(axis=0)
    total += count << (bits - 1)
    return QuantisedSum(total.astype(np.uint64), over, over_half)


def _largest(block: WideVector, start: int) -> float:
    """The largest magnitude of a block. Raises BadInput on NaN or infinity; start: its first coordinate."""
    largest = max(float(block.max(initial=0.0)), -float(block.min(initial=0.0)))
    if not math.isfinite(largest):
        where = start + int(np.argwhere(~np.isfinite(block))[0][-1])
        raise BadInput(
            f"update: found NaN or infinity at coordinate {where}, expected finite numbers",
            remedy="lower train.lr, or look for NaN in the site's data",
        )
    return largest


def _to_levels(
    block: WideVector, bits: int, bound: float, uniforms: WideVector, largest: float
) -> None:
    """Clip, scale and round a block in place, up with the probability of what is missing: whole numbers in
    [-levels, levels]. uniforms: in [0, 1), one for each value."""
    levels = (1 << (bits - 1)) - 1
    if largest > bound:
        np.clip(block, -bound, bound, out=block)
    block *= levels / bound
    block += uniforms
    np.floor(block, out=block)
    if largest > 0.99 * bound:
        # x = bound with u close to 1 may round up to levels + 1 through the last bit of the
        # product. Further inside, that last bit is far smaller than what is missing to a step.
        np.clip(block, -levels, levels, out=block)


def dequantise(total: Fields, bits: int, bound: float, contributors: int) -> WideVector:
    """The sum of `contributors` quantised vectors as float64, inverse of `quantise` under addition.

    The offsets are subtracted as integers, so the only float operations are one conversion and one
    product per coordinate (PROTOCOL F). The error is less than `contributors * step`.
    """
    offset = contributors << (bits - 1)
    centred = total.astype(np.int64) - offset
    return centred.astype(np.float64) * step_size(bits, bound)
