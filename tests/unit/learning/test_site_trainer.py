"""Sites by themselves, step after step, arrive at the bits of the simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import fedcore
from fedcore.config import build_job, plan_of
from fedcore.errors import BadInput, HeaderRefused
from fedcore.learning.data.heart import HOSPITALS, _records
from fedcore.learning.data.split import FoldSplit, HashSplit
from fedcore.learning.data.statistics import statistics_vector
from fedcore.learning.model import single_thread
from fedcore.learning.site import SiteTrainer
from fedcore.learning.state import JobState
from fedcore.learning.task import load_task
from fedcore.secagg.encode.pack import Opened
from fedcore.secagg.plan import PLAN_VERSION, RoundHeader, RoundPlan
from fedcore.secagg.protocol.schedule import PlannedRound, check_step, first_step, step_after

SETTINGS = {
    "rounds": 3, "seed": 4, "protection": "plain", "arms": ("federated",), "resamples": 0,
    "standardise": "federated",
}  # fmt: skip
CAP = 512


def heart_records(hospital):
    """Raw rows, as somebody who applies the model has them."""
    return _records(HOSPITALS[hospital])


def added(contributions):
    """The sum that a protected round opens, by plain addition."""
    coordinates = sum(fields.astype(np.uint64) for fields, _ in contributions)
    names = contributions[0][1]
    wides = {
        name: [sum(map(int, each)) for each in zip(*(w[name] for _, w in contributions), strict=True)]
        for name in names
    }  # fmt: skip
    return Opened(coordinates, wides)


def run_by_hand(task, job, sources, order=None):
    """Every site on its own; only their sums meet. Returns the plan and each site's last state."""
    sites = {
        name: SiteTrainer.load(task, job, name, source, CAP, FoldSplit(job.run.seed))
        for name, source in sources.items()
    }
    first = next(iter(sites.values()))
    plan = plan_of(job, first.shape, tuple(sites), CAP)
    states = {name: JobState.initial(plan, site.initial) for name, site in sites.items()}
    step = first_step(plan, first.shape.features)
    while step is not None:
        found = [
            site.contribute(plan, step, JobState.from_bytes(states[name].to_bytes()))
            for name, site in (order or list)(sites.items())
        ]
        opened = added(found)
        states = {
            name: states[name].after(plan, step, opened, tuple(sites), site.columns)
            for name, site in sites.items()
        }
        assert len({state.canonical() for state in states.values()}) == 1
        step = step_after(plan, first.shape.features, step, released=True)
    return plan, next(iter(states.values()))


@pytest.fixture(scope="module")
def by_hand():
    task = load_task("heart")
    job = build_job(task.defaults, SETTINGS)
    with single_thread():
        return task, *run_by_hand(task, job, dict(task.sites))


def test_sites_by_themselves_arrive_at_the_simulations_model(by_hand, tmp_path):
    task, plan, state = by_hand
    run = fedcore.simulate(task, out=tmp_path / "run", max_examples=CAP, **SETTINGS)
    assert run.result["model_sha256"] == state.model_sha256
    stored = fedcore.experiment.run.read_json(tmp_path / "run" / "plan.json")
    # One process compares the models themselves.
    assert replace(plan, model=replace(plan.model, initial="")).digest == stored["digest"]


def test_scaled_by_ranges_they_arrive_there_too_and_send_no_statistics(tmp_path):
    task, settings = load_task("heart"), SETTINGS | {"standardise": "ranges"}
    job = build_job(task.defaults, settings)
    with single_thread():
        plan, state = run_by_hand(task, job, dict(task.sites))
        site = SiteTrainer.load(task, job, "va", "va", CAP, FoldSplit(job.run.seed))
        exported = site.exported(state)
    run = fedcore.simulate(task, out=tmp_path / "run", max_examples=CAP, **settings)
    assert run.result["model_sha256"] == state.model_sha256
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == exported
    assert first_step(plan, site.shape.features).purpose == "range" and site.columns == ()
    assert state.statistics is None
    found = run.result["statistics"]
    assert found["mean"][0] == 60.0 and not any(found["count"]), "age: number(0, 120)"
    again = fedcore.load(tmp_path / "run").predict(heart_records("va"))
    assert len(again) == 200 and np.isfinite(again).all()


