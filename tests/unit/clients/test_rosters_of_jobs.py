"""A job at a site keeps the roster that it was offered with, whatever the site's roster is later."""

import asyncio
from dataclasses import replace

import pytest
from fedcore_clients.job_policy import JobPolicy
from fedcore_clients.job_runner import JobRunner
from fedcore_clients.ledger import Ledger

from fedcore.identity.roster import ROSTER_KEY, PinnedRoster, RosterFile
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.plan import canonical
from fedcore.secagg.protocol import job_messages as job
from fedcore.secagg.protocol.wire_form import encode
from tests.support.deployed_jobs import submitted
from tests.support.policies import BENCH, begin, job_at_a_site, policy_of


def at_a(folder, **rules):
    found = job_at_a_site(folder, submitted(), policy_of(4, **rules))
    journal = found.context.journal
    journal.put("job", ROSTER_KEY, found.roster.to_bytes())
    journal.put("job", "offer", encode(found.offer))
    return found


def restarted(found, sites, **changes):
    """The site's process, started again under another roster."""
    context = replace(found.context, rosters=RosterFile(PinnedRoster(sites, 2)), **changes)
    return JobRunner.stored(context, found.link, found.contributor, "job")


@pytest.mark.parametrize("later", ["abcde", "abc", "dcba"])
def test_a_restarted_site_keeps_the_roster_of_its_job(tmp_path, later):
    found = at_a(tmp_path)
    keys = dict(found.roster.sites) | {"e": IdentityKey().public}
    again = restarted(found, {name: keys[name] for name in later})
    assert again.roster == found.roster and list(again.roster.sites) == list("abcd")
    assert again.job.part.me.pins == found.job.part.me.pins
    asyncio.run(begin(again))
    assert isinstance(again.link.said[-1], job.SiteSurvey)


def test_a_site_with_a_new_identity_key_leaves_the_jobs_that_pin_the_old_one(tmp_path):
    """Control: with the key that the job pins it goes on."""
    found = at_a(tmp_path)
    again = restarted(found, found.roster.sites, identity=IdentityKey())
    asyncio.run(begin(again))
    assert again.link.said[-1] == job.SiteUnavailable("job", "a", "roster")
    assert "another key for 'a'" in again.job.part.last_error
    assert not again.contributor.loaded
    asyncio.run(begin(restarted(found, found.roster.sites)))
    assert isinstance(found.link.said[-1], job.SiteSurvey)


def test_a_job_whose_roster_is_without_this_site_is_refused(tmp_path):
    found = at_a(tmp_path)
    others = {name: key for name, key in found.roster.sites.items() if name != "a"}
    found.context.journal.put("job", ROSTER_KEY, PinnedRoster(others).to_bytes())
    again = restarted(found, found.roster.sites)
    asyncio.run(begin(again))
    assert again.link.said[-1] == job.SiteUnavailable("job", "a", "roster")
    assert "found no key for 'a'" in again.job.part.last_error


def no_ledger(folder):
    return Ledger(folder / "ledger.jsonl", b"k" * 32)


def test_the_policy_counts_the_sites_of_the_jobs_roster(tmp_path):
    """Of five sites four are needed by default: a job with t = 3, which four sites may have, is refused."""
    policy, key = policy_of(4), IdentityKey().public
    offer = job.JobOffer(
        "job", "bench", BENCH["bench"], canonical(submitted(protect={"threshold": 3}))
    )
    four, five = ({"a": key, **dict.fromkeys(names, b"")} for names in ("bcd", "bcde"))
    assert JobPolicy(policy, no_ledger(tmp_path), four, "a", key).on_offer(offer) is None
    assert "3, expected 4 or more of 5 sites" in str(
        JobPolicy(policy, no_ledger(tmp_path), five, "a", key).on_offer(offer)
    )


def test_rules_that_change_count_for_a_job_of_any_roster(tmp_path):
    policy, key = policy_of(4), IdentityKey().public
    offer = job.JobOffer("job", "bench", BENCH["bench"], canonical(submitted()))
    sites = {"a": key, "b": b"", "c": b""}
    of_job = JobPolicy(policy, no_ledger(tmp_path), sites, "a", key)
    assert of_job.on_offer(offer) is None
    policy.rules = policy_of(4, least_batch=4096).rules
    assert "train.batch_size" in str(of_job.on_offer(offer))
