"""The commands of a federation as people type them: an operator's, a site's, and what can be wrong.

Every wrong file and every wrong moment is one line with `hint:`, the right exit code, no traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta

import grpc
import numpy as np
import pytest
from deployment import HUB, PATIENCE, Deployment, free_port, small_task
from fedcore_clients import cli as site_cli
from fedcore_server import cli as hub_cli
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from support.preloaded import preloaded
from support.reports import no_reports

from fedcore import simulate
from fedcore.identity.authority import LOOPBACK, Authority
from fedcore.identity.identities import create_identity, write_roster
from fedcore.learning.saved import load_model
from fedcore.learning.state import model_digest

ROUNDS = 3


def run(shell, *words, seconds=PATIENCE, folder=None, **how):
    """A command as a process: (exit code, stdout, stderr)."""
    limited = "preexec_fn" in how  # of a forked process its parent's limits hold
    python = sys.executable if limited else preloaded().python
    line = [python, "-P", "-m", f"fedcore_{shell}.cli", *map(str, words)]
    found = subprocess.run(line, capture_output=True, text=True, timeout=seconds, cwd=folder, **how)
    assert "Traceback" not in found.stderr, found.stderr
    return found.returncode, found.stdout, found.stderr


@pytest.fixture
def call(capfd):
    """A command in this process: (exit code, stdout, stderr)."""

    def run_here(module, *words):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            module.main([str(word) for word in words])
        out, err = capfd.readouterr()
        assert "Traceback" not in err, err
        return ended.value.code, out, err

    return run_here


def refused(found, code, *parts):
    """One line of error, one of hint, in these words."""
    ended, _, err = found
    lines = [line for line in err.splitlines() if line.startswith(("error:", "hint:"))]
    assert ended == code, (ended, err)
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], err
    for part in parts:
        assert part in "\n".join(lines), (part, lines)


# ---------------------------------------------------------------------------- one whole job


@pytest.fixture(scope="module")
def fed(tmp_path_factory):
    """A coordinator with counters, and three of four sites, one of them with health probes."""
    folder = tmp_path_factory.mktemp("commands")
    found = Deployment(
        folder / "federation", small_task(folder), {"a": 1, "b": 2, "c": 3, "d": 4}, free_port()
    )
    found.folder.mkdir()
    found.write({"gather_seconds": 2 * PATIENCE, "stage_seconds": PATIENCE})
    found.metrics, found.health = free_port(), free_port()
    path = found.config(HUB)
    path.write_text(f"metrics_port = {found.metrics}\n" + path.read_text())
    found.patches["a"] = f"import sys; sys.argv += ['--health', '{found.health}']"
    kit = found.kit("operator", "op").key_path.parent
    found.kit("observer", "obs")
    (folder / "operator.toml").write_text(
        f'coordinator = "127.0.0.1:{found.port}"\nkit = "{kit.relative_to(folder)}"\n'
    )
    (folder / "job.toml").write_text(
        f'task = "small.py"\n[round]\nrounds = {ROUNDS}\n[protect]\nmax_examples = 64\n'
    )
    try:
        found.start_hub()
        for name in "abc":
            found.start(name)
        found.connected("abc")
        yield found
    finally:
        found.end()


@pytest.fixture(scope="module")
def ran(fed):
    """A job, submitted and watched by commands; d is waited for until it is evicted."""
    folder = fed.folder.parent
    code, out, err = run("server", "submit", "job.toml", "--lr", "0.1", folder=folder)
    assert code == 0, err
    job = out.strip()
    assert err.splitlines() == [f"watch it: fed-coordinator watch {job}"]
    line = [preloaded().python, "-P", "-m", "fedcore_server.cli", "watch", job]
    watch = subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, text=True)
    bound = threading.Timer(2 * PATIENCE, watch.kill)
    bound.start()
    try:
        lines = []
        for line in watch.stdout:  # until it says that only d is waited for
            lines.append(line.rstrip("\n"))
            if line.startswith("waiting for 1 of 4"):
                break
        end, waits = time.monotonic() + PATIENCE, ""
        while time.monotonic() < end and "waiting for 1 of 4" not in waits:
            waits = run("clients", "status", "--config", fed.config("a"))[1]
        assert run("server", "evict", "d", folder=folder)[0] == 0  # nobody waits for it any more
        lines += watch.stdout.read().splitlines()
    finally:
        bound.cancel()
        watch.kill()
        watch.wait()
        watch.stdout.close()
    assert run("server", "evict", "d", "--undo", folder=folder)[0] == 0
    assert watch.returncode == 0, lines
    fed.released(job, sites=list("abc"))
    with urllib.request.urlopen(f"http://127.0.0.1:{fed.metrics}/metrics", timeout=60) as answer:
        fed.counted = answer.read().decode()
    return job, lines, waits


def model_of(fed, job):
    """The hash of the model that site a was released."""
    return next(row["model_sha256"] for row in fed.status("a")["jobs"] if row["job"] == job)


def test_a_site_too_says_whom_its_job_waits_for(ran):
    """Its own job, in its own status."""
    assert "waiting for 1 of 4 sites: d; at " in ran[2] and "goes on with 3" in ran[2], ran[2]


def test_watch_says_rounds_sites_and_whom_it_waits_for(fed, ran):
    job, lines, _ = ran
    assert lines[-1] == f"{job} (small, layered): finished"
    for number in range(1, ROUNDS + 1):
        assert sum(f"round {number}/{ROUNDS}  3 of 3 sites" in line for line in lines) == 1, lines
    assert any(line.startswith("metrics after round 3") for line in lines)
    waits = [
        line for line in lines if line.startswith("waiting for 1 of 4 sites: d (not seen yet)")
    ]
    assert waits and "goes on with 3" in waits[0], lines
    ended = [line for line in lines if line.startswith("round ")]
    assert all("  up " in line and "  down " in line for line in ended)


def test_watch_as_json_is_an_object_a_line(fed, ran):
    code, out, _ = run("server", "watch", ran[0], "--json", folder=fed.folder.parent)
    events = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert events[-1]["state"] == "finished" and events[-1]["rounds"] == ROUNDS
    assert set(events[-1]["sites"]) == set("abcd")


def test_jobs_lists_jobs_and_sites(fed, ran):
    code, out, _ = run("server", "jobs", folder=fed.folder.parent)
    assert code == 0 and ran[0] in out and f"{ROUNDS}/{ROUNDS}" in out and "away" in out
    code, out, _ = run("server", "jobs", "--json", folder=fed.folder.parent)
    found = json.loads(out)
    assert {name for name, site in found["sites"].items() if site["connected"]} == set("abc")


def test_an_observer_reads_and_an_operator_s_file_can_be_named(fed, ran):
    folder = fed.folder.parent
    kit = fed.kit("observer", "obs").key_path.parent
    where = ["--coordinator", f"127.0.0.1:{fed.port}", "--kit", kit]
    assert run("server", "jobs", *where)[0] == 0
    refused(run("server", "stop", ran[0], *where), 3, "found role 'observer', expected operator")
    env = {**os.environ, "FEDCORE_OPERATOR": str(folder / "operator.toml")}
    assert run("server", "jobs", env=env, folder="/")[0] == 0
    refused(run("server", "jobs", folder="/"), 2, "--coordinator HOST:PORT", "FEDCORE_OPERATOR")


def test_result_brings_files_and_never_a_model(fed, ran, tmp_path):
    folder, job = fed.folder.parent, ran[0]
    code, _, _ = run("server", "result", job, "--out", tmp_path / "out", folder=folder)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert code == 0 and names == ["job.toml", "report.md", "result.json", "rounds.jsonl"]
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["settings"]["train"]["lr"] == 0.1 and found["state"] == "finished"
    assert (tmp_path / "out" / "job.toml").read_bytes() == (folder / "job.toml").read_bytes()
    rows = [json.loads(x) for x in (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()]
    assert sum(row["purpose"] == "update" for row in rows) == ROUNDS
    assert "round 3/3  3 of 3 sites" in (tmp_path / "out" / "report.md").read_text()
    again = run("server", "result", job, "--out", tmp_path / "out", folder=folder)
    assert again[0] == 2 and "expected a new folder" in again[2]


def test_the_exported_model_is_the_released_one_and_predicts(fed, ran, tmp_path):
    """Its tensors have the certified hash; it is a file as `simulate` writes it."""
    config, out = fed.config("a"), tmp_path / "model.safetensors"
    code, text, err = run("clients", "model", ran[0], "--config", config, "--out", out)
    assert code == 0, err
    digest = model_of(fed, ran[0])
    assert text == f"wrote {out}: after round {ROUNDS}, sha256 {digest}\n"
    with no_reports():
        simulated = simulate(
            fed.task, fed.sites, rounds=1, max_examples=64, resamples=0, protection="plain",
            arms=("federated",), out=tmp_path / "run",
        )  # fmt: skip
    theirs, ours = load_model(simulated.directory, None), load_model(tmp_path, None)
    assert ours.about == theirs.about
    assert ours.module.state_dict().keys() == theirs.module.state_dict().keys()
    flat = np.concatenate([value.numpy().ravel() for value in ours.module.state_dict().values()])
    assert model_digest(flat) == digest
    rows = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    right = (ours.predict(rows) > 0.5) == (rows[:, 0] + 0.5 * rows[:, 1] > 0)
    assert right.mean() > 0.7, "three rounds already learn this"


def test_a_model_is_asked_for_too_early_or_of_no_job(fed, ran, call, tmp_path):
    config, out = fed.config("a"), tmp_path / "m.safetensors"
    refused(call(site_cli, "model", "nope", "--config", config, "--out", out), 2, ran[0])
    text = config.read_text().replace("[tasks.small]", "[tasks.other]")
    other = config.with_name("other.toml")
    other.write_text(text)
    refused(call(site_cli, "model", ran[0], "--config", other, "--out", out), 3, "not in site.toml")
    assert not out.exists()
    refused(call(site_cli, "model", ran[0], "--config", fed.config("d"), "--out", out), 2, "no job")


def test_status_of_a_site_that_runs_and_of_one_that_never_did(fed, ran, call):
    code, out, _ = call(site_cli, "status", "--config", fed.config("a"))
    assert code == 0
    assert out.startswith(f"site a: connected to 127.0.0.1:{fed.port} for ")
    assert f"job {ran[0]}: over (finished)" in out
    assert f"last model: after round {ROUNDS}, sha256 {model_of(fed, ran[0])}" in out
    never = call(site_cli, "status", "--config", fed.config("d"))
    refused(never, 2, "this site has not run yet", "fed-site run")


def test_check_says_ok_for_everything(fed, call):
    code, out, _ = call(site_cli, "check", "--config", fed.config("b"), "--json")
    found = json.loads(out)
    assert code == 0 and found["ok"]
    assert [each["name"] for each in found["checks"]] == [
        "config", "keys", "policy", "folder", "sandbox", "task small", "data small", "proxy", "line",
        "dns", "tcp", "tls", "admitted", "clock", "version",
    ]  # fmt: skip
    by_name = {each["name"]: each["found"] for each in found["checks"]}
    assert "40 rows (32 to train on, 8 to test)" in by_name["data small"]
    assert "its process runs" in by_name["folder"] and "TLSv1.3" in by_name["tls"]
    assert fed.processes["b"].poll() is None


def test_check_prints_the_right_hash_for_a_wrong_one(fed, call):
    config = fed.config("b")
    lines = config.read_text().splitlines()
    right = next(x.split('"')[1] for x in lines if x.startswith("sha256"))
    other = config.with_name("wrong.toml")
    other.write_text(config.read_text().replace(right, "0" * 64))
    code, out, _ = call(site_cli, "check", "--config", other)
    assert code == 3
    assert "FAIL  task small" in out and f'write sha256 = "{right}"' in out
    assert "OK    data small" in out, "a wrong hash does not hide whether the data loads"


def test_a_task_that_fails_shows_its_traceback_at_the_site_only(fed, call):
    config = fed.config("b")
    broken = config.with_name("broken.py")
    broken.write_text('raise ValueError("the file is locked")\n')
    other = config.with_name("failing.toml")
    other.write_text(config.read_text().replace(fed.task, "broken.py"))
    with pytest.raises(SystemExit) as ended:
        site_cli.main(["check", "--config", str(other), "--json"])
    assert ended.value.code == 1


def test_health_and_reflection_are_behind_the_gate(fed):
    def ask(kit):
        with fed.channel(kit) as channel:
            check = channel.unary_unary("/grpc.health.v1.Health/Check")
            data = check(health_pb2.HealthCheckRequest().SerializeToString(), timeout=60)
        return health_pb2.HealthCheckResponse.FromString(data).status

    assert ask(fed.site_kit("a")) == health_pb2.HealthCheckResponse.SERVING
    stranger = Authority.create("rehearsal", datetime.now(UTC)).issue(
        "operator", "op", datetime.now(UTC)
    )
    with pytest.raises(grpc.RpcError):
        ask(stranger.save(fed.folder / "kits" / f"stranger-{time.monotonic_ns()}"))
    with pytest.raises(grpc.RpcError):
        ask(None)
    listing = reflection_pb2.ServerReflectionRequest(list_services="")
    method = reflection_pb2.ServerReflectionRequest(file_containing_symbol="fedcore.v1.Operator")
    with fed.channel(fed.kit("observer", "obs")) as channel:
        begin = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        )
        asked = iter([listing.SerializeToString(), method.SerializeToString()])
        names, file = (
            reflection_pb2.ServerReflectionResponse.FromString(data)
            for data in begin(asked, timeout=60)
        )
    assert {"fedcore.v1.Coordinator", "fedcore.v1.Operator"} <= {
        service.name for service in names.list_services_response.service
    }
    assert b"SubmitRequest" in file.file_descriptor_response.file_descriptor_proto[0]


def test_counters_count_and_say_no_value(fed, ran):
    text = fed.counted
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines["fedcore_sites"]) == 4 and float(lines["fedcore_sites_connected"]) == 3
    assert float(lines['fedcore_jobs{state="finished"}']) >= 1
    assert float(lines['fedcore_rounds_total{outcome="released"}']) >= ROUNDS
    assert float(lines["fedcore_received_bytes_total"]) > 0
    assert not any(word in text for word in ("accuracy", "sha256", "small"))
    with socket.socket() as probe:
        probe.settimeout(2)
        assert probe.connect_ex((_own_address(), fed.metrics)) != 0, "on loopback only"


def _own_address():
    """An address of this machine that is not loopback, if it has one; else one that nothing has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))
        return probe.getsockname()[0]
    return "192.0.2.1"


