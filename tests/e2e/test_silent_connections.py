"""1,500 connections that never say a word, against a real coordinator: sites and operators get through."""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from pathlib import Path

import grpc
import pytest
from deployment import HUB, PATIENCE, deployment, small_task
from fedcore_server.app import LEAST_CONNECTIONS, RESERVED, connection_limit, raise_descriptors

from fedcore.wire import calls, frames

SILENT = 1500


def limited(hard, more=""):
    """What the coordinator's process does first: this limit is its system's."""
    return f"""
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, {hard}))
        from fedcore_server import app as main
        {more}
    """


HELD = 'main.KEEPALIVE = (("grpc.server_handshake_timeout_ms", 600_000),)'
"""Silent connections stay to the end of a test; elsewhere they are closed after 10 s."""

WITHOUT = """main.raise_descriptors = lambda: 1024
        main.connection_limit = lambda *_: ()
        main.KEEPALIVE = ()"""
"""The rules of this page switched off."""


@pytest.fixture(autouse=True)
def room():
    """Descriptors for this test's own ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * SILENT:
        pytest.skip(f"this process may open {hard} files, and the test needs {2 * SILENT}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * SILENT), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def silence(port):
    """So many open connections to a port, as far as they are taken."""
    with contextlib.ExitStack() as opened:
        for _ in range(SILENT):
            each = opened.enter_context(socket.socket())
            each.settimeout(5.0)
            with contextlib.suppress(OSError):
                each.connect(("127.0.0.1", port))
        yield


def descriptors(fed):
    return sum(1 for _ in Path(f"/proc/{fed.processes[HUB].pid}/fd").iterdir())


@pytest.mark.slow
def test_sites_and_operators_get_through_silent_connections(tmp_path):
    """Real processes: every step below opens a new connection while all the silent ones are open."""
    patches = {HUB: limited(4096, HELD)}
    with (
        deployment(tmp_path, small_task(tmp_path), start=(), patches=patches) as fed,
        silence(fed.port),
    ):
        end = time.monotonic() + PATIENCE
        while descriptors(fed) <= 1024:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert not any(site["connected"] for site in fed.jobs()["sites"].values())
        fed.start("a")
        fed.connected(["a"])


@pytest.mark.slow
def test_a_job_under_way_ends_though_every_connection_is_taken(tmp_path):
    """With 1,024 descriptors in all: sessions go on, and the coordinator's own files can be opened."""
    patches = {HUB: limited(1024, HELD)}
    with deployment(tmp_path, small_task(tmp_path), patches=patches) as fed:
        fed.connected()
        job = fed.submit(rounds=2)
        with silence(fed.port):
            assert descriptors(fed) < 1024 - RESERVED / 2
            assert {row["outcome"] for row in fed.over(job).values()} == {"finished"}
            assert not fed.log(HUB).count("Too many open files")


@pytest.mark.slow
def test_control_without_these_limits_no_operator_gets_through(tmp_path):
    patches = {HUB: limited(1024, WITHOUT)}
    with (
        deployment(tmp_path, small_task(tmp_path), start=(), patches=patches) as fed,
        silence(fed.port),
        pytest.raises(grpc.RpcError),
    ):
        fed.ask(calls.JOBS, frames.JobsRequest(), seconds=5.0)


def test_the_limit_leaves_room_for_files(monkeypatch):
    assert connection_limit(1024, 1) == (
        ("grpc.max_allowed_incoming_connections", 1024 - RESERVED),
    )
    assert connection_limit(1024, 2)[0][1] == (1024 - RESERVED) // 2
    assert connection_limit(100, 1)[0][1] == LEAST_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    assert raise_descriptors() == (1 << 20 if hard == resource.RLIM_INFINITY else hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
