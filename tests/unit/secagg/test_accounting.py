"""The Gaussian accountant against figures of dp-accounting 0.6.0, and against its own definition."""

import math

import numpy as np
import pytest

from fedcore.secagg.privacy.accounting import (
    MOST_EPSILON,
    delta_of,
    epsilon_of,
    mu_of,
    noise_multiplier,
    rdp_epsilon,
)

GOLDENS = [  # noise multiplier, rounds, then dp-accounting 0.6.0 at delta 1e-5: PLD, RDP
    (1.0, 1, 4.37717810002493, 4.728507067217623),
    (5.0, 100, 9.99725615024243, 10.725509696418232),
    (20.0, 50, 1.3564673776327494, 1.478121967952188),
    (2.5, 7, 4.674580243826121, 5.047060861459762),
    (0.5, 10, 46.21121019118735, 48.80169282486775),
]


@pytest.mark.parametrize(("z", "rounds", "pld", "rdp"), GOLDENS)
def test_epsilon_is_that_of_dp_accounting(z, rounds, pld, rdp):
    mu = mu_of(z, rounds)
    # PLD of dp-accounting is an upper bound on a grid of 1e-4.
    assert epsilon_of(mu, 1e-5) == pytest.approx(pld, abs=1e-5)
    # Ours is the minimum over all orders, theirs over a list of them.
    assert 0.999 * rdp < rdp_epsilon(mu, 1e-5) <= rdp + 1e-9


@pytest.mark.parametrize("mu", [0.01, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-10])
def test_epsilon_and_delta_are_inverses_and_renyi_is_the_looser_bound(mu, delta):
    epsilon = epsilon_of(mu, delta)
    if epsilon > 0:
        assert delta_of(mu, epsilon) == pytest.approx(delta, rel=1e-6)
    assert rdp_epsilon(mu, delta) >= epsilon


@pytest.mark.parametrize(("mu", "epsilon"), [(0.5, 1.0), (1.0, 2.0), (3.0, 8.0)])
def test_delta_is_the_integral_of_its_definition(mu, epsilon):
    x = np.linspace(-40, 40, 2_000_001)
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    shifted = np.exp(-((x - mu) ** 2) / 2) / math.sqrt(2 * math.pi)
    excess = np.maximum(shifted - math.exp(epsilon) * density, 0.0)
    assert delta_of(mu, epsilon) == pytest.approx(excess.sum() * (x[1] - x[0]), rel=1e-6)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("rounds", [1, 50, 1000])
def test_calibrated_noise_spends_the_budget_and_no_more(epsilon, rounds):
    z = noise_multiplier(epsilon, 1e-5, rounds)
    assert epsilon_of(mu_of(z, rounds), 1e-5) <= epsilon
    assert epsilon_of(mu_of(z - 3e-4, rounds), 1e-5) > epsilon
    assert round(z * 1e4) == pytest.approx(z * 1e4, abs=1e-6)


def test_too_little_noise_is_infinite_and_never_small():
    assert epsilon_of(1e6, 1e-5) == math.inf
    assert epsilon_of(60.0, 1e-5) == math.inf
    assert 900 < epsilon_of(40.0, 1e-5) < MOST_EPSILON
    assert epsilon_of(0.0, 1e-5) == 0.0
