"""Certificates that do not count (any more): refused in one word, which the trails of both ends have."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import grpc
import pytest
from fedcore_clients import joining, session

from fedcore.audit.keys import SiteSigner
from fedcore.audit.trail import AuditTrail
from fedcore.errors import Refused
from fedcore.identity.authority import Authority
from fedcore.identity.signed_roster import SignedRoster
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.wire import frames
from tests.support.federations import authority_of, now
from tests.support.live_sessions import coordinator, recorded, site_process, until


@pytest.fixture
def trail(tmp_path):
    with AuditTrail.open(tmp_path / "hub", SiteSigner(IdentityKey()), {}) as found:
        yield found


def words(folder):
    return [facts["word"] for facts in recorded(folder, "refused")]


@pytest.mark.parametrize("word", ["expired", "revoked"])
def test_a_session_ends_with_the_word_of_its_certificate(files, va, tmp_path, trail, word):
    clock = [now()]

    async def play():
        async with (
            coordinator(files, lambda: clock[0], tmp_path, audit=trail) as hub,
            site_process(va) as (site, running),
        ):
            await until(lambda: site.session.since)
            hub.sessions.check(None)
            assert not running.done(), "control: the certificate counts"
            if word == "expired":
                clock[0] += timedelta(days=91)
            else:
                files.revoke("va")
            for _ in range(2):  # one line, however often it is looked at
                hub.sessions.check(None)
            await asyncio.wait([running])
            with pytest.raises(Refused, match=rf"\({word}: ") as caught:
                running.result()
            assert caught.value.remedy

    asyncio.run(play())
    assert words(va / "state") == [word]
    assert words(tmp_path / "hub") == [word]
    (line,) = recorded(tmp_path / "hub", "refused")
    assert line["site"] == "va"


def test_a_site_that_starts_with_a_revoked_certificate_ends_with_one_line(
    files, va, tmp_path, trail
):
    files.revoke("va")

    async def play():
        async with (
            coordinator(files, now, tmp_path, audit=trail),
            site_process(va) as (site, running),
        ):
            await asyncio.wait([running], timeout=60)
            assert site.session.since is None
            with pytest.raises(Refused, match=r"\(revoked: .*withdrawn") as caught:
                running.result()
            assert "\n" not in str(caught.value) and "new certificate" in caught.value.remedy
            assert caught.value.exit_code != 0

    asyncio.run(play())
    assert words(va / "state") == ["revoked"]
    assert words(tmp_path / "hub") == ["revoked"]


def test_a_site_that_is_not_on_the_roster_yet_tries_again(files, va, tmp_path, trail):
    """A refusal that can pass."""
    known = dict(files.roster().sites)

    def write(number, sites):
        made = SignedRoster("heart", number, now().replace(microsecond=0), sites)
        files.config.roster.write_bytes(made.sign(authority_of(files)).to_toml())

    write(3, {"vb": IdentityKey().public})

    async def play():
        async with (
            coordinator(files, now, tmp_path, audit=trail) as hub,
            site_process(va) as (site, running),
        ):
            await until(lambda: words(tmp_path / "hub") == ["roster"])
            assert not running.done()
            write(4, known)
            hub.refresh_roster()
            await until(lambda: site.session.since)

    asyncio.run(play())


def test_nobody_but_the_coordinator_can_end_a_site(files, va, tmp_path):
    """Somebody on the way answers for the coordinator, with the very refusal that would end the site."""
    files.revoke("va")
    impostor = Authority.create("heart", now())
    kit = impostor.issue("coordinator", "hub", now(), hosts=["localhost"]).save(tmp_path / "kit")

    async def play():
        async with coordinator(files, now, tmp_path, kit=kit), site_process(va) as (site, running):
            await until(lambda: recorded(va / "state", "refused"))
            tried = site.session._turn
            await until(lambda: site.session._turn > tried + 2)
            assert site.session.since is None and not running.done()

    asyncio.run(play())
    assert "revoked" not in words(va / "state")


@pytest.mark.parametrize(
    ("status", "details", "ends"),
    [
        ("PERMISSION_DENIED", "revoked\nfound it withdrawn\nask", True),
        ("PERMISSION_DENIED", "roster\nfound no such site\nask", False),
        ("PERMISSION_DENIED", "Received http2 header with status: 403", False),
        ("PERMISSION_DENIED", "", False),
        ("UNAVAILABLE", "revoked\nfound it withdrawn\nask", False),
    ],
)
def test_only_the_coordinators_own_word_is_final(status, details, ends):
    """A proxy's 403 has the same status."""
    metadata = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(grpc.StatusCode[status], metadata, metadata, details)
    assert (session.final(error) is not None) == ends


def test_a_coordinator_of_another_authority_is_named_in_the_trail(files, va, tmp_path):
    """It answers at the address; nothing but a handshake is sent to it."""
    impostor = Authority.create("heart", now())
    kit = impostor.issue("coordinator", "hub", now(), hosts=["localhost"]).save(tmp_path / "kit")

    async def play():
        async with coordinator(files, now, tmp_path, kit=kit), site_process(va) as (site, _):
            await until(lambda: recorded(va / "state", "refused"))
            assert site.session.since is None

    asyncio.run(play())
    assert words(va / "state") == ["issuer"]


@pytest.mark.parametrize("word", ["signature", "older"])
def test_a_roster_that_a_site_refuses_is_in_the_trails_of_both_ends(
    files, va, tmp_path, trail, word
):
    """Of another authority, or older than the one that the site has seen."""
    number, authority = (9, Authority.create("heart", now())) if word == "signature" else (1, None)
    sites = {"va": files.roster().sites["va"]}
    made = SignedRoster("heart", number, now().replace(microsecond=0), sites)
    document = made.sign(authority or authority_of(files)).to_toml()

    async def play():
        async with (
            coordinator(files, now, tmp_path, audit=trail) as hub,
            site_process(va) as (site, _),
        ):
            await until(lambda: site.session.since)
            hub.sessions.open["va"].put(frames.Roster(document))
            await until(lambda: recorded(tmp_path / "hub", "refused"))
            assert site.context.rosters.current.number == 2, "the one before stays in force"

    asyncio.run(play())
    (here,), (there,) = recorded(va / "state", "refused"), recorded(tmp_path / "hub", "refused")
    assert (here["what"], here["why"]) == ("roster", word)
    assert (there["what"], there["why"], there["site"]) == ("roster", word, "va")


def test_a_renewed_certificate_is_taken_after_the_old_one_has_expired(files, va):
    """`fed-site join --answer`, as the hint says."""
    answer = files.renew("va", None, authority_of(files), now() + timedelta(days=91))
    assert joining.renewed(va, answer, now() + timedelta(days=91)).until > now() + timedelta(
        days=170
    )
