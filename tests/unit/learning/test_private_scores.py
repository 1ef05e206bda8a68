"""Metric sums with noise of their own: how far one row moves them, how much noise that takes, what is made of them."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from fedcore.config import build_job, plan_of
from fedcore.errors import BadInput, PlanRefused
from fedcore.experiment.loop import Experiment
from fedcore.experiment.prepare import job_for, prepare
from fedcore.learning.metric_sums import MetricTransport
from fedcore.learning.metrics import get
from fedcore.learning.private_scores import with_metric_noise, without_offset
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.plan import METRIC, ModelShape, RoundPlan
from fedcore.secagg.privacy.accounting import epsilon_of_rounds
from fedcore.secagg.privacy.metric_noise import MERGED, ROW_NORMS
from fedcore.secagg.privacy.sampled import Round

SITES = ("a", "b", "c", "d")
JUDGED = {"judge": "released", "patience": 2}


def plan_for(metrics=("accuracy", "auc"), most=320, **settings):
    job = build_job({"epsilon": 3, "rounds": 10, "metric_share": 0.5, **settings})
    transport = MetricTransport(get(metrics), (), 1, most)
    shape = ModelShape("t", "0" * 64, 30, 0, 0, "", transport.wides)
    return plan_of(job, shape, SITES, 320), transport


def summed(metric, outputs, targets):
    found = metric.sums(outputs, targets)
    return found.reshape(-1, MERGED).sum(axis=1) if metric.name == "auc" else found


def scores(plan, transport, *sites):
    """What these sites' sums are opened to, as values."""
    vectors = [with_metric_noise(plan, each, OsEntropy()) for each in sites]
    opened = {
        wide.name: np.sum([vector[wide.name] for vector in vectors], axis=0).tolist()
        for wide in plan.metric_sums
    }
    return transport.finish(without_offset(plan, opened, len(sites)), len(sites))


@pytest.mark.parametrize("name", ROW_NORMS)
def test_one_row_moves_the_sums_by_the_stated_norm_and_never_by_more(name):
    (metric,), largest = get([name]), 0.0
    draws = np.random.default_rng(5)
    for columns in [12] if name.startswith("top") else [1, 2, 4]:
        problems = columns if name == "auc" and columns > 2 else 1
        for _ in range(60):
            outputs = draws.normal(0, 3, (8, columns) if columns > 1 else 8)
            targets = draws.integers(0, max(2, columns), 8)
            row = summed(metric, outputs, targets) - summed(metric, outputs[:-1], targets[:-1])
            assert np.square(row).sum() <= ROW_NORMS[name] * problems
            largest = max(largest, float(np.square(row).sum() / problems))
    assert largest == ROW_NORMS[name]


@pytest.mark.parametrize("settings", [{}, {"noise": "site"}, JUDGED, {"epsilon": 25}])
def test_noise_of_all_metrics_together_is_what_is_accounted_for(settings):
    plan, _ = plan_for(("accuracy", "auc", "f1"), **settings)
    privacy, norms = plan.privacy, {"accuracy": 2, "auc": 1, "f1": 3}
    shares = privacy.shares(plan.threshold)
    mu2 = sum(
        norms[name.removeprefix(METRIC)] * each.grain**2 / (shares * each.sigma**2)
        for name, each in plan.metric_noise.items()
    )
    assert mu2 == pytest.approx(privacy.metric_multiplier**-2)
    assert all(each.sigma >= 4 for each in plan.metric_noise.values())
    assert privacy.metric_releases == (11 if "judge" in settings else 1)
    whole = Counter({Round(privacy.noise_multiplier): 10})
    whole[Round(privacy.metric_multiplier)] += privacy.metric_releases
    spent = epsilon_of_rounds(whole, privacy.accounted_delta)
    assert spent == privacy.spent(10)
    assert 0.999 * privacy.epsilon < spent <= privacy.epsilon


def test_metrics_and_steps_over_secret_samples_share_one_budget():
    plan, _ = plan_for(sample_rate=0.2)
    assert 0.99 * 3 < plan.privacy.spent(10) <= 3


