"""Jobs that no site takes, whoever sends them: refused by one word before a row is read, a plan agreed
or a key epoch begun, and by the coordinator when they are submitted."""

from __future__ import annotations

import logging

import pytest
from fedcore_clients import policy
from fedcore_server.config import LimitsSection
from fedcore_server.operators_api import check_settings
from support.deployed_jobs import SITES, loaded, submitted
from support.machines import patch_machine
from support.parties import Epochs, Parties

from fedcore.config import build_job, plan_of
from fedcore.errors import HeaderRefused, PlanRefused
from fedcore.secagg.plan import canonical
from fedcore.secagg.protocol import checks, epoch, job_messages
from fedcore.secagg.protocol.messages import Announce, Keys
from fedcore.secagg.protocol.round import site

PLAIN = {"protection": "plain"}
REFUSED = {
    "no protection": (PLAIN, "protect.protection: found 'plain', expected layered"),
    "a threshold below half": (
        {"threshold": 2}, "protect.threshold: found 2 for 4 sites, expected 3 to 4",
    ),
    "a roster smaller than t": (
        {"threshold": 5}, "protect.threshold: found 5 for 4 sites, expected 3 to 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_site_refuses_it_with_one_word_before_a_row_is_read(what, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    changes, line = REFUSED[what]
    found = loaded(tmp_path, submitted(protect=changes))
    assert found.link.said == [job_messages.SiteUnavailable("job", "a", "policy")]
    assert found.contributor.loaded == 0 and found.job.plan is None
    (said,) = caplog.messages
    assert said.startswith(f"job job: refused: {line}") and "hint: " in said and "\n" not in said


@pytest.mark.parametrize("what", REFUSED)
def test_a_coordinator_takes_no_such_job(what):
    changes, line = REFUSED[what]
    with pytest.raises(PlanRefused) as refused:
        check_settings(submitted(protect=changes), len(SITES), LimitsSection())
    assert str(refused.value).startswith(line) and refused.value.remedy
    check_settings(submitted(), len(SITES), LimitsSection())


def test_a_coordinator_takes_no_job_for_a_roster_that_masks_do_not_take():
    for sites in (2, 65):
        with pytest.raises(PlanRefused, match=f"sites: found {sites} under 'layered'"):
            check_settings(submitted(), sites, LimitsSection())


# ----------------------------------------------------------- a whole job without any protection


def agrees_to_plain(folder):
    """A site's job that was offered `plain` and its plan, by a coordinator that takes such jobs."""
    settings = submitted(protect=PLAIN)
    shape = loaded(folder / "other", submitted()).job.part.survey.shape
    plan = plan_of(build_job(settings), shape, SITES, 64)
    return loaded(
        folder / "site", settings, job_messages.PlanOffer("job", canonical(plan.to_json()))
    )


def test_a_whole_plain_job_gets_no_plan_agreed(tmp_path, monkeypatch):
    """Control: without the check the site surveys its rows and agrees."""
    found = agrees_to_plain(tmp_path / "1")
    assert [type(each) for each in found.link.said] == [job_messages.SiteUnavailable]
    assert found.job.plan is None and found.job.part.survey is None
    others = {key: rule for key, rule in policy._RULES.items() if key != "protections"}
    monkeypatch.setattr(policy, "_RULES", others)
    control = agrees_to_plain(tmp_path / "2")
    assert [type(each) for each in control.link.said] == [
        job_messages.SiteSurvey,
        job_messages.PlanAgreed,
    ]
    assert control.job.plan.protection == "plain"


def plain_epochs():
    found = Epochs()
    found.parties = Parties(4, protection="plain")
    found.sites, found.members = found.parties.sites, found.parties.members
    return found


def test_a_plain_plan_gets_no_key_epoch(monkeypatch):
    """Control: without the check a site sends its epoch key."""
    epochs = plain_epochs()
    call = epoch.FromCoordinator(epoch.EpochCall(epochs.header()))
    with pytest.raises(HeaderRefused, match=r"protection: found plain, expected masks or encr"):
        epoch.step_site(epochs.members["s01"], epoch.NoKey(), call)
    patch_machine(monkeypatch, checks, "protection", lambda _: None)
    epochs.step("s01", call)
    assert [type(each) for each in epochs.log] == [epoch.EpochKey]


def test_a_plain_plan_gets_no_round(monkeypatch):
    """The last of four lines of defence. Control: the vector would be made, without masks."""
    parties = Parties(4, protection="plain")
    invited = site.Invited(Announce(parties.header()), b"t" * 32)
    member, idle = parties.members["s00"], parties.first["s00"]
    with pytest.raises(HeaderRefused, match=r"protection: found plain, expected masks or encr"):
        site.step(member, idle, invited, 0.0)
    patch_machine(monkeypatch, checks, "protection", lambda _: None)
    after, _ = site.step(member, idle, invited, 0.0)
    assert isinstance(after, site.Masking)
    masked = Parties(4)
    invited = site.Invited(Announce(masked.header()), b"t" * 32)
    _, found = site.step(masked.members["s00"], masked.first["s00"], invited, 0.0)
    assert any(isinstance(getattr(each, "message", None), Keys) for each in found)
