"""A client's end of TLS: the channel to the coordinator, and why it was refused.

Invariant: a channel is TLS to a coordinator whose certificate the authority issued for the name it is reached
under; there is no plaintext, no override of the name, and no proxy that was not set. `fedcore.identity.preflight`
finds out why a connection fails where gRPC gives no reason.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import grpc
import grpc.aio

from fedcore.identity.kit import Kit
from fedcore.identity.peer import CLIENT_ROLES, require_role
from fedcore.identity.preflight import channel_target
from fedcore.wire import calls

Q = TypeVar("Q")
A = TypeVar("A")


def channel_credentials(kit: Kit) -> grpc.ChannelCredentials:
    """TLS with this certificate, to holders of one of the same authority only.

    Raises CertificateRefused for a coordinator's kit.
    """
    require_role(kit.peer, CLIENT_ROLES)
    return grpc.ssl_channel_credentials(
        root_certificates=kit.authority_pem,
        private_key=kit.key_pem.reveal(),
        certificate_chain=kit.certificate_pem,
    )


def open_channel(
    kit: Kit, host: str, port: int, *, proxy: str = "", options: Sequence[tuple[str, Any]] = ()
) -> grpc.aio.Channel:
    """A channel to the coordinator; connecting begins with the first call.

    proxy: `http://[user:password@]host:port` for a CONNECT proxy, or empty for none: the environment's
    `https_proxy` is ignored, and a loopback address is never proxied. options: further gRPC ones.
    Raises BadInput for a malformed host, port or proxy.
    """
    target, together = channel_target(host, port, proxy, options)
    return grpc.aio.secure_channel(target, channel_credentials(kit), options=together)


async def call_unary(
    channel: grpc.aio.Channel, call: calls.Call[Q, A], asked: Q, seconds: float | None = None
) -> A:
    """The coordinator's answer to one request. Raises AioRpcError and MalformedMessage."""
    begin: Any = channel.unary_unary(call.path)
    answer = await begin(call.takes.pack(asked), timeout=seconds)
    return call.gives.unpack(answer, sender="coordinator")
