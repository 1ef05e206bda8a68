"""Runs with noise in their sums: what leaves a site, what is abandoned, and what a person is told."""

import json
from dataclasses import replace

import numpy as np
import pytest

import fedcore
from fedcore.cli.reproduce import _compared, reproduce
from fedcore.config import plan_of
from fedcore.errors import BadInput, RoundAbandoned
from fedcore.experiment.loop import Experiment
from fedcore.experiment.prepare import job_for, prepare
from fedcore.learning.private_gradients import clipped, clipped_sum
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


def test_each_round_of_a_sampled_job_has_other_rows_and_the_step_stays_the_same():
    found = prepared(sample_rate=0.5)
    site, step = found.federation.sites[0], PlannedRound("update", 1)
    rows, counts = len(site.site.train), []
    for _ in range(4):
        site.contribute(found.plan, step, found.federation.state)
        counts.append(site.report.examples)
    assert len(set(counts)) > 1
    assert all(abs(each - rows / 2) < 6 * rows**0.5 / 2 for each in counts)


def test_vector_of_a_site_as_the_unit_is_its_clipped_update_with_the_noise():
    found = prepared()
    site, state = found.federation.sites[0], found.federation.state
    names = tuple(f"s{k:03}" for k in range(100))
    settings = {"unit": "site", "noise": "site", "protection": "plain", "epochs": 2, "lr": 1.0}
    job = job_for(None, {**SETTINGS, **settings, "epsilon": 25, "rounds": 1, "clip": 0.3})[1]
    plan = plan_of(job, site.shape, names, 320)
    update = clipped(site.train(plan, state, 1), 0.3)
    assert np.linalg.norm(update) == pytest.approx(0.3, rel=1e-5), "it is longer unclipped"
    sigma = plan.privacy.noise_multiplier * 0.3 * (1 + plan.noise_grid.rounding)
    along = []
    for _ in range(30):
        fields, riding = site.contribute(plan, PlannedRound("update", 1), state)
        opened = dequantise(fields, plan.packing.bits, plan.range.start, 1)
        along.append(opened @ update / 0.3)
    assert np.mean(along) == pytest.approx(0.3, abs=5 * sigma / 30**0.5)
    assert 0.6 * sigma < np.std(along) < 1.5 * sigma
    assert riding["weight"] == [320]


def test_noise_of_each_site_may_be_seen_alone_and_the_run_says_so():
    found = prepared(noise="site", protection="plain", rounds=1)
    found.federation.advance()
    assert "in every site's vector" in found.label


def test_a_cap_that_would_follow_from_the_rows_is_refused():
    with pytest.raises(BadInput, match=r"^protect.max_examples: found none with privacy.epsilon"):
        prepared(max_examples=None)


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


def test_reproduce_of_a_comparison_compares_the_arms_without_noise(tmp_path):
    settings = {
        **SETTINGS,
        "rounds": 1,
        "arms": ["centralised", "federated"],
        "resamples": 0,
        "folds": 2,
    }
    settings |= {"noise": "site", "protection": "plain"}
    old = fedcore.compare("heart", seeds=1, workers=1, out=tmp_path / "all", **settings).result

    def again(arm):
        """Another run of it, of which one arm has another score."""
        first = old.cells[0]
        arms = first.arms | {arm: {**first.arms[arm], "auc": 0.5}}
        return replace(old, cells=(replace(first, arms=arms, model_sha256="other"), *old.cells[1:]))

    found = _compared(old, again("federated"))
    assert found.same, found.difference
    assert "secret samples" in found.except_for
    assert (
        _compared(old, again("centralised")).difference == "seed 0, fold 0: the split's arms differ"
    )
    without = replace(old, plan=old.plan | {"train": {}})
    assert not _compared(without, again("federated")).same, (
        "the control: without noise every arm counts"
    )


def test_gap_has_a_part_for_privacy_and_the_parts_add_up(tmp_path):
    settings = {**SETTINGS, "rounds": 3, "resamples": 0}
    del settings["arms"]
    gaps = {}
    for epsilon in (0.3, 20):
        run = fedcore.simulate(
            "heart", out=tmp_path / str(epsilon), **{**settings, "epsilon": epsilon}
        )
        gaps[epsilon] = {part: by["auc"].mean for part, by in run.result.gap.items()}
        parts = ("federation", "quantisation", "privacy", "protection")
        assert sum(gaps[epsilon][p] for p in parts) == pytest.approx(
            gaps[epsilon]["total"], abs=1e-12
        )
        assert gaps[epsilon]["protection"] == 0.0
        # A step is a sum over rows, wherever they are.
        assert abs(gaps[epsilon]["federation"]) < 1e-3
        assert "| privacy |" in (run.directory / "report.md").read_text()
    assert abs(gaps[20]["privacy"]) < 0.02  # noise of a standard deviation of half a row
    assert gaps[0.3]["privacy"] != gaps[20]["privacy"]
    assert gaps[0.3]["federation"] == gaps[20]["federation"]


def test_arms_without_noise_go_on_from_a_checkpoint_to_the_same_bits():
    def experiment():
        return Experiment(
            prepared(arms=["centralised", "local_only", "federated_float", "federated"])
        )

    whole = experiment()
    steps = whole.rounds()
    for _ in range(4 * 2):
        next(steps)
    saved, later = whole.save(), experiment()
    later.restore(saved)
    for each in (whole, later):
        each.arms["federated"].step(3)  # of whose sum the survivors are
    for name in ("centralised", "local_only", "federated_float"):
        assert whole.arms[name].step(3) == later.arms[name].step(3)
        assert whole.arms[name].models() == later.arms[name].models()
    assert len(later.arms["federated_float"].models()) == 2
    assert len(set(later.arms["local_only"].models())) == 4
