"""The coordinator's end of TLS: which peers may connect, and the peer of a call.

Invariant: every port is TLS with a client certificate required, and every call is admitted anew, by
`Gate`: version, federation, role, time, roster, revocation. gRPC checks the chain and the times when a
connection begins; `Gate.still` finds a session that outlives its certificate.

gRPC's minimum is TLS 1.2 and has no setting in Python, so a call under anything but 1.3 is refused here. Between
two of our own ends it is 1.3 with X25519MLKEM768, so that recorded traffic stays confidential against a quantum
computer; `tests/unit/wire/test_tls.py` reads both from a call. A gRPC server that refuses a certificate closes the
connection without a reason: `identity/preflight.py` finds it.
"""

import errno
import ipaddress
import socket
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, NoReturn, TypeAlias, cast
from urllib.parse import unquote

import grpc
import grpc.aio

from fedcore.errors import BadInput, CertificateRefused, PeerRefused, printable
from fedcore.identity.kit import Kit, KitFile
from fedcore.identity.peer import (
    Peer,
    peer_of,
    require_federation,
    require_role,
    require_rostered,
    require_time,
)
from fedcore.identity.revocation import Revocations
from fedcore.wire import calls
from fedcore.wire.refusals import refusal_text

SERVER_OPTIONS = (("grpc.so_reuseport", 0),)
"""Otherwise a second coordinator could bind the same port and take half of the sites."""

TLS_VERSION = "TLSv1.3"

ServicerContext: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


def server_credentials(kit: Kit) -> grpc.ServerCredentials:
    """TLS with this certificate, for clients with one of the same authority only; a renewed one is used for new
    connections. Raises CertificateRefused for a kit that is not a coordinator's."""
    require_role(kit.peer, ["coordinator"])
    kits = KitFile(kit)
    return grpc.dynamic_ssl_server_credentials(
        # grpcio takes None for "as before", which its types do not say.
        _certificate(kit),
        cast(Any, partial(renewed, kits)),
        require_client_authentication=True,
    )


def renewed(kits: KitFile) -> grpc.ServerCertificateConfiguration | None:
    """A new certificate, None where it is the one in use. Called by gRPC at each handshake, in a thread of its own.

    gRPC replaces what handshakes are made with by what this returns, without a lock: with a certificate each time, some
    of many handshakes at once ended the process (grpcio 1.85.1).
    """
    return _certificate(kits.current) if kits.refresh() else None


def _certificate(kit: Kit) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(kit.key_pem.reveal(), kit.certificate_pem)], root_certificates=kit.authority_pem
    )


def bind(
    server: grpc.aio.Server,
    credentials: Callable[[], grpc.ServerCredentials],
    *,
    hosts: Sequence[str] = ("::",),
    port: int = 0,
) -> tuple[int, tuple[str, ...]]:
    """Bind every address to one port (0: a free one); the port, and the addresses it is bound to.

    hosts: IP addresses; `::` is IPv6 and IPv4, or IPv4 alone on a machine without IPv6. `::1` is left out on such a
    machine if another address is bound; any other failure raises BadInput. credentials: makes those of one address, for
    gRPC gives the certificate of `server_credentials` to one port. `server` must have been made with
    SERVER_OPTIONS.
    """
    bound: list[str] = []
    for host in hosts:
        try:
            version = ipaddress.ip_address(host).version
        except ValueError:
            raise BadInput(
                f"listen: found {host!r}, expected an IP address, as ::1 or 0.0.0.0"
            ) from None
        address = f"[{host}]" if version == 6 else host
        try:
            port = server.add_secure_port(f"{address}:{port}", credentials())
        except RuntimeError:
            cause = _cause(host, port)
            if host == "::1" and cause in {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL} and bound:
                continue
            raise _unbound(f"{address}:{port}", cause) from None
        bound.append(f"{address}:{port}")
    if not bound:
        raise BadInput("listen: found no address, expected one, as :: for all of this machine")
    return port, tuple(bound)


