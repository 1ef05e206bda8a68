"""scores.npz: the outputs, targets and places of every row, as the run's metrics and splits had them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fedcore
from fedcore.cli.console import _as_settings
from fedcore.config import build_job, settings_digest
from fedcore.errors import BadInput

pytestmark = pytest.mark.usefixtures("no_drawings")

SITES = {"north": 1, "south": 2, "coast": 3}
ARMS = ["centralised", "local_only", "federated_float", "federated"]


def rows_of(source, n=50):
    """The first input of a row is its place, so that a row in a file can be found again."""
    random = np.random.default_rng(source)
    x = np.column_stack([np.arange(n) / n, random.normal(size=n)]).astype("float32")
    return x, (x[:, 1] + random.normal(scale=0.5, size=n) > 0).astype("int64")


def task_of(data=rows_of, **more):
    settings = {"metrics": ("accuracy",), "sites": SITES} | more
    loss = torch.nn.functional.cross_entropy
    return fedcore.Task("places", data, lambda: torch.nn.Linear(2, 2), loss, **settings)


def scores_of(task, out, **settings):
    run = fedcore.simulate(
        task, out=out, rounds=2, protection="plain", keep_scores=True, resamples=10, **settings
    )
    with np.load(run.directory / "scores.npz") as found:
        return run, dict(found)


def test_the_metrics_of_every_arm_and_site_follow_from_the_file(tmp_path):
    run, found = scores_of(task_of(), tmp_path / "run")
    for site, values in run.result.per_site.items():
        targets = found[f"{site}/targets"]
        for arm in ARMS:
            right = found[f"{site}/{arm}"].argmax(axis=1) == targets
            assert right.mean() == pytest.approx(values.arms[arm]["accuracy"])


@pytest.mark.parametrize(
    "settings",
    [{}, {"seed": 3, "fold": 2}, {"validate": 0.25}, {"max_examples": 30}],
    ids=["plain", "seed", "validate", "cap"],
)
def test_places_are_those_of_the_rows_that_the_task_returned(settings, tmp_path):
    _, found = scores_of(task_of(), tmp_path / "run", **settings)
    for site, source in SITES.items():
        _, targets = rows_of(source)
        parts = [
            found[f"{site}/{p}"] for p in ("train", "test", "validation") if f"{site}/{p}" in found
        ]
        every = np.concatenate(parts)
        assert len(np.unique(every)) == len(every) == settings.get("max_examples", 50)
        assert (f"{site}/validation" in found) is ("validate" in settings)
        assert np.array_equal(targets[found[f"{site}/test"]], found[f"{site}/targets"])


def test_of_a_task_with_a_test_part_of_its_own_places_count_in_that_part(tmp_path):
    def parts(source):
        x, y = rows_of(source)
        return (x[:40], y[:40]), (x[40:], y[40:])

    _, found = scores_of(task_of(parts), tmp_path / "run")
    assert list(found["north/test"]) == list(range(10))
    assert list(found["north/train"]) == list(range(40))


def test_scores_are_those_of_the_best_round_where_that_is_kept(tmp_path):
    run, found = scores_of(task_of(), tmp_path / "run", validate=0.25, keep="best", lr=3.0)
    outputs = np.concatenate([found[f"{site}/federated"] for site in SITES])
    targets = np.concatenate([found[f"{site}/targets"] for site in SITES])
    right = (outputs.argmax(axis=1) == targets).mean()
    assert right == pytest.approx(run.result.arms["federated"].metrics["accuracy"])


def test_a_run_keeps_no_scores_unless_it_is_asked_to(tmp_path):
    run = fedcore.simulate(
        task_of(), out=tmp_path / "run", rounds=1, protection="plain", resamples=10
    )
    assert not (run.directory / "scores.npz").exists()


def test_a_task_that_evaluates_itself_has_no_scores_of_rows(tmp_path):
    own = task_of(metrics=("close",), evaluate=lambda model, rows: {"close": (1.0, len(rows))})
    with pytest.raises(
        BadInput, match=r"track\.keep_scores: found a task with its own evaluate \(places\)"
    ):
        scores_of(own, tmp_path / "run")


def test_keeping_scores_changes_no_plan():
    assert settings_digest(build_job({"keep_scores": True}), 64) == settings_digest(
        build_job({}), 64
    )


@pytest.mark.parametrize("before", [[], ["--rounds", "3"]], ids=["only", "after another"])
@pytest.mark.parametrize("after", [[], ["--lr", "0.1"]], ids=["last", "before another"])
def test_a_switch_is_on_without_a_value(before, after):
    found = _as_settings([*before, "--keep-scores", *after], set())
    assert "keep_scores=true" in found and len(found) == len(before) + len(after) + 2


@pytest.mark.parametrize("flag", ["--lr", "--protection", "--keep-score"])
def test_another_flag_without_a_value_is_refused(flag):
    with pytest.raises(BadInput, match=f"{flag}: found no value"):
        _as_settings([flag, "--keep-scores"], set())
