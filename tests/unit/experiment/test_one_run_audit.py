"""The audit in one run: below what is accounted for, near it for the mechanism itself, above it for a faulty one."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from fedcore.experiment.attacks.one_run_audit import audited_step, epsilon_bound, p_value
from fedcore.experiment.attacks.registry import run_attacks
from fedcore.experiment.prepare import job_for
from fedcore.secagg.encode.quantise import quantise
from fedcore.secagg.privacy.noise import draw


def entropy(seed):
    """Repeatable, so that a test gives one answer."""
    rng = np.random.default_rng(seed)
    return SimpleNamespace(draw=rng.bytes)


@pytest.mark.parametrize("epsilon", [4.377, 1.0])
def test_step_is_between_a_third_and_all_of_what_is_accounted(epsilon):
    found = audited_step(epsilon, 1e-5, seed=0, entropy=entropy(1))
    accounted = found.more["accounted_epsilon"]
    assert accounted == pytest.approx(epsilon, rel=0.01)
    assert 0.4 * accounted < found.value <= accounted
    assert 0 < found.more["epsilon_of_any_noise"] < found.value
    assert found.samples == 9000


def test_noise_of_a_quarter_is_found_out():
    def faulty(total, plan, rounding, drawn):
        step = total * plan.privacy.scale(plan.train.lr, plan.max_examples)
        fields = quantise(step, plan.packing.bits, plan.range.start, rounding).fields.astype(
            np.int64
        )
        return (fields + draw(len(fields), plan.noise_grid.sigma / 4, drawn)).astype(np.uint64)

    found = audited_step(1.0, 1e-5, seed=0, mechanism=faulty, entropy=entropy(2))
    assert found.value > found.more["accounted_epsilon"]
    assert "The noise is too small, or its account is wrong." in found.shows


def test_rows_of_a_job_give_no_more_than_is_accounted():
    layer = {"task": "digits", "protection": "masked", "epsilon": 20, "rounds": 1,
             "max_examples": 512}  # fmt: skip
    (found,) = run_attacks(*job_for(None, layer), ["audit-training"]).rows
    assert found.samples == 200
    assert 0 < found.value <= found.more["accounted_epsilon"] <= 20


def test_a_job_without_privacy_has_no_epsilon_to_audit():
    (found,) = run_attacks(*job_for(None, {"rounds": 1}), ["audit-training"]).rows
    assert "no differential privacy" in found.refused


def test_p_value_is_the_binomial_tail_where_delta_is_zero():
    q = 1 / (1 + math.exp(-0.7))
    tail = sum(math.comb(50, k) * q**k * (1 - q) ** (50 - k) for k in range(40, 51))
    assert p_value(200, 50, 40, 0.7, 0.0) == pytest.approx(tail)


def test_p_value_with_delta_is_the_bound_of_the_paper():
    """Its appendix D, term by term."""
    m, r, v, epsilon, delta = 300, 60, 50, 1.0, 1e-4
    q = 1 / (1 + math.exp(-epsilon))
    mass = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    alpha = max(sum(mass[v - i : v]) / i for i in range(1, v + 1))
    assert p_value(m, r, v, epsilon, delta) == pytest.approx(sum(mass[v:]) + 2 * m * delta * alpha)


def test_bound_grows_with_right_guesses_and_is_zero_for_a_coin():
    found = [epsilon_bound(1000, 100, right, 1e-5) for right in (50, 70, 90, 100)]
    assert found[0] == 0.0
    assert found == sorted(found)
    assert p_value(1000, 100, 90, found[2], 1e-5) == pytest.approx(0.05, rel=1e-3)


def test_randomised_response_is_refuted_as_rarely_as_said():
    rng = np.random.default_rng(3)
    q = 1 / (1 + math.exp(-1.0))
    above = [epsilon_bound(200, 200, int(rng.binomial(200, q)), 0.0) > 1.0 for _ in range(400)]
    assert sum(above) <= 32  # 5 % of 400 is 20; more than 32 has probability 0.004
