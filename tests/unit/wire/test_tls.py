"""Mutual TLS for real: a grpc.aio server and channels over loopback, and what a person reads.

Each certificate that must not count is tried twice: on the connection itself, where no call may reach
the coordinator, and as the one line that its holder sees.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import ipaddress
import socket
import ssl
import threading
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from fedcore_clients import channel as client
from fedcore_server import tls as server

from fedcore.errors import BadInput, CertificateRefused
from fedcore.identity.authority import LOOPBACK, Authority, Issued
from fedcore.identity.kit import KEY_FILE, Kit, KitFile
from fedcore.identity.preflight import preflight
from fedcore.identity.proxies import Proxy
from fedcore.identity.revocation import EMPTY, Revocations
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.wire.refusals import told

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
HEART = Authority.create("heart", NOW - 30 * DAY)
HERE = ("127.0.0.1", "localhost")


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


IPV6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def minted(authority, uri, *, usage, begins=NOW - DAY, ends=NOW + DAY, itself=False) -> Issued:
    """A certificate that the authority would not issue: any URI, any usage, good for loopback."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "minted by hand")])
    names = [x509.UniformResourceIdentifier(uri), x509.DNSName("localhost")]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if itself else authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName(
                [*names, x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            ),
            critical=False,
        )
        .sign(key if itself else authority.key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    return Issued(public, authority.certificate_pem, SecretBytes(pem))


@pytest.fixture(scope="module")
def run():
    """One event loop for all: grpc.aio's poller does not outlive the loop it began with."""
    with asyncio.Runner() as runner:
        yield lambda coroutine: runner.run(asyncio.wait_for(coroutine, 240))


@pytest.fixture
def kits(tmp_path):
    """kit(issued) saves and loads one, each in a folder of its own."""
    count = iter(range(100))
    return lambda issued: issued.save(tmp_path / f"kit{next(count)}")


@pytest.fixture
def hub(kits):
    return kits(HEART.issue("coordinator", "hub", NOW, hosts=LOOPBACK))


@pytest.fixture
def va(kits):
    return kits(HEART.issue("site", "va", NOW))


class Served:
    """A coordinator with two calls: `Who`, for sites, and `Stay`, which lasts while its peer may."""

    def __init__(self, gate) -> None:
        self.gate = gate
        self.seen: list[str] = []
        self.refused: list[str] = []
        self.lines: list[str] = []
        self.about: dict[str, list[bytes]] = {}
        self.port = 0
        self.addresses: tuple[str, ...] = ()

    def admit(self, context):
        try:
            return self.gate.admit(context, ["site"])
        except CertificateRefused as error:
            self.refused.append(error.check)
            self.lines.append(str(error))
            raise

    async def who(self, _request, context):
        try:
            peer = self.admit(context)
        except CertificateRefused as error:
            await server.refuse(context, error)
        self.seen.append(peer.name)
        self.about = dict(context.auth_context())
        return peer.name.encode()

    async def stay(self, _request, context):
        try:
            peer = self.admit(context)
            for tick in range(1000):
                self.gate.still(peer)
                yield str(tick).encode()
                await asyncio.sleep(0.01)
        except CertificateRefused as error:
            await server.refuse(context, error)

    def service(self, details):
        if details.method == "/t/Who":
            return grpc.unary_unary_rpc_method_handler(self.who)
        return grpc.unary_stream_rpc_method_handler(self.stay)


def gate_of(revocations=None, clock=lambda: datetime.now(UTC), trouble=None):
    return server.Gate(
        "heart", {"va", "budapest"}, revocations or Revocations(), clock, trouble or pytest.fail
    )


@asynccontextmanager
async def coordinator(kit, gate=None, *, hosts=("127.0.0.1",), credentials=None):
    served = Served(gate or gate_of())
    running = grpc.aio.server(options=server.SERVER_OPTIONS)
    handler = type(
        "Handler", (grpc.GenericRpcHandler,), {"service": lambda _, d: served.service(d)}
    )
    running.add_generic_rpc_handlers((handler(),))
    served.port, served.addresses = server.bind(
        running, lambda: credentials or server.server_credentials(kit), hosts=hosts
    )
    await running.start()
    try:
        yield served
    finally:
        await running.stop(0)


async def ask(kit, served, host="127.0.0.1", **how):
    async with client.open_channel(kit, host, served.port, **how) as channel:
        return await channel.unary_unary("/t/Who")(b"", timeout=120)


async def fails(kit, served, host="127.0.0.1", **how) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(kit, served, host, **how)
    return caught.value


async def look(kit, served, host="127.0.0.1", **how):
    return await asyncio.to_thread(preflight, kit, host, served.port, now=datetime.now(UTC), **how)


def refusal(error: grpc.aio.AioRpcError) -> CertificateRefused | None:
    """The coordinator's refusal of this call's certificate; None where the call failed otherwise."""
    return told(error.code().name, error.details() or "")


async def line(kit, served, host="127.0.0.1", **how) -> CertificateRefused:
    """What the holder of `kit` reads: the preflight's finding, or else what the gate answered."""
    try:
        await look(kit, served, host, **how)
    except CertificateRefused as error:
        return error
    found = refusal(await fails(kit, served, host, **how))
    assert found is not None
    return found


async def ending(session) -> CertificateRefused | None:
    """Why the coordinator ended a session that was under way."""
    try:
        while await session.read():
            pass
    except grpc.aio.AioRpcError as error:
        return refusal(error)
    return None


def says(error, check, *words):
    assert error.check == check
    assert "\n" not in str(error)
    assert error.remedy
    for word in words:
        assert word in str(error), str(error)


# ------------------------------------------------------------------------- the right certificate


@pytest.mark.parametrize("host", HERE)
def test_the_right_certificate(run, hub, va, host):
    async def scene():
        async with coordinator(hub) as served:
            found = await look(va, served, host)
            assert await ask(va, served, host) == b"va"
            return found, served.about

    found, about = run(scene())
    assert (found[0].role, found[0].name) == ("coordinator", "hub")
    assert (found[1], found[2][:4]) == ("TLSv1.3", "TLS_")
    # What gRPC negotiates between two of its own ends, told by the server of a real call.
    assert about["ssl_tls_version"] == [b"TLSv1.3"]
    assert about["ssl_negotiated_key_exchange_group"] == [b"X25519MLKEM768"]
    assert about["security_level"] == [b"TSI_PRIVACY_AND_INTEGRITY"]


def by_hand(kit, port, version) -> bytes:
    """One HTTP/2 call written out, since gRPC's own client cannot be held to a version of TLS."""
    fields = {
        ":method": "POST",
        ":scheme": "https",
        ":path": "/t/Who",
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    block = b"".join(
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )
    frames = (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
        + len(block).to_bytes(3, "big")
        + b"\x01\x04\x00\x00\x00\x01"
        + block
        + b"\x00\x00\x05\x00\x01\x00\x00\x00\x01"
        + bytes(5)
    )
    context = ssl.create_default_context(cadata=kit.authority_pem.decode())
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(kit.certificate_path, kit.key_path)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), 5) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        secured.sendall(frames)
        answer = b""
        secured.settimeout(0.5)
        try:
            while more := secured.recv(4096):
                answer += more
        except TimeoutError:
            pass
        return answer


