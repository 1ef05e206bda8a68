"""Many sites, jobs and rounds: what operators are told has room in a frame, and sites hear one frame."""

from __future__ import annotations

import asyncio
import io
from types import SimpleNamespace

import pytest
from fedcore_server.context import CoordinatorContext
from fedcore_server.coordinator import Coordinator
from fedcore_server.job_runner import JobRunner
from fedcore_server.operators import jobs_table
from fedcore_server.operators_api import ROWS_AT_ONCE, OperatorsApi
from fedcore_server.sessions import SiteSession
from rich.console import Console

from fedcore.config import build_job
from fedcore.identity.roster import PinnedRoster, RosterFile
from fedcore.results import JobRow
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.plan import canonical
from fedcore.secagg.protocol import job_messages
from fedcore.secagg.protocol.job.coordinator.facts import Limits
from fedcore.store.journal import Journal
from fedcore.store.spool import Spool
from fedcore.wire import calls, frames
from fedcore.wire.limits import MAX_JSON
from fedcore.wire.records import TO_SITE, unpack_record

SITES = [f"{number:03d}-{'x' * 60}" for number in range(500)]
"""As many as one coordinator was tried with, under the longest names there are."""

PEER, GATE = (
    SimpleNamespace(name="op", fingerprint="f0", serial="1"),
    SimpleNamespace(still=lambda _: None),
)


@pytest.fixture
def hub(tmp_path):
    journal = Journal.open(tmp_path / "journal.sqlite", party="hub")
    pins = {name: IdentityKey().public for name in SITES}
    context = CoordinatorContext(
        "town",
        RosterFile(PinnedRoster(pins)),
        journal,
        Spool(tmp_path / "spool"),
        None,
        tmp_path,
        Limits(),
    )
    return Coordinator(context, GATE)


def over(hub, name):
    """A job that has ended, as the coordinator has it."""
    settings = {"protection": "layered", "rounds": 20, "max_examples": 16}
    offer = job_messages.JobOffer(name, "t", "0" * 64, canonical(build_job(settings).to_json()))
    found = hub.jobs[name] = JobRunner(hub.context, hub.sessions, offer)
    found.facts.outcome = job_messages.JobEnded(name, "finished", "", "")
    found.facts.progress.state = "finished"
    return found


def listed(hub):
    answer = asyncio.run(OperatorsApi(hub).jobs(PEER, frames.JobsRequest()))
    return frames.json_value(answer.json, sender="hub")


def shown(answer):
    console = Console(file=io.StringIO(), width=200)
    console.print(jobs_table(answer))
    return console.file.getvalue()


def test_of_more_jobs_than_have_room_the_newest_are_listed(hub):
    for number in range(20):
        over(hub, f"t-{number:08x}")
    found = listed(hub)
    assert [row["job"] for row in found["jobs"]] == list(hub.jobs)
    assert found["earlier"] == 0
    assert "earlier" not in shown(found)
    for number in range(20, 6000):
        hub.jobs[f"t-{number:08x}"] = hub.jobs["t-00000000"]
    last = over(hub, "t-last")
    found = listed(hub)
    assert found["jobs"][-1]["job"] == last.id
    assert 1000 < len(found["jobs"]) < 6001
    assert found["earlier"] == 6001 - len(found["jobs"])
    assert f"{found['earlier']} earlier jobs are not shown" in shown(found)
    assert list(found["sites"]) == SITES
    assert MAX_JSON * 0.99 < len(frames.json_bytes(found)) <= MAX_JSON


def test_whoever_watches_500_sites_gets_every_round_once(hub):
    found = over(hub, "t-1")
    row = {"purpose": "update", "number": 1, "seconds": 0.5, "survivors": SITES, "roster": SITES}
    rows = [{"round": number, **row, "seconds_by_stage": {}} for number in range(45)]
    found.facts.rounds.known[:] = map(JobRow.from_json, rows)
    found.facts.progress.waiting_for = tuple(SITES)

    async def play():
        asked = frames.WatchRequest("t-1")
        return [event async for event in OperatorsApi(hub).watch(PEER, asked)]

    events = [
        frames.json_value(calls.WATCH.gives.unpack(event, sender="hub").json, sender="hub")
        for event in asyncio.run(play())
    ]
    assert [row for event in events for row in event["new_rounds"]] == rows
    assert 45 / ROWS_AT_ONCE < len(events) <= 45
    assert all(list(event["sites"]) == SITES for event in events)


def test_what_every_site_hears_is_laid_out_once(hub):
    """At 500 sites a list of all of them, made anew for each, would be most of the coordinator's work."""
    sessions = {name: SiteSession(None) for name in SITES[:3]}
    hub.sessions.open.update(sessions)
    words = [
        ("one", job_messages.JobEnded("one", "finished", "", "")),
        ("one", job_messages.JobEnded("one", "stopped", "", "")),
        ("two", job_messages.JobEnded("one", "stopped", "", "")),
    ]
    for name, message in words:
        for site in sessions:
            hub.sessions.say(site, name, message)
    heard = [[each.out.get_nowait() for _ in words] for each in sessions.values()]
    assert all(a is b for other in heard[1:] for a, b in zip(heard[0], other, strict=True))
    found = [calls.SESSION.gives.unpack(data, sender="hub") for data in heard[0]]
    assert [(each.job, unpack_record(each, TO_SITE, sender="hub")) for each in found] == words
