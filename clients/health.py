"""/healthz and /readyz of a site, in plain HTTP on a loopback address, for a supervisor.

Invariant: bound to loopback only; the answer is one word and gives no reason: that is in `fed-site status` and the
log. healthz: this process answers. readyz: it has a session.
"""

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator, Callable

from fedcore.errors import BadInput

ADDRESS = "127.0.0.1"
_SECONDS = 5.0
_LONGEST = 8192


@contextlib.asynccontextmanager
async def health(port: int, ready: Callable[[], bool]) -> AsyncIterator[int]:
    """Answer probes while inside; gives the port (0: a free one). Raises BadInput."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, EOFError, TimeoutError):
            async with asyncio.timeout(_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(_response(head.split(b" ")[1:2], ready()))
                await writer.drain()
        writer.close()

    try:
        server = await asyncio.start_server(answer, ADDRESS, port, limit=_LONGEST)
    except OSError as error:
        used = error.errno == errno.EADDRINUSE
        raise BadInput(
            f"--health: found {ADDRESS}:{port} {'in use' if used else f'refused ({error.strerror})'}, "
            "expected a free port",
            remedy="choose another port",
        ) from error
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def _response(path: list[bytes], ready: bool) -> bytes:
    status, text = {
        b"/healthz": ("200 OK", "ok"),
        b"/readyz": ("200 OK", "ready") if ready else ("503 Service Unavailable", "not connected"),
    }.get(path[0] if path else b"", ("404 Not Found", "/healthz or /readyz"))
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(text) + 1}\r\n"
        f"Connection: close\r\n\r\n{text}\n"
    ).encode()
