"""What a deployed site records of accuracy: the numbers are those of the simulation's own arms."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from fedcore_clients.status import _tracked_lines

import fedcore
from fedcore.config import build_job, plan_of
from fedcore.errors import BadInput
from fedcore.learning.data.split import FoldSplit
from fedcore.learning.model import single_thread
from fedcore.learning.site import SiteTrainer
from fedcore.learning.state import JobState
from fedcore.learning.task import load_task
from fedcore.learning.tracking import Tracker
from fedcore.results import SiteRow
from fedcore.secagg.encode.pack import Opened
from fedcore.secagg.protocol.schedule import first_step, step_after

REFERENCE = {"metric": "auc", "value": 0.95, "source": "a registry"}
SETTINGS = {
    "rounds": 2, "seed": 1, "protection": "plain", "resamples": 0, "max_examples": 512,
    "reference": REFERENCE, "public_metrics": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Rows of every site's tracker, and the run that simulates the same job."""
    heart = load_task("heart")
    task = replace(heart, metrics=(*heart.metrics, "confusion_matrix"))
    job = build_job(task.defaults, SETTINGS)
    rows = {}
    with single_thread():
        sites = {
            n: SiteTrainer.load(task, job, n, s, 512, FoldSplit(job.run.seed))
            for n, s in dict(task.sites).items()
        }
        first = next(iter(sites.values()))
        plan = plan_of(job, first.shape, tuple(sites), 512)
        trackers = {name: Tracker(site, plan) for name, site in sites.items()}
        state, step = JobState.initial(plan, first.initial), first_step(plan, first.shape.features)
        while step is not None:
            found = [site.contribute(plan, step, state) for site in sites.values()]
            sums = {
                name: [sum(map(int, each)) for each in zip(*(w[name] for _, w in found), strict=True)]
                for name in found[0][1]
            }  # fmt: skip
            opened = Opened(sum(f.astype(np.uint64) for f, _ in found), sums)
            state = state.after(plan, step, opened, tuple(sites), first.columns)
            if step.purpose in {"update", "metrics"}:
                for name, tracker in trackers.items():
                    rows.setdefault(name, []).append(tracker.row(step, state, sums, len(sites)))
            step = step_after(plan, first.shape.features, step, released=True)
    out = tmp_path_factory.mktemp("run") / "run"
    assert plan.public_metrics and plan.metrics == heart.metrics
    return rows, fedcore.simulate(task, out=out, **SETTINGS)


def test_here_and_alone_are_the_arms_of_the_simulation_at_this_site(recorded):
    rows, run = recorded
    for name, found in rows.items():
        last, expected = found[-1], run.result["per_site"][name]
        for metric in ("auc", "accuracy"):
            assert last["here"][metric] == expected["federated"][metric]
            assert last["alone"][metric] == expected["local_only"][metric]
            if last["here"][metric] is not None:
                gained = expected["federated"][metric] - expected["local_only"][metric]
                assert last["gained"][metric] == pytest.approx(gained, abs=1e-12)


def test_everywhere_is_what_the_protected_sums_say(recorded):
    rows, run = recorded
    last = next(iter(rows.values()))[-1]
    assert last["purpose"] == "metrics" and last["sites"] == 4
    assert last["everywhere_before"] == run.result["protected_metrics"]
    assert all(
        found[-1]["everywhere_before"] == last["everywhere_before"] for found in rows.values()
    )


def test_a_site_knows_the_confusion_matrix_of_all_sites_and_its_own(recorded):
    rows, run = recorded
    last = {name: found[-1]["confusion"] for name, found in rows.items()}
    everyone = run.result.arms["federated"].confusion
    assert all(found["everywhere_before"] == everyone for found in last.values())
    assert np.array_equal(np.sum([found["here"] for found in last.values()], axis=0), everyone)
    row = SiteRow.from_json(json.loads(json.dumps(rows["va"][-1])))
    assert row.confusion == last["va"] and "confusion" in row.to_json()


def test_public_metrics_are_those_of_one_number(recorded):
    rows, _ = recorded
    task = load_task("heart")
    for found in rows["va"]:
        assert tuple(found["everywhere_before"]) == task.metrics, (
            "what a site may tell: no cell of the matrix"
        )


def test_a_row_says_how_much_of_its_round_was_clipped(recorded):
    rows, run = recorded
    first, second = (row for row in run.rounds if row.arm == "federated")
    for found in rows.values():
        assert found[0]["clipped_fraction"] == first["clipped_fraction"]
        assert found[0]["next_range"] == second["range"]
        assert "clipped_fraction" not in found[-1], "it has no update"


@pytest.mark.parametrize(("clipped", "lines"), [(None, []), (0.0, []), (0.973, [
    "  97.3 % of all coordinates of round 3 clipped; range 0.0625 next"
])])  # fmt: skip
def test_the_status_of_a_site_says_it_too(clipped, lines):
    row = SiteRow(
        round=3, purpose="update", sites=4, everywhere_before={}, clipped_fraction=clipped,
        next_range=None if clipped is None else 0.0625,
    )  # fmt: skip
    assert list(_tracked_lines(row)) == lines


def test_the_gap_to_a_registered_value_is_signed_like_every_gap(recorded):
    rows, run = recorded
    said = next(iter(rows.values()))[-1]["reference"]
    assert said["gap"] == 0.95 - run.result["protected_metrics"]["auc"] and said["gap"] > 0
    assert {key: said[key] for key in REFERENCE} == REFERENCE


def test_one_row_a_round_and_a_process_that_starts_over_says_the_same(recorded):
    rows, _ = recorded
    for found in rows.values():
        assert [(row["round"], row["purpose"]) for row in found] == [
            (1, "update"), (2, "update"), (2, "metrics")
        ]  # fmt: skip
        assert found[1]["here"] == found[2]["here"] and found[1]["alone"] == found[2]["alone"]


def test_a_reference_of_another_form_is_refused_with_its_path():
    with pytest.raises(BadInput, match=r"track\.reference\.source: found"):
        build_job({"track": {"reference": {"metric": "auc", "value": 0.9}}})
