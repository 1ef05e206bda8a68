"""Flower's deployment on this machine: a SuperLink, one SuperNode a site, and `flwr run` of one app on them.

As an operator starts them: `flower-superlink --insecure`, `flower-supernode --insecure` with `partition-id` and
`num-partitions`, all on loopback, in a FLWR_HOME of their own. A round is timed by the ServerApp's own lines.

Invariant: afterwards no process of it is alive: SIGTERM first, then SIGKILL to each group and to whatever they had
started in groups of their own.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedcore.bench import progress
from fedcore.bench.engine import children_of
from fedcore.bench.flower_log import FlowerLog, plain
from fedcore.errors import Abandoned, BadInput, FedcoreError, TaskFailed
from fedcore.local_deployment import HOST, ended, free_port, stop, terminable

STALLED_SECONDS = 300.0
"""The longest silence of a run: after it the run is given up."""

ONLINE_SECONDS = 180.0
"""Timeout until Flower's processes are ready: each SuperNode loads its libraries."""

SAID_SECONDS = 30.0
"""The longest silence on the screen."""

SHOWN_LINES = 12
"""Last lines of the log of a run that failed."""

CONNECTION = "bench"
"""Name of the SuperLink in Flower's config.toml."""


def search_path() -> str:
    """Where programs are looked for: first among those of this interpreter."""
    return os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))


def program(name: str, path: str) -> str:
    """The path of an installed program. Raises BadInput."""
    found = shutil.which(name, path=path)
    if found is None:
        raise BadInput(
            f"{name}: found no program of that name in {path}, expected it",
            remedy="pip install 'fedcore-fl[flower]'",
        )
    return found


def programs() -> None:
    """Raise BadInput if one of Flower's programs is missing."""
    for name in ("flwr", "flower-superlink", "flower-supernode", "flower-superexec"):
        program(name, search_path())


def watched(
    process: subprocess.Popen[bytes],
    path: Callable[[], Path | None],
    seconds: float,
    what: Callable[[], str],
    stalled: float = STALLED_SECONDS,
) -> Iterator[tuple[float, str]]:
    """(time.monotonic() when it was seen, line) of a file that a process writes, until the process has ended.

    path: of the file, None before it exists. seconds: between two looks. what: what it does now, for a line of
    progress after each SAID_SECONDS without any. Raises Abandoned after `stalled` seconds without a line.
    """
    rest, offset = b"", 0
    began = heard = said = time.monotonic()
    while True:
        last = process.poll() is not None
        found, fresh = path(), b""
        if found is not None:
            with found.open("rb") as file:
                file.seek(offset)
                fresh = file.read()
        now = time.monotonic()
        offset += len(fresh)
        *lines, rest = (rest + fresh).split(b"\n")
        for line in lines:
            heard = said = now
            yield now, line.decode(errors="replace")
        if last:
            return
        if now - heard > stalled:
            raise Abandoned(f"{what()}: found no line for {stalled:.0f} s")
        if now - said > SAID_SECONDS:
            said = now
            progress(f"{what()}, {now - began:.0f} s so far")
        time.sleep(seconds)


