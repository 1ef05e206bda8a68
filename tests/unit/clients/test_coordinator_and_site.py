"""The shells' edges: what a coordinator takes from a site or an operator, and a site from a coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import sys
import time
import warnings
from collections import Counter
from types import SimpleNamespace

import grpc
import pytest
from fedcore_clients import session
from fedcore_clients.app import InstalledTasks
from fedcore_clients.config import SiteConfig, SplitSection
from fedcore_server import grpc_service, sessions, site_api
from fedcore_server.config import LimitsSection
from fedcore_server.operators_api import OperatorsApi, check_settings
from fedcore_server.sessions import SiteSession
from hypothesis import given
from hypothesis import strategies as st
from support.deployed_jobs import coordinated, plan_for, site_job, submitted
from support.policies import policy_of

from fedcore.config import read_settings
from fedcore.errors import BadInput, FedcoreError, MalformedMessage, PlanRefused
from fedcore.experiment.prepare import job_for, prepare
from fedcore.runtime.mailbox import Mailbox
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.plan import canonical
from fedcore.secagg.protocol.job.effects import EraseKeys
from fedcore.store import container
from fedcore.wire import calls, frames

# ----------------------------------------------------------------------------- what a site is sent


def test_settings_come_back_as_they_were_sent():
    settings = {"round": {"rounds": 2}, "train": {"lr": 0.1}}
    assert read_settings(canonical(settings)) == settings


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff", b"[]", b'"x"', b"null", b'{"a": 1}', b'{"b":1,"a":2}', b'{"a":1,"a":1}',
        b'{"a":NaN}', b'{"a":1e999}', b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    ],
    ids=range(12),
)  # fmt: skip
def test_settings_in_another_form_are_refused(data):
    with pytest.raises(BadInput, match="settings"):
        read_settings(data)


@given(st.binary(max_size=200))
def test_no_settings_raise_anything_but_bad_input(data):
    with contextlib.suppress(BadInput):
        assert isinstance(read_settings(data), dict)


@given(st.lists(st.binary(max_size=50), max_size=5))
def test_a_container_gives_its_chunks(chunks):
    assert container.from_bytes(container.to_bytes(chunks)) == chunks


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=3), st.data())
def test_a_damaged_container_is_refused_or_another_one(chunks, data):
    whole = bytearray(container.to_bytes(chunks))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(BadInput):
        assert container.to_bytes(container.from_bytes(bytes(whole))) == bytes(whole)


@pytest.mark.parametrize("data", [b"", b"\0", b"\xff" * 4, b"\xff" * 60_000, bytes(3), bytes(5)])
def test_a_count_that_lies_costs_no_time(data):
    begun = time.process_time()
    with pytest.raises(BadInput, match="chunk container"):
        container.from_bytes(data)
    assert time.process_time() - begun < 0.5


# --------------------------------------------------------------------------- what a site's operator allows


IDENTITY = IdentityKey()


class Recording:
    def __init__(self):
        self.asked = []

    async def load(self, job, **asked):
        self.asked.append((job, asked))
        return "loaded"


def allowed(tmp_path, **tasks):
    config = SiteConfig.model_validate(
        {
            "site": "a", "coordinator": "127.0.0.1:7443", "kit": "k", "identity": "i", "roster": "r",
            "folder": "f", "base": str(tmp_path), "file": str(tmp_path / "site.toml"), "tasks": tasks,
        }
    )  # fmt: skip
    tasks, training = InstalledTasks(config, IDENTITY, policy_of()), Recording()
    tasks.load_task = training.load
    return tasks, training


def test_a_task_is_loaded_by_the_name_and_hash_its_operator_wrote(tmp_path):
    ours = {"task": "here.py", "sha256": "a" * 64, "source": "rows.csv"}
    tasks, training = allowed(tmp_path, heart=ours)
    assert asyncio.run(tasks.load("job", {}, "heart", "a" * 64)) == "loaded"
    ((job, asked),) = training.asked
    assert job == "job"
    assert (asked["task"], asked["base"], asked["site"]) == ("here.py", str(tmp_path), "a")


def test_the_rows_are_split_as_site_toml_says_whatever_the_job_asks(tmp_path):
    tasks, training = allowed(tmp_path, heart={"task": "here.py", "sha256": "a" * 64})
    for settings in ({}, {"seed": 3, "fold": 1, "split": {"method": "folds", "seed": 3}}):
        asyncio.run(tasks.load("job", settings, "heart", "a" * 64))
    assert [asked["split"] for _, asked in training.asked] == [SplitSection().of(IDENTITY)] * 2


def test_a_disk_that_refuses_background_work_has_everything_read_from_it_again(tmp_path):
    """As a new process would: the work may be lost, and nothing else would ask for it again."""
    found = site_job(tmp_path, submitted(), context={"retry_seconds": 0.0})

    async def refused(*_):
        raise OSError(5, "Input/output error")

    async def play():
        restored = asyncio.Event()
        found.work.load, found.restore = refused, restored.set
        running = asyncio.get_running_loop().create_task(found.run())
        try:
            async with asyncio.timeout(20):
                await restored.wait()
        finally:
            running.cancel()
            await asyncio.wait([running])

    asyncio.run(play())
    assert "Input/output error" in found.job.part.last_error


def test_a_coordinator_whose_disk_refused_a_step_goes_on_from_what_the_disk_has(tmp_path):
    found = coordinated(tmp_path, plan_for("encrypted"))
    found.facts.withdrawn = frozenset({"a"})  # its commit was refused
    seen = []

    async def handle(event):
        seen.append(found.facts.withdrawn)
        raise OSError(28, "No space left") if len(seen) == 1 else ValueError("enough")

    found.handle = handle
    asyncio.run(found.run())
    assert seen == [{"a"}, frozenset()]
    assert found.facts.outcome.outcome == "failed", "control: any other fault ends the job"


def test_the_secrets_of_all_key_epochs_of_a_job_are_erased_together(tmp_path):
    found = site_job(tmp_path, submitted())
    journal = found.context.journal
    for key in ("epoch", "groups", "state"):
        journal.put(found.id, key, b"kept")
    found.perform([EraseKeys()])
    assert [journal.get(found.id, key) for key in ("epoch", "groups", "state")] == [
        None,
        None,
        b"kept",
    ]


# --------------------------------------------------------------------------------- what is submitted


def settings(**changes):
    whole = prepare(*job_for(None, {"task": "heart", "rounds": 2, "resamples": 0}))
    tables = {k: v for k, v in whole.job.to_json().items() if k not in {"task", "base"}}
    tables = {
        key: {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else part
        for key, part in tables.items()
    }
    tables["protect"]["max_examples"] = 1024
    for path, value in changes.items():
        section, _, key = path.partition("__")
        if value is None:
            tables[section].pop(key, None)
        else:
            tables[section][key] = value
    return tables


def test_complete_settings_are_taken():
    check_settings(settings(), 4, LimitsSection())


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"round__rounds": None}, BadInput, "round.rounds"),
        ({"protect__protection": None}, BadInput, "protect.protection"),
        ({"protect__max_examples": None}, BadInput, "max_examples"),
        ({"protect__protection": "plain"}, PlanRefused, "inside one process"),
        ({"round__drop": ["1:keys:va"]}, BadInput, "simulated absences"),
        ({"round__validate": 0.2}, BadInput, "round.validate: found 0.2, expected none"),
        (
            {"round__validate": 0.2, "round__keep": "best", "round__patience": 3},
            BadInput,
            "which rows are kept apart",
        ),
        ({"round__rounds": 0}, BadInput, "round.rounds"),
        ({"round__rounds": "many"}, BadInput, "round.rounds"),
        ({"train__nothing": 1}, BadInput, "nothing"),
    ],
    ids=str,
)
def test_other_settings_are_refused_by_the_key_that_is_wrong(changes, error, says):
    with pytest.raises(error, match=says) as found:
        check_settings(settings(**changes), 4, LimitsSection())
    assert found.value.remedy or isinstance(found.value, FedcoreError)


@pytest.mark.parametrize("table", [{}, {"round": 3}, {"round": {"rounds": 2}}, {"protect": []}])
def test_settings_with_sections_missing_are_refused(table):
    with pytest.raises(BadInput):
        check_settings(json.loads(json.dumps(table)), 4, LimitsSection())


def test_two_sites_are_too_few():
    with pytest.raises(PlanRefused, match="at least 3"):
        check_settings(settings(), 2, LimitsSection())


# ------------------------------------------------------------------------- how much a coordinator holds


def test_what_waits_for_a_site_that_does_not_read_is_bounded():
    async def play():
        session = SiteSession(SimpleNamespace(name="a", fingerprint="f0", serial="1"))
        frame = frames.Record("job", bytes(sessions.MOST_BYTES // 10))
        for _ in range(50):
            session.put(frame)
        assert session.over
        sent = []
        while (data := await asyncio.wait_for(session.next(), 60)) is not None:
            sent.append(data)
        assert 1 <= len(sent) < 10
        assert session.waiting == 0

    asyncio.run(play())


def test_a_session_that_is_over_ends_though_its_queue_was_full():
    async def play():
        session = SiteSession(SimpleNamespace(name="a", fingerprint="f0", serial="1"))
        for number in range(sessions.MOST_FRAMES):
            session.put(frames.Ping(number))
        assert session.out.full()
        session.end(frames.Goodbye("replaced"))
        *found, last = [await session.next() for _ in range(sessions.MOST_FRAMES + 1)]
        assert None not in found and last is None

    asyncio.run(play())


def test_records_wait_while_a_job_has_many_to_handle():
    async def play():
        queue, facts = SimpleNamespace(backlog=site_api.MOST_RECORDS), SimpleNamespace(outcome=None)
        job = SimpleNamespace(mailbox=queue, facts=facts)
        waiting = asyncio.get_running_loop().create_task(site_api.room(job))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        queue.backlog -= 1
        await asyncio.wait_for(waiting, 60)
        queue.backlog, facts.outcome = site_api.MOST_RECORDS, "over"
        await asyncio.wait_for(site_api.room(job), 60)

    asyncio.run(play())


def test_whoever_watches_hears_the_end_though_it_came_while_an_event_was_sent():
    """A busy coordinator, or a slow reader: between two events all that is left of a job may happen."""
    facts = SimpleNamespace(
        outcome=None,
        progress=SimpleNamespace(state="running"),
        rounds=SimpleNamespace(known=[]),
        metrics=SimpleNamespace(known=[]),
    )
    job = SimpleNamespace(facts=facts)

    gate = SimpleNamespace(still=lambda peer: None)
    hub = SimpleNamespace(
        about=lambda found: SimpleNamespace(to_json=lambda: {"state": found.facts.progress.state}),
        sites=lambda found: {},
        sessions=SimpleNamespace(gate=gate), change=asyncio.Event(), jobs={"job": job},
    )  # fmt: skip

    def state_in(data):
        event = calls.WATCH.gives.unpack(data, sender="hub")
        return frames.json_value(event.json, sender="hub")["state"]

    async def play():
        events = OperatorsApi(hub).watch(
            SimpleNamespace(name="op", fingerprint="f0", serial="1"), frames.WatchRequest("job")
        )
        heard = [state_in(await anext(events))]
        facts.progress.state = facts.outcome = "finished"
        heard += [state_in(data) async for data in events]
        assert heard == ["running", "finished"]

    asyncio.run(play())


def test_work_that_is_called_off_before_it_began_leaves_no_coroutine_behind():
    async def work():
        raise AssertionError("it never began")

    async def play():
        task = Mailbox("tick").background(work(), str)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    gc.collect()  # what earlier tests left is not this one's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.MonkeyPatch.context() as patch:
            unraised = []
            patch.setattr(sys, "unraisablehook", unraised.append)
            asyncio.run(play())
            gc.collect()
    assert unraised == [], "a warning at a destructor cannot be raised"


async def never():
    await asyncio.sleep(60)
    yield b""


def test_a_stream_without_a_word_is_given_up():
    async def play():
        with pytest.raises(TimeoutError):
            async for _ in sessions.with_timeouts(never(), lambda: 0.01):
                pass

    asyncio.run(play())


def test_a_stream_gives_what_comes_and_ends_with_it():
    async def three():
        for each in (b"a", b"b", b"c"):
            yield each

    async def play():
        assert [data async for data in sessions.with_timeouts(three(), lambda: 1.0)] == [
            b"a",
            b"b",
            b"c",
        ]

    asyncio.run(play())


class Ended(Exception):
    """What `abort` raises here."""


class Call:
    def __init__(self, certificate=b"one"):
        self.certificate, self.ended = certificate, None

    def auth_context(self):
        return {"x509_pem_cert": [self.certificate]}

    async def abort(self, code, details):
        self.ended = (code, details)
        raise Ended


def test_a_certificate_has_so_many_calls_and_others_have_theirs():
    async def play():
        busy, inside = Counter(), []
        for _ in range(grpc_service.MOST_CALLS):
            inside.append(grpc_service.open_call(busy, Call()))
            await inside[-1].__aenter__()
        more = Call()
        with pytest.raises(Ended):
            async with grpc_service.open_call(busy, more):
                pass
        assert more.ended[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        async with grpc_service.open_call(busy, Call(b"two")):
            pass
        await inside.pop().__aexit__(None, None, None)
        async with grpc_service.open_call(busy, Call()):
            pass
        for each in inside:
            await each.__aexit__(None, None, None)
        assert not busy

    asyncio.run(play())


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (BadInput("upload: found none"), grpc.StatusCode.INVALID_ARGUMENT, "upload: found none"),
        (
            MalformedMessage("x", found="1", expected="2", fault="a"),
            grpc.StatusCode.INVALID_ARGUMENT, "expected 2",
        ),
        (KeyError("SECRET"), grpc.StatusCode.INTERNAL, "the coordinator failed"),
        (TimeoutError("SECRET"), grpc.StatusCode.DEADLINE_EXCEEDED, "nothing to read"),
    ],
)  # fmt: skip
def test_what_goes_wrong_in_a_call_is_told_without_another_programs_text(error, code, says):
    async def play():
        call, busy = Call(), Counter()
        with pytest.raises(Ended):
            async with grpc_service.open_call(busy, call):
                raise error
        assert call.ended[0] is code
        assert says in call.ended[1]
        assert "SECRET" not in call.ended[1]
        assert not busy

    asyncio.run(play())


# ------------------------------------------------------------------------------ a stream that ends


def test_a_frame_for_a_stream_that_has_ended_is_no_fault_of_the_site():
    """A coordinator that is killed ends the stream while a frame waits to be sent on it."""

    async def ends_at_once(_, context):
        await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    async def main():
        server = grpc.aio.server()
        handler = grpc.stream_stream_rpc_method_handler(ends_at_once)
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("test", {"Session": handler})]
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stream = channel.stream_stream("/test/Session")()
            with pytest.raises(grpc.aio.AioRpcError, match="gone"):
                await stream.read()
            out = asyncio.Queue()
            out.put_nowait(b"a frame")
            await session.send_frames(stream, out)  # returns: the reader has said how it ended
        await server.stop(None)

    asyncio.run(main())
