"""The links of `fedcore bench engine --wan`: delay, rate and buffer, and what the benchmark makes of its times."""

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.networks import needs_namespaces

from fedcore.bench import engine
from fedcore.bench.slow_link import Direction
from fedcore.bench.wan import HUB, LinkSpeed, links
from fedcore.errors import BadInput
from fedcore.report.terminal import as_text
from fedcore.types import SiteId

A, B = SiteId("a"), SiteId("b")

NETWORK = Path("/proc/thread-self/ns/net")


def test_a_packet_arrives_after_those_before_it_and_the_delay() -> None:
    way = Direction(source=0, target=1, delay=0.5, rate=1000.0, buffer=10_000)
    way.take(b"x" * 100, now=1.0)
    way.take(b"y" * 100, now=1.0)
    assert way.next == pytest.approx(1.6)  # 0.1 s of its own at 1000 bytes a second, then the delay
    assert way.due(1.59) == []
    assert way.due(1.61) == [b"x" * 100]
    assert way.due(1.71) == [b"y" * 100]
    assert way.next == float("inf")


def test_a_full_buffer_drops_packets_and_an_idle_link_keeps_no_credit() -> None:
    way = Direction(source=0, target=1, delay=0.0, rate=1000.0, buffer=150)
    for _ in range(5):
        way.take(b"x" * 100, now=10.0)
    assert len(way.due(100.0)) == 2  # the third found 200 bytes waiting
    way.take(b"y" * 100, now=200.0)
    assert way.next == pytest.approx(200.1)


@needs_namespaces
def test_bytes_between_two_namespaces_take_the_delay_and_are_counted() -> None:
    before = NETWORK.readlink()
    with links((A, B), LinkSpeed(delay_ms=60, mbit=100)) as found:
        server = socket.create_server((HUB, 0))
        code = (
            "import socket, sys, time\n"
            f"with socket.create_connection(('{HUB}', {server.getsockname()[1]})) as c:\n"
            "    began = time.monotonic()\n"
            "    c.sendall(b'x')\n"
            "    assert c.recv(1) == b'y'\n"
            "    print(time.monotonic() - began)\n"
        )
        line = found.command(A, [sys.executable, "-c", code])
        client = subprocess.Popen(line, stdout=subprocess.PIPE)
        server.settimeout(20.0)
        with server, server.accept()[0] as peer:
            assert peer.recv(1) == b"x"
            peer.sendall(b"y")
            said, _ = client.communicate(timeout=20)
        assert float(said) >= 0.06
        carried = found.carried()
        assert carried[A] > 300  # three packets to connect, two with a byte, and what ends it
        assert carried[B] < carried[A]
        assert NETWORK.readlink() != before
    assert NETWORK.readlink() == before


@needs_namespaces
def test_nothing_is_left_after_an_error_inside() -> None:
    before, threads = NETWORK.readlink(), threading.active_count()
    made: list[int] = []

    def fail_inside() -> None:
        with links((A,), LinkSpeed(10, 10)) as found:
            made.append(found.ends[A][0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert NETWORK.readlink() == before
    assert threading.active_count() == threads
    until = time.monotonic() + 10
    while Path(f"/proc/{made[0]}").exists():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"per_process": 2}, "--per-process: found 2, expected 1 with --wan"),
        ({"delay": 0.0}, "--delay: found 0, expected 1 to 10000"),
        ({"mbit": 1e9}, r"--mbit: found 1e\+09, expected 0.1 to 10000"),
    ],
)
def test_links_that_cannot_be_made_are_refused_before_anything_starts(
    flags: dict[str, float], text: str
) -> None:
    with pytest.raises(BadInput, match=text):
        engine.run(wan=True, **flags)  # type: ignore[arg-type]


def test_the_page_gives_round_trips_beside_transfer_and_computing() -> None:
    wan = {"delay_ms": 150.0, "mbit": 20.0, "emulator": "tc netem", "congestion_control": "cubic"}
    cycle = {"median": 1.2, "least": 1.0}
    found = {
        "wan": wan | {"bytes_per_round": 250_000},  # 0.1 s at the rate
        "seconds_of_cycle": cycle,
        "loopback": {"seconds_of_cycle": {"median": 0.2, "least": 0.15}},
    }
    page = as_text(engine._page_of_links(found), 120)
    rows = [line.split() for line in page.splitlines()[2:4]]
    assert rows == [
        ["median", "1.200", "0.200", "0.100", "12.00", "6.0", "250"],
        ["least", "1.000", "0.150", "0.100", "10.00", "5.0", "250"],
    ]
