"""A site's guard: what it judges, when it trips, and the bounds that no honest state exceeds (PROTOCOL G)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore import Task
from fedcore.errors import EXIT_REFUSED, BadInput, GuardTripped
from fedcore.experiment.loop import Experiment
from fedcore.experiment.prepare import job_for, prepare
from fedcore.learning import saved, scoring
from fedcore.learning.data.rows import ArrayRows
from fedcore.learning.guard import FLOOR, Guard, GuardMemory, GuardRules, judge_all
from fedcore.learning.model import FlatModel
from fedcore.learning.optimisers import (
    apply_update,
    init_state,
    largest_step,
    most_adaptive,
)
from fedcore.learning.released import largest_move
from fedcore.learning.scoring import EVALUATION_BATCH, MOST_ROWS, has_loss, training_loss
from fedcore.secagg.plan import CORRECTIONS, ServerPlan
from fedcore.secagg.protocol.schedule import PlannedRound


def guard_of(losses, monkeypatch, **rules):
    """A guard whose site finds these losses, one a judged model, the untrained one's first."""
    prepared = prepare(*job_for(None, {"task": "heart", "protect.protection": "plain"}))
    site, flat = prepared.sites[0], prepared.flat
    found = iter(losses)
    monkeypatch.setattr(scoring, "training_loss", lambda *_, **__: next(found))
    made = Guard(
        prepared.task, prepared.plan, site.id, site.train, flat, flat.read(), 0, GuardRules(**rules)
    )
    plan = prepared.plan
    return made, init_state(flat.read(), plan.parameters, plan.server, 0.25)


def judged(losses, monkeypatch, **rules):
    """After how many releases it tripped, or None."""
    made, state = guard_of(losses, monkeypatch, **rules)
    for round_ in range(len(losses)):
        try:
            made.judge(state, round_)
        except GuardTripped as tripped:
            return tripped.round
    return None


@pytest.mark.parametrize(
    ("losses", "trips"),
    [
        ([1.0, 0.8, 0.9, 1.0, 1.1], None),
        ([1.0, 0.8, 1.21, 1.21], 3),  # above 1.5 x .8, twice
        ([1.0, 0.8, 1.19, 1.19, 1.19], None),
        ([1.0, 0.8, 1.21, 0.8, 1.21, 0.8], None),  # once is no twice in a row
        ([1.0, 0.8, 1.21, 1.19, 1.21, 1.21], 5),
        ([1.0, 1.51, 1.51], 2),
        ([1.0, 0.01, 0.74, 0.74, 0.74], None),  # half of the first, times 1.5, is always allowed
        ([1.0, 0.01, 0.76, 0.76], 3),
        ([1.0, 3.1], 1),  # four times as far above the best as a strike needs: at once
        ([1.0, 2.9, 0.9], None),
        ([1.0, 0.8, 2.5], 2),
        ([1.0, math.nan], 1),
        ([1.0, 0.8, math.inf], 2),
        ([-1.0, -2.0, -1.1, -0.9, -0.9], 4),  # a density's loss: half of 2 above -2
        ([-1.0, -2.0, -1.01, -1.01], None),
        ([0.0, 0.0, 9.0, 9.0], None),
    ],
)
def test_a_site_trips_on_losses_in_a_row_above_the_best_so_far(losses, trips, monkeypatch):
    assert judged(losses, monkeypatch) == trips


def test_the_thresholds_are_the_sites_own(monkeypatch):
    losses = [1.0, 0.9, 1.9, 1.9, 1.9, 1.9]
    assert judged(losses, monkeypatch) == 3
    assert judged(losses, monkeypatch, loss_factor=2.2) is None
    assert judged(losses, monkeypatch, rounds=1) == 2
    assert judged(losses, monkeypatch, rounds=3) == 4


def test_a_release_is_judged_once_however_often_its_state_is_started_from(monkeypatch):
    made, state = guard_of([1.0, 0.8, 1.3, 1.3], monkeypatch)
    for round_ in (0, 1, 2, 2, 2, 1):
        made.judge(state, round_)
    assert made.memory == GuardMemory(1.0, 0.8, 1, 2)
    with pytest.raises(GuardTripped):
        made.judge(state, 3)


