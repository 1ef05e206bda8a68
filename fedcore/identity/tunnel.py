"""A TCP connection to the coordinator, direct or through a proxy: HTTP CONNECT (RFC 9110), SOCKS5 (RFC 1928, 1929).

The proxy is asked for a name, which it resolves itself, and passes bytes on: TLS begins behind it, so it sees
ciphertext, the name and the port. Nothing is sent to the coordinator here.
"""

import base64
import os
import socket
import time

from fedcore.errors import BadInput, printable
from fedcore.identity.addresses import authority_of, ip_of
from fedcore.identity.proxies import Proxy, variable_set

TIMEOUT = 5.0
"""Seconds for each step: the connection, and the whole talk with a proxy."""

MOST_ANSWER = 8192
"""Bytes of a proxy's answer to CONNECT."""

_VERSION, _CONNECT, _NO_LOGIN, _PASSWORD, _NONE_FITS = 5, 1, 0, 2, 0xFF
_IPV4, _NAME, _IPV6 = 1, 3, 4
_REPLIES = {
    1: "a failure without a reason", 2: "that its rules forbid it", 3: "that it reaches no such network",
    4: "that it reaches no such host, or does not know the name", 5: "that the connection was refused there",
    6: "that the way is too long", 7: "that it does not know CONNECT", 8: "that it does not know this kind of address",
}  # fmt: skip
"""What a SOCKS5 server's reply stands for (RFC 1928, section 6)."""

_CLOSED = "check host, port and kind of the proxy, and that it allows this machine"
_ALLOW = "ask whoever runs the proxy to allow {where}, as CONNECT without inspection"
_LOGIN = "check `user` and `password` of [proxy] in site.toml, or those of the variable in the environment"


def connect(host: str, port: int, proxy: Proxy | None, timeout: float = TIMEOUT) -> socket.socket:
    """A connection whose next byte is the coordinator's. Raises BadInput, which names what failed: the name, the
    port, or what the proxy said."""
    where = authority_of(host, port)
    through = proxy if proxy is not None and proxy.serves(host, port) else None
    if through is None:
        try:
            return _tcp(host, port, f"coordinator {where}", timeout)
        except BadInput as error:
            name = variable_set(os.environ) if proxy is None else None
            if name is None:
                raise
            more = f'; or is it behind the proxy of {name}? It is used under proxy = "environment" only'
            raise BadInput(str(error), remedy=error.remedy + more) from error
    what = f"proxy {through.where}"
    connection = _tcp(through.host, through.port, what, timeout)
    talk = _Talk(connection, what, timeout)
    try:
        if through.scheme == "http":
            _http(talk, where, through)
        else:
            _socks(talk, host, port, through)
    except OSError as error:
        connection.close()
        raise BadInput(
            f"{what}: found no answer ({error.strerror or 'timed out'}), expected one of a {through.scheme} proxy",
            remedy=_CLOSED,
        ) from error
    except BaseException:
        connection.close()
        raise
    connection.settimeout(timeout)
    return connection


def _tcp(host: str, port: int, what: str, timeout: float) -> socket.socket:
    """To any of the addresses of a name, in turn. Raises BadInput."""
    try:
        return socket.create_connection((host, port), timeout)
    except socket.gaierror as error:
        raise BadInput(
            f"{what}: found no address under this name ({error.strerror})",
            remedy="check the name, and that this machine's DNS knows it",
        ) from error
    except OSError as error:
        raise BadInput(
            f"{what}: found no connection ({error.strerror or 'timed out'}), expected a listening port",
            remedy="check host and port, that it runs, and that no firewall is between",
        ) from error


