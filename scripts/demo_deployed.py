"""A deployed federation on this machine, from its foundation to a site that is revoked: scripts/demo --deployed.

Prints each command as its user types it, and what came of it. All of it is in a temporary folder, which is removed at
the end, as every process is ended, also after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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

    def _start(self, text: str, **streams: object) -> subprocess.Popen[str]:
        program, *rest = shlex.split(text)
        return subprocess.Popen(
            [*self._programs[program], *rest], cwd=self.folder, env=self.env, text=True,
            start_new_session=True, **streams,
        )  # fmt: skip

    def run(self, text: str, line: str = "", code: int = 0) -> str:
        """The stdout of a command that gets this line on stdin. Raises CommandFailed."""
        pipe = subprocess.PIPE
        process = self._start(text, stdin=pipe, stdout=pipe, stderr=pipe)
        try:
            out, err = process.communicate(line)
        finally:
            _end([process])
        self.said.append((text, out, err))
        if process.returncode != code:
            raise CommandFailed(f"{text}: exit code {process.returncode}\n{out}{err}")
        return out

    def begin(self, name: str, text: str, words: str) -> None:
        """Start a command in the background, and wait until its log has these words."""
        with (self.folder / f"{name}.log").open("a") as log:
            self.running[name] = self._start(
                text, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        process = self.running[name]
        self.until(
            lambda: words in self.log(name) or process.poll() is not None, f"{name}: {words}"
        )
        if process.poll() is not None:
            raise CommandFailed(f"{text}: exit code {process.returncode}\n{self.log(name)}")

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
ROUNDS, MOST = 15, 30

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


class Demo(Commands):
    """The commands, shown with what came of them."""

    def type(self, text: str, keep: Callable[[list[str]], list[str]], line: str = "") -> str:
        """Show a command, run it, and show the lines of its stdout that `keep` gives. All of it."""
        print(f"$ {text}" + (" < line" if line else ""), flush=True)
        out = self.run(text, line)
        indented(*keep(out.splitlines()))
        return out

    def serve(self, name: str, text: str, words: str) -> None:
        """Show a command, and start it in the background."""
        print(f"$ {text} &", flush=True)
        self.begin(name, text, words)

    def invite(self, site: str) -> str:
        """The line with which a site joins; shown without its token."""
        out = self.type(
            f"fed-coordinator invite {site} {CONFIG}",
            lambda lines: [lines[0].rpartition(":")[0] + ":(its token: a secret)"],
        )
        return out.strip()

    def join(self, site: str, line: str) -> None:
        """Have a site join."""
        words = f"fed-site join --out {site} --task heart.py --source {site}.csv"
        self.type(words, lambda lines: lines[:1], line)

    def check(self, site: str) -> None:
        """Show whether a site has what it needs."""
        self.type(f"fed-site check --config {site}/site.toml", checks)

    def takes_part(self, site: str) -> None:
        """Start a site, without waiting for it."""
        self.serve(site, f"fed-site run --config {site}/site.toml", "")

    def approve(self, site: str, number: int) -> None:
        """Approve a roster, once the site has it."""
        self.until(lambda: self.waiting_roster(site) == number, f"roster {number} at {site}")
        text = f"fed-site roster approve {number} --config {site}/site.toml"
        self.type(text, lambda lines: ["; ".join(lines)])

    def over(self, job: str, sites: Sequence[str]) -> None:
        """Wait until a job is over at these sites, and show the model that each has. Raises CommandFailed where
        they differ."""
        self.type(f"fed-coordinator watch {job}", lambda lines: lines[-1:])
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
    demo.serve("coordinator", f"fed-coordinator serve {CONFIG}", "listening on")

    title("four hospitals join: each makes its own keys, and needs one line")
    lines = {site: demo.invite(site) for site in FOUNDERS}
    for site, line in lines.items():
        demo.join(site, line)
    demo.check(FOUNDERS[0])

    title("they run, and each approves the roster of all four")
    for site in FOUNDERS:
        demo.takes_part(site)
    for site in FOUNDERS[:-1]:  # the last one got it when it joined
        demo.approve(site, 5)

    title("a job")
    print(f"$ export FEDCORE_OPERATOR={demo.env['FEDCORE_OPERATOR']}")
    job = demo.type("fed-coordinator submit job.toml", list).strip()
    demo.over(job, FOUNDERS)

    title("a fifth hospital joins; nothing is restarted")
    demo.join(LATER, demo.invite(LATER))
    demo.takes_part(LATER)
    for site in FOUNDERS:
        demo.approve(site, 6)

    title(f"in the middle of the next job, {REVOKED} is revoked")
    job = demo.type("fed-coordinator submit longer.toml", list).strip()
    demo.until(lambda: (demo.job_at(LATER, job).get("round") or 0) >= 3, f"round 3 of {job}")
    demo.type(f"fed-coordinator revoke {REVOKED} {CONFIG}", list)
    began = time.monotonic()
    code = demo.running[REVOKED].wait(PATIENCE)
    indented(
        f"fed-site run at {REVOKED} ended {time.monotonic() - began:.1f} s later, exit code {code}",
        *[line for line in demo.log(REVOKED).splitlines() if line.startswith("error: ")],
    )
    rest = [site for site in (*FOUNDERS, LATER) if site != REVOKED]
    demo.over(job, rest)

    title("what each party recorded, checked offline against what the coordinator recorded")
    trail = "--receipts hospitals/state/audit.jsonl"
    for site in (*FOUNDERS, LATER):
        demo.type(
            f"fed-site audit verify --config {site}/site.toml {trail}", lambda lines: lines[:1]
        )
    trails = " ".join(f"--receipts {site}/state/audit.jsonl" for site in rest)
    demo.type(f"fed-coordinator audit verify {CONFIG} {trails}", lambda lines: lines[:1])


def main() -> int:
    """The demo in a temporary folder; its exit code."""
    if sys.argv[1:]:
        print(f"error: found {sys.argv[1]!r}, expected nothing after --deployed", file=sys.stderr)
        print("hint: scripts/demo --deployed", file=sys.stderr)
        return 2

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    ended_by = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in ended_by:
        signal.signal(number, stop)
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="fedcore-demo-"))
    programs = {name: [str(Path(sys.executable).with_name(name))] for name in PROGRAMS}
    env = {
        "FEDCORE_OPERATOR": "hospitals/operator/operator.toml",
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "1",
    }
    demo = Demo(folder, programs, env)
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
    print(f"the whole story took {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