def test_it_does_not_matter_in_which_order_or_company_they_compute(by_hand):
    task, _, state = by_hand
    job = build_job(task.defaults, SETTINGS)
    with single_thread():
        _, other = run_by_hand(task, job, dict(task.sites), order=lambda items: [*items][::-1])
    assert other.canonical() == state.canonical()


def test_a_state_survives_its_bytes(by_hand):
    _, _, state = by_hand
    back = JobState.from_bytes(state.to_bytes())
    assert back.canonical() == state.canonical() and back.done == PlannedRound("metrics", 4)
    assert back.model_sha256 == state.model_sha256 and back.to_bytes() == state.to_bytes()


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_other_bytes_are_no_state(by_hand, cut):
    with pytest.raises(BadInput, match="no saved state"):
        JobState.from_bytes(by_hand[2].to_bytes()[:cut])


def test_every_part_of_a_state_counts(by_hand):
    _, _, state = by_hand
    server = state.server
    for other in (
        replace(state, done=PlannedRound("update", 3)),
        replace(state, statistics=None),
        replace(state, server=replace(server, bound=server.bound * 2)),
        replace(state, server=replace(server, parameters=server.parameters + 1e-12)),
    ):
        assert other.canonical() != state.canonical()


def test_a_plan_comes_back_from_its_json(by_hand):
    _, plan, _ = by_hand
    assert RoundPlan.from_json(plan.to_json()) == plan
    for broken in ({}, plan.to_json() | {"colour": 1}, plan.to_json() | {"packing": {}}):
        with pytest.raises(BadInput, match=f"version {PLAN_VERSION}"):
            RoundPlan.from_json(broken)


def test_a_site_with_more_rows_than_the_cap_takes_part_with_as_many():
    task = load_task("heart")
    job = build_job(task.defaults, SETTINGS)
    for split in (FoldSplit(), HashSplit(bytes(32), 0.2)):
        site = SiteTrainer.load(task, job, "va", "va", 50, split)
        assert len(site.site.train) + len(site.site.test) == 50
        assert site.note.startswith("Site va has 200 rows, more than protect.max_examples = 50")
        assert SiteTrainer.load(task, job, "va", "va", 200, split).note == ""


# ---------------------------------------------------------------------------------- the course


def header(plan, purpose, number):
    return RoundHeader(
        "f",
        "j",
        1,
        1,
        number,
        purpose,
        plan.sites,
        "",
        plan.threshold,
        plan.protection,
        plan.digest,
    )


def whole_course(plan, features):
    steps, step = [], first_step(plan, features)
    while step is not None:
        steps.append(step)
        step = step_after(plan, features, step, released=True)
    return steps


def test_the_course_of_a_job_is_that_of_the_simulation(by_hand):
    _, plan, _ = by_hand
    trained = [PlannedRound("update", k) for k in (1, 2, 3)]
    end = [PlannedRound("metrics", 4)]
    first = [PlannedRound("statistics", 0), PlannedRound("range", 0)]
    assert whole_course(plan, 20) == first + trained + end
    assert whole_course(plan, 0) == [PlannedRound("range", 0), *trained, *end]
    fixed = replace(plan, range=replace(plan.range, start=1.0))
    assert whole_course(fixed, 0) == trained + end
    assert statistics_vector(20, CAP).purpose == first[0].purpose


