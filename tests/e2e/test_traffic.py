"""Malformed traffic against a real coordinator: from strangers, and from a site with a good certificate.

The site `d` is on the roster and its process never runs: every test speaks in its name, with its own
certificate, whatever it likes. What must hold: the coordinator stays up and says which rule was
broken, its memory stays bounded, and the other sites finish their job with the right model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import random
import socket
import threading
import time
from typing import get_args, get_origin, get_type_hints

import grpc
import pytest
from deployment import CAP, HUB, PATIENCE, deployment, small_task

from fedcore.secagg.crypto.identity_key import roster_digest
from fedcore.secagg.protocol import job_messages
from fedcore.secagg.protocol.wire_form import encode
from fedcore.wire import calls, frames, refusals
from fedcore.wire._generated import federation_pb2
from fedcore.wire.codec import WIRE_VERSION
from fedcore.wire.limits import INLINE, MAX_RECORD, PART, SITE_RECORD
from fedcore.wire.records import TO_COORDINATOR

MIB = 1 << 20
GROWTH = 160 * MIB
"""What a coordinator may grow by under an attack that sends several times as much."""

BUSY = """
import asyncio, pathlib
from fedcore_server.job_runner import JobRunner
busy, handle = pathlib.Path({path!r}), JobRunner.handle
async def when_free(self, event):
    while busy.exists():
        await asyncio.sleep(0.02)
    await handle(self, event)