def test_a_site_answers_probes(fed):
    def ask(path):
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{fed.health}{path}", timeout=60
            ) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    assert ask("/healthz") == (200, b"ok\n")
    assert ask("/readyz") == (200, b"ready\n")
    assert ask("/secrets")[0] == 404


def test_logs_are_json_lines_and_hold_no_key(fed, ran):
    keys = [path.read_text().splitlines()[1] for path in fed.folder.rglob("*.pem")]
    for name in (HUB, "a"):
        text = fed.log(name)
        lines = [line for line in text.splitlines() if not line.startswith(("coordinator", "site"))]
        assert lines and not [line for line in lines if not line.startswith("{")]
        for line in lines:
            assert {"time", "level", "from", "text"} <= json.loads(line).keys()
        assert not any(key in text for key in keys)


@pytest.mark.slow
def test_an_evicted_site_stays_away_until_it_is_let_in(fed, ran):
    """Through a restart of the coordinator; the others go on."""
    folder = fed.folder.parent
    try:
        assert run("server", "evict", "c", folder=folder)[1] == "site c is evicted\n"
        assert fed.processes["c"].wait(PATIENCE) == 3
        assert "hint: ask the operator why; `fed-coordinator evict SITE --undo`" in fed.log("c")
        refused(run("server", "evict", "zz", folder=folder), 2, "zz", "one of: a, b, c, d")
        again = run("server", "evict", "c", folder=folder)
        assert again[0] == 2 and "evicted already" in again[2]
        assert fed.stop(HUB) == 0
        fed.start_hub()
        assert fed.start("c").wait(PATIENCE) == 3
        assert "c     evicted" in run("server", "jobs", folder=folder)[1]
        code, out, _ = run("clients", "check", "--config", fed.config("c"))
        assert code == 3 and "FAIL  admitted" in out and "evicted by an operator" in out
        text = run("server", "evict", "c", "--undo", folder=folder)[1]
        assert text == "site c may connect again\n"
    finally:
        fed.start("c")
    fed.connected("abc")


