"""A coordinator that asks twice: two offers of one job, or two jobs, over the same rows (PROTOCOL J).

The sites run their real code: `SiteJob` for what is offered to them, `LocalSite` for what they compute.
"""

from __future__ import annotations

import asyncio

import pytest
from test_metrics_lies import SITES, begun, settings

from fedcore import config
from fedcore.config import build_job, plan_of, settings_digest
from fedcore.plan import RoundPlan
from fedcore.protocol import job

OTHER = {"fold": 1, "seed": 7, "lr": 0.25}
"""Settings that decide which rows train, or how, and that no shape of a model shows."""


def with_setting(key, value):
    """The settings of an offer, complete, with another value for one key."""
    found = settings(public=False)
    section = config.KEYS[key]
    (found[section] if section else found)[key] = value
    return found


@pytest.mark.parametrize("key", OTHER)
def test_two_sites_offered_different_settings_find_no_common_plan(tmp_path, monkeypatch, key):
    """One plan goes to all; a site that was offered something else refuses it before any round."""
    offered, other = settings(public=False), with_setting(key, OTHER[key])

    def answer(folder, settings):
        """What a site that was offered these settings says to the plan of the first ones."""
        return asyncio.run(begun(folder, settings, offered)).link.said[-1]

    assert isinstance(answer(tmp_path / "1", offered), job.PlanAgreed)
    assert answer(tmp_path / "2", other) == job.Unable("job", "a", "unable")
    if key == "lr":
        return  # it is in the plan in clear as well, so there is no rule to switch off
    # Control: without the digest of the settings in the plan, both agree, and a round sums their vectors.
    monkeypatch.setattr(config, "settings_digest", lambda *_: "")
    assert answer(tmp_path / "3", offered) == answer(tmp_path / "4", other)
    assert isinstance(answer(tmp_path / "5", other), job.PlanAgreed)


def test_every_setting_that_travels_changes_the_plan():
    """Not a list of settings that somebody has to remember: all of them."""
    shape = job.ModelShape("t", "0" * 64, 5, 0, 0, "", ())
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
