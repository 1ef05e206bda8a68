"""Released models judged by the sums of their metrics: the best one kept, training ended early, a worse one vetoed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from torch import nn

import fedcore
from fedcore.config import build_job, plan_of
from fedcore.errors import BadInput, PlanRefused
from fedcore.experiment.api import resume
from fedcore.experiment.loop import Experiment
from fedcore.experiment.prepare import job_for, prepare
from fedcore.files import read_json
from fedcore.learning.judging import MILLIONTHS, Judgement, judged, kept_model, value_of
from fedcore.learning.optimisers import init_state
from fedcore.learning.state import JobState
from fedcore.learning.task import Task
from fedcore.secagg.judge_plan import JudgePlan
from fedcore.secagg.label import Terms, label_of, leaving_of
from fedcore.secagg.plan import ModelShape, RoundPlan, ServerPlan, Wide
from fedcore.types import SiteId

ROWS = {"a": 40, "b": 24, "c": 32}
USUAL = {
    "protection": "plain", "resamples": 0, "max_examples": 64, "lr": 0.05, "batch_size": 64, "rounds": 12,
    "range": 4.0, "adaptive_range": False, "bits": 20, "judge": "released", "arms": ("federated_float", "federated"),
}  # fmt: skip


def data(name):
    random = np.random.default_rng(ord(name))
    x = random.normal(size=(ROWS[name], 3)).astype("f4")
    return x, (x @ np.array([1.0, -2.0, 0.5])).astype("f4").reshape(-1, 1)


def task(**changes):
    given = {
        "name": "lines", "data": data, "model": lambda: nn.Linear(3, 1), "loss": nn.MSELoss(),
        "metrics": ("rmse",), "sites": {name: name for name in ROWS},
    }  # fmt: skip
    return Task(**given | changes)


def spoiled_from(round_, by=1.7):
    """Training by one step, in which site a pushes the bias up from a round on, by what keeps it there."""

    def train(module, rows, fit):
        x, y = next(iter(rows.batches(len(rows), np.arange(len(rows)))))
        loss = ((module(x) - y) ** 2).mean()
        module.zero_grad()
        loss.backward()
        for parameter in module.parameters():
            parameter.data -= fit.lr * parameter.grad
        if fit.round >= round_ and fit.site == "a":
            module.bias.data += by if fit.round == round_ else 0.4 * by

    return train


def experiment(made=None, **settings):
    found = Experiment(prepare(*job_for(made or task(), USUAL | settings)))
    for _ in found.rounds():
        pass
    return found


def scores(found):
    return [row["rmse"] for row in found.history if row["arm"] == "federated"]


# ----------------------------------------------------------------------------- the rule


def accuracy(right, rows):
    return {"metric:accuracy": [right, rows]}


def states(count):
    return [init_state(np.full(2, k, dtype=np.float32), 2, ServerPlan(), 1.0) for k in range(count)]


def course(plan, rights):
    """The judgement after models with so many of 100 rows right, from the one that the job begins with."""
    found = Judgement()
    for round_, (right, state) in enumerate(zip(rights, states(len(rights)), strict=True)):
        found = judged(plan, found, state, round_, accuracy(right, 100))
        if found.over:
            break
    return found


@pytest.mark.parametrize(
    ("plan", "rights", "best", "latest", "over"),
    [
        (JudgePlan("accuracy", best=True), [50, 70, 60, 70], 1, 3, ""),
        (JudgePlan("accuracy", patience=2), [50, 70, 60, 70], 1, 3, "patience"),
        (JudgePlan("accuracy", patience=3), [50, 70, 60, 70], 1, 3, ""),
        (JudgePlan("accuracy", patience=2), [50, 40, 60, 59, 58, 57], 2, 4, "patience"),
        (JudgePlan("accuracy", veto=0.1), [50, 70, 60, 59], 1, 3, "veto"),
        (JudgePlan("accuracy", veto=0.1), [50, 70, 60, 61], 1, 3, ""),
        (JudgePlan("accuracy", veto=0.0), [50, 50, 49], 0, 2, "veto"),
    ],
)
def test_of_equal_models_the_earlier_is_the_best_and_training_ends_by_the_rule(
    plan, rights, best, latest, over
):
    found = course(plan, rights)
    assert (found.round, found.latest, found.over) == (best, latest, over)
    assert found.value == rights[best] * MILLIONTHS // 100


def test_the_model_to_go_back_to_is_kept_only_where_a_plan_may_go_back():
    assert course(JudgePlan("accuracy", patience=2), [50, 70]).parameters is None
    found = course(JudgePlan("accuracy", veto=0.5), [50, 70, 60])
    assert found.parameters.tolist() == [1.0, 1.0]


def test_a_round_without_metrics_is_never_the_best_and_no_veto():
    plan, (state, _) = JudgePlan("accuracy", veto=0.0, patience=2), states(2)
    found = judged(plan, Judgement(0, 500_000, None, 0), state, 1, accuracy(0, 0))
    assert (found.round, found.latest, found.over) == (0, 1, "")
    assert judged(plan, found, state, 2, accuracy(0, 0)).over == "patience"


def test_errors_are_better_when_they_are_smaller():
    plan = JudgePlan("rmse")
    small, large = ({"metric:rmse": [total << 16, 4, 0]} for total in (4, 16))
    assert value_of(plan, small) == -MILLIONTHS and value_of(plan, large) == -2 * MILLIONTHS


def test_the_end_has_the_best_model_by_keep_and_by_a_veto_alone():
    first, last = states(2)
    best = Judgement(0, 1, first.parameters, 1)
    for plan, over, end, back in (
        (JudgePlan("accuracy", best=True), "", True, True),
        (JudgePlan("accuracy", best=True), "", False, False),
        (JudgePlan("accuracy", best=True), "patience", False, True),
        (JudgePlan("accuracy", veto=0.1), "veto", False, True),
        (JudgePlan("accuracy", veto=0.1), "", True, False),
    ):
        found = kept_model(plan, replace(best, over=over), last, last=end)
        assert found.parameters.tolist() == (first if back else last).parameters.tolist()


# ------------------------------------------------------------------------- the state


def test_a_state_has_its_judgement_in_what_is_signed_and_in_its_bytes():
    state = JobState(states(2)[1])
    found = replace(state, judgement=Judgement(3, -7, np.array([1.5, 2.5]), 4, "veto"))
    again = JobState.from_bytes(found.to_bytes())
    assert again.canonical() == found.canonical() and again.over == "veto"
    assert again.judgement.parameters.tolist() == [1.5, 2.5]
    for other in (
        replace(found.judgement, parameters=np.array([1.5, 2.25])),
        replace(found.judgement, over=""),
        replace(found.judgement, latest=5),
    ):
        assert replace(found, judgement=other).canonical() != found.canonical()
    assert b"judgement" not in state.canonical()


def test_coordinates_of_another_best_model_are_refused():
    found = JobState(states(1)[0], judgement=Judgement(1, 1, np.array([1.5, 2.5]), 1))
    data = found.to_bytes()
    spoilt = data.replace(np.float64(2.5).tobytes(), np.float64(3.5).tobytes())
    assert spoilt != data
    with pytest.raises(BadInput):
        JobState.from_bytes(spoilt)


# ---------------------------------------------------------------------------- a whole run


def test_patience_ends_all_arms_one_round_after_the_model_that_was_no_better():
    """Site a spoils the model from round 4 on: rounds 4 and 5 are worse than round 3, which the sums of 6 show."""
    found = experiment(task(train=spoiled_from(4)), patience=2, lr=0.2)
    by_round = scores(found)
    assert by_round.index(min(by_round)) == 2  # round 3
    assert found.round == 6 and "round.patience" in found.stopped
    assert {row["arm"]: row["round"] for row in found.history} == dict.fromkeys(found.arms, 6)
    assert found.federation.state.judgement.round == 3
    assert not found.federation.state.at_best


@pytest.mark.parametrize(
    ("settings", "rounds", "protection"),
    [
        ({"keep": "best"}, 6, "masked"),
        ({"veto": 0.01}, 5, "plain"),
        ({"veto": 0.01, "rounds": 4}, 4, "masked"),
    ],
)
def test_the_run_ends_with_its_best_model(tmp_path, settings, rounds, protection):
    """Also where the last round's model is the first worse one, which only the metrics-only round shows."""
    made = task(train=spoiled_from(4))
    given = USUAL | {"rounds": 6, "lr": 0.2, "protection": protection} | settings
    run = fedcore.simulate(made, out=tmp_path / "run", **given).result
    alone = {k: v for k, v in given.items() if k not in {"keep", "veto", "judge"}}
    three = fedcore.simulate(
        made, out=tmp_path / "three", **alone | {"rounds": 3, "protection": "plain"}
    ).result
    assert run.rounds == rounds
    assert run.model_sha256 == three.model_sha256
    assert run.arms["federated"].metrics == three.arms["federated"].metrics
    assert run.arms["federated_float"].metrics == three.arms["federated_float"].metrics
    assert run.gap["protection"]["rmse"].mean in (0.0, None)
    assert any("that of round 3, and it is the run's" in line for line in run.warnings)
    assert any("test rows, the ones that every score" in line for line in run.warnings)
    assert read_json(tmp_path / "run" / "plan.json")["judge"]["metric"] == "rmse"


