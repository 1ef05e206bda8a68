"""A coordinator that asks twice: two offers of one job, or two jobs, over the same rows (PROTOCOL J).

The sites run their real code: `JobWork` for what is offered to them, `SiteTrainer` for what they compute.
"""

from __future__ import annotations

import asyncio
from functools import cache

import numpy as np
import pytest
from test_metrics_lies import SITES, begun, settings

from fedcore import config
from fedcore.config import build_job, plan_of, settings_digest
from fedcore.learning.data import split as split_module
from fedcore.learning.data.heart import data
from fedcore.learning.data.split import FoldSplit, HashSplit, subsample
from fedcore.learning.data.statistics import FIXED_POINT_BITS
from fedcore.learning.model import single_thread
from fedcore.learning.site import SiteTrainer
from fedcore.learning.state import JobState
from fedcore.learning.task import load_task
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol import job_messages
from fedcore.secagg.protocol.schedule import PlannedRound

OTHER = {"fold": 1, "seed": 7, "lr": 0.25}
"""Settings that decide which rows train, or how, and that no shape of a model shows."""


def with_setting(key, value):
    """The settings of an offer, complete, with another value for one key."""
    found = settings(public=False)
    section = config.KEYS[key]
    (found[section] if section else found)[key] = value
    return found


@pytest.mark.parametrize("key", OTHER)
def test_two_sites_offered_different_settings_find_no_common_plan(tmp_path, without, key):
    """One plan goes to all; a site that was offered something else refuses it before any round."""
    offered, other = settings(public=False), with_setting(key, OTHER[key])

    def answer(folder, settings):
        """What a site that was offered these settings says to the plan of the first ones."""
        return asyncio.run(begun(folder, settings, offered)).link.said[-1]

    assert isinstance(answer(tmp_path / "1", offered), job_messages.PlanAgreed)
    assert answer(tmp_path / "2", other) == job_messages.SiteUnavailable("job", "a", "unable")
    if key == "lr":
        return  # it is in the plan in clear as well, so there is no rule to switch off
    # Control: without the digest of the settings in the plan, both agree, and a round sums their vectors.
    without(config, settings_digest=lambda *_: "")
    assert answer(tmp_path / "3", offered) == answer(tmp_path / "4", other)
    assert isinstance(answer(tmp_path / "5", other), job_messages.PlanAgreed)


def test_every_setting_that_travels_changes_the_plan():
    """Not a list of settings that somebody has to remember: all of them."""
    shape = job_messages.ModelShape("t", "0" * 64, 5, 0, 0, "", ())
    first = build_job(settings(public=False))
    digests = {settings_digest(first, 64), settings_digest(first, 65)}
    changes = {
        "seed": 1, "fold": 2, "folds": 7, "optimiser": "adam", "lr": 0.3, "momentum": 0.5,
        "weight_decay": 0.1, "epochs": 2, "batch_size": 8, "bits": 12, "rounds": 3, "server": "fedadam",
        "single_site_features": True, "release": "coordinator", "buffers": "initial",
    }  # fmt: skip
    for key, value in changes.items():
        found = plan_of(build_job(with_setting(key, value)), shape, SITES, 64)
        assert RoundPlan.from_json(found.to_json()).settings == found.settings
        digests.add(found.settings)
    assert len(digests) == 2 + len(changes)


# ---------------------------------------------------------------------- which rows: real hospitals

TASK, CAP, FOLDS = load_task("heart"), 512, 2000
OWN = HashSplit(b"k" * 32, 0.2)
HOSPITAL = "va"


def job_with(fold, **changes):
    asked = {"folds": FOLDS, "fold": fold, "standardise": "federated", "range": 1.0, **changes}
    return build_job(TASK.defaults, {"max_examples": CAP, "protection": "masked"}, asked)


def contribution(fold, split, step, **changes):
    """What the hospital adds to a sum of a job with this fold."""
    asked = job_with(fold, **changes)
    with single_thread():
        site = SiteTrainer.load(TASK, asked, HOSPITAL, HOSPITAL, CAP, split)
        plan = plan_of(asked, site.shape, ("a", "b", HOSPITAL), CAP)
        return site.contribute(plan, step, JobState.initial(plan, site.initial))


def as_asked(fold):
    """The old rule: the split is the job's."""
    return FoldSplit(0, fold, FOLDS)


@cache
def rows_of_hospital():
    """Each patient's numbers as the statistics carry them, NaN where not observed."""
    features, ranges = data(HOSPITAL).features, np.array(data(HOSPITAL).layout.ranges)
    top = (1 << FIXED_POINT_BITS) - 1
    low, high = ranges.T
    return np.rint((np.clip(features, low, high) - low) / (high - low) * top)


def patients_in(one, other):
    """Patients whose every observed number is the difference of two statistics."""
    count = np.subtract(one["count"], other["count"])
    found = np.where(count == 1, np.subtract(one["sum"], other["sum"]), np.nan)
    rows = rows_of_hospital()
    same = (found == rows) | (np.isnan(found) & np.isnan(rows))
    return [] if not count.any() else np.flatnonzero(same.all(axis=1)).tolist()


def test_two_offers_that_differ_in_fold_show_no_patient_s_numbers():
    """Measured before: three of three patients whole, by a coordinator alone (issue 10, 1a)."""
    step = PlannedRound("statistics", 0)

    def read(split_of):
        sums = [contribution(fold, split_of(fold), step)[1] for fold in (FOLDS - 1, *range(3))]
        return [patients_in(sums[0], other) for other in sums[1:]]

    assert read(lambda _: OWN) == [[], [], []]
    opened = read(as_asked)  # control: the split of whoever submits
    assert all(len(found) == 1 for found in opened) and len({found[0] for found in opened}) == 3


def test_two_jobs_that_differ_in_fold_give_the_same_update():
    """And so does the model of each: what the difference of two releases holds is nothing of a row."""
    step = PlannedRound("update", 1)

    def differs(split_of):
        (one, _), (other, _) = (
            contribution(fold, split_of(fold), step, standardise="ranges") for fold in (0, 1)
        )
        return bool((one != other).any())

    assert not differs(lambda _: OWN)
    assert differs(as_asked)  # control


def test_a_seed_decides_no_split():
    """It orders batches and draws initial parameters; the rows that train stay the same."""

    def trained(seed, split):
        site = SiteTrainer.load(TASK, job_with(0, seed=seed), HOSPITAL, HOSPITAL, CAP, split)
        return site.site.train.digests()

    assert trained(1, OWN) == trained(2, OWN)
    assert trained(1, FoldSplit(1)) != trained(2, FoldSplit(2))  # control


def test_two_caps_choose_unrelated_rows(without):
    """A cap below a site's rows is a question about them, too: 100 and 101 must not differ by one row."""
    rows = data(HOSPITAL)

    def chosen(cap):
        return set(subsample(OWN, rows, None, HOSPITAL, cap)[0].digests())

    assert len(chosen(101) - chosen(100)) > 20
    honest = split_module._picked
    without(split_module, _picked=lambda key, _, row: honest(key, 0, row))
    assert len(chosen(101) - chosen(100)) == 1  # control: a choice that the cap is no part of
