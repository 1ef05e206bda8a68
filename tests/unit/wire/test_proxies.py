"""Proxies for real: gRPC with mutual TLS through SOCKS5 and CONNECT, and what a person reads where one fails."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from datetime import UTC, datetime

import grpc
import grpc.aio
import pytest
from fedcore_clients.channel import open_channel
from fedcore_server import tls

from fedcore.errors import BadInput
from fedcore.identity.authority import Authority
from fedcore.identity.forwarder import Forwarder
from fedcore.identity.preflight import preflight
from fedcore.identity.proxies import VARIABLES, Proxy, ProxySection, is_exempt, of_environment
from tests.support.proxies import LOGIN, ProxyServer

NOW = datetime.now(UTC)
HEART = Authority.create("heart", NOW)
KINDS = ("socks5", "http")
NAMES = ("hub.example", "unix", "198.51.100.7", "2001:db8::7")
"""None of them can be reached from here: only the proxy knows the way. `unix` is a scheme of gRPC's as well."""


@pytest.fixture(scope="module")
def run():
    """One event loop for all: grpc.aio's poller does not outlive the loop it began with."""
    with asyncio.Runner() as runner:
        yield lambda coroutine: runner.run(asyncio.wait_for(coroutine, 240))


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kits")
    hub = HEART.issue("coordinator", "hub", NOW, hosts=NAMES).save(folder / "hub")
    return hub, HEART.issue("site", "va", NOW).save(folder / "va")


@contextlib.asynccontextmanager
async def coordinator(kit, host="127.0.0.1"):
    """The port of a server with one call, which answers with what it was sent."""
    server = grpc.aio.server(options=tls.SERVER_OPTIONS)

    async def echo(request, _context):
        return request

    call = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("t", call)])
    port, _ = tls.bind(server, lambda: tls.server_credentials(kit), hosts=[host])
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


async def said(kit, host, port, proxy, data=b"hello", folder=None):
    """What comes back through gRPC, and who the preflight finds."""
    who, *_ = await asyncio.to_thread(preflight, kit, host, port, now=NOW, proxy=proxy)
    async with open_channel(kit, host, port, proxy=proxy, folder=folder) as channel:
        return await channel.unary_unary("/t/Echo")(data, timeout=120), who.name


async def refusal(kits, kind, proxy=None, **how):
    """(the line, its hint, the proxy's place) of a connection that does not come about; gRPC's fails as well."""
    hub, va = kits
    async with coordinator(hub) as port:
        with ProxyServer(kind, port, **how) as middle:
            proxy = proxy(middle) if proxy else middle.proxy
            with pytest.raises(BadInput) as caught:
                await asyncio.to_thread(preflight, va, "hub.example", port, now=NOW, proxy=proxy)
            with pytest.raises(grpc.aio.AioRpcError):
                async with open_channel(va, "hub.example", port, proxy=proxy) as channel:
                    await channel.unary_unary("/t/Echo")(b"", timeout=120)
            assert not middle.heard
            found = caught.value
            line = (
                str(found).replace(f"127.0.0.1:{middle.port}", "PROXY").replace(str(port), "PORT")
            )
            return line, found.remedy


# ---------------------------------------------------------------------------------- through a proxy


