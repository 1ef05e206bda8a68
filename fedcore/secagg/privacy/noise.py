"""Integer noise for protected sums: the discrete Gaussian distribution, drawn from `Entropy` alone; and samples.

Invariant: a value depends on `Entropy` only, never on a run's seed or on a generator that can be repeated. Values
are integers within `reach`, so a vector with room for `reach` more never overflows.

A table holds the cumulative distribution of the magnitude as integers of 127 bits, made with 256-bit integer
arithmetic. A draw compares 63 random bits with it; where these equal the first 63 bits of an entry, 64 more decide.
No float stands between randomness and value, so there are no holes as floating-point samplers have them
(Mironov 2012). The distance in total variation from the exact law is below 2^-80 a value (`CUT`).

Discrete Gaussian: P(k) proportional to exp(-k^2 / (2 sigma^2)); Canonne, Kamath, Steinke 2020 (arXiv 2004.00010). A
sum of such shares, each of standard deviation 4 or more, is within a factor of 1 + 1e-67 of one discrete Gaussian
(Kairouz, Liu, Steinke 2021, arXiv 2102.06387, theorem 5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from math import ceil

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import BadInput
from fedcore.secagg.crypto.entropy import Entropy
from fedcore.secagg.crypto.symmetric import KEY_BYTES, keystream

CUT = 10.6
"""Beyond so many standard deviations nothing is drawn: the mass there is below 2 exp(-10.6^2 / 2) < 2^-80."""

DISTANCE = 2.0**-79
"""Bound on the total variation distance of one value from the exact law: the cut, and rounding to 127 bits."""

LEAST_SIGMA, MOST_SIGMA = 4.0, float(1 << 16)
"""Below 4, sums of shares are not close to one Gaussian; at 2^16 a table takes a second to make, once a process."""

_TABLE_BITS, _WORD_BITS = 127, 64
_FINE = 256
"""Fractional bits while the table is made."""


def reach_of(sigma: float) -> int:
    """The largest magnitude that is drawn for this standard deviation."""
    return ceil(CUT * sigma)


@dataclass(frozen=True)
class _Table:
    """first: (reach + 1,) uint64, the first 63 bits of round(2^127 P(|X| <= m)), m from 0. rest: the other 64."""

    first: NDArray[np.uint64]
    rest: NDArray[np.uint64]


@lru_cache(maxsize=8)
def _table(sigma: float) -> _Table:
    reach = reach_of(sigma)
    with localcontext() as context:
        context.prec = 120
        # exp(-(k+1)^2 / 2s^2) = exp(-k^2 / 2s^2) q^(2k + 1), with q = exp(-1 / 2s^2)
        q = int((-1 / (2 * Decimal(sigma) ** 2)).exp() * (1 << _FINE))
    weights, weight, ratio, square = [], 1 << _FINE, q, (q * q) >> _FINE
    for _ in range(reach + 1):
        weights.append(weight)
        weight = (weight * ratio) >> _FINE
        ratio = (ratio * square) >> _FINE
    total = weights[0] + 2 * sum(weights[1:])
    below, first, rest = 0, [], []
    for magnitude, weight in enumerate(weights):
        below += weight if magnitude == 0 else 2 * weight
        entry = (below << _TABLE_BITS) // total
        first.append(entry >> _WORD_BITS)
        rest.append(entry & ((1 << _WORD_BITS) - 1))
    return _Table(np.array(first, dtype=np.uint64), np.array(rest, dtype=np.uint64))


def draw(count: int, sigma: float, entropy: Entropy) -> NDArray[np.int64]:
    """(count,) int64 values of the discrete Gaussian with parameter sigma, each of magnitude `reach_of(sigma)` at most.

    sigma: in grid units, 4 to 2^16. Raises BadInput outside.
    """
    if not LEAST_SIGMA <= sigma <= MOST_SIGMA:
        raise BadInput(
            f"noise: found a standard deviation of {sigma:g} grid units, expected {LEAST_SIGMA:g} to {MOST_SIGMA:g}"
        )
    stream = keystream(entropy.draw(KEY_BYTES))

    def words(size: int) -> NDArray[np.uint64]:
        return np.frombuffer(stream.update(bytes(8 * size)), "<u8").astype(np.uint64)

    return _values(_table(sigma), count, words)


def sample(count: int, rate: float, entropy: Entropy) -> NDArray[np.bool_]:
    """(count,): for each of so many units whether it is in a round, with probability `rate` each, rounded down to 63
    bits. Drawn from `Entropy` alone, so that nobody else can know it."""
    if rate == 1:
        return np.ones(count, dtype=np.bool_)
    words = np.frombuffer(keystream(entropy.draw(KEY_BYTES)).update(bytes(8 * count)), "<u8")
    return (words >> np.uint64(1)) < np.uint64(int(rate * (1 << 63)))


def _values(
    table: _Table, count: int, words: Callable[[int], NDArray[np.uint64]]
) -> NDArray[np.int64]:
    """words(n): the next n uniform words."""
    found = words(count)
    negative, value = (found & np.uint64(1)).astype(bool), found >> np.uint64(1)
    # The magnitude is the number of entries that are not above the random number.
    magnitude = np.searchsorted(table.first, value, side="left").astype(np.int64)
    equal = np.searchsorted(table.first, value, side="right") > magnitude
    for place in np.flatnonzero(equal):  # once in 2^63 draws for each entry
        magnitude[place] = _decide(table, int(value[place]), int(words(1)[0]))
    np.minimum(magnitude, len(table.first) - 1, out=magnitude)
    return np.where(negative, -magnitude, magnitude)


def _decide(table: _Table, first: int, rest: int) -> int:
    """How many entries are at most (first, rest), a number of 127 bits in two words."""
    start, end = (
        int(np.searchsorted(table.first, np.uint64(first), side=side)) for side in ("left", "right")
    )  # fmt: skip
    return start + int(np.searchsorted(table.rest[start:end], np.uint64(rest), side="right"))
