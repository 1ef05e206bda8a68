"""A large sum is asked for before it exists, and opened while it comes: what a round waits for on a slow line."""

from __future__ import annotations

import asyncio
import threading
from itertools import pairwise
from types import SimpleNamespace

import pytest
from fedcore_clients.channel import Offline
from fedcore_clients.chunk_stream import read_on_the_way
from fedcore_clients.config import read_config
from fedcore_clients.session import Session
from fedcore_server.announced_sums import AnnouncedSums
from hypothesis import given
from hypothesis import strategies as st
from support.federations import new_federation, now
from support.live_sessions import coordinator, joined, until

from fedcore.errors import BadInput
from fedcore.identity.kit import Kit
from fedcore.store import container
from fedcore.store.spool import Spool
from fedcore.wire import frames

HEADER, OTHER = b"h" * 32, b"o" * 32
CHUNKS = [bytes([place]) * 700_000 for place in range(3)]


class Job:
    """A job of the coordinator with a round under way. asked: what every download asked for, in order."""

    def __init__(self, folder):
        self.announced, self.asked = AnnouncedSums(), []
        self.stored = Spool(folder).put("job", "sum", CHUNKS)
        self.facts = SimpleNamespace(outcome="done")

    def in_round(self, _, header):
        self.asked.append(frames.SUM_OF_ROUND)
        return header == HEADER

    def download(self, _, what, digest):
        if what == frames.SUM:
            self.asked.append(what)
        return self.stored if digest == self.stored.digest else None

    @property
    def waits(self):
        return bool(self.announced._waiting)


@pytest.fixture(scope="module")
def joined_site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    files = new_federation(folder / "federation")
    return files, joined(files, folder / "va")


def play(joined_site, tmp_path, act):
    """Run act(session, job) with a session over gRPC."""
    files, folder = joined_site

    async def scene():
        async with coordinator(files, now, tmp_path) as hub:
            kit, config = Kit.load(folder / "kit"), read_config(folder / "site.toml")
            session = Session(
                kit, config, lambda: frames.Hello(files.roster().digest), lambda _: None,
                lambda: None, None,
            )  # fmt: skip
            running = asyncio.get_running_loop().create_task(session.run())
            try:
                await until(lambda: session.since is not None)
                hub.jobs["job"] = job = Job(tmp_path / "sums")
                await act(session, job)
                return job
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

    return asyncio.run(scene())


async def downloaded(session, job, of=HEADER):
    found = []

    def take(place, chunk):
        assert place == len(found)
        found.append(chunk)

    await session.download("job", frames.SUM, job.stored.digest, take, of)
    return found


def test_a_sum_that_was_asked_for_comes_with_its_announcement_and_no_further_request(
    joined_site, tmp_path
):
    async def act(session, job):
        session.expect_sum("job", HEADER)
        await until(lambda: job.waits)
        reading = asyncio.create_task(downloaded(session, job))
        await asyncio.sleep(0.05)
        assert not reading.done(), "nothing of a sum before its announcement"
        job.announced.announce("va", HEADER, job.stored)
        assert await reading == CHUNKS

    assert play(joined_site, tmp_path, act).asked == [frames.SUM_OF_ROUND]


def test_a_request_that_comes_after_the_announcement_is_answered_at_once(joined_site, tmp_path):
    async def act(session, job):
        job.announced.announce("va", HEADER, job.stored)
        session.expect_sum("job", HEADER)
        assert await downloaded(session, job) == CHUNKS

    assert play(joined_site, tmp_path, act).asked == [frames.SUM_OF_ROUND]


async def _round_over(session, job):
    session.expect_sum("job", HEADER)
    await until(lambda: job.waits)
    job.announced.over()


async def _of_no_round(session, job):
    session.expect_sum("job", OTHER)


async def _another_sum(session, job):
    session.expect_sum("job", HEADER)
    await until(lambda: job.waits)
    job.announced.announce("va", HEADER, Spool(job.stored.path.parent).put("job", "b", [b"x"] * 2))


@pytest.mark.parametrize(
    ("before", "of"), [(_round_over, HEADER), (_of_no_round, OTHER), (_another_sum, HEADER)]
)
def test_where_the_first_request_brings_no_sum_a_second_one_does(joined_site, tmp_path, before, of):
    async def act(session, job):
        await before(session, job)
        assert await downloaded(session, job, of) == CHUNKS

    assert play(joined_site, tmp_path, act).asked == [frames.SUM_OF_ROUND, frames.SUM]