def test_tls_1_2_reaches_the_gate_and_no_further(run, hub, va):
    async def scene(version):
        async with coordinator(hub) as served:
            assert await asyncio.to_thread(by_hand, va, served.port, version)
            return served

    newest, older = run(scene(ssl.TLSVersion.TLSv1_3)), run(scene(ssl.TLSVersion.TLSv1_2))
    assert (newest.seen, newest.refused) == (["va"], [])
    assert (older.seen, older.refused) == ([], ["version"])
    assert older.lines == [f"connection of {va.peer}: found TLSv1.2, expected TLSv1.3"]


# -------------------------------------------------- certificates that never get through the handshake


def issued_wrongly():
    site, serves = "fedcore://heart/site/va", ExtendedKeyUsageOID.SERVER_AUTH
    other = Authority.create("heart", NOW)
    connects = ExtendedKeyUsageOID.CLIENT_AUTH
    return {
        "expired": (HEART.issue("site", "va", NOW - 9 * DAY, days=1), "expired", "since"),
        "not yet valid": (HEART.issue("site", "va", NOW + DAY), "begins", "the time here"),
        "a self-signed stranger": (
            minted(HEART, site, usage=connects, itself=True),
            "issuer",
            "itself as issuer",
        ),
        "another authority of the same name": (
            dataclasses.replace(
                other.issue("site", "va", NOW), authority_pem=HEART.certificate_pem
            ),
            "issuer",
            "O=heart",
        ),
        "a coordinator's": (
            HEART.issue("coordinator", "hub", NOW, hosts=LOOPBACK),
            "usage",
            "may not connect",
        ),
        "a site's with a coordinator's usage": (
            minted(HEART, site, usage=serves),
            "usage",
            "clientAuth",
        ),
    }


