"""A federation on one machine: its files, its processes, and an operator's commands.

The files are those of a deployment over several machines: a folder for the coordinator, one for the operator
and one for every site, each with its own keys and the roster. Both shells run as commands of this interpreter
and are not imported.

Invariant: after `running`, no process of it is alive and no port is open: SIGTERM first, then SIGKILL to the
whole process group after ten seconds.
"""

import contextlib
import json
import os
import queue
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
from typing import IO, Any

from fedcore.errors import (
    EXIT_ABANDONED,
    EXIT_DONE,
    EXIT_REFUSED,
    Abandoned,
    BadInput,
    FedcoreError,
    Refused,
)
from fedcore.files import write_atomic
from fedcore.identity.authority import LOOPBACK, Authority
from fedcore.identity.identities import IDENTITY_FILE, ROSTER_FILE, create_identity, write_roster
from fedcore.types import Json, SiteId

HOST = "127.0.0.1"
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
class Command:
    """The command line of one process. name: of its party."""

    name: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.arguments)


@dataclass(frozen=True)
class Deployment:
    """The files of a federation. folder: everything is below it."""

    folder: Path
    port: int
    sites: tuple[SiteId, ...]

    def site(self, name: SiteId) -> Path:
        """The folder for a site's machine."""
        return self.folder / "sites" / name

    @property
    def job(self) -> Path:
        """The job file, for the operator."""
        return self.folder / "operator" / "job.toml"

    @property
    def coordinator(self) -> Path:
        """The folder for the coordinator's machine."""
        return self.folder / COORDINATOR

    def commands(self) -> list[Command]:
        """The processes to start, the coordinator first."""
        serve = (*_COORDINATOR, "serve", "--config", str(self.coordinator / "federation.toml"))
        sites = [Command(name, (*_SITE, "run", *self._config(name))) for name in self.sites]
        return [Command(COORDINATOR, serve), *sites]

    def _config(self, site: SiteId) -> tuple[str, str]:
        return "--config", str(self.site(site) / "site.toml")

    def operate(self, *words: str) -> list[str]:
        """A command line of the operator's."""
        kit = str(self.folder / "operator" / "kit")
        return [
            *_COORDINATOR,
            *words,
            "--coordinator",
            f"{HOST}:{self.port}",
            "--kit",
            kit,
            "--json",
        ]

    def export(self, site: SiteId, job: str, out: Path) -> list[str]:
        """The command line with which a site exports the released model."""
        return [*_SITE, "model", job, "--out", str(out), *self._config(site), "--json"]

    def state(self, name: str) -> Path:
        """The state folder of a party."""
        home = self.coordinator if name == COORDINATOR else self.site(SiteId(name))
        return home / "state"

    def log(self, name: str) -> Path:
        """The log of a party: its stdout and stderr."""
        return self.folder / "logs" / f"{name}.log"


# ------------------------------------------------------------------------------------- the files


@dataclass(frozen=True)
class SiteTask:
    """A task that a site's operator allows. task: where its code is; source: that site's data."""

    name: str
    task: str
    sha256: str
    source: Any = None


def write(
    folder: Path,
    federation: str,
    sites: Mapping[SiteId, SiteTask],
    job: Mapping[str, Any],
    *,
    policy: Mapping[str, Any],
    split: Mapping[str, Any] | None = None,
    limits: Mapping[str, Any] | None = None,
) -> Deployment:
    """Write the files of a federation: an authority, kits, keys, rosters, configuration.

    job: the tables of job.toml. policy, split: [policy] and [split] of every site.toml. limits: of
    federation.toml. Raises BadInput for a site's id or data that such files cannot hold.
    """
    now = datetime.now(UTC)
    deployment = Deployment(folder, _free_port(), tuple(sites))
    authority = Authority.create(federation, now)
    authority.save(folder / "authority")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    for each in (deployment.coordinator, deployment.job.parent):
        each.mkdir(parents=True, exist_ok=True)
    authority.issue("operator", "operator", now).save(folder / "operator" / "kit")
    kit = authority.issue(COORDINATOR, COORDINATOR, now, hosts=LOOPBACK)
    kit.save(deployment.coordinator / "kit")
    pins = {}
    for name in sites:
        home = deployment.site(name)
        home.mkdir(parents=True)
        authority.issue("site", name, now).save(home / "kit")
        pins[name] = create_identity(home / IDENTITY_FILE).public
    federation_toml = {
        "name": federation, "roster": ROSTER_FILE, "kit": "kit", "folder": "state",
        "listen": [HOST], "port": deployment.port,
        "limits": {"gather_seconds": GATHER_SECONDS, **(limits or {})},
    }  # fmt: skip
    _write_toml(deployment.coordinator / "federation.toml", federation_toml)
    write_roster(deployment.coordinator / ROSTER_FILE, pins)
    for name, task in sites.items():
        write_roster(deployment.site(name) / ROSTER_FILE, pins)
        allowed = {"task": task.task, "sha256": task.sha256, "source": task.source}
        site_toml = {
            "site": name, "coordinator": f"{HOST}:{deployment.port}", "kit": "kit",
            "identity": IDENTITY_FILE, "roster": ROSTER_FILE, "folder": "state",
            "split": dict(split or {}), "policy": policy, "tasks": {task.name: allowed},
        }  # fmt: skip
        _write_toml(deployment.site(name) / "site.toml", site_toml)
    _write_toml(deployment.job, job)
    operator_toml = {"coordinator": f"{HOST}:{deployment.port}", "kit": "kit"}
    _write_toml(deployment.job.with_name("operator.toml"), operator_toml)
    return deployment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _write_toml(path: Path, tables: Mapping[str, Any]) -> None:
    write_atomic(path, to_toml(tables).encode())


