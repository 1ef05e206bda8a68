"""What stands between a site and its coordinator, small and real: SOCKS5 and CONNECT proxies, and a relay that
swallows bytes. Each listens on loopback and knows one destination, whatever name it is asked for."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import threading

from fedcore.identity.proxies import Proxy

LOGIN = ("ann", "pass word")
"""User and password that a proxy with a login accepts."""


class Middle:
    """A port in a thread of its own, open inside `with`, and the coordinator's port behind it.

    asked: what it was asked for, in order; heard: every byte that it passed on to the coordinator."""

    def __init__(self, to: int) -> None:
        self.to, self.port = to, 0
        self.asked: list[str] = []
        self.heard = bytearray()
        self.silent = threading.Event()
        """While set, bytes are read and dropped, in both directions."""
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

    async def _listen(self):
        self._server = await asyncio.start_server(self._joined, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _end(self):
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for each in others:
            each.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _joined(self, reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            if await self.greet(reader, writer):
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.to)
                await asyncio.gather(
                    self._pump(reader, far_writer, self.heard),
                    self._pump(far_reader, writer, bytearray()),
                )
        writer.close()

    async def _pump(self, reader, writer, heard):
        try:
            while data := await reader.read(1 << 16):
                if not self.silent.is_set():
                    heard += data
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.close()

    async def greet(self, reader, writer) -> bool:
        """What is said before bytes are passed on; whether they are to be."""
        return True


class ProxyServer(Middle):
    """A proxy of a kind. login: (user, password) that it asks for; fault: what it does in place of its work, "forbids",
    "unreachable", "talks nonsense", "closes" or "asks for another login"."""

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