# ---------------------------------------------------------------------------- bad jobs


@pytest.mark.parametrize(
    ("text", "code", "parts"),
    [
        ('task = "small.py"\n', 2, ("protect.max_examples", "no site tells how many rows")),
        ('task = "small.py"\n[protect]\nmax_examples = 64\nprotection = "plain"', 3, ("plain",)),
        ('task = "small.py"\n[protect]\nmax_examples = 64\n[round]\ndropout = 0.1', 2, ("absences",)),
        ('task = "small.py"\n[protect]\nmax_exmples = 64', 2, ("protect.max_exmples", "did you mean")),
        ('task = "nowhere.py"\n', 2, ("found no file", "fedcore new")),
    ],
)  # fmt: skip
def test_a_job_that_cannot_run_is_refused_by_submit(fed, call, tmp_path, text, code, parts):
    shutil.copy(fed.task, tmp_path / "small.py")
    (tmp_path / "job.toml").write_text(text)
    where = ["--operator", fed.folder.parent / "operator.toml"]
    refused(call(hub_cli, "submit", tmp_path / "job.toml", *where), code, *parts)


def test_an_unknown_job(fed, ran, call):
    where = ["--operator", fed.folder.parent / "operator.toml"]
    refused(call(hub_cli, "watch", ran[0][:-1], *where), 2, f"did you mean '{ran[0]}'")
    again = call(hub_cli, "stop", ran[0], *where)
    assert again[0] == 2 and "over already (finished)" in again[2]


