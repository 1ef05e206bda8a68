"""The discrete Gaussian sampler: its law against the exact one, its tails, and where its randomness comes from."""

import random
from collections import Counter
from fractions import Fraction
from math import exp, floor

import numpy as np
import pytest
import torch
from scipy import stats

from fedcore.errors import BadInput
from fedcore.secagg.privacy import noise
from fedcore.secagg.privacy.noise import draw, reach_of, sample


class Fixed:
    """One AES key: the same values at every run of a test."""

    def __init__(self, byte=1):
        self.byte = byte

    def draw(self, length):
        return bytes([self.byte]) * length


def exact(sigma, reach):
    """P(X = k) for k = -reach .. reach, in float64 straight from the definition."""
    weights = np.array([exp(-k * k / (2 * sigma * sigma)) for k in range(-reach, reach + 1)])
    return weights / weights.sum()


def chi_square(values, sigma):
    """The p-value of the counts, values with fewer than 20 expected counts pooled in the two tails."""
    reach = reach_of(sigma)
    expected = exact(sigma, reach) * len(values)
    found = np.bincount(values + reach, minlength=2 * reach + 1)
    inner = expected >= 20
    low = np.arange(len(inner)) < reach
    rows = [(found[inner], expected[inner])] + [
        ([found[~inner & side].sum()], [expected[~inner & side].sum()]) for side in (low, ~low)
    ]
    observed = np.concatenate([r[0] for r in rows])
    return stats.chisquare(observed, np.concatenate([r[1] for r in rows])).pvalue


@pytest.mark.parametrize("sigma", [4.0, 16.3, 64.0])
def test_a_million_draws_follow_the_exact_law(sigma):
    assert chi_square(draw(1_000_000, sigma, Fixed()), sigma) > 1e-3


def test_chi_square_detects_a_standard_deviation_that_is_one_percent_off():
    assert chi_square(draw(1_000_000, 16.0 * 1.01, Fixed()), 16.0) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [4.0, 37.5])
def test_ten_million_draws_follow_the_exact_law(sigma):
    assert chi_square(draw(10_000_000, sigma, Fixed(2)), sigma) > 1e-3


class RationalSampler:
    """Algorithms 1 to 3 of Canonne, Kamath, Steinke 2020 in exact fractions: no table, no float."""

    def __init__(self, seed):
        self.bits = random.Random(seed)

    def bernoulli(self, p):
        return self.bits.randrange(p.denominator) < p.numerator

    def bernoulli_exp_at_most_one(self, gamma):
        k = 1
        while self.bernoulli(gamma / k):
            k += 1
        return k % 2 == 1

    def bernoulli_exp(self, gamma):
        whole = floor(gamma)
        if any(not self.bernoulli_exp_at_most_one(Fraction(1)) for _ in range(whole)):
            return False
        return self.bernoulli_exp_at_most_one(gamma - whole)

    def laplace(self, scale):
        while True:
            u = self.bits.randrange(scale)
            if not self.bernoulli_exp_at_most_one(Fraction(u, scale)):
                continue
            v = 0
            while self.bernoulli_exp_at_most_one(Fraction(1)):
                v += 1
            negative, magnitude = self.bits.random() < 0.5, u + scale * v
            if not (negative and magnitude == 0):
                return -magnitude if negative else magnitude

    def gaussian(self, sigma):
        scale = sigma + 1
        while True:
            y = self.laplace(scale)
            off = abs(y) - Fraction(sigma * sigma, scale)
            if self.bernoulli_exp(off * off / (2 * sigma * sigma)):
                return y


def test_the_table_agrees_with_an_exact_rational_sampler():
    oracle = RationalSampler(7)
    theirs = Counter(oracle.gaussian(4) for _ in range(10_000))
    ours = Counter(draw(200_000, 4.0, Fixed(3)).tolist())
    inner = range(-9, 10)
    table = [[count[k] for k in inner] for count in (theirs, ours)]
    for row, count in zip(table, (theirs, ours), strict=True):
        row.append(sum(n for k, n in count.items() if k not in inner))
    assert stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize("sigma", [4.0, 100.0])
