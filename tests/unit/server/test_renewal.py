"""Certificates renewed while both ends run, over real gRPC; and by files."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from fedcore_clients import joining
from fedcore_clients.cli import main
from fedcore_clients.config import read_config
from fedcore_clients.next_key import NEXT_CERTIFICATE, NEXT_KEY, finish
from fedcore_clients.renewal import Renewal
from fedcore_clients.session import Session

from fedcore.errors import BadInput, CertificateRefused, Refused, RosterRefused
from fedcore.identity.authority import Authority
from fedcore.identity.join_messages import JoinRefused, check_own, make_csr
from fedcore.identity.kit import Kit, read_key
from fedcore.identity.peer import peer_of
from fedcore.wire import calls, frames
from tests.support.federations import authority_of, now
from tests.support.live_sessions import coordinator, until

LATER = timedelta(days=80)


@contextlib.asynccontextmanager
async def site(folder, roster, busy=lambda: False, noted=None):
    """A site's session and its renewal. noted: what it records."""
    noted = [] if noted is None else noted
    config, kit = read_config(folder / "site.toml"), Kit.load(folder / "kit")
    hello = frames.Hello(roster.digest)
    session = Session(kit, config, lambda: hello, lambda _: None, lambda: None, None)
    running = asyncio.get_running_loop().create_task(session.run())
    try:
        yield (
            session,
            Renewal(kit, session, busy, lambda *event, **facts: noted.append((*event, facts))),
        )
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def serial(folder):
    return peer_of((folder / "kit" / "certificate.pem").read_bytes()).serial


def shorten(files, folder, days):
    """Give a site a certificate that ends after so many days."""
    usual = files.config
    short = usual.enrolment.model_copy(update={"certificate_days": days})
    files.config = usual.model_copy(update={"enrolment": short})
    joining.renewed(folder, files.renew("va", None, authority_of(files), now()), now())
    files.config = usual


def test_a_site_renews_its_certificate_in_its_session(files, va, tmp_path):
    shorten(files, va, 2 / 1440)
    noted = []

    async def play():
        async with (
            coordinator(files, now, tmp_path) as hub,
            site(va, files.roster(), noted=noted) as (session, renewal),
        ):
            await until(lambda: session.since is not None)
            first = serial(va)
            await renewal.step(now())
            assert serial(va) != first
            await renewal.step(now())  # the new one is taken into use
            await until(
                lambda: (new := hub.sessions.open.get("va")) and new.peer.serial == serial(va)
            )
            assert session.refused is None

    asyncio.run(play())
    kit = Kit.load(va / "kit")
    kit.check("site", now())
    assert kit.peer.ends > now() + LATER
    assert len(files.enrolment("va").serials) == 3
    ((event, facts),) = noted
    assert (event, facts["what"], facts["serial"]) == ("key", "certificate", serial(va))


@pytest.mark.parametrize("killed", ["", "before the key", "before the certificate"])
def test_a_site_renews_its_certificate_for_a_new_key(files, va, tmp_path, capsys, killed):
    def fed_site(*words):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--config", str(va / "site.toml")])
        return ended.value.code, capsys.readouterr().out

    shorten(files, va, 2 / 1440)
    old_key, noted = read_key(va / "kit" / "key.pem"), []
    code, out = fed_site("renew")
    assert code == 0 and "for the key that it has" in out
    for _ in range(2):  # one that waits is kept
        code, out = fed_site("renew", "--new-key")
        assert code == 0 and "for a new key" in out
    waiting = read_key(va / "kit" / NEXT_KEY)

    async def play():
        async with (
            coordinator(files, now, tmp_path) as hub,
            site(va, files.roster(), noted=noted) as (session, renewal),
        ):
            await until(lambda: session.since is not None)
            peer = session.kit.peer
            await renewal.step(peer.begins + 0.49 * (peer.ends - peer.begins))
            assert serial(va) == session.kit.peer.serial
            await renewal.step(now())
            await renewal.step(now())
            await until(
                lambda: (new := hub.sessions.open.get("va")) and new.peer.serial == serial(va)
            )

    asyncio.run(play())
    new = read_key(va / "kit" / "key.pem")
    assert new.public_key() == waiting.public_key() != old_key.public_key()
    assert noted[0][1]["tls_key"] == "a new one"
    if killed:  # with both on disk, as a process does that ended in the middle
        (va / "kit" / "certificate.pem").rename(va / "kit" / NEXT_CERTIFICATE)
        if killed == "before the key":
            (va / "kit" / "key.pem").rename(va / "kit" / NEXT_KEY)
        finish(va / "kit")
    Kit.load(va / "kit").check("site", now())
    assert sorted(path.name for path in (va / "kit").iterdir()) == [
        "authority.pem", "certificate.pem", "key.pem"
    ]  # fmt: skip


