"""A second process with a site's certificate and keys: a copy of its folder, or what a thief has of it.

Both ends are real: gRPC, TLS, journals and audit trails; the copy is of every file of the running site.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from types import SimpleNamespace

import grpc.aio
import pytest
from fedcore_clients.channel import call_unary, open_channel
from fedcore_clients.config import read_config
from fedcore_clients.status import status_lines
from fedcore_server.federation_views import sites_rows
from fedcore_server.sessions import Sessions

from fedcore.audit.keys import SiteSigner
from fedcore.audit.seldom import MOST
from fedcore.audit.trail import AuditTrail
from fedcore.errors import BadInput, Refused, StoreProblem
from fedcore.identity.join_messages import make_csr
from fedcore.identity.kit import Kit, read_key
from fedcore.results import JobSite
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.store import container
from fedcore.wire import calls, frames
from fedcore.wire.limits import INLINE, PART
from fedcore.wire.refusals import told
from tests.support.federations import now
from tests.support.live_sessions import coordinator, recorded, site_process, until

HERE = "127.0.0.1"


def copied(folder, to):
    shutil.copytree(folder, to)
    return to


@contextlib.asynccontextmanager
async def stream(folder, hello):
    """A session of this folder's site of which the test writes and reads every frame: it answers no ping."""
    config, kit = read_config(folder / "site.toml"), Kit.load(folder / "kit")
    async with open_channel(kit, *config.addresses[0]) as channel:
        found = channel.stream_stream(calls.SESSION.path)()
        await found.write(calls.SESSION.takes.pack(hello))
        yield found


async def next_of(found, *kinds):
    """The next message's first frame of these kinds."""
    async with asyncio.timeout(20):
        while True:
            data = await found.read()
            for frame in calls.SESSION.gives.unpack_each(data, sender="coordinator"):
                if isinstance(frame, kinds):
                    return frame


# ------------------------------------------------------------------------------------------ the attack


def test_a_copy_is_refused_while_the_site_runs_and_both_are_told(files, va, tmp_path, caplog):
    hub_trail = AuditTrail.open(tmp_path / "hub", SiteSigner(IdentityKey()), {})

    async def play():
        async with (
            coordinator(files, now, tmp_path, audit=hub_trail) as hub,
            site_process(va) as (site, running),
        ):
            await until(lambda: site.session.since)
            async with site_process(copied(va, tmp_path / "copy")) as (copy, refused):
                await until(lambda: copy.session.since or refused.done())
                with pytest.raises(
                    Refused, match=f"cloned: another .* as va from {HERE} since"
                ) as e:
                    refused.result()
                assert "revoke this site, and join again with new keys" in e.value.remedy
            await until(lambda: site.second.text)
            assert site.session.since and not running.done()
            assert any(f"from {HERE}" in line for line in status_lines(site.status()))
            assert hub.sessions.counts.cloned == 1
            (row,) = sites_rows(
                files, {n: JobSite.from_json(s) for n, s in hub.sites(None).items()}
            )
            assert row["connected"] and f"second process from {HERE}" in row["second"]

    with hub_trail:
        asyncio.run(play())
    assert "site va: refused a second process" in caplog.text
    (at_hub,) = recorded(tmp_path / "hub", "refused")
    assert (at_hub["word"], at_hub["site"], at_hub["address"]) == ("cloned", "va", HERE)
    (at_site,) = recorded(va / "state", "refused")
    assert (at_site["word"], at_site["address"]) == ("cloned", HERE)
    (at_copy,) = recorded(tmp_path / "copy" / "state", "refused")
    assert at_copy["word"] == "cloned" and "another process" in at_copy["text"]


@pytest.mark.parametrize("rule", ["on", "off"])
def test_a_copy_gets_no_certificate_while_the_site_runs(files, va, tmp_path, without, rule):
    """It could be for a key of its own, and outlive the discovery."""
    if rule == "off":
        without(Sessions, _of_another_process=lambda *_: False)
    asked = frames.RenewRequest(make_csr("va", read_key(va / "kit" / "key.pem")))

    async def play():
        async with coordinator(files, now, tmp_path), site_process(va) as (site, _):
            await until(lambda: site.session.since)
            config, kit = read_config(va / "site.toml"), Kit.load(va / "kit")
            async with open_channel(kit, *config.addresses[0]) as channel:
                try:
                    found = await call_unary(channel, calls.RENEW, asked, 20)
                except grpc.aio.AioRpcError as error:
                    found = str(told(error.code().name, error.details()))
            own = await site.session.ask(calls.RENEW, asked)
            assert isinstance(own, frames.RenewReply), "control: the site itself"
            if rule == "off":
                assert isinstance(found, frames.RenewReply)
            else:
                assert f"a call from {HERE} outside of its session" in found

    asyncio.run(play())


