"""The standard services for tools: gRPC health and gRPC reflection.

Invariant: a call needs a certificate of the federation that the gate admits; no answer contains anything about a
job. Health has Check and no Watch, so that no call outlives its admission.
"""

from collections.abc import AsyncIterator
from typing import Any

import grpc
from fedcore_server.tls import Gate, ServicerContext, refuse
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from fedcore.errors import CertificateRefused
from fedcore.identity.peer import CLIENT_ROLES
from fedcore.wire import calls
from fedcore.wire._generated import federation_pb2


class Probes:
    """Both services behind one gate."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        _ = federation_pb2  # reflection looks the services up among the descriptors that are loaded
        names = (calls.COORDINATOR, calls.OPERATORS, health.SERVICE_NAME, reflection.SERVICE_NAME)
        self._reflection = reflection.aio.ReflectionServicer(names)

    async def begin(self) -> None:
        """Report every service as serving."""
        for name in (calls.COORDINATOR, calls.OPERATORS):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def end(self) -> None:
        """Report every service as not serving from now on."""
        await self._health.enter_graceful_shutdown()

    async def _check(self, request: Any, context: ServicerContext) -> Any:
        await self._admit(context)
        return await self._health.Check(request, context)

    async def _reflect(
        self, requests: AsyncIterator[Any], context: ServicerContext
    ) -> AsyncIterator[Any]:
        await self._admit(context)
        answers: Any = self._reflection.ServerReflectionInfo(requests, context)
        async for answer in answers:
            yield answer

    async def _admit(self, context: ServicerContext) -> None:
        try:
            self._gate.admit(context, CLIENT_ROLES)
        except CertificateRefused as error:
            await refuse(context, error)

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """What a gRPC server registers."""
        check = grpc.unary_unary_rpc_method_handler(
            self._check,
            request_deserializer=health_pb2.HealthCheckRequest.FromString,
            response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
        )
        reflect = grpc.stream_stream_rpc_method_handler(
            self._reflect,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        return [
            grpc.method_handlers_generic_handler(health.SERVICE_NAME, {"Check": check}),
            grpc.method_handlers_generic_handler(
                reflection.SERVICE_NAME, {"ServerReflectionInfo": reflect}
            ),
        ]