def test_a_coordinator_that_is_not_there(fed, call):
    kit = fed.kit("operator", "op").key_path.parent
    where = ["--coordinator", f"127.0.0.1:{free_port()}", "--kit", kit]
    refused(call(hub_cli, "jobs", *where), 2, "found no connection", "check host and port")
    wrong = ["--coordinator", "127.0.0.1", "--kit", kit]
    assert call(hub_cli, "jobs", *wrong)[0] == 2
    nobody = ["--coordinator", f"127.0.0.1:{fed.port}", "--kit", fed.folder / "nowhere"]
    assert call(hub_cli, "jobs", *nobody)[0] == 2
    site = ["--coordinator", f"127.0.0.1:{fed.port}", "--kit", fed.home("a") / "kit"]
    refused(call(hub_cli, "jobs", *site), 3, "found role 'site'")


# ---------------------------------------------------------------------------- bad deployments


@pytest.fixture
def home(tmp_path):
    """Files of a coordinator and of site `a`, begun a month ago, nothing of it running."""
    return _Home(tmp_path)


class _Home:
    def __init__(self, folder):
        self.folder, self.now, self.port = folder, datetime.now(UTC), free_port()
        self.authority = Authority.create("rehearsal", self.now - timedelta(days=30))
        self.pins = {}
        for name in "abc":
            (folder / name).mkdir()
            self.pins[name] = create_identity(folder / name / "identity.pem").public
        write_roster(folder / "roster.toml", self.pins)
        (folder / "small").mkdir()
        small_task(folder)
        self.issue("site", "a", "a/kit")
        self.issue("operator", "op", "op")
        self.issue("coordinator", HUB, "hub/kit", hosts=LOOPBACK)
        self.hub = folder / "hub" / "federation.toml"
        self.hub.write_text(
            'name = "rehearsal"\nroster = "../roster.toml"\nkit = "kit"\nfolder = "state"\n'
            f'listen = ["127.0.0.1"]\nport = {self.port}\n'
        )
        self.site = folder / "a" / "site.toml"
        self.site.write_text(
            f'site = "a"\ncoordinator = "127.0.0.1:{self.port}"\nkit = "kit"\n'
            'identity = "identity.pem"\nroster = "../roster.toml"\nfolder = "state"\n'
        )

    def issue(self, role, name, folder, *, begins=timedelta(0), days=1.0, hosts=()):
        path = self.folder / folder
        if path.exists():
            shutil.rmtree(path)
        issued = self.authority.issue(role, name, self.now + begins, hosts=hosts, days=days)
        return issued.save(path)

    @contextlib.contextmanager
    def serving(self):
        """The coordinator runs."""
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fedcore_server.cli", "serve", "--config", self.hub],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            assert "listening on" in process.stdout.readline()
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(PATIENCE)
                process.stdout.close()


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("port =", "prot =", ("federation.toml: key: found 'prot'", "did you mean 'port'")),
        ("listen", "[limits]\nspool_byte = 1\n#", ("limits.spool_byte", "limits.spool_bytes")),
        ("listen", "[limits]\nenough_vectors = 2\n#", ("enough_vectors: found 2", "3 (min", "hint:")),
        ("listen", "[limits]\nenough_vectors = 4\n#", ("enough_vectors: found 4", "to 3 (the")),
    ],
)  # fmt: skip
def test_a_wrong_key_is_named_with_its_path(home, call, old, new, parts):
    edit(home.hub, old, new)
    if "limits" in new:
        edit(home.hub, f"port = {home.port}\n", "")
    refused(call(hub_cli, "serve", "--config", home.hub), 2, *parts)


