"""Test whether the coordinator can be reached, and if not, why: name, port, proxy, TLS, certificate.

The errors of gRPC have no details (`Socket closed`). `preflight` makes the same handshake once with Python's
`ssl`, which reports the failed check, and raises it as one line with a hint.
Invariant: it decides nothing; the channel makes every check itself. Only the handshake is sent.
"""

import base64
import ipaddress
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any
from urllib.parse import unquote, urlsplit

from fedcore.errors import BadInput, CertificateRefused
from fedcore.files.toml import Section
from fedcore.identity.kit import Kit
from fedcore.identity.peer import CLIENT_ROLES, Peer, require_role
from fedcore.identity.verify import check_certificate, fingerprint

TIMEOUT = 5.0
"""Seconds for each step of `preflight`."""


def preflight(
    kit: Kit, host: str, port: int, *, now: datetime, proxy: str = "", timeout: float = TIMEOUT
) -> tuple[Peer, str, str]:
    """One handshake with the coordinator, checked on both sides: who it is, the TLS version, the cipher. Blocking.

    Raises BadInput if no connection is made (name, address, port, proxy), and CertificateRefused with
    `check` if a certificate does not pass; this side's own is checked first.
    """
    ours = kit.peer
    require_role(ours, CLIENT_ROLES)
    kit.check(ours.role, now)
    where = authority_of(host, port)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies the chain and the name
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=kit.authority_pem.decode())
    try:
        kit.load_into(context)
    except OSError:
        raise BadInput(
            f"{kit.key_path}: found it changed since it was read, expected the key read before",
            remedy="start again, so that the new certificate and its key are read together",
        ) from None
    context.set_alpn_protocols(["h2"])
    theirs, version, cipher, answered, said = b"", "", "", b"", ""
    try:
        with (
            connect(host, port, proxy, timeout) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            theirs = secured.getpeercert(binary_form=True) or b""
            version, cipher = secured.version() or "", (secured.cipher() or ("",))[0]
            answered = secured.recv(1)  # a server that accepted the certificate sends first
    except ssl.SSLCertVerificationError as error:
        raise _why(error, kit, host, port, proxy, timeout, now) from None
    except TimeoutError:
        raise CertificateRefused(
            f"coordinator {where}: found no answer within {timeout:g} s, expected a TLS handshake",
            check="tls",
            remedy="check that a coordinator listens on this port, and that nothing between holds TLS up",
        ) from None
    except OSError as error:  # an SSLError is one
        if not theirs:
            raise _no_tls(where, error) from None
        said = f" ({getattr(error, 'reason', None) or error.strerror})"
    if not answered:
        raise CertificateRefused(
            f"coordinator {where}: found the connection closed{said} at the certificate of {ours}, "
            "expected it accepted",
            check="accepted",
            remedy="it trusts another authority or its clock differs: compare the clocks, and "
            f"authority.pem there with the one here (SHA-256 {fingerprint(kit.authority_pem)[:16]}...)",
        )
    return _coordinator(theirs, kit, host, now), version, cipher


def channel_target(
    host: str, port: int, proxy: str, options: Sequence[tuple[str, Any]] = ()
) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """(target, options) with which gRPC's `secure_channel` connects in the same way as `preflight`.

    proxy: `http://[user:password@]host:port` for a CONNECT proxy, or empty for none; the environment's
    `https_proxy` is ignored, and a loopback address is never proxied. Raises BadInput.
    """
    ours: dict[str, Any] = {"grpc.enable_http_proxy": 0}
    if proxied(host, proxy):
        ours = {"grpc.enable_http_proxy": 1, "grpc.http_proxy": proxy}
    together = tuple((dict(options) | ours).items())  # of duplicate options gRPC takes either
    return f"dns:///{authority_of(host, port)}", together


def endpoint(text: str, what: str = "coordinator") -> tuple[str, int]:
    """(host, port) of the text `host:port`, an IPv6 address in brackets. Raises BadInput."""
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    written = f"[{bare}]" if ":" in bare else bare
    if not bare or not port.isdecimal() or host != written:
        raise BadInput(
            f"{what}: found {text!r}, expected host:port, as hub.example.org:7443 or [::1]:7443"
        )
    authority_of(bare, int(port))
    return bare, int(port)


class CoordinatorAddress(Section):
    """How a file names the coordinator. proxy: a URL, or "none".

    standbys: addresses under which another coordinator of the federation takes over; they are tried in turn.
    """

    coordinator: str
    standbys: tuple[str, ...] = ()
    proxy: str = "none"

    @property
    def host(self) -> str:
        """Name or address of the coordinator."""
        return endpoint(self.coordinator)[0]

    @property
    def port(self) -> int:
        """Its port."""
        return endpoint(self.coordinator)[1]

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """(host, port) of the coordinator, then of its standbys. Raises BadInput."""
        whole = endpoint(self.coordinator), *(endpoint(each, "standbys") for each in self.standbys)
        return tuple(whole)

    @property
    def through(self) -> str:
        """The proxy's URL, or "" for none."""
        return "" if self.proxy == "none" else self.proxy


def authority_of(host: str, port: int) -> str:
    """`host:port` for a URL, an IPv6 address in brackets. Raises BadInput."""
    if not 0 < port < 65536:
        raise BadInput(f"coordinator: found port {port}, expected 1 to 65535")
    if _address(host) is None and not all(
        0 < len(label) < 64
        and label.replace("-", "a").replace("_", "a").isalnum()
        and label.isascii()
        for label in host.removesuffix(".").split(".")
    ):
        raise BadInput(f"coordinator: found host {host!r}, expected a DNS name or an address")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _coordinator(der: bytes, kit: Kit, host: str, now: datetime) -> Peer:
    pem, ours = ssl.DER_cert_to_PEM_cert(der).encode(), kit.peer.federation
    return check_certificate(
        pem, kit.authority_pem, federation=ours, role="coordinator", now=now, host=host
    )


def _why(
    error: ssl.SSLCertVerificationError,
    kit: Kit,
    host: str,
    port: int,
    proxy: str,
    timeout: float,
    now: datetime,
) -> CertificateRefused:
    """The error for the check that the other side's certificate failed, with our text or else OpenSSL's."""
    look = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # to read the certificate; nothing is sent
    look.check_hostname, look.verify_mode = False, ssl.CERT_NONE
    theirs = None
    with (
        suppress(OSError, BadInput),
        connect(host, port, proxy, timeout) as plain,
        look.wrap_socket(plain, server_hostname=host) as seen,
    ):
        theirs = seen.getpeercert(binary_form=True)
    try:
        if theirs is not None:
            _coordinator(theirs, kit, host, now)
    except CertificateRefused as refused:
        return refused
    return CertificateRefused(
        f"coordinator {authority_of(host, port)}: found a certificate that does not verify "
        f"({error.verify_message}), expected one of the authority",
        check="issuer",
        remedy="compare authority.pem and the clocks of both machines",
    )


def _no_tls(where: str, error: OSError) -> CertificateRefused:
    reason = str(getattr(error, "reason", ""))
    if "PROTOCOL_VERSION" in reason:
        return CertificateRefused(
            f"coordinator {where}: found no TLS 1.3 there ({reason}), expected it",
            check="version",
            remedy="check host and port, and that no proxy or firewall between ends TLS",
        )
    found = "something that does not speak TLS"
    if isinstance(error, ssl.SSLEOFError | ConnectionError):
        found = "the connection closed before TLS began"
    return CertificateRefused(
        f"coordinator {where}: found {found}, expected a coordinator",
        check="tls",
        remedy="check host and port of the coordinator, and that no firewall is between",
    )


def connect(host: str, port: int, proxy: str, timeout: float = TIMEOUT) -> socket.socket:
    """A TCP connection, through the proxy where one is set. Raises BadInput."""
    through = proxied(host, proxy)
    to = (through[0], through[1]) if through else (host, port)
    what = f"proxy {to[0]}:{to[1]}" if through else f"coordinator {authority_of(host, port)}"
    try:
        connection = socket.create_connection(to, timeout)
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
    if through is None:
        return connection
    try:
        connection.sendall(_connect_request(authority_of(host, port), through[2]))
        answer = b""
        while b"\r\n\r\n" not in answer and len(answer) < 8192:
            more = connection.recv(1)  # byte by byte: what follows belongs to TLS
            if not more:
                break
            answer += more
    except OSError as error:
        connection.close()
        raise BadInput(f"{what}: found no answer ({error.strerror or 'timed out'})") from error
    status = answer.split(b" ", 2)[1:2]
    if status != [b"200"]:
        connection.close()
        raise BadInput(
            f"{what}: found status {b''.join(status)[:3].decode('ascii', 'replace') or 'none'} for "
            f"{authority_of(host, port)}, expected 200",
            remedy="ask whoever runs the proxy to allow CONNECT to this host and port",
        )
    return connection


def _connect_request(where: str, credentials: str) -> bytes:
    lines = [f"CONNECT {where} HTTP/1.1", f"Host: {where}"]
    if credentials:
        encoded = base64.b64encode(credentials.encode()).decode()
        lines.append(f"Proxy-Authorization: Basic {encoded}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def proxied(host: str, proxy: str) -> tuple[str, int, str] | None:
    """Host, port and credentials of the proxy for `host`, or None for a direct connection. Raises BadInput."""
    if not proxy:
        return None
    wrong = BadInput("proxy: found no http://HOST:PORT, expected one")  # it may hold a password
    try:
        found = urlsplit(proxy)
        name, port = found.hostname, found.port
    except ValueError:
        raise wrong from None
    if name is None or port is None or found.scheme != "http" or found.path.strip("/"):
        raise wrong
    address = _address(host)
    if host.lower().rstrip(".") == "localhost" or (address is not None and address.is_loopback):
        return None
    user = unquote(found.username or "")
    return name, port, f"{user}:{unquote(found.password or '')}" if user else ""


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
