"""Several frames in one message of a session: each passes what it would pass alone, in order, at both ends."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import grpc.aio
import pytest
from fedcore_clients import session
from fedcore_clients.channel import open_channel
from fedcore_clients.config import read_config
from fedcore_server import site_api
from fedcore_server.sessions import SOON_SECONDS, SiteSession

from fedcore.audit.keys import SiteSigner
from fedcore.audit.trail import AuditTrail
from fedcore.identity.kit import Kit
from fedcore.identity.roster import roster_digest
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.protocol.job_messages import SiteStatus
from fedcore.wire import calls, frames
from fedcore.wire.codec import MOST_TOGETHER, TOGETHER
from fedcore.wire.records import TO_COORDINATOR, pack_record
from tests.support.federations import now
from tests.support.live_sessions import coordinator, recorded

pack = calls.SESSION.takes.pack
SEEN = [frames.RosterSeen(1, word) for word in ("signature", "older", "differs", "malformed")]


def read(data):
    return list(calls.SESSION.gives.unpack_each(data, sender="coordinator"))


def said(files, va, tmp_path, *messages, first=b""):
    """What a coordinator sends to a site's real session, and what it recorded of it. The messages follow its Hello, or
    `first`."""

    async def play():
        async with coordinator(files, now, tmp_path, audit=trail) as hub:
            config, kit = read_config(va / "site.toml"), Kit.load(va / "kit")
            hello = frames.Hello(roster_digest(hub.context.rosters.current.sites))
            async with open_channel(kit, *config.addresses[0]) as channel:
                stream = channel.stream_stream(calls.SESSION.path)()
                for message in (first or pack(hello), *messages):
                    await stream.write(message)
                async with asyncio.timeout(20):
                    while (data := await stream.read()) is not grpc.aio.EOF:
                        found.extend(read(data))

    found = []
    with AuditTrail.open(tmp_path / "hub", SiteSigner(IdentityKey()), {}) as trail:
        asyncio.run(play())
    refusals = [facts["why"] for facts in recorded(tmp_path / "hub", "refused") if "why" in facts]
    return [frame for frame in found if not isinstance(frame, frames.Roster)], refusals


END = pack(frames.Goodbye("stopping"))


@pytest.mark.parametrize("together", [True, False])
def test_each_frame_has_its_line_in_the_trail_and_none_counts_after_a_goodbye(
    files, va, tmp_path, together
):
    packed = [pack(SEEN[0]), pack(SEEN[1]), END, pack(SEEN[2])]
    messages = [b"".join(packed)] if together else packed
    (welcome,), refusals = said(files, va, tmp_path, *messages)
    assert isinstance(welcome, frames.Welcome)
    assert refusals == ["signature", "older"]


@pytest.mark.parametrize(
    "wrong",
    [
        b"\x3a\x05abc",  # shorter than it says
        b"\xfa\x01\x00",  # of no known number
        pack(frames.Hello("0" * 64)),  # only the first frame may be one
        bytes([7 << 3 | 2, len(END), *END]),  # a frame inside another
        pack(SEEN[2]) * MOST_TOGETHER,
        frames.FROM_SITE.pack(frames.Record("job", bytes(TOGETHER))),
    ],
    ids=["short", "unknown", "hello", "nested", "too many", "too long"],
)
def test_a_malformed_frame_ends_the_session_where_it_stands(files, va, tmp_path, wrong):
    (welcome, goodbye), refusals = said(files, va, tmp_path, pack(SEEN[0]) + wrong + pack(SEEN[3]))
    assert isinstance(welcome, frames.Welcome) and goodbye.code == "malformed"
    before = [] if len(wrong) > TOGETHER else ["signature"]
    more = ["differs"] if wrong == pack(SEEN[2]) * MOST_TOGETHER else []
    assert refusals == before + more


def test_a_hello_with_more_in_its_message_begins_no_session(files, va, tmp_path):
    first = pack(frames.Hello("0" * 64)) + pack(SEEN[0])
    (goodbye,), refusals = said(files, va, tmp_path, first=first)
    assert goodbye.code == "malformed" and not refusals


def test_records_of_one_message_wait_one_by_one_for_room_in_the_job():
    """A message of sixteen records could else be past the bound of a job's queue at once."""
    taken = []

    class Queue(SimpleNamespace):
        backlog = site_api.MOST_RECORDS - 2

    def put(event):
        taken.append(event)
        job.mailbox.backlog += 1

    facts = SimpleNamespace(sites=("va",), outcome=None)
    epochs = SimpleNamespace(asks_for_grants=lambda name: False)
    job = SimpleNamespace(
        id="job", mailbox=Queue(), facts=facts, put=put, machine=SimpleNamespace(epochs=epochs)
    )
    hub = SimpleNamespace(jobs={"job": job}, running=lambda: job, sessions=None)
    api = site_api.SiteApi(hub, None)
    record = pack(pack_record("job", SiteStatus("job", "va", 0, "", 0), TO_COORDINATOR))

    async def play():
        open_one = SiteSession(SimpleNamespace(name="va", fingerprint="f0", serial="1"))
        open_one.begun = True

        async def requests():
            yield record * 5

        reading = asyncio.create_task(api._read("va", open_one, requests()))
        await asyncio.sleep(0.05)
        assert len(taken) == 2 and not reading.done()
        job.mailbox.backlog = 0
        await asyncio.wait_for(reading, 20)
        assert len(taken) == 5

    asyncio.run(play())