JobRunner.handle = when_free
"""
"""A job that handles nothing while a file is there."""

pack = calls.SESSION.takes.pack


@pytest.fixture(scope="module")
def fed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traffic")
    # Three sites are the fewest that a round needs, so nobody leaves one of them out for being slow.
    limits = {"gather_seconds": 0.5}
    busy = folder / "busy"
    with deployment(
        folder, small_task(folder), start=["a", "b", "c"], limits=limits,
        patches={HUB: BUSY.format(path=str(busy))},
    ) as found:  # fmt: skip
        found.busy = busy
        found.connected(["a", "b", "c"])
        found.first = found.submit(rounds=1)
        found.wait(found.first)
        yield found
        assert found.processes[HUB].poll() is None
        assert "Traceback" not in found.log(HUB), found.log(HUB)[-4000:]


@pytest.fixture(autouse=True)
def unharmed(fed):
    """Around every test: the coordinator answers, has not grown, and its sites still have sessions."""
    before = fed.rss()
    yield
    fed.connected(["a", "b", "c"])
    assert fed.rss() - before < GROWTH
    assert "Traceback" not in fed.log(HUB), fed.log(HUB)[-4000:]


def hello(fed):
    return frames.Hello(roster_digest(fed.pins))


def session(fed, sent, kit=None, seconds=PATIENCE, until=None):
    """What a session answers to these bytes: its frames, and how it ended.

    until: it is kept open until this is true of the frames that came, or until it is ended.
    """
    over, found = threading.Event(), []

    def say():
        yield from sent
        while until is not None and not until(found) and not over.wait(0.02):
            pass

    with fed.channel(kit or fed.site_kit("d")) as channel:
        stream = channel.stream_stream(calls.SESSION.path)(say(), timeout=seconds)
        each = calls.SESSION.gives.unpack_each
        frames_of = (frame for data in stream for frame in each(data, sender="coordinator"))
        try:
            found.extend(frames_of)
        except grpc.RpcError as error:
            return found, error.code()
        finally:
            over.set()
    return found, grpc.StatusCode.OK


def refusal(error):
    """(code, sentence) of a call that was refused."""
    told = refusals.error_of(error.value.details())
    return error.value.code(), str(told) if told else error.value.details()


# ------------------------------------------------------------------------------ sessions, one by one


def test_bytes_that_are_no_frame_end_the_session_with_a_word(fed):
    noise = random.Random(7)
    whole = pack(hello(fed))
    for data in [
        b"\x00", b"\xff" * 100, noise.randbytes(1000), noise.randbytes(60_000),
        whole[:-1], whole[: len(whole) // 2], whole + b"\x00", whole[1:], b"\x0a\xff\xff\xff\xff\x0f",
    ]:  # fmt: skip
        found, code = session(fed, [data])
        assert [type(f).__name__ for f in found] == ["Goodbye"], (data[:20], found)
        assert found[0].code == "malformed"
        assert code is grpc.StatusCode.OK


@pytest.mark.parametrize(
    "frame",
    [
        frames.Pong(1), frames.Doing("job", "idle"), frames.Record("job", b"x"),
        frames.Goodbye("stopping"),
        frames.SmallUpload(frames.UploadStart("job", bytes(32), bytes(32), 4), bytes(4)),
    ],
    ids=lambda frame: type(frame).__name__,
)  # fmt: skip
def test_a_session_begins_with_hello(fed, frame):
    found, _ = session(fed, [pack(frame)])
    assert [f.code for f in found] == ["malformed"]
    assert "Hello first" in found[0].text


def test_a_second_hello_ends_the_session(fed):
    found, _ = session(fed, [pack(hello(fed))] * 2)
    assert isinstance(found[0], frames.Welcome)
    assert found[-1].code == "malformed"
    assert "Hello" in found[-1].text


def test_another_wire_version_is_told_both(fed):
    other = federation_pb2.FromSite()
    other.ParseFromString(pack(hello(fed)))
    other.hello.version, other.hello.software = WIRE_VERSION + 1, "fedcore 9.9"
    found, _ = session(fed, [other.SerializeToString(deterministic=True)])
    assert [f.code for f in found] == ["version"]
    assert f"{WIRE_VERSION + 1} (of fedcore 9.9)" in found[0].text
    assert f"{WIRE_VERSION} (of fedcore" in found[0].text
    assert not found[0].again


def test_other_pins_are_refused(fed):
    found, _ = session(fed, [pack(frames.Hello("0" * 64))])
    assert [f.code for f in found] == ["roster"]


def test_oversized_frames_end_the_call_before_they_are_kept(fed):
    first = pack(hello(fed))
    raw = federation_pb2.FromSite()
    raw.record.job, raw.record.body = fed.first, bytes(MAX_RECORD + 10 * MIB)
    found, code = session(fed, [first, raw.SerializeToString(deterministic=True)])
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED, (found, code)
    for size in (INLINE * 2, MAX_RECORD):  # what grpc lets through, and the frame does not
        raw = federation_pb2.FromSite()
        raw.upload.start.job, raw.upload.data = fed.first, bytes(size)
        found, _ = session(fed, [first, raw.SerializeToString(deterministic=True)])
        assert [type(f).__name__ for f in found] == ["Welcome", "Goodbye"]
        assert "bytes" in found[-1].text


def test_floods_of_sessions_and_silence_stay_within_a_limit(fed):
    """A hundred and twenty calls of one certificate at once: most are refused, others are served."""
    over = threading.Event()

    def say():
        over.wait(PATIENCE)
        yield from ()

    with fed.channel(fed.site_kit("d")) as channel:
        open_calls = [
            channel.stream_stream(calls.SESSION.path)(say(), timeout=PATIENCE) for _ in range(60)
        ] + [
            channel.stream_unary(calls.UPLOAD.path).future(say(), timeout=PATIENCE)
            for _ in range(60)
        ]
        try:
            until = time.monotonic() + PATIENCE / 2
            while len(refused(open_calls)) < len(open_calls) - 40:
                assert time.monotonic() < until, len(refused(open_calls))
                time.sleep(0.05)
            fed.jobs()  # others are heard
        finally:
            over.set()
            for call in open_calls:
                call.cancel()
    until = time.monotonic() + PATIENCE  # what was open is counted no longer
    while True:
        found, _ = session(fed, [pack(hello(fed)), pack(frames.Goodbye("stopping"))])
        if found and isinstance(found[0], frames.Welcome):
            break
        assert time.monotonic() < until, found


def refused(open_calls):
    """Those that were told of a limit."""
    return [
        call for call in open_calls
        if call.done() and call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    ]  # fmt: skip


def test_sessions_replace_each_other(fed):
    """Eighty, one after the other; the last one is the site's."""
    kit = fed.site_kit("d")
    over = threading.Event()
    with fed.channel(kit) as channel:
        for _ in range(80):
            stream = channel.stream_stream(calls.SESSION.path)(
                itertools.chain([pack(hello(fed))], _pause(over)), timeout=PATIENCE
            )
            first = calls.SESSION.gives.unpack_each(next(stream), sender="coordinator")
            assert isinstance(next(first), frames.Welcome)
            stream.cancel()
        over.set()
    fed.connected(["a", "b", "c"])


def _pause(over):
    over.wait(PATIENCE)
    yield from ()


# ------------------------------------------------------------------------- transfers nobody waits for


