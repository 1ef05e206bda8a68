"""A site's channel to the coordinator, and single calls on it.

Invariant: a channel is TLS to a coordinator whose certificate the authority issued for the name it is reached under;
there is no plaintext, no other name, and no proxy that was not set.
"""

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio

from fedcore.identity.addresses import authority_of
from fedcore.identity.kit import Kit
from fedcore.identity.peer import CLIENT_ROLES, require_role
from fedcore.identity.preflight import channel_target
from fedcore.identity.proxies import Proxy
from fedcore.wire import calls

Q = TypeVar("Q")
A = TypeVar("A")


def channel_credentials(kit: Kit) -> grpc.ChannelCredentials:
    """TLS with this certificate, to holders of one of the same authority only. Raises CertificateRefused for a
    coordinator's kit."""
    require_role(kit.peer, CLIENT_ROLES)
    return grpc.ssl_channel_credentials(
        root_certificates=kit.authority_pem,
        private_key=kit.key_pem.reveal(),
        certificate_chain=kit.certificate_pem,
    )


def open_channel(
    kit: Kit,
    host: str,
    port: int,
    *,
    proxy: Proxy | None = None,
    options: Sequence[tuple[str, Any]] = (),
    folder: Path | None = None,
) -> contextlib.AbstractAsyncContextManager[grpc.aio.Channel]:
    """A channel to the coordinator, open inside `async with`; connecting begins with the first call.

    proxy: None for none: gRPC does not look at the environment's `https_proxy`. options: further gRPC ones; folder:
    of the socket on the way to a proxy. Raises BadInput for a malformed host or port, CertificateRefused.
    """
    authority_of(host, port)
    credentials = channel_credentials(kit)

    @contextlib.asynccontextmanager
    async def opened() -> AsyncIterator[grpc.aio.Channel]:
        with channel_target(host, port, proxy, options, folder) as (target, together):
            async with grpc.aio.secure_channel(target, credentials, options=together) as channel:
                yield channel

    return opened()


async def call_unary(
    channel: grpc.aio.Channel, call: calls.Call[Q, A], asked: Q, seconds: float | None = None
) -> A:
    """The coordinator's answer to one request. Raises AioRpcError and MalformedMessage."""
    begin: Any = channel.unary_unary(call.path)
    answer = await begin(call.takes.pack(asked), timeout=seconds)
    return call.gives.unpack(answer, sender="coordinator")


class Offline(Exception):
    """There is no session now: retry at the next one."""