class JobThatWaits:
    """A job over real files: it waits for any upload, and has one checkpoint. taken: what came, by site."""

    def __init__(self, checkpoint):
        self.checkpoint, self.taken = checkpoint, {}
        self.facts = SimpleNamespace(outcome="released", sites={})

    def expects(self, *_):
        return True

    def download(self, *_):
        return self.checkpoint

    def arrived(self, name, header, stored):
        self.taken[name] = stored.path.read_bytes()


def vector(*chunks):
    """A container, and the start of its upload."""
    data = container.to_bytes(chunks)
    return data, frames.UploadStart("job", bytes(32), container.vector_digest(chunks), len(data))


async def parts(start, data, between=None):
    """The frames of an upload. between: called before the last part."""
    yield calls.UPLOAD.takes.pack(start)
    yield calls.UPLOAD.takes.pack(frames.Part(data[:PART]))
    if between is not None:
        await between()
    yield calls.UPLOAD.takes.pack(frames.Part(data[PART:]))


async def transfers(channel, start, data):
    """What each transfer of a copy ends with: its answer, or the refusal in words."""

    async def downloaded():
        asked = calls.DOWNLOAD.takes.pack(frames.DownloadStart("job", "sum", start.digest))
        return b"".join([part async for part in channel.unary_stream(calls.DOWNLOAD.path)(asked)])

    found = []
    for call in (
        lambda: call_unary(channel, calls.UPLOAD_OFFSET, start, 20),
        lambda: channel.stream_unary(calls.UPLOAD.path)(parts(start, data)),
        downloaded,
    ):
        try:
            found.append(await call())
        except grpc.aio.AioRpcError as error:
            found.append(str(told(error.code().name, error.details())))
    return found


@pytest.mark.parametrize("rule", ["on", "off"])
def test_a_copy_gives_and_gets_no_vector_while_the_site_runs(files, va, tmp_path, without, rule):
    """Without a session of its own it would put a vector of its choice in the place of the site's."""
    if rule == "off":
        without(Sessions, _of_another_process=lambda *_: False)
    hub_trail = AuditTrail.open(tmp_path / "hub", SiteSigner(IdentityKey()), {})
    forged, start = vector(b"forged", bytes(PART))

    async def play():
        async with (
            coordinator(files, now, tmp_path, audit=hub_trail) as hub,
            site_process(va) as (site, running),
        ):
            checkpoint = hub.context.spool.put("job", "checkpoint", [b"a model"])
            hub.jobs["job"] = job = JobThatWaits(checkpoint)
            await until(lambda: site.session.since)
            config, kit = read_config(va / "site.toml"), Kit.load(va / "kit")
            async with open_channel(kit, *config.addresses[0]) as channel:
                found = await transfers(channel, start, forged)
                if rule == "off":
                    assert job.taken == {"va": forged} and b"a model" in found[2]
                    return
                assert all(f"a call from {HERE} outside of its session" in each for each in found)
            assert not job.taken and hub.sessions.counts.cloned == 3
            await until(lambda: site.second.text)
            assert f"second process from {HERE}" in hub.sessions.seconds["va"]
            assert site.session.since and not running.done()
            own, begun = vector(b"the site's own", bytes(INLINE))
            (tmp_path / "own").write_bytes(own)
            await site.session._transfers.upload(begun, tmp_path / "own")  # control: the same call
            assert job.taken == {"va": own}

    with hub_trail:
        asyncio.run(play())
    if rule == "on":
        lines = recorded(tmp_path / "hub", "refused")
        assert {line["call"] for line in lines} == {"Upload", "UploadOffset", "Download"}
        assert {line["word"] for line in lines} == {"cloned"}


@pytest.mark.parametrize("how", ["the site comes back", "revoked", "evicted"])
def test_a_transfer_under_way_ends_when_it_may_not_go_on(files, va, tmp_path, how):
    """A thief's that began while the site was away; and that of a site which was sent away."""
    data, start = vector(b"forged", bytes(PART))

    async def play():
        async with (
            coordinator(files, now, tmp_path) as hub,
            contextlib.AsyncExitStack() as opened,
        ):
            hub.jobs["job"] = job = JobThatWaits(None)

            async def change():
                await until(lambda: list((tmp_path / "spool").rglob("part-*")))
                if how == "revoked":
                    files.revoke("va")
                elif how == "evicted":
                    hub.sessions.evict("va", undo=False)
                else:
                    site, _ = await opened.enter_async_context(site_process(va))
                    await until(lambda: site.session.since)

            config, kit = read_config(va / "site.toml"), Kit.load(va / "kit")
            async with open_channel(kit, *config.addresses[0]) as channel:
                upload = channel.stream_unary(calls.UPLOAD.path)
                with pytest.raises(grpc.aio.AioRpcError):
                    await upload(parts(start, data, change))
            assert not job.taken and hub.sessions.counts.cloned == 0

    asyncio.run(play())