def test_uploads_that_nobody_waits_for_are_not_kept(fed):
    spool = fed.state(HUB) / "spool"
    before = {path for path in spool.rglob("*") if path.is_file()}
    with fed.channel(fed.site_kit("d")) as channel:
        upload = channel.stream_unary(calls.UPLOAD.path)
        for job in [fed.first, "no-such-job", "../../../etc"]:
            start = frames.UploadStart(job, bytes(32), bytes(32), 10 * PART)
            sent = [
                calls.UPLOAD.takes.pack(start),
                *[calls.UPLOAD.takes.pack(frames.Part(bytes(PART)))] * 10,
            ]
            with pytest.raises(grpc.RpcError) as error:
                upload(iter(sent), timeout=PATIENCE)
            assert refusal(error)[0] is grpc.StatusCode.INVALID_ARGUMENT
            assert "no job expects" in refusal(error)[1]
            ask = channel.unary_unary(calls.UPLOAD_OFFSET.path)
            with pytest.raises(grpc.RpcError) as error:
                ask(calls.UPLOAD_OFFSET.takes.pack(start), timeout=PATIENCE)
            assert "no job expects" in refusal(error)[1]
        for sent in [
            [calls.UPLOAD.takes.pack(frames.Part(b"x"))], [], [b"\xff\xff"], [b""],
            [calls.UPLOAD.takes.pack(start)[:-3]],
        ]:  # fmt: skip
            with pytest.raises(grpc.RpcError) as error:
                upload(iter(sent), timeout=PATIENCE)
            assert refusal(error)[0] in {
                grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
            }, sent  # fmt: skip
    small = frames.SmallUpload(
        frames.UploadStart(fed.first, bytes(32), bytes(32), INLINE), bytes(INLINE)
    )
    found, _ = session(fed, [pack(hello(fed)), pack(small)], until=receipts)
    assert receipts(found) and not any(each.complete for each in receipts(found))
    assert {path for path in spool.rglob("*") if path.is_file()} == before


def receipts(found):
    return [each for each in found if isinstance(each, frames.UploadReceipt)]


def test_downloads_of_what_does_not_exist(fed):
    with fed.channel(fed.site_kit("d")) as channel:
        for job, what, offset in itertools.product(
            [fed.first, "no-such-job"], frames.WHAT, [0, 1 << 40]
        ):
            asked = frames.DownloadStart(job, what, bytes(32), offset)
            with pytest.raises(grpc.RpcError) as error:
                list(channel.unary_stream(calls.DOWNLOAD.path)(calls.DOWNLOAD.takes.pack(asked)))
            assert refusal(error)[0] is grpc.StatusCode.INVALID_ARGUMENT
            assert "found no such sum or checkpoint" in refusal(error)[1]
        for data in [b"", b"\x00\x01", random.Random(3).randbytes(5000)]:
            with pytest.raises(grpc.RpcError) as error:
                list(channel.unary_stream(calls.DOWNLOAD.path)(data))
            assert refusal(error)[0] is grpc.StatusCode.INVALID_ARGUMENT


# -------------------------------------------------------------------------------- other people's calls


@pytest.mark.parametrize(
    ("role", "name", "call", "request_"),
    [
        ("observer", "obs", calls.SUBMIT, frames.SubmitRequest(b"x", "small", "0" * 64, b"{}")),
        ("observer", "obs", calls.STOP, frames.JobRequest("x")),
        ("observer", "obs", calls.CHECK, frames.Hello("0" * 64)),
        ("operator", "op", calls.CHECK, frames.Hello("0" * 64)),
        ("operator", "op", calls.UPLOAD_OFFSET, frames.UploadStart("x", bytes(32), bytes(32), 4)),
        ("site", "d", calls.JOBS, frames.JobsRequest()),
        ("site", "d", calls.STOP, frames.JobRequest("x")),
        ("site", "d", calls.SUBMIT, frames.SubmitRequest(b"x", "small", "0" * 64, b"{}")),
        ("site", "nobody", calls.CHECK, frames.Hello("0" * 64)),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "name", ""),
)  # fmt: skip
def test_a_certificate_makes_the_calls_of_its_role_only(fed, role, name, call, request_):
    kit = fed.site_kit(name) if name in fed.sites else fed.kit(role, name)
    with pytest.raises(grpc.RpcError) as error:
        fed.ask(call, request_, kit)
    assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert role in error.value.details() or name in error.value.details()