def test_table_entries_are_the_exact_cumulative_law_to_80_bits(sigma):
    """Against sums of fractions of exp in 60 digits, by Python's decimal."""
    from decimal import Decimal, localcontext

    table = noise._table(sigma)
    found = [(int(a) << 64) + int(b) for a, b in zip(table.first, table.rest, strict=True)]
    with localcontext() as context:
        context.prec = 60
        two = 2 * Decimal(sigma) ** 2
        weights = [(-Decimal(k * k) / two).exp() for k in range(reach_of(sigma) + 1)]
        total, below = 2 * sum(weights) - 1, Decimal(0)
        for k, weight in enumerate(weights):
            below += weight * (2 if k else 1)
            assert abs(Decimal(found[k]) / 2**127 - below / total) < Decimal(2) ** -120


def test_mass_beyond_the_reach_is_below_the_stated_distance():
    sigma, reach = 4.0, reach_of(4.0)
    beyond = 2 * sum(exp(-k * k / (2 * sigma**2)) for k in range(reach + 1, reach + 400))
    assert beyond / (sigma * 2.5) < 2.0**-80


def values_of(*words):
    """The values that a stream of these words gives, one for each of the first ones that are asked for."""
    left = list(words)

    def take(count):
        return np.array([left.pop(0) for _ in range(count)], dtype=np.uint64)

    return noise._values(noise._table(4.0), 1, take).tolist()


@pytest.mark.parametrize(("beside", "expected"), [(-1, 3), (0, 4)])
def test_first_word_equal_to_an_entry_is_decided_by_64_more_bits(beside, expected):
    table = noise._table(4.0)
    first, rest = int(table.first[3]), int(table.rest[3])
    assert values_of(first << 1, rest + beside) == [expected]
    assert values_of((first << 1) + 1, rest + beside) == [-expected]


def test_largest_words_stay_within_the_reach():
    top = (1 << 64) - 1
    assert values_of(top, top) == [-reach_of(4.0)]


@pytest.mark.parametrize("sigma", [3.99, float(1 << 17), float("nan"), -4.0])
def test_standard_deviation_outside_its_bounds_is_refused(sigma):
    with pytest.raises(BadInput, match="expected 4 to 65536"):
        draw(1, sigma, Fixed())


def test_no_generator_that_a_run_seeds_is_used():
    """The states of all global generators are as before, and seeds do not repeat the noise."""
    from fedcore.secagg.crypto.entropy import OsEntropy

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    found = []
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        before = states()
        found.append(draw(32, 16.0, OsEntropy()).tolist())
        assert states() == before
    assert found[0] != found[1]


def test_all_noise_follows_from_the_key_that_entropy_gave():
    one, same, other = (draw(64, 16.0, Fixed(b)).tolist() for b in (5, 5, 6))
    assert one == same != other


def test_each_unit_is_in_a_sample_with_the_stated_probability_and_independently():
    for rate in (0.03, 0.5):
        found = np.array([sample(1000, rate, Fixed(byte)) for byte in range(200)])
        counts = found.sum(axis=1)
        sd = (1000 * rate * (1 - rate)) ** 0.5
        assert abs(found.mean() - rate) < 5 * sd / 1000 / 200**0.5
        assert 0.8 * sd < counts.std() < 1.2 * sd
    assert sample(5, 1.0, Fixed()).all()


def test_a_sample_is_another_one_each_time_and_follows_from_entropy_alone():
    from fedcore.secagg.crypto.entropy import OsEntropy

    np.random.seed(0)
    one = sample(64, 0.5, OsEntropy())
    np.random.seed(0)
    assert (one != sample(64, 0.5, OsEntropy())).any()
    assert (sample(64, 0.5, Fixed(5)) == sample(64, 0.5, Fixed(5))).all()
