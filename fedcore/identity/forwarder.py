"""The way from gRPC to a proxy: a socket of this site's own, whose connections are passed on through the proxy.

gRPC speaks no SOCKS5, and says neither what a proxy answered nor keeps its password out of its own log. So it connects
to a Unix socket here, and each connection there is one through the proxy (`tunnel.py`), to one host and port only. TLS
stays between gRPC and the coordinator: what passes is ciphertext.

Invariant: the socket is in a folder of this user's and has mode 0600, so no other user of the machine can use the
proxy, or its password, through it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from fedcore.errors import BadInput
from fedcore.files.disk import make_folder, refusals
from fedcore.identity.proxies import Proxy
from fedcore.identity.tunnel import connect

LOG = logging.getLogger("fedcore.proxy")

SOCKET_FILE = "proxy.socket"
PIECE = 1 << 18
"""Bytes that are passed on at once."""

DIAL_SECONDS = 15.0
MOST_PATH = 100
"""Bytes of a Unix socket's path; the systems allow 104 to 108."""


class Forwarder:
    """One, open inside `with`. folder: of the socket; None: a new one that only this user can enter."""

    def __init__(self, host: str, port: int, proxy: Proxy, folder: Path | None = None) -> None:
        self._to, self._proxy, self._folder = (host, port), proxy, folder
        self._opened = contextlib.ExitStack()
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False
        self.path = Path()

    def __enter__(self) -> Self:
        """Raises BadInput for a folder whose path is too long, and StoreProblem."""
        with self._opened:
            folder = self._folder or Path(
                self._opened.enter_context(tempfile.TemporaryDirectory(prefix="fedcore-"))
            )
            self.path = folder / SOCKET_FILE
            if len(os.fsencode(self.path)) > MOST_PATH:
                raise BadInput(
                    f"folder: found a path of {len(os.fsencode(folder))} bytes, expected at most "
                    f"{MOST_PATH - len(SOCKET_FILE) - 1} with a proxy: a socket is in it",
                    remedy="name a shorter `folder` in site.toml",
                )
            with refusals("proxy", self.path):
                make_folder(folder)
                self.path.unlink(missing_ok=True)
                listener = self._opened.enter_context(
                    socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                )
                listener.bind(str(self.path))
                self.path.chmod(0o600)
                listener.listen()  # nobody could connect before
            self._opened.callback(self.path.unlink, missing_ok=True)
            self._opened.callback(self._end, listener)
            self._start(self._accept, listener)
            self._opened = self._opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.close()

    @property
    def target(self) -> str:
        """What gRPC connects to."""
        return f"unix:{self.path}"

    def _end(self, listener: socket.socket) -> None:
        with self._lock:
            self._closed = True
            found = list(self._sockets)
        for each in (listener, *found):
            _shut(each)

    @staticmethod
    def _start(run: Callable[..., None], *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=run, args=arguments, daemon=True, name="proxy")
        thread.start()
        return thread

    def _accept(self, listener: socket.socket) -> None:
        while not self._closed:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            self._start(self._pass_on, near)

    def _pass_on(self, near: socket.socket) -> None:
        with near, contextlib.ExitStack() as opened:
            try:
                far = opened.enter_context(connect(*self._to, self._proxy, DIAL_SECONDS))
            except BadInput as error:  # gRPC sees the connection closed; the caller then asks why
                LOG.debug("%s", error)
                return
            far.settimeout(None)
            far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                if self._closed:
                    return
                self._sockets |= {near, far}
            back = self._start(_pump, far, near)
            _pump(near, far)
            back.join()
            with self._lock:
                self._sockets -= {near, far}


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Pass bytes on until either end is closed; then both are."""
    with contextlib.suppress(OSError):
        while data := source.recv(PIECE):
            sink.sendall(data)
    for each in (source, sink):
        _shut(each)


def _shut(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
