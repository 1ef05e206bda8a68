"""The accountants against figures of dp-accounting 0.6.0, and against the definition of what they compute."""

import math

import numpy as np
import pytest

from fedcore.secagg.privacy.accounting import (
    MOST_EPSILON,
    delta_of,
    epsilon_of,
    epsilon_of_rounds,
    mu_of,
    noise_multiplier,
    rdp_epsilon,
    renyi_epsilon,
)
from fedcore.secagg.privacy.sampled import Round, sampled_epsilon

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


# ------------------------------------------------------------------------------- secret samples

SAMPLED = [  # {(noise multiplier, sample rate): rounds}, then dp-accounting 0.6.0 at delta 1e-5: PLD, RDP
    ({(1.1, 256 / 60000): 14062}, 2.381686002234784, 2.5965558697943036),
    ({(1.0, 0.1): 100}, 7.04660287720805, 7.903850223578231),
    ({(0.6, 0.01): 2000}, 9.95354158681647, 11.35073003797386),
    ({(2.0, 0.5): 40}, 8.339491521828856, 9.087538267027576),
    ({(4.0, 0.2): 1000}, 7.718020774199445, 8.332766107331079),
    ({(1.0, 1.0): 1, (1.0, 0.1): 20}, 5.618568274272195, 6.253674846385554),
    ({(0.9, 0.02): 500, (1.3, 0.02): 500}, 3.9097023839869802, 4.410303010646429),
]


@pytest.mark.parametrize(("kinds", "pld", "rdp"), SAMPLED)
def test_epsilon_of_samples_is_that_of_dp_accounting(kinds, pld, rdp):
    rounds = {Round(*kind): count for kind, count in kinds.items()}
    assert 0.9999 * pld < epsilon_of_rounds(rounds, 1e-5) < 1.0005 * pld
    # Ours is a line between integer orders: above theirs, which has fractions, where the best order is small.
    assert 0.999 * rdp < renyi_epsilon(rounds, 1e-5) < 1.2 * rdp


def test_figures_of_the_usual_example():
    rounds = {Round(1.1, 256 / 60000): 14062}
    assert round(epsilon_of_rounds(rounds, 1e-5), 3) == 2.382
    assert round(renyi_epsilon(rounds, 1e-5), 3) == 2.597


@pytest.mark.parametrize(("z", "rounds"), [(1.0, 1), (5.0, 100), (0.7, 3)])
@pytest.mark.parametrize("delta", [1e-4, 1e-7])
def test_numerical_accounting_of_all_rows_is_the_closed_form_and_never_below_it(z, rounds, delta):
    closed = epsilon_of(mu_of(z, rounds), delta)
    found = sampled_epsilon({Round(z, 1.0): rounds}, delta)
    assert closed - 1e-6 <= found <= closed * 1.002


@pytest.mark.parametrize(
    ("z", "q", "epsilon"), [(1.0, 0.1, 1.0), (0.8, 0.5, 2.0), (2.0, 0.01, 0.05)]
)
def test_epsilon_of_one_sampled_round_has_the_delta_of_its_definition(z, q, epsilon):
    x = np.linspace(-40, 40, 2_000_001)

    def normal(mean):
        return np.exp(-((x - mean) ** 2) / (2 * z * z)) / (z * math.sqrt(2 * math.pi))

    without, with_unit = normal(0), (1 - q) * normal(0) + q * normal(1)
    delta = max(
        np.maximum(p - math.exp(epsilon) * other, 0.0).sum() * (x[1] - x[0])
        for p, other in ((with_unit, without), (without, with_unit))
    )
    assert sampled_epsilon({Round(z, q): 1}, delta) == pytest.approx(epsilon, rel=2e-3)


def test_smaller_sample_costs_less_and_a_sample_of_all_is_no_sample():
    costs = [epsilon_of_rounds({Round(1.0, q): 50}, 1e-5) for q in (0.01, 0.1, 0.5, 1.0)]
    assert costs == sorted(costs)
    assert costs[0] < 0.1 * costs[-1] and costs[-1] == epsilon_of(mu_of(1.0, 50), 1e-5)


def test_noise_calibrated_for_samples_spends_the_budget_and_no_more():
    z = noise_multiplier(3.0, 1e-5, 100, 0.1)
    assert epsilon_of_rounds({Round(z, 0.1): 100}, 1e-5) <= 3.0
    assert epsilon_of_rounds({Round(z - 2e-3, 0.1): 100}, 1e-5) > 3.0
    assert z < 0.3 * noise_multiplier(3.0, 1e-5, 100)


def test_sampled_rounds_without_enough_noise_are_infinite_and_none_cost_nothing():
    assert sampled_epsilon({Round(0.01, 0.5): 1000}, 1e-5) == math.inf
    assert sampled_epsilon({Round(1.0, 0.5): 0}, 1e-5) == epsilon_of_rounds({}, 1e-5) == 0.0
    assert sampled_epsilon({Round(1.0, 0.5): 10}, 1e-14) == math.inf  # finer than floats are
