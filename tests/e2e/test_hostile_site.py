"""What one lying site, or an honest one that looks at two jobs, reads of another hospital's patients.

The deployment is that of `fedcore up`: its files, real processes. Each attack is carried out with the one
rule switched off at the sites, where it reads whole patients, and with the rule.
"""

from __future__ import annotations

import numpy as np
import pytest
from support.hospitals import LIAR, hospitals
from support.lying_site import ask, read
from support.unguarded_site import GUARD, SPLIT, switched_off

from fedcore.learning.data import heart

NUMBERS = ("age", "trestbps", "chol", "thalch", "oldpeak")
AGES = (78.0, 76.5)
"""Between them there is one patient outside the lying site, of 77 years."""


@pytest.fixture(scope="module")
def town(tmp_path_factory):
    """Statistics are asked for, and the model is given to the coordinator: what `up` writes allows both."""
    with hospitals(
        tmp_path_factory.mktemp("hospitals"), rounds=30, standardise="federated",
        release="coordinator",
    ) as found:  # fmt: skip
        yield found


# ------------------------------------------------------------------- J: two ordinary jobs, all honest


def sums_of(statistics):
    """(columns,) the exact sums of all training rows, from means and counts."""
    assert statistics.names == NUMBERS
    return statistics.mean * np.array(statistics.count)


def two_jobs(town):
    """What two jobs that differ in `fold` alone differ by, to a hospital that looks at its own files and
    to the coordinator that was given the models. Fold 300 of 2000 holds a row of Cleveland alone, which has
    more than 300; fold 1999 holds no row."""
    found = []
    for fold in 1999, 300:
        job = town.submit(rounds=1, fold=fold, folds=2000)
        assert town.wait(job)[-1]["state"] == "finished"
        found.append((town.held("hungary", job).statistics, town.given(job)))
    (own, given), (own_after, given_after) = found
    return sums_of(own) - sums_of(own_after), sums_of(given) - sums_of(given_after)


def test_two_jobs_that_differ_in_a_fold(town):
    with switched_off(town.notes, SPLIT):
        rows = heart.data("cleveland").features
        for found in two_jobs(town):
            assert (np.abs(rows - found).max(axis=1) < 0.01).any(), "a patient, all five numbers"
    for found in two_jobs(town):
        assert not found.any()


# -------------------------------------------------------------------------- G: one site that lies


def steer(town):
    """A job in which one site steers: its last event, and what two of its answers isolate (None without)."""
    prepared = town.trial
    columns, statistics = list(prepared.federation.sites[0].layout.columns), prepared.statistics
    age, at = columns.index("age"), statistics.names.index("age")
    own = next(each for each in prepared.sites if each.id == LIAR)
    center, scale = float(statistics.mean[at]), float(statistics.std[at])
    ask(
        town.notes,
        column=age,
        center=center,
        scale=scale,
        taus=AGES,
        rows=len(own.train),
        range_=4.0,
    )
    job = town.submit(rounds=30, release="sites")

    def over(event):
        """It has its answers, or too few sites are left for another round."""
        left = [site for site in event["sites"].values() if site["unable"]]
        return len(read(town.notes, job)) == len(AGES) or len(left) > 1

    event = town.wait(job, until=over)[-1]
    if event["state"] == "running":
        town.stop_job(job)
    found = read(town.notes, job)
    if len(found) < len(AGES):
        return event, None
    return event, np.mean(found[AGES[1]], 0) - np.mean(found[AGES[0]], 0)


def oldest(town):
    """(inputs,) the patient of the other three hospitals who is between the two ages."""
    columns, statistics = list(town.trial.federation.sites[0].layout.columns), town.trial.statistics
    at = statistics.names.index("age")
    rows = np.concatenate([e.train.x.numpy() for e in town.trial.sites if e.id != LIAR])
    years = rows[:, columns.index("age")] * statistics.std[at] + statistics.mean[at]
    (row,) = rows[(AGES[1] < years) & (years < AGES[0])]
    return row


def test_a_site_that_steers_the_model_into_a_question(town):
    with switched_off(town.notes, GUARD):
        _, isolated = steer(town)
    assert np.abs(isolated[:-1] - oldest(town)).max() < 0.35, "the whole patient"
    event, isolated = steer(town)
    assert isolated is None
    assert event["rounds_done"] <= 8
    left = {name for name, about in event["sites"].items() if about["unable"]}
    assert left <= set(town.sites) - {LIAR}
    assert {about["unable"] for about in event["sites"].values()} == {"", "unable"}, "one word"
    for name in left:
        assert f"guard: site {name} leaves the job" in town.log(name)
