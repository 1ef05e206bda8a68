"""How much noise right guesses about canaries refute: the audit of f-differential privacy in one run.

Steinke et al. 2023 hold the guesses against every mechanism with an epsilon and a delta, the worst of which is no
Gaussian; this holds them against Gaussian noise alone, which is what is accounted for, and so refutes more
(Mahloujifar, Melis, Chaudhuri 2024, arXiv:2410.22235: theorem 9 and the algorithm of section 4, with a trade-off curve
of Dong et al. 2019, arXiv:1905.02383, definition 6; their corollary 1 turns mu into epsilon at a delta).

For any mechanism whose trade-off function f is symmetric, m canaries by fair coins, g guesses, C of them right with
probabilities p_j, and every i: sum_{j > i} j p_j <= m F(1/m sum_{j >= i} (g - j) p_j) with F(x) = 1 - f(x): the coin
of one canary turned over changes the probability of any event by no more than f allows, and F is concave. For
Gaussian noise F(x) = Phi(mu + Phi^-1(x)). The search is for the least total probability with which "at least C right"
can have probability tau; where it is above 1, there is no such mechanism.
"""

from __future__ import annotations

import math
from statistics import NormalDist

_NORMAL = NormalDist()

MOST_MU = 64.0


def refutes(canaries: int, guesses: int, right: int, mu: float, confidence: float = 0.95) -> bool:
    """Whether so many right guesses have a probability below 1 - confidence under Gaussian noise of this mu (the clip
    norm over the noise's standard deviation, 0 without a leak)."""
    tau = 1 - confidence
    if right == 0:
        return False
    full = guesses / canaries
    # hits, misses: the least of sum_{j >= i} j p_j / m and of sum_{j >= i} (g - j) p_j / m.
    hits, misses = tau * right / canaries, tau * (guesses - right) / canaries
    inverse, root = _NORMAL.inv_cdf, math.sqrt(2)
    for i in range(right - 1, -1, -1):
        if hits + misses > full:
            return True
        least = 0.5 * math.erfc((mu - inverse(hits)) / root)
        if least > misses:
            hits += i / (guesses - i) * (least - misses)
            misses = least
    return hits + misses > full


def mu_bound(canaries: int, guesses: int, right: int, confidence: float = 0.95) -> float:
    """The largest mu that is refuted; 0 where none is."""
    if not refutes(canaries, guesses, right, 0.0, confidence):
        return 0.0
    low, high = 0.0, 0.5
    while refutes(canaries, guesses, right, high, confidence) and high < MOST_MU:
        low, high = high, 2 * high
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if refutes(canaries, guesses, right, middle, confidence)
            else (low, middle)
        )
    return low


def epsilon_of(mu: float, delta: float) -> float:
    """The epsilon at which Gaussian noise of this mu has this delta: of the continuous one, to 1e-9."""
    if mu <= 0:
        return 0.0

    def spent(epsilon: float) -> float:
        first = _NORMAL.cdf(mu / 2 - epsilon / mu)
        second = (
            -mu / 2 - epsilon / mu
        )  # its distribution function times e^epsilon, without overflow
        tail = math.exp(epsilon + math.log(_cdf(second))) if _cdf(second) > 0 else 0.0
        return first - tail

    if spent(0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while spent(high) > delta:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return low


def _cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))