def test_a_sum_of_another_round_is_not_taken_from_an_earlier_request(joined_site, tmp_path):
    async def act(session, job):
        session.expect_sum("job", HEADER)
        await until(lambda: job.waits)
        assert await downloaded(session, job, OTHER) == CHUNKS

    assert play(joined_site, tmp_path, act).asked == [frames.SUM_OF_ROUND, frames.SUM]


def test_a_site_waits_once_and_only_for_what_is_announced_to_it():
    async def scene():
        sums, stored = AnnouncedSums(), object()
        first = asyncio.create_task(sums.wait("a", HEADER))
        await asyncio.sleep(0)
        second = asyncio.create_task(sums.wait("a", HEADER))
        assert await first is None, "the second request takes the place of the first"
        sums.announce("b", HEADER, stored)
        await asyncio.sleep(0)
        assert not second.done(), "announced to another site"
        sums.announce("a", OTHER, stored)
        assert await second is None, "of another round"
        third = asyncio.create_task(sums.wait("a", HEADER))
        await asyncio.sleep(0)
        sums.announce("a", HEADER, None)
        assert await third is None, "a sum that this machine does not have"
        fourth = asyncio.create_task(sums.wait("a", HEADER))
        await asyncio.sleep(0)
        sums.announce("a", HEADER, stored)
        assert await fourth is stored
        assert await sums.wait("a", HEADER) is stored
        sums.over()
        fifth = asyncio.create_task(sums.wait("a", HEADER))
        await asyncio.sleep(0)
        assert not fifth.done(), "what was announced before is of a round that is over"
        fifth.cancel()
        await asyncio.gather(fifth, return_exceptions=True)
        sums.over()

    asyncio.run(scene())


# ------------------------------------------------------------------------- chunk by chunk


@given(st.lists(st.binary(max_size=40), max_size=6), st.lists(st.integers(0, 300), max_size=8))
def test_a_container_in_parts_of_any_length_gives_its_chunks(chunks, cuts):
    data, reader, found = container.to_bytes(chunks), container.ChunkReader(), []
    bounds = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    for begin, end in pairwise(bounds):
        found += reader.take(data[begin:end])
    reader.end()
    assert found == chunks


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x00\x00", container.to_bytes([b"a", b"b"])[:-1], container.to_bytes([b"a"]) + b"c",
        b"\x00\x00\x00\x01\xff\xff\xff\xff",
    ],
)  # fmt: skip
def test_what_is_no_whole_container_is_refused(data):
    def read():
        reader = container.ChunkReader()
        reader.take(data)
        reader.end()

    with pytest.raises(BadInput, match="no chunk container"):
        read()


@pytest.mark.parametrize("broken", [False, True])
def test_a_large_sum_is_read_while_it_comes(broken):
    """The next chunk comes only once the one before it was read, also where the download breaks off in between and
    passes again what had come."""
    read = []

    def reader(chunks):
        read.extend(chunks)
        return len(read)

    async def download(each):
        for upto in (range(2), range(3)) if broken else (range(3),):
            for place in upto:
                each(place, CHUNKS[place])
                await until(lambda place=place: len(read) > place)

    assert asyncio.run(read_on_the_way(download, reader)) == 3
    assert read == CHUNKS


@pytest.mark.parametrize("kind", [Offline, ZeroDivisionError])
def test_a_download_that_fails_ends_the_thread_that_reads(kind):
    ended = threading.Event()

    def reader(chunks):
        try:
            return list(chunks)
        finally:
            ended.set()

    async def download(each):
        each(0, CHUNKS[0])
        raise kind

    with pytest.raises(kind):
        asyncio.run(read_on_the_way(download, reader))
    assert ended.is_set()


def test_what_the_reader_raises_is_raised():
    async def download(each):
        for place, chunk in enumerate(CHUNKS):
            each(place, chunk)

    def reader(chunks):
        next(iter(chunks))
        raise BadInput("of a chunk")

    with pytest.raises(BadInput, match="of a chunk"):
        asyncio.run(read_on_the_way(download, reader))