def test_plan_with_noise_in_its_metrics_survives_json():
    plan, _ = plan_for()
    found = RoundPlan.from_json(plan.to_json())
    assert found == plan and found.metric_noise == plan.metric_noise


@pytest.mark.parametrize("metrics", [("accuracy", "auc"), ("f1", "balanced_accuracy")])
def test_a_vector_without_rows_is_noise_of_the_stated_size(metrics):
    plan, transport = plan_for(metrics)
    drawn = Counter()
    for _ in range(400):
        for name, values in with_metric_noise(plan, transport.sums(None), OsEntropy()).items():
            noise = plan.metric_noise[name]
            centred = np.array(values[:2]) - noise.reach
            assert np.abs(centred).max() <= noise.reach
            drawn[name] += np.square(centred).mean() / noise.sigma**2 / 400
    assert all(found == pytest.approx(1, abs=0.25) for found in drawn.values())


def test_the_largest_counts_and_the_largest_noise_have_room():
    """The proof of `with_room`, with every count at its cap; in a histogram one bin has all rows."""
    plan, transport = plan_for()
    for wide, given in zip(plan.metric_sums, transport.wides, strict=True):
        noise, cap = plan.metric_noise[wide.name], (1 << given.bits) - 1
        assert cap * noise.grain + 2 * noise.reach < 1 << wide.bits


def test_scores_are_near_the_exact_ones_of_many_rows_and_possible_of_few():
    plan, transport = plan_for(epsilon=8, most=1 << 20)
    draws = np.random.default_rng(1)
    targets = draws.integers(0, 2, 100_000)
    outputs = draws.normal(0, 1, 100_000) + targets
    exact = {m.name: m.finish(m.sums(outputs, targets)) for m in transport.metrics}
    none = transport.sums(None)
    many = {METRIC + m.name: m.sums(outputs, targets).tolist() for m in transport.metrics}
    found = scores(plan, transport, many, none, none)
    assert found["accuracy"] == pytest.approx(exact["accuracy"], abs=0.005)
    assert found["auc"] == pytest.approx(exact["auc"], abs=0.01)
    few = {METRIC + m.name: m.sums(outputs[:6], targets[:6]).tolist() for m in transport.metrics}
    for _ in range(50):
        found = scores(plan, transport, few, few, few)
        assert all(value is None or 0 <= value <= 1 for value in found.values())


def test_a_round_without_metrics_has_no_score():
    plan, transport = plan_for()
    zeros = {wide.name: [0] * wide.count for wide in plan.metric_sums}
    assert set(transport.finish(without_offset(plan, zeros, 3), 3).values()) == {None}


@pytest.mark.parametrize(
    ("metrics", "settings", "found"),
    [
        (("accuracy", "log_loss"), {}, "the metric 'log_loss', expected accuracy"),
        (("auc",), {"metric_share": 0, **JUDGED}, "round.judge: found released"),
        (("auc",), {"sample_rate": 0.5, **JUDGED}, "privacy.sample_rate: found 0.5"),
        (("auc",), {"unit": "column"}, "privacy.metric_share: found 0.5, expected 0 to 0.9, and 0"),
    ],
)
def test_what_has_no_noise_is_refused(metrics, settings, found):
    with pytest.raises((PlanRefused, BadInput), match=found):
        plan_for(metrics, **settings)


def test_private_run_has_scores_and_is_judged_by_them():
    settings = {
        "arms": ["federated"], "protection": "masked", "sum": "exact", "max_examples": 320, "epsilon": 25,
        "rounds": 3, "clip": 1.5, "lr": 4.0, "metric_share": 0.5, **JUDGED,
    }  # fmt: skip
    task, job = job_for(None, settings)
    experiment = Experiment(prepare(task, job))
    rows = list(experiment.rounds())
    for before, after in pairwise(rows):
        assert after["protected_auc_before"] == pytest.approx(before["auc"], abs=0.15)
    assert experiment.federated.state.judgement.value is not None
