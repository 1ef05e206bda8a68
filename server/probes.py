"""What tools ask a coordinator: gRPC health, gRPC reflection, and Prometheus counters.

Invariant: a call of health or reflection needs a certificate of the federation that the gate admits, and no answer
contains anything about a job; health has Check and no Watch, so that no call outlives its admission. The counters are
on a loopback port of their own: only counts, bytes and states, read at the time of a scrape; nothing of a model,
metric, key or share, and nothing of a site's rows.
"""

import errno
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from fedcore_server.tls import Gate, ServicerContext, refuse
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fedcore.errors import BadInput, CertificateRefused
from fedcore.identity.peer import CLIENT_ROLES
from fedcore.wire import calls
from fedcore.wire._generated import federation_pb2

ADDRESS = "127.0.0.1"
"""Of the counters."""


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


@dataclass
class Counts:
    """Counters since the process started."""

    sessions: int = 0
    refused: int = 0
    cloned: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


@dataclass(frozen=True)
class Seen:
    """The gauges now. jobs: by state; rounds: by outcome, of this process."""

    sites: int
    connected: int
    jobs: Counter[str]
    rounds: Counter[str]


class _Collector:
    def __init__(self, counts: Counts, seen: Callable[[], Seen]) -> None:
        self._counts, self._seen = counts, seen

    def collect(self) -> Iterator[Metric]:
        counts, seen = self._counts, self._seen()
        yield GaugeMetricFamily("fedcore_sites", "Sites on the roster", seen.sites)
        yield GaugeMetricFamily("fedcore_sites_connected", "Sites with a session", seen.connected)
        jobs = GaugeMetricFamily("fedcore_jobs", "Jobs by state", labels=["state"])
        for state, number in sorted(seen.jobs.items()):
            jobs.add_metric([state], number)
        yield jobs
        rounds = CounterMetricFamily("fedcore_rounds", "Rounds that ended", labels=["outcome"])
        for outcome in ("released", "abandoned"):
            rounds.add_metric([outcome], seen.rounds[outcome])
        yield rounds
        for name, text, value in (
            ("fedcore_sessions", "Sessions begun", counts.sessions),
            ("fedcore_refused_calls", "Calls refused by certificate", counts.refused),
            ("fedcore_cloned_sessions", "Sessions of a second process refused", counts.cloned),
            ("fedcore_received_bytes", "Bytes of vectors taken from sites", counts.bytes_in),
            ("fedcore_sent_bytes", "Bytes of sums and checkpoints sent to sites", counts.bytes_out),
        ):
            yield CounterMetricFamily(name, text, value)


def serve_metrics(
    counts: Counts, seen: Callable[[], Seen], port: int
) -> tuple[int, Callable[[], None]]:
    """Serve scrapes on a loopback port (0: a free one) in a thread; returns the port, and a function that stops it.
    Raises BadInput where the port cannot be bound."""
    registry = CollectorRegistry()
    registry.register(_Collector(counts, seen))
    try:
        server, thread = start_http_server(port, ADDRESS, registry)
    except OSError as error:
        used = error.errno == errno.EADDRINUSE
        raise BadInput(
            f"metrics_port: found {ADDRESS}:{port} {'in use' if used else f'refused ({error.strerror})'}, "
            "expected a free port",
            remedy="choose another metrics_port in federation.toml, or leave it out",
        ) from error

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, end