def test_a_stranger_without_certificate_gets_nothing(fed):
    with fed.channel(None) as channel, pytest.raises(grpc.RpcError) as error:
        channel.unary_unary(calls.JOBS.path)(
            calls.JOBS.takes.pack(frames.JobsRequest()), timeout=PATIENCE
        )
    assert error.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}


def test_whoever_says_nothing_is_let_go(fed):
    """Open sockets that say nothing or anything, and a session of a good certificate without a word."""
    noise = random.Random(5)
    said = [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        noise.randbytes(5000),
    ]
    sockets = []
    try:
        for data in said * 25:
            sockets.append(socket.create_connection(("127.0.0.1", fed.port), 5))
            sockets[-1].sendall(data)
        assert fed.jobs()  # meanwhile others are heard
        found, code = session(fed, [], until=bool)
        assert (found, code) == ([], grpc.StatusCode.OK), "ended by the coordinator"
        assert not fed.jobs()["sites"]["d"]["connected"]
        for each in sockets:
            each.settimeout(PATIENCE)
            with contextlib.suppress(ConnectionError):
                while each.recv(1 << 16):
                    pass
    finally:
        for each in sockets:
            each.close()


def test_an_unknown_method_is_no_call(fed):
    with fed.channel(fed.site_kit("d")) as channel:
        for path in ["/fedcore.v1.Coordinator/Nothing", "/x/y", "/fedcore.v2.Coordinator/Session"]:
            with pytest.raises(grpc.RpcError) as error:
                channel.unary_unary(path)(b"", timeout=PATIENCE)
            assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("../../../../tmp/x", None), ("a/b", None), (".", None), ("small", {}),
        ("small", {"protect": {"max_examples": CAP}}), ("small", []),
        ("small", {"round": {"rounds": 10**12}}), ("small", {"nothing": {"x": 1}}),
        ("small", {"train": {"lr": "nan"}}), ("small", {"sites": {"a": "/etc/passwd"}}),
        ("small", {"protect": {"max_examples": CAP, "protection": "plain"}}),
    ],
)  # fmt: skip
def test_a_malformed_job_is_refused_whole(fed, task, settings):
    if settings is None:
        whole = fed.prepared_settings()
        settings = whole
    about = json.dumps({"settings": settings}).encode()
    jobs = sorted(path.name for path in (fed.state(HUB) / "jobs").iterdir())
    with pytest.raises(grpc.RpcError) as error:
        fed.ask(calls.SUBMIT, frames.SubmitRequest(b"x", task, "0" * 64, about))
    assert error.value.code() in {
        grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
    }  # fmt: skip
    assert sorted(path.name for path in (fed.state(HUB) / "jobs").iterdir()) == jobs
    assert [row["job"] for row in fed.jobs()["jobs"]] == jobs_in_order(fed)


def jobs_in_order(fed):
    return [row["job"] for row in fed.jobs()["jobs"]]


# ------------------------------------------------------------------------------------ while a job runs


def some(hint, draw, site, job):
    """A value of this type: well formed, and anything else."""
    hint = getattr(hint, "__supertype__", hint)
    arguments = get_args(hint)
    if hint is str:
        return draw.choice([site, job, "a", "", "\x00\x1b[2J", "x" * 500, "../../x", "unable"])
    if hint is int:
        return draw.choice([0, 1, 2, -1, 1 << 31, (1 << 63) - 1, -(1 << 63)])
    if hint is bytes:
        return draw.randbytes(draw.choice([0, 1, 32, 32, 32, 64, 1184, 5000]))
    if hint is bool:
        return draw.random() < 0.5
    if get_origin(hint) is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(
                some(arguments[0], draw, site, job) for _ in range(draw.choice([0, 1, 3, 40]))
            )
        return tuple(some(each, draw, site, job) for each in arguments)
    if arguments:  # a union
        return some(draw.choice(arguments), draw, site, job)
    if hint is type(None):
        return None
    assert dataclasses.is_dataclass(hint), hint
    hints = get_type_hints(hint)
    values = {}
    for each in dataclasses.fields(hint):
        if each.name == "site" and draw.random() < 0.8:
            values[each.name] = site
        elif each.init:
            values[each.name] = some(hints[each.name], draw, site, job)
    return hint(**values)