WRONG = issued_wrongly()


@pytest.mark.parametrize("name", WRONG)
def test_no_call_arrives_and_the_holder_learns_why(run, hub, kits, name):
    issued, check, words = WRONG[name]
    kit = kits(issued)
    if name == "a coordinator's":  # as who tries it would: by our client's rules it is its role
        kit = dataclasses.replace(kit, peer=dataclasses.replace(kit.peer, role="site"))
        check, words = "role", "found role 'coordinator', expected site"

    async def scene():
        async with coordinator(hub) as served:
            error = await fails(kit, served)
            assert served.seen == served.refused == []
            return error, await line(kit, served)

    error, found = run(scene())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    says(found, check, words, "certificate of")


def test_no_client_certificate(run, hub, va, tmp_path):
    async def scene():
        async with coordinator(hub) as served:
            nothing = grpc.ssl_channel_credentials(va.authority_pem)
            async with grpc.aio.secure_channel(f"127.0.0.1:{served.port}", nothing) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary("/t/Who")(b"", timeout=120)
            return caught.value.code(), served.seen, served.refused

    assert run(scene()) == (grpc.StatusCode.UNAVAILABLE, [], [])
    va.certificate_path.unlink()  # and our own client does not begin without one
    with pytest.raises(BadInput, match=r"certificate\.pem: it cannot be read \(No such file"):
        Kit.load(va.certificate_path.parent)