@pytest.mark.parametrize(
    ("module", "name", "hint"),
    [(hub_cli, "serve", "fed-coordinator init NAME"), (site_cli, "run", "fed-site join")],
)
def test_no_file(home, call, module, name, hint):
    nowhere = home.folder / "nowhere.toml"
    refused(call(module, name, "--config", nowhere), 2, "no such file", hint, "--config FILE")


def test_a_port_in_use(home):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", home.port))
        taken.listen()
        refused(run("server", "serve", "--config", home.hub), 2, "in use", "another coordinator")
    home.hub.write_text(f"metrics_port = {home.port}\n" + home.hub.read_text())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        edit(home.hub, f"metrics_port = {home.port}", f"metrics_port = {number}")
        refused(
            run("server", "serve", "--config", home.hub), 2, f"127.0.0.1:{number} in use", "metrics_port"
        )  # fmt: skip


def test_a_coordinator_s_certificate_for_another_name(home, call):
    home.issue("coordinator", HUB, "hub/kit", hosts=("hub.example.org",))
    where = ["--coordinator", f"127.0.0.1:{home.port}", "--kit", home.folder / "op"]
    with home.serving():
        refused(call(hub_cli, "jobs", *where), 3, "made out to hub.example.org, expected 127.0.0.1")
        code, out, _ = call(site_cli, "check", "--config", home.site)
        assert code == 2, "no task is the first thing that failed"
        assert "FAIL  tls" in out and "made out to hub.example.org" in out
        assert "hint: connect under one of these names" in out