def test_a_resumed_run_judges_as_an_uninterrupted_one(tmp_path):
    made = task(train=spoiled_from(4))
    given = USUAL | {"rounds": 6, "lr": 0.2, "keep": "best"}

    def interrupt(row):
        if row.round == 4 and row.arm == "federated":
            raise KeyboardInterrupt

    whole = fedcore.simulate(made, out=tmp_path / "whole", **given).result
    with pytest.raises(KeyboardInterrupt):
        fedcore.simulate(made, out=tmp_path / "cut", on_round=interrupt, **given)
    resumed = resume(tmp_path / "cut", task=made).result
    assert resumed.model_sha256 == whole.model_sha256
    assert resumed.arms["federated_float"].metrics == whole.arms["federated_float"].metrics


# --------------------------------------------------------------- what is refused, and said


def plan(**settings):
    shape = ModelShape("t", "0" * 64, 8, 0, 0, "", (Wide("metric:accuracy", 2, 7),))
    return plan_of(build_job(settings), shape, tuple(map(SiteId, "abcd")), 64)


def test_a_plan_states_by_what_it_judges():
    found = plan(judge="released", patience=3, keep="best")
    assert found.server.judge == JudgePlan("accuracy", best=True, patience=3)
    assert RoundPlan.from_json(found.to_json()) == found
    assert "judge" not in plan().to_json() and plan().server.judge is None


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"patience": 3}, BadInput, "without round.validate"),
        ({"veto": 0.1}, BadInput, "round.veto"),
        ({"judge": "released"}, BadInput, "without round.keep, round.patience and round.veto"),
        ({"judge": "released", "patience": 3, "validate": 0.2}, BadInput, "round.validate: found 0.2"),
        ({"judge": "released", "veto": -0.1}, BadInput, "round.veto"),
        ({"judge": "released", "veto": 0.1, "protection": "encrypted"}, PlanRefused, "round.judge"),
        (
            {"judge": "released", "keep": "best", "algorithm": "scaffold", "threshold": 4},
            PlanRefused, "this site's control variate",
        ),
        ({"judge": "released", "veto": 0.1, "epsilon": 3.0}, PlanRefused, "round.judge"),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_refused(settings, error, words):
    with pytest.raises(error, match=words) as refused:
        plan(**settings)
    assert refused.value.remedy


def test_metrics_of_a_tasks_own_evaluate_are_no_judge():
    own = task(
        metrics=("skill",), evaluate=lambda module, rows: {"skill": (float(len(rows)), len(rows))}
    )
    with pytest.raises(BadInput, match="whether more is better"):
        prepare(*job_for(own, USUAL | {"patience": 2}))


def test_the_label_says_that_the_coordinator_learns_when_training_ends():
    job = build_job({"judge": "released", "patience": 3})
    terms = Terms.of_job(job, 4)
    assert terms.ends and Terms.of_plan(plan(judge="released", patience=3)).ends
    assert "after which round the sites end training" in label_of(terms)
    assert any("after which round training ends" in line for line in leaving_of(job, terms))
    usual = build_job({"judge": "released", "keep": "best"})
    assert "end training" not in label_of(Terms.of_job(usual, 4))
