"""Gaps: sign, parts, pairing, intervals against independent formulas, and their coverage."""

from __future__ import annotations

import math
import time
from statistics import mean, variance

import numpy as np
import pytest

from fedcore.errors import BadInput
from fedcore.experiment import gap
from fedcore.learning.metrics import METRICS, Scores, get
from fedcore.results import SplitResult

ROWS = 184


def arm(noise: float, seed: int, rows: int = ROWS) -> Scores:
    """Logits that predict the label, less well with more noise; the labels are the same in all."""
    targets = np.random.default_rng(1).integers(0, 2, size=rows)
    logits = targets - 0.5 + noise * np.random.default_rng(seed).normal(size=rows)
    return Scores(logits, targets, np.arange(rows) % 4)


def arms(rows: int = ROWS) -> dict[str, Scores]:
    plain = arm(1.2, 3, rows)
    return {
        "centralised": arm(0.8, 1, rows),
        "local_only": arm(2.0, 5, rows),
        "federated_float": arm(1.0, 2, rows),
        "federated_integer": plain,
        "federated": Scores(plain.outputs.copy(), plain.targets, plain.sites),
    }


def test_the_parts_are_the_declared_ones_and_telescope() -> None:
    assert tuple(gap.PARTS) == ("total", "federation", "quantisation", "protection")
    metrics = get(("accuracy", "auc", "balanced_accuracy"))
    gaps = gap.bootstrap_gap(arms(), metrics, resamples=50, seed=0)
    for metric in metrics:
        parts = [gaps[part][metric.name].mean for part in gap.PARTS]
        assert None not in parts
        assert parts[0] == pytest.approx(sum(p for p in parts[1:] if p is not None), abs=1e-12)


def test_the_mean_is_the_plain_difference_on_every_row_and_positive_is_lost() -> None:
    metrics = get(("accuracy", "auc"))
    gaps = gap.bootstrap_gap(arms(), metrics, resamples=200, seed=0)
    one, other = arms()["centralised"], arms()["federated"]
    centralised = {m.name: m.exact(one.outputs, one.targets) for m in metrics}
    federated = {m.name: m.exact(other.outputs, other.targets) for m in metrics}
    for name, interval in gaps["total"].items():
        assert interval.mean == centralised[name] - federated[name]  # type: ignore[operator]
        assert interval.mean > 0
        assert interval.low is not None
        assert interval.high is not None
        assert interval.low < interval.mean < interval.high
        assert interval.n == ROWS
        assert interval.method == "95 % paired bootstrap over 184 test rows, 200 resamples"


def test_an_error_that_grew_is_lost_too() -> None:
    targets = np.linspace(0, 1, 20)
    sites = np.zeros(20, dtype=np.int64)
    scores = {
        "centralised": Scores(targets + 0.1, targets, sites),
        "federated": Scores(targets + 0.3, targets, sites),
    }
    gaps = gap.bootstrap_gap(scores, get(("mse", "mae")), resamples=50, seed=0)
    assert gaps["total"]["mae"].mean == pytest.approx(0.2)
    assert gaps["total"]["mse"].mean == pytest.approx(0.08)


@pytest.mark.parametrize("name", ["accuracy", "auc", "balanced_accuracy"])
def test_equal_scores_have_a_gap_of_exactly_zero(name: str) -> None:
    interval = gap.bootstrap_gap(arms(), get([name]), resamples=100, seed=0)["protection"][name]
    assert (interval.mean, interval.low, interval.high) == (0.0, 0.0, 0.0)
    assert math.copysign(1, interval.mean) == 1.0  # no "-0.0" on screen


