"""Property inference: told of a site from its upload, and of all sites from the sum, whatever hides uploads."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from support.small_tasks import tiny

from fedcore.experiment.attacks.properties import FEW, MANY, _picked, told_apart
from fedcore.experiment.attacks.registry import run_attacks
from fedcore.experiment.prepare import job_for, prepare


@cache
def attacked():
    """Once for all tests: six rows of 24 recorded rounds each, some 10 s."""
    found = run_attacks(
        *job_for(None, {"task": "heart", "protect.protection": "masked"}), ["property"]
    )
    return {
        (each.protection, each.party, each.setting.partition(",")[0]): each for each in found.rows
    }


@pytest.mark.parametrize("about", ["class 0", "exang=true"])
def test_under_plain_the_site_with_many_rows_of_it_is_named(about):
    found = attacked()["plain", "coordinator", about]
    assert found.beyond_chance
    assert found.value > 0.75
    assert found.chance == 0.5


@pytest.mark.parametrize("about", ["class 0", "exang=true"])
def test_under_masked_the_upload_names_no_site(about):
    """Keys are new each time: 22 of 24 by chance has a probability of 2e-5."""
    found = attacked()["masked", "coordinator", about]
    assert found.value < 22 / 24
    assert found.low < 0.5 < found.high or not found.beyond_chance


@pytest.mark.parametrize("about", ["class 0", "exang=true"])
def test_the_sum_tells_of_all_rows_and_says_that_it_names_no_site(about):
    found = attacked()["masked", "another site", about]
    assert found.beyond_chance
    assert "names none of them" in found.shows
    assert found.view == "the sum"


def test_sites_train_on_as_many_rows_and_on_the_share_that_was_drawn():
    has = np.arange(200) < 60
    rng = np.random.default_rng(0)
    for many, share in ((True, MANY), (False, FEW)):
        picked = _picked(has, 50, many, rng)
        assert len(picked) == len(set(picked.tolist())) == 50
        assert has[picked].sum() == round(50 * share)


def test_each_site_has_rows_enough_of_what_is_asked():
    federation = prepare(*job_for(None, {"task": "heart"})).federation
    found = told_apart(federation)
    assert [each.about for each in found] == ["class 0", "exang=true"]
    for each in found:
        for site in each.of:
            assert site.sum() >= round(each.rows * MANY)
            assert (~site).sum() >= each.rows - round(each.rows * FEW)


@pytest.mark.parametrize(
    ("task", "settings", "reason"),
    [
        (
            None,
            {"task": "heart", "train.algorithm": "feddyn", "round.server": "fedavg"},
            "keep something from round",
        ),
        (tiny(), {}, "no class or category"),
    ],
)
def test_a_job_that_it_cannot_be_asked_of_has_a_row_with_the_reason(task, settings, reason):
    (found,) = run_attacks(*job_for(task, settings), ["property"]).rows
    assert reason in found.refused
    assert found.value is None
