"""A federation of real processes in a temporary folder, for tests of what is deployed.

    with deployment(tmp_path, small_task(tmp_path)) as fed:
        job = fed.submit(rounds=3)
        events = fed.wait(job)                      # to its end; the last event has its state
        assert fed.models(job) == {"a": ..., ...}   # site -> model_sha256, from status.json

It writes what operators would: an authority, one kit per party, identity keys, the roster,
federation.toml and site.toml. `fed.kill("va", signal.SIGKILL)`, `fed.start("va")`, `fed.stop("hub")`
and `fed.log("va")` go by name; the coordinator is "hub". Nothing outlives the `with`: every process
is the leader of a group of its own, which is ended in `finally`.

How long a thing takes is never the question here: each wait ends with what is waited for, and its limit
(PATIENCE) is only there so that a test that hangs fails. The same holds for the coordinator's [limits]:
a test that wants a round to go on without a site makes it say so (kill it, stop it, let its task fail),
for a small gather_seconds leaves out whoever is slow on a busy machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import textwrap
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc
from fedcore_clients.channel import channel_credentials
from fedcore_server.operators import save_result
from support.policies import WIDE
from support.preloaded import preloaded
from support.reports import no_reports

from fedcore import simulate
from fedcore.experiment.prepare import job_for, prepare
from fedcore.identity.authority import LOOPBACK, Authority
from fedcore.identity.identities import create_identity, write_roster
from fedcore.identity.kit import Kit
from fedcore.local_deployment import to_toml
from fedcore.wire import calls, frames

HUB, STANDBY = "hub", "standby"
FEDERATION = "rehearsal"
LISTENS = "listening on"
"""Of a coordinator's log, once its port is bound."""

CAP = 64
"""protect.max_examples of the small task."""

PATIENCE = 240.0
"""Seconds for anything that a loaded machine does a whole job's work for."""

SMALL = """
import numpy as np
import torch
import fedcore


def data(source):
    random = np.random.default_rng(source)
    x = random.normal(size=(40, 3)).astype(np.float32)
    return x, (x[:, 0] + 0.5 * x[:, 1] > 0).astype(np.int64)


def model():
    return torch.nn.Linear(3, 1)


def loss(outputs, targets):
    return torch.nn.functional.binary_cross_entropy_with_logits(outputs.squeeze(1), targets.float())


task = fedcore.Task(
    name="small", data=data, model=model, loss=loss, metrics=("accuracy",),
    sites={"a": 1, "b": 2, "c": 3, "d": 4},
)
"""


def small_task(folder, text=SMALL):
    """A task file of four sites with 40 made-up rows each; returns its path as text."""
    path = Path(folder) / "small.py"
    path.write_text(text)
    return str(path)


