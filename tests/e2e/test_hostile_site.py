"""What one lying site, or an honest one that looks at two jobs, reads of another hospital's patients.

The deployment is that of `fedcore up`: its files, real processes. Each attack is carried out with the one
rule switched off at the sites, where it reads whole patients, and with the rule.
"""

from __future__ import annotations

import numpy as np
import pytest
from support.hospitals import hospitals
from support.unguarded_site import SPLIT, switched_off

from fedcore.data import heart

NUMBERS = ("age", "trestbps", "chol", "thalch", "oldpeak")


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
