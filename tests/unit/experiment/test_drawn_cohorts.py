"""`round.cohort`: a simulated round is of sites that the seed draws, and everything about a round is of so many."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

import fedcore
from fedcore.errors import BadInput, PlanRefused
from fedcore.experiment.prepare import job_for, prepare
from fedcore.learning.data import digits

pytestmark = pytest.mark.usefixtures("no_drawings")

SITES = {f"s{number}": number for number in range(1, 10)}


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def data(site):
    rng = np.random.default_rng(site)
    x = rng.normal(size=(20 + site, 4)).astype("f4")
    return x, (x[:, 0] > 0).astype("i8")


def task():
    return fedcore.Task(
        name="t", data=data, model=lambda: nn.Linear(4, 2), loss=nn.functional.cross_entropy,
        metrics=("accuracy",),
    )  # fmt: skip


def settings(**more):
    return {
        "sites": SITES, "rounds": 4, "arms": ("federated",), "sum": "exact", "cohort": 4,
    } | more  # fmt: skip


def run(**more):
    return fedcore.simulate(task(), **settings(**more))


def test_each_round_is_of_as_many_sites_drawn_by_the_seed():
    found, again, other = run(), run(), run(seed=1)
    drawn = [row["survivors"] for row in found.rounds]
    assert all(len(sites) == 4 == len(set(sites)) for sites in drawn)
    assert len({tuple(sites) for sites in drawn}) > 1
    assert [row["survivors"] for row in again.rounds] == drawn
    assert again.result["model_sha256"] == found.result["model_sha256"]
    assert [row["survivors"] for row in other.rounds] != drawn


def test_a_round_is_the_round_of_a_federation_of_its_cohort_alone():
    """The same sites as a federation of their own: the same sum, whatever the roster around them."""
    whole = run(rounds=1, range=0.5, protection="plain")
    names = whole.rounds[0]["survivors"]
    alone = run(
        rounds=1, range=0.5, protection="plain", cohort=None, sites={name: SITES[name] for name in names},
        max_examples=32,
    )  # fmt: skip
    assert alone.result["model_sha256"] == whole.result["model_sha256"]
    assert alone.rounds[0]["bytes_up"] == whole.rounds[0]["bytes_up"]


def test_threshold_absences_and_label_are_of_the_cohort():
    plan = prepare(*job_for(task(), settings())).plan
    assert (plan.threshold, plan.packing.max_sites, plan.per_round) == (3, 4, 4)
    drawn = run().rounds[1]["survivors"]
    found = run(drop=f"2:submit:{drawn[0]}")
    assert found.rounds[1]["survivors"] == drawn[1:]
    lost = run(drop=",".join(f"2:submit:{name}" for name in drawn[:2]))
    assert lost.rounds[1]["abandoned"].startswith("at submit: 2 of 4 sites stayed, 3 needed")
    assert "Absences survived: 1 of 4." in found.result["label"]


def test_a_plan_without_a_cohort_has_the_digest_of_before():
    plan = prepare(*job_for(task(), settings(cohort=None))).plan
    assert "cohort" not in plan.to_json() and plan.per_round == len(SITES)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"cohort": 10}, "round.cohort: found 10, expected at most the 9 sites"),
        ({"sum": "full"}, 'round.cohort: found one with sum = "full", expected "exact"'),
        ({"cohort": 0}, "round.cohort"),
        ({"cohort": 2}, "found 2 under 'layered', expected at least 3"),
    ],
)
def test_a_cohort_that_cannot_be_is_refused_in_one_line(more, message):
    with pytest.raises((BadInput, PlanRefused), match=message) as refused:
        prepare(*job_for(task(), settings(**more)))
    assert "\n" not in str(refused.value) and refused.value.remedy


def test_rounds_of_more_sites_than_masks_are_made_for_have_the_plan_of_encrypted_and_say_so():
    many = {f"s{number}": number % 7 for number in range(70)}
    prepared = prepare(*job_for(task(), settings(sites=many, cohort=66)))
    assert prepared.plan.protection == "encrypted"
    assert any("not of 'layered'" in text for text, _ in prepared.findings)
    few = prepare(*job_for(task(), settings(sites=many, cohort=64)))
    assert few.plan.protection == "layered"
    assert not any("masks are made" in text for text, _ in few.findings)


def test_more_sites_than_digits_share_no_row_between_training_and_tests():
    found = digits.sites(2000, seed=3)
    assert len(found) == 2000 and "site-0001" in found
    trained, tested = (
        {row.tobytes() for parts in found.values() for row in parts[place][0]} for place in (0, 1)
    )
    shared = trained & tested
    pixels = {row.tobytes() for x, _ in digits.sites(1).values() for row in x}
    doubled = sum(len(x) for x, _ in digits.sites(1).values()) - len(pixels)
    assert len(shared) <= doubled, "only digits that are in the data set twice"
    assert len(trained) > 1400 and len(tested) > 340
    assert (
        digits.sites(2000, seed=3)["site-0007"][0][1].tolist() == found["site-0007"][0][1].tolist()
    )
