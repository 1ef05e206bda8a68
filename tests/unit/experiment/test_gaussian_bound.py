"""The bound of f-differential privacy in one run: right as often as said, and tight where that is known."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.stats import binom

from fedcore.experiment.attacks.gaussian_bound import epsilon_of, mu_bound, refutes
from fedcore.experiment.attacks.one_run_audit import epsilon_bound, guessed

NORMAL = NormalDist()


def test_one_guess_is_bounded_exactly():
    """A guess about one canary is right with probability Phi(mu / 2) at most, and the best one is."""
    for right_once in (0.6, 0.8, 0.95):
        mu = 2 * NORMAL.inv_cdf(right_once)
        assert refutes(1, 1, 1, 0.999 * mu, confidence=1 - right_once)
        assert not refutes(1, 1, 1, 1.001 * mu, confidence=1 - right_once)


@pytest.mark.parametrize(("canaries", "guesses", "right"), [(6, 6, 5), (12, 6, 6), (20, 8, 7)])
@pytest.mark.parametrize("mu", [0.3, 1.0, 2.0])
def test_the_search_finds_the_optimum_of_the_linear_program(canaries, guesses, right, mu):
    """The largest probability of so many right guesses that the inequalities of the paper allow, by a solver: F is
    concave, so it is below each of its tangents."""
    counts, rows, bounds = np.arange(guesses + 1), [], []
    for i in range(guesses):
        for z in np.linspace(-6, 6, 800):
            x, above = NORMAL.cdf(z), NORMAL.cdf(z + mu)
            slope = math.exp(-mu * z - mu * mu / 2)
            hits = np.where(counts > i, counts, 0) / canaries
            misses = np.where(counts >= i, guesses - counts, 0) / canaries
            scale = max(1.0, slope)
            rows.append((hits - slope * misses) / scale)
            bounds.append((above - slope * x) / scale)
    most = linprog(
        -(counts >= right).astype(float), np.array(rows), bounds, np.ones((1, guesses + 1)), [1.0]
    )  # fmt: skip
    tail = -most.fun
    assert not refutes(canaries, guesses, right, mu, confidence=1 - 0.99 * tail)
    if tail < 0.99:
        assert refutes(canaries, guesses, right, mu, confidence=1 - 1.01 * tail)


@pytest.mark.parametrize("mu", [0.3, 1.0])
@pytest.mark.parametrize("each", [6, 100])
def test_gaussian_noise_is_refuted_as_rarely_as_said(mu, each):
    """Known noise, 400 audits: in 5 % of them at most is the bound above."""
    rng, above = np.random.default_rng(4), 0
    for _ in range(400):
        inside = rng.random(200) < 0.5
        scores = rng.normal(size=200) + mu * inside
        above += refutes(200, 2 * each, guessed(scores, inside, each), mu)
    assert above <= 32  # 20 is 5 %; more than 32 has probability 0.004


def test_no_more_is_refuted_than_the_count_of_a_real_mechanism_allows():
    """The tail of independent guesses, at the level that it has, is never refuted."""
    for mu in (0.3, 1.0, 2.0):
        p = NORMAL.cdf(mu / 2)
        for right in (30, 40, 48):
            tail = float(binom.sf(right - 1, 50, p))
            if 1e-9 < tail < 1:
                assert not refutes(50, 50, right, mu, confidence=1 - tail)


def test_it_proves_more_than_the_bound_of_any_mechanism():
    rng = np.random.default_rng(5)
    inside = rng.random(9000) < 0.5
    scores = rng.normal(size=9000) + inside
    each = 150
    right = guessed(scores, inside, each)
    tighter = epsilon_of(mu_bound(9000, 2 * each, right), 1e-5)
    assert 1.2 * epsilon_bound(9000, 2 * each, right, 1e-5) < tighter < 4.377


def test_bound_grows_with_right_guesses_and_is_zero_for_a_coin():
    found = [mu_bound(1000, 100, right) for right in (50, 70, 90, 100)]
    assert found[0] == 0.0
    assert found == sorted(set(found))


def test_epsilon_of_gaussian_noise():
    assert epsilon_of(1.0, 1e-5) == pytest.approx(4.377, abs=1e-3)
    assert epsilon_of(0.0, 1e-5) == 0.0
    assert epsilon_of(1e-6, 1e-5) == 0.0
    assert epsilon_of(8.0, 1e-5) > 32 + 8
