"""[policy] of site.toml: every key, what it refuses, and who hears what of a refusal."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import pytest
from fedcore_clients.check import _policy
from fedcore_clients.config import read_config
from fedcore_clients.job_runner import JobRunner
from fedcore_clients.policy import PolicySection, SitePolicy
from pydantic import ValidationError
from support.deployed_jobs import SITE_TOML, loaded, offered, plan_for, released, submitted
from support.policies import BENCH, begin, policy_of

from fedcore.config import build_job, narrowest_policy, wire_settings
from fedcore.errors import BadInput, PolicyRefused, UnknownName
from fedcore.local_deployment import to_toml
from fedcore.secagg.plan import canonical
from fedcore.secagg.protocol import job_messages as job
from fedcore.secagg.protocol.job.site.events import Connected
from fedcore.secagg.protocol.wire_form import encode

SITES = 4


def strict(**rules):
    return SitePolicy(PolicySection(**rules), SITES, BENCH)


def offer_of(asked, task="bench", digest=BENCH["bench"]):
    return job.JobOffer("job", task, digest, canonical(wire_settings(asked)))


def on_offer(policy, **settings):
    return policy.on_offer(offer_of(build_job({"max_examples": 64, **settings})))


REFUSED = {
    "protections": ({}, {"protection": "masked"}, "protect.protection: found 'masked'"),
    "ciphers": ({"ciphers": ["keystream"]}, {}, "protect.cipher: found 'bfv', expected 'keystream'"),
    "statistics": (
        {}, {"standardise": "federated"}, "train.standardise: found 'federated', expected 'ranges'",
    ),
    "least_threshold": ({"least_threshold": 4}, {}, "protect.threshold: found 3, expected 4 or more"),
    "minimum_sites": ({"minimum_sites": 5}, {}, "sites: found 4, expected 5 or more"),
    "most_rounds": ({"most_rounds": 9}, {"rounds": 10}, "round.rounds: found 10, expected 9 or fewer"),
    "most_epochs": ({"most_epochs": 2}, {"epochs": 3}, "train.epochs: found 3, expected 2 or fewer"),
    "least_batch": ({}, {"batch_size": 7}, "train.batch_size: found 7, expected 8 or more"),
    "public_metrics": (
        {}, {"public_metrics": True}, "track.public_metrics: found true, expected false"
    ),
    "single_site_features": (
        {}, {"single_site_features": True},
        "protect.single_site_features: found true, expected false",
    ),
    "release": ({}, {"release": "coordinator"}, "protect.release: found 'coordinator', expected 'sites'"),
    "task_settings": ({}, {"task.hidden": 4}, "task_settings: found true, expected false"),
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_every_key_refuses_the_job_that_asks_for_more(key):
    rules, settings, line = REFUSED[key]
    refused = on_offer(strict(**rules), **settings)
    assert refused is not None and refused.word == "policy"
    assert str(refused).startswith(line) and f"by policy.{key} of site.toml" in str(refused)
    assert f"`{key}` under [policy]" in refused.remedy


WIDENED = {
    "statistics": {"statistics": "federated"},
    "ciphers": {"ciphers": ["bfv"]},
    "protections": {"protections": ["masked"]},
    "least_threshold": {"least_threshold": 3},
    "minimum_sites": {"minimum_sites": 4},
    "most_rounds": {"most_rounds": 10},
    "most_epochs": {"most_epochs": 3},
    "least_batch": {"least_batch": 7},
    "public_metrics": {"public_metrics": True},
    "single_site_features": {"single_site_features": True},
    "release": {"release": "coordinator"},
    "task_settings": {"task_settings": True},
}


@pytest.mark.parametrize("key", REFUSED)
def test_the_same_job_is_allowed_where_the_operator_widens_that_key(key):
    """The control: nothing else of the job is refused."""
    assert WIDENED.keys() == REFUSED.keys()
    assert on_offer(strict(**WIDENED[key]), **REFUSED[key][1]) is None


OF_A_PLAN = {
    "protections": {"protection": "masked"}, "least_threshold": {"threshold": 3},
    "public_metrics": {"public_metrics": True}, "release": {"release": "coordinator"},
    "statistics": {"standardise": "federated"},
}  # fmt: skip


@pytest.mark.parametrize("key", OF_A_PLAN)
def test_a_plan_is_held_to_the_policy_whatever_its_job_said(key):
    rules = {"least_threshold": 4} if key == "least_threshold" else {}
    refused = strict(**rules).on_plan(plan_for(**OF_A_PLAN[key]))
    assert refused is not None and f"policy.{key} " in str(refused)
    assert strict(**WIDENED[key]).on_plan(plan_for(**OF_A_PLAN[key])) is None


def test_an_ordinary_job_is_allowed_by_the_defaults():
    assert on_offer(strict()) is None


def test_a_cipher_matters_only_where_something_is_encrypted():
    policy = strict(ciphers=["keystream"], protections=["masked", "encrypted"])
    assert on_offer(policy, protection="masked") is None
    assert on_offer(policy, protection="encrypted") is not None


@pytest.mark.parametrize("limit", ["most_rounds", "most_epochs"])
def test_any_runs_listed_tasks_without_limits_and_within_every_other_rule(limit):
    rules, settings, _ = REFUSED[limit]
    assert on_offer(strict(**rules, jobs="any"), **settings) is None
    for key in REFUSED.keys() - {"most_rounds", "most_epochs"}:
        rules, settings, _ = REFUSED[key]
        assert on_offer(strict(**rules, jobs="any"), **settings) is not None


@pytest.mark.parametrize("jobs", ["listed", "any", "ask"])
@pytest.mark.parametrize(
    ("task", "digest", "word"),
    [
        ("heart", "a" * 64, ""), ("here.py", "a" * 64, "task not allowed"),
        ("Heart", "a" * 64, "task not allowed"), ("", "a" * 64, "task not allowed"),
        ("heart", "b" * 64, "task differs"), ("heart", "A" * 64, "task differs"),
        ("heart", "", "task differs"),
    ],
)  # fmt: skip
def test_a_task_runs_by_its_listed_name_and_hash_only(jobs, task, digest, word):
    policy = policy_of(SITES, {"heart": "a" * 64}, jobs=jobs)
    refused = policy.on_offer(offer_of(build_job({}), task, digest))
    assert (refused.word if refused else "") == word
    assert refused is None or "tasks" in str(refused)


def test_what_may_go_to_the_coordinator_is_asked_again_when_it_is_about_to():
    for what, wide in (
        ("model", {"release": "coordinator"}),
        ("metrics", {"public_metrics": True}),
    ):
        assert strict().on_release(what).word == "policy"
        assert strict(**wide).on_release(what) is None


def test_what_is_wider_than_the_default_is_named():
    assert strict().wider == []
    assert strict(**{k: v for rules in REFUSED.values() for k, v in rules[0].items()}).wider == []
    wide = {
        "protections": ["layered", "masked"], "least_threshold": 2, "most_rounds": 1001,
        "most_epochs": 101, "jobs_per_month": 32, "least_batch": 7, "public_metrics": True,
        "single_site_features": True, "statistics": "federated", "release": "coordinator", "task_settings": True,
        "guard_loss_factor": 2.0, "guard_rounds": 3, "jobs": "any",
    }  # fmt: skip
    for key, value in wide.items():
        policy = SitePolicy(PolicySection(**{key: value}), 3, BENCH)
        assert policy.wider == [key]
        shown = _policy(policy)
        assert f"warning: wider than the default: {key}" in shown
    assert "warning" not in _policy(strict())


# ------------------------------------------------------------------------------------- site.toml


@pytest.mark.parametrize("text", ["true", "yes"])
def test_a_text_is_no_yes(text):
    for key in ("public_metrics", "single_site_features"):
        with pytest.raises(ValidationError):
            PolicySection.model_validate({key: text})


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (
            'protections = ["plain"]',
            ("policy.protections.0: found 'plain'", "'encrypted', 'masked'"),
        ),
        ("protections = []", ("policy.protections",)),
        ('ciphers = ["rot13"]', ("policy.ciphers.0: found 'rot13'",)),
        ("minimum_sites = 2", ("policy.minimum_sites: found 2",)),
        ("guard_loss_factor = 1.0", ("policy.guard_loss_factor",)),
        ('jobs = "all"', ("policy.jobs: found 'all'", "'ask'")),
        ("most_round = 3", ("policy.most_round", "'policy.most_rounds'")),
    ],
)
def test_a_wrong_policy_is_refused_with_its_key(tmp_path, line, parts):
    path = tmp_path / "site.toml"
    path.write_text(f"{SITE_TOML}[policy]\n{line}\n")
    with pytest.raises(BadInput) as caught:
        read_config(path)
    for part in parts:
        assert part in f"{caught.value} {caught.value.remedy}"


@pytest.mark.parametrize("line", ["minimum_sites = 3", 'release = "coordinator"'])
def test_a_key_that_belongs_in_the_table_says_so(tmp_path, line):
    path = tmp_path / "site.toml"
    path.write_text(f"{line}\n{SITE_TOML}")
    with pytest.raises(UnknownName) as caught:
        read_config(path)
    assert caught.value.remedy == f"write `{line.split(' ')[0]}` under [policy]"


@pytest.mark.parametrize(("least", "sites"), [(2, 4), (5, 4), (8, 16), (17, 16), (4, 3)])
def test_a_threshold_that_no_roster_of_this_size_has_is_refused(least, sites):
    with pytest.raises(BadInput, match=rf"policy.least_threshold: found {least}, expected") as bad:
        SitePolicy(PolicySection(least_threshold=least), sites, {})
    assert f"{sites} sites in roster.toml" in str(bad.value) and bad.value.remedy


@pytest.mark.parametrize(("sites", "least"), [(3, 3), (4, 3), (5, 4), (16, 11)])
def test_the_least_threshold_is_that_of_a_job_that_says_none(sites, least):
    assert SitePolicy(PolicySection(), sites, {}).least_threshold == least


@pytest.mark.parametrize("sites", [3, 4, 16])
@pytest.mark.parametrize(
    "settings",
    [
        {}, {"protection": "masked", "threshold": 3}, {"protection": "encrypted", "batch_size": 1},
        {"public_metrics": True, "epochs": 200, "rounds": 5000}, {"release": "coordinator"},
        {"single_site_features": True}, {"cipher": "keystream"},
        {"standardise": "federated"}, {"task.hidden": 4},
    ],
)  # fmt: skip
def test_up_writes_the_policy_that_its_job_needs_and_nothing_wider(tmp_path, sites, settings):
    if settings.get("threshold") and sites == 16:
        settings = {**settings, "threshold": 9}
    asked_for = build_job(settings)
    path = tmp_path / "site.toml"
    path.write_text(SITE_TOML + to_toml({"policy": narrowest_policy(asked_for, sites)}))
    rules = read_config(path).policy
    policy = SitePolicy(rules, sites, BENCH)
    assert policy.on_offer(offer_of(asked_for)) is None
    other = {
        "protection": next(p for p in ("masked", "layered") if p != asked_for.protect.protection),
        "rounds": asked_for.round.rounds + 1, "epochs": asked_for.train.epochs + 1,
    }  # fmt: skip
    if asked_for.train.batch_size > 1:
        other["batch_size"] = asked_for.train.batch_size - 1
    for key in ("public_metrics", "single_site_features"):
        if not settings.get(key):
            other[key] = True
    if "task.hidden" not in settings:
        other["task.depth"] = 2
    if settings.get("standardise") != "federated":
        other["standardise"] = "federated"
    if asked_for.protect.protection != "masked":
        other["cipher"] = next(c for c in ("bfv", "keystream") if c != asked_for.protect.cipher)
    for key, value in other.items():
        if key == "public_metrics" and asked_for.protect.protection == "encrypted":
            continue
        cipher = {"cipher": "bfv"} if key == "protection" else {}
        asked = build_job(settings, cipher, {key: value})
        assert policy.on_offer(offer_of(asked)) is not None, key


# ---------------------------------------------------------------------------------- at the site


def test_a_refusal_is_one_line_here_and_one_word_there(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    found = loaded(tmp_path, submitted(train={"batch_size": 7}))
    assert found.link.said == [job.SiteUnavailable("job", "a", "policy")]
    assert found.contributor.loaded == 0
    (record,) = caplog.records
    line = record.getMessage()
    assert "train.batch_size: found 7, expected 8 or more by policy.least_batch" in line
    assert "hint: " in line and "\n" not in line
    assert "train.batch_size: found 7" in found.job.part.last_error
    assert found.job.part.refused.word == "policy"


def test_the_word_is_said_again_in_every_session(tmp_path):
    found = loaded(tmp_path, submitted(train={"batch_size": 7}))
    asyncio.run(found.handle(Connected()))
    assert found.link.said == [job.SiteUnavailable("job", "a", "policy")] * 2
    assert "train.batch_size" in found.job.part.last_error


def planned(folder, **rules):
    """A site's job after the plan that follows from its job; rules: of its policy."""
    asked = submitted(track={"public_metrics": True}, protect={"release": "coordinator"})
    return offered(
        folder, asked, asked, **{"public_metrics": True, "release": "coordinator"} | rules
    )


