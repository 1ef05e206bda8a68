"""Kill, cut, fill and hurry a federation of real processes, then check that nothing was lost.

    scripts/chaos --minutes 5 --seed 7 --rounds 100

A coordinator and four sites run job after job, with protections by turns, while a schedule drawn from
the seed kills -9 any of them and starts it again, drops or delays the connections (every site goes
through a small TCP proxy of its own), leaves no room on the disk (RLIMIT_FSIZE of a running process) and
lets clocks jump. Clocks are injected: `CoordinatorContext.clock` and `.now`, and `Party.clock`, of the processes
started here add what a file says; an installed Fedcore has no such switch. Then all is calm, and
    - every job ended, finished or with a reason;
    - every journal verifies;
    - the models that sites hold are the plain sums, made here again, of exactly the survivors that
      rounds.jsonl lists, from the first round to the last, and each round is in it once;
    - no site made two vectors, signed two lists, answered unmask twice or stated two sums in a round.
It takes as long as was asked for and goes on until `--rounds` rounds were released and every kind of
disturbance was made, so that what a run shows does not depend on how fast the machine is.
Prints one line with counts, and exits with 1 if any of it does not hold. The processes and their order
are not deterministic: a seed fixes what is done to them, not what they are at.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import resource
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # run by itself, not by pytest
from deployment import CAP, HUB, deployment, small_task

PROTECTIONS = ("masked", "layered", "encrypted")
LIMITS = {
    "stage_seconds": 20, "gather_seconds": 4, "grace_seconds": 5, "enough_seconds": 120,
}  # fmt: skip
CALM_SECONDS = 300.0
LONGEST_SECONDS = 600.0
"""A run that has not released its rounds so long after its time ends, and says so."""
USUAL_DELAY = 0.01
"""Seconds that every piece takes through the proxy."""

CLOCK = """
import pathlib, time
_jump = pathlib.Path({path!r})
def _jumped():
    try:
        return float(_jump.read_text() or 0)
    except (OSError, ValueError):
        return 0.0
"""

HUB_PATCH = """
import fedcore_server.app as _main
_context = _main.CoordinatorContext
def CoordinatorContext(*a, **k):
    k["clock"] = lambda: time.monotonic() + abs(_jumped())
    k["now"] = lambda: time.time() + _jumped()
    return _context(*a, **k)
_main.CoordinatorContext = CoordinatorContext
"""

SITE_PATCH = """
import hashlib, json
import fedcore_clients.app as _main
from fedcore_clients.round_work import RoundWork as _Work
from fedcore.store.journal import Journal as _Journal
from fedcore.secagg.protocol.round import site as _machine
from fedcore.secagg.protocol.wire_form import decode as _decode, encode as _encode
from fedcore.secagg.protocol.messages import Unmask as _Unmask
_context = _main.SiteContext
def SiteContext(*a, **k):
    k["clock"] = lambda: time.monotonic() + abs(_jumped())
    return _context(*a, **k)
_main.SiteContext = SiteContext
_written = _Journal.append
_once = {
    _machine.VectorSpooled: lambda record: record.submit.header,
    _machine.ListSigned: lambda record: record.confirm.header,
    _machine.UnmaskAnswered: lambda record: _decode(record.exchange.answer, _Unmask).header,
    _machine.SumStated: lambda record: record.statement.header,
}
def _append(self, job, stream, records, *, put=None):
    _written(self, job, stream, records, put=put)
    for record in records:
        if type(record) not in _once:
            continue
        line = [job, _once[type(record)](record).hex(), type(record).__name__,
                hashlib.sha256(_encode(record)).hexdigest()]
        try:
            with open({trace!r}, "a") as file:
                file.write(json.dumps(line) + "\\n")
        except OSError:
            pass  # no room: one witness less
_Journal.append = _append
import random
_quick = _Work.protect
def _protect(self, asked, found):
    time.sleep(random.uniform(0.0, 0.4))  # as if the model were larger: a round has a middle
    return _quick(self, asked, found)