def records(job, seed, count, site="d"):
    """Records of every type that may come, with fields of the right types and any content."""
    draw, found = random.Random(seed), []
    kinds = [entry.kind for entry in TO_COORDINATOR.values()]
    while len(found) < count:
        try:
            body = encode(some(kinds[len(found) % len(kinds)], draw, site, job))
        except (TypeError, ValueError):  # a record's own checks: it cannot be made, here or there
            kinds.append(kinds.pop(0))
            continue
        if len(body) <= SITE_RECORD:
            found.append(frames.Record(job, body))
    return found


def annoy(fed, job, seed, over):
    """Sessions in the name of `d` with every record there is, until told to end; how many records."""
    said, draw = 0, random.Random(seed)
    while not over.is_set():
        batch = [pack(each) for each in records(job, draw.random(), 200)]
        if draw.random() < 0.3:  # and one that is no frame, which ends the session
            batch.insert(draw.randrange(len(batch)), draw.randbytes(300))
        if draw.random() < 0.5:
            draw.shuffle(batch)
        end = time.monotonic() + 1.5  # it holds its session for a while, as a site does
        found, _ = session(
            fed, [pack(hello(fed)), *batch, *batch[:50]],
            until=lambda answers, end=end: over.is_set() or (answers and time.monotonic() > end),
        )  # fmt: skip
        said += len(batch) + 50
        assert found, "a session got no answer"
    return said


def test_honest_sites_finish_with_the_right_model_meanwhile(fed):
    """`d` says everything at once, in every stage; the model is that of a, b and c alone."""
    rounds = 6
    expected = fed.simulated(
        rounds=rounds, drop=[f"{number}:keys:d" for number in range(1, rounds + 2)]
    )
    job = fed.submit(rounds=rounds)
    over, counts, peak = threading.Event(), [], [fed.rss()]

    def attack():
        counts.append(annoy(fed, job, len(counts), over))

    def measure():
        while not over.wait(0.05):
            peak.append(fed.rss())

    threads = [threading.Thread(target=each, daemon=True) for each in (attack, measure)]
    for each in threads:
        each.start()
    try:
        events = fed.wait(job)
    finally:
        over.set()
        for each in threads:
            each.join(PATIENCE)
    assert events[-1]["state"] == "finished", events[-1]
    found = [row for event in events for row in event["new_rounds"] if row["purpose"] == "update"]
    assert [row["survivors"] for row in found] == [["a", "b", "c"]] * rounds
    assert set(fed.released(job, sites=["a", "b", "c"]).values()) == {expected}
    assert counts, "the attack failed"
    assert counts[0] > 200
    assert max(peak) - peak[0] < GROWTH


def test_a_round_number_at_the_end_of_numbers_stops_nobody(fed):
    """A site at rest after round 2^63 - 1 would leave no number for the next one."""
    before = len(fed.log(HUB))
    job = fed.submit(rounds=5)
    far = job_messages.SiteStatus(job, "d", 1, "", (1 << 63) - 1)
    sent = [pack(hello(fed)), pack(frames.Record(job, encode(far)))]
    session(fed, sent, until=lambda _: "found a number of d" in fed.log(HUB)[before:])
    assert "found a number of d" in fed.log(HUB)[before:]
    events = fed.wait(job)
    assert events[-1]["state"] == "finished"
    assert sum(len(event["new_rounds"]) for event in events) >= 5, "it came before the rounds"


def test_a_flood_of_records_waits_at_its_sender(fed):
    """A quarter of a gigabyte of records while the job is busy: they are not piled up here.

    What bounds the memory is that a session is read no further while MOST_RECORDS wait for the job
    (server/site_api.py): 64 of the longest records, beside what the connection itself holds.
    """
    said = itertools.count()
    job = fed.submit(rounds=2)
    survey = encode(job_messages.SiteUnavailable(job, "d", "x" * (SITE_RECORD - 200)))
    one = pack(frames.Record(job, survey))
    before, peak, over = fed.rss(), [0], threading.Event()

    def measure():
        while not over.wait(0.02):
            peak.append(fed.rss())

    def flood():
        yield pack(hello(fed))
        for _ in range(1000):
            next(said)
            yield one

    def attack():
        session(fed, flood())

    threads = [threading.Thread(target=each, daemon=True) for each in (measure, attack)]
    fed.busy.touch()
    try:
        for each in threads:
            each.start()
        counts = [0]
        while counts[-1] < 2 or len(set(counts[-20:])) > 1:  # until it comes to a stand
            time.sleep(0.1)
            counts.append(int(repr(said)[6:-1]))
        assert counts[-1] < 1000, "all of it was taken while the job took nothing"
        fed.busy.unlink()
        assert fed.wait(job)[-1]["state"] == "finished"
    finally:
        fed.busy.unlink(missing_ok=True)
        over.set()
        for each in threads:
            each.join(PATIENCE)
    assert max(peak) - before < GROWTH


