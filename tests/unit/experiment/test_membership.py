"""Membership inference on released models: it finds what an overfitted model remembers, and says how sure it is."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

import fedcore
from fedcore.errors import BadInput
from fedcore.experiment.attacks.membership import at_false_positives, roc_area
from fedcore.experiment.attacks.registry import run_attacks
from fedcore.experiment.prepare import job_for

ROWS = 220


def remembered():
    """Labels drawn by lot: whatever a model knows of a row it has from that row."""

    def data(source):
        rng = np.random.default_rng(source)
        return rng.normal(size=(ROWS, 40)).astype("f4"), rng.integers(0, 2, ROWS)

    def model():
        return torch.nn.Sequential(torch.nn.Linear(40, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))

    return fedcore.Task(
        "lots", data, model, torch.nn.functional.cross_entropy, sites={"a": 1, "b": 2, "c": 3}
    )


ATTACKS = ["membership-quantile", "membership-lira", "membership-rmia"]


@cache
def attacked(**settings):
    layer = {"folds": 2, "protection": "masked", "lr": 0.5, "rounds": 3, "epochs": 12, **settings}
    return run_attacks(*job_for(remembered(), layer), ATTACKS)


def rows(found, attack, protection, measure="ROC-AUC"):
    return [
        r
        for r in found.rows
        if (r.attack, r.protection, r.measure) == (attack, protection, measure)
    ]


@pytest.mark.parametrize("attack", ATTACKS)
def test_rows_that_a_model_remembers_are_told_from_others(attack):
    (found,) = rows(attacked(), attack, "masked")
    assert found.beyond_chance
    assert found.low > 0.65
    (at_rate,) = rows(attacked(), attack, "masked", "true positives at 1.0% false ones")
    assert at_rate.low > 0.01
    assert at_rate.more["false_positives"] <= 0.01
    assert at_rate.low < at_rate.value < at_rate.high


@pytest.mark.parametrize("attack", ATTACKS)
def test_encryption_changes_nothing_of_it(attack):
    ((plain,), (masked,)) = (rows(attacked(), attack, each) for each in ("plain", "masked"))
    assert plain.setting == masked.setting  # the same model
    assert plain.value == masked.value


@pytest.mark.parametrize("attack", ATTACKS)
def test_differential_privacy_takes_it_away(attack):
    found = attacked(epochs=1, epsilon=1, lr=1.0, max_examples=256)
    (private,) = rows(found, attack, "masked")
    assert private.value < 0.6  # 4.5 standard errors: the noise is new each time


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_rate_that_the_rows_do_not_show_has_no_figure(attack):
    (found,) = rows(attacked(), attack, "masked", "true positives at 0.1% false ones")
    assert found.value is None
    assert "found 330 rows that were not trained on, expected at least 2,995" in found.refused


def test_sites_rows_are_told_by_their_uploads_and_not_by_protected_ones():
    layer = {"protection": "masked", "lr": 0.5, "epochs": 10, "rounds": 2}
    plain, masked = run_attacks(*job_for(remembered(), layer), ["source"]).rows
    assert (plain.protection, masked.protection) == ("plain", "masked")
    assert plain.beyond_chance
    assert plain.low > 0.6 > plain.chance == pytest.approx(1 / 3)
    assert masked.value < 0.6  # keys are new each time: 11 standard errors above chance


def test_a_rate_that_is_asked_for_is_refused_before_anything_runs():
    said = []
    with pytest.raises(BadInput, match="expected at least 2,995") as refused:
        run_attacks(*job_for(remembered(), {"folds": 2}), ATTACKS, rates=(0.001,), say=said.append)
    assert "--fpr 0.01" in refused.value.remedy
    assert not said


def test_area_and_its_error_are_those_of_all_pairs():
    rng = np.random.default_rng(0)
    member, other = rng.normal(0.5, 1, 60).round(1), rng.normal(0, 1, 40).round(1)
    pairs = (member[:, None] > other) + 0.5 * (member[:, None] == other)
    area, error = roc_area(member, other)
    assert area == pytest.approx(pairs.mean())
    expected = pairs.mean(1).var(ddof=1) / 60 + pairs.mean(0).var(ddof=1) / 40
    assert error == pytest.approx(expected**0.5)


def test_intervals_of_the_area_hold_as_often_as_they_say():
    rng = np.random.default_rng(1)
    holds = 0
    for _ in range(400):
        area, error = roc_area(rng.normal(size=80), rng.normal(size=60))
        holds += abs(area - 0.5) < 1.96 * error
    assert 0.91 < holds / 400 < 0.98


def test_threshold_lets_at_most_the_rate_of_others_pass():
    member, other = np.arange(100) + 50.0, np.arange(100.0)
    assert at_false_positives(member, other, 0.01) == (51, 1)
    assert at_false_positives(member, other, 0.001) == (50, 0)
    assert at_false_positives(np.ones(5), np.ones(100), 0.01) == (
        0,
        0,
    )  # ties pass together or not at all