def test_an_abandoned_step_is_tried_again_only_where_nothing_can_follow_without_it(by_hand):
    _, plan, _ = by_hand
    for step in (PlannedRound("statistics", 0), PlannedRound("range", 0)):
        assert step_after(plan, 20, step, released=False) == step
    assert step_after(plan, 20, PlannedRound("update", 1), released=False) == PlannedRound(
        "update", 2
    )
    assert step_after(plan, 20, PlannedRound("update", 3), released=False) == PlannedRound(
        "metrics", 4
    )
    assert step_after(plan, 20, PlannedRound("metrics", 4), released=False) is None


def test_a_site_takes_the_next_step_and_no_earlier_or_strange_one(by_hand):
    _, plan, _ = by_hand
    course = whole_course(plan, 20)
    for place, step in enumerate(course):
        done = course[place - 1] if place else None
        check_step(plan, 20, done, header(plan, step.purpose, step.training_round))
        for earlier in course[:place]:
            with pytest.raises(HeaderRefused):
                check_step(plan, 20, done, header(plan, earlier.purpose, earlier.training_round))
    check_step(
        plan, 20, PlannedRound("update", 1), header(plan, "update", 3)
    )  # round 2 was abandoned
    for done, purpose, number in (
        (None, "range", 0), (None, "update", 1), (PlannedRound("statistics", 0), "update", 1),
        (PlannedRound("update", 1), "update", 4), (PlannedRound("update", 1), "metrics", 3),
        (PlannedRound("range", 0), "update", 0), (PlannedRound("metrics", 4), "metrics", 4),
        (PlannedRound("metrics", 4), "update", 3), (PlannedRound("update", 1), "other", 2),
    ):  # fmt: skip
        with pytest.raises(HeaderRefused):
            check_step(plan, 20, done, header(plan, purpose, number))


@single_thread()
def test_the_file_of_a_given_model_is_the_same_at_every_site():
    """Training counts batches beside the parameters, and each site has its task somewhere else."""
    task = fedcore.Task(
        name="t",
        data=lambda n: (np.random.default_rng(n).normal(size=(n, 4)).astype(np.float32), np.arange(n) % 2),
        model=lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)),
        loss=nn.CrossEntropyLoss(), metrics=("accuracy",), sites={"a": 24, "b": 60, "c": 36},
    )  # fmt: skip
    job = build_job({"range": 0.5, "batch_size": 4})
    files = set()
    for batches, (name, source) in enumerate(task.sites.items(), start=1):
        own = replace(task, origin=f"/home/{name}/task.py")
        site = SiteTrainer.load(own, job, name, source, CAP, FoldSplit(job.run.seed))
        plan = plan_of(job, site.shape, tuple(task.sites), CAP)
        state = JobState.initial(plan, site.initial)
        for _ in range(batches):
            site.flat.module.train()(torch.ones(2, 4))
        assert int(site.flat.module[1].num_batches_tracked) == batches
        files.add(site.exported(state, public=True))
        assert own.origin.encode() in site.exported(state)
    assert len(files) == 1


def priced(source):
    random = np.random.default_rng(source)
    x = random.normal(size=(60, 3)).astype("f4")
    return x, 250_000 + 60_000 * (x @ [3.0, -2.0, 1.0])


@pytest.mark.parametrize("given", [{"target_range": (-500_000, 1_000_000)}, {}])
def test_a_regressions_targets_are_scaled_alike_by_sites_and_simulation(given, tmp_path):
    task = fedcore.Task(
        name="price", data=priced, model=fedcore.linear(3, classes=1), metrics=("mae", "r2"),
        loss=lambda o, t: nn.functional.mse_loss(o[:, 0], t), sites={"a": 1, "b": 2, "c": 3}, **given,
    )  # fmt: skip
    job = build_job(task.defaults, SETTINGS)
    with single_thread():
        plan, state = run_by_hand(task, job, dict(task.sites))
    assert first_step(plan, 0 if given else 1).purpose == ("range" if given else "statistics")
    run = fedcore.simulate(task, out=tmp_path / "run", max_examples=CAP, **SETTINGS)
    assert run.result["model_sha256"] == state.model_sha256