def test_a_plaintext_client(run, hub):
    async def scene():
        async with (
            coordinator(hub) as served,
            grpc.aio.insecure_channel(f"127.0.0.1:{served.port}") as channel,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/t/Who")(b"", timeout=120)
            return caught.value.code(), served.seen, served.refused

    assert run(scene()) == (grpc.StatusCode.UNAVAILABLE, [], [])


def test_a_coordinator_that_trusts_another_authority_says_nothing_and_the_line_does(run, kits, va):
    other = Authority.create("heart", NOW)
    issued = HEART.issue("coordinator", "hub", NOW, hosts=LOOPBACK)
    kit = kits(dataclasses.replace(issued, authority_pem=other.certificate_pem))

    async def scene():
        async with coordinator(kit) as served:
            error = await fails(va, served)
            assert served.seen == []
            return error, await line(va, served)

    error, found = run(scene())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    says(found, "accepted", "closed at the certificate of site 'va' of 'heart'")
    assert HEART.certificate.fingerprint(hashes.SHA256()).hex()[:16] in found.remedy


# ---------------------------------------------------------- certificates that the gate turns away


def turned_away():
    lungs = dataclasses.replace(HEART, federation="lungs")  # one authority, two federations
    unnamed = minted(HEART, "https://heart/site/va", usage=ExtendedKeyUsageOID.CLIENT_AUTH)
    return {
        "an observer's": (HEART.issue("observer", "ann", NOW), "role", "'observer', expected site"),
        "an operator's": (HEART.issue("operator", "ann", NOW), "role", "'operator', expected site"),
        "off the roster": (HEART.issue("site", "oslo", NOW), "roster", "'oslo', expected one of"),
        "another federation's": (lungs.issue("site", "va", NOW), "federation", "'lungs'"),
        "nobody's": (unnamed, "role", "expected one fedcore://"),
    }


AWAY = turned_away()


@pytest.mark.parametrize("name", AWAY)
def test_the_gate_turns_away_and_says_why(run, hub, va, kits, name):
    issued, check, words = AWAY[name]
    if name == "nobody's":
        with pytest.raises(
            CertificateRefused, match=r"certificate\.pem: certificate: found no fed"
        ):
            kits(issued)
        kit = dataclasses.replace(
            va, certificate_pem=issued.certificate_pem, key_pem=issued.key_pem
        )
    else:
        kit = kits(issued)

    async def scene():
        async with coordinator(hub) as served:
            error = await fails(kit, served)
            assert (served.seen, served.refused) == ([], [check])
            return error

    error = run(scene())
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    found = refusal(error)
    assert str(found).startswith("refused by the coordinator: ")
    says(found, check, words)


def test_site_put_on_the_roster_just_now_is_admitted(run, hub, va):
    gate, asked = gate_of(), []
    gate.roster = {"budapest"}

    def unknown():
        asked.append(set(gate.roster))
        if len(asked) == 2:  # the file has it by now
            gate.roster.add("va")

    gate.unknown = unknown

    async def scene():
        async with coordinator(hub, gate) as served:
            await fails(va, served)
            for _ in range(2):  # the second time it is on the roster already
                assert await ask(va, served) == b"va"
            return served.refused

    assert run(scene()) == ["roster"]
    assert asked == [{"budapest"}] * 2


def test_another_federations_coordinator_is_noticed_before_any_call(run, hub, kits):
    lungs = kits(dataclasses.replace(HEART, federation="lungs").issue("site", "va", NOW))

    async def scene():
        async with coordinator(hub) as served:
            return await line(lungs, served), served.seen + served.refused

    found, calls = run(scene())
    says(found, "federation", "coordinator 'hub' of 'heart'", "expected 'lungs'")
    assert calls == []


def test_withdrawn_while_connected(run, hub, va, kits, tmp_path):
    budapest, path, told = kits(HEART.issue("site", "budapest", NOW)), tmp_path / "revoked.txt", []
    path.write_bytes(EMPTY)
    gate = gate_of(Revocations(path), trouble=told.append)

    async def scene():
        async with (
            coordinator(hub, gate) as served,
            client.open_channel(va, "127.0.0.1", served.port) as one,
            client.open_channel(budapest, "127.0.0.1", served.port) as two,
        ):
            mine, theirs = (one.unary_stream("/t/Stay")(b""), two.unary_stream("/t/Stay")(b""))
            for session in (mine, theirs):
                assert await session.read() == b"0"
            path.write_text(f"{va.peer.serial} # laptop stolen\n")
            found = await ending(mine)
            path.write_text("not a serial number\n")  # a slip of the pen lets nobody back in
            again = refusal(await fails(va, served))
            assert await theirs.read()
            theirs.cancel()
            return found, again

    found, again = run(scene())
    says(found, "revoked", "site 'va' of 'heart'", va.peer.serial, "found it withdrawn")
    says(again, "revoked")
    assert len(told) == 1
    assert "line 1: found 'not a serial number'" in str(told[0])


def test_expired_while_connected(run, hub, va):
    clock = [NOW]

    async def scene():
        async with (
            coordinator(hub, gate_of(clock=lambda: clock[0])) as served,
            client.open_channel(va, "127.0.0.1", served.port) as channel,
        ):
            session = channel.unary_stream("/t/Stay")(b"")
            assert await session.read() == b"0"
            clock[0] = va.peer.ends + timedelta(seconds=1)
            return await ending(session)

    says(run(scene()), "expired", "site 'va'", "found expired since")


def test_a_port_without_tls_would_admit_nobody(run, va):
    async def scene():
        served, running = Served(gate_of()), grpc.aio.server()
        handler = type("H", (grpc.GenericRpcHandler,), {"service": lambda _, d: served.service(d)})
        running.add_generic_rpc_handlers((handler(),))
        served.port = running.add_insecure_port("127.0.0.1:0")
        await running.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/t/Who")(b"", timeout=120)
        found = await line(va, served)
        await running.stop(0)
        return refusal(caught.value), served.seen, found

    refused, seen, found = run(scene())
    says(found, "tls", "does not speak TLS")
    assert refused.check == "readable"
    assert "no certificate on its connection" in str(refused)
    assert seen == []


# --------------------------------------------------------------------- false coordinators


def false_coordinators():
    serves, connects = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
    hub = "fedcore://heart/coordinator/hub"
    return {
        "another name": (
            HEART.issue("coordinator", "hub", NOW, hosts=["hub.example", "192.0.2.7"]),
            "host",
            "made out to hub.example, 192.0.2.7, expected 127.0.0.1",
        ),
        "expired": (
            HEART.issue("coordinator", "hub", NOW - 9 * DAY, hosts=LOOPBACK, days=1),
            "expired",
            "coordinator 'hub' of 'heart'",
        ),
        "not yet valid": (
            HEART.issue("coordinator", "hub", NOW + DAY, hosts=LOOPBACK),
            "begins",
            "coordinator 'hub' of 'heart'",
        ),
        "self-signed": (
            minted(HEART, hub, usage=serves, itself=True),
            "issuer",
            "itself as issuer",
        ),
        "a site's key serving": (
            minted(HEART, "fedcore://heart/site/va", usage=connects),
            "role",
            "found role 'site', expected coordinator",
        ),
        "a coordinator's that may not serve": (
            minted(HEART, hub, usage=connects),
            "usage",
            "serverAuth",
        ),
    }


FALSE = false_coordinators()


@pytest.mark.parametrize("name", FALSE)
def test_a_site_speaks_to_no_false_coordinator(run, va, name):
    issued, check, words = FALSE[name]
    credentials = grpc.ssl_server_credentials(
        [(issued.key_pem.reveal(), issued.certificate_pem)], va.authority_pem, True
    )

    async def scene():
        async with coordinator(None, credentials=credentials) as served:
            error = await fails(va, served)
            assert served.seen == served.refused == []
            return error, await line(va, served)

    error, found = run(scene())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    says(found, check, words)


def test_a_certificate_without_the_right_to_serve_serves_nothing(va):
    with pytest.raises(CertificateRefused, match="found role 'site', expected coordinator"):
        server.server_credentials(va)


def test_a_coordinators_certificate_connects_to_nothing(hub):
    for connect in (client.open_channel, lambda *args: preflight(*args, now=NOW)):
        with pytest.raises(CertificateRefused, match="found role 'coordinator', expected obs"):
            connect(hub, "127.0.0.1", 8443)


@pytest.mark.parametrize("passphrase", [None, b"x"])
def test_a_key_exchanged_under_a_running_site(va, passphrase):
    hidden = serialization.BestAvailableEncryption(passphrase) if passphrase else None
    va.key_path.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            hidden or serialization.NoEncryption(),
        )
    )
    with pytest.raises(BadInput, match="found it changed since it was read"):
        preflight(va, "127.0.0.1", 8443, now=NOW)


