"""What a coordinator's trail has of calls: who made them, and no more of refused ones than a disk can take."""

import asyncio
import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from fedcore_server.context import CoordinatorContext
from fedcore_server.coordinator import Coordinator
from fedcore_server.operators import wire_settings
from fedcore_server.operators_api import OperatorsApi
from fedcore_server.sessions import SiteSession
from fedcore_server.site_api import SiteApi
from support.full_disk import no_file_beyond

from fedcore.audit.keys import SiteSigner
from fedcore.audit.lines import Line
from fedcore.audit.seldom import MOST
from fedcore.audit.trail import TRAIL_FILE, AuditTrail
from fedcore.config import build_job
from fedcore.errors import BadInput, StoreFull
from fedcore.identity.identities import write_roster
from fedcore.identity.roster import PinnedRoster, RosterFile
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.protocol.job.coordinator.facts import Limits
from fedcore.secagg.protocol.job_messages import SiteUnavailable
from fedcore.store.journal import Journal
from fedcore.store.spool import Spool
from fedcore.wire import frames
from fedcore.wire.records import TO_COORDINATOR, pack_record

ANN = SimpleNamespace(name="ann", fingerprint="ab" * 32, serial="1")
SETTINGS = wire_settings(build_job({"max_examples": 16, "rounds": 2, "batch_size": 8}))


@pytest.fixture
def hub(tmp_path):
    pins = {name: IdentityKey().public for name in "abcd"}
    with (
        Journal.open(tmp_path / "journal.sqlite", party="hub") as journal,
        AuditTrail.open(tmp_path, SiteSigner(IdentityKey()), {}) as audit,
    ):
        rosters, spool = RosterFile(PinnedRoster(pins)), Spool(tmp_path / "spool")
        context = CoordinatorContext(
            "town", rosters, journal, spool, None, tmp_path, Limits(), audit=audit
        )
        yield Coordinator(context, gate=None)


def recorded(hub):
    data = (hub.context.folder / TRAIL_FILE).read_bytes()
    return [(line.event, dict(line.facts)) for line in map(Line.parse, data.splitlines()[1:])]


def submit(hub):
    about = json.dumps({"settings": SETTINGS}).encode()
    asked = frames.SubmitRequest(b"# job\n", "t", "0" * 64, about)
    return asyncio.run(OperatorsApi(hub).submit(ANN, asked)).job


def test_submission_has_the_operator_and_what_was_submitted(hub):
    job = submit(hub)
    ((event, facts),) = recorded(hub)
    settings = hashlib.sha256(hub.jobs[job].offer.settings).hexdigest()
    assert (event, facts["call"], facts["operator"]) == ("operator", "submit", "ann")
    assert (facts["certificate"], facts["job"], facts["settings"]) == ("ab" * 32, job, settings)


def test_stop_and_eviction_have_the_operator(hub):
    job, operators = submit(hub), OperatorsApi(hub)
    second = submit(hub)
    asyncio.run(operators.stop(ANN, frames.JobRequest(second)))
    for undo in (False, True):
        asyncio.run(operators.evict(ANN, frames.SiteRequest("a", undo=undo)))
    with pytest.raises(BadInput):
        asyncio.run(operators.evict(ANN, frames.SiteRequest("a", undo=True)))
    calls = [
        (f["call"], f.get("job", f.get("site")), f["operator"])
        for e, f in recorded(hub)
        if e == "operator"
    ]
    assert calls == [
        ("submit", job, "ann"), ("submit", second, "ann"), ("stop", second, "ann"),
        ("evict", "a", "ann"), ("evict", "a", "ann"),
    ]  # fmt: skip
    assert [f["outcome"] for e, f in recorded(hub) if e == "ended"] == ["stopped"]


def test_call_that_cannot_be_recorded_is_not_made(hub):
    size = (hub.context.folder / TRAIL_FILE).stat().st_size
    with no_file_beyond(size), pytest.raises(StoreFull):
        submit(hub)
    assert not hub.jobs


def test_session_has_its_certificate(hub):
    async def begin():
        hub.sessions.begin("a", SiteSession(ANN, "ipv4:10.0.0.7:40132"))

    asyncio.run(begin())
    about = {"site": "a", "word": "begins", "certificate": "ab" * 32, "serial": "1"}
    about |= {"address": "10.0.0.7"}
    assert recorded(hub) == [("connect", about)]


def test_what_a_site_refuses_is_recorded_in_its_word(hub):
    name, api = submit(hub), SiteApi(hub, None)
    said = SiteUnavailable(name, "a", "policy")
    frame = pack_record(name, said, TO_COORDINATOR)
    for _ in range(3):
        asyncio.run(api._on_frame("a", SiteSession(ANN), frame))
        asyncio.run(api._on_frame("a", SiteSession(ANN), frames.RosterSeen(2, "older")))
    seen = [facts for event, facts in recorded(hub) if event == "refused"]
    assert seen == [
        {"site": "a", "what": "job", "why": "policy", "job": name},
        {"site": "a", "what": "roster", "why": "older"},
    ]


def test_refusals_are_recorded_once_a_minute_and_few_in_all(hub):
    for _ in range(5):
        hub.sessions.refused("Submit", BadInput("no\nrounds"), "BadInput", ANN)
    assert [f["text"] for _, f in recorded(hub)] == ["no rounds"]
    for number in range(3 * MOST):
        hub.sessions.refused("Submit", BadInput(f"job {number}"), "BadInput", ANN)
    assert len(recorded(hub)) == MOST


def test_refusal_that_cannot_be_recorded_is_logged(hub, caplog):
    size = (hub.context.folder / TRAIL_FILE).stat().st_size
    with no_file_beyond(size):
        hub.sessions.refused("Submit", BadInput("no rounds"), "BadInput", ANN)
    assert "refused: not recorded" in caplog.text


def test_new_roster_is_recorded_in_words(hub, tmp_path):
    pins = hub.context.rosters.current.sites
    path = tmp_path / "roster.toml"
    write_roster(path, pins)
    rosters = RosterFile(hub.context.rosters.current, path, b"", "town")
    hub.context = replace(hub.context, rosters=rosters)
    write_roster(path, {name: pins[name] for name in "abc"} | {"e": IdentityKey().public})
    hub.refresh_roster()
    ((event, facts),) = recorded(hub)
    assert (event, facts["digest"]) == ("roster", rosters.current.digest)
    assert facts["changes"] == ["1 site added: e", "1 site removed: d"]