def test_a_certificate_that_lasts_is_not_renewed(files, va, tmp_path):
    async def play():
        async with (
            coordinator(files, now, tmp_path),
            site(va, files.roster()) as (session, renewal),
        ):
            await until(lambda: session.since is not None)
            before = serial(va)
            await renewal.step(now())
            assert serial(va) == before

    asyncio.run(play())


def test_a_new_certificate_waits_for_the_end_of_a_round(files, va, tmp_path):
    async def play():
        busy = [True]
        async with (
            coordinator(files, now, tmp_path),
            site(va, files.roster(), lambda: busy[0]) as (session, renewal),
        ):
            await until(lambda: session.since is not None)
            before = session.kit
            joining.renewed(va, files.renew("va", None, authority_of(files), now()), now())
            await renewal.step(now())
            assert session.kit is before
            busy[0] = False
            await renewal.step(now())
            assert session.kit.peer.serial == serial(va) != before.peer.serial

    asyncio.run(play())


def test_an_authority_that_is_not_open_renews_nothing(files, va, tmp_path):
    async def play():
        async with (
            coordinator(files, now, tmp_path, open_here=False),
            site(va, files.roster()) as (session, renewal),
        ):
            await until(lambda: session.since is not None)
            before = serial(va)
            with pytest.raises(Refused, match="the authority's key not open") as caught:
                await renewal.step(now() + LATER)
            assert "renew SITE --answer FILE" in caught.value.remedy
            await renewal.step(now() + LATER)  # not again before an hour is over
            assert serial(va) == before

    asyncio.run(play())


def test_a_broken_certificate_is_not_taken_into_use(files, va, tmp_path, caplog):
    async def play():
        async with (
            coordinator(files, now, tmp_path),
            site(va, files.roster()) as (session, renewal),
        ):
            await until(lambda: session.since is not None)
            before = session.kit
            for other in (
                b"nothing",
                authority_of(files).issue("site", "va", now()).certificate_pem,
            ):
                (va / "kit" / "certificate.pem").write_bytes(other)
                await renewal.step(now())
                assert session.kit is before

    asyncio.run(play())
    assert "the certificate read before stays in use" in caplog.text


@pytest.mark.parametrize("role", ["coordinator", "operator"])
def test_an_operator_renews_coordinator_and_operator(files, role):
    folder = {"coordinator": "kit", "operator": "operator/kit"}[role]
    before = Kit.load(files.config.roster.parent / folder)
    renewed = files.renew_own(authority_of(files), ["hub.example.org"], now() + LATER, 365)
    after = Kit.load(files.config.roster.parent / folder)
    assert {peer.role for peer in renewed} == {"coordinator", "operator"}
    assert after.peer.ends > before.peer.ends
    assert after.peer.serial != before.peer.serial
    assert after.key_pem.reveal() == before.key_pem.reveal()
    assert (b"hub.example.org" in ssl.PEM_cert_to_DER_cert(after.certificate_pem.decode())) == (
        role == "coordinator"
    )


