"""What stands between a site and its coordinator, small and real: SOCKS5 and CONNECT proxies, a relay that
swallows bytes, and a middlebox that inspects TLS. Each listens on loopback and knows one destination, whatever name it
is asked for."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
import tempfile
import threading
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedcore.identity.proxies import Proxy

LOGIN = ("ann", "pass word")
"""User and password that a proxy with a login accepts."""


class Middle:
    """A port in a thread of its own, open inside `with`, and the coordinator's port behind it.

    asked: what it was asked for, in order; heard: every byte that it passed on to the coordinator."""

    shows: ssl.SSLContext | None = None
    trusts: ssl.SSLContext | None = None
    """Of one that ends TLS: towards the site, and towards the coordinator."""

    def __init__(self, to: int) -> None:
        self.to, self.port = to, 0
        self.asked: list[str] = []
        self.heard = bytearray()
        self.joined = 0
        """Connections that reached the coordinator."""
        self._open: set[asyncio.StreamWriter] = set()
        self._swallowed: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self):
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def swallow(self) -> None:
        """From now on nothing passes in the connections that are open now, and neither end is told. New ones work."""

        async def begin():
            self._swallowed |= self._open

        asyncio.run_coroutine_threadsafe(begin(), self._loop).result(10)

    async def _listen(self):
        self._server = await asyncio.start_server(self._joined, "127.0.0.1", 0, ssl=self.shows)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _end(self):
        self._server.close()
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for each in list(self._open):
                each.transport.abort()
            await asyncio.wait(others, timeout=0.1)

    async def _joined(self, reader, writer):
        self._open.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            if await self.greet(reader, writer):
                far_reader, far_writer = await asyncio.open_connection(
                    "127.0.0.1", self.to, ssl=self.trusts
                )
                self.joined += 1
                self._open.add(far_writer)
                await asyncio.gather(
                    self._pump(reader, far_writer, self.heard),
                    self._pump(far_reader, writer, bytearray()),
                )
                self._open.discard(far_writer)
        writer.close()
        self._open.discard(writer)

    async def _pump(self, reader, writer, heard):
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if writer not in self._swallowed:
                    heard += data
                    writer.write(data)
                    await writer.drain()
        if writer not in self._swallowed:
            writer.close()

    async def greet(self, reader, writer) -> bool:
        """What is said before bytes are passed on; whether they are to be."""
        return True


class ProxyServer(Middle):
    """A proxy of a kind. login: (user, password) that it asks for; fault: what it does in place of its work, "forbids",
    "unreachable", "talks nonsense", "closes", "closes at a wrong login" or "asks for another login"."""

    def __init__(self, kind: str, to: int, login=None, fault: str = "") -> None:
        super().__init__(to)
        self.kind, self.login, self.fault = kind, login, fault

    @property
    def proxy(self) -> Proxy:
        """As a site with the right login has it."""
        user, password = self.login or ("", None)
        secret = None if password is None else f":{password.replace(' ', '%20')}"
        return Proxy.parse(
            f"{self.kind}://{user}{secret or ''}{'@' if user else ''}127.0.0.1:{self.port}"
        )

    async def greet(self, reader, writer) -> bool:
        if self.fault == "closes":
            await reader.read(1)
            return False
        if self.fault == "talks nonsense":
            writer.write(b"220 mail.example ESMTP ready\r\n" * 2)
            await reader.read(1)
            return False
        return await (self._http if self.kind == "http" else self._socks)(reader, writer)

    async def _http(self, reader, writer) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        words, *lines = head.split("\r\n")
        self.asked.append(words.split()[1])
        fields = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
        status = {"forbids": "403 No", "unreachable": "502 Bad"}.get(self.fault, "200 OK")
        if self.login is not None:
            basic = base64.b64encode(":".join(self.login).encode()).decode()
            if fields.get("proxy-authorization") != f"Basic {basic}":
                status = "407 Login\r\nProxy-Authenticate: Basic realm=x"
        if self.fault == "asks for another login":
            status = "407 Login\r\nProxy-Authenticate: Negotiate\r\nProxy-Authenticate: NTLM"
        writer.write(f"HTTP/1.1 {status}\r\nVia: here\r\n\r\n".encode())
        return status == "200 OK"

    async def _socks(self, reader, writer) -> bool:
        version, count = await reader.readexactly(2)
        ways = await reader.readexactly(count)
        wanted = 2 if self.login is not None else 0
        wanted = 1 if self.fault == "asks for another login" else wanted
        if version != 5 or wanted not in ways:
            writer.write(b"\x05\xff")
            return False
        writer.write(bytes([5, wanted]))
        if self.login is not None:
            assert await reader.readexactly(1) == b"\x01"
            given = [(await reader.readexactly((await reader.readexactly(1))[0])) for _ in "12"]
            good = given == [each.encode() for each in self.login]
            if good or self.fault != "closes at a wrong login":
                writer.write(bytes([1, 0 if good else 1]))
            if not good:
                return False
        assert await reader.readexactly(3) == b"\x05\x01\x00"
        kind = (await reader.readexactly(1))[0]
        size = {1: 4, 4: 16}.get(kind) or (await reader.readexactly(1))[0]
        name = await reader.readexactly(size)
        port = int.from_bytes(await reader.readexactly(2), "big")
        written = name.decode() if kind == 3 else name.hex()
        self.asked.append(f"{written}:{port}")
        reply = {"forbids": 2, "unreachable": 4}.get(self.fault, 0)
        bound = b"\x03\x04here" if kind == 3 else b"\x01\x7f\0\0\x01"  # both forms of an answer
        writer.write(bytes([5, reply, 0]) + bound + b"\0\0")
        return reply == 0


class Inspector(Middle):
    """A middlebox that inspects TLS: it ends the connection with a certificate of its own for the host, and begins
    another to the coordinator, whoever that is. heard: what it could read. most: its newest version of TLS."""

    def __init__(self, to: int, host: str, most: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> None:
        super().__init__(to)
        self.shows = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.shows.maximum_version = most
        self.shows.set_alpn_protocols(["h2"])
        with tempfile.NamedTemporaryFile() as file:
            file.write(_inspectors_certificate(host))
            file.flush()
            self.shows.load_cert_chain(file.name)
        self.trusts = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.trusts.check_hostname, self.trusts.verify_mode = False, ssl.CERT_NONE


def _inspectors_certificate(host: str) -> bytes:
    """Key and certificate in PEM form, as a proxy makes them at the first connection to a host."""
    issuer, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Corp Proxy CA")]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(issuer, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return pem + certificate.public_bytes(serialization.Encoding.PEM)
