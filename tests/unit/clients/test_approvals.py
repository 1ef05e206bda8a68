"""`jobs = "ask"`: label and list of what leaves come first, and nothing is read before the operator's word."""

from __future__ import annotations

import asyncio
import logging
import stat
from dataclasses import replace

import pytest
from fedcore_clients.offers import APPROVALS, approve_offer, is_approved, offer_digest
from fedcore_clients.status import approve, jobs_lines, status_lines
from support.deployed_jobs import loaded, site_job, submitted
from support.policies import begin

from fedcore.config import build_job
from fedcore.errors import BadInput, Refused, UnknownName
from fedcore.files import write_json
from fedcore.secagg.label import Terms, label_of, leaving_of
from fedcore.secagg.protocol import job_messages
from fedcore.secagg.protocol.job.site.events import MessageReceived


async def until(condition):
    """Raises TimeoutError where it does not come: a test that waits for ever names nothing."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - a line of the log is no event
            await asyncio.sleep(0.005)


async def brief_pause(_):
    await asyncio.sleep(0.01)


def test_a_job_waits_for_approval_and_goes_on_with_it(tmp_path, caplog):
    caplog.set_level(logging.INFO)

    async def play():
        found = site_job(tmp_path, submitted(), context={"pause": brief_pause}, jobs="ask")
        loading = asyncio.get_running_loop().create_task(begin(found))
        await until(lambda: "waits for approval: fed-site approve job" in caplog.text)
        await asyncio.sleep(0.05)
        assert found.contributor.loaded == 0 and found.link.said == []
        assert found.job.part.approval == "waiting"
        for line in (*found.work.about.label, *found.work.about.leaves):
            assert line in caplog.text
        approve_offer(tmp_path, "job", offer_digest(found.offer))
        await loading
        assert found.job.part.approval == "approved" and found.contributor.loaded == 1
        assert [type(each) for each in found.link.said] == [job_messages.SiteSurvey]
        return found

    found = asyncio.run(play())
    again = loaded(tmp_path / "2", submitted())
    assert again.job.part.approval == "not needed", "control: listed tasks do not wait"
    assert found.work.about == again.work.about


def test_an_approval_holds_in_a_new_process(tmp_path):
    found = site_job(tmp_path, submitted(), context={"pause": brief_pause}, jobs="ask")
    approve_offer(tmp_path, "job", offer_digest(found.offer))
    asyncio.run(begin(found))
    assert found.contributor.loaded == 1


def test_it_is_of_one_offer_and_not_of_another_under_its_id(tmp_path):
    offer = site_job(tmp_path, submitted()).offer
    approve_offer(tmp_path, offer.job, offer_digest(offer))
    assert is_approved(tmp_path, offer)
    for changed in (
        replace(offer, settings=offer.settings.replace(b'"rounds":2', b'"rounds":3')),
        replace(offer, task_digest="1" * 64), replace(offer, task="other"),
    ):  # fmt: skip
        assert changed != offer and not is_approved(tmp_path, changed)
    assert not is_approved(tmp_path, replace(offer, job="job2"))


def test_its_file_is_for_this_user_only(tmp_path):
    path = tmp_path / APPROVALS / "job.json"
    approve_offer(tmp_path, "job", "0" * 64)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_job_that_ended_meanwhile_is_not_begun(tmp_path, caplog):
    async def play():
        found = site_job(tmp_path, submitted(), context={"pause": brief_pause}, jobs="ask")
        waiting = asyncio.get_running_loop().create_task(found.work.await_approval())
        await until(lambda: "waits for approval" in caplog.text)
        await found.handle(
            MessageReceived(job_messages.JobEnded("job", "stopped", "by an operator"))
        )
        assert await waiting is None
        assert found.contributor.loaded == 0 and found.job.part.survey is None

    asyncio.run(play())


# --------------------------------------------------------------------------------- the commands


def row(name="j1", **changes):
    base = {
        "job": name, "task": "heart", "offer": "a" * 64, "protection": "layered", "rounds": 20,
        "stage": "idle", "round": None, "waiting": None, "tracked": None, "last_error": "",
        "refused": None, "left": None, "outcome": None, "model_sha256": None, "model_round": None,
        "approval": "waiting", "label": ["Protects against: x", "second"], "leaves": ["update: y"],
    }  # fmt: skip
    return base | changes


def written(folder, *rows):
    """A folder whose process is gone, and what it last said."""
    status = {
        "site": "a", "coordinator": "h:1", "connected_since": None, "last_error": "",
        "jobs": list(rows), "written": 0.0, "running": False, "process": 1,
    }  # fmt: skip
    write_json(folder / "status.json", status)
    return status


def test_a_job_is_approved_while_no_process_runs(tmp_path):
    written(tmp_path, row(), row("j2"))
    assert approve(tmp_path, "j1")["leaves"] == ["update: y"]
    assert [path.name for path in (tmp_path / APPROVALS).iterdir()] == ["j1.json"]


@pytest.mark.parametrize(
    ("rows", "error", "said"),
    [
        ([], BadInput, "no job at this site yet"),
        ([row("j12")], UnknownName, "did you mean 'j12'?"),
        ([row(refused="train.epochs: found 3")], Refused, "train.epochs: found 3"),
        ([row(stage="over", outcome="finished")], Refused, "over (finished)"),
    ],
)
def test_what_cannot_be_approved_says_why_and_what_to_do(tmp_path, rows, error, said):
    written(tmp_path, *rows)
    with pytest.raises(error) as caught:
        approve(tmp_path, "j1")
    assert said in f"{caught.value} {caught.value.remedy}" and caught.value.remedy
    assert not (tmp_path / APPROVALS).exists()


def test_jobs_and_status_show_every_state(tmp_path):
    rows = (
        row(), row("j2", refused="train.epochs: found 3"),
        row("j3", approval="approved", round=3, stage="submitted"),
        row("j4", approval="not needed", stage="over", outcome="finished"),
    )  # fmt: skip
    status = written(tmp_path, *rows)
    text = "\n".join(jobs_lines(status["jobs"]))
    assert (
        "job j1: waiting for approval: fed-site approve j1 (task heart, layered, 20 rounds)" in text
    )
    assert "job j2: refused (task" in text and "  refused: train.epochs: found 3" in text
    assert "job j3: round 3 of 20, submitted" in text and "job j4: over (finished)" in text
    assert "  Protects against: x" in text
    shown = "\n".join(status_lines(status))
    assert "  Protects against: x\n  second\n  leaves: update: y" in shown


# ------------------------------------------------------------------------------ what would leave


@pytest.mark.parametrize("protection", ["layered", "masked", "encrypted"])
@pytest.mark.parametrize("public", [True, False])
@pytest.mark.parametrize("release", ["sites", "coordinator"])
@pytest.mark.parametrize("start", [None, 0.5])
def test_the_list_follows_from_the_settings(protection, public, release, start):
    if protection == "encrypted" and (public or release == "coordinator"):
        return
    asked = build_job(
        {"protection": protection, "public_metrics": public, "release": release, "range": start}
    )
    terms = Terms.of_job(asked, 4)
    text = "\n".join(leaving_of(asked, terms))
    assert ("range (one sum)" in text) is (start is None)
    assert ("the metrics of each release over all" in text) is public
    assert ("the model and statistics of the last round" in text) is (release == "coordinator")
    assert "a sum of at least 3 sites" in text and "up to 20 sums" in text
    assert ("opened: by the coordinator and the sites" in text) is (protection == "masked")
    assert ("with any one of them the coordinator opens" in text) is (protection == "encrypted")
    for statistics in ("ranges", "federated"):
        lines = leaving_of(asked, replace(terms, statistics=statistics))
        assert lines[0].startswith("statistics") is (statistics == "federated")


def test_the_label_is_the_one_of_the_plan(tmp_path):
    found = site_job(tmp_path, submitted())
    terms = Terms.of_job(build_job(submitted()), 4)
    assert list(found.work.about.label) == label_of(terms).splitlines()
    assert not site_job(tmp_path / "2", submitted(protect={"threshold": 2})).work.about.label
