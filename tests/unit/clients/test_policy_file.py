"""policy.toml: a file of its own for [policy], read again while the site runs, and what follows for its jobs."""

from __future__ import annotations

import asyncio
import logging

import pytest
from fedcore_clients.check import _policy
from fedcore_clients.config import read_config
from fedcore_clients.policy import PolicySection, SitePolicy
from fedcore_clients.policy_file import PolicyFile, read_policy
from fedcore_clients.status import status_lines
from support.deployed_jobs import SITE_TOML, loaded, offered, submitted
from support.policies import BENCH, policy_of

from fedcore.errors import BadInput
from fedcore.secagg.protocol import job_messages as job

NAMED = f'policy = "policy.toml"\n{SITE_TOML}'


def site_toml(folder, text=NAMED, policy=None):
    (folder / "site.toml").write_text(text)
    if policy is not None:
        (folder / "policy.toml").write_text(policy)
    return folder / "site.toml"


def test_a_file_of_its_own_has_the_keys_of_the_table(tmp_path):
    found = read_config(site_toml(tmp_path, policy='jobs = "ask"\nmost_rounds = 5\n'))
    table = site_toml(tmp_path, f'{SITE_TOML}[policy]\njobs = "ask"\nmost_rounds = 5\n')
    (tmp_path / "policy.toml").unlink()
    assert found.policy == read_config(table).policy != PolicySection()
    assert found.policy_file == tmp_path / "policy.toml"
    assert read_config(table).policy_file is None


@pytest.mark.parametrize(
    ("site", "policy", "parts"),
    [
        (f"{NAMED}[policy]\nmost_rounds = 5\n", "", ("site.toml: policy: found", "and [policy]")),
        (f"{SITE_TOML}[policy]\nmost_rounds = 5\n", "", ("found policy.toml beside it and [policy]",)),
        (SITE_TOML, "most_rounds = 5\n", ("nothing that names it", 'write `policy = "policy.toml"`')),
        (NAMED, None, ("policy.toml: found no such file",)),
        (NAMED, "most_round = 3\n", ("policy.toml: key", "'most_rounds'")),
        (NAMED, "minimum_sites = 2\n", ("policy.toml: minimum_sites: found 2", "line 1 of")),
        (
            NAMED, "\njobs = 'ask'\nprotections = [\n]\n",
            ("policy.toml: protections: found [], expected at least 1 item", "line 3 of"),
        ),
        (
            f"{SITE_TOML}[policy]\nminimum_sites = 2\n", None,
            ("site.toml: policy.minimum_sites: found 2", f"line {SITE_TOML.count(chr(10)) + 2} of"),
        ),
        (NAMED, "[policy]\nmost_rounds = 3\n", ("found a table [policy]", "at the top of this file")),
        (NAMED, "most_rounds = \n", ("policy.toml: it cannot be read as TOML",)),
    ],
)  # fmt: skip
def test_a_policy_in_two_places_or_in_none_is_refused_in_one_line(tmp_path, site, policy, parts):
    with pytest.raises(BadInput) as caught:
        read_config(site_toml(tmp_path, site, policy))
    for part in parts:
        assert part in f"{caught.value} {caught.value.remedy}"
    assert "\n" not in str(caught.value)


def test_a_refusal_names_the_file_and_needs_no_restart(tmp_path):
    rules = read_policy(site_toml(tmp_path, policy="minimum_sites = 5\n").with_name("policy.toml"))
    refused = SitePolicy(rules, 4, BENCH, "policy.toml").on_offer(
        loaded(tmp_path, submitted()).offer
    )
    assert "expected 5 or more by minimum_sites of policy.toml" in str(refused)
    assert "start fed-site again" not in refused.remedy and "policy.toml" in refused.remedy


def in_force(folder, text="most_rounds = 5\n"):
    path = folder / "policy.toml"
    path.write_text(text)
    policy = SitePolicy(read_policy(path), 4, BENCH, path.name)
    return path, policy, PolicyFile(policy, path)