def test_expired_certificates(home, call):
    old = {"begins": -timedelta(days=9), "days": 3}
    home.issue("coordinator", HUB, "hub/kit", hosts=LOOPBACK, **old)
    refused(
        call(hub_cli, "serve", "--config", home.hub), 3, "found expired since", "new certificate"
    )
    home.issue("site", "a", "a/kit", **old)
    refused(
        call(site_cli, "run", "--config", home.site), 3, "found expired since", "new certificate"
    )
    home.issue("coordinator", HUB, "hub/kit", hosts=LOOPBACK)
    home.issue("operator", "op", "op", **old)
    where = ["--coordinator", f"127.0.0.1:{home.port}", "--kit", home.folder / "op"]
    with home.serving():
        refused(call(hub_cli, "jobs", *where), 3, "found expired since", "operator 'op'")


def test_clocks_that_differ(home, call):
    """A certificate made by a clock that is ahead."""
    home.issue("site", "a", "a/kit", begins=timedelta(hours=2))
    refused(
        call(site_cli, "run", "--config", home.site), 3, "not valid before", "compare the clocks"
    )


def test_a_roster_without_this_site(home, call):
    pins = {name: key for name, key in home.pins.items() if name != "a"}
    write_roster(home.folder / "roster.toml", pins)
    refused(call(site_cli, "run", "--config", home.site), 2, "roster: found b, c", "'a'")