@pytest.mark.parametrize(
    ("behaviour", "check", "words"),
    [
        ("closes", "tls", "closed before TLS began"),
        ("waits", "tls", "no answer within 0.3 s"),
        ("talks", "tls", "not speak"),
    ],
)
def test_what_is_no_coordinator(va, behaviour, check, words):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                if behaviour == "talks":
                    connection.sendall(b"220 mail.example ESMTP ready\r\n")
                if behaviour != "closes":
                    connection.settimeout(240)
                    with suppress(OSError):
                        while connection.recv(4096):
                            pass

        thread = threading.Thread(target=answer)
        thread.start()
        port = listener.getsockname()[1]
        timeout = 0.3 if behaviour == "waits" else 240.0
        with pytest.raises(CertificateRefused) as caught:
            preflight(va, "127.0.0.1", port, now=NOW, timeout=timeout)
        thread.join()
    says(caught.value, check, words)


@pytest.mark.parametrize(
    ("fault", "check", "words"),
    [
        ("TLS 1.2", "version", "found no TLS 1.3 there (TLSV1_ALERT_PROTOCOL_VERSION)"),
        (
            "another authority",
            "accepted",
            "closed (TLSV1_ALERT_UNKNOWN_CA) at the certificate of site",
        ),
    ],
)
def test_a_server_that_does_say_why(hub, va, fault, check, words):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(hub.certificate_path, hub.key_path)
    if fault == "TLS 1.2":
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    else:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=Authority.create("x", NOW).certificate_pem.decode())
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with suppress(OSError), context.wrap_socket(connection, server_side=True):
                pass

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(CertificateRefused) as caught:
            preflight(va, "127.0.0.1", listener.getsockname()[1], now=NOW)
        thread.join()
    says(caught.value, check, words)