_Work.protect = _protect
"""


class Proxy:
    """Loopback ports in front of the coordinator's, one a site, that can be cut and slowed."""

    def __init__(self, target):
        self.target = target
        self.ports, self.delay, self.pairs = {}, defaultdict(lambda: USUAL_DELAY), defaultdict(set)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def open(self, name):
        """A listening port for a site."""

        async def begin():
            async def accepted(reader, writer):
                await self._join(name, reader, writer)

            return await asyncio.start_server(accepted, "127.0.0.1", 0)

        server = asyncio.run_coroutine_threadsafe(begin(), self.loop).result(10)
        self.ports[name] = server.sockets[0].getsockname()[1]
        return self.ports[name]

    async def _join(self, name, reader, writer):
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.close()
            return
        pair = (writer, far_writer)
        self.pairs[name].add(pair)
        try:
            await asyncio.gather(
                self._pump(name, reader, far_writer), self._pump(name, far_reader, writer)
            )
        except OSError:
            pass
        finally:
            self.pairs[name].discard(pair)
            for each in pair:
                each.close()

    async def _pump(self, name, reader, writer):
        while data := await reader.read(1 << 16):
            if self.delay[name]:
                await asyncio.sleep(self.delay[name])
            writer.write(data)
            await writer.drain()
        writer.close()

    def cut(self, name):
        """Reset a site's connections."""

        def reset():
            for pair in list(self.pairs[name]):
                for writer in pair:
                    found = writer.get_extra_info("socket")
                    with contextlib.suppress(OSError, AttributeError):
                        found.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                        )
                    writer.transport.abort()

        self.loop.call_soon_threadsafe(reset)

    def close(self):
        self.loop.call_soon_threadsafe(self.loop.stop)


KINDS = (
    "kills of sites", "kills of the coordinator", "cuts", "delays", "full disks", "clock jumps",
)  # fmt: skip
"""Kinds of disturbance; every run has each of them."""
ACTS = {
    "kill hub": 2, "kill site": 4, "kill many": 0.5, "cut": 3, "delay": 2, "full": 2, "clock": 1,
}  # fmt: skip
"""What is done to the parties, with the weight of each in the draw; each is done once at first."""


