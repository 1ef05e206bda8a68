"""What rounds of Gaussian noise over secret samples cost: numerical accounting by privacy loss distributions.

In each round each unit takes part with probability q, independently, and only its site knows whether it did. Whoever
looks sees a mixture: N(0, z^2) without the unit, (1 - q) N(0, z^2) + q N(1, z^2) with it, in units of the sensitivity
(the dominating pair of Zhu, Dong, Wang 2022, arXiv 2106.08567, theorem 11). Both directions, a unit added and a unit
removed, are accounted, and the larger epsilon counts.

The loss log(dP/dQ) of a round is put on a grid: the mass of each cell between two grid points goes to these two so
that its mass under P and under Q is kept ("connect the dots", Doroshenko et al. 2022, arXiv 2207.04380), which never
makes delta smaller. Rounds are composed by one FFT; what is beyond its window (Chernoff) and beyond the grid counts as
infinite loss. So epsilon is an upper bound but for the rounding of floats, for which `_FLOATS` is added to delta.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_FLOATS = 1e-11
"""Added to delta: more than the FFT's rounding changes any tail."""

_FAR = 9.5
"""Standard deviations after which the grid ends: 1e-21 of the mass."""

_FINE, _FINE_IN_ALL = 20, 1000
"""Cells in a standard deviation of one round's loss, and of that of all rounds: epsilon is then within 0.2 %."""

_MOST_CELLS, _MOST_POINTS = 1 << 17, 1 << 21
"""Of the grid of a round, whose cells are wider where it would have more; of a window, beyond which there is no bound.
A coordinator chooses the settings that sites account for, so the time is bounded."""

_POWERS = 2.0 ** np.arange(-6, 40)
"""Of the Chernoff bound."""


class Round(NamedTuple):
    """One kind of round. noise_multiplier: z, > 0; sample_rate: q, in (0, 1]."""

    noise_multiplier: float
    sample_rate: float = 1.0


Rounds = Mapping[Round, int]
"""How many rounds of each kind there were."""


class _Losses(NamedTuple):
    """Of one round: mass[i] at loss (start + i) * width; the rest is infinite."""

    start: int
    mass: NDArray[np.float64]


_erfc = np.frompyfunc(math.erfc, 1, 1)


