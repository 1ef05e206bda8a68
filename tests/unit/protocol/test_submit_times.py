"""`round.submit_seconds`: when a site sends does not depend on its rows (PROTOCOL U). The clock is the test's."""

from __future__ import annotations

import asyncio

import pytest
from fedcore_clients.round_work import RoundWork
from fedcore_clients.trainer import TrainingFailed
from fedcore_server.config import LimitsSection
from fedcore_server.operators_api import check_settings
from support.deployed_jobs import site_job, submitted
from support.policies import begin

from fedcore.config import build_job
from fedcore.errors import BadInput
from fedcore.secagg.plan import canonical
from fedcore.secagg.protocol import job_messages
from fedcore.secagg.protocol.effects import MakeVector
from fedcore.secagg.protocol.job.site.events import MessageReceived, VectorReady, WorkFailed

BUDGET = 30.0


class Clock:
    """Stands still but for what work and waiting take; remembers what was said when."""

    def __init__(self):
        self.now = 100.0

    async def pause(self, seconds):
        self.now += seconds


class Link:
    def __init__(self, clock):
        self.clock, self.said, self.doings = clock, [], []

    def say(self, _, message):
        self.said.append((self.clock.now, message))

    def doing(self, _, what):
        self.doings.append((self.clock.now, what))


def deployed(folder, budget):
    settings = submitted(**({"round": {"submit_seconds": budget}} if budget else {}))
    clock = Clock()
    about = {"clock": lambda: clock.now, "pause": clock.pause}
    return site_job(folder, settings, Link(clock), about, public_metrics=True), clock


def survey(folder, needs, budget=BUDGET, fails=False):
    """(when, what) a site answers an offer at time 100, if its rows need so many seconds."""
    found, clock = deployed(folder, budget)
    load = found.contributor.load

    async def slow(*args):
        clock.now += needs
        if fails:
            raise TrainingFailed(job_messages.UNABLE)
        return await load(*args)

    found.contributor.load = slow
    asyncio.run(begin(found))
    assert all(at in (100.0, found.link.said[0][0]) for at, _ in found.link.doings)
    ((at, message),) = found.link.said
    return at, type(message)


def test_a_survey_is_answered_at_one_time_whatever_the_rows_need(tmp_path):
    assert survey(tmp_path / "1", 1) == (130.0, job_messages.SiteSurvey)
    assert survey(tmp_path / "2", 29) == (130.0, job_messages.SiteSurvey)
    assert survey(tmp_path / "3", 5, fails=True) == (130.0, job_messages.SiteUnavailable), (
        "a failure too"
    )
    assert survey(tmp_path / "4", 1, budget=None) == (101.0, job_messages.SiteSurvey)  # control


def test_an_overrun_is_sent_when_ready_with_a_line_in_the_site_s_own_log(tmp_path, caplog):
    assert survey(tmp_path, 45) == (145.0, job_messages.SiteSurvey)
    (line,) = [r.getMessage() for r in caplog.records if "submit_seconds" in r.getMessage()]
    assert "loading took longer than round.submit_seconds = 30" in line


def vector(folder, needs, budget=BUDGET, fails=None):
    """(when the vector is handed to the machine, what) in a round that was announced at time 100."""
    found, clock = deployed(folder, budget)
    asyncio.run(begin(found))
    plan = found.job.me.planner.plan(found.offer, found.job.part.survey)
    offer = job_messages.PlanOffer("job", canonical(plan.to_json()))
    asyncio.run(found.handle(MessageReceived(offer)))
    clock.now, found.job.parts.rounds.announced = 104.0, 100.0  # keys and shares took some time
    found.link.said.clear()
    found.link.doings.clear()
    header = type("Header", (), {"purpose": "update", "training_round": 1, "digest": b"h"})

    async def contribute(*_):
        clock.now += needs
        if fails is not None:
            raise fails

    found.contributor.contribute = contribute

    class Work(RoundWork):
        def without_isolating_metrics(self, found, header):
            return found

        def protect(self, asked, found):
            return [b"chunk"], b"", {}

    made = Work("a", found.job.parts.agreed, None, found.job.state)
    found.work.round_work = lambda: made
    event = asyncio.run(found.work.make_vector(MakeVector(header, b"", ())))
    assert all(at == clock.now for at, _ in found.link.said)
    if budget:
        assert [what for _, what in found.link.doings] == ["training"], "nor does its progress tell"
    return clock.now, type(event)


def test_a_vector_is_sent_at_one_time_whatever_training_needs(tmp_path):
    at = lambda place, *args, **words: vector(tmp_path / place, *args, **words)  # noqa: E731
    assert at("1", 2) == at("2", 25) == (130.0, VectorReady)
    assert at("3", 2, fails=TrainingFailed(job_messages.UNABLE)) == (130.0, WorkFailed)
    assert at("4", 2, fails=KeyError("row 7")) == (130.0, WorkFailed)
    assert at("5", 40) == (144.0, VectorReady), "overrun: when it is ready"
    assert at("6", 2, budget=None) == (106.0, VectorReady)  # control


def test_a_budget_is_shorter_than_the_coordinator_waits():
    settings = submitted(round={"submit_seconds": 600.0})
    with pytest.raises(BadInput, match=r"round\.submit_seconds: found 600, expected less than"):
        check_settings(settings, 4, LimitsSection(stage_seconds=600.0))
    check_settings(settings, 4, LimitsSection(stage_seconds=601.0))
    check_settings(submitted(), 4, LimitsSection(stage_seconds=1.0))
    with pytest.raises(BadInput, match=r"round\.submit_seconds"):
        build_job({"submit_seconds": 0})
