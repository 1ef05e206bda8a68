"""A site behind a corporate network: it joins, runs, is checked and renews its certificate through a proxy."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import ssl
import tomllib

import pytest
import tomli_w
from fedcore_clients import check, joining
from fedcore_clients.cli import main
from fedcore_clients.config import read_config
from fedcore_clients.renewal import Renewal
from fedcore_clients.sandbox import hidden
from fedcore_clients.session import Session
from fedcore_server.app import KEEPALIVE
from support.federations import new_federation, now, served
from support.live_sessions import coordinator, joined, until
from support.proxies import LOGIN, Inspector, Middle, ProxyServer

from fedcore.errors import BadInput, CertificateRefused
from fedcore.identity.kit import Kit
from fedcore.identity.peer import peer_of
from fedcore.identity.proxies import ProxySection
from fedcore.local_deployment import free_port
from fedcore.wire import calls, frames

HOST = "hub.example"
"""No name that this machine can resolve."""


@pytest.fixture
def files(tmp_path):
    return new_federation(tmp_path / "federation", host=HOST)


def rewritten(folder, **keys):
    """The settings of a site with some of them changed."""
    path = folder / "site.toml"
    tables = tomllib.loads(path.read_text()) | keys
    path.write_text(tomli_w.dumps(tables))
    return path


def joined_for(files, folder, minutes):
    """A site that has joined, with a certificate that ends so soon."""
    usual = files.config
    short = usual.enrolment.model_copy(update={"certificate_days": minutes / 1440})
    files.config = usual.model_copy(update={"enrolment": short})
    joined(files, folder)
    files.config = usual
    return folder


def secret_file(folder):
    (folder / "proxy-password").write_text(LOGIN[1])
    (folder / "proxy-password").chmod(0o600)
    return "file:proxy-password"


@contextlib.asynccontextmanager
async def site(folder, roster):
    """A site's session with its renewal."""
    config, kit = read_config(folder / "site.toml"), Kit.load(folder / "kit")
    hello = frames.Hello(roster.digest)
    session = Session(kit, config, lambda: hello, lambda _: None, lambda: None, None)
    running = asyncio.get_running_loop().create_task(session.run())
    try:
        yield session, Renewal(kit, session, lambda: False, lambda *_, **__: None)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize("kind", ["socks5", "http"])
def test_a_site_joins_through_a_proxy_and_keeps_it_in_its_settings(files, tmp_path, kind):
    folder = tmp_path / "va"
    secret = secret_file(tmp_path)
    with served(files) as received, ProxyServer(kind, files.config.enrol_port, LOGIN) as middle:
        url = f"{kind}://{LOGIN[0]}@127.0.0.1:{middle.port}"
        section = ProxySection(url=url, password=secret).placed(tmp_path, "--proxy")
        line = files.invite("va", 7, now())[0]
        assert line.host == HOST
        answer = joining.ask(line, folder, section.open(), now())
        joining.finish(folder, answer, now(), tasks=[], proxy=section)
        assert middle.asked == [f"{HOST}:{files.config.enrol_port}"]
        assert received
        assert not any(each in bytes(middle.heard) for each in received)
    found = read_config(folder / "site.toml")
    assert found.proxy.password == f"file:{tmp_path / 'proxy-password'}"
    assert found.through.password.reveal() == LOGIN[1].encode()
    assert LOGIN[1] not in (folder / "site.toml").read_text()


