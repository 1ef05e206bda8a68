"""Other partitions of a task whose sites are given: `by`, `n`, `alpha` and `seed` under [sites]."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fedcore
from fedcore.errors import BadInput, UnknownName
from fedcore.experiment.prepare import job_for, resolve_sites
from fedcore.learning.data import heart
from fedcore.learning.data.loading import load_rows
from fedcore.learning.dealing import dealt


def sites_of(task, **sites):
    return resolve_sites(*job_for(task, {"sites": sites}))


def rows_of(sites):
    return np.concatenate([part.features[:, 0] for part in sites.values()])


def test_the_four_hospitals_are_left_as_they_are_or_dealt_again():
    assert sites_of(heart.task, by="natural") == sites_of(heart.task) == heart.task.sites
    found = sites_of(heart.task, by="iid")
    assert [len(part) for part in found.values()] == [230] * 4
    ages = [heart.data(site).features[:, 0] for site in heart.task.sites]
    np.testing.assert_array_equal(np.sort(rows_of(found)), np.sort(np.concatenate(ages)))
    rows, test = load_rows(heart.task, found["site-01"], "site-01")
    assert rows is found["site-01"] and test is None


@pytest.mark.parametrize(
    ("sites", "differs"),
    [
        ({"by": "dirichlet", "alpha": 0.1, "n": 5}, "labels"),
        ({"by": "label", "n": 5}, "labels"),
        ({"by": "quantity", "alpha": 0.3, "n": 5}, "sizes"),
        ({"by": "features", "n": 5}, "inputs"),
    ],
)
def test_a_partition_differs_in_what_it_is_called_by(sites, differs):
    found = list(sites_of(heart.task, **sites).values())
    assert len(found) == 5 and sum(map(len, found)) == 920
    shares = [part.labels().mean() for part in found]
    ages = [np.nanmean(part.features[:, 0]) for part in found]
    spread = {
        "labels": max(shares) - min(shares) > 0.5,
        "sizes": max(map(len, found)) > 3 * min(map(len, found)),
        "inputs": max(ages) - min(ages) > 5,
    }
    assert spread[differs]


def test_a_run_on_another_partition_is_that_of_the_same_rows():
    run = fedcore.simulate(
        "heart", sites={"by": "iid", "n": 3, "seed": 2}, rounds=1, arms=["centralised"],
        resamples=0, protection="plain",
    )  # fmt: skip
    assert run.result.sites == ("site-01", "site-02", "site-03")
    assert run.result.rows.train + run.result.rows.test == 920


@pytest.mark.parametrize(
    ("sites", "match"),
    [
        ({"by": "natural", "n": 3}, "sites.n: found 3 beside by = 'natural'"),
        ({"by": "natural", "alpha": 1.0}, "sites.alpha"),
        ({"by": "dirichlet", "n": 3}, "alpha"),
        ({"by": "iid", "n": 921}, "921"),
    ],
)
def test_a_partition_that_cannot_be_made_is_refused(sites, match):
    with pytest.raises(BadInput, match=match):
        sites_of(heart.task, **sites)
    with pytest.raises(UnknownName):
        sites_of(heart.task, n=3, bby="iid")


def task_of(data):
    return fedcore.Task("mine", data, fedcore.linear(1), torch.nn.MSELoss(), sites={"a": 1, "b": 2})


def arrays(source):
    x = torch.arange(6, dtype=torch.float32).reshape(6, 1) + 10 * source
    return x, torch.tensor([0, 1] * 3)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (lambda source: (arrays(source), arrays(source)), "a test part of its own"),
        (lambda source: fedcore.grouped(arrays(source), [0, 0, 1, 1, 2, 2]), "belong together"),
    ],
)
def test_rows_that_cannot_be_dealt_one_by_one_are_refused(data, what):
    with pytest.raises(BadInput, match=what):
        sites_of(task_of(data), by="iid")


def test_dealing_draws_nothing_from_the_task_s_own_generators():
    def noisy(source):
        x, y = arrays(source)
        return x + torch.rand(6, 1), y

    one, other = (dealt(task_of(noisy), {"a": 1, "b": 2}, by="iid", seed=3) for _ in range(2))
    for name, part in one.items():
        assert torch.equal(part.x, other[name].x)


def test_a_task_without_sites_has_none_to_deal_again():
    task = fedcore.Task("mine", arrays, fedcore.linear(1), torch.nn.MSELoss())
    with pytest.raises(BadInput, match="has no sites to deal again"):
        sites_of(task, n=3)