def test_nothing_listens_and_no_such_name(va):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(BadInput, match=rf"127.0.0.1:{port}: found no connection .*refused"):
        preflight(va, "127.0.0.1", port, now=NOW)
    with pytest.raises(BadInput, match=r"hub\.invalid:8443: found no address under this name"):
        preflight(va, "hub.invalid", 8443, now=NOW)


@pytest.mark.parametrize(
    "host", ["", "unix:/tmp/x", "hub example", "hub/..", "a..b", "hub:1", "hüb"]
)
def test_a_host_is_a_name_or_an_address(va, host):
    with pytest.raises(BadInput, match="expected a DNS name or an address"):
        client.open_channel(va, host, 8443)
    with pytest.raises(BadInput, match="found port 0, expected 1 to 65535"):
        client.open_channel(va, "127.0.0.1", 0)


# ------------------------------------------------------------------------------------ addresses


@pytest.mark.parametrize(
    ("host", "shown"), [("127.0.0.1", "127.0.0.1"), pytest.param("::1", "[::1]", marks=IPV6)]
)
def test_a_second_coordinator_on_the_same_port(run, hub, host, shown):
    async def scene():
        async with coordinator(hub, hosts=[host]) as served:
            second = grpc.aio.server(options=server.SERVER_OPTIONS)
            with pytest.raises(BadInput) as caught:
                server.bind(
                    second, lambda: server.server_credentials(hub), hosts=[host], port=served.port
                )
            return caught.value, served.port

    error, port = run(scene())
    assert f"listen on {shown}:{port}: found it in use, expected a free port" == str(error)
    assert "another coordinator runs here" in error.remedy


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("192.0.2.7", "no such address on this machine"),
        ("localhost", "expected an IP address"),
        (None, "found no address, expected one"),
        pytest.param("2001:db8::7", r"listen on \[2001:db8::7\]:0: found no such addr", marks=IPV6),
    ],
)
def test_addresses_that_cannot_be_bound(run, hub, host, words):
    async def scene():
        with pytest.raises(BadInput, match=words):
            server.bind(
                grpc.aio.server(),
                lambda: server.server_credentials(hub),
                hosts=[host] if host else [],
            )

    run(scene())


@IPV6
def test_an_address_is_not_left_out_in_silence(run, hub):
    async def scene():
        with pytest.raises(BadInput, match="no such address on this machine"):
            server.bind(
                grpc.aio.server(options=server.SERVER_OPTIONS),
                lambda: server.server_credentials(hub),
                hosts=["127.0.0.1", "2001:db8::7"],
            )

    run(scene())