def test_a_guard_that_tripped_says_so_again_after_a_restart(monkeypatch):
    made, state = guard_of([1.0, 2.0, 2.0], monkeypatch)
    made.judge(state, 1)
    with pytest.raises(GuardTripped):
        made.judge(state, 2)
    again = replace(made, memory=GuardMemory.from_json(made.memory.to_json()))
    with pytest.raises(GuardTripped, match="after round 2"):
        again.judge(state, 2)


def test_a_site_that_joins_late_compares_with_the_untrained_model_too(monkeypatch):
    made, state = guard_of([1.0, 0.6], monkeypatch)
    made.judge(state, 9)
    assert made.memory == GuardMemory(1.0, 0.6, 0, 9)


@pytest.mark.parametrize(
    ("algorithm", "change"),
    [("averaging", "lower train.lr"), ("feddyn", "raise train.feddyn_alpha")],
)
def test_a_trip_names_what_to_change_under_the_algorithm(algorithm, change, monkeypatch):
    made, state = guard_of([1.0, 3.1], monkeypatch)
    train = replace(made.plan.train, algorithm=algorithm)
    made.plan = replace(made.plan, train=train, server=ServerPlan())
    judge_all([made], state, 0)
    with pytest.raises(GuardTripped) as tripped:
        judge_all([made], state, 1)
    assert change in (tripped.value.remedy or "")


def test_what_other_sites_are_told_has_no_number(monkeypatch):
    made, state = guard_of([1.0, 3.0, 3.0], monkeypatch)
    made.judge(state, 1)
    with pytest.raises(GuardTripped) as tripped:
        made.judge(state, 2)
    assert tripped.value.cause == (
        "the loss on its own training rows exceeded 1.5 times the best so far for 2 rounds in a row"
    )
    assert "3, above 1.5; best 1" in str(tripped.value)
    assert tripped.value.exit_code == EXIT_REFUSED


# ------------------------------------------------------------------------------------------- the pass


def rows_of(n):
    x = torch.arange(n, dtype=torch.float32)[:, None]
    return ArrayRows(x, torch.zeros(n))


