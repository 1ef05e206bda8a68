"""Runs with noise in their sums: what leaves a site, what is abandoned, and what a person is told."""

import json

import numpy as np
import pytest

import fedcore
from fedcore.cli.reproduce import reproduce
from fedcore.errors import RoundAbandoned
from fedcore.experiment.loop import Experiment
from fedcore.experiment.prepare import job_for, prepare
from fedcore.learning.private_gradients import clipped_sum
from fedcore.secagg.encode.quantise import dequantise
from fedcore.secagg.protocol.schedule import PlannedRound

SETTINGS = {
    "arms": ["federated"], "protection": "masked", "max_examples": 320,
    "epsilon": 3, "rounds": 12, "clip": 1.5, "lr": 2.0,
}  # fmt: skip


def prepared(**settings):
    task, job = job_for(None, {**SETTINGS, **settings})
    return prepare(task, job)


def test_what_rides_with_a_private_vector_is_the_same_whatever_the_rows_are():
    found = prepared()
    plan, federation = found.plan, found.federation
    step = PlannedRound("update", 1)
    riding = [dict(site.contribute(plan, step, federation.state)[1]) for site in federation.sites]
    assert all(each == riding[0] for each in riding)
    assert riding[0].pop("weight") == [320]
    assert not any(any(values) for values in riding[0].values())


def test_second_vector_of_the_same_rows_and_seed_has_other_noise():
    found = prepared()
    site, step = found.federation.sites[0], PlannedRound("update", 1)
    one, other = (site.contribute(found.plan, step, found.federation.state)[0] for _ in range(2))
    assert (one != other).any()


def test_opened_sum_is_the_clipped_gradients_and_at_least_the_accounted_noise():
    found = prepared(drop=["1:submit:va"])
    plan, federation = found.plan, found.federation
    clean = np.zeros(plan.coordinates)
    for site in federation.sites[:3]:
        site.flat.write(federation.state.server.model)
        clean += clipped_sum(
            site.task, site.flat.module, site.standard_rows(federation.state).train,
            clip=1.5, unit="record", seed=0, round_=1, site=site.site.id,
        )[0]  # fmt: skip
    start = federation.state.server.bound
    total = federation.advance().total
    opened = dequantise(total.opened.coordinates, plan.packing.bits, start, 3)
    noise = opened / (-plan.train.lr / plan.max_examples) - clean
    # 3 survivors of which 2 count: sqrt(3 / 2) of z C, within 4 sigma of 31 values.
    expected = plan.privacy.noise_multiplier * 1.5 * (3 / 2) ** 0.5
    assert 0.5 * expected < noise.std() < 1.6 * expected


def test_round_with_fewer_shares_than_assumed_is_abandoned_before_anything_is_opened():
    found = prepared(drop=["1:submit:va", "1:submit:hungary"])
    with pytest.raises(RoundAbandoned):
        found.federation.advance()
    assert found.federation.state.done is None


def test_private_job_has_its_rounds_of_training_and_no_other():
    found = prepared(rounds=2)
    steps = []
    while found.federation.step is not None:
        steps.append(found.federation.step)
        found.federation.advance()
    assert steps == [PlannedRound("update", 1), PlannedRound("update", 2)]


def test_heart_keeps_most_of_its_accuracy_at_epsilon_three():
    experiment = Experiment(prepared(protection="masked"))
    *_, last = experiment.rounds()
    assert last["auc"] > 0.82  # .888 in the mean over splits and noise, sd .01; .5 without learning
    assert experiment.federation.guards == ()


def test_run_prints_and_writes_what_is_bounded(tmp_path):
    fedcore.simulate("heart", out=tmp_path / "run", **{**SETTINGS, "rounds": 2})
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert not result["protected_metrics"]
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert "epsilon 3 at delta 1e-05" in plan["label"]
    assert 2.9 < plan["noise"]["epsilon"] <= 3
    assert plan["noise"]["sigma"] >= 4


def test_reproduce_compares_everything_but_the_noise(tmp_path):
    settings = {**SETTINGS, "rounds": 2, "arms": ["local_only", "federated"]}
    fedcore.simulate("heart", out=tmp_path / "run", **settings)
    found = reproduce(tmp_path / "run")
    assert found.same, found.difference
    assert found.model_sha256[0] != found.model_sha256[1]
    assert "noise" in found.except_for
    rounds = tmp_path / "run" / "rounds.jsonl"
    rows = [json.loads(line) for line in rounds.read_text().splitlines()]
    next(row for row in rows if row["arm"] == "local_only")["auc"] += 0.1
    rounds.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "arm local_only: auc" in reproduce(tmp_path / "run").difference