def test_a_machine_without_ipv6(run, hub, va, monkeypatch):
    """Stands in for one: where `::1` cannot be bound, the sites reach 127.0.0.1 all the same."""

    class Without:
        def __init__(self, real):
            self.real = real

        def add_secure_port(self, address, credentials):
            if address.startswith("["):
                raise RuntimeError("Failed to bind")
            return self.real.add_secure_port(address, credentials)

    async def scene(hosts):
        without = Without(grpc.aio.server(options=server.SERVER_OPTIONS))
        return server.bind(without, lambda: server.server_credentials(hub), hosts=hosts)

    for cause in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
        monkeypatch.setattr(server, "_cause", lambda *_, cause=cause: cause)
        port, addresses = run(scene(("127.0.0.1", "::1")))
        assert addresses == (f"127.0.0.1:{port}",)
        with pytest.raises(BadInput, match="listen on"):
            run(scene(["::1"]))
    monkeypatch.setattr(server, "_cause", lambda *_: errno.EADDRINUSE)
    with pytest.raises(BadInput, match="found it in use"):
        run(scene(("127.0.0.1", "::1")))


@IPV6
@pytest.mark.parametrize("hosts", [("127.0.0.1", "::1"), ("::",)])
def test_both_families_on_one_port(run, hub, va, hosts):
    async def scene():
        async with coordinator(hub, hosts=hosts) as served:
            for host in ("127.0.0.1", "::1", "localhost"):
                await look(va, served, host)
                assert await ask(va, served, host) == b"va"
            return served

    served = run(scene())
    assert [address.rpartition(":")[0] for address in served.addresses] == [
        f"[{host}]" if ":" in host else host for host in hosts
    ]
    assert {address.rpartition(":")[2] for address in served.addresses} == {str(served.port)}


# -------------------------------------------------------------------------------------- proxies


@pytest.fixture
def dead_proxy(monkeypatch):
    """The environment names a proxy at a port where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("dead_proxy")
def test_the_environments_proxy_is_not_asked(run, hub, va):
    async def scene():
        async with coordinator(hub) as served:
            bare = client.channel_credentials(va)
            async with grpc.aio.secure_channel(f"127.0.0.1:{served.port}", bare) as channel:
                with pytest.raises(grpc.aio.AioRpcError):  # what gRPC does when nobody forbids it
                    await channel.unary_unary("/t/Who")(b"", timeout=120)
            assert await ask(va, served) == b"va"
            asks = [("grpc.enable_http_proxy", 1)]  # what a caller adds cannot undo it
            assert await ask(va, served, options=asks) == b"va"
            dead = Proxy.parse("http://127.0.0.1:9")
            for host in ("127.0.0.1", "localhost"):  # nor a configured one, for loopback
                await look(va, served, host, proxy=dead)
                assert await ask(va, served, host, proxy=dead) == b"va"

    run(scene())


# ------------------------------------------------------------------------- the coordinator's words


def test_words_in_another_form_are_still_told():
    metadata = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(grpc.StatusCode.PERMISSION_DENIED, metadata, metadata, "go away")
    assert str(refusal(error)) == "refused by the coordinator: go away"
    silent = grpc.aio.AioRpcError(grpc.StatusCode.PERMISSION_DENIED, metadata, metadata, None)
    assert refusal(silent).check == "accepted"


def test_another_failure_is_no_refusal():
    metadata = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, metadata, metadata, "role\nx\ny")
    assert refusal(error) is None


def test_a_key_file_is_asked_for_before_the_network(kits):
    kit = kits(HEART.issue("site", "va", NOW))
    (kit.key_path.parent / KEY_FILE).chmod(0o644)
    with pytest.raises(BadInput, match="found mode 0644, expected 0600"):
        Kit.load(kit.key_path.parent)


def test_handshakes_are_given_a_certificate_only_where_it_is_a_new_one(hub):
    """gRPC has no lock around what it replaces: with one at each handshake, many at once ended the process."""
    kits = KitFile(hub)
    assert server.renewed(kits) is None and server.renewed(kits) is None
    again = hub.certificate_path.with_name("again.pem")
    again.write_bytes(hub.certificate_path.read_bytes())
    again.replace(hub.certificate_path)
    assert isinstance(server.renewed(kits), grpc.ServerCertificateConfiguration)
    assert server.renewed(kits) is None
