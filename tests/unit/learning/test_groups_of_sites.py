"""Robust aggregation: sums of groups, and the trimmed mean of their means, which a few bad groups do not move."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from fedcore.config import build_job
from fedcore.errors import BadInput, PlanRefused
from fedcore.experiment.loop import Experiment
from fedcore.experiment.prepare import job_for, prepare
from fedcore.learning.robust import trimmed_mean
from fedcore.learning.task import Task
from fedcore.secagg.label import Terms, collusion, label_of
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.site_groups import GroupPlan, group_plan

SITES = [f"s{k:02}" for k in range(16)]
USUAL = {
    "resamples": 0, "max_examples": 16, "lr": 0.2, "batch_size": 64, "rounds": 3, "range": 4.0, "bits": 20,
    "adaptive_range": False, "aggregate": "trimmed", "arms": ("federated_float", "federated"),
}  # fmt: skip
LIAR = "s03"


def data(name):
    random = np.random.default_rng(int(name[1:]))
    x = random.normal(size=(15, 3)).astype("f4")
    return x, (x @ np.array([1.0, -2.0, 0.5])).astype("f4").reshape(-1, 1)


def one_step(module, rows, fit):
    x, y = next(iter(rows.batches(len(rows), np.arange(len(rows)))))
    loss = ((module(x) - y) ** 2).mean()
    module.zero_grad()
    loss.backward()
    for parameter in module.parameters():
        parameter.data -= fit.lr * parameter.grad
    if fit.max_grad_norm == 1.0 and fit.site == LIAR:  # a switch that only this task reads
        module.bias.data += 3.0


def task(**changes):
    given = {
        "name": "lines", "data": data, "model": lambda: nn.Linear(3, 1), "loss": nn.MSELoss(),
        "metrics": ("rmse",), "sites": {name: name for name in SITES}, "train": one_step,
    }  # fmt: skip
    return Task(**given | changes)


def trained(**settings):
    found = Experiment(prepare(*job_for(task(), USUAL | {"protection": "plain"} | settings)))
    for _ in found.rounds():
        pass
    return found


def bias(found):
    return found.federated.state.server.parameters[-1]


def test_the_mean_is_without_the_largest_and_smallest_of_each_coordinate():
    means = [np.array(v, dtype=float) for v in ([0, 9], [1, 1], [2, 2], [3, 3], [1e9, -1e9])]
    assert trimmed_mean(means, 1).tolist() == [2.0, 2.0]
    assert trimmed_mean(means, 2).tolist() == [2.0, 2.0]
    assert trimmed_mean(means[:2], 1).tolist() == [0.5, 5.0], "nothing is left to trim"


def test_groups_are_disjoint_cover_the_roster_and_follow_from_the_seed():
    settings = build_job({"aggregate": "trimmed"}).round
    found = group_plan(settings, SITES, 4)
    assert sorted(map(len, found.groups)) == [5, 5, 6]
    assert sorted(site for group in found.groups for site in group) == SITES
    assert found == group_plan(settings, SITES, 4) != group_plan(settings, SITES, 5)


def test_masked_groups_give_the_model_of_plain_ones_and_the_float_arm_its_rounding():
    plain, masked = trained(), trained(protection="masked", rounds=3)
    assert plain.federated.state.canonical() == masked.federated.state.canonical()
    assert plain.federated.unequal_rounds == masked.federated.unequal_rounds == 0
    assert plain.federated.summed == dict.fromkeys(SITES, 3)
    rounded = plain.federated.state.server.parameters
    exact = plain.arms["federated_float"].state.server.parameters
    np.testing.assert_allclose(rounded, exact, atol=1e-4)
    assert RoundPlan.from_json(plain.prepared.plan.to_json()) == plain.prepared.plan


def test_the_model_is_that_of_a_plain_reimplementation():
    """Of one round, in float64 and without any of the code that sums."""
    found = trained(rounds=1)
    start = found.federation.sites[0].initial.astype(np.float64)
    means = []
    for group in found.prepared.plan.server.groups.groups:
        updates = []
        for site in (each for each in found.prepared.sites if each.id in group):
            x = np.asarray(site.train.x, np.float64)
            x, y = (
                np.concatenate([x, np.ones((len(x), 1))], 1),
                np.asarray(site.train.y).reshape(-1),
            )
            updates.append(-0.2 * 2 * x.T @ (x @ start - y) / len(y))
        means.append(np.mean(updates, axis=0))  # every site has 12 rows
    expected = start + np.sort(means, axis=0)[1]
    np.testing.assert_allclose(found.federated.state.server.parameters, expected, atol=1e-4)


def test_a_site_that_lies_moves_the_mean_and_not_the_trimmed_mean():
    honest = {how: bias(trained(aggregate=how)) for how in ("mean", "trimmed")}
    lied = {how: bias(trained(aggregate=how, max_grad_norm=1.0)) for how in ("mean", "trimmed")}
    moved = {how: abs(lied[how] - honest[how]) for how in honest}
    assert moved["mean"] > 0.15
    assert moved["trimmed"] < moved["mean"] / 4


def test_a_group_below_its_threshold_is_left_out_and_two_groups_are_too_few():
    plan = trained(rounds=1).prepared.plan
    first, second, _ = plan.server.groups.groups
    drop = [f"2:submit:{site}" for site in first[:2]]
    found = trained(drop=drop, threshold=9)
    row = next(r for r in found.history if r["arm"] == "federated" and r["round"] == 2)
    assert row["survivors"] == [] and "abandoned" in row, "of two groups nothing could be trimmed"
    more = trained(drop=[f"2:submit:{first[0]}", f"2:submit:{second[0]}"])
    row = next(r for r in more.history if r["arm"] == "federated" and r["round"] == 2)
    assert sorted(row["survivors"]) == sorted(set(SITES) - {first[0], second[0]})


def test_the_label_has_the_figures_of_a_group():
    job = build_job({"aggregate": "trimmed"})
    terms = Terms.of_job(job, 16)
    text, of_five = label_of(terms), label_of(Terms.of_job(build_job(), 5))
    assert "The 16 sites are in groups of 5 or more" in text
    figures = collusion(Terms.of_job(build_job(), 5))
    assert f"Absences survived: {figures.absences} of 5" in text
    assert text.splitlines()[0] == of_five.splitlines()[0]
    assert label_of(
        Terms.of_plan(trained(protection="masked", rounds=1).prepared.plan)
    ) == label_of(Terms.of_job(build_job({"aggregate": "trimmed", "protection": "masked"}), 16))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"sites": dict.fromkeys(SITES[:14], "s00")}, PlanRefused, "with 14 sites in groups of 5"),
        ({"group_sites": 6}, PlanRefused, "with 16 sites in groups of 6, expected at least 18"),
        ({"group_sites": 4}, BadInput, "round.group_sites"),
        ({"trim": 2}, PlanRefused, "round.trim: found 2 of 3 groups"),
        ({"aggregate": "mean", "trim": 2}, BadInput, "round.trim"),
        ({"aggregate": "median"}, BadInput, "round.aggregate"),
        ({"algorithm": "feddyn"}, PlanRefused, "'feddyn'"),
        ({"algorithm": "krum"}, PlanRefused, "krum"),
    ],
)
def test_what_cannot_be_grouped_is_refused(settings, error, words):
    with pytest.raises(error, match=words) as refused:
        prepare(*job_for(task(train=None), USUAL | {"protection": "masked"} | settings))
    assert refused.value.remedy


def test_a_plan_has_groups_of_its_own_roster():
    with pytest.raises(PlanRefused, match="found a group of 4 sites"):
        GroupPlan((SITES[:4], SITES[4:9], SITES[9:]))
