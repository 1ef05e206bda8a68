"""A plan that gives the coordinator a model: who may ask for it, who agrees, and whose file is taken."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest
from fedcore_clients.config import read_config
from fedcore_clients.policy import PolicySection
from fedcore_server.config import LimitsSection
from fedcore_server.job_disk import MODEL_FILE
from fedcore_server.operators import prepare
from fedcore_server.operators_api import check_settings
from pydantic import ValidationError
from support.deployed_jobs import (
    SITES,
    certificate,
    check_refused,
    loaded,
    offered,
    plan_for,
    submitted,
)
from support.job_parts import LIMITS, at, facts_of, sent

import fedcore
from fedcore.config import build_job, narrowest_policy, plan_of
from fedcore.errors import (
    BadInput,
    Conflicting,
    HeaderRefused,
    OutOfOrder,
    PeerRefused,
    PlanRefused,
)
from fedcore.learning import saved
from fedcore.local_deployment import to_toml, write
from fedcore.secagg.label import Terms, label_of
from fedcore.secagg.plan import RoundPlan, canonical
from fedcore.secagg.protocol import job_messages
from fedcore.secagg.protocol.job.coordinator.handover import ASKED_AGAIN, ModelHandover
from fedcore.secagg.protocol.job.effects import DiscardUploads, KeepModel

GIVES = plan_for(release="coordinator")
LAST = certificate(purpose="metrics", training_round=GIVES.rounds + 1)

# ------------------------------------------------------------------------------------ the plan


def test_a_plan_that_gives_none_has_the_digest_it_always_had():
    """Recorded rounds, journals and vectors name it."""
    plain = plan_for()
    assert "release" not in plain.to_json()
    assert GIVES.to_json() == plain.to_json() | {"release": "coordinator"}
    assert RoundPlan.from_json(json.loads(canonical(GIVES.to_json()))) == GIVES


def test_a_job_s_plan_has_what_the_job_says():
    shape = job_messages.ModelShape("t", "0" * 64, 5, 0, 0, "", GIVES.metric_sums)
    for asked in ("sites", "coordinator"):
        found = build_job({"protect": {"release": asked}, "max_examples": 64})
        assert plan_of(found, shape, SITES, 64).release == asked


def test_another_word_is_refused():
    with pytest.raises(BadInput, match=r"protect\.release: found 'both'"):
        build_job({"release": "both"})
    with pytest.raises(BadInput, match=r"protect\.release"):
        plan_for(release="both")


REFUSED = r"protect\.release: found 'coordinator' under 'encrypted'"


def test_every_way_to_a_plan_refuses_it_under_encrypted(tmp_path):
    asked = {"protection": "encrypted", "release": "coordinator"}
    tables = submitted(protect=asked)
    (tmp_path / "job.toml").write_text("[protect]\nmax_examples = 64\n")
    for way in (
        lambda: build_job(asked),
        lambda: plan_for(**asked),
        lambda: RoundPlan.from_json(plan_for("encrypted").to_json() | {"release": "coordinator"}),
        lambda: fedcore.simulate("heart", **asked),
        lambda: prepare(tmp_path, tables, {}),
        lambda: check_settings(tables, 4, LimitsSection()),
    ):
        with pytest.raises(PlanRefused, match=REFUSED) as refused:
            way()
        assert "--protection layered" in refused.value.remedy
    for protection in ("plain", "masked", "layered"):
        assert build_job(asked | {"protection": protection}).protect.release == "coordinator"


@pytest.mark.parametrize("verb", ["simulate", "plan", "up"])
def test_commands_refuse_it_with_one_line_and_a_hint(verb, capfd, tmp_path, monkeypatch):
    error = "error: protect.release: found 'coordinator'"
    check_refused(verb, "--release", "coordinator", error, capfd, tmp_path, monkeypatch)


@pytest.mark.parametrize("protection", ["plain", "masked", "layered"])
@pytest.mark.parametrize("sites", [3, 4])
def test_the_label_says_what_the_coordinator_is_given(protection, sites):
    quiet = plan_for(protection, sites=("a", "b", "c", "d")[:sites])
    before, after = (
        label_of(Terms.of_plan(each)).splitlines()
        for each in (quiet, replace(quiet, release="coordinator"))
    )
    if protection != "layered":  # it sees every model anyway, and the label says so
        assert "the model" in before[0] and after == before
        return
    given = "of the models only the last one, which the plan gives it."
    assert after[0].endswith(given) and "not their sum" in after[0] and len(after) <= 8
    assert "also sees the sum and every model" in after[1]
    assert after[2:] == before[2:] and given not in "\n".join(before)


# ----------------------------------------------------------------------------------- at a site


def test_a_site_whose_operator_lets_no_model_go_refuses_the_job_before_a_row_is_read(tmp_path):
    asked = submitted(protect={"release": "coordinator"})
    found = loaded(tmp_path / "1", asked)
    assert found.link.said == [job_messages.SiteUnavailable("job", "a", "policy")]
    assert found.contributor.loaded == 0
    fine = loaded(tmp_path / "2", asked, release="coordinator")
    assert [type(each) for each in fine.link.said] == [job_messages.SiteSurvey]


def test_a_site_agrees_to_it_only_where_the_job_says_so(tmp_path):
    quiet, gives = submitted(), submitted(protect={"release": "coordinator"})
    for place, (settings, of_plan) in enumerate(product((quiet, gives), repeat=2)):
        found = offered(tmp_path / str(place), settings, of_plan, release="coordinator")
        agreed = isinstance(found.link.said[-1], job_messages.PlanAgreed)
        assert agreed is (settings is of_plan), found.link.said


def test_site_toml_says_who_gets_a_model(tmp_path):
    with pytest.raises(ValidationError):
        PolicySection(release="everybody")
    task = {"a": {"t": {"task": "t.py", "sha256": "0" * 64}}}
    for given in ("sites", "coordinator"):
        policy = narrowest_policy(build_job({"release": given}), 3)
        write(tmp_path / given, "town", task, {}, policy=policy)
        found = read_config(tmp_path / given / "sites" / "a" / "site.toml")
        assert found.policy.release == given
    assert to_toml({"release": None}) == ""


# -------------------------------------------------------------------------- at the coordinator


def hand_over(plan=GIVES, certificate=LAST):
    return ModelHandover(facts_of(plan, certificate=certificate))


def word(site, digest=b"d" * 32, of=LAST):
    return job_messages.ModelMade("job", site, of.hash, digest)


def asked(found, sites=SITES, now=0.0):
    return [(name, wanted.digest) for name, wanted in sent(found.ask(sites, now))]


def test_everybody_is_asked_until_enough_say_the_same_then_one_of_these():
    found, upload = hand_over(), job_messages.model_upload(LAST.hash)
    assert asked(found) == [(name, b"") for name in SITES]
    assert asked(found, now=ASKED_AGAIN / 2) == []
    found.take("a", word("a"))
    found.take("b", word("b", b"x" * 32))
    found.take("c", word("c"))
    assert asked(found, now=ASKED_AGAIN) == [("d", b"")], "two of the same are not three"
    assert not any(found.expects(name, upload) for name in SITES)
    found.take("d", word("d"))
    assert asked(found, now=6.0) == [("a", b"d" * 32)] and found.expects("a", upload)
    assert not found.expects("a", b"r" * 32), "another round's"
    assert asked(found, now=6.1) == []
    assert asked(found, now=16.0) == [("c", b"d" * 32)], "another one after a while"
    assert asked(found, now=26.0) == [("d", b"d" * 32)]
    assert asked(found, now=36.0) == [("a", b"d" * 32)]
    assert asked(found, sites=("b", "c"), now=37.0) == [("c", b"d" * 32)], "the one asked is away"
    assert not found.expects("b", upload), "the one that says something else"


def test_a_new_session_is_asked_at_once():
    found = hand_over()
    asked(found)
    found.connected("b")
    assert asked(found, now=0.1) == [("b", b"")]
    for name in SITES:
        found.take(name, word(name))
    assert asked(found, now=0.2) == [("a", b"d" * 32)]
    found.connected("a")
    assert asked(found, now=0.3) == [("b", b"d" * 32)]
    assert found.upload(job_messages.model_upload(LAST.hash), b"x" * 32), (
        "not kept: it is asked for again"
    )
    assert asked(found, now=0.4) == [("c", b"d" * 32)]


def test_what_no_honest_site_says_is_refused():
    found = hand_over()
    with pytest.raises(HeaderRefused, match=r"not asked for.*fault: a"):
        found.take("a", word("a"))
    asked(found)
    with pytest.raises(OutOfOrder):
        found.take("a", word("a", of=certificate(number=1)))
    assert found.take("a", word("a")) == found.take("a", word("a")) == []
    with pytest.raises(Conflicting, match="fault: a"):
        found.take("a", word("a", b"x" * 32))
    (warning,) = found.take("b", word("b", b"x" * 32))
    assert "sites differ over the model (a - b)" in warning.text
    quiet = hand_over(plan_for())
    with pytest.raises(PeerRefused, match="the plan gives no model"):
        quiet.take("a", word("a"))


def test_why_no_model_can_come():
    early = certificate(purpose="update", training_round=GIVES.rounds - 1)
    for none in (None, early, certificate(purpose="metrics", training_round=GIVES.rounds)):
        found = hand_over(certificate=none)
        assert found.lacking(SITES) == "the last round was abandoned"
        assert found.awaited(0.0, at()) == (False, [])
    assert hand_over(certificate=certificate(training_round=GIVES.rounds)).lacking(SITES) == ""
    found = hand_over()
    assert found.lacking(SITES[:3]) == ""
    assert "(0, and 3 are needed)" in found.lacking(SITES[:2])
    asked(found)
    found.take("a", word("a"))
    found.take("b", word("b", b"x" * 32))
    assert found.lacking(SITES) == "", "c and d may still say what a says"
    found.take("c", word("c", b"y" * 32))
    assert "(1, and 3 are needed)" in found.lacking(SITES)


def test_the_end_of_a_job_waits_for_the_model_as_long_as_for_a_stage():
    found = hand_over()
    awaited, effects = found.awaited(0.0, at())
    assert awaited and [name for name, _ in sent(effects)] == list(SITES)
    assert found.awaited(LIMITS.stage, at()) == (False, [])
    assert found.awaited(LIMITS.gather - 1, at(here=("a", "b")))[0], "c may still connect"
    assert not found.awaited(LIMITS.gather, at(here=("a", "b")))[0]
    found.here = True
    assert found.awaited(0.0, at(9.0)) == (False, [])


def test_only_the_file_that_enough_sites_name_is_kept():
    found, digest, header = hand_over(), b"d" * 32, job_messages.model_upload(LAST.hash)
    asked(found)
    for name in "ab":
        found.take(name, word(name))
    assert found.upload(header, digest) == [DiscardUploads(header)], "two are not three"
    found.take("c", word("c"))
    assert found.upload(header, b"x" * 32) == [DiscardUploads(header)]
    assert found.upload(b"r" * 32, digest) is None, "a vector"
    assert found.upload(header, digest) == [KeepModel(header, digest), DiscardUploads(header)]
    found.here = True
    assert found.upload(header, digest) == [DiscardUploads(header)]


def test_both_sides_name_the_file_alike():
    assert MODEL_FILE == saved.FILE
