"""Rows kept apart to judge rounds by: who is among them, which round is kept, when a run ends."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.results import result_of, stored

import fedcore
from fedcore.cli.up import rehearse
from fedcore.errors import BadInput
from fedcore.experiment import api, loop
from fedcore.experiment.outcome import build_result
from fedcore.experiment.prepare import job_for, prepare
from fedcore.experiment.selection import Selection
from fedcore.learning.data.rows import ArrayRows
from fedcore.learning.data.split import FoldSplit, ValidationPart
from fedcore.learning.task import load_task
from fedcore.report import markdown, tables
from fedcore.results import RoundRow

pytestmark = pytest.mark.usefixtures("no_drawings")


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def heart(**settings):
    short = {"rounds": 6, "protection": "plain", "lr": 2.0, "resamples": 20}
    return fedcore.simulate("heart", **short | settings)


# ------------------------------------------------------------------------------------- which rows are apart


def rows_of(labels):
    x = torch.arange(len(labels), dtype=torch.float32)[:, None]
    return ArrayRows(x, torch.tensor(labels))


def numbers(rows):
    return sorted(rows.x[:, 0].int().tolist())


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.floats(0.01, 0.99),
    st.integers(0, 3),
)
def test_the_validation_part_is_a_stratified_share_of_the_training_rows(labels, share, seed):
    rows = rows_of(labels)
    train, apart = ValidationPart(share, seed, 0).divide(rows, "a")
    assert sorted(numbers(train) + numbers(apart)) == list(range(len(labels)))
    assert len(train) >= 1 and len(apart) <= share * len(labels) + 0.5
    assert len(apart) >= min(share * len(labels) - 0.5, len(labels) - 1)
    for label in set(labels):
        wanted = share * labels.count(label)
        assert apart.y.tolist().count(label) <= wanted + 1
    again = ValidationPart(share, seed, 0).divide(rows, "a")
    assert numbers(again[1]) == numbers(apart)


def test_another_seed_fold_or_site_keeps_other_rows_apart():
    rows = rows_of([0, 1] * 50)
    parts = [
        numbers(ValidationPart(0.2, seed, fold).divide(rows, site)[1])
        for seed, fold, site in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))
    ]
    assert len(set(map(tuple, parts))) == 4


def recording(seen, pair):
    """A task whose own loop takes note of every row that trains; each row has a number of its own."""

    def data(source):
        x = np.arange(30 * source, 30 * source + 30, dtype="f4")[:, None]
        rows = x, np.arange(30) % 2
        return ((x[:20], rows[1][:20]), (x[20:], rows[1][20:])) if pair else rows

    def train(module, rows, fit):
        for x, _ in rows.batches(64, None):
            seen[fit.site].update(x[:, 0].int().tolist())

    return fedcore.Task(
        "recording", data, lambda: torch.nn.Linear(1, 2), torch.nn.functional.cross_entropy, train=train,
        sites={"a": 0, "b": 1, "c": 2}, defaults={"rounds": 1, "protection": "plain"},
    )  # fmt: skip


@pytest.mark.parametrize("pair", [False, True], ids=["folds", "own test rows"])
def test_no_arm_trains_on_them_and_the_test_rows_stay(pair):
    found = {}
    for share in (None, 0.25):
        seen = {name: set() for name in ("", "a", "b", "c")}
        run = fedcore.simulate(recording(seen, pair), validate=share)
        found[share] = seen, run.result
    (whole, before), (part, after) = found[None], found[0.25]
    assert after.rows.test == before.rows.test
    assert after.rows.train + after.rows.validation == before.rows.train
    for name in ("a", "b", "c", ""):
        assert part[name] < whole[name]
    assert part[""] == part["a"] | part["b"] | part["c"]
    assert len(part[""]) == after.rows.train
    site = after.per_site["a"]
    assert site.rows == 30 == site.train_rows + site.validation_rows + site.test_rows
    assert {"validation_accuracy", "validation_loss"} <= set(
        fedcore.load(after.origin.run).rounds[0]
    )
    assert "validation_loss" not in fedcore.load(before.origin.run).rounds[0]


def test_statistics_are_of_the_rows_that_train():
    means = [
        prepare(*job_for(None, {"standardise": "federated", "validate": share})).statistics.mean
        for share in (None, 0.3)
    ]
    assert not np.array_equal(*means)


# ------------------------------------------------------------------------------------- which round is best


def selection(metric="auc", lower=False, patience=None):
    return Selection((metric,), metric, lower, patience)


def row(round_, value, loss=None, arm="federated", metric="auc"):
    columns = {"arm": arm, "round": round_, metric: 0.5, f"validation_{metric}": value}
    return RoundRow(columns | {"validation_loss": loss})


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([(0.7, 1.0), (0.9, 1.0), (0.8, 1.0)], 2),
        ([(0.7, 1.0), (0.9, 1.0), (0.9, 0.5), (0.9, 0.5)], 3),
        ([(None, 0.1), (0.6, 1.0), (None, 0.1)], 2),
        ([(0.6, None), (0.6, None)], 1),
    ],
    ids=["highest", "of equals the smaller loss, then the earlier", "undefined is never best", "no loss"],
)  # fmt: skip
def test_the_best_round_by_the_validation_rows(rows, best):
    chosen = selection()
    for round_, (value, loss) in enumerate(rows, start=1):
        chosen.seen(row(round_, value, loss))
    assert chosen.result()["federated"].round == best


def test_of_an_error_the_least_is_best_and_arms_have_rounds_of_their_own():
    chosen = selection("mae", lower=True)
    for arm, values in {"federated": (3.0, 2.0), "centralised": (1.0, 1.5)}.items():
        for round_, value in enumerate(values, start=1):
            chosen.seen(row(round_, value, arm=arm, metric="mae"))
    assert {arm: found.round for arm, found in chosen.result().items()} == {
        "federated": 2,
        "centralised": 1,
    }


def test_an_arm_without_a_defined_round_has_no_best_one():
    chosen = selection(patience=2)
    assert not chosen.seen(row(1, None, 0.4)) and chosen.result() == {}
    assert not chosen.out_of_patience(1)
    assert chosen.out_of_patience(2) == "no better validation AUC in 2 rounds (best: none)"


def test_auc_is_chosen_by_where_the_task_has_it():
    task = replace(load_task("heart"), metrics=("accuracy", "auc", "confusion_matrix"))
    job = SimpleNamespace(round=SimpleNamespace(patience=None))
    found = Selection.of(SimpleNamespace(task=task, job=job))
    assert found.metric == "auc" and found.metrics == ("accuracy", "auc")


# -------------------------------------------------------------------------------- keep = "best" and patience


def test_the_model_of_the_best_round_is_released_and_every_number_is_of_it():
    kept = heart(validate=0.2, keep="best", rounds=4)
    best = kept.result.best
    assert len({found.round for found in best.values()}) > 1  # or it shows nothing
    assert best["federated"].round < 4 and kept.result.kept == "best"
    rows = {(row.arm, row.round): row for row in kept.rounds}
    for arm, found in best.items():
        assert kept.result.arms[arm].metrics == found.metrics
        assert rows[arm, found.round].number("auc") == found.metrics["auc"]
    columns = [key for key in rows["federated", 1] if key.startswith("validation_")]
    assert sorted(columns) == ["validation_accuracy", "validation_auc", "validation_loss"]
    last = heart(validate=0.2, rounds=4).result
    assert last.kept is None and last.best == best
    assert last.model_sha256 != kept.result.model_sha256
    assert (
        heart(validate=0.2, rounds=4, keep="last").result.to_json().keys() == last.to_json().keys()
    )


def test_the_protected_metrics_and_the_sites_scores_are_of_the_best_round_too():
    settings = {"validate": 0.2, "protection": "layered", "arms": "federated", "lr": 3.0}
    kept = heart(**settings, rounds=4, keep="best").result
    round_ = int(kept.best["federated"].round)
    assert round_ < 4
    shorter = heart(**settings, rounds=round_).result
    assert kept.model_sha256 == shorter.model_sha256 and kept.site_mean == shorter.site_mean
    assert kept.arms["federated"].metrics == shorter.arms["federated"].metrics
    assert kept.protected.metrics == shorter.protected.metrics
    assert kept.per_site["va"].arms == shorter.per_site["va"].arms
    assert kept.sums.unequal_rounds == 0


CHOOSING = {"validate": 0.2, "keep": "best", "patience": 2, "rounds": 12}


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """A run that ended by its patience."""
    return heart(**CHOOSING, out=tmp_path_factory.mktemp("chosen") / "run")


def test_a_run_ends_when_the_federated_arm_was_not_better_for_so_many_rounds(chosen):
    result = chosen.result
    best = result.best["federated"].round
    assert result.rounds == best + 2 < 12
    assert result.stopped == f"no better validation AUC in 2 rounds (best: round {best})"
    scores = [r.number("validation_auc") for r in chosen.rounds if r.arm == "federated"]
    assert len(scores) == result.rounds and max(scores) == scores[best - 1]
    assert {r.round for r in chosen.rounds if r.arm == "centralised"} == set(
        range(1, result.rounds + 1)
    )


@pytest.mark.parametrize("place", ["in a round", "after the last round"])
def test_an_interrupted_run_chooses_as_a_whole_one(chosen, stand_in, place):
    def interrupt(*found):
        if len(found) > 1 or (found[0].round, found[0].arm) == (
            chosen.result.rounds - 1,
            "federated",
        ):
            raise KeyboardInterrupt

    stand_in(loop, build_result=interrupt)
    with pytest.raises(KeyboardInterrupt):
        heart(**CHOOSING, on_round=interrupt if place == "in a round" else None, out="broken")
    stand_in(loop, build_result=build_result)
    again = api.resume("broken").result
    for key in ("model_sha256", "rounds", "stopped", "best", "arms", "gap"):
        assert again[key] == chosen.result[key], key


def test_a_comparison_has_the_mean_of_its_splits_best_rounds():
    found = fedcore.compare(
        "heart",
        seeds=1,
        folds=2,
        rounds=3,
        protection="plain",
        validate=0.2,
        keep="best",
        out="compared",
    ).result
    rounds = [cell.best["federated"].round for cell in found.cells]
    assert found.best["federated"].round == sum(rounds) / 2 and found.kept == "best"
    reached = [cell.arms["federated"]["auc"] for cell in found.cells]
    assert found.best["federated"].metrics["auc"] == pytest.approx(sum(reached) / 2)
    assert "Best round by the validation rows" in markdown.render(found)


# --------------------------------------------------------------------------------------- what is refused, said


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"keep": "best"}, "round.keep: found 'best' without round.validate"),
        ({"patience": 2}, "round.patience: found 2 without round.validate"),
        ({"validate": 0}, "round.validate: found 0, expected greater than 0"),
        ({"validate": 1.0}, "round.validate: found 1.0, expected less than 1"),
        (
            {"validate": 0.2, "patience": 0},
            "round.patience: found 0, expected greater than or equal to 1",
        ),
        (
            {"validate": 0.2, "keep": "first"},
            "round.keep: found 'first', expected 'last' or 'best'",
        ),
        ({"validate": 0.0001}, "round.validate: found no row in a share of 0.0001"),
    ],
)
def test_what_cannot_choose_a_round_is_refused(settings, says):
    with pytest.raises(BadInput) as found:
        heart(**settings)
    assert says in str(found.value) and found.value.remedy


def test_a_deployment_on_this_machine_keeps_its_last_round():
    with pytest.raises(BadInput, match=r"round.validate: found 0.2, expected none in a deployment"):
        rehearse(
            [{"task": "heart", "validate": 0.2}], None, out=None
        )  # refused before anything is told


def test_the_best_rounds_of_several_runs_stand_side_by_side():
    best = {
        "federated": {
            "round": 6,
            "validation": {"auc": 0.9},
            "metrics": {"auc": 0.88, "accuracy": 0.8},
        }
    }
    with_best = result_of(stored("heart"), best=best)
    (alone,) = tables.best_rounds([with_best, result_of(stored("heart"))])
    assert [cell.text for cell in alone.rows[0]] == ["federated", "6", "0.900", "0.880", "0.800"]
    (both,) = tables.best_rounds([with_best, with_best])
    assert [cell.text for cell in both.rows[0]] == ["federated", "round 6", "round 6"]
    assert tables.best_rounds([result_of(stored("heart"))]) == []
    best["federated"]["round"] = 29 / 3
    (mean,) = tables.best_rounds([result_of(stored("heart_compare"), best=best)])
    assert [cell.text for cell in mean.rows[0]][:2] == ["federated", "9.7"]


def test_folds_and_the_validation_part_leave_one_another_alone():
    rows = rows_of([0, 1] * 30)
    train, test = FoldSplit(0, 1, 5).divide(rows, "a")
    rest, apart = ValidationPart(0.25, 0, 1).divide(train, "a")
    assert sorted(numbers(rest) + numbers(apart) + numbers(test)) == list(range(60))
    assert (len(rest), len(apart), len(test)) == (36, 12, 12)