def listen_sockets(hosts: Sequence[str], port: int) -> list[socket.socket]:
    """Listening sockets at one port, with `bind`'s rules, for a protocol other than gRPC. Raises BadInput."""
    found: list[socket.socket] = []
    try:
        for host in hosts:
            both = host == "::"
            if both and not socket.has_dualstack_ipv6():
                host, both = "0.0.0.0", False  # noqa: PLW2901, S104 - every address, as asked
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            try:
                one = socket.create_server((host, port), family=family, dualstack_ipv6=both)
            except OSError as error:
                if (
                    host == "::1"
                    and error.errno in {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}
                    and found
                ):
                    continue
                raise _unbound(f"{host}:{port}", error.errno or 0) from None
            one.setblocking(False)
            found.append(one)
            port = one.getsockname()[1]
    except BadInput:
        for each in found:
            each.close()
        raise
    return found


@dataclass
class Gate:
    """Admission by certificate. roster: the sites' names, read at each call. clock: now, with a zone.

    trouble: called when the list of revoked certificates changed and cannot be read. unknown: called before a site that
    is not on the roster is refused: it may have been put there just now.
    """

    federation: str
    roster: Collection[str]
    revocations: Revocations
    clock: Callable[[], datetime]
    trouble: Callable[[BadInput], None]
    unknown: Callable[[], None] = lambda: None

    def admit(self, context: ServicerContext, roles: Collection[str]) -> Peer:
        """The peer of a call that may make it, else CertificateRefused: see `refuse`."""
        peer = peer_of_call(context)
        require_federation(peer, self.federation)
        require_role(peer, roles)
        if peer.role == calls.SITE and peer.name not in self.roster:
            self.unknown()
        self.still(peer)
        return peer

    def still(self, peer: Peer) -> None:
        """Check what can change during a session: time, roster, revocation. Raises CertificateRefused.

        Cheap enough to be called every second for every session.
        """
        try:
            self.revocations.refresh()
        except BadInput as error:
            self.trouble(error)
        self.revocations.check(peer)
        require_time(str(peer), peer.begins, peer.ends, self.clock())
        require_rostered(peer, self.roster)


def peer_of_call(context: ServicerContext) -> Peer:
    """The peer of a call, from the certificate of its connection. Raises CertificateRefused."""
    about = context.auth_context()
    certificates = list(about.get("x509_pem_cert", ()))
    if not certificates:
        raise CertificateRefused(
            "call: found no certificate on its connection, expected one", check="readable"
        )
    peer = peer_of(certificates[0])
    version = b" ".join(about.get("ssl_tls_version", ())).decode()
    if version != TLS_VERSION:
        raise CertificateRefused(
            f"connection of {peer}: found {version or 'an unknown version of TLS'}, "
            f"expected {TLS_VERSION}",
            check="version",
            remedy="use fed-site, or another client that speaks TLS 1.3",
        )
    return peer


def address_of(connection: str) -> str:
    """The address of IPv4 or IPv6 in what gRPC calls the peer of a call; of a proxy, where there is one."""
    found = unquote(connection).partition(":")[2]
    return printable(found.rpartition(":")[0].strip("[]"), 64)


async def refuse(context: ServicerContext, error: PeerRefused) -> NoReturn:
    """End a call with the refusal as its status. Raises what gRPC raises."""
    await context.abort(grpc.StatusCode.PERMISSION_DENIED, refusal_text(error))
    raise AssertionError  # pragma: no cover  abort never returns


def _cause(host: str, port: int) -> int:
    """The errno of a plain socket at this address, or 0: gRPC reports only that binding failed."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, port))
    except OSError as error:
        return error.errno or 0
    return 0


def _unbound(address: str, cause: int) -> BadInput:
    other = (
        "another coordinator runs here, or another program has this port: stop it or choose another"
    )
    ours = "listen on an address of this machine, or on :: for all of them"
    found, remedy = {
        errno.EADDRINUSE: ("it in use", other),
        errno.EACCES: ("no permission", "ports below 1024 need privileges; choose a higher one"),
        errno.EADDRNOTAVAIL: ("no such address on this machine", ours),
    }.get(cause, ("an address that cannot be bound", "choose another address or port"))
    return BadInput(
        f"listen on {printable(address)}: found {found}, expected a free port", remedy=remedy
    )
