"""The gRPC handlers of a coordinator: admission, limits and errors of every call, then the call itself.

Invariant: a call is admitted before a frame of it is read, a certificate has a bounded number of open calls,
and the text of an internal error stays in the log.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio
from fedcore_server.coordinator import Coordinator
from fedcore_server.operators_api import OperatorsApi
from fedcore_server.sessions import Sessions
from fedcore_server.site_api import SiteApi, Transfers
from fedcore_server.tls import ServicerContext

from fedcore.errors import CertificateRefused, FedcoreError
from fedcore.identity.peer import Peer
from fedcore.wire import calls, refusals
from fedcore.wire.calls import Call

LOG = logging.getLogger("fedcore.coordinator")

MOST_CALLS = 32
"""Open calls of one certificate: a site has a session, a transfer or two, and for a while old ones."""

Q = TypeVar("Q")
A = TypeVar("A")
_Named: TypeAlias = "tuple[str, grpc.RpcMethodHandler[bytes, bytes]]"


def handlers(hub: Coordinator) -> list[grpc.GenericRpcHandler]:
    """What a gRPC server registers: bytes in, bytes out."""
    transfers, operators = Transfers(hub), OperatorsApi(hub)
    sites, door = SiteApi(hub, transfers), _Door(hub.sessions)

    async def session(
        requests: AsyncIterator[bytes], context: ServicerContext
    ) -> AsyncIterator[bytes]:
        async with door.open(calls.SESSION, context) as peer:
            async for data in sites.session(peer, requests, context.peer()):
                yield data

    async def upload(requests: AsyncIterator[bytes], context: ServicerContext) -> bytes:
        async with door.open(calls.UPLOAD, context) as peer:
            checked = door.checked(peer, requests, context)
            return calls.UPLOAD.gives.pack(await transfers.upload(peer, checked))

    services: dict[str, list[_Named]] = {
        calls.COORDINATOR: [
            (calls.SESSION.name, grpc.stream_stream_rpc_method_handler(session)),
            (calls.UPLOAD.name, grpc.stream_unary_rpc_method_handler(upload)),
            door.unary(calls.CHECK, sites.check),
            door.unary(calls.UPLOAD_OFFSET, transfers.upload_offset),
            door.stream(calls.DOWNLOAD, transfers.download),
            door.unary(calls.RENEW, sites.renew),
        ],
        calls.OPERATORS: [
            door.unary(calls.SUBMIT, operators.submit), door.unary(calls.JOBS, operators.jobs),
            door.stream(calls.WATCH, operators.watch), door.unary(calls.STOP, operators.stop),
            door.unary(calls.EVICT, operators.evict), door.stream(calls.RESULT, operators.result),
        ],
    }  # fmt: skip
    return [grpc.method_handlers_generic_handler(n, dict(each)) for n, each in services.items()]


class _Door:
    """What every call passes through."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._busy: Counter[bytes] = Counter()

    @contextlib.asynccontextmanager
    async def open(self, call: Call[Any, Any], context: ServicerContext) -> AsyncIterator[Peer]:
        """One open call of an admitted peer."""
        async with open_call(self._busy, context):
            peer = await self._sessions.admit(context, call)
            try:
                yield peer
            except FedcoreError as error:
                word = error.check if isinstance(error, CertificateRefused) else ""
                self._sessions.refused(call.name, error, word or type(error).__name__, peer)
                raise

    async def checked(
        self, peer: Peer, parts: AsyncIterator[bytes], context: ServicerContext
    ) -> AsyncIterator[bytes]:
        """The parts of a transfer, each if its peer may still transfer. Raises CertificateRefused."""
        async for part in parts:
            self._sessions.still(peer, context.peer())
            yield part

    def unary(self, call: Call[Q, A], answer: Callable[[Peer, Q], Awaitable[A]]) -> _Named:
        """A call with one request and one answer."""

        async def run(data: bytes, context: ServicerContext) -> bytes:
            async with self.open(call, context) as peer:
                asked = call.takes.unpack(data, sender=peer.name)
                return call.gives.pack(await answer(peer, asked))

        return call.name, grpc.unary_unary_rpc_method_handler(run)

    def stream(self, call: Call[Q, A], answer: Callable[[Peer, Q], AsyncIterator[bytes]]) -> _Named:
        """A call with one request and a stream of serialised answers."""

        async def run(data: bytes, context: ServicerContext) -> AsyncIterator[bytes]:
            async with self.open(call, context) as peer:
                found = answer(peer, call.takes.unpack(data, sender=peer.name))
                if call.beside_session:
                    found = self.checked(peer, found, context)
                async for each in found:
                    yield each

        return call.name, grpc.unary_stream_rpc_method_handler(run)


@contextlib.asynccontextmanager
async def open_call(busy: Counter[bytes], context: ServicerContext) -> AsyncIterator[None]:
    """Count one open call of a certificate; an error inside ends it with the status of the error."""
    certificate = b"".join(context.auth_context().get("x509_pem_cert", ()))
    if busy[certificate] >= MOST_CALLS:
        line = f"calls: found {MOST_CALLS} of this certificate open, expected fewer"
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, line)
    busy[certificate] += 1
    try:
        yield
    except FedcoreError as error:
        await _abort(context, error)
    except TimeoutError:
        await context.abort(
            grpc.StatusCode.DEADLINE_EXCEEDED, "call: found nothing to read for long"
        )
    except (grpc.aio.AbortError, grpc.aio.UsageError):
        raise
    except Exception as error:
        LOG.exception("a call ended by an internal error")
        await _abort(context, error)
    finally:
        busy[certificate] -= 1
        if not busy[certificate]:
            del busy[certificate]


async def _abort(context: ServicerContext, error: Exception) -> None:
    code, details = refusals.status_of(error)
    LOG.info("%s", error)
    await context.abort(getattr(grpc.StatusCode, code), details)
