"""A federation on one machine: its files, its processes, and an operator's commands.

The files are those of a deployment over several machines: a folder for the coordinator, one for the operator
and one for every site, each with its own keys and the roster. Both shells run as commands of this interpreter
and are not imported.

Invariant: after `running`, no process of it is alive and no port is open: SIGTERM first, then SIGKILL to the
whole process group after ten seconds.
"""

import contextlib
import ipaddress
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import tomli_w

from fedcore import errors
from fedcore.files import write_atomic
from fedcore.identity.addresses import authority_of, endpoint
from fedcore.identity.authority import LOOPBACK, Authority, host_name
from fedcore.identity.identities import IDENTITY_FILE, ROSTER_FILE, create_identity, write_roster
from fedcore.identity.peer import check_sites
from fedcore.types import Json, SiteId

HOST = "127.0.0.1"
PORT = 7443
"""Of a coordinator on another machine, where no other is given."""

COORDINATOR = "coordinator"

GRACE_SECONDS = 10.0
"""Timeout between SIGTERM and SIGKILL."""

START_SECONDS = 60.0
"""Timeout until the coordinator listens: it loads libraries and its journal before."""

GATHER_SECONDS = 300
"""How long the coordinator of a rehearsal waits for every site: all of them load torch on one machine."""

_COORDINATOR = (sys.executable, "-P", "-m", "fedcore_server.cli")
_SITE = (sys.executable, "-P", "-m", "fedcore_clients.cli")


@dataclass(frozen=True)
class Deployment:
    """The files of a federation. folder: everything is below it. host, port: of the coordinator, as the sites
    reach it."""

    folder: Path
    port: int
    sites: tuple[SiteId, ...]
    host: str = HOST

    @property
    def address(self) -> str:
        """`host:port`, as the configuration files have it."""
        return authority_of(self.host, self.port)

    def site(self, name: SiteId) -> Path:
        return self.folder / "sites" / name

    @property
    def job(self) -> Path:
        """The job file, for the operator."""
        return self.folder / "operator" / "job.toml"

    @property
    def coordinator(self) -> Path:
        return self.folder / COORDINATOR

    def commands(self) -> dict[str, list[str]]:
        """{party: the command line of its process}, the coordinator first."""
        serve = [*_COORDINATOR, "serve", "--config", str(self.coordinator / "federation.toml")]
        found: dict[str, list[str]] = {COORDINATOR: serve}
        return found | {name: [*_SITE, "run", *self._config(name)] for name in self.sites}

    def _config(self, site: SiteId) -> tuple[str, str]:
        return "--config", str(self.site(site) / "site.toml")

    def operate(self, *words: str) -> list[str]:
        """A command line of the operator's."""
        kit = str(self.folder / "operator" / "kit")
        place = ("--coordinator", self.address, "--kit", kit)
        return [*_COORDINATOR, *words, *place, "--json"]

    def export(self, site: SiteId, job: str, out: Path) -> list[str]:
        """The command line with which a site exports the released model."""
        return [*_SITE, "model", job, "--out", str(out), *self._config(site), "--json"]

    def state(self, name: str) -> Path:
        home = self.coordinator if name == COORDINATOR else self.site(SiteId(name))
        return home / "state"

    def log(self, name: str) -> Path:
        """The log of a party: its stdout and stderr."""
        return self.folder / "logs" / f"{name}.log"