def test_join_takes_the_place_of_a_password_and_refuses_the_password_itself(
    files, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "va"
    line = files.invite("va", 7, now())[0].text()
    monkeypatch.setenv("PROXY_PASSWORD_OF_JOIN", LOGIN[1])
    with served(files), ProxyServer("socks5", files.config.enrol_port, LOGIN) as middle:
        url = f"socks5://ann:hunter2@127.0.0.1:{middle.port}"
        with pytest.raises(SystemExit) as caught:
            main(["join", line, "--out", str(folder), "--proxy", url])
        assert caught.value.code == 2
        assert not folder.exists()
        place = [
            "--proxy",
            url.replace(":hunter2", ""),
            "--proxy-password",
            "env:PROXY_PASSWORD_OF_JOIN",
        ]
        with pytest.raises(SystemExit) as caught:
            main(["join", line, "--out", str(folder), *place])
        assert caught.value.code in {0, None}
    told = "".join(capsys.readouterr())
    assert "--proxy: found a password in the URL" in told
    assert not any(each in told for each in ("hunter2", LOGIN[1]))
    found = tomllib.loads((folder / "site.toml").read_text())["proxy"]
    assert found == {
        "url": url.replace(":hunter2", ""), "password": "env:PROXY_PASSWORD_OF_JOIN",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["socks5", "http"])
def test_a_site_runs_is_checked_and_renews_through_a_proxy(files, tmp_path, kind):
    folder = joined_for(files, tmp_path / "va", minutes=2)

    async def scene():
        async with coordinator(files, now, tmp_path) as hub:
            with ProxyServer(kind, files.config.port, LOGIN) as middle:
                url = f"{kind}://127.0.0.1:{middle.port}"
                path = rewritten(
                    folder,
                    proxy={"url": url, "user": LOGIN[0], "password": secret_file(folder)},
                )
                lines = await asyncio.to_thread(lambda: list(check.examine(path)))
                found = {each.name: each for each in lines}
                assert found["proxy"].found == (
                    f"{kind} proxy 127.0.0.1:{middle.port} as user 'ann'; it resolves the coordinator's name, and "
                    "sees ciphertext only"
                )
                assert all(found[each].ok for each in ("proxy", "dns", "tcp", "tls", "admitted"))
                async with site(folder, files.roster()) as (session, renewal):
                    await until(lambda: session.since is not None)
                    before = Kit.load(folder / "kit").peer.serial
                    assert "va" in hub.sessions.open
                    await renewal.step(now())
                    after = peer_of((folder / "kit" / "certificate.pem").read_bytes()).serial
                    assert after != before
                    assert session.last_error == ""
                return middle.asked, bytes(middle.heard)

    asked, heard = asyncio.run(scene())
    assert set(asked) == {f"{HOST}:{files.config.port}"}
    assert len(heard) > 1000
    digest = files.roster().digest  # of the hello: TLS begins behind the proxy
    assert not any(each in heard for each in (digest.encode(), bytes.fromhex(digest)))
    assert not (folder / "state" / "proxy.socket").exists()


@pytest.mark.parametrize(
    ("proxy", "line"),
    [
        ({"fault": "forbids"}, "found that its rules forbid it (SOCKS5 reply 2)"),
        ({"login": ("ann", "other")}, "found the user or the password refused"),
    ],
    ids=["forbids", "password"],
)
def test_a_running_site_logs_why_its_proxy_does_not_connect(files, tmp_path, caplog, proxy, line):
    folder = joined(files, tmp_path / "va")

    async def scene():
        with ProxyServer("socks5", files.config.port, **proxy) as middle:
            rewritten(
                folder,
                proxy={
                    "url": f"socks5://127.0.0.1:{middle.port}", "user": LOGIN[0],
                    "password": secret_file(folder),
                },
            )  # fmt: skip
            async with site(folder, files.roster()) as (session, _):
                await until(lambda: session.last_error)
                return session.last_error

    with caplog.at_level(logging.DEBUG):
        found = asyncio.run(scene())
    assert line in found
    assert "(hint: " in found
    assert LOGIN[1] not in caplog.text
    assert f"no session with {HOST}:{files.config.port}: proxy 127.0.0.1:" in caplog.text


# ----------------------------------------------------------------------------------- TLS inspection

BOTH = pytest.mark.parametrize("most", [ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2])


def says_inspected(text, where):
    return text.startswith(
        f"coordinator {where}: found the connection inspected on the way: a certificate that CN=Corp Proxy CA issued, "
        "expected one of the federation's authority"
    )


@BOTH
def test_join_names_what_inspects_tls_and_sends_nothing_to_it(files, tmp_path, most):
    folder, line = tmp_path / "va", files.invite("va", 7, now())[0]
    with (
        served(files) as received,
        Inspector(files.config.enrol_port, HOST, most) as middle,
        ProxyServer("http", middle.port) as way,  # which knows the name
        pytest.raises(CertificateRefused) as caught,
    ):
        joining.ask(line, folder, way.proxy, now())
    where = f"{HOST}:{files.config.enrol_port}"
    assert says_inspected(str(caught.value), where)
    assert f"Have {where} exempted from TLS inspection" in caught.value.remedy
    assert caught.value.check == "inspected"
    assert not middle.heard
    assert not received
    assert not (folder / "joining.json").exists()


@BOTH
def test_run_and_check_name_what_inspects_tls_and_send_nothing_to_it(files, tmp_path, most):
    folder = joined(files, tmp_path / "va")

    async def scene():
        async with coordinator(files, now, tmp_path) as hub:
            with (
                Inspector(files.config.port, HOST, most) as middle,
                ProxyServer("socks5", middle.port) as way,
            ):
                path = rewritten(folder, proxy=f"socks5://127.0.0.1:{way.port}")
                lines = await asyncio.to_thread(lambda: list(check.examine(path)))
                async with site(folder, files.roster()) as (session, _):
                    await until(lambda: session.last_error)
                    assert not hub.sessions.open
                    return {each.name: each for each in lines}, session.last_error, middle.heard

    found, logged, heard = asyncio.run(scene())
    where = f"{HOST}:{files.config.port}"
    assert says_inspected(found["tls"].found, where)
    assert f"Have {where} exempted" in found["tls"].remedy
    assert "admitted" not in found
    assert says_inspected(logged, where)
    assert not heard


def test_another_server_at_the_port_is_not_called_an_inspection(files, tmp_path):
    line = files.invite("va", 7, now())[0]
    with (
        Inspector(free_port(), "www.example") as middle,
        ProxyServer("http", middle.port) as way,
        pytest.raises(CertificateRefused) as caught,
    ):
        joining.ask(line, tmp_path / "va", way.proxy, now())
    assert ": found another server: a certificate that CN=Corp Proxy CA issued" in str(caught.value)
    assert caught.value.remedy.endswith("or correct host and port")


# ------------------------------------------------------------------------------------- keep-alive


def test_a_connection_that_a_middlebox_forgot_is_noticed_and_the_session_resumes(tmp_path):
    files = new_federation(tmp_path / "federation")  # for loopback: no proxy
    folder = joined(files, tmp_path / "va")

    async def scene():
        async with coordinator(files, now, tmp_path) as hub:
            with Middle(files.config.port) as relay:
                where = f"localhost:{relay.port}"
                rewritten(folder, coordinator=where, keepalive_seconds=0.4)
                async with site(folder, files.roster()) as (session, _):
                    await until(lambda: session.since is not None)
                    first, before = session.since, hub.sessions.open["va"]
                    relay.swallow()
                    await until(lambda: session.since not in {None, first})
                    await until(lambda: hub.sessions.open.get("va", before) is not before)
                    return relay.joined

    assert asyncio.run(scene()) > 1


def test_a_coordinator_notices_a_site_behind_a_middlebox_that_forgot_it(tmp_path):
    files = new_federation(tmp_path / "federation")
    folder = joined(files, tmp_path / "va")

    async def scene():
        async with coordinator(files, now, tmp_path, options=calls.keepalive(0.4)) as hub:
            with Middle(files.config.port) as relay:
                rewritten(folder, coordinator=f"localhost:{relay.port}")
                async with site(folder, files.roster()) as (session, _):
                    await until(lambda: session.since is not None)
                    relay.swallow()  # what the site closes now is not heard at the coordinator
                assert "va" in hub.sessions.open
                await until(lambda: "va" not in hub.sessions.open)

    asyncio.run(scene())


def test_frequent_pings_are_permitted(tmp_path):
    """A server that counts them ends the connection at the second one: ENHANCE_YOUR_CALM."""
    files = new_federation(tmp_path / "federation")
    folder = joined(files, tmp_path / "va")

    async def scene(options):
        async with coordinator(files, now, tmp_path, options=options):
            with Middle(files.config.port) as relay:
                where = f"localhost:{relay.port}"
                rewritten(folder, coordinator=where, keepalive_seconds=0.2)
                async with site(folder, files.roster()) as (session, _):
                    await until(lambda: session.since is not None)
                    first, size = session.since, len(relay.heard)
                    # Bytes of six pings and their TLS records: what else a session begins with is fewer.
                    pinged = size + 6 * 39
                    await until(lambda: len(relay.heard) > pinged or session.since != first)
                    return session.since == first

    strict = ("grpc.http2.min_ping_interval_without_data_ms", 300_000)
    assert not asyncio.run(scene((strict, ("grpc.http2.max_ping_strikes", 1))))
    permitted = [each for each in KEEPALIVE if each[0] != strict[0]]
    assert asyncio.run(scene((strict, *permitted)))


# ------------------------------------------------------------------------------------ the settings


def test_grpc_resolves_names_as_the_system_does():
    """Its own resolver takes the first address of a name in /etc/hosts only: a coordinator at the second one was found
    by `check`, and not by `run`."""
    assert os.environ["GRPC_DNS_RESOLVER"] == "native"


def test_a_site_uses_the_environments_proxy_only_if_its_settings_say_so(
    files, tmp_path, monkeypatch
):
    folder = joined(files, tmp_path / "va")
    monkeypatch.setenv("HTTPS_PROXY", "http://ann:hunter2@proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", ".internal.example")
    config = read_config(folder / "site.toml")
    assert config.through is None
    found = read_config(rewritten(folder, proxy="environment")).through
    assert (found.text, found.direct) == (
        "http proxy proxy.example:3128 as user 'ann'", (".internal.example",),
    )  # fmt: skip
    with pytest.raises(BadInput, match=r"^site\.toml: proxy: found a password in the URL"):
        read_config(rewritten(folder, proxy="http://ann:hunter2@proxy.example:3128"))


def test_a_tasks_process_has_neither_the_password_nor_its_file(files, tmp_path):
    folder = joined(files, tmp_path / "va")
    proxy = {"url": "http://p:1", "user": LOGIN[0], "password": secret_file(folder)}
    config = read_config(rewritten(folder, proxy=proxy))
    assert folder / "proxy-password" in hidden(config)