def test_a_changed_file_is_in_force_at_once_and_named_in_the_log(tmp_path, caplog):
    path, policy, file = in_force(tmp_path)
    assert not file.refresh()
    path.write_text('most_rounds = 50\njobs = "ask"\n')
    with caplog.at_level(logging.WARNING):
        assert file.refresh() and not file.refresh()
    assert (policy.rules.most_rounds, policy.rules.jobs, file.problem) == (50, "ask", "")
    (line,) = caplog.messages
    assert line == "policy: policy.toml was read again: most_rounds, jobs changed"


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("most_rounds = ", "it cannot be read as TOML"),
        ("most_round = 9\n", "most_round"),
        ("least_threshold = 2\n", "policy.toml: least_threshold: found 2, expected 3 to 4"),
        (None, "found no such file"),
    ],
)
def test_a_broken_file_changes_nothing_and_is_told_once(tmp_path, caplog, broken, said):
    path, policy, file = in_force(tmp_path)
    before = policy.rules
    if broken is None:
        path.unlink()
    else:
        path.write_text(broken)
    assert not file.refresh() and not file.refresh()
    assert policy.rules is before and said in file.problem
    (line,) = caplog.messages
    assert said in line and "the rules read before stay in force" in line and "hint:" in line
    status = {"site": "a", "running": True, "connected_since": None, "coordinator": "h:1"}
    status |= {"process": 1, "last_error": "", "jobs": [], "policy_problem": file.problem}
    assert any(said in shown for shown in status_lines(status))
    path.write_text("most_rounds = 6\n")
    assert file.refresh() and file.problem == "" and policy.rules.most_rounds == 6


def test_a_policy_in_site_toml_is_not_read_again(tmp_path):
    assert not PolicyFile(policy_of(), None).refresh()


# ----------------------------------------------------------------------------- jobs under way


def changed(found, **rules):
    """Other rules are in force at the site of a job: what it says because of it."""

    async def play():
        before = len(found.link.said)
        found.context.policy.rules = policy_of(**rules).rules
        found.policy_changed()
        while found.mailbox.backlog or found.job.loading:
            await found.mailbox.turn(found.handle, lambda: None)
        return found.link.said[before:]

    return asyncio.run(play())


def test_a_job_that_the_new_rules_allow_begins(tmp_path):
    found = loaded(tmp_path, submitted(train={"batch_size": 7}))
    assert found.contributor.loaded == 0
    (said,) = changed(found, least_batch=7)
    assert isinstance(said, job.SiteSurvey) and found.contributor.loaded == 1
    assert found.job.part.refused is None and not found.job.part.last_error


def test_a_job_that_the_new_rules_refuse_is_left_and_joined_again(tmp_path):
    found = offered(tmp_path, submitted(), submitted())
    assert found.job.plan is not None
    assert changed(found, most_rounds=1) == [job.SiteUnavailable("job", "a", "policy")]
    assert "round.rounds: found 2, expected 1 or fewer" in found.job.part.last_error
    assert found.job.part.out, "no status, and no round"
    said = changed(found, most_rounds=2)
    assert isinstance(said[0], job.PlanAgreed) and not found.job.part.out


def test_a_cohort_is_held_to_the_new_minimum(tmp_path):
    found = offered(tmp_path, submitted(), submitted())
    assert found.job.parts.rounds.member.minimum == 3
    changed(found, minimum_sites=4)
    assert found.job.parts.rounds.member.minimum == 4


def test_the_guard_goes_by_the_new_factor(tmp_path):
    found = offered(tmp_path, submitted(), submitted())
    changed(found, guard_loss_factor=1.2)
    assert found.work.guard.rules.loss_factor == 1.2


# --------------------------------------------------------------------- a policy without any job


@pytest.mark.parametrize(
    ("rules", "sites", "key"),
    [
        ({"minimum_sites": 5}, 4, "minimum_sites"),
        ({}, 1, "minimum_sites"),
        ({"protections": ["encrypted"]}, 2, "minimum_sites"),
        ({"protections": ["layered"]}, 65, "protections"),
        ({"protections": ["encrypted"]}, 65, ""),
        ({"protections": ["masked"], "ciphers": ["keystream"]}, 4, ""),
        ({"least_batch": 4096, "most_rounds": 1, "most_epochs": 1}, 3, ""),
    ],
)
def test_check_names_the_key_because_of_which_no_job_fits(rules, sites, key):
    policy = SitePolicy(PolicySection(**rules), sites, BENCH)
    assert policy.forbids_all == key
    warning = f"warning: no job can satisfy this policy, because of {key}"
    assert (warning in _policy(policy)) is bool(key)