def test_keys_of_another_site(home, call):
    home.issue("site", "b", "a/kit")
    refused(call(site_cli, "run", "--config", home.site), 2, "certificate of site 'b'", "site.toml")
    home.issue("site", "a", "a/kit")
    shutil.copy(home.folder / "b" / "identity.pem", home.folder / "a" / "identity.pem")
    refused(call(site_cli, "run", "--config", home.site), 2, "another key than roster.toml pins")


def test_rosters_that_differ(home, call):
    with home.serving():
        others = {**home.pins, "c": bytes(range(32))}
        write_roster(home.folder / "a" / "roster.toml", others)
        edit(home.site, "../roster.toml", "roster.toml")
        refused(
            run("clients", "run", "--config", home.site),
            3,
            "roster:",
            "both need the same roster.toml",
        )
        code, out, _ = call(site_cli, "check", "--config", home.site)
        assert code == 2 and "FAIL  admitted" in out and "both must have the same" in out


@pytest.mark.parametrize(("shell", "name"), [("server", "serve"), ("clients", "run")])
def test_a_full_disk(home, shell, name):
    """RLIMIT_FSIZE stands in for it: no file of the process may grow beyond 4 KiB."""
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    config = home.hub if shell == "server" else home.site
    found = run(shell, name, "--config", config, preexec_fn=limit)
    refused(found, 2, "journal", "is the disk full")


def test_a_database_of_a_newer_version(home, call):
    for module, name, config in ((hub_cli, "serve", home.hub), (site_cli, "run", home.site)):
        state = config.parent / "state"
        state.mkdir()
        with contextlib.closing(sqlite3.connect(state / "journal.sqlite")) as base:
            base.execute("create table meta (name text primary key, value text)")
            base.execute("insert into meta values ('version', '99')")
            base.commit()
        refused(
            call(module, name, "--config", config), 2, "found version 99, expected 2",
            "another Fedcore wrote it",
        )  # fmt: skip


def test_a_folder_that_cannot_be_made(home, call):
    for module, name, config in ((hub_cli, "serve", home.hub), (site_cli, "run", home.site)):
        (config.parent / "state").write_text("a file is in the way")
        code, _, err = call(module, name, "--config", config)
        assert code == 2 and "error: journal" in err, err


def test_two_processes_for_one_site(fed, ran, tmp_path):
    """In one folder the second is refused at once; with a folder of its own by the coordinator."""
    found = run("clients", "run", "--config", fed.config("b"))
    refused(found, 2, f"found process {fed.processes['b'].pid} using it", "one process to a party")
    other = fed.config("b").with_name("second.toml")
    other.write_text(fed.config("b").read_text().replace('"state"', f'"{tmp_path}/state"'))
    ended, out, err = run("clients", "run", "--config", other)
    assert ended == 3 and "hint: stop one; if the other is not yours" in out + err
    assert fed.processes["b"].poll() is None
    assert "a second process came as this site" in fed.log("b")


@pytest.mark.parametrize("module", [hub_cli, site_cli])
def test_every_option_has_a_line_of_help(module):
    import typer

    for name, command in typer.main.get_command(module.app).commands.items():
        assert command.help, name
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, (name, parameter.name)