def narrowed(found, **rules):
    """The operator thinks better of it, and starts the site's process again."""
    context = replace(found.context, policy=policy_of(SITES, **rules))
    context.journal.put("job", "offer", encode(found.offer))
    return JobRunner.stored(context, found.link, found.contributor, "job")


def test_a_plan_that_the_policy_forbids_is_not_agreed_to(tmp_path, without):
    """Whatever the offer said. Control: the same with a policy that allows it."""
    fine = planned(tmp_path / "1")
    assert isinstance(fine.link.said[-1], job.PlanAgreed)
    without(SitePolicy, "on_offer")
    found = planned(tmp_path / "2", release="sites")
    assert (
        found.link.said[-1] == job.SiteUnavailable("job", "a", "policy") and found.job.plan is None
    )


def test_a_job_that_began_is_asked_about_again_by_a_new_process(tmp_path, without):
    found = planned(tmp_path)
    loaded_before = found.contributor.loaded
    again = narrowed(found, public_metrics=True)
    asyncio.run(begin(again))
    assert "protect.release" in str(again.job.part.refused)
    without(SitePolicy, "on_offer")
    again = narrowed(found, public_metrics=True)
    asyncio.run(begin(again))
    assert "protect.release" in str(again.job.part.refused), "its plan is asked about as well"
    assert found.contributor.loaded == loaded_before and again.job.part.refused.word == "policy"
    control = narrowed(found, public_metrics=True, release="coordinator")
    asyncio.run(begin(control))
    assert control.job.part.survey is not None


def test_a_model_and_metrics_are_not_given_by_an_operator_who_thinks_better_of_it(tmp_path):
    found = planned(tmp_path)
    found.job.parts.public.may_give(over=False)
    before = len(found.link.said)
    with pytest.raises(PolicyRefused, match=r"protect\.release"):
        narrowed(found, public_metrics=True).job.parts.public.may_give(over=False)
    narrow = narrowed(found)
    asyncio.run(released(narrow))
    assert "track.public_metrics" in narrow.job.part.last_error
    assert len(found.link.said) == before
    asyncio.run(released(narrowed(found, public_metrics=True)))
    assert isinstance(found.link.said[-1], job.PublicMetrics), "control"
