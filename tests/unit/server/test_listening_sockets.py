"""On which addresses of the machine a new federation's coordinator listens, from the kernel's table of sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import grpc.aio
import pytest
from fedcore_server.tls import SERVER_OPTIONS, bind, listen_sockets, server_credentials
from support.federations import new_federation

from fedcore.identity.kit import Kit

LISTEN = "0A"
BOTH = (
    {"127.0.0.1", "::1"}
    if socket.has_ipv6 and Path("/proc/net/if_inet6").exists()
    else {"127.0.0.1"}
)


def listening(port):
    """The addresses on which somebody listens at this port."""
    found = set()
    for table, kind in (("tcp", IPv4Address), ("tcp6", IPv6Address)):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                address, _, number = local.partition(":")
                if state == LISTEN and int(number, 16) == port:
                    words = [
                        bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)
                    ]
                    at = kind(b"".join(words))
                    # gRPC's sockets are of IPv6 also for an address of IPv4
                    found.add(str(getattr(at, "ipv4_mapped", None) or at))
    return found


def heard(files):
    """The addresses of both ports, as `fed-coordinator serve` binds them."""
    config = files.config

    async def play():
        server = grpc.aio.server(options=SERVER_OPTIONS)
        kit = Kit.load(config.kit)
        bind(server, lambda: server_credentials(kit), hosts=config.listen, port=config.port)
        await server.start()
        sockets = listen_sockets(config.listen, config.enrol_port)
        try:
            return listening(config.port), listening(config.enrol_port)
        finally:
            for each in sockets:
                each.close()
            await server.stop(0)

    return asyncio.run(play())


@pytest.mark.skipif(
    not Path("/proc/net/tcp").exists(), reason="the kernel shows no table of sockets"
)
@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", BOTH), ("127.0.0.1", {"127.0.0.1"}), ("hub.example.org", None)],
)
def test_a_federation_of_one_machine_listens_on_loopback_only(tmp_path, host, expected):
    found = heard(new_federation(tmp_path / "federation", host=host))
    if expected is None:  # control: any other name needs the whole machine
        assert all(each & {"::", "0.0.0.0"} for each in found)
    else:
        assert found == (expected, expected)