class _Talk:
    """What is said to a proxy before it passes bytes on: exact reads, all of them before one deadline."""

    def __init__(self, connection: socket.socket, what: str, timeout: float) -> None:
        self._connection, self.what, self._end = connection, what, time.monotonic() + timeout

    def send(self, data: bytes) -> None:
        """Raises OSError."""
        self._connection.settimeout(self._left())
        self._connection.sendall(data)

    def read(self, size: int, *, after: str = "before its answer", remedy: str = _CLOSED) -> bytes:
        """So many bytes. Raises OSError, BadInput where it ends before; after: when that is, in words."""
        found = b""
        while len(found) < size:
            self._connection.settimeout(self._left())
            more = self._connection.recv(size - len(found))
            if not more:
                raise BadInput(
                    f"{self.what}: found the connection closed {after}, expected an answer",
                    remedy=remedy,
                )
            found += more
        return found

    def _left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def _http(talk: _Talk, where: str, proxy: Proxy) -> None:
    lines = [f"CONNECT {where} HTTP/1.1", f"Host: {where}"]
    if proxy.user:
        secret = proxy.password.reveal() if proxy.password is not None else b""
        basic = base64.b64encode(proxy.user.encode() + b":" + secret).decode()
        lines.append(f"Proxy-Authorization: Basic {basic}")
    talk.send(("\r\n".join(lines) + "\r\n\r\n").encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n") and len(answer) < MOST_ANSWER:
        answer += talk.read(1)  # byte by byte: what follows belongs to TLS
        if len(answer) == 5 and answer != b"HTTP/":
            raise _nonsense(talk, "HTTP")
    first, *headers = answer.decode("latin-1").split("\r\n")
    status = first.partition(" ")[2][:3]
    if not status.isdecimal() or not answer.endswith(b"\r\n\r\n"):
        raise _nonsense(talk, "HTTP")
    if status != "200":
        raise BadInput(
            f"{talk.what}: found status {status} for {where}, expected 200",
            remedy=_http_remedy(status, headers, where, proxy),
        )


def _http_remedy(status: str, headers: list[str], where: str, proxy: Proxy) -> str:
    if status == "407":
        names = [each.partition(":") for each in headers]
        asked = [
            value.split()[:1] for name, _, value in names if name.lower() == "proxy-authenticate"
        ]
        ways = [printable(each[0]) for each in asked if each]
        if ways and "basic" not in (each.lower() for each in ways):
            return (
                f"the proxy asks for {', '.join(ways)}, and this program has Basic only: ask for an exemption of "
                f"{where}, or connect through a relay on this machine that logs in, such as cntlm"
            )
        given = (
            "it refused the user or the password"
            if proxy.user
            else "it asks for a user and a password"
        )
        return f"{given}: {_LOGIN}"
    if status in {"502", "503", "504"}:
        return f"the proxy does not reach {where}: check that the coordinator runs, and that the proxy may call it"
    return _ALLOW.format(where=where)


def _socks(talk: _Talk, host: str, port: int, proxy: Proxy) -> None:
    where = authority_of(host, port)
    ways = bytes([_NO_LOGIN, _PASSWORD] if proxy.user else [_NO_LOGIN])
    talk.send(bytes([_VERSION, len(ways)]) + ways)
    version, way = talk.read(2)
    if version != _VERSION or way not in {*ways, _NONE_FITS}:
        raise _nonsense(talk, "SOCKS5")
    if way == _NONE_FITS:
        asks = (
            "another way to log in than a user and a password"
            if proxy.user
            else "a user and a password"
        )
        raise BadInput(
            f"{talk.what}: found that it asks for {asks}, expected it to accept this site",
            remedy=f"{_LOGIN}; GSSAPI is not spoken here",
        )
    if way == _PASSWORD:
        _log_in(talk, proxy)
    talk.send(bytes([_VERSION, _CONNECT, 0]) + _destination(host, port))
    version, reply, _, kind = talk.read(4)
    if version != _VERSION or kind not in {_IPV4, _NAME, _IPV6}:
        raise _nonsense(talk, "SOCKS5")
    if reply:
        raise BadInput(
            f"{talk.what}: found {_REPLIES.get(reply, 'an unknown failure')} (SOCKS5 reply {reply}) for {where}, "
            "expected it connected",
            remedy=_ALLOW.format(where=where) if reply == 2 else
            f"check that the coordinator runs, and that the proxy may call {where}",
        )  # fmt: skip
    talk.read((talk.read(1)[0] if kind == _NAME else {_IPV4: 4, _IPV6: 16}[kind]) + 2)


def _log_in(talk: _Talk, proxy: Proxy) -> None:
    user = proxy.user.encode()
    secret = proxy.password.reveal() if proxy.password is not None else b""
    for name, each in (("user", user), ("password", secret)):
        if not 0 < len(each) < 256:
            raise BadInput(
                f"proxy: found a {name} of {len(each)} bytes, expected 1 to 255, as SOCKS5 has it"
            )
    talk.send(bytes([1, len(user)]) + user + bytes([len(secret)]) + secret)
    version, status = talk.read(2, after="at the user and the password", remedy=_LOGIN)
    if version != 1:
        raise _nonsense(talk, "SOCKS5")
    if status:
        raise BadInput(
            f"{talk.what}: found the user or the password refused, expected them accepted",
            remedy=_LOGIN,
        )


def _destination(host: str, port: int) -> bytes:
    address = ip_of(host)
    if address is not None:
        written = bytes([_IPV4 if address.version == 4 else _IPV6]) + address.packed
    else:
        written = bytes([_NAME, len(host)]) + host.encode()
    return written + port.to_bytes(2, "big")


def _nonsense(talk: _Talk, protocol: str) -> BadInput:
    return BadInput(
        f"{talk.what}: found an answer that is not {protocol}, expected a proxy that speaks it",
        remedy="check host and port of the proxy, and its kind: http:// is HTTP CONNECT, socks5:// is SOCKS5",
    )