def test_one_that_comes_again_and_again_fills_no_log_and_counts_each_time(
    files, va, tmp_path, caplog
):
    hub_trail = AuditTrail.open(tmp_path / "hub", SiteSigner(IdentityKey()), {})

    async def play():
        async with (
            coordinator(files, now, tmp_path, audit=hub_trail) as hub,
            site_process(va) as (site, _),
        ):
            await until(lambda: site.session.since)
            for number in range(2 * MOST):
                hub.sessions.refused("Submit", BadInput(f"job {number}"), "BadInput")
            for _ in range(4):
                hello = frames.Hello(hub.context.rosters.current.digest)
                async with stream(va, hello) as copy:
                    assert (await next_of(copy, frames.Goodbye)).code == "cloned"
            await until(lambda: site.second.text)
            assert hub.sessions.counts.cloned == 4

    with hub_trail:
        asyncio.run(play())
    cloned = [line for line in recorded(tmp_path / "hub", "refused") if line["word"] == "cloned"]
    assert len(cloned) == 1, "also beside a flood of other refusals"
    assert caplog.text.count("refused a second process") == 1


def test_without_the_rule_a_copy_takes_the_place_of_the_running_site(files, va, tmp_path, without):
    async def let_in(*_):
        return None

    without(Sessions, second=let_in)

    async def play():
        async with coordinator(files, now, tmp_path), site_process(va) as (site, running):
            await until(lambda: site.session.since)
            async with site_process(copied(va, tmp_path / "copy")) as (copy, _):
                await until(lambda: copy.session.since and running.done())

    asyncio.run(play())


def test_a_second_process_on_one_folder_is_refused_before_it_connects(va):
    async def play():
        async with site_process(va):
            with pytest.raises(StoreProblem, match=r"found process .* using it"):
                async with site_process(va):
                    pass

    asyncio.run(play())


# ------------------------------------------------------------------------------------------ honest returns


def test_a_site_whose_connection_is_dead_comes_back(files, va, tmp_path):
    """Its machine lost power: nothing closed the connection, and nothing answers there."""

    async def play():
        async with coordinator(files, now, tmp_path) as hub:
            hub.sessions.probe_seconds = 0.05
            async with stream(va, frames.Hello(hub.context.rosters.current.digest)) as dead:
                await next_of(dead, frames.Welcome)
                async with site_process(va) as (site, running):
                    await until(lambda: site.session.since)
                    assert (await next_of(dead, frames.Goodbye)).code == "replaced"
                    assert hub.sessions.counts.cloned == 0 and not running.done()

    asyncio.run(play())


def test_a_process_that_reconnects_is_let_in_at_once(files, va, tmp_path):
    """A connection that broke on one side only: the process is the same, and is not asked for an answer."""

    async def play():
        async with coordinator(files, now, tmp_path) as hub:
            hello = frames.Hello(hub.context.rosters.current.digest)
            async with stream(va, hello) as first, stream(va, hello) as second:
                assert {type(await next_of(s, frames.Welcome)) for s in (first, second)}
                await until(lambda: hub.sessions.counts.sessions == 2)
                assert hub.sessions.counts.cloned == 0

    asyncio.run(play())


def test_of_two_that_come_while_a_connection_is_dead_one_is_let_in(files, va, tmp_path):
    async def play():
        async with coordinator(files, now, tmp_path) as hub:
            hub.sessions.probe_seconds = 0.5
            async with stream(va, frames.Hello(hub.context.rosters.current.digest)) as dead:
                await next_of(dead, frames.Welcome)
                async with (
                    site_process(copied(va, tmp_path / "copy")) as (one, first),
                    site_process(va) as (two, second),
                ):
                    await until(lambda: first.done() or second.done())
                    await until(lambda: one.session.since or two.session.since)
                    assert first.done() != second.done()
                    assert hub.sessions.counts.cloned == 1

    asyncio.run(play())


def test_a_site_that_ended_without_a_word_comes_back(files, va, tmp_path):
    """What the coordinator sees of `kill -9`: the system closes the connection. Then nothing is asked."""

    async def play():
        async with coordinator(files, now, tmp_path) as hub:
            hub.sessions.probe_seconds = 1e6
            async with site_process(va) as (site, running):
                await until(lambda: site.session.since)
                site.session.goodbye = lambda *_: asyncio.sleep(0)
                running.cancel()
            async with site_process(va) as (site, running):
                await until(lambda: site.session.since)
                assert hub.sessions.counts.cloned == 0

    asyncio.run(play())