def test_a_site_that_does_not_read_is_not_waited_for(fed):
    """Its calls stay open and unread: what waits for it is bounded, and the job goes on."""
    over = threading.Event()

    def say():
        yield pack(hello(fed))
        while not over.wait(0.001):  # every one of these would be answered
            yield pack(
                frames.SmallUpload(frames.UploadStart("x", bytes(32), bytes(32), 4), bytes(4))
            )

    with fed.channel(fed.site_kit("d")) as channel:
        stream = channel.stream_stream(calls.SESSION.path)(say(), timeout=PATIENCE)
        try:
            job = fed.submit(rounds=2)
            assert fed.wait(job)[-1]["state"] == "finished"
        finally:
            over.set()
            stream.cancel()


# --------------------------------------------------------------------------- from inside of the round

WICKED = """
import asyncio, random
from fedcore.wire import calls, frames
from fedcore_clients.session import Session

draw, said, half_open = random.Random(11), [], []
put, inline = Session._put, Session._inline

def wicked_put(self, frame):
    done = put(self, frame)
    if done and isinstance(frame, (frames.Record, frames.SmallUpload)):
        said.append(frame)
        print("wicked", len(said), flush=True)
        put(self, frame)  # twice, then three of what was said before, in another order
        for old in draw.sample(said, min(3, len(said))):
            put(self, old)
        if isinstance(frame, frames.Record):  # and with another last bit
            put(self, frames.Record(frame.job, frame.body[:-1] + bytes([frame.body[-1] ^ 1])))
            put(self, frame)  # the last word of it is right: else each stage lasts to its deadline
    return done

async def wicked_inline(self, frame):
    start = frame.start
    def other(size):
        return frames.UploadStart(start.job, start.header, draw.randbytes(32), size)
    async def half(first):
        yield calls.UPLOAD.takes.pack(first)
        await asyncio.sleep(60)
    for size in [start.size] * 10 + [1, 1 << 40]:
        call = self._channel.stream_unary(calls.UPLOAD.path)(half(other(size)))
        half_open.append(asyncio.ensure_future(call.code()))
    for size, data in [
        (start.size, frame.data[:-1]), (start.size, frame.data + b"x"), (start.size, frame.data),
        (4, bytes(4)), (1 << 40, frame.data), (start.size, bytes(start.size)),
    ]:
        put(self, frames.SmallUpload(other(size), data))
    await asyncio.sleep(0.05)
    print("half open", len(half_open), flush=True)
    await inline(self, frame)

Session._put, Session._inline = wicked_put, wicked_inline
"""


@pytest.mark.slow
def test_a_site_of_the_round_replays_reorders_and_leaves_uploads_half_open(tmp_path):
    """`d` runs, and says everything twice, late, in another order and with another bit."""
    rounds, limits = 4, {"stage_seconds": 30}  # the longest that `d` can hold up a round
    with deployment(tmp_path, small_task(tmp_path), patches={"d": WICKED}, limits=limits) as fed:
        fed.connected()
        job, before = fed.submit(rounds=rounds), fed.rss()
        events = fed.wait(job)
        assert events[-1]["state"] == "finished", events[-1]
        assert fed.rss() - before < GROWTH
        assert fed.log("d").count("wicked ") >= 3, fed.log("d")[-2000:]
        found = [
            row for event in events for row in event["new_rounds"] if row["purpose"] == "update"
        ]
        survivors = [row["survivors"] for row in found if row["survivors"]]
        assert len(survivors) == rounds
        assert all({"a", "b", "c"} <= set(each) for each in survivors)
        absent = [f"{at}:keys:d" for at, each in enumerate(survivors, start=1) if "d" not in each]
        expected = fed.simulated(rounds=rounds, **({"drop": absent} if absent else {}))
        assert set(fed.released(job, sites=["a", "b", "c"]).values()) == {expected}
        assert "Traceback" not in fed.log(HUB), fed.log(HUB)[-4000:]
        left = [
            p
            for p in (fed.state(HUB) / "spool").rglob("*")
            if p.is_file() and "kept" not in p.parts
        ]
        assert left == [], "a round that is over leaves nothing in the spool"