@pytest.mark.parametrize("login", [None, LOGIN], ids=["open", "login"])
@pytest.mark.parametrize("host", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_goes_through_a_proxy_that_resolves_the_name(run, kits, kind, host, login):
    async def scene():
        hub, va = kits
        async with coordinator(hub) as port:
            with ProxyServer(kind, port, login) as middle:
                assert await said(va, host, port, middle.proxy) == (b"hello", "hub")
                return middle.asked, bytes(middle.heard), port

    asked, heard, port = run(scene())
    written = f"[{host}]" if ":" in host else host
    if kind == "socks5" and host[:4] in {"198.", "2001"}:  # the address itself, not as a name
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        written = socket.inet_pton(family, host).hex()
    assert asked == [f"{written}:{port}"] * 2  # the preflight's connection, and gRPC's
    assert b"hello" not in heard
    assert LOGIN[1].encode() not in heard


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_message_arrives_whole_through_a_proxy(run, kits, kind):
    data = os.urandom(3_000_000)

    async def scene():
        hub, va = kits
        async with coordinator(hub) as port:
            with ProxyServer(kind, port) as middle:
                return await said(va, "hub.example", port, middle.proxy, data)

    assert run(scene())[0] == data


def test_the_certificate_must_have_the_name_that_was_asked_for(run, kits):
    """The socket on the way to the proxy does not change which name is checked."""

    async def scene():
        hub, va = kits
        async with coordinator(hub) as port:
            with ProxyServer("socks5", port) as middle:
                async with open_channel(va, "other.example", port, proxy=middle.proxy) as channel:
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await channel.unary_unary("/t/Echo")(b"secret", timeout=120)
                return caught.value.code(), middle.asked

    code, asked = run(scene())
    assert code is grpc.StatusCode.UNAVAILABLE
    assert asked
    assert all(each.startswith("other.example:") for each in asked)


@pytest.mark.parametrize("own", [True, False], ids=["the site's folder", "a new folder"])
def test_no_other_user_can_use_the_socket_to_the_proxy(tmp_path, own):
    folder, proxy = tmp_path / "state" if own else None, Proxy.parse("socks5://p:1")
    with Forwarder("hub.example", 7443, proxy, folder) as opened:
        place = opened.path
        assert opened.target == f"unix:{place}"
        assert (place.stat().st_mode & 0o777, place.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        assert not own or place.parent == folder
    assert not place.exists()
    assert own or not place.parent.exists()


def test_a_socket_that_an_ended_process_left_is_replaced_and_a_long_path_refused(tmp_path):
    proxy = Proxy.parse("socks5://p:1")
    (tmp_path / "proxy.socket").touch()
    with Forwarder("hub.example", 7443, proxy, tmp_path) as opened:
        assert opened.path.is_socket()
    deep = tmp_path / ("x" * 100)
    with (
        pytest.raises(BadInput, match=r"^folder: found a path of \d+ bytes, expected at most 87"),
        Forwarder("hub.example", 7443, proxy, deep),
    ):
        pass
    assert not deep.exists()


def test_of_several_addresses_of_a_name_the_one_that_listens_is_found(run, kits):
    """`localhost` has an IPv6 address here, at which nothing listens, and an IPv4 one."""
    found = {each[4][0] for each in socket.getaddrinfo("localhost", 1, type=socket.SOCK_STREAM)}
    if found != {"127.0.0.1", "::1"}:
        pytest.skip(f"localhost is {', '.join(sorted(found))} on this machine")
    hub = HEART.issue("coordinator", "hub", NOW, hosts=["localhost"])

    async def scene():
        _, va = kits
        async with coordinator(hub.save(va.certificate_path.parent.parent / "local")) as port:
            return await said(va, "localhost", port, None)

    assert run(scene()) == (b"hello", "hub")


def test_an_address_of_ipv6_is_reached_without_a_proxy(run, kits, tmp_path):
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"no IPv6 on this machine: {error}")
    hub = HEART.issue("coordinator", "hub", NOW, hosts=["::1"]).save(tmp_path / "hub")

    async def scene():
        async with coordinator(hub, "::1") as port:
            return await said(kits[1], "::1", port, None)

    assert run(scene()) == (b"hello", "hub")


# ------------------------------------------------------------------------- a proxy that fails


def with_password(text):
    return lambda middle: Proxy.parse(f"{middle.kind}://ann:{text}@127.0.0.1:{middle.port}")


@pytest.mark.parametrize(
    ("kind", "how", "line", "hint"),
    [
        ("http", {"login": LOGIN, "proxy": with_password("hunter2")},
         "found status 407 for hub.example:PORT, expected 200", "it refused the user or the password: check `user`"),
        ("http", {"login": LOGIN, "proxy": lambda m: Proxy.parse(f"http://127.0.0.1:{m.port}")},
         "found status 407 for hub.example:PORT, expected 200", "it asks for a user and a password: check `user`"),
        ("http", {"fault": "asks for another login"},
         "found status 407 for hub.example:PORT, expected 200", "the proxy asks for Negotiate, NTLM, and this"),
        ("http", {"fault": "forbids"},
         "found status 403 for hub.example:PORT, expected 200", "ask whoever runs the proxy to allow hub.example:"),
        ("http", {"fault": "unreachable"},
         "found status 502 for hub.example:PORT, expected 200", "the proxy does not reach hub.example:"),
        ("http", {"fault": "talks nonsense"}, "found an answer that is not HTTP, expected a", "and its kind: http://"),
        ("http", {"fault": "closes"}, "found the connection closed before its answer, expected", "check host, port"),
        ("socks5", {"login": LOGIN, "fault": "closes at a wrong login", "proxy": with_password("hunter2")},
         "found the connection closed at the user and the password, expected an answer", "check `user` and"),
        ("socks5", {"login": LOGIN, "proxy": with_password("hunter2")},
         "found the user or the password refused, expected them accepted", "check `user` and `password`"),
        ("socks5", {"login": LOGIN, "proxy": lambda m: Proxy.parse(f"socks5://127.0.0.1:{m.port}")},
         "found that it asks for a user and a password, expected", "check `user` and `password`"),
        ("socks5", {"fault": "asks for another login", "proxy": with_password("hunter2")},
         "found that it asks for another way to log in than a user and a password", "GSSAPI is not spoken here"),
        ("socks5", {"fault": "forbids"},
         "found that its rules forbid it (SOCKS5 reply 2) for hub.example:PORT", "to allow hub.example:"),
        ("socks5", {"fault": "unreachable"},
         "found that it reaches no such host, or does not know the name (SOCKS5 reply 4)", "the proxy may call"),
        ("socks5", {"fault": "talks nonsense"}, "found an answer that is not SOCKS5", "and its kind"),
        ("socks5", {"fault": "closes"}, "found the connection closed before its answer", "check host, port"),
    ],
)  # fmt: skip
def test_a_proxy_that_does_not_connect_is_one_line_and_a_hint(run, kits, kind, how, line, hint):
    found, remedy = run(refusal(kits, kind, **how))
    assert found.startswith(f"proxy PROXY: {line}")
    assert hint in remedy
    assert "hunter2" not in found + remedy
    assert "\n" not in found + remedy


@pytest.mark.parametrize("kind", KINDS)
def test_a_proxy_that_is_down_or_silent(kits, kind):
    _, va = kits
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        silent = Proxy.parse(f"{kind}://127.0.0.1:{port}")
        with pytest.raises(
            BadInput, match=rf"^proxy 127\.0\.0\.1:{port}: found no answer \(timed out\)"
        ):
            preflight(va, "hub.example", 7443, now=NOW, proxy=silent, timeout=0.2)
    with pytest.raises(
        BadInput, match=rf"^proxy 127\.0\.0\.1:{port}: found no connection .*refused"
    ):
        preflight(va, "hub.example", 7443, now=NOW, proxy=silent)


def test_a_direct_connection_that_fails_says_that_the_environment_names_a_proxy(kits, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in (None, "ALL_PROXY"):
        if name:
            monkeypatch.setenv(name, "http://ann:hunter2@p:1")
        with pytest.raises(BadInput) as caught:
            preflight(kits[1], "hub.invalid", 7443, now=NOW)
        hint = caught.value.remedy
        assert ('the proxy of ALL_PROXY? It is used under proxy = "environment" only' in hint) == (
            name is not None
        )
        assert "hunter2" not in hint


def test_a_password_that_socks5_cannot_carry(kits):
    with ProxyServer("socks5", 9, LOGIN) as middle:
        proxy = Proxy.parse(f"socks5://ann:{'x' * 256}@127.0.0.1:{middle.port}")
        with pytest.raises(BadInput, match="found a password of 256 bytes, expected 1 to 255"):
            preflight(kits[1], "hub.example", 7443, now=NOW, proxy=proxy)


# ------------------------------------------------------------------------------- which proxy it is


def test_urls_of_proxies():
    found = Proxy.parse("socks5h://ann:pass%20word@[2001:db8::1]:1080")
    assert (found.scheme, found.host, found.port, found.user) == (
        "socks5", "2001:db8::1", 1080, "ann",
    )  # fmt: skip
    assert found.password.reveal() == b"pass word"
    assert "pass word" not in repr(found) + found.text
    assert found.text == "socks5 proxy [2001:db8::1]:1080 as user 'ann'"
    for url, what in (
        ("hunter2", "something else"), ("http://b", "something else"), ("http://a:hunter2@b:x", "something else"),
        ("http://b:1/c", "something else"), ("https://a:hunter2@b:1", "a proxy of kind https"),
        ("socks4://b:1", "a proxy of kind socks4"),
    ):  # fmt: skip
        with pytest.raises(BadInput) as caught:
            Proxy.parse(url)
        assert str(caught.value) == (
            f"proxy: found {what}, expected http://HOST:PORT or socks5://HOST:PORT"
        )


@pytest.mark.parametrize(
    ("entry", "reached", "not_reached"),
    [
        ("*", "hub.example.org 10.1.2.3 2001:db8::1", ""),
        ("example.org", "example.org hub.example.org HUB.Example.ORG. a.b.example.org",
         "notexample.org example.org.evil 10.1.2.3"),
        (".example.org", "hub.example.org example.org", "notexample.org"),
        ("*.example.org", "hub.example.org", "notexample.org"),
        ("hub.example.org:7443", "hub.example.org", "example.org"),
        ("hub.example.org:80", "", "hub.example.org"),
        ("10.1.2.3", "10.1.2.3", "10.1.2.4 110.1.2.3"),
        ("10.0.0.0/8", "10.1.2.3", "11.1.2.3 2001:db8::1"),
        ("10.1.2.3:7443", "10.1.2.3", "10.1.2.4"),
        ("2001:db8::1", "2001:db8::1 2001:DB8:0::1", "2001:db8::2"),
        ("[2001:db8::1]:7443", "2001:db8::1", "2001:db8::2"),
        ("2001:db8::/32", "2001:db8::1", "2001:db9::1 10.1.2.3"),
        ("", "", "hub.example.org 10.1.2.3"),
        ("e", "", "example"),
    ],
)  # fmt: skip
def test_no_proxy_in_all_its_forms(entry, reached, not_reached):
    for host in reached.split():
        assert is_exempt(host, 7443, [entry]), host
        assert is_exempt(host, 7443, ["other.example", f" {entry} "]), host
    for host in not_reached.split():
        assert not is_exempt(host, 7443, [entry]), host


def test_the_environments_proxy_and_its_exceptions():
    assert of_environment({"HTTP_PROXY": "http://a:1", "NO_PROXY": "x"}) is None
    variables = {
        "ALL_PROXY": "socks5://all:1", "HTTPS_PROXY": "http://ann:hunter2@upper:2",
        "https_proxy": "bob:hunter3@lower:3", "no_proxy": "a.example, 10.0.0.0/8 b.example",
    }  # fmt: skip
    found = of_environment(variables)
    assert (found.scheme, found.where, found.user) == ("http", "lower:3", "bob")
    assert found.password.reveal() == b"hunter3"
    assert found.direct == ("a.example", "10.0.0.0/8", "b.example")
    assert [found.serves(each, 1) for each in ("hub.example", "b.example", "10.1.1.1")] == [
        True, False, False,
    ]  # fmt: skip
    assert "hunter" not in str(variables)  # no child process inherits a password
    assert variables["HTTPS_PROXY"] == "http://ann@upper:2"
    assert (
        of_environment(variables).password.reveal() == b"hunter3"
    )  # read again, as after a reload
    with pytest.raises(BadInput, match=r"^HTTPS_PROXY: proxy: found a proxy of kind https"):
        of_environment({"HTTPS_PROXY": "https://a:1"})
    for host in ("localhost", "127.0.0.1", "::1"):
        assert not found.serves(host, 1)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"url": "http://ann:hunter2@p:1"}, "found a password in the URL, expected the user once"),
        ({"url": "http://p:1", "user": "ann"}, "found a user without a password, expected both"),
        ({"url": "http://p:1", "password": "file:x"}, "found a password without its user"),
        ({"url": "http://a@p:1", "user": "b", "password": "file:x"}, "found two users"),
        ({"url": "http://p:1", "user": "ann", "password": "hunter2"},
         "site.toml: proxy.password: found a text of 7 characters, expected file:PATH or env:NAME"),
        ({"url": "none", "direct": ("a",)}, 'found url = "none" beside other keys'),
        ({"url": "environment", "user": "a"}, 'found url = "environment" beside other keys'),
    ],
)  # fmt: skip
def test_a_password_is_never_in_a_file_of_settings(tmp_path, keys, words):
    with pytest.raises(BadInput) as caught:
        ProxySection(**keys).placed(tmp_path, "site.toml: proxy")
    assert words in str(caught.value)
    assert "hunter2" not in str(caught.value) + caught.value.remedy


def test_a_password_comes_from_a_private_file_or_the_environment(tmp_path, monkeypatch):
    def opened(password):
        section = ProxySection(url="socks5://p:1", user="ann", password=password)
        return section.placed(tmp_path, "proxy").open().password.reveal()

    (tmp_path / "secret").write_text("hunter2\n")
    (tmp_path / "secret").chmod(0o644)
    with pytest.raises(BadInput, match=r"secret: found mode 0644, expected 0600"):
        opened("file:secret")
    (tmp_path / "secret").chmod(0o600)
    assert opened("file:secret") == b"hunter2"
    monkeypatch.setenv("PROXY_PASSWORD_OF_A_TEST", "hunter3")
    assert opened("env:PROXY_PASSWORD_OF_A_TEST") == b"hunter3"
    assert "PROXY_PASSWORD_OF_A_TEST" not in os.environ
    assert opened("env:PROXY_PASSWORD_OF_A_TEST") == b"hunter3"
    with pytest.raises(BadInput, match="found no variable PROXY_PASSWORD_NOBODY_SET"):
        opened("env:PROXY_PASSWORD_NOBODY_SET")