def test_what_is_queued_in_one_turn_goes_in_one_message_and_large_frames_alone():
    async def play():
        found = SiteSession(SimpleNamespace(name="va", fingerprint="f0", serial="1"))
        sent = found.messages()
        small = [frames.Ping(number) for number in range(MOST_TOGETHER + 2)]
        large = frames.Record("job", bytes(TOGETHER))
        for frame in (*small, large, small[0]):
            found.put(frame)
        assert read(await anext(sent)) == small[:MOST_TOGETHER]
        assert read(await anext(sent)) == small[MOST_TOGETHER:]
        assert read(await anext(sent)) == [large]
        assert read(await anext(sent)) == [small[0]]
        found.put(small[1])
        found.end(frames.Goodbye("stopping"))
        assert [read(data) async for data in sent] == [[small[1], frames.Goodbye("stopping")]]
        assert found.waiting == 0

    asyncio.run(play())


def test_a_frame_that_can_wait_goes_with_the_next_one_or_alone_a_little_later():
    async def play():
        found = SiteSession(SimpleNamespace(name="va", fingerprint="f0", serial="1"))
        sent, receipt = found.messages(), frames.UploadReceipt(b"d" * 32, 0, complete=True)
        found.put_soon(receipt)
        assert found.out.empty()
        found.put(frames.Ping(1))
        assert read(await anext(sent)) == [receipt, frames.Ping(1)]
        began = asyncio.get_running_loop().time()
        found.put_soon(receipt)
        assert read(await anext(sent)) == [receipt]
        assert asyncio.get_running_loop().time() - began >= 0.9 * SOON_SECONDS
        found.put_soon(receipt)
        found.end(None)
        assert [read(data) async for data in sent] == [[receipt]]

    asyncio.run(play())


def test_a_site_sends_together_what_stands_in_its_queue():
    class Stream:
        sent: list[bytes] = []  # noqa: RUF012

        async def write(self, data):
            self.sent.append(data)

    async def play():
        out = asyncio.Queue()
        writing = asyncio.create_task(session.send_frames(Stream(), out))
        for frame in (*SEEN, frames.Record("job", bytes(TOGETHER))):
            out.put_nowait(pack(frame))
        while len(Stream.sent) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        writing.cancel()
        assert Stream.sent == [
            b"".join(map(pack, SEEN)),
            pack(frames.Record("job", bytes(TOGETHER))),
        ]

    asyncio.run(play())