class Halving(torch.nn.Module):
    """Dropout and BatchNorm: chance, and statistics of a batch or of long ago."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.norm = torch.nn.BatchNorm1d(1)

    def forward(self, x):
        return torch.nn.functional.dropout(self.norm(x * self.weight), 0.5, self.training)[:, 0]


TASK = Task(name="t", data=lambda s: s, model=Halving, loss=torch.nn.MSELoss(), metrics=("mae",))


def loss_of(rows, module=None):
    flat = FlatModel(module or Halving())
    found = training_loss(TASK, flat.module, rows, seed=0, round_=1, site="a")
    return found, flat


def test_the_loss_has_no_chance_in_it_and_leaves_the_model_alone():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    found, flat = loss_of(rows_of(100))
    assert torch.equal(torch.random.get_rng_state(), before)
    # Rows of mean 0 and variance 1 against 0: of the batch's own statistics, and dropout drops nothing.
    assert found == pytest.approx(1.0, rel=1e-4)
    assert flat.module.norm.running_mean.item() == 0.0
    assert flat.module.norm.num_batches_tracked.item() == 0
    assert flat.module.weight.grad is None
    assert not any(layer.training for layer in flat.module.modules())


def test_a_layer_that_training_keeps_in_evaluation_mode_keeps_its_running_statistics():
    class Frozen(Halving):
        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

    found, _ = loss_of(rows_of(100), Frozen())
    assert found == pytest.approx(np.mean(np.arange(100) ** 2.0), rel=1e-4)


def test_a_last_batch_of_one_row_sits_out_and_a_site_of_one_row_is_told():
    found, _ = loss_of(rows_of(EVALUATION_BATCH + 1))
    assert found == pytest.approx(1.0, rel=1e-4)
    with pytest.raises(BadInput, match="found a batch of 1 row"):
        loss_of(rows_of(1))


@pytest.mark.parametrize("statistics", [(5.0, 1e-6), (-40.0, 9.0)])
def test_running_statistics_that_do_not_fit_the_model_are_no_strike(statistics):
    """What honest rounds leave there for long: a mean over sites of statistics of models since moved."""
    fitting, _ = loss_of(rows_of(100))
    module = Halving()
    module.norm.running_mean.fill_(statistics[0])
    module.norm.running_var.fill_(statistics[1])
    found, flat = loss_of(rows_of(100), module)
    assert found == fitting
    assert flat.module.norm.running_mean.item() == statistics[0]


def test_many_rows_are_judged_by_some_of_them_evenly_spaced():
    class Counting(torch.nn.Linear):
        rows = 0

        def __init__(self):
            super().__init__(1, 1, bias=False)
            torch.nn.init.ones_(self.weight)

        def forward(self, x):
            Counting.rows += len(x)
            return super().forward(x)[:, 0]

    found, _ = loss_of(rows_of(10 * MOST_ROWS), Counting())
    assert Counting.rows == MOST_ROWS
    assert found == pytest.approx(np.mean(np.arange(10 * MOST_ROWS) ** 2.0), rel=1e-3)


def test_a_task_that_trains_and_evaluates_by_itself_has_no_loss_to_judge():
    own = {"train": lambda *_: None, "evaluate": lambda *_: {}}
    assert has_loss(TASK)
    assert has_loss(replace(TASK, train=own["train"]))
    assert has_loss(replace(TASK, evaluate=own["evaluate"]))
    assert not has_loss(replace(TASK, **own))


# ------------------------------------------------------------------------------- how far a state may move


def test_a_state_that_moved_further_than_its_steps_allow_trips(monkeypatch):
    made, state = guard_of([1.0] * 9, monkeypatch)
    most, _ = largest_move(made.plan, state.first_bound)
    made.judge(state, 0)
    far = state.parameters.copy()
    far[3] += 2 * most
    made.judge(replace(state, parameters=far), 2)  # two steps
    further = far.copy()
    further[0] -= 1.01 * most
    with pytest.raises(GuardTripped, match="a parameter moved further than 1 steps"):
        made.judge(replace(state, parameters=further), 3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_state_that_is_not_finite_trips(value, monkeypatch):
    made, state = guard_of([1.0] * 9, monkeypatch)
    broken = state.parameters.copy()
    broken[1] = value
    with pytest.raises(GuardTripped, match="the model is not finite"):
        made.judge(replace(state, parameters=broken), 1)


PLANS = [
    ServerPlan("fedavg", 0.7),
    ServerPlan("fedavgm", 1.0, 0.9),
    ServerPlan("fedavgm", 0.5, 0.0),
    ServerPlan("fedadam", 0.3),
    ServerPlan("fedyogi", 0.3),
    ServerPlan("fedadagrad", 0.3),
    *[
        ServerPlan(name, 0.3, **constants, correction=correction)
        for name in ("fedadam", "fedyogi")
        for correction in CORRECTIONS
        for constants in ({}, {"beta1": 0.5, "beta2": 0.6}, {"beta1": 0.0, "beta2": 0.3})
    ],
]


@pytest.mark.parametrize(
    "plan",
    PLANS,
    ids=lambda plan: f"{plan.optimiser} {plan.momentum:g} {plan.beta1:g} {plan.correction}",
)
@given(data=st.data())
def test_no_sequence_of_updates_within_a_bound_steps_further_than_it_allows(plan, data):
    mean = data.draw(st.sampled_from([1e-4, 0.02, 3.0]))
    # Long quiet, then the largest one, is what brings Adam and Yogi furthest.
    sizes = st.sampled_from([0.0, 1e-3, 0.5, 0.8, 1.0, -1.0])
    updates = data.draw(st.lists(sizes, min_size=1, max_size=60))
    state, most = init_state(np.zeros(1, dtype=np.float32), 1, plan, 1.0), largest_step(plan, mean)
    for size in updates:
        moved = apply_update(state, np.array([size * mean]), 1, plan)
        assert abs(moved.parameters[0] - state.parameters[0]) <= most * (1 + 1e-9)
        state = moved


def test_updates_that_grow_bring_adam_above_its_rate_and_not_above_the_bound():
    """A step of Adam may exceed the rate, so the rate alone would be no bound."""
    plan, largest = ServerPlan("fedadam", 1.0), 0.0
    state = init_state(np.zeros(1, dtype=np.float32), 1, plan, 1.0)
    for j in range(300):
        moved = apply_update(state, np.array([(plan.beta2 / plan.beta1) ** j]), 1, plan)
        largest = max(largest, float(moved.parameters[0] - state.parameters[0]))
        state = moved
    assert 2.0 < largest <= most_adaptive(plan)
    for t in range(1, 2000):
        assert math.sqrt(1 - plan.beta2**t) / (1 - plan.beta1**t) <= 1 + 1e-12


def test_where_nothing_bounds_the_ratio_of_the_moments_the_constant_in_the_denominator_does():
    for plan in (
        ServerPlan("fedadam", 0.3, beta1=0.9, beta2=0.5),
        ServerPlan("fedyogi", 0.3, beta1=0.0, beta2=0.0),
        ServerPlan("fedadam", 0.3, beta1=0.5, beta2=0.0),
    ):
        assert most_adaptive(plan) == math.inf
        assert largest_step(plan, 0.02) == 0.3 * 0.02 / 1e-3


def test_the_range_of_an_adaptive_plan_counts_four_times():
    prepared = prepare(*job_for(None, {"task": "heart", "protect.protection": "plain"}))
    plan = prepared.plan
    fixed = replace(plan, range=replace(plan.range, adaptive=False))
    assert largest_move(plan, 0.5)[1] == 4 * largest_move(fixed, 0.5)[1]
    assert largest_move(fixed, 0.5)[1] == 0.5 * plan.max_examples / plan.weight_step


# ------------------------------------------------------------------------------------------ in a run


def run_of(**settings):
    task, job = job_for(
        None,
        {"task": "heart", "protect.protection": "plain", "track.arms": ["federated"], **settings},
    )
    return Experiment(prepare(task, job))


def test_a_resumed_run_goes_on_with_what_the_guards_remember():
    experiment = run_of(**{"round.rounds": 4})
    rows = experiment.rounds()
    for _ in range(2):
        next(rows)
    again = run_of(**{"round.rounds": 4})
    again.restore(saved.read_checkpoint(saved.checkpoint_bytes(experiment.save())))
    found = [guard.memory for guard in again.federation.guards]
    assert found == [guard.memory for guard in experiment.federation.guards]
    assert {memory.judged for memory in found} == {1}
    assert again.federation.state.done == PlannedRound("update", 2)


def test_an_abandoned_round_is_no_second_look_at_the_same_model():
    drop = [f"2:submit:{name}" for name in ("cleveland", "hungary", "va")]
    experiment = run_of(**{"round.rounds": 3, "round.drop": drop})
    for _ in experiment.rounds():
        pass
    assert {guard.memory.judged for guard in experiment.federation.guards} == {1}
    assert experiment.federation.state.done == PlannedRound("update", 3)


def test_floor_is_half():
    assert GuardMemory(2.0, 0.1).most(GuardRules()) == 1.5 * FLOOR * 2.0


def test_the_final_model_is_judged_before_its_metrics():
    experiment = run_of(**{"round.rounds": 2})
    for _ in experiment.rounds():
        pass
    for guard in experiment.federation.guards[1:]:
        guard.memory = replace(guard.memory, first=1e-6, best=1e-6)
    with pytest.raises(
        GuardTripped, match=r"sites hungary, switzerland, va leave .* after round 2"
    ):
        experiment.federation.measure()
    assert {guard.memory.judged for guard in experiment.federation.guards} == {2}