@contextmanager
def process_of(
    line: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A command that writes to a log, in a group of its own; afterwards it is not alive."""
    with terminable(), log.open("ab") as file:
        process = subprocess.Popen(  # noqa: S603
            line, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            cwd=log.parent, env=environment,
        )  # fmt: skip
        try:
            yield process
        finally:
            stop([process])


@dataclass
class SuperLink:
    """Flower's processes. folder: of logs, FLWR_HOME and what an app writes."""

    folder: Path
    environment: Mapping[str, str]
    port: int
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def start(self, name: str, *line: str) -> None:
        command = (program(line[0], self.environment["PATH"]), *line[1:])
        with self.log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, cwd=self.folder, env=self.environment,
            )  # fmt: skip

    def wait(self, what: str, ready: Callable[[], bool]) -> None:
        """Until `ready`. Raises BadInput if a process has ended, and after ONLINE_SECONDS."""
        until = time.monotonic() + ONLINE_SECONDS
        while not ready():
            self.check()
            if time.monotonic() > until:
                raise BadInput(
                    f"Flower: found {what} not ready after {ONLINE_SECONDS:.0f} s",
                    remedy=f"the logs: {self.log('*')}",
                )
            time.sleep(0.1)

    def check(self) -> None:
        """Raise BadInput with the last line of a process, if one has ended."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise ended(f"Flower's {name}", process.returncode, self.log(name))

    def listens(self) -> bool:
        with suppress(OSError), socket.create_connection((HOST, self.port), 1.0):
            return True
        return False

    def online(self) -> int:
        """SuperNodes that the SuperLink has and that are online."""
        flwr = program("flwr", self.environment["PATH"])
        line = (flwr, "supernode", "list", CONNECTION, "--format", "json")
        done = subprocess.run(  # noqa: S603
            line, capture_output=True, text=True, check=False, env=self.environment, cwd=self.folder
        )
        try:
            nodes = json.loads(done.stdout)["nodes"]
        except (ValueError, KeyError, TypeError):
            return 0
        return sum(str(node.get("status")) == "online" for node in nodes)


@contextmanager
def superlink(folder: Path, sites: int) -> Iterator[SuperLink]:
    """Flower's processes with every SuperNode online; none is left at the end. Raises BadInput."""
    home = folder / "flwr"
    home.mkdir(parents=True)
    ours = {
        "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1", "PATH": search_path(),
        # Flower starts a process for every message: without bytecode files each would compile what it loads.
        "PYTHONDONTWRITEBYTECODE": "",
    }  # fmt: skip
    found = SuperLink(folder, {**os.environ, **ours}, free_port())
    address = f"{HOST}:{found.port}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n'
        f'[superlink.{CONNECTION}]\naddress = "{address}"\ninsecure = true\n'
    )
    with terminable():
        try:
            found.start(
                "superlink", "flower-superlink", "--insecure", "--host", HOST, "--port", str(found.port),
                "--disable-runtime-dependency-installation",
            )  # fmt: skip
            found.wait("its SuperLink", found.listens)
            for place in range(sites):
                found.start(
                    f"supernode-{place}", "flower-supernode", "--insecure", "--superlink", address,
                    "--port", str(free_port()),
                    "--node-config", f"partition-id={place} num-partitions={sites}",
                )  # fmt: skip
            found.wait(f"{sites} SuperNodes", lambda: found.online() == sites)
            yield found
        finally:
            _end(found.processes)


def _end(processes: Mapping[str, subprocess.Popen[bytes]]) -> None:
    """Stop the processes, and what they started in groups of their own."""
    started = [pid for process in processes.values() for pid in _below(process.pid)]
    try:
        stop(processes.values())
    finally:
        for pid in started:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _below(pid: int) -> Iterator[int]:
    for child in children_of(pid):
        yield child
        yield from _below(child)


def run_app(
    link: SuperLink, app: Path, name: str, sites: int, config: str
) -> tuple[FlowerLog, float]:
    """`flwr run` of an app to its end; returns what its log says, and when it was submitted.

    config: of `-c`. Raises TaskFailed with the last lines of the log if the app failed, and Abandoned.
    """
    line = [program("flwr", link.environment["PATH"]), "run", str(app), CONNECTION, "--stream"] + (
        ["-c", config] if config else []
    )
    log, output = FlowerLog(), link.log("flwr-run")

    def doing() -> str:
        return (
            f"{name} on Flower: round {log.round}" if log.round else f"{name} on Flower: starting"
        )

    began = time.monotonic()
    with process_of(line, output, link.environment) as process:
        for when, text in watched(process, lambda: output, 0.05, doing):
            done = len(log.ended)
            log.feed(text, when)
            if len(log.ended) > done:
                progress(
                    f"{name} on Flower: round {done + 1}, {when - (log.began[done + 1]):.1f} s"
                )
            _refuse_failures(log, name, sites, output)
    if not log.finished:
        raise _failed(f"{name} on Flower: found the end of its log in round {log.round}", output)
    link.check()
    return log, began


def _refuse_failures(log: FlowerLog, name: str, sites: int, output: Path) -> None:
    for phase, (results, failures) in log.phases.get(log.round, {}).items():
        where = f"{phase} of round {log.round}"
        if failures:
            raise _failed(
                f"{name} on Flower: found {results} results and {failures} failures in {where}, "
                f"expected {sites} results",
                output,
            )
        if results != sites:
            raise BadInput(
                f"{name} on Flower: found {results} of {sites} sites in {where}, expected all, as on Fedcore",
                remedy=f"fraction_train and fraction_evaluate of the app's strategy are 1; the logs: {output.parent}",
            )


def _failed(what: str, output: Path) -> FedcoreError:
    said = [
        text for line in output.read_text(errors="replace").splitlines() if (text := plain(line))
    ]
    return TaskFailed(
        what,
        user_traceback="\n".join(said[-SHOWN_LINES:]),
        remedy=f"the logs: {output.parent}",
    )
