"""A coordinator that offers less protection than a site's operator expects: `plain`, or `encrypted` with
statistics of single sites, and asks for what the operator does not give.

Attack (measured on real sites at 45ef960): a job with `encrypted` and `single_site_features = true` was
taken by every site, and no site showed a label; a whole `plain` job was agreed to. Each control is the
same offer with the one rule of the policy removed, or with an operator who allows it.
"""

from __future__ import annotations

import asyncio
import logging

import pytest
from fedcore_clients import policy
from support.policies import BENCH, FOUR, Rows, begin, job_at_a_site

from fedcore.config import build_job, wire_settings
from fedcore.secagg.protocol import job_messages

ENCRYPTED = {"protection": "encrypted", "single_site_features": True}


def offered(folder, asked, **rules):
    """A site with this policy, after the offer of such a job; `asked` are keys of [protect]."""
    settings = wire_settings(build_job({"max_examples": 64, "rounds": 2, "range": 0.5}))
    settings["protect"] |= asked
    allowed = policy.SitePolicy(policy.PolicySection(**rules), len(FOUR), BENCH)
    found = job_at_a_site(folder, settings, allowed)
    asyncio.run(begin(found))
    return found


def without_rule(monkeypatch, key):
    kept = {other: rule for other, rule in policy._RULES.items() if other != key}
    assert len(kept) == len(policy._RULES) - 1
    monkeypatch.setattr(policy, "_RULES", kept)


def refused(found, setting, caplog):
    """One word has left, and one line stays here; nothing was read."""
    assert found.link.said == [job_messages.SiteUnavailable("job", "a", "policy")]
    assert found.contributor.loaded == 0 and found.job.part.survey is None
    lines = [message for message in caplog.messages if "refused" in message]
    assert len(lines) == 1 and setting in lines[0] and "hint: " in lines[0]
    assert "policy." in lines[0] and "\n" not in lines[0]


def taken(found):
    assert [type(each) for each in found.link.said] == [job_messages.SiteSurvey]
    assert found.contributor.loaded == 1


def test_a_job_with_less_protection_than_the_operator_allows(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    refused(offered(tmp_path / "1", ENCRYPTED), "protect.protection: found 'encrypted'", caplog)
    without_rule(monkeypatch, "protections")
    found = offered(tmp_path / "2", {"protection": "encrypted"})
    taken(found)


def test_statistics_of_single_sites_under_a_protection_that_is_allowed(
    tmp_path, monkeypatch, caplog
):
    """The second half of the downgrade has a rule of its own."""
    caplog.set_level(logging.WARNING)
    found = offered(tmp_path / "1", ENCRYPTED, protections=("encrypted",))
    refused(found, "protect.single_site_features: found true", caplog)
    taken(offered(tmp_path / "2", ENCRYPTED, protections=("encrypted",), single_site_features=True))
    without_rule(monkeypatch, "single_site_features")
    taken(offered(tmp_path / "3", ENCRYPTED, protections=("encrypted",)))


def test_a_plain_job_whatever_the_operator_allows(tmp_path, monkeypatch, caplog):
    """No policy can allow it: there is no such word in site.toml."""
    caplog.set_level(logging.WARNING)
    everything = ("layered", "masked", "encrypted")
    found = offered(tmp_path / "1", {"protection": "plain"}, protections=everything)
    refused(found, "protect.protection: found 'plain'", caplog)
    without_rule(monkeypatch, "protections")
    taken(offered(tmp_path / "2", {"protection": "plain"}, protections=everything))


@pytest.mark.parametrize("sites_t", [2, 5])
def test_a_threshold_that_no_roster_has(tmp_path, caplog, sites_t):
    caplog.set_level(logging.WARNING)
    found = offered(tmp_path / "1", {"threshold": sites_t})
    assert (
        found.link.said == [job_messages.SiteUnavailable("job", "a", "policy")]
        and found.contributor.loaded == 0
    )
    taken(offered(tmp_path / "2", {"threshold": 3}))


def test_label_and_what_leaves_are_there_before_a_row_is_read(tmp_path, monkeypatch, caplog):
    """No deployed site showed a label. What the log has at the moment when rows are read is all of it."""
    caplog.set_level(logging.INFO)
    before, load = [], Rows.load

    async def late(self, *args):
        before.extend(caplog.messages)
        return await load(self, *args)

    monkeypatch.setattr(Rows, "load", late)
    found = offered(tmp_path, {})
    taken(found)
    labels = [m.removeprefix("job job: label: ") for m in before if ": label: " in m]
    leaves = [m.removeprefix("job job: leaves: ") for m in before if ": leaves: " in m]
    assert labels == list(found.work.about.label) and leaves == list(found.work.about.leaves)
    assert labels[0].startswith("Protects against: the coordinator")
    assert any(each.startswith("update (up to 2 sums") for each in leaves)