def write(
    folder: Path,
    federation: str,
    sites: Mapping[SiteId, Mapping[str, Any]],
    job: Mapping[str, Any],
    *,
    policy: Mapping[str, Any],
    split: Mapping[str, Any] | None = None,
    limits: Mapping[str, Any] | None = None,
    address: tuple[str, int] | None = None,
) -> Deployment:
    """Write the files of a federation: an authority, kits, keys, rosters, configuration.

    sites: {site: the [tasks] of its site.toml}. job: the tables of job.toml. policy, split: [policy] and
    [split] of every site.toml. limits: of federation.toml. address: host and port of the coordinator, which its
    certificate names too, for sites on other machines; None: a free port on loopback, for processes of this one.
    Raises BadInput for a site's id or data that such files cannot hold.
    """
    check_sites(sites, deployed=True)
    now = datetime.now(UTC)
    host, port = address or (HOST, free_port())
    deployment = Deployment(folder, port, tuple(sites), host)
    authority = Authority.create(federation, now)
    authority.save(folder / "authority")
    for each in (deployment.coordinator, deployment.job.parent):
        each.mkdir(parents=True, exist_ok=True)
    authority.issue("operator", "operator", now).save(folder / "operator" / "kit")
    kit = authority.issue(
        COORDINATOR, COORDINATOR, now, hosts=tuple(dict.fromkeys((*LOOPBACK, host)))
    )
    kit.save(deployment.coordinator / "kit")
    pins = {}
    for name in sites:
        home = deployment.site(name)
        home.mkdir(parents=True)
        authority.issue("site", name, now).save(home / "kit")
        pins[name] = create_identity(home / IDENTITY_FILE).public
    waits = {} if address else {"gather_seconds": GATHER_SECONDS}
    federation_toml = {
        "name": federation, "roster": ROSTER_FILE, "kit": "kit", "folder": "state",
        "listen": [_listens(host)], "port": port, "limits": {**waits, **(limits or {})},
    }  # fmt: skip
    _write_toml(deployment.coordinator / "federation.toml", federation_toml)
    write_roster(deployment.coordinator / ROSTER_FILE, pins)
    for name, tasks in sites.items():
        write_roster(deployment.site(name) / ROSTER_FILE, pins)
        site_toml = {
            "site": name, "coordinator": deployment.address, "kit": "kit",
            "identity": IDENTITY_FILE, "roster": ROSTER_FILE, "folder": "state",
            "split": dict(split or {}), "policy": policy, "tasks": tasks,
        }  # fmt: skip
        _write_toml(deployment.site(name) / "site.toml", site_toml)
    _write_toml(deployment.job, job)
    operator_toml = {"coordinator": deployment.address, "kit": "kit"}
    _write_toml(deployment.job.with_name("operator.toml"), operator_toml)
    return deployment