class Chaos:
    """The schedule, and what was done."""

    def __init__(self, fed, proxy, seed, say):
        self.fed, self.proxy, self.say = fed, proxy, say
        self.random = random.Random(seed)
        self.first = self.random.sample(list(ACTS), len(ACTS))
        self.counts = Counter()
        self.jobs = {}
        self.back = {}
        """When what was done to a party is undone: {(what, name): moment}."""

    def parties(self):
        return [HUB, *self.fed.sites]

    def look(self):
        """Undo what is due; start again whoever ended by itself."""
        now = time.monotonic()
        for (what, name), when in list(self.back.items()):
            if now >= when:
                del self.back[what, name]
                getattr(self, f"_un{what}")(name)
        for name in self.parties():
            if self.fed.processes[name].poll() is not None and ("kill", name) not in self.back:
                self.counts["ended by themselves"] += 1
                self.back["kill", name] = now + 1.0

    def act(self):
        drawn = self.random.choices(list(ACTS), list(ACTS.values()))[0]
        what = self.first.pop() if self.first else drawn
        name = self.random.choice(list(self.fed.sites))
        until = time.monotonic() + self.random.uniform(0.0, 3.0)
        match what:
            case "kill hub":
                self._kill(HUB, until)
            case "kill site":
                self._kill(name, until)
            case "kill many":
                for each in self.random.sample(self.parties(), 3):
                    self._kill(each, until)
            case "cut":
                for each in self.random.sample(list(self.fed.sites), self.random.randint(1, 4)):
                    self.proxy.cut(each)
                self.counts["cuts"] += 1
            case "delay":
                self.proxy.delay[name] = self.random.uniform(0.01, 0.3)
                self.back["delay", name] = until
                self.counts["delays"] += 1
            case "full":
                each = self.random.choice([HUB, name])
                self._limit(each, self.random.choice([0, 1 << 12, 1 << 16]))
                self.back["full", each] = until
                self.counts["full disks"] += 1
            case "clock":
                each = self.random.choice([HUB, name])
                self._jump(each)
                self.counts["clock jumps"] += 1

    def every_kind(self):
        """Whether each kind of disturbance was made once or more."""
        return all(self.counts[kind] for kind in KINDS)

    def released(self):
        """Rounds released until now, over all jobs."""
        rounds = (self.fed.state(HUB) / "jobs").glob("*/rounds.jsonl")
        rows = [json.loads(line) for path in rounds for line in whole_lines(path)]
        return sum(bool(row["survivors"]) for row in rows)

    def _kill(self, name, until):
        if ("kill", name) in self.back:
            return
        self.fed.kill(name, signal.SIGKILL)
        self.fed.processes[name].wait(10)
        self.counts["kills of the coordinator" if name == HUB else "kills of sites"] += 1
        self.back["kill", name] = until
        self.back.pop(("full", name), None)

    def _unkill(self, name):
        self.fed.start(name)

    def _undelay(self, name):
        self.proxy.delay[name] = USUAL_DELAY

    def _limit(self, name, most):
        pid = self.fed.processes[name].pid
        with contextlib.suppress(ProcessLookupError, OSError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    def _unfull(self, name):
        self._limit(name, resource.RLIM_INFINITY)

    def _jump(self, name):
        """Forward by up to ten seconds; the wall clock of the coordinator may also go back an hour."""
        path = clock_of(self.fed, name)
        before = abs(float(path.read_text() or 0))
        sign = -1 if name == HUB and self.random.random() < 0.3 else 1
        path.write_text(str(sign * (before + self.random.uniform(0.5, 10.0))))

    def submit(self):
        """One more job, unless one is under way."""
        try:
            rows = {row["job"]: row for row in self.fed.jobs()["jobs"]}
            if any(
                rows[job]["state"] in {"waiting", "running"} for job in self.jobs if job in rows
            ):
                return
            protection = PROTECTIONS[(len(self.jobs) + self.random.randrange(3)) % 3]
            settings = {"protection": protection, "rounds": self.random.randint(5, 25)}
            self.jobs[self.fed.submit(**settings)] = settings
        except Exception as error:  # noqa: BLE001 - the coordinator may be killed in this very call
            self.say(f"  submit: {type(error).__name__}")

    def calm(self):
        """Undo everything; wait for the jobs and for every site to hear of their ends."""
        for what, name in list(self.back):
            del self.back[what, name]
            getattr(self, f"_un{what}")(name)
        end = time.monotonic() + CALM_SECONDS
        while time.monotonic() < end:
            self.look()
            with contextlib.suppress(Exception):
                rows = {row["job"]: row for row in self.fed.jobs()["jobs"]}
                over = all(row["state"] not in {"waiting", "running"} for row in rows.values())
                self.jobs = {**{job: {} for job in rows}, **self.jobs}
                if over and all(self._heard(name, job) for name in self.fed.sites for job in rows):
                    return rows
            time.sleep(0.3)
        return {row["job"]: row for row in self.fed.jobs()["jobs"]}

    def _heard(self, name, job):
        found = [row for row in self.fed.status(name)["jobs"] if row["job"] == job]
        return not found or found[0]["outcome"] is not None


def clock_of(fed, name):
    return fed.folder / f"{name}.clock"


def whole_lines(path):
    """The lines of a file that is being written: the last counts once it has its end."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def trace_of(fed, name):
    return fed.folder / f"{name}.trace"


# ---------------------------------------------------------------------------------- the verdict


class Verdict:
    """What is checked when all is calm and every process has ended."""

    def __init__(self, fed, rows):
        self.fed, self.rows = fed, rows
        self.faults = []
        self.counts = Counter()

    def check(self):
        for job, row in self.rows.items():
            self.counts[f"jobs {row['state']}"] += 1
            if row["state"] not in {"finished", "abandoned", "failed", "stopped"}:
                self.fault(f"{job}: it did not end: {row}")
            elif row["state"] != "finished" and not row["text"]:
                self.fault(f"{job}: {row['state']} without a reason")
        self.journals()
        self.traces()
        for job in self.rows:
            self.sums(job)
        return self.faults

    def fault(self, text):
        self.faults.append(text)

    def journals(self):
        from fedcore.store.journal import Journal

        for name in (HUB, *self.fed.sites):
            party = f"coordinator of {FEDERATION}" if name == HUB else f"site {name}"
            try:
                with Journal.open(self.fed.state(name) / "journal.sqlite", party=party) as journal:
                    self.counts["records"] += journal.verify()
                    self.counts["journals"] += 1
            except Exception as error:  # noqa: BLE001 - told as a fault
                self.fault(f"{name}: its journal: {error}")

    def traces(self):
        for name in self.fed.sites:
            path, seen = trace_of(self.fed, name), {}
            for line in path.read_text().splitlines() if path.exists() else []:
                with contextlib.suppress(json.JSONDecodeError):
                    job, header, kind, digest = json.loads(line)
                    self.counts[f"{kind}"] += 1
                    if seen.setdefault((job, header, kind), digest) != digest:
                        self.fault(f"{name}: two different {kind} in one round of {job}")

    def sums(self, job):
        """Every release of a job again, as plain sums, and the models of the sites against it."""
        from fedcore.config import build_job, plan_of
        from fedcore.learning.data.split import FoldSplit
        from fedcore.learning.model import single_thread
        from fedcore.learning.site import SiteTrainer
        from fedcore.learning.state import JobState, without_metrics
        from fedcore.learning.task import load_task
        from fedcore.secagg.encode.pack import Opened
        from fedcore.secagg.label import Terms, collusion
        from fedcore.secagg.protocol.job_messages import JobOffer
        from fedcore.secagg.protocol.schedule import PlannedRound
        from fedcore.secagg.protocol.wire_form import decode
        from fedcore.store.journal import Journal

        folder = self.fed.state(HUB)
        with Journal.open(
            folder / "journal.sqlite", party=f"coordinator of {FEDERATION}"
        ) as journal:
            offer = decode(journal.get(job, "offer"), JobOffer)
        path = folder / "jobs" / job / "rounds.jsonl"
        text = path.read_text().splitlines() if path.exists() else []
        rounds = [json.loads(line) for line in text]
        numbers = [row["number"] for row in rounds]
        if numbers != sorted(set(numbers)):
            self.fault(f"{job}: rounds.jsonl has rounds twice or out of order: {numbers}")
        released = [row for row in rounds if row["survivors"]]
        steps = [(row["purpose"], row["round"]) for row in released]
        if len(steps) != len(set(steps)):
            self.fault(f"{job}: a step was released twice: {steps}")
        self.counts["rounds released"] += len(released)
        self.counts["rounds abandoned"] += len(rounds) - len(released)
        if not released:
            return
        task, settings = load_task(self.fed.task), build_job(json.loads(offer.settings))
        with single_thread():
            sites = {
                name: SiteTrainer.load(task, settings, name, source, CAP, FoldSplit())
                for name, source in self.fed.sites.items()
            }
            first = next(iter(sites.values()))
            plan = plan_of(settings, first.shape, tuple(sites), CAP)
            state, states = JobState.initial(plan, first.initial), set()
            for row in released:
                step = PlannedRound(row["purpose"], row["round"])
                found = [sites[name].contribute(plan, step, state) for name in row["survivors"]]
                fields = sum(each.astype("uint64") for each, _ in found)
                wides = {
                    name: [sum(map(int, v)) for v in zip(*(w[name] for _, w in found), strict=True)]
                    for name in found[0][1]
                }
                if state.isolates(row["roster"], 2 + collusion(Terms.of_plan(plan)).active):
                    wides = without_metrics(plan, wides)
                state = state.after(
                    plan, step, Opened(fields, wides), row["survivors"], first.columns
                )
                states.add(hashlib.sha256(state.canonical()).digest())
                self.counts["sums made again"] += 1
        for name in sites:
            place = self.fed.state(name) / "states" / job / "current.safetensors"
            if not place.exists():
                continue
            held = JobState.from_bytes(place.read_bytes())
            if held.canonical() == state.canonical():
                self.counts["models equal"] += 1
            elif held.done is None or hashlib.sha256(held.canonical()).digest() in states:
                self.counts["sites behind"] += 1
                if self.rows[job]["state"] == "finished":
                    self.fault(f"{job}: {name} stands at {held.done}, not at the last release")
            else:
                self.fault(f"{job}: {name} holds another state than the survivors' plain sums")


FEDERATION = "rehearsal"


def run(folder, seconds, rounds, seed, say):
    """The chaos, the calm and the verdict; (summary, faults)."""
    started = time.monotonic()
    with deployment(folder, small_task(folder), start=(), limits=LIMITS) as fed:
        fed.stop(HUB)
        proxy = Proxy(fed.port)
        for name in (HUB, *fed.sites):
            clock_of(fed, name).write_text("0")
            patch = CLOCK.format(path=str(clock_of(fed, name)))
            trace = str(trace_of(fed, name))
            fed.patches[name] = patch + (
                HUB_PATCH if name == HUB else SITE_PATCH.replace("{trace!r}", repr(trace))
            )
        for name in fed.sites:
            config = fed.config(name)
            text = config.read_text().replace(f':{fed.port}"', f':{proxy.open(name)}"')
            config.write_text("patience_seconds = 90\n" + text)
        fed.start_hub()
        for name in fed.sites:
            fed.start(name)
        fed.connected()
        chaos = Chaos(fed, proxy, seed, say)
        end = time.monotonic() + seconds
        soon = time.monotonic() + 3.0
        while time.monotonic() < end or not (chaos.every_kind() and chaos.released() >= rounds):
            if time.monotonic() > end + LONGEST_SECONDS:
                raise SystemExit(f"chaos: released {chaos.released()} rounds, expected {rounds}")
            chaos.look()
            chaos.submit()
            if time.monotonic() >= soon:
                chaos.act()
                soon = time.monotonic() + chaos.random.expovariate(1 / 1.5)
            time.sleep(0.1)
        say("calm")
        rows = chaos.calm()
        for name in (*fed.sites, HUB):
            with contextlib.suppress(Exception):
                fed.stop(name)
        proxy.close()
    verdict = Verdict(fed, rows)
    verdict.check()
    if not chaos.counts.total() or not verdict.counts["rounds released"]:
        verdict.fault("nothing was done, or no round was released: this run shows nothing")
    summary = {
        "seed": seed, "seconds": round(time.monotonic() - started, 1), "jobs": len(rows),
        **dict(sorted(chaos.counts.items())), **dict(sorted(verdict.counts.items())),
        "faults": len(verdict.faults),
    }  # fmt: skip
    return summary, verdict.faults


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=1, help="go on until so many are released")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for logs and states, kept")
    asked = parser.parse_args()
    seconds = asked.minutes * 60 + asked.seconds or 60.0

    def say(text):
        sys.stderr.write(text + "\n")

    with contextlib.ExitStack() as stack:
        folder = asked.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        summary, faults = run(folder, seconds, asked.rounds, asked.seed, say)
    for fault in faults:
        sys.stdout.write(f"FAULT {fault}\n")
    line = ", ".join(f"{name} {value}" for name, value in summary.items())
    sys.stdout.write(f"chaos: {line}\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