def test_a_running_coordinator_shows_its_new_certificate(files, va, tmp_path):
    async def play():
        async with coordinator(files, now, tmp_path), site(va, files.roster()) as (session, _):
            await until(lambda: session.since is not None)
            (peer,) = [
                p
                for p in files.renew_own(authority_of(files), [], now(), 30)
                if p.role == "coordinator"
            ]
            config = session._config
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(cadata=files.authority_pem.decode())
            context.load_cert_chain(va / "kit" / "certificate.pem", va / "kit" / "key.pem")
            _, writer = await asyncio.open_connection("localhost", config.port, ssl=context)
            shown = writer.get_extra_info("peercert")["serialNumber"].lower().lstrip("0")
            writer.close()
            assert shown == peer.serial
            assert session.since is not None  # the open session stays

    asyncio.run(play())


# ------------------------------------------------------------------------------------------ who may


def test_a_renewal_whose_answer_was_lost_gives_the_same_certificate(files, va):
    csr, at = make_csr("va", read_key(va / "kit" / "key.pem")), now() + LATER
    first = files.renew("va", csr, authority_of(files), at)
    assert files.renew("va", csr, authority_of(files), at).certificate == first.certificate
    assert len(files.enrolment("va").serials) == 2


def test_renewals_that_are_refused(files, va):
    authority, key = authority_of(files), ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(JoinRefused, match=r"\(name\)"):
        files.renew("va", make_csr("oslo", key), authority, now() + LATER)
    with pytest.raises(JoinRefused, match=r"\(request\)"):
        files.renew("va", b"nothing", authority, now() + LATER)
    with pytest.raises(Refused, match="in the first half of its time"):
        files.renew("va", make_csr("va", key), authority, now())
    with pytest.raises(BadInput, match="site: found 'oslo'"):
        files.renew("oslo", None, authority, now())
    files.invite("bonn", 7, now())
    with pytest.raises(Refused, match="found it invited"):
        files.renew("bonn", None, authority, now())
    files.revoke("va")
    files.sign_roster(authority, now())
    with pytest.raises(Refused, match="found it revoked"):
        files.renew("va", None, authority, now())


def test_a_site_may_renew_with_a_new_key(files, va):
    key, at = ec.generate_private_key(ec.SECP256R1()), now() + LATER
    found = files.renew("va", make_csr("va", key), authority_of(files), at)
    assert found.certificate != (va / "kit" / "certificate.pem").read_bytes()
    check_own(found.certificate, files.authority_pem, "va", key.public_key(), at)


def test_a_renewal_by_file(files, va):
    before = serial(va)
    done = joining.renewed(va, files.renew("va", None, authority_of(files), now()), now())
    assert serial(va) != before
    assert [*done.wrote] == ["kit/certificate.pem", "roster.toml"]


def test_a_file_of_another_federation_or_with_an_older_roster_changes_nothing(files, va, tmp_path):
    before, old = serial(va), files.renew("va", None, authority_of(files), now())
    files.ask(joining.begin(files.invite("oslo", 7, now())[0], tmp_path / "oslo"), now())
    files.approve("oslo", authority_of(files), now())
    newer = files.renew("va", None, authority_of(files), now())
    other = Authority.create("heart", now())
    for bad, kind in (
        (
            joining.JoinAnswer(other.certificate_pem, old.certificate, old.roster, 1),
            CertificateRefused,
        ),
        (
            joining.JoinAnswer(
                old.authority, other.issue("site", "va", now()).certificate_pem, old.roster, 1
            ),
            CertificateRefused,
        ),
    ):
        with pytest.raises(kind):
            joining.renewed(va, bad, now())
    assert serial(va) == before
    joining.renewed(va, newer, now())
    with pytest.raises(RosterRefused, match="found number 2, expected 3 or newer"):
        joining.renewed(va, old, now())


def test_the_call_is_for_sites_only():
    assert calls.RENEW.roles == {"site"}
