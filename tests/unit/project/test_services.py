"""deploy/systemd: the services of both roles, as systemd reads them, and what the sandbox of a site needs of one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import typer.main
from fedcore_clients import cli as site_cli
from fedcore_clients import sandbox
from fedcore_clients.config import read_config
from fedcore_clients.joining import site_toml
from fedcore_server import cli as coordinator_cli

from fedcore.identity.proxies import ProxySection

ROOT = Path(__file__).resolve().parents[3]
UNITS = ROOT / "deploy" / "systemd"
ROLES = ("site", "coordinator")
ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")

BOTH = {
    "NoNewPrivileges": "yes", "CapabilityBoundingSet": "", "AmbientCapabilities": "", "ProtectSystem": "strict",
    "ProtectHome": "yes", "PrivateTmp": "yes", "PrivateDevices": "yes", "ProtectControlGroups": "yes",
    "ProtectKernelModules": "yes", "ProtectClock": "yes", "ProtectProc": "invisible", "RestrictSUIDSGID": "yes",
    "RestrictRealtime": "yes", "LockPersonality": "yes", "SystemCallArchitectures": "native",
    "SystemCallErrorNumber": "EPERM", "StateDirectoryMode": "0700", "UMask": "0077", "KeyringMode": "private",
    "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX AF_NETLINK", "RemoveIPC": "yes",
}  # fmt: skip
COVERS_PROC = ("ProtectKernelTunables", "ProtectKernelLogs", "ProtectHostname", "ProcSubset")
"""Settings that mount over parts of /proc: a kernel then refuses a new /proc to an unprivileged user namespace."""


def service(role):
    """{key: values} of [Service]."""
    found, section = defaultdict(list), ""
    for line in (UNITS / f"fedcore-{role}.service").read_text().splitlines():
        if line.startswith("["):
            section = line
        elif section == "[Service]" and line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found[key].append(value)
    return found


@pytest.mark.parametrize("role", ROLES)
def test_a_service_takes_every_privilege_away(role):
    found = service(role)
    assert {key: found[key] for key in BOTH} == {key: [value] for key, value in BOTH.items()}
    assert found["User"] == [f"fedcore-{role}"] and found["StateDirectory"] == found["User"]


def test_a_coordinator_gets_no_namespace_and_no_executable_memory():
    found = service("coordinator")
    assert found["SystemCallFilter"] == ["@system-service", "~@privileged"]
    for key in ("RestrictNamespaces", "MemoryDenyWriteExecute", "PrivateUsers", *COVERS_PROC[:3]):
        assert found[key] == ["yes"], key


def test_a_site_keeps_what_its_sandbox_needs(monkeypatch, tmp_path):
    """The namespaces that `unshare` and `bwrap` are asked for, and a /proc that nothing is mounted over."""
    monkeypatch.setattr(sandbox, "_program", lambda name: name)
    (tmp_path / "site.toml").write_text(site_toml("va", "hub.example.org:7443", [], ProxySection()))
    (tmp_path / "policy.toml").touch()
    config = read_config(tmp_path / "site.toml")
    words = {*sandbox._unshare(config), *sandbox._bwrap(config, ())}
    options = {"user": "user", "mount": "mnt", "pid": "pid", "ipc": "ipc", "net": "net"}
    asked = {
        kind for option, kind in options.items() if {f"--{option}", f"--unshare-{option}"} & words
    }
    found = service("site")
    assert asked == {*options.values()} == {*found["RestrictNamespaces"][0].split()}
    assert not {*COVERS_PROC, "MemoryDenyWriteExecute", "PrivateUsers"} & {*found}


def calls(group):
    """The system calls of a group of systemd's, with those of the groups in it."""
    done = subprocess.run([ANALYZE, "syscall-filter", group], capture_output=True, text=True)
    found = set()
    for word in done.stdout.split("\n")[1:]:
        name = word.strip()
        if name.startswith("@"):
            found |= calls(name)
        elif name and not name.startswith("#"):
            found.add(name)
    return found


@needs_systemd
def test_the_calls_that_a_sandbox_makes_are_allowed():
    """Seen with strace of both methods: they make namespaces, mount, and drop capabilities."""
    made = {"capset", "clone", "mount", "pivot_root", "prctl", "setns", "umount2", "unshare"}
    allowed = set().union(
        *(calls(group) for group in service("site")["SystemCallFilter"][0].split())
    )
    assert made <= allowed
    denied = {"init_module", "kexec_load", "bpf", "ptrace", "reboot", "swapon", "settimeofday"}
    assert not denied & allowed


@needs_systemd
@pytest.mark.parametrize(("role", "most"), [("site", 30), ("coordinator", 15)])
def test_systemd_accepts_a_service_and_its_exposure_is_low(tmp_path, role, most):
    """most: in tenths, of systemd's own measure from 0 to 10, where 2 to 4 is `OK` and below that `SAFE`."""
    lines = (UNITS / f"fedcore-{role}.service").read_text()
    program = service(role)["ExecStart"][0].split()[0]
    unit = tmp_path / f"fedcore-{role}.service"
    unit.write_text(
        lines.replace(program, sys.executable)
    )  # the program need not be installed here
    done = subprocess.run([ANALYZE, "verify", unit], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    command = [ANALYZE, "security", "--offline=true", f"--threshold={most}", unit]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-300:]


@pytest.mark.parametrize(("role", "cli"), [("site", site_cli), ("coordinator", coordinator_cli)])
def test_a_service_starts_a_command_that_exists(role, cli):
    program, command, *arguments = service(role)["ExecStart"][0].split()
    assert Path(program).name == {"site": "fed-site", "coordinator": "fed-coordinator"}[role]
    found = typer.main.get_command(cli.app).commands[command]
    with found.make_context(command, arguments) as context:
        assert Path(context.params["config"]).is_relative_to(f"/var/lib/fedcore-{role}")
