"""A wide-area network on one machine, for `fedcore bench engine --wan`: a link of its own for every site.

The coordinator runs in one network namespace and each site in another; between them is a link with a delay and a rate
in each direction. Where the kernel has `tc netem`, it delays and limits a veth pair. Elsewhere a process passes the
packets between two TUN devices (`fedcore/bench/slow_link.py`). Both carry IP packets, so TCP has the windows, the slow
start and the acknowledgements of such a line.

Invariant: the namespaces have no name and go with their processes, and the machine's own network is not touched.
"""

import contextlib
import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedcore.errors import BadInput
from fedcore.types import Json, SiteId

NEW_NETWORK = 0x40000000
"""CLONE_NEWNET of unshare(2) and setns(2)."""

MAKE_TUN, TUN_WITHOUT_HEADER = 0x400454CA, 0x1001
"""TUNSETIFF of ioctl(2), and its flags IFF_TUN | IFF_NO_PI."""

HUB = "10.77.0.1"
"""The coordinator's address in its namespace."""

CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")
"""Of TCP in the namespace; a new one has the machine's."""

PACKET = 1500
"""Bytes of the longest packet on the links."""


@dataclass(frozen=True)
class LinkSpeed:
    """What a link lets through in each direction. delay_ms: there and back; mbit: 10^6 bits a second."""

    delay_ms: float
    mbit: float

    @property
    def one_way_seconds(self) -> float:
        return self.delay_ms / 2000

    @property
    def bytes_a_second(self) -> float:
        return self.mbit * 1e6 / 8

    @property
    def buffer_bytes(self) -> int:
        """What a router in front of the link holds before it drops: one bandwidth times delay, 64 KiB or more."""
        return max(64 << 10, int(self.bytes_a_second * self.delay_ms / 1000))


@dataclass
class Links:
    """The links of one benchmark, while `links` lasts. emulator: what delays and limits them; ends: {site: a process in
    its namespace, and the coordinator's device of the link}."""

    line: LinkSpeed
    emulator: str
    port: int = 7443
    ends: dict[SiteId, tuple[int, str]] = field(default_factory=dict)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator, which runs in the namespace of the calling thread."""
        return HUB, self.port

    def command(self, site: SiteId, line: Sequence[str]) -> list[str]:
        """The command line that runs `line` in the namespace of a site."""
        return ["nsenter", f"--net=/proc/{self.ends[site][0]}/ns/net", *line]

    def carried(self) -> dict[SiteId, int]:
        """Bytes that the link of each site has carried so far, both directions, with the headers of IP and TCP."""
        found: dict[str, int] = {}
        for line in Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]:
            name, _, counts = line.partition(":")
            each = counts.split()
            found[name.strip()] = int(each[0]) + int(each[8])
        return {site: found[device] for site, (_, device) in self.ends.items()}

    def about(self) -> Json:
        """The links, as the JSON of a benchmark has them."""
        return {
            "delay_ms": self.line.delay_ms,
            "mbit": self.line.mbit,
            "emulator": self.emulator,
            "congestion_control": CONGESTION_CONTROL.read_text().strip(),
        }


def require_namespaces() -> None:
    """Raise BadInput where network namespaces or links cannot be made here."""
    missing = [name for name in ("ip", "nsenter", "unshare", "tc") if shutil.which(name) is None]
    if not sys.platform.startswith("linux") or missing:
        raise BadInput(
            f"--wan: found no {', '.join(missing) or 'Linux'} on this machine, expected Linux with iproute2 and "
            "util-linux",
            remedy="apt-get install iproute2 util-linux; without --wan the benchmark runs on loopback",
        )
    if os.geteuid() != 0:
        raise BadInput(
            "--wan: found another user than root, expected root, who may make network namespaces",
            remedy="sudo fedcore bench engine --wan, or leave --wan out for loopback",
        )


@contextlib.contextmanager
def links(sites: Sequence[SiteId], line: LinkSpeed) -> Iterator[Links]:
    """Make a namespace for the coordinator, which the calling thread is in meanwhile, and a link for every site.

    Raises BadInput where the kernel refuses.
    """
    require_namespaces()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_own_namespace())
        _run("ip", "link", "set", "lo", "up")
        _run("ip", "address", "add", f"{HUB}/32", "dev", "lo")
        found = Links(line, "tc netem" if _has_netem() else "a process between TUN devices")
        opened: list[int] = []
        for number, site in enumerate(sites):
            process = stack.enter_context(_namespace())
            found.ends[site] = process, f"hub{number}"
            if found.emulator == "tc netem":
                _veth(number, process, line)
            else:
                opened += (_tun(f"hub{number}"), _tun(f"site{number}"))
                _run("ip", "link", "set", f"site{number}", "netns", str(process))
            _route(number, process)
        if opened:
            stack.enter_context(_relay(opened, line))
        yield found


def _run(*line: str) -> None:
    """A command of iproute2. Raises BadInput with its last line."""
    done = subprocess.run(line, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise BadInput(
            f"--wan: found that `{' '.join(line)}` failed ({said}), expected an emulated link",
            remedy="run it as root outside a container, or with CAP_NET_ADMIN and CAP_SYS_ADMIN",
        )


def _inside(process: int, *line: str) -> None:
    """The same in the namespace of a process."""
    _run("nsenter", f"--net=/proc/{process}/ns/net", *line)


@contextlib.contextmanager
def _own_namespace() -> Iterator[None]:
    """Move this thread, and the processes that it starts, to a new network namespace, and back at the end."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(NEW_NETWORK) != 0:
            raise BadInput(
                f"--wan: found that this kernel makes no network namespace ({os.strerror(ctypes.get_errno())}), "
                "expected one",
                remedy="run it as root outside a container, or with CAP_SYS_ADMIN",
            )
        try:
            yield
        finally:
            libc.setns(before, NEW_NETWORK)
    finally:
        os.close(before)