def to_toml(tables: Mapping[str, Any], place: str = "") -> str:
    """Plain values as TOML, tables last; None is left out. Raises BadInput for a value that JSON has not."""
    lines = [
        f"{_key(key)} = {_value(key, value)}"
        for key, value in tables.items()
        if value is not None and not isinstance(value, Mapping)
    ]
    text = "".join(line + "\n" for line in lines)
    for key, table in tables.items():
        if isinstance(table, Mapping):
            below = f"{place}.{_key(key)}".lstrip(".")
            inner = to_toml(table, below)
            text += inner if inner.startswith("\n[") else f"\n[{below}]\n{inner}"
    return text


def _key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else json.dumps(key, ensure_ascii=False)


def _value(key: str, value: Any) -> str:
    """One value in a line; a string of JSON is one of TOML, too."""
    if isinstance(value, Mapping):
        pairs = (f"{_key(k)} = {_value(k, v)}" for k, v in value.items() if v is not None)
        return "{ " + ", ".join(pairs) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(key, each) for each in value) + "]"
    if isinstance(value, str | bool | int | float):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    raise BadInput(
        f"{key}: found {type(value).__name__}, expected what a TOML file can hold",
        remedy="name the site's data by a path or another text",
    )


# ----------------------------------------------------------------------------------- the processes


@dataclass
class Running:
    """Processes of a deployment, each the leader of a group of its own."""

    deployment: Deployment
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def pid(self, name: str) -> int:
        """The process id of a party."""
        return self.processes[name].pid

    def check(self) -> None:
        """Raise BadInput with the last error line of a process, if one has ended."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise _ended(name, process.returncode, self.deployment.log(name))

    def ask(self, *words: str) -> Json:
        """The JSON that a command of the operator's prints. Raises its error (see `ask`)."""
        return ask(self.deployment.operate(*words), f"fed-coordinator {words[0]}")

    def follow(self, *words: str) -> Iterator[Json | None]:
        """The JSON lines that a command of the operator's prints, while all processes run.

        None: a second without a line. Raises its error (see `ask`), and BadInput if a process ended.
        """
        line = self.deployment.operate(*words)
        with subprocess.Popen(  # noqa: S603
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as asked:
            assert asked.stdout is not None
            assert asked.stderr is not None
            lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
            reader = threading.Thread(target=_read_lines, args=(asked.stdout, lines), daemon=True)
            reader.start()
            try:
                while True:
                    try:
                        text = lines.get(timeout=1.0)
                    except queue.Empty:
                        self.check()
                        yield None
                        continue
                    if text is None:
                        break
                    yield json.loads(text)
                code = asked.wait(GRACE_SECONDS)
                if code not in (EXIT_DONE, EXIT_ABANDONED):
                    raise _error_of(f"fed-coordinator {words[0]}", code, asked.stderr.read())
            finally:
                asked.kill()

    def wait_for_port(self) -> None:
        """Wait until the coordinator listens. Raises BadInput after START_SECONDS."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            self.check()
            with (
                contextlib.suppress(OSError),
                socket.create_connection((HOST, self.deployment.port), 1.0),
            ):
                return
            time.sleep(0.05)
        raise BadInput(
            f"coordinator: found port {self.deployment.port} closed after {START_SECONDS:.0f} s",
            remedy=f"its log: {self.deployment.log(COORDINATOR)}",
        )


def ask(line: Sequence[str], name: str) -> Json:
    """The JSON that a command prints. Raises Refused, Abandoned or BadInput with its error and hint."""
    done = subprocess.run(line, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        raise _error_of(name, done.returncode, done.stderr)
    found: Json = json.loads(done.stdout)
    return found


@contextlib.contextmanager
def running(
    deployment: Deployment, commands: Sequence[Command], started: Callable[[Command], None]
) -> Iterator[Running]:
    """Start the processes of `commands` and wait for the coordinator's port; none is left at the end.

    started: called with each command. A SIGTERM to this process ends them as Ctrl-C does.
    """
    found = Running(deployment)
    with _terminable():
        try:
            for command in commands:
                with deployment.log(command.name).open("ab") as log:
                    found.processes[command.name] = subprocess.Popen(  # noqa: S603
                        command.arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                        start_new_session=True,
                    )  # fmt: skip
                started(command)
            found.wait_for_port()
            yield found
        finally:
            _stop(found.processes.values())


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
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


def _stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
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


def _read_lines(source: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    for line in source:
        if line.strip():
            lines.put(line)
    lines.put(None)


def _ended(name: str, code: int, log: Path) -> FedcoreError:
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = next((line for line in reversed(said) if line.startswith("error: ")), "")
    last = last.removeprefix("error: ") or (said[-1] if said else "it said nothing")
    return BadInput(f"{name}: its process ended with code {code}: {last}", remedy=f"its log: {log}")


def _error_of(command: str, code: int, text: str) -> FedcoreError:
    """The error of a command that failed, from its exit code and its lines on stderr."""
    lines = text.splitlines()
    error = next((each for each in lines if each.startswith("error: ")), "error: it said nothing")
    hint = next((each for each in lines if each.startswith("hint: ")), "hint: ")
    what = f"{command}: {error.removeprefix('error: ')}"
    kinds = {EXIT_REFUSED: Refused, EXIT_ABANDONED: Abandoned}
    return kinds.get(code, BadInput)(what, remedy=hint.removeprefix("hint: "))
