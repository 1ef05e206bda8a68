"""Attacks of a coordinator on real sites, across rounds, cohorts and jobs (PROTOCOL J, H, N, G, U, V).

Each is carried out twice: with the one rule switched off at the sites, where it reads what it is after, and
with the rule. The sites are real processes; `tests/support` has the coordinator that lies.
"""

from __future__ import annotations

import numpy as np
import pytest
from support.attacked import (
    COLLUDER,
    ROWS,
    SITES,
    attacked,
    columns_of,
    each_alone,
    is_vector,
    minus,
)
from support.hostile_coordinator import answers, attack, sums
from support.unguarded_site import (
    CAP,
    CERTIFIED,
    IMPOSSIBLE,
    LEDGER,
    ONE_SUM,
    POLICY,
    SETTINGS,
    SPLIT,
    THRESHOLD,
    UNIFORM,
    lies,
    sent_by,
    switched_off,
)

from fedcore.learning.state import model_digest

ATTACKS = (
    "folds",
    "cohort",
    "downgrade",
    "impossible",
    "masked",
    "layered",
    "forged",
    "counts",
    "jobs",
)


@pytest.fixture(scope="module")
def fed(tmp_path_factory):
    """One deployment for all attacks; each has its own rows, and others for its positive control."""
    tasks = [name for each in ATTACKS for name in (each, f"{each}_open")] + ["folds_own"]
    with attacked(tmp_path_factory.mktemp("attacked"), tasks) as found:
        yield found
        said = [line for name in SITES for line in found.log(name).splitlines()]
        assert not [line for line in said if "Traceback" in line]


# -------------------------------------------------------------------- J: two jobs on the same rows


def rows_by_fold(fed, task, victim="a", patients=3, gather=None):
    """What differs between a job and others in which one site is offered another fold: the coordinator
    alone, under `masked`. Rows of the victim, as (patients, columns)."""
    base = {"rounds": 1, "protection": "masked", "fold": 1999, "folds": 2000}
    read = []
    for fold in [None, *range(patients)]:
        offers = {} if fold is None else {victim: {"fold": fold}}
        attack(fed.folder, offers=offers, stop_after=1, gather=gather)
        job = fed.submit(task, **base)
        fed.wait(job)
        read += sums(fed.folder, job, "statistics")
    whole = [each for each in read if victim in each["survivors"]]
    return np.array([columns_of(whole[0]) - columns_of(each) for each in whole[1:]])


def patients_read(fed, task, site, found):
    """How many of these rows are patients of the site, each of the five numbers to a thousandth."""
    rows, _ = fed.data(task, site)
    return sum(bool((np.abs(rows - each).max(axis=1) < 2e-3).any()) for each in found)


def test_two_jobs_in_which_one_site_is_offered_another_fold(fed):
    with switched_off(fed.folder, SETTINGS, SPLIT):
        found = rows_by_fold(fed, "folds_open")
        assert patients_read(fed, "folds_open", "a", found) == 3
    with switched_off(fed.folder, SPLIT):  # either rule is enough
        assert len(rows_by_fold(fed, "folds", patients=1, gather=0.5)) == 0
    assert "plan digest: found" in fed.log("a"), "it took no part, for this reason"
    with switched_off(fed.folder, SETTINGS):
        assert not rows_by_fold(fed, "folds_own", patients=1).any(), "the same rows in both jobs"


# ------------------------------------------------------------------- H: other cohorts of one state

PURPOSES = ["statistics", "range", "update"]


def vectors_by_cohorts(fed, task, protection):
    """(site, purpose) of the vectors that one sum without each site shows. Each of these rounds is given up
    once its sum is known; after four of them, one is released. masked: the coordinator alone; layered: with
    the key of one colluding site."""
    attack(
        fed.folder, leave_out=[*SITES, None] * len(PURPOSES), abandon=True, stop_after=14,
        key="" if protection == "masked" else str(fed.folder),
    )  # fmt: skip
    job = fed.submit(task, rounds=1, protection=protection)
    fed.wait(job)
    read = []
    for purpose in PURPOSES:
        known = [each for each in sums(fed.folder, job, purpose) if len(each["survivors"]) == 3]
        for name, vector in each_alone(known).items():
            if is_vector(vector, sent_by(fed.folder, job, purpose, name)[0]):
                read.append((name, purpose))
    return sorted(read), [each["survivors"] for each in sums(fed.folder, job)]


