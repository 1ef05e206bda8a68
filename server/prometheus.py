"""Prometheus counters of a coordinator, on a loopback port of their own.

Invariant: only counts, bytes and states: nothing of a model, metric, key or share, and nothing of a site's rows.
Everything is read at the time of a scrape.
"""

import errno
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fedcore.errors import BadInput

ADDRESS = "127.0.0.1"


@dataclass
class Counts:
    """Counters since the process started."""

    sessions: int = 0
    refused: int = 0
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
            ("fedcore_received_bytes", "Bytes of vectors taken from sites", counts.bytes_in),
            ("fedcore_sent_bytes", "Bytes of sums and checkpoints sent to sites", counts.bytes_out),
        ):
            yield CounterMetricFamily(name, text, value)


def serve_metrics(
    counts: Counts, seen: Callable[[], Seen], port: int
) -> tuple[int, Callable[[], None]]:
    """Serve scrapes on a loopback port (0: a free one) in a thread; returns the port, and a function that stops it.

    Raises BadInput where the port cannot be bound.
    """
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