def test_equal_regression_scores_have_a_gap_of_exactly_zero() -> None:
    rng = np.random.default_rng(0)
    outputs, targets = rng.normal(size=(2, 500))
    scores = Scores(outputs, targets, np.zeros(500, dtype=np.int64))
    twin = Scores(outputs.copy(), targets.copy(), scores.sites)
    gaps = gap.bootstrap_gap({"federated_integer": scores, "federated": twin}, get(["mse"]), 100, 0)
    interval = gaps["protection"]["mse"]
    assert (interval.mean, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_a_part_without_both_of_armshas_no_entries() -> None:
    some = {name: scores for name, scores in arms().items() if name != "federated_integer"}
    gaps = gap.bootstrap_gap(some, get(["auc"]), resamples=20, seed=0)
    assert set(gaps) == set(gap.PARTS)
    assert gaps["quantisation"] == {}
    assert gaps["protection"] == {}
    assert set(gaps["total"]) == {"auc"}
    assert gap.bootstrap_gap({}, get(["auc"])) == {part: {} for part in gap.PARTS}


def test_other_pairs_of_of_armscan_be_asked_for() -> None:
    pair = {"local_only": ("centralised", "local_only")}
    gaps = gap.bootstrap_gap(arms(), get(["auc"]), resamples=50, seed=0, parts=pair)
    assert set(gaps) == {"local_only"}
    assert gaps["local_only"]["auc"].mean > 0  # type: ignore[operator]


def test_resampling_is_paired_and_seeded() -> None:
    """A constant handicap of every row leaves no spread, although each arm alone varies."""
    targets = np.random.default_rng(0).normal(size=60)
    sites = np.zeros(60, dtype=np.int64)
    scores = {
        "centralised": Scores(targets + 1.0, targets, sites),
        "federated": Scores(targets + 3.0, targets, sites),
    }
    interval = gap.bootstrap_gap(scores, get(["mae"]), resamples=200, seed=0)["total"]["mae"]
    assert interval.low == pytest.approx(2.0, abs=1e-12)
    assert interval.high == pytest.approx(2.0, abs=1e-12)
    first, again, other = (
        gap.bootstrap_gap(arms(), get(["auc"]), resamples=200, seed=seed)["total"]["auc"]
        for seed in (7, 7, 8)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize(("rows", "resamples"), [(ROWS, 300), (20_000, 60)], ids=str)
def test_the_bootstrap_agrees_with_resampling_rows_one_by_one(rows: int, resamples: int) -> None:
    """Of many rows it is computed in blocks of resamples."""
    scores = arms(rows)
    every = np.random.default_rng(3).integers(0, rows, size=(resamples, rows))
    differences = []
    for drawn in every:
        a, b = (
            METRICS["auc"].exact(scores[arm].outputs[drawn], scores[arm].targets[drawn])
            for arm in ("centralised", "federated")
        )
        differences.append(a - b)  # type: ignore[operator]
    low, high = np.quantile(differences, [0.025, 0.975])
    interval = gap.bootstrap_gap(scores, get(["auc"]), resamples=resamples, seed=3)["total"]["auc"]
    assert interval.low == pytest.approx(low, abs=1e-12)
    assert interval.high == pytest.approx(high, abs=1e-12)


def test_a_metric_that_is_undefined_has_no_interval() -> None:
    one_class = Scores(np.ones(5), np.ones(5, dtype=np.int64), np.zeros(5, dtype=np.int64))
    both = {"centralised": one_class, "federated": one_class}
    interval = gap.bootstrap_gap(both, get(["auc"]), resamples=20, seed=0)["total"]["auc"]
    assert (interval.mean, interval.low, interval.high) == (None, None, None)
    none = Scores(np.zeros(0), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    empty = {"centralised": none, "federated": none}
    interval = gap.bootstrap_gap(empty, get(["accuracy"]), resamples=20, seed=0)["total"][
        "accuracy"
    ]
    assert interval.to_json()["mean"] is None
    assert interval.n == 0


def test_a_rare_class_that_some_resamples_miss_still_has_an_interval() -> None:
    targets = np.array([1, 1] + [0] * 30)
    logits = np.random.default_rng(0).normal(size=(2, 32)) + targets
    sites = np.zeros(32, dtype=np.int64)
    scores = {
        "centralised": Scores(logits[0], targets, sites),
        "federated": Scores(logits[1], targets, sites),
    }
    interval = gap.bootstrap_gap(scores, get(["auc"]), resamples=200, seed=0)["total"]["auc"]
    assert interval.low is not None


def test_of_armsover_other_rows_are_refused() -> None:
    scores = arms() | {"federated": arm(1.0, 9, rows=ROWS - 1)}
    with pytest.raises(BadInput, match=r"arm federated \(183\)"):
        gap.bootstrap_gap(scores, get(["auc"]), resamples=5, seed=0)


def test_a_thousand_resamples_take_a_fraction_of_a_second() -> None:
    scores, metrics = arms(), get(("accuracy", "auc"))
    best = math.inf
    for _ in range(3):
        started = time.process_time()
        gap.bootstrap_gap(scores, metrics, resamples=1000, seed=0)
        best = min(best, time.process_time() - started)
    assert best < 0.3  # of this process; 0.012 s where it was written


# ------------------------------------------------------------------ several splits


def test_nadeau_bengio_against_the_formula_written_out() -> None:
    differences = [0.02, -0.01, 0.03, 0.00, 0.015]
    interval = gap.nadeau_bengio(differences, 1 / 4)
    reach = 2.7764451051977987 * math.sqrt(variance(differences) * (1 / 5 + 1 / 4))
    assert interval.mean == pytest.approx(mean(differences))
    assert interval.low == pytest.approx(mean(differences) - reach)
    assert interval.high == pytest.approx(mean(differences) + reach)
    assert interval.method == "95 % Nadeau-Bengio corrected t over 5 splits"
    assert interval.n == 5


def test_nadeau_bengio_of_few_or_equal_differences() -> None:
    assert gap.nadeau_bengio([], 0.25).mean is None
    single = gap.nadeau_bengio([0.1], 0.25)
    assert (single.mean, single.low, single.high) == (0.1, None, None)
    equal = gap.nadeau_bengio([0.1] * 25, 0.25)
    assert (equal.mean, equal.low, equal.high) == (0.1, 0.1, 0.1)
    with pytest.raises(BadInput, match="ratio"):
        gap.nadeau_bengio([0.1, 0.2], 0.0)


def test_the_correction_covers_where_the_ordinary_t_interval_does_not() -> None:
    """300 data sets, 15 random splits each: predict by the training mean, or by 0.

    The expected difference of squared errors is known: (s^2 + mu^2) - s^2 (1 + 1/n_train).
    """
    rng = np.random.default_rng(0)
    train, test, splits, mu = 40, 10, 15, 0.3
    true = mu**2 - 1 / train
    corrected = naive = 0
    for _ in range(300):
        rows = rng.normal(mu, 1.0, size=train + test)
        order = rng.permuted(np.tile(np.arange(train + test), (splits, 1)), axis=1)
        centre = rows[order[:, :train]].mean(axis=1, keepdims=True)
        held_out = rows[order[:, train:]]
        differences = (held_out**2 - (held_out - centre) ** 2).mean(axis=1)
        interval = gap.nadeau_bengio(differences.tolist(), test / train)
        assert interval.low is not None
        assert interval.high is not None
        assert interval.mean is not None
        corrected += interval.low <= true <= interval.high
        shrink = math.sqrt((1 / splits) / (1 / splits + test / train))
        naive += abs(true - interval.mean) <= shrink * (interval.high - interval.mean)
    assert corrected / 300 > 0.85
    assert naive / 300 < 0.75
    assert corrected > naive


def cell(seed: int, fold: int, auc: float | None, lost: float | None) -> SplitResult:
    return SplitResult(
        seed, fold, "", {"centralised": {"auc": 0.9}, "federated": {"auc": auc}}, {"total": {"auc": lost}},
        {"va": {"federated": {"auc": auc}}},
    )  # fmt: skip


def test_cells_are_summarised_per_arm_part_and_site() -> None:
    cells = [cell(0, 0, 0.8, 0.1), cell(0, 1, 0.7, 0.2), cell(1, 0, None, None)]
    of_arms, gaps, per_site = gap.over_splits(cells, 0.25)
    assert of_arms["centralised"]["auc"].mean == 0.9
    assert of_arms["centralised"]["auc"].sd == pytest.approx(0.0, abs=1e-12)
    assert of_arms["centralised"]["auc"].n == 3
    federated = of_arms["federated"]["auc"]
    assert federated.n == 2
    assert federated.mean == pytest.approx(0.75)
    assert federated.sd == pytest.approx(math.sqrt(0.005))
    assert gaps["total"]["auc"] == gap.nadeau_bengio([0.1, 0.2], 0.25)
    assert per_site["va"].arms == {"federated": {"auc": pytest.approx(0.75)}}


def test_a_metric_undefined_in_every_cell_is_null_not_missing() -> None:
    _, gaps, per_site = gap.over_splits([cell(0, 0, None, None)], 0.25)
    assert gaps["total"]["auc"].mean is None
    assert gaps["total"]["auc"].n == 0
    assert per_site["va"].arms["federated"]["auc"] is None
    assert gap.over_splits([], 0.25) == ({}, {}, {})