def free_port() -> int:
    """A port on HOST that no process listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _listens(host: str) -> str:
    """Where the coordinator of this host listens: on a loopback address alone, else on every address, since the
    machine may have the one that sites use from a router."""
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return "::"  # IPv4 as well
    if found.is_loopback:
        return host
    return "::" if found.version == 6 else "0.0.0.0"  # noqa: S104 - it is for other machines


def address_from(text: str) -> tuple[str, int]:
    """(host, port) of `HOST` or `HOST:PORT`, an IPv6 address in brackets. Raises BadInput for what is no address of
    a coordinator, or of none in particular."""
    bare = text.endswith("]") or ":" not in text
    host, port = endpoint(f"{text}:{PORT}" if bare else text, "--address")
    host_name(host)
    if host in {"0.0.0.0", "::"}:  # noqa: S104 - it is refused
        raise errors.BadInput(
            f"--address: found {host}, which is every address, expected the one that sites reach the coordinator at"
        )
    return host, port


def _write_toml(path: Path, tables: Mapping[str, Any]) -> None:
    write_atomic(path, to_toml(tables).encode())


def to_toml(tables: Mapping[str, Any]) -> str:
    """Plain values as TOML; None is left out. Raises BadInput for a value that TOML has not."""
    try:
        return tomli_w.dumps(_without_none(tables))
    except TypeError as error:
        raise errors.BadInput(
            f"deployment: found what a TOML file cannot hold ({error})",
            remedy="name the site's data by a path or another text",
        ) from error


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [*map(_without_none, value)] if isinstance(value, list | tuple) else value


@dataclass
class Running:
    """Processes of a deployment, each the leader of a group of its own."""

    deployment: Deployment
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def check(self) -> None:
        """Raise BadInput with the last error line of a process, if one has ended."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise ended(name, process.returncode, self.deployment.log(name))

    def ask(self, *words: str) -> Json:
        """The JSON that a command of the operator's prints. Raises its error (see `ask`)."""
        return ask(self.deployment.operate(*words), f"fed-coordinator {words[0]}")

    def follow(self, *words: str) -> Iterator[Json | None]:
        """The JSON lines that a command of the operator's prints, while all processes run.

        None: a second without a line. Raises its error (see `ask`), and BadInput if a process ended.
        """
        line = self.deployment.operate(*words)
        # Unbuffered, so that no line waits in a buffer which `select` does not see.
        with subprocess.Popen(  # noqa: S603
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, start_new_session=True
        ) as asked:
            assert asked.stdout is not None
            assert asked.stderr is not None
            try:
                while True:
                    if not select.select([asked.stdout], [], [], 1.0)[0]:
                        self.check()
                        yield None
                    elif text := asked.stdout.readline().decode():
                        yield json.loads(text)
                    else:
                        break
                code = asked.wait(GRACE_SECONDS)
                if code not in (errors.EXIT_DONE, errors.EXIT_ABANDONED):
                    said = asked.stderr.read().decode()
                    raise error_of(f"fed-coordinator {words[0]}", code, said)
            finally:
                asked.kill()

    def wait_for_port(self) -> None:
        """Wait until the coordinator listens. Raises BadInput after START_SECONDS."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            self.check()
            with (
                contextlib.suppress(OSError),
                socket.create_connection((self.deployment.host, self.deployment.port), 1.0),
            ):
                return
            time.sleep(0.05)
        raise errors.BadInput(
            f"coordinator: found port {self.deployment.port} closed after {START_SECONDS:.0f} s",
            remedy=f"its log: {self.deployment.log(COORDINATOR)}",
        )


def ask(line: Sequence[str], name: str) -> Json:
    """The JSON that a command prints. Raises Refused, Abandoned or BadInput with its error and hint."""
    done = subprocess.run(line, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        raise error_of(name, done.returncode, done.stderr)
    found: Json = json.loads(done.stdout)
    return found


@contextlib.contextmanager
def running(
    deployment: Deployment,
    commands: Mapping[str, Sequence[str]],
    started: Callable[[str], object] = lambda _: None,
) -> Iterator[Running]:
    """Start the processes of `commands` and wait for the coordinator's port; none is left at the end.

    started: called with each command line. A SIGTERM to this process ends them as Ctrl-C does.
    """
    found = Running(deployment)
    with terminable():
        try:
            for name, line in commands.items():
                deployment.log(name).parent.mkdir(parents=True, exist_ok=True)
                with deployment.log(name).open("ab") as log:
                    found.processes[name] = subprocess.Popen(  # noqa: S603
                        line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                    )  # fmt: skip
                started(shlex.join(line))
            found.wait_for_port()
            yield found
        finally:
            stop(found.processes.values())


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise SystemExit on SIGTERM, so that the started processes are stopped."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """SIGTERM, and SIGKILL to the whole groups after GRACE_SECONDS or a second Ctrl-C."""
    left = list(processes)
    until = time.monotonic() + GRACE_SECONDS
    try:
        for process in left:
            process.terminate()
        for process in left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
    finally:
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ended(name: str, code: int, log: Path) -> errors.FedcoreError:
    """The error of a process that should still run, with the last error line of its log."""
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = next((line for line in reversed(said) if line.startswith("error: ")), "")
    last = last.removeprefix("error: ") or (said[-1] if said else "it said nothing")
    return errors.BadInput(
        f"{name}: its process ended with code {code}: {last}", remedy=f"its log: {log}"
    )


def error_of(command: str, code: int, text: str) -> errors.FedcoreError:
    """The error of a command that failed, from its exit code and its lines on stderr."""
    lines = text.splitlines()
    error = next((each for each in lines if each.startswith("error: ")), "error: it said nothing")
    hint = next((each for each in lines if each.startswith("hint: ")), "hint: ")
    what = f"{command}: {error.removeprefix('error: ')}"
    kinds = {errors.EXIT_REFUSED: errors.Refused, errors.EXIT_ABANDONED: errors.Abandoned}
    return kinds.get(code, errors.BadInput)(what, remedy=hint.removeprefix("hint: "))