@pytest.mark.parametrize("protection", ["masked", "layered"])
def test_the_same_step_with_another_site_left_out_each_time(fed, protection):
    with switched_off(fed.folder, ONE_SUM, LEDGER):  # for statistics each is enough
        read, _ = vectors_by_cohorts(fed, f"{protection}_open", protection)
    assert read == sorted((name, purpose) for name in SITES for purpose in PURPOSES)
    with switched_off(fed.folder, LEDGER):
        read, opened = vectors_by_cohorts(fed, protection, protection)
    assert (read, opened) == ([], [list("bcd")]), "one sum, and no other of this state"


def statistics_by_jobs(fed, task):
    """Whether two released jobs, the second without a, show the statistics of a, and the second job's id:
    `masked`, the coordinator alone."""
    found = []
    for leave_out in [], ["a"]:
        attack(fed.folder, leave_out=leave_out, stop_after=1)
        job = fed.submit(task, rounds=1, protection="masked")
        fed.wait(job)
        found += sums(fed.folder, job, "statistics")
    if [len(each["survivors"]) for each in found] != [4, 3]:
        return False, job
    return is_vector(minus(*found), sent_by(fed.folder, job, "statistics", "a")[0]), job


def test_statistics_of_a_second_job_that_leaves_a_site_out(fed):
    with switched_off(fed.folder, LEDGER):
        read, _ = statistics_by_jobs(fed, "jobs_open")
    assert read
    read, job = statistics_by_jobs(fed, "jobs")
    assert not read
    fed.over(job)
    # the first refusal ends the job: the other two sites may get the survivor list later than its end
    refused = [name for name in "bcd" if f"job {job}: refused: survivor list" in fed.log(name)]
    assert refused, "the ledger of each knows of the first job"


# ------------------------------------------------------------------------ V: a state without proof

LIE = 7.0
"""Each parameter of the model that nobody trained."""


def models_after_a_forged_checkpoint(fed, task):
    """site -> hash of its model after a round of training, before whose certificate the coordinator, with
    the key of one colluding site, sent a checkpoint that no site certified."""
    attack(fed.folder, forge=LIE, key=str(fed.folder))
    job = fed.submit(task, rounds=1)
    fed.wait(job)
    fed.over(job)
    return fed.models(job)


def test_a_checkpoint_that_no_certificate_proves_never_becomes_the_model(fed):
    forged = model_digest(np.full(6, LIE, dtype=np.float32))
    with switched_off(fed.folder, CERTIFIED):
        assert models_after_a_forged_checkpoint(fed, "forged_open") == dict.fromkeys(SITES, forged)
    found = models_after_a_forged_checkpoint(fed, "forged")
    assert len(set(found.values())) == 1
    assert forged not in found.values()


# ------------------------------------------------------------------------- N: a cohort below t


def vectors_of_a(fed, task):
    """Purposes of the rounds of which two colluding sites read a's vector, in a cohort of three: the label
    of four sites under t = 4 says that two colluders read nothing."""
    attack(
        fed.folder, cohort=["a", "c", COLLUDER], header={"threshold": 3}, stop_after=3,
        key=str(fed.folder), gather=1.0,
    )  # fmt: skip
    job = fed.submit(task, rounds=1, threshold=4)
    fed.wait(job)
    read = []
    for each in sums(fed.folder, job):
        given_away = [
            sent_by(fed.folder, job, each["purpose"], name)[0] for name in ("c", COLLUDER)
        ]
        (own,) = sent_by(fed.folder, job, each["purpose"], "a")
        if is_vector(minus(each, *given_away), own):
            read.append(each["purpose"])
    return read


