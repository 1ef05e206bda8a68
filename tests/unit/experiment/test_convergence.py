"""Whether an arm was still improving or had been better before: said only where it is more than the noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.results import result_of, stored

import fedcore
from fedcore.experiment.convergence import Divergence, diverged, trends
from fedcore.report import markdown, page
from fedcore.report import sentences as say
from fedcore.report.terminal import as_text, summary
from fedcore.results import RoundRow

ROUNDS = np.arange(20)


def trend(scores, lower=False):
    rows = [RoundRow(arm="federated", round=i, auc=y) for i, y in enumerate(scores, start=1)]
    return trends(rows, "auc", lower=lower).get("federated")


def noise(rounds, size, seed):
    return np.random.default_rng(seed).normal(0, size, rounds)


@pytest.mark.parametrize(
    ("federated", "centralised", "found"),
    [
        ([0.7, 0.3, 0.5, 0.61], [0.7, 0.3, 0.3, 0.31], Divergence(2, 0.3, 0.61)),
        ([0.7, 0.3, 0.9, 0.59], [0.7, 0.3, 0.3, 0.31], None),  # swings, and ends near its best
        ([0.7, 0.3, 0.5, 0.61], [0.7, 0.2, 0.3, 0.41], None),  # both learn training rows by heart
        ([0.7, 0.3, 0.5, 0.61], [], Divergence(2, 0.3, 0.61)),
        ([-1.0, -2.0, -0.5, -0.4], [], None),  # of a density
        ([None, None], [0.7, 0.3], None),
        ([], [0.7, 0.3], None),
    ],
)
def test_an_arm_diverges_where_its_loss_ends_far_above_its_least(federated, centralised, found):
    losses = {"federated": federated, "centralised": centralised}
    rows = [
        RoundRow(arm=arm, round=place, loss=loss)
        for arm, of_arm in losses.items() for place, loss in enumerate(of_arm, start=1)
    ]  # fmt: skip
    assert diverged(rows) == found


@pytest.mark.parametrize("rounds", [8, 20, 60])
@pytest.mark.parametrize("test_rows", [None, 185], ids=["smooth", "in steps of a test row"])
def test_noise_around_one_value_is_hardly_ever_said_to_be_a_trend(rounds, test_rows):
    said = 0
    for seed in range(400):
        scores = 0.85 + noise(rounds, 0.01, seed)
        said += trend(np.round(scores * test_rows) / test_rows if test_rows else scores) is not None
    assert said <= 8


def test_scores_that_wander_are_seldom_said_to_be_a_trend():
    said = 0
    for seed in range(400):
        wander = noise(40, 0.01, seed)
        for t in range(1, 40):
            wander[t] += 0.7 * wander[t - 1]
        said += trend(0.8 + wander) is not None
    assert said <= 40


@pytest.mark.parametrize("lower", [False, True])
def test_a_rise_above_the_noise_is_said_with_its_size(lower):
    scores = 0.70 + 0.005 * ROUNDS + noise(20, 0.001, 1)
    found = trend(1 - scores if lower else scores, lower)
    assert found is not None and found.window == 6 and found.best_round is None
    assert found.gained == pytest.approx(0.025, abs=0.004)


@pytest.mark.parametrize(
    "scores",
    [
        0.9 - 0.2 * np.exp(-ROUNDS / 3),  # has reached its level
        np.where(ROUNDS < 16, 0.7, 0.8),  # one step up, and no rise since then
        0.8 + 0.00005 * ROUNDS,  # a rise, but of less than a tenth of a point
        np.full(20, 0.9),
        0.7 + 0.01 * np.minimum(ROUNDS, 15),  # rose until five rounds ago
    ],
    ids=["level", "step", "tiny", "constant", "rose before"],
)
def test_a_curve_that_rises_no_more_is_not_said_to(scores):
    found = trend(scores)
    assert found is None or found.gained is None


@pytest.mark.parametrize("lower", [False, True])
def test_an_arm_past_its_best_is_said_with_the_round(lower):
    scores = np.interp(ROUNDS, [0, 5, 19], [0.80, 0.924, 0.86]) + noise(20, 0.001, 2)
    scores[5] = 0.926
    found = trend(1 - scores if lower else scores, lower)
    assert found is not None and found.gained is None and found.best_round == 6
    best = 1 - 0.926 if lower else 0.926
    assert found.best == pytest.approx(best) and found.last == pytest.approx(
        1 - scores[-1] if lower else scores[-1]
    )


def test_too_few_rounds_and_undefined_scores_say_nothing():
    assert trend([0.1 * i for i in range(7)]) is None
    assert trend([0.1 * i for i in range(8)]) is not None
    assert trend([None] * 20) is None
    assert trend([*np.linspace(0, 1, 10), float("nan")]) is None
    with_gaps = [None if i % 5 == 0 else 0.5 + 0.01 * i for i in range(20)]
    found = trend(with_gaps)
    assert found is not None and found.gained


# --------------------------------------------------------------------------------------------- the sentence

RISING = {"last": 0.9, "window": 5, "gained": 0.007}
PAST = {"last": 0.901, "best_round": 6, "best": 0.924}


def of_run(arms, metric="auc", validated=False, **more):
    convergence = {"metric": metric, "validated": validated, "arms": arms}
    return result_of(stored("heart"), convergence=convergence, **more)


def test_the_sentence_names_rows_rounds_and_sizes():
    both = of_run({"federated": RISING, "centralised": PAST, "local_only": PAST})
    assert say.converged(both) == (
        "AUC on the test rows, round by round: federated still rising, +0.70 points in the last 5 rounds; "
        "centralised was best at round 6 (0.924, at the end 0.901). To choose the number of rounds by rows that "
        "are not tested on: `--validate 0.2`."
    )
    apart = of_run({"centralised": PAST}, validated=True)
    assert say.converged(apart) == (
        "Validation AUC, round by round: centralised was best at round 6 (0.924, at the end 0.901)."
    )
    errors = of_run(
        {"federated": {"last": 3.1, "window": 6, "gained": 0.25}},
        "mae",
        metrics=["mae"],
        lower_is_better=["mae"],
    )
    assert (
        "MAE on the test rows, round by round: federated still falling, -0.250 in the last 6 rounds."
        in say.converged(errors)
    )
    for nothing in (of_run({}), of_run({"local_only": RISING}), result_of(stored("heart"))):
        assert say.converged(nothing) == ""


def test_it_stands_below_the_headline_of_every_report():
    both = of_run({"federated": RISING})
    screen = " ".join(as_text(summary(both)).split())
    assert "federated still rising, +0.70 points in the last 5 rounds" in screen
    assert screen.index("lost") < screen.index("still rising") < screen.index("points lost")
    assert "federated still rising" in markdown.render(both)
    assert "still rising" not in markdown.render(result_of(stored("heart")))


def test_the_page_of_runs_beside_each_other_has_it_of_those_that_say_it(no_drawings):
    said, silent = of_run({"federated": RISING}), result_of(stored("heart"))
    assert "Number of rounds" in page.render([(said, []), (silent, [])])
    assert "Number of rounds" not in page.render([(silent, [])])


def test_a_comparison_says_what_half_of_its_splits_show():
    def compared(*arms):
        found = stored("heart_compare")
        cell = found["cells"][0]
        cells = [
            cell | {"convergence": {"metric": "auc", "validated": True, "arms": each}}
            for each in arms
        ]
        return say.converged(result_of(found, cells=cells))

    other = PAST | {"best_round": 8, "best": 0.926, "last": 0.903}
    assert compared({"centralised": PAST, "federated": RISING}, {"centralised": other}) == (
        "Validation AUC, round by round: federated still rising in 1 of 2 splits, +0.70 points in the last 5 rounds "
        "on average; centralised was best at about round 7 in 2 of 2 splits (0.925, at the end 0.902)."
    )
    assert compared({"federated": RISING}, {}, {}) == ""


# ------------------------------------------------------------------------------------------------------ runs


def line(source):
    x = np.random.default_rng(source).normal(size=(40, 2)).astype("f4")
    return x, x @ np.array([3.0, -2.0], dtype="f4")


def test_a_run_states_what_its_rounds_show(tmp_path, no_drawings):
    task = fedcore.Task(
        "line", line, lambda: torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Flatten(0)),
        torch.nn.functional.mse_loss, metrics=("mse",), sites={"a": 1, "b": 2, "c": 3},
        defaults={"protection": "plain", "arms": "federated", "resamples": 0, "lr": 0.01},
    )  # fmt: skip
    run = fedcore.simulate(task, rounds=8, out=tmp_path / "run")
    found = run.result.convergence
    assert found is not None and (found.metric, found.validated) == ("mse", False)
    assert found.arms == trends(run.rounds, "mse", lower=True)
    assert found.arms["federated"].gained and "federated still falling" in str(run)
    apart = fedcore.simulate(task, rounds=8, validate=0.2, out=tmp_path / "apart")
    stated = apart.result.convergence
    assert stated is not None and stated.validated
    assert stated.arms == trends(apart.rounds, "validation_mse", lower=True)
    short = fedcore.simulate(task, rounds=2, out=tmp_path / "short")
    assert short.result.convergence is None and "convergence" not in short.result.to_json()
