"""A deployed federation on this machine, from its foundation to a site that is revoked: scripts/demo --deployed.

Prints each command as its user types it, and what came of it. All of it is in a temporary folder, which is removed at
the end, as every process is ended, also after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import resource
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from fedcore.local_deployment import free_port
from fedcore.types import Json

PATIENCE = 240.0
"""Seconds for whatever is waited for on a loaded machine."""

GRACE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL."""


PROGRAMS = ("fed-coordinator", "fed-site")


class CommandFailed(Exception):
    """A command ended with another exit code than expected."""


class Commands:
    """Commands of fed-coordinator and fed-site as people type them, in one folder.

    folder: where they run. programs: {name: the words that start it}. said: (command, stdout, stderr) of each that
    ended; running: by name, those in the background, each with its log in NAME.log. No process outlives `end`.
    """

    def __init__(
        self, folder: Path, programs: Mapping[str, Sequence[str]], env: Mapping[str, str]
    ) -> None:
        self.folder, self.env = folder, {**os.environ, **env}
        self._programs = programs
        self.said: list[tuple[str, str, str]] = []
        self.running: dict[str, subprocess.Popen[str]] = {}
        self._starting, self._stopped_by = False, 0

    def stop(self, number: int, _: object) -> None:
        """Handle a signal: the demo ends, but not between the start of a process and its place in a list."""
        if self._starting:
            self._stopped_by = number
            return
        raise SystemExit(128 + number)

    @contextlib.contextmanager
    def _start_whole(self) -> Iterator[None]:
        """A process that starts inside is known to who ends it before a signal ends the demo."""
        self._starting = True
        try:
            yield
        finally:
            self._starting = False
        if self._stopped_by:
            raise SystemExit(128 + self._stopped_by)

    def _start(self, text: str, **streams: object) -> subprocess.Popen[str]:
        program, *rest = shlex.split(text)
        return subprocess.Popen(
            [*self._programs[program], *rest], cwd=self.folder, env=self.env, text=True,
            start_new_session=True, **streams,
        )  # fmt: skip

    def run(self, text: str, line: str = "", code: int = 0) -> str:
        """The stdout of a command that gets this line on stdin. Raises CommandFailed."""
        return next(self.run_all({text: line}, code))

    def run_all(self, commands: Mapping[str, str], code: int = 0) -> Iterator[str]:
        """The stdout of each of these commands, which run side by side; each gets its line on stdin. Raises
        CommandFailed; then none of them is left."""
        pipe = subprocess.PIPE
        started: list[subprocess.Popen[str]] = []
        try:
            for text in commands:
                with self._start_whole():
                    started.append(self._start(text, stdin=pipe, stdout=pipe, stderr=pipe))
            for process, (text, line) in zip(started, commands.items(), strict=True):
                out, err = process.communicate(line)
                self.said.append((text, out, err))
                if process.returncode != code:
                    raise CommandFailed(f"{text}: exit code {process.returncode}\n{out}{err}")
                yield out
        finally:
            _end(started)

    def begin(self, name: str, text: str, words: str = "") -> None:
        """Start a command in the background, and wait until its log has these words."""
        with (self.folder / f"{name}.log").open("a") as log, self._start_whole():
            self.running[name] = self._start(
                text, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        if words:
            self.ready(name, words)

    def ready(self, name: str, words: str) -> None:
        """Wait until the log of a command in the background has these words. Raises CommandFailed where it ends."""
        process = self.running[name]
        self.until(
            lambda: words in self.log(name) or process.poll() is not None, f"{name}: {words}"
        )
        if process.poll() is not None:
            raise CommandFailed(f"{name}: exit code {process.returncode}\n{self.log(name)}")

    def log(self, name: str) -> str:
        """What a command in the background has written."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def until(self, done: Callable[[], object], what: str) -> None:
        """Wait for this. Raises CommandFailed after `PATIENCE`."""
        end = time.monotonic() + PATIENCE
        while not done():
            if time.monotonic() > end:
                logs = "".join(f"\n--- {name}\n{self.log(name)[-1500:]}" for name in self.running)
                raise CommandFailed(f"waited {PATIENCE:.0f} s for: {what}{logs}")
            time.sleep(0.05)

    def job_at(self, site: str, job: str) -> Json:
        """A job in the status of the site in this folder; empty where it is not in it yet."""
        return next((row for row in self._status(site).get("jobs", ()) if row["job"] == job), {})

    def waiting_roster(self, site: str) -> int:
        """The number of the roster that waits for approval at a site; 0 for none."""
        waiting = self._status(site).get("roster", {}).get("waiting") or {}
        return int(waiting.get("number", 0))

    def rosters(self, site: str) -> set[int]:
        """The numbers of the rosters in the status of a site: the one it goes by, and one that waits."""
        return {
            int(self._status(site).get("roster", {}).get("number") or 0),
            self.waiting_roster(site),
        }

    def rounds(self, job: str) -> list[Json]:
        """The rounds of a job, as the coordinator recorded them."""
        path = self.folder / "hospitals" / "state" / "jobs" / job / "rounds.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def _status(self, site: str) -> Json:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / site / "state" / "status.json").read_text())
        return {}

    def end(self) -> None:
        """No process in the background is left."""
        _end(list(self.running.values()))


def _end(processes: Sequence[subprocess.Popen[str]]) -> None:
    """SIGTERM to each that runs, then SIGKILL to it and to what it started."""
    alive = [each for each in processes if each.poll() is None]
    for each in alive:
        each.terminate()
    until = time.monotonic() + GRACE_SECONDS
    for each in alive:
        with contextlib.suppress(subprocess.TimeoutExpired):
            each.wait(max(0.1, until - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(each.pid, signal.SIGKILL)
        each.wait()


# ----------------------------------------------------------------------------------------- the demo

FOUNDERS, LATER, REVOKED = ("cleveland", "hungary", "switzerland", "va"), "lakeside", "hungary"
CONFIG = "--config hospitals/federation.toml"
ROUNDS, MOST = 15, 40

TASK = """\
import fedcore
from fedcore.learning.data.heart import table

heart = fedcore.load_task("heart")
task = fedcore.Task(
    name="heart", data=table, model=heart.model, loss=heart.loss, metrics=heart.metrics,
    defaults=heart.defaults,
)
"""

JOB = """\
task = "heart.py"
[round]
rounds = {}
[protect]
max_examples = 512
"""


def write_files(folder: Path) -> None:
    """The task, two jobs, the passphrase, and one table for each hospital: Cleveland's patients are those of two."""
    from fedcore.learning.data.heart import FILE, HOSPITALS

    (folder / "heart.py").write_text(TASK)
    (folder / "job.toml").write_text(JOB.format(ROUNDS))
    (folder / "longer.toml").write_text(JOB.format(MOST))
    passphrase = folder / "passphrase"
    passphrase.touch(0o600)
    passphrase.write_text(secrets.token_urlsafe(24))
    rows = list(csv.DictReader(FILE.open()))
    tables = {
        site: [row for row in rows if row["dataset"] == name] for site, name in HOSPITALS.items()
    }
    both = tables["cleveland"]
    tables |= {"cleveland": both[::2], LATER: both[1::2]}
    for site, mine in tables.items():
        with (folder / f"{site}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0]])
            writer.writeheader()
            writer.writerows(mine)


def title(text: str) -> None:
    """The begin of a part."""
    print(f"\n== {text}", flush=True)


def indented(*lines: str) -> None:
    """What a command said."""
    for line in lines:
        print(f"   {line}", flush=True)


Keep = Callable[[list[str]], list[str]]
"""Which of the lines of a command are shown."""


class Demo(Commands):
    """The commands, shown with what came of them."""

    def type(self, text: str, keep: Keep) -> str:
        """Show a command, run it, and show the lines of its stdout that `keep` gives. All of it."""
        return self.type_all({text: ""}, keep)[0]

    def type_all(self, commands: Mapping[str, str], keep: Keep) -> list[str]:
        """The same of commands that run side by side, as on different machines, each with a line on stdin or none."""
        found, done = [], self.run_all(commands)
        for text, line in commands.items():
            print(f"$ {text}" + (" < line" if line else ""), flush=True)
            found.append(next(done))
            indented(*keep(found[-1].splitlines()))
        return found

    def serve(self, name: str, text: str) -> None:
        """Show a command, and start it in the background, without waiting for it."""
        print(f"$ {text} &", flush=True)
        self.begin(name, text)

    def invite(self, *sites: str) -> dict[str, str]:
        """The line with which each site joins; shown without its token."""
        commands = [f"fed-coordinator invite {site} {CONFIG}" for site in sites]
        lines = self.type_all(
            dict.fromkeys(commands, ""),
            lambda lines: [lines[0].rpartition(":")[0] + ":(its token: a secret)"],
        )
        return {site: line.strip() for site, line in zip(sites, lines, strict=True)}

    def join(self, lines: Mapping[str, str]) -> None:
        """Have sites join, each with its line."""
        commands = {
            f"fed-site join --out {site} --task heart.py --source {site}.csv": line
            for site, line in lines.items()
        }
        self.type_all(commands, lambda said: said[:1])

    def takes_part(self, site: str) -> None:
        """Start a site, without waiting for it."""
        self.serve(site, f"fed-site run --config {site}/site.toml")

    def approve(self, number: int, sites: Sequence[str]) -> None:
        """Approve a roster at each of these sites that did not get it when it joined, once it has it."""
        for site in sites:
            self.until(lambda site=site: number in self.rosters(site), f"roster {number} at {site}")
        commands = [
            f"fed-site roster approve {number} --config {site}/site.toml"
            for site in sites
            if self.waiting_roster(site) == number
        ]
        self.type_all(dict.fromkeys(commands, ""), lambda lines: ["; ".join(lines)])

    def over(self, job: str, sites: Sequence[str]) -> None:
        """Wait until a job is over at these sites, and show the model that each has. Raises CommandFailed where
        they differ."""
        self.type(
            f"fed-coordinator watch {job}",
            lambda lines: [line for line in lines if line.startswith(f"{job} ")][-1:],
        )
        self.until(
            lambda: all(self.job_at(site, job).get("stage") == "over" for site in sites),
            f"{job}: over at {', '.join(sites)}",
        )
        models = {site: self.job_at(site, job)["model_sha256"] for site in sites}
        for site, digest in models.items():
            indented(f"model at {site:<12} {digest}")
        if len(set(models.values())) != 1:
            raise CommandFailed(f"job {job}: found models that differ, expected one")
        indented(f"the same at all {len(sites)} sites")


def checks(lines: list[str]) -> list[str]:
    """Of `fed-site check`: how many are OK, and what it warns of."""
    found = [line for line in lines if line.startswith("OK")]
    warnings = [
        line.split("warning: ", 1)[1]
        for line in found
        if "admitted" in line and "warning: " in line
    ]
    return [f"{len(found)} of {len(lines)} checks OK", *warnings]


def play(demo: Demo, port: int) -> None:
    """The whole story."""
    title("the operator founds a federation; the authority's key is encrypted with the passphrase")
    demo.type(
        f"fed-coordinator init hospitals --host localhost --port {port} --enrol-port {free_port()} "
        "--passphrase-file passphrase",
        lambda lines: lines[:1],
    )
    print("$ echo 'passphrase_file = \"../passphrase\"' >> hospitals/federation.toml")
    with (demo.folder / "hospitals/federation.toml").open("a") as file:
        file.write('passphrase_file = "../passphrase"\n')
    demo.serve("coordinator", f"fed-coordinator serve {CONFIG}")

    title("four hospitals join side by side: each makes its own keys, and needs one line")
    lines = demo.invite(*FOUNDERS)
    demo.ready("coordinator", "listening on")
    demo.join(lines)

    title("they run; one checks what it needs, and each approves the roster of all four")
    for site in FOUNDERS[1:]:
        demo.takes_part(site)
    demo.type(f"fed-site check --config {FOUNDERS[0]}/site.toml", checks)
    demo.takes_part(FOUNDERS[0])
    demo.approve(5, FOUNDERS)

    title("a job")
    print(f"$ export FEDCORE_OPERATOR={demo.env['FEDCORE_OPERATOR']}")
    job = demo.type("fed-coordinator submit job.toml", list).strip()
    demo.over(job, FOUNDERS)

    title("a fifth hospital joins; nothing is restarted")
    demo.join(demo.invite(LATER))
    demo.takes_part(LATER)
    demo.approve(6, FOUNDERS)

    title(f"in the middle of the next job, {REVOKED} is revoked")
    job = demo.type("fed-coordinator submit longer.toml", list).strip()
    demo.until(lambda: (demo.job_at(LATER, job).get("round") or 0) >= 3, f"round 3 of {job}")
    demo.type(f"fed-coordinator revoke {REVOKED} {CONFIG}", list)
    cut, began = demo.running[REVOKED], time.monotonic()
    at_once = cut.poll() is not None
    code = cut.wait(PATIENCE)
    when = "meanwhile" if at_once else f"{time.monotonic() - began:.1f} s later"
    indented(
        f"fed-site run at {REVOKED} ended {when}, exit code {code}",
        *[line for line in demo.log(REVOKED).splitlines() if line.startswith("error: ")],
    )
    rest = [site for site in (*FOUNDERS, LATER) if site != REVOKED]
    demo.over(job, rest)
    there = [REVOKED in row["survivors"] for row in demo.rounds(job)]
    indented(f"{sum(there)} rounds with {REVOKED}, and {len(there) - sum(there)} without it")
    if all(there):
        raise CommandFailed(
            f"job {job}: found it over before {REVOKED} was cut off, expected rounds after it"
        )

    title("what each party recorded, checked offline against what the coordinator recorded")
    trail = "--receipts hospitals/state/audit.jsonl"
    trails = " ".join(f"--receipts {site}/state/audit.jsonl" for site in rest)
    checked = [
        f"fed-site audit verify --config {site}/site.toml {trail}" for site in (*FOUNDERS, LATER)
    ]
    checked.append(f"fed-coordinator audit verify {CONFIG} {trails}")
    demo.type_all(dict.fromkeys(checked, ""), lambda lines: lines[:1])


def main() -> int:
    """The demo in a temporary folder; its exit code."""
    if sys.argv[1:]:
        print(f"error: found {sys.argv[1]!r}, expected nothing after --deployed", file=sys.stderr)
        print("hint: scripts/demo --deployed", file=sys.stderr)
        return 2

    ended_by = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="fedcore-demo-"))
    programs = {name: [str(Path(sys.executable).with_name(name))] for name in PROGRAMS}
    env = {
        "FEDCORE_OPERATOR": "hospitals/operator/operator.toml",
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "",  # else each of some forty processes compiles the program anew
    }
    demo = Demo(folder, programs, env)
    for number in ended_by:
        signal.signal(number, demo.stop)
    try:
        print(f"everything is in {folder} until the end")
        write_files(folder)
        play(demo, free_port())
    except CommandFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        for number in ended_by:  # nothing interrupts what follows
            signal.signal(number, signal.SIG_IGN)
        demo.end()
        shutil.rmtree(folder)
        print(f"\nended all processes and removed {folder}", flush=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime
    print(f"the whole story took {time.monotonic() - began:.0f} s ({cpu:.0f} s of CPU)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