def _between(low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
    """P(low < N(0, 1) <= high), of the tail on whose side the interval is."""
    sign = np.where(low > 0, 1.0, -1.0) / math.sqrt(2)
    tails = [np.asarray(_erfc(sign * edge), dtype=np.float64) / 2 for edge in (low, high)]
    found: NDArray[np.float64] = np.abs(tails[0] - tails[1])
    return found


def _cells(kind: Round, width: float, last: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(mass with the unit, mass without) of each cell of losses from -last * width to last * width; (2 last,)."""
    z, q = kind
    edges = np.arange(-last, last + 1) * width
    floor = math.log1p(-q) if q < 1 else -math.inf  # no loss is smaller
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = -np.expm1(np.minimum(floor - edges, 0.0))
        x = z * z * (edges + np.log(inside) - math.log(q)) + 0.5
    x[edges <= floor] = -math.inf
    without = _between(x[:-1] / z, x[1:] / z)
    shifted = _between((x[:-1] - 1) / z, (x[1:] - 1) / z)
    return (1 - q) * without + q * shifted, without


def _on_grid(
    p: NDArray[np.float64], q: NDArray[np.float64], width: float, last: int
) -> NDArray[np.float64]:
    """The mass of each cell, split between its two ends so that both masses are kept; (2 last + 1,)."""
    upper_edge = np.exp(np.minimum(np.arange(-last + 1, last + 1) * width, 700.0))
    low = np.clip((upper_edge * q - p) / math.expm1(width), 0.0, p)
    found = np.zeros(2 * last + 1)
    found[:-1] += low
    found[1:] += p - low
    return found


def _spread(kind: Round) -> float:
    """About the standard deviation of one round's loss."""
    return kind.sample_rate * math.sqrt(math.expm1(min(kind.noise_multiplier**-2, 50.0)))


def _largest(kind: Round) -> float:
    """The loss at which a round's grid ends."""
    z, q = kind
    found = (2 * (1 + _FAR * z) - 1) / (2 * z * z)
    if q == 1:
        return found
    return max(math.log1p(q * math.expm1(min(found, 700.0))), -math.log1p(-q))


@lru_cache(maxsize=64)
def _losses(kind: Round, width: float) -> tuple[_Losses, _Losses]:
    """Of a unit removed, and of a unit added."""
    last = math.ceil(_largest(kind) / width) + 1
    with_unit, without = _cells(kind, width, last)
    removed = _on_grid(with_unit, without, width, last)
    # The loss of the other direction is the negative one, so its cells are the same in reverse order.
    added = _on_grid(without[::-1], with_unit[::-1], width, last)
    # Mass below the grid counts as at its first point, mass above as infinite.
    removed[0] += _below(kind, width, last, with_it=True)
    added[0] += _below(kind, width, last, with_it=False)
    return _Losses(-last, removed), _Losses(-last, added)


def _below(kind: Round, width: float, last: int, *, with_it: bool) -> float:
    """Mass of losses below the grid: with the unit, of `removed`; without it, of `added`."""
    z, q = kind
    edge = last * width
    if with_it:  # x below that of the loss -edge
        inside = -math.expm1(min((math.log1p(-q) if q < 1 else -math.inf) + edge, 0.0))
        if inside <= 0:
            return 0.0
        x = z * z * (-edge + math.log(inside) - math.log(q)) + 0.5
        lower = 0.5 * math.erfc(-x / z / math.sqrt(2))
        return (1 - q) * lower + q * 0.5 * math.erfc(-(x - 1) / z / math.sqrt(2))
    # x above that of the loss +edge, where the unit is not
    inside = -math.expm1((math.log1p(-q) if q < 1 else -math.inf) - edge)
    x = z * z * (edge + math.log(inside) - math.log(q)) + 0.5
    return 0.5 * math.erfc(x / z / math.sqrt(2))


def _bound(parts: list[tuple[_Losses, int]], width: float, slack: float, sign: int) -> float:
    """Beyond this loss the sum of all rounds has at most `slack` of its mass; sign 1: above, -1: below."""
    best = math.inf
    for power in _POWERS:
        total = math.log(1 / slack)
        for losses, count in parts:
            filled = np.flatnonzero(losses.mass)
            exponents = sign * power * width * (losses.start + filled) + np.log(losses.mass[filled])
            top = exponents.max()
            total += count * (top + math.log(np.exp(exponents - top).sum()))
        best = min(best, total / power)
    return sign * best


def _epsilon(parts: list[tuple[_Losses, int]], width: float, delta: float) -> float:
    """The smallest epsilon of rounds of one direction at this delta; infinity where there is none."""
    slack = delta * 1e-4
    low, high = (_bound(parts, width, slack, sign) for sign in (-1, 1))
    first = math.floor(low / width)
    points = math.ceil(high / width) - first + 2
    if points > _MOST_POINTS:
        return math.inf
    size = 1 << max(4, (points - 1).bit_length())
    spectrum, finite = np.ones(size // 2 + 1, dtype=np.complex128), 0.0
    for losses, count in parts:
        places = (losses.start + np.arange(len(losses.mass))) % size
        spectrum *= np.fft.rfft(np.bincount(places, losses.mass, minlength=size)) ** count
        finite += count * math.log(min(1.0, float(losses.mass.sum())))
    mass = np.maximum(np.roll(np.fft.irfft(spectrum, size), -(first % size)), 0.0)
    infinite = -math.expm1(finite) + slack + _FLOATS
    # delta(e) = infinite + sum over losses l > e of mass(l) (1 - exp(e - l))
    losses_at = (first + np.arange(size)) * width
    above = np.cumsum(mass[::-1])[::-1]
    scaled = np.cumsum((mass * np.exp(-np.clip(losses_at, -700.0, 700.0)))[::-1])[::-1]
    if infinite >= delta:
        return math.inf
    at_grid = infinite + above - np.exp(np.clip(losses_at, -700.0, 700.0)) * scaled
    place = int(np.flatnonzero(at_grid > delta).max(initial=-1)) + 1
    if place >= size or scaled[place] <= 0:
        return float(max(0.0, losses_at[min(place, size - 1)]))
    # Between two points delta is linear in exp(e).
    return max(0.0, math.log((infinite + above[place] - delta) / scaled[place]))


def sampled_epsilon(rounds: Rounds, delta: float) -> float:
    """Epsilon of all these rounds together at this delta, adding or removing one unit; infinity where no bound is
    found. Not of samples that somebody knows beside the site: there q is 1."""
    wanted = {kind: count for kind, count in rounds.items() if count > 0}
    if not wanted:
        return 0.0
    spread = math.sqrt(sum(count * _spread(kind) ** 2 for kind, count in wanted.items()))
    width = min(min(map(_spread, wanted)) / _FINE, spread / _FINE_IN_ALL, 1e-2)
    width = max(width, max(map(_largest, wanted)) / _MOST_CELLS)
    found = [(_losses(kind, width), count) for kind, count in wanted.items()]
    return max(
        _epsilon([(both[direction], count) for both, count in found], width, delta)
        for direction in (0, 1)
    )


_ORDERS = np.concatenate([np.arange(1.05, 64, 0.05), [64.0, 128.0, 256.0]])


def sampled_rdp_epsilon(rounds: Rounds, delta: float) -> float:
    """The same by Renyi divergences: the looser bound that other tools print, for comparison.

    At integer orders by Mironov, Talwar, Zhang 2019 (arXiv 1908.10530), section 3.3; between two of them the logarithm
    of the moment is convex, so the line between them is above it. Conversion as in `accounting.rdp_epsilon`.
    """
    orders = _ORDERS
    moments = np.zeros(len(orders))
    for (z, q), count in rounds.items():
        whole = [_log_moment(int(a), z, q) for a in range(1, int(orders.max()) + 2)]
        below = np.floor(orders).astype(int)
        part = orders - below
        known = np.array(whole)
        moments += count * ((1 - part) * known[below - 1] + part * known[below])
    spent = moments / (orders - 1) + np.log1p(-1 / orders)
    return max(0.0, float((spent - (math.log(delta) + np.log(orders)) / (orders - 1)).min()))


def _log_moment(order: int, z: float, q: float) -> float:
    """log E[(dP/dQ)^order] of one round: (order - 1) times its Renyi divergence."""
    if q == 1:
        return order * (order - 1) / (2 * z * z)
    terms = [
        math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
        + k * math.log(q) + (order - k) * math.log1p(-q) + k * (k - 1) / (2 * z * z)
        for k in range(order + 1)
    ]  # fmt: skip
    top = max(terms)
    return top + math.log(math.fsum(math.exp(each - top) for each in terms))