@contextlib.contextmanager
def _namespace() -> Iterator[int]:
    """The id of a process in a network namespace of its own; it ends with this one."""
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo ready; exec cat"],  # noqa: S607
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        if holder.stdout.readline() != b"ready\n":
            raise BadInput(
                "--wan: found that this kernel makes no further network namespace, expected one a site",
                remedy="see /proc/sys/user/max_net_namespaces",
            )
        yield holder.pid
    finally:
        holder.stdin.close()
        holder.stdout.close()
        holder.wait()


def _has_netem() -> bool:
    tried = ["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    if subprocess.run(tried, capture_output=True, check=False).returncode != 0:  # noqa: S603
        return False
    _run("tc", "qdisc", "del", "dev", "lo", "root")
    return True


def _veth(number: int, process: int, line: LinkSpeed) -> None:
    """A pair of devices with `tc netem` at both ends."""
    hub, site = f"hub{number}", f"site{number}"
    _run("ip", "link", "add", hub, "type", "veth", "peer", "name", site, "netns", str(process))
    held = line.buffer_bytes + int(line.bytes_a_second * line.one_way_seconds)
    rule = (
        "root", "netem", "delay", f"{line.delay_ms / 2}ms", "rate", f"{line.mbit}mbit", "limit",
        str(max(2, held // PACKET)),
    )  # fmt: skip
    _run("tc", "qdisc", "add", "dev", hub, *rule)
    _inside(process, "tc", "qdisc", "add", "dev", site, *rule)


def _tun(name: str) -> int:
    """A TUN device in this namespace, and what reads and writes its packets."""
    try:
        found = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(found, MAKE_TUN, struct.pack("16sH22x", name.encode(), TUN_WITHOUT_HEADER))
    except OSError as error:
        raise BadInput(
            f"--wan: found neither `tc netem` nor a TUN device here ({error.strerror}), expected one of them",
            remedy="modprobe sch_netem, or modprobe tun",
        ) from error
    return found


def _route(number: int, process: int) -> None:
    """Addresses and routes of one link."""
    hub, site, address = f"hub{number}", f"site{number}", f"10.77.1.{number + 1}"
    _run("ip", "link", "set", hub, "up", "mtu", str(PACKET))
    _run("ip", "route", "add", address, "dev", hub, "src", HUB)
    _inside(process, "ip", "link", "set", "lo", "up")
    _inside(process, "ip", "address", "add", f"{address}/32", "dev", site)
    _inside(process, "ip", "link", "set", site, "up", "mtu", str(PACKET))
    _inside(process, "ip", "route", "add", HUB, "dev", site)


@contextlib.contextmanager
def _relay(opened: Sequence[int], line: LinkSpeed) -> Iterator[None]:
    """The process that passes packets on; `opened`: two devices for each link, one after the other."""
    words = [str(each) for each in (line.one_way_seconds, line.bytes_a_second, line.buffer_bytes)]
    relay = subprocess.Popen(  # noqa: S603
        [sys.executable, "-P", "-m", "fedcore.bench.slow_link", *words, *map(str, opened)],
        stdin=subprocess.PIPE, pass_fds=opened, start_new_session=True,
    )  # fmt: skip
    for each in opened:
        os.close(each)
    try:
        yield
    finally:
        relay.terminate()
        relay.wait()