def free_port():
    """A port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Deployment:
    """One federation on disk and its processes. folder: everything is below it."""

    folder: Path
    task: str
    sites: dict
    port: int
    pins: dict = field(default_factory=dict)
    authority: Authority = None
    processes: dict = field(default_factory=dict)
    patches: dict = field(default_factory=dict)
    env: dict = field(default_factory=dict)
    policy: dict = field(default_factory=dict)
    prepared: dict = field(default_factory=dict)
    database: str = ""
    ports: dict = field(default_factory=dict)
    """Of the coordinators, where there are two."""

    # ------------------------------------------------------------------------------- on disk

    def home(self, name):
        """The folder of a party."""
        shell = name in {HUB, STANDBY}
        return self.folder / name if shell else self.folder / "sites" / name

    def config(self, name):
        shell = name in {HUB, STANDBY}
        return self.home(name) / ("federation.toml" if shell else "site.toml")

    def state(self, name):
        """What a party keeps."""
        return self.home(name) / "state"

    def log(self, name):
        """Everything a party wrote to stdout and stderr, through all of its starts."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def status(self, name):
        """A site's status.json."""
        return json.loads((self.state(name) / "status.json").read_text())

    def models(self, job, sites=None):
        """site -> hash of the model it was released, for these sites (all)."""
        rows = {name: self.status(name)["jobs"] for name in sites or self.sites}
        return {
            name: next((row["model_sha256"] for row in found if row["job"] == job), None)
            for name, found in rows.items()
        }

    def write(self, limits):
        """Everything on disk, as an operator would have it. limits: keys of [limits]."""
        now = datetime.now(UTC)
        self.authority = Authority.create(FEDERATION, now)
        self.home(HUB).mkdir(parents=True)
        self.authority.issue("coordinator", HUB, now, hosts=LOOPBACK).save(self.home(HUB) / "kit")
        for role in ("operator", "observer"):
            self.kit(role, "op" if role == "operator" else "obs")
        for name in self.sites:
            self.home(name).mkdir(parents=True)
            self.authority.issue("site", name, now).save(self.home(name) / "kit")
            self.pins[name] = create_identity(self.home(name) / "identity.pem").public
        write_roster(self.folder / "roster.toml", self.pins)
        lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in limits.items())
        (self.folder / "revoked.txt").write_text("# nobody\n")
        self.config(HUB).write_text(
            f'name = "{FEDERATION}"\nroster = "../roster.toml"\nkit = "kit"\nfolder = "state"\n'
            f'listen = ["127.0.0.1"]\nport = {self.port}\nrevoked = "../revoked.txt"\n'
            + (f'database = "{self.database}"\n' if self.database else "")
            + f"[limits]\n{lines}\n"
        )
        self.config(HUB).chmod(0o600)  # there may be a password in it
        found = self._prepare({})
        for name, source in self.sites.items():
            self.config(name).write_text(
                f'site = "{name}"\ncoordinator = "127.0.0.1:{self.port}"\nkit = "kit"\n'
                f'identity = "identity.pem"\nroster = "../../roster.toml"\nfolder = "state"\n'
                'sandbox = "none"\n'
                + to_toml({"split": {"method": "folds"}, "policy": WIDE | self.policy})
                + f'[tasks.{found.task.name}]\ntask = "{self.task}"\n'
                f'sha256 = "{found.plan.task_digest}"\nsource = {json.dumps(source)}\n'
            )

    def kit(self, role, name):
        """The kit of a further certificate: its folder is loaded if it is there."""
        folder = self.folder / "kits" / f"{role}-{name}"
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            self.authority.issue(role, name, datetime.now(UTC)).save(folder)
        return Kit.load(folder)

    def site_kit(self, name):
        return Kit.load(self.home(name) / "kit")

    # ----------------------------------------------------------------------------- processes

    def start(self, name, patch=""):
        """Start a party. patch: Python that its process runs before its command."""
        hub = name in {HUB, STANDBY}
        shell = "fedcore_server" if hub else "fedcore_clients"
        verb = "serve" if hub else "run"
        patch = textwrap.dedent(patch or self.patches.get(name, ""))
        how = (
            ["-c", f"{patch}\nfrom {shell}.cli import main\nmain()\n"]
            if patch
            else ["-m", f"{shell}.cli"]
        )
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = preloaded().start(
                ["-P", *how, verb, "--config", str(self.config(name))],
                env={**os.environ, **self.env},
                output=log,
            )
        return self.processes[name]

    def start_hub(self, seconds=PATIENCE):
        """Start the coordinator, and wait until it listens."""
        before = self.log(HUB).count(LISTENS)
        process = self.start(HUB)
        self.until(HUB, LISTENS, before, seconds)
        return process

    def until(self, name, words, before=0, seconds=PATIENCE):
        """Wait until a party's log has these words more often than `before`."""
        end = time.monotonic() + seconds
        while self.log(name).count(words) <= before:
            assert self.processes[name].poll() is None, self.log(name)[-3000:]
            assert time.monotonic() < end, self.log(name)[-3000:]
            time.sleep(0.05)

    def add_standby(self):
        """Write the folder of a second coordinator, with a port of its own, which all sites know."""
        port = free_port()
        shutil.copytree(self.home(HUB) / "kit", self.home(STANDBY) / "kit")
        text = self.config(HUB).read_text().replace(f"port = {self.port}", f"port = {port}")
        self.config(STANDBY).write_text(text)
        self.config(STANDBY).chmod(0o600)
        for name in self.sites:
            text = self.config(name).read_text()
            self.config(name).write_text(f'standbys = ["127.0.0.1:{port}"]\n{text}')
        self.ports = {HUB: self.port, STANDBY: port}

    def kill(self, name, how=signal.SIGKILL):
        """Send a signal to a party's own process, not to its workers."""
        self.processes[name].send_signal(how)

    def stop(self, name, seconds=PATIENCE):
        """SIGTERM; its exit status."""
        self.kill(name, signal.SIGTERM)
        return self.processes[name].wait(seconds)

    def rss(self, name=HUB):
        """Resident bytes of a party's own process now."""
        text = Path(f"/proc/{self.processes[name].pid}/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0]) * 1024

    def end(self):
        """No process of any party is left."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.send_signal(signal.SIGTERM)
        until = time.monotonic() + 30.0
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, until - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its workers, if they are still there
            process.wait(PATIENCE)

    # ------------------------------------------------------------------------- calls as people

    @contextlib.contextmanager
    def channel(self, kit):
        """A channel of this kit's owner to the coordinator; kit=None has no certificate."""
        if kit is None:
            pem = self.authority.certificate_pem
            credentials = grpc.ssl_channel_credentials(root_certificates=pem)
        else:
            credentials = channel_credentials(kit)
        options = (
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
            *calls.LENGTHS,
        )
        with grpc.secure_channel(f"127.0.0.1:{self.port}", credentials, options) as channel:
            yield channel

    def ask(self, call, request, kit=None, seconds=60.0):
        """The answer to one call of an operator (or of `kit`'s owner). Raises grpc.RpcError."""
        with self.channel(kit or self.kit("operator", "op")) as channel:
            data = channel.unary_unary(call.path)(call.takes.pack(request), timeout=seconds)
        return call.gives.unpack(data, sender="coordinator")

    def result(self, job, out, kit=None):
        """The folder with the files that `result` fetches for an operator (or `kit`'s owner)."""
        call = calls.RESULT
        with self.channel(kit or self.kit("operator", "op")) as channel:
            asked = call.takes.pack(frames.JobRequest(job))
            stream = channel.unary_stream(call.path)(asked, timeout=60.0)
            parts = [call.gives.unpack(data, sender="coordinator") for data in stream]
        save_result(iter(parts), out)
        return out

    def _prepare(self, settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in self.prepared:
            layer = {"task": self.task, "sites": self.sites, "seed": 0, "resamples": 0, "rounds": 2}
            cap = {} if self.task == "heart" else {"max_examples": CAP}
            self.prepared[key] = prepare(*job_for(None, {**layer, **cap, **settings}))
        return self.prepared[key]

    def prepared_settings(self, **settings):
        """The complete tables of a job, as an operator's command sends them."""
        found = self._prepare(settings)
        whole = {k: v for k, v in found.job.to_json().items() if k not in {"task", "base"}}
        whole["protect"]["max_examples"] = found.plan.max_examples
        return {
            key: {k: v for k, v in part.items() if v is not None}
            if isinstance(part, dict)
            else part
            for key, part in whole.items()
        }

    def submit(self, **settings):
        """Submit the task with settings of a job (`rounds=3`, `protection="masked"`); the job's id."""
        found = self._prepare(settings)
        about = json.dumps({"settings": self.prepared_settings(**settings)}).encode()
        request = frames.SubmitRequest(
            b"# a test's job\n", found.task.name, found.plan.task_digest, about
        )
        return self.ask(calls.SUBMIT, request).job

    def simulated(self, **settings):
        """The model hash that `simulate` reaches with the same settings."""
        found = self._prepare(settings)
        layer = {"seed": 0, "resamples": 0, "rounds": 2, "max_examples": found.plan.max_examples}
        out = self.folder / f"simulated-{len(list(self.folder.glob('simulated-*')))}"
        with no_reports():
            run = simulate(self.task, self.sites, out=out, **{**layer, **settings})
        return run.result["model_sha256"]

    def jobs(self, kit=None):
        """The answer to Jobs: {"federation", "jobs", "sites"}."""
        return frames.json_value(self.ask(calls.JOBS, frames.JobsRequest(), kit).json, sender="hub")

    def stop_job(self, job):
        return self.ask(calls.STOP, frames.JobRequest(job)).text

    def watch(self, job, seconds=PATIENCE):
        """The events of a job until its last word. Raises grpc.RpcError after `seconds`."""
        with self.channel(self.kit("operator", "op")) as channel:
            asked = calls.WATCH.takes.pack(frames.WatchRequest(job))
            for data in channel.unary_stream(calls.WATCH.path)(asked, timeout=seconds):
                yield frames.json_value(
                    calls.WATCH.gives.unpack(data, sender="hub").json, sender="hub"
                )

    def wait(self, job, until=None, seconds=PATIENCE):
        """Events up to the one that `until` accepts, or to the job's end."""
        events = []
        try:
            for event in self.watch(job, seconds):
                events.append(event)
                if until is not None and until(event):
                    return events
        except grpc.RpcError as error:
            logs = "".join(f"\n--- {name}\n{self.log(name)[-1500:]}" for name in [HUB, *self.sites])
            raise AssertionError(f"{error.code()} after {events[-1:]}{logs}") from error
        return events

    def released(self, job, seconds=PATIENCE, sites=None):
        """site -> model hash, the same at all, once each of `sites` (all) says that the job is over there.

        Before that a status may be of the release before: it is written once a second.
        """
        found = {name: row["model_sha256"] for name, row in self.over(job, seconds, sites).items()}
        assert len(set(found.values())) == 1 and None not in found.values(), found
        return found

    def over(self, job, seconds=PATIENCE, sites=None):
        """site -> its row of the job, once each of `sites` (all) says that the job is over there."""
        wanted, end = sites or list(self.sites), time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError, ValueError):
                rows = {
                    name: [row for row in self.status(name)["jobs"] if row["job"] == job]
                    for name in wanted
                }
                if all(row and row[0]["stage"] == "over" for row in rows.values()):
                    return {name: row[0] for name, row in rows.items()}
            assert time.monotonic() < end, {name: self.status(name) for name in wanted}
            time.sleep(0.1)

    def connected(self, names=None, seconds=PATIENCE):
        """Wait until these sites (all) have a session."""
        wanted, end = set(names or self.sites), time.monotonic() + seconds
        while True:
            sites = self.jobs()["sites"]
            if wanted <= {name for name, about in sites.items() if about["connected"]}:
                return
            assert time.monotonic() < end, (sites, {n: self.log(n)[-800:] for n in wanted})
            time.sleep(0.1)


@contextlib.contextmanager
def deployment(
    folder,
    task,
    sites=None,
    *,
    start=None,
    limits=None,
    patches=None,
    env=None,
    policy=None,
    database="",
):
    """A federation for `task`, begun: its coordinator listens and its sites connect.

    task: "heart" or a file. sites: {name: source}; the task's own without it. start: the sites to
    start, all without it. limits: keys of federation.toml's [limits]. patches: name -> Python that
    this party's process runs first. policy: keys of [policy] at every site, beside WIDE. database: a URL
    for the coordinator's journal.
    """
    if sites is None:
        layer = {} if task == "heart" else {"max_examples": CAP}
        sites = dict(prepare(*job_for(None, {"task": task, "resamples": 0, **layer})).task.sites)
    fed = Deployment(
        Path(folder) / "federation",
        task,
        dict(sites),
        free_port(),
        patches=patches or {},
        env=env or {},
        policy=policy or {},
        database=database,
    )
    fed.folder.mkdir(parents=True)
    fed.write({"gather_seconds": PATIENCE, "stage_seconds": PATIENCE, **(limits or {})})
    try:
        fed.start_hub()
        for name in sites if start is None else start:
            fed.start(name)
        yield fed
    finally:
        fed.end()
