"""Network namespaces in tests: whether this user may make them, and programs that run inside."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from support.preloaded import preloaded

ENTER = """
import ctypes, os, runpy, sys
where, module = sys.argv[1:3]
handle = os.open(where, os.O_RDONLY | os.O_CLOEXEC)
if ctypes.CDLL(None, use_errno=True).setns(handle, 0x40000000) != 0:
    sys.exit(f"setns: {os.strerror(ctypes.get_errno())}")
sys.argv[:] = [module, *sys.argv[3:]]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
"""A preloaded process stands in the namespace of the one that it was forked from, so it moves by itself."""


def _makes_namespaces() -> bool:
    unshare = shutil.which("unshare")
    return unshare is not None and subprocess.run([unshare, "--net", "true"]).returncode == 0


needs_namespaces = pytest.mark.skipif(
    not _makes_namespaces(), reason="this user may not make network namespaces here"
)


def program_in(namespace: str, module: str) -> list[str]:
    """The words that start a module in a network namespace. namespace: its path, as /proc/PID/ns/net."""
    return [preloaded().python, "-P", "-c", ENTER, namespace, module]


@dataclass(frozen=True)
class Socket:
    """A TCP socket. remote: the address of the other end, "" where it listens."""

    listens: bool
    port: int
    remote: str
    remote_port: int


def sockets_of(process: int) -> set[Socket]:
    """Every TCP socket in the namespace of a process that listens or is connected. Of UDP there may be none."""
    found = set()
    for name in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{process}/net/{name}").read_text().splitlines()[1:]:
            local, remote, state = line.split()[1:4]
            assert name.startswith("tcp"), f"a socket of UDP: {line}"
            address, _, port = remote.partition(":")
            if state in ("01", "0A"):  # established, listens
                listens = state == "0A"
                about = "" if listens else _address(address), int(port, 16)
                found.add(Socket(listens, int(local.partition(":")[2], 16), *about))
    return found


def _address(text: str) -> str:
    """Of /proc/net/tcp: words of four bytes, each in the order of this machine."""
    data = b"".join(bytes.fromhex(text[at : at + 8])[::-1] for at in range(0, len(text), 8))
    if len(data) == 4:
        return str(IPv4Address(data))
    return str(IPv6Address(data).ipv4_mapped or IPv6Address(data))