def test_a_cohort_of_three_under_a_threshold_of_four(fed):
    with switched_off(fed.folder, THRESHOLD):
        assert vectors_of_a(fed, "cohort_open") == ["statistics", "range", "update"]
    assert vectors_of_a(fed, "cohort") == []
    assert "roster: found 3 sites, expected at least 4" in fed.log("a")


# ------------------------------------------------------------------- 4: a job with less protection

DOWNGRADES = {
    "plain": {"protect.protection": "plain"},
    "encrypted, and statistics of one site": {
        "protect.protection": "encrypted", "protect.single_site_features": True,
    },
}  # fmt: skip


def answers_to(fed, task, offer):
    """What the sites say to a job of which each was offered this, and how many read their rows for it."""
    before = fed.reads(task)
    attack(fed.folder, offers=dict.fromkeys(SITES, offer), survey=True)
    job = fed.submit(task, rounds=1)
    fed.wait(job)
    return answers(fed.folder, job), fed.reads(task) - before


@pytest.mark.parametrize("offer", DOWNGRADES.values(), ids=DOWNGRADES)
def test_a_job_with_less_protection_than_the_policy_allows(fed, offer):
    with switched_off(fed.folder, POLICY):
        assert answers_to(fed, "downgrade_open", offer) == (dict.fromkeys(SITES, "able"), 4)
    assert answers_to(fed, "downgrade", offer) == (dict.fromkeys(SITES, "policy"), 0)


# ---------------------------------------------------------------- 8: a sum that no honest vectors have


def all_open(event):
    """Whether every site is at a sum and none says a word."""
    found = (event["waiting"] or {"for": {}})["for"]
    return len(found) == len(SITES) and all(each["doing"] == "opening" for each in found.values())


def test_a_lying_site_whose_statistics_have_no_spread(fed):
    """One site's sum of squares is 0: the root of the variance is NaN."""
    attack(fed.folder)
    with lies(fed.folder, statistics={"square": 0}):
        with switched_off(fed.folder, IMPOSSIBLE, UNIFORM):
            job = fed.submit("impossible_open", rounds=1)
            fed.wait(job, until=all_open)
            fed.stop_job(job)
        job = fed.submit("impossible", rounds=1)
        event = fed.wait(job)[-1]
    assert event["state"] == "abandoned", "and nobody hangs"
    assert {site["unable"] for site in event["sites"].values()} == {""}, "one answer, of all"
    fed.over(job)
    # the first refusal ends the job: another site may hear of the end before it has opened the sum
    cause = "statistics: found n S2 < S1^2, expected n S2 >= S1^2"
    honest = sorted(set(SITES) - {COLLUDER})
    assert [name for name in honest if cause in fed.log(name)], "the cause is in a site's own log"


# ----------------------------------------------------------------------------- U: how many rows a site has


def rows_by_caps(fed, task):
    """site -> the rows that it has, by halving: each offer has another cap for each site, and the site says
    whether it can take part. Nothing but offers is needed; also the number of them."""
    low, high, offers = dict.fromkeys(SITES, 0), dict.fromkeys(SITES, 64), 0
    while any(high[name] - low[name] > 1 for name in SITES):
        caps = {name: (low[name] + high[name]) // 2 for name in SITES}
        asked = {name: {"protect.max_examples": cap} for name, cap in caps.items()}
        attack(fed.folder, offers=asked, survey=True)
        job = fed.submit(task, rounds=1)
        fed.wait(job)
        offers += 1
        for name, said in answers(fed.folder, job).items():
            (high if said == "able" else low)[name] = caps[name]
    return high, offers


def test_how_many_rows_a_site_has_by_offers_with_other_caps(fed):
    with switched_off(fed.folder, CAP):
        assert rows_by_caps(fed, "counts_open") == (ROWS, 6)
    assert rows_by_caps(fed, "counts") == (dict.fromkeys(SITES, 1), 6), (
        "each site takes every offer"
    )
