"""What rounds of Gaussian noise cost: epsilon for a delta, and the noise for an epsilon.

Where every unit is in every round, `rounds` releases with noise multiplier z (standard deviation over sensitivity) are
one Gaussian mechanism with z / sqrt(rounds), exactly (Dong, Roth, Su 2019, arXiv 1905.02383, corollary 3.3). Its
epsilon and delta have a closed form (Balle and Wang 2018, arXiv 1805.06530, theorem 8), the value to which
accountants by privacy loss distributions converge. Rounds over secret samples are accounted by such distributions
(`sampled.py`). `renyi_epsilon` is the looser bound by Renyi divergences, for comparison with other tools. Adjacency:
add or remove one unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

from fedcore.secagg.privacy.sampled import Round, sampled_epsilon, sampled_rdp_epsilon

MOST_EPSILON = 1000.0
"""Beyond, a figure means nothing and the arithmetic of floats ends."""

_STEPS = 80
"""Halvings of an interval: to the last bit of a float."""


def _log_upper(x: float) -> float:
    """log P(N(0, 1) > x)."""
    if x < 25.0:
        return math.log(0.5 * math.erfc(x / math.sqrt(2.0)))
    # Beyond, erfc comes to its smallest numbers: the asymptotic series, 1e-9 here.
    series = 1 - 1 / x**2 + 3 / x**4 - 15 / x**6
    return -x * x / 2 - math.log(x * math.sqrt(2 * math.pi)) + math.log(series)


def delta_of(mu: float, epsilon: float) -> float:
    """The smallest delta of a Gaussian mechanism. mu: sensitivity over standard deviation, > 0."""
    one = _log_upper(epsilon / mu - mu / 2)
    other = epsilon + _log_upper(epsilon / mu + mu / 2)
    return max(0.0, math.exp(one) - math.exp(min(other, one)))


def epsilon_of(mu: float, delta: float) -> float:
    """The smallest epsilon of a Gaussian mechanism at this delta, in (0, 1); infinity beyond MOST_EPSILON."""
    if mu == 0.0 or delta_of(mu, 0.0) <= delta:
        return 0.0
    if mu > MOST_EPSILON or delta_of(mu, MOST_EPSILON) > delta:
        return math.inf
    low, high = 0.0, MOST_EPSILON
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(mu, middle) > delta else (low, middle)
    return high


def mu_of(noise_multiplier: float, rounds: int) -> float:
    """mu of so many rounds together."""
    return math.sqrt(rounds) / noise_multiplier


def epsilon_of_rounds(rounds: Mapping[Round, int], delta: float) -> float:
    """The smallest epsilon that is known of all these rounds together, {kind: how many}, at this delta."""
    return _composed(tuple(sorted(rounds.items())), delta)


@lru_cache(maxsize=256)
def _composed(rounds: tuple[tuple[Round, int], ...], delta: float) -> float:
    if all(kind.sample_rate == 1 for kind, _ in rounds):
        return epsilon_of(math.sqrt(_mu2(rounds)), delta)
    return sampled_epsilon(dict(rounds), delta)


def _mu2(rounds: tuple[tuple[Round, int], ...]) -> float:
    """mu^2 of rounds over all units: they compose by their sum."""
    return math.fsum(count / kind.noise_multiplier**2 for kind, count in rounds)


@lru_cache(maxsize=256)
def noise_multiplier(
    epsilon: float,
    delta: float,
    rounds: int,
    sample_rate: float = 1.0,
    besides: tuple[tuple[Round, int], ...] = (),
) -> float:
    """The smallest z, in steps of 0.0001, or 0.001 over samples, with which so many rounds, and others `besides` them
    over all units, cost at most epsilon at this delta.

    The steps make it the same number on machines whose functions differ in the last bits.
    """
    low, high = 0.0, MOST_EPSILON
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if epsilon_of(middle, delta) <= epsilon else (low, middle)
    left = math.sqrt(low * low - _mu2(besides))
    z = math.ceil(math.sqrt(rounds) / left * 1e4) / 1e4
    if epsilon_of(math.sqrt(mu_of(z, rounds) ** 2 + _mu2(besides)), delta) > epsilon:
        z += 1e-4
    if sample_rate == 1:
        return z
    # Over samples it takes less. In thousandths: `below` is too little, `enough` is enough.
    below, enough = 0, math.ceil(z * 1000)
    while enough - below > 1:
        middle_z = (below + enough) // 2
        cost = epsilon_of_rounds(
            {Round(middle_z / 1000, sample_rate): rounds, **dict(besides)}, delta
        )
        below, enough = (below, middle_z) if cost <= epsilon else (middle_z, enough)
    return enough / 1000


def renyi_epsilon(rounds: Mapping[Round, int], delta: float) -> float:
    """The same by Renyi divergences: never below `epsilon_of_rounds`."""
    pairs = tuple(rounds.items())
    if all(kind.sample_rate == 1 for kind, _ in pairs):
        return rdp_epsilon(math.sqrt(_mu2(pairs)), delta)
    return sampled_rdp_epsilon(rounds, delta)


def rdp_epsilon(mu: float, delta: float) -> float:
    """Epsilon by Renyi differential privacy, alpha mu^2 / 2 at every order (Mironov 2017, proposition 7), with the
    conversion of Canonne, Kamath, Steinke 2020, proposition 12: never below `epsilon_of`."""

    def at(log_order: float) -> float:
        alpha = 1.0 + math.exp(log_order)
        spent = alpha * mu * mu / 2 + math.log1p(-1 / alpha)
        return spent - (math.log(delta) + math.log(alpha)) / (alpha - 1)

    low, high = -15.0, 15.0
    for _ in range(_STEPS):
        third = (high - low) / 3
        if at(low + third) < at(high - third):
            high -= third
        else:
            low += third
    return max(0.0, at((low + high) / 2))
