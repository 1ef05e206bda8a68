"""The rate of a site's transfers: exact arithmetic on a given clock, hours, and a real upload that is slower."""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from fedcore_clients.config import read_config
from fedcore_clients.policy_file import read_policy
from fedcore_clients.rate import Pace, TokenBucket, limit_text
from fedcore_clients.resources import MachineSection
from fedcore_clients.session import Session
from hypothesis import given
from hypothesis import strategies as st
from support.federations import new_federation, now
from support.live_sessions import coordinator, joined, until

from fedcore.errors import BadInput
from fedcore.identity.kit import Kit
from fedcore.store import container
from fedcore.wire import frames

SECOND = 1_000_000_000
CHUNK, SIZE = 1 << 16, 1 << 19
MONDAY = datetime(2026, 11, 30, 12, 0, tzinfo=UTC)


def test_a_full_bucket_lets_its_burst_pass_and_then_each_byte_takes_its_time():
    bucket = TokenBucket(1000, now=0)
    assert bucket.take(1000, 8000, 0) == 0
    assert bucket.take(500, 8000, 0) == SECOND // 2  # 500 bytes at 1000 a second
    assert bucket.take(250, 8000, SECOND // 2) == SECOND // 4
    assert bucket.take(250, 8000, 3 * SECOND // 4) == SECOND // 4
    assert bucket.take(0, 8000, SECOND) == 0
    assert bucket.take(1, 8000, SECOND) == SECOND // 1000


def test_what_is_asked_for_while_others_wait_waits_behind_them():
    bucket = TokenBucket(0, now=0)
    assert [bucket.take(100, 800, 0) for _ in range(3)] == [SECOND, 2 * SECOND, 3 * SECOND]


def test_a_pause_saves_up_the_burst_and_no_more():
    bucket = TokenBucket(1000, now=0)
    bucket.take(1000, 8000, 0)
    assert bucket.take(1001, 8000, 3600 * SECOND) == SECOND // 1000


def test_a_wait_is_rounded_up_and_nothing_is_lost_by_rounding():
    bucket = TokenBucket(1, now=0)
    bucket.take(1, 3, 0)
    assert bucket.take(1, 3, 0) == 2_666_666_667  # 8/3 s, in whole nanoseconds
    assert bucket.take(2, 3, 2_666_666_667) == 5_333_333_333


def test_a_clock_that_stands_or_runs_back_gives_nothing():
    bucket = TokenBucket(0, now=SECOND)
    assert bucket.take(1, 8, 0) == SECOND
    assert bucket.take(0, 8, SECOND) == SECOND


@given(
    st.integers(1, 10**9),
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, SECOND)), max_size=30),
)
def test_no_sender_that_waits_exceeds_rate_and_burst(rate, burst, asked):
    """By any moment at most burst + rate x time has gone, and one byte more would have been too much."""
    bucket, now, sent = TokenBucket(burst, now=0), 0, 0
    for size, pause in asked:
        now += pause
        delay = bucket.take(size, rate, now)
        now += delay
        sent += size
        assert 8 * sent * SECOND <= 8 * burst * SECOND + rate * now
        if delay:
            assert bucket.take(0, rate, now - 1) > 0  # it could not have been sooner
            bucket.take(0, rate, now)


# ------------------------------------------------------------------------------------------- hours


def test_a_limit_holds_within_its_hours():
    rules = MachineSection(max_mbit=5, max_mbit_hours="mon-fri 08:00-18:00")

    def rate(hour, day=30):
        return Pace(lambda: rules, now=lambda: MONDAY.replace(hour=hour, day=day)).rate

    assert (rate(7), rate(8), rate(17), rate(18)) == (None, 5_000_000, 5_000_000, None)
    assert rate(12, day=29) is None  # a Sunday
    assert Pace(lambda: MachineSection(max_mbit=0.5)).rate == 500_000
    assert Pace().rate is None
    texts = [limit_text(rules, MONDAY.replace(hour=hour)) for hour in (12, 19)]
    assert texts == [
        "at most 5 Mbit/s each way, mon-fri 08:00-18:00",
        "no limit now; at most 5 Mbit/s each way from Tue 01 Dec 08:00 UTC",
    ]
    assert limit_text(MachineSection(max_mbit=5), MONDAY) == "at most 5 Mbit/s each way, always"
    assert limit_text(MachineSection(), MONDAY) == ""


def test_the_log_tells_when_a_limit_begins_and_ends(caplog):
    rules, moments = [MachineSection(max_mbit=100)], iter([0] * 9)
    pace = Pace(lambda: rules[0], clock=lambda: next(moments))

    async def play():
        await pace.sent(10)
        await pace.sent(10)
        rules[0] = MachineSection()
        await pace.sent(10)

    with caplog.at_level(logging.INFO):
        asyncio.run(play())
    assert [each.message for each in caplog.records] == [
        "transfers: at most 100 Mbit/s each way, always", "transfers: no limit any more",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_mbit = 0.01", "max_mbit: found 0.01, expected greater than or equal to 0.1"),
        ("max_mbit = 5\nmax_mbit_hours = 'always'", "max_mbit_hours: found 'always', expected days and times such as"),
        ("max_mbit_hours = '08:00-18:00'", "expected max_mbit beside max_mbit_hours"),
    ],
)  # fmt: skip
def test_a_limit_that_is_mistyped(tmp_path, text, words):
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(BadInput) as caught:
        read_policy(tmp_path / "policy.toml")
    assert words in str(caught.value)


# --------------------------------------------------------------------------------- a real transfer


class Open:
    """A gate that lets every upload pass."""

    def upload(self, *_):
        return True


def test_a_limited_upload_is_slower_than_an_unlimited_one(tmp_path):
    """512 KiB at 4 Mbit/s: 0.92 s after the burst. No bound from above: the machine may be busy."""
    rules = [MachineSection()]
    files = new_federation(tmp_path / "federation")
    folder = joined(files, tmp_path / "va")
    arrived = []
    job = SimpleNamespace(
        expects=lambda *_: True, arrived=lambda *about: arrived.append(about),
        facts=SimpleNamespace(outcome="done"),
    )  # fmt: skip

    async def sent(session, salt):
        chunks = [salt + bytes(CHUNK)] * (SIZE // CHUNK)
        path = tmp_path / salt.hex()
        path.write_bytes(container.to_bytes(chunks))
        begun = time.monotonic()
        await session.upload("job", salt * 32, container.vector_digest(chunks), path)
        return path.stat().st_size / (time.monotonic() - begun)

    async def scene():
        async with coordinator(files, now, tmp_path) as hub:
            kit, config = Kit.load(folder / "kit"), read_config(folder / "site.toml")
            session = Session(
                kit, config, lambda: frames.Hello(files.roster().digest), lambda _: None,
                lambda: None, Open(), pace=Pace(lambda: rules[0]),
            )  # fmt: skip
            running = asyncio.get_running_loop().create_task(session.run())
            try:
                await until(lambda: session.since is not None)
                hub.jobs["job"] = job
                free = await sent(session, b"a")
                rules[0] = MachineSection(max_mbit=4)
                return free, await sent(session, b"b")
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

    free, limited = asyncio.run(scene())
    assert len(arrived) == 2
    assert 8 * limited < 4_000_000 * SIZE / (SIZE - Pace.BURST) * 1.01  # and the containers' frames
    assert limited < free / 2
