"""Test whether the coordinator can be reached, and if not, why: name, port, proxy, TLS, certificate.

The errors of gRPC have no details (`Socket closed`). `preflight` makes the same handshake once with Python's
`ssl`, which reports the failed check, and raises it as one line with a hint.
Invariant: it decides nothing; the channel makes every check itself. Only the handshake is sent.
"""

import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from fedcore.errors import BadInput, CertificateRefused
from fedcore.files.toml import Section
from fedcore.identity.addresses import authority_of, endpoint
from fedcore.identity.forwarder import Forwarder
from fedcore.identity.inspection import LOOK_SECONDS, inspected, presented
from fedcore.identity.kit import Kit
from fedcore.identity.peer import CLIENT_ROLES, Peer, require_role
from fedcore.identity.proxies import Proxy, ProxyKey, ProxySection
from fedcore.identity.tunnel import TIMEOUT, connect
from fedcore.identity.verify import check_certificate, fingerprint


def preflight(
    kit: Kit,
    host: str,
    port: int,
    *,
    now: datetime,
    proxy: Proxy | None = None,
    timeout: float = TIMEOUT,
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
            old = presented(host, port, proxy, min(timeout, LOOK_SECONDS))  # by an older TLS
            raise inspected(old, host, port) or _no_tls(where, error) from None
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


@contextmanager
def channel_target(
    host: str,
    port: int,
    proxy: Proxy | None,
    options: Sequence[tuple[str, Any]] = (),
    folder: Path | None = None,
) -> Iterator[tuple[str, tuple[tuple[str, Any], ...]]]:
    """(target, options) with which gRPC's `secure_channel` connects in the same way as `preflight`, while inside.

    The environment's `https_proxy` is ignored by gRPC: `proxy` alone counts. folder: of the socket on the way to a
    proxy; None: a new one. Raises BadInput.
    """
    where = authority_of(host, port)
    ours: dict[str, Any] = {"grpc.enable_http_proxy": 0}
    if proxy is None or not proxy.serves(host, port):
        yield f"dns:///{where}", _together(options, ours)
        return
    with Forwarder(host, port, proxy, folder) as forwarder:
        ours["grpc.default_authority"] = where  # the name that the certificate must have
        yield forwarder.target, _together(options, ours)


def _together(
    options: Sequence[tuple[str, Any]], ours: dict[str, Any]
) -> tuple[tuple[str, Any], ...]:
    return tuple((dict(options) | ours).items())  # of duplicate options gRPC takes either


class CoordinatorAddress(Section):
    """How a file names the coordinator. proxy: a URL, "none", "environment" or a table (`proxies.py`).

    standbys: addresses under which another coordinator of the federation takes over; they are tried in turn.
    """

    coordinator: str
    standbys: tuple[str, ...] = ()
    proxy: ProxyKey = Field(default_factory=ProxySection)

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
    def through(self) -> Proxy | None:
        """The proxy, None for none. Raises BadInput for a password that is not where it should be."""
        return self.proxy.open()


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
    proxy: Proxy | None,
    timeout: float,
    now: datetime,
) -> CertificateRefused:
    """The error for the check that the other side's certificate failed, with our text or else OpenSSL's."""
    theirs = presented(host, port, proxy, timeout)
    found = inspected(theirs, host, port)
    if found is not None:
        return found
    try:
        if theirs:
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
