"""`fedcore up`: real processes on loopback, the bits of `simulate`, and nothing left behind."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
import uuid
from pathlib import Path

import numpy as np
import pytest
from deployment import PATIENCE, SMALL, small_task
from safetensors.numpy import load_file, save_file
from support.preloaded import preloaded

import fedcore
from fedcore.cli import main, up
from fedcore.local_deployment import to_toml

HEART = ("--task", "heart", "--protection", "layered", "--seed", "0", "--set", "track.resamples=0")
THREE = ("--set", 'sites={a="va", b="hungary", c="cleveland"}')
THREE_SMALL = ("--set", "sites={a=1, b=2, c=3}")
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="processes are found by their environment"
)


class Marked:
    """`fedcore up` as a process whose descendants can be found again, whoever their parent is now.

    python: the real interpreter, or that of support/preloaded.py, which starts at once: then each process
    stands beside one with the mark that ends with it.
    """

    def __init__(self, out, *arguments, python=None):
        self.mark = f"FEDCORE_TEST_MARK={uuid.uuid4()}"
        name, _, value = self.mark.partition("=")
        self.out = out
        python = python or preloaded().python
        self.process = subprocess.Popen(
            [python, "-P", "-m", "fedcore.cli.main", "up", *arguments, "--out", str(out), "--json"],
            env=os.environ | {name: value}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def alive(self):
        """Command lines of the marked processes that have not ended."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found

    def port(self):
        config = self.out / "deployment" / "coordinator" / "federation.toml"
        return tomllib.loads(config.read_text())["port"]

    def end(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        for stream in (self.process.stdout, self.process.stderr):
            stream.close()
        self.process.wait()


def is_free(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return True


def lines_until(stream, word, seconds=PATIENCE):
    """Lines of a process up to the first with `word`; the test fails at the end of the stream."""
    until, seen = time.monotonic() + seconds, []
    while time.monotonic() < until:
        line = stream.readline()
        assert line, "".join(seen)
        seen.append(line)
        if word in line:
            return seen
    raise AssertionError("".join(seen))


@needs_proc
def test_the_same_bits_as_simulate_and_nothing_left(tmp_path):
    """With the other cipher than in README's command (test_readme.py); it exits with 1 for other bits."""
    run = Marked(tmp_path / "up", *HEART, "--rounds", "3", "--cipher", "keystream")
    try:
        printed, said = run.process.communicate(timeout=PATIENCE)
        assert run.process.returncode == 0, said
        assert run.alive() == []
        assert is_free(run.port())
    finally:
        run.end()
    result = json.loads(printed)
    assert result == json.loads((tmp_path / "up" / "result.json").read_text())
    same = fedcore.simulate(
        "heart", protection="layered", cipher="keystream", rounds=3, seed=0, resamples=0,
        out=tmp_path / "simulated",
    )  # fmt: skip
    assert result["model_sha256"] == same.result["model_sha256"]
    deployed = result["deployment"]
    assert deployed["equal"] is True and deployed["model_sha256"] == result["model_sha256"]
    assert set(deployed["sites"].values()) == {result["model_sha256"]}
    assert deployed["survivors"] == [result["sites"]] * 3
    assert len(deployed["round_seconds"]) == 3
    assert (tmp_path / "up" / "model.safetensors").read_bytes() == (
        tmp_path / "simulated" / "model.safetensors"
    ).read_bytes()
    assert {p.name for p in (tmp_path / "simulated").iterdir()} | {"deployment"} == {
        p.name for p in (tmp_path / "up").iterdir()
    }
    # What is printed is what was started, one process a party, and each names a file that is there.
    commands = [shlex.split(each["command"]) for each in deployed["processes"]]
    assert [each["name"] for each in deployed["processes"]] == ["coordinator", *result["sites"]]
    for command in commands:
        assert shlex.join(command) in said
        assert Path(command[-1]).is_file()
    purposes = [
        json.loads(line)["purpose"]
        for line in (tmp_path / "up" / "deployment" / "rounds.jsonl").read_text().splitlines()
    ]
    assert purposes.count("update") == 3 and purposes[-1] == "metrics"


@needs_proc
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_a_signal_in_the_middle_leaves_no_process_and_no_port(tmp_path, number, code):
    python = sys.executable if number == signal.SIGINT else None
    run = Marked(tmp_path / "up", *HEART, *THREE, "--rounds", "500", python=python)
    try:
        lines_until(run.process.stderr, "started here")
        port = None
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:  # until every site is there and the rounds have begun
            rows = list((tmp_path / "up").glob("deployment/coordinator/state/jobs/*/rounds.jsonl"))
            if rows and rows[0].stat().st_size:
                port = run.port()
                break
            time.sleep(0.1)
        assert port is not None
        assert len(run.alive()) >= 8  # the coordinator and its worker, three sites and theirs
        run.process.send_signal(number)
        _, said = run.process.communicate(timeout=PATIENCE)
        assert run.process.returncode == code, said
        assert "Traceback" not in said
        assert run.alive() == []
        assert is_free(port)
    finally:
        run.end()


def test_another_model_than_the_simulation_is_an_error_and_both_are_kept(
    tmp_path, monkeypatch, capsys
):
    def other(prepared, folder, _):
        folder.mkdir()
        model = folder / "model.safetensors"
        save_file({"weight": np.full((1, 30), 0.25), "bias": np.full(1, 0.25)}, model)
        sites = dict.fromkeys(prepared.plan.sites, "0" * 64)
        survivors = (tuple(sites), tuple(sites)[1:])
        return up.DeployedRun(
            "job", "0" * 64, sites, 0.2, (0.1, 0.1), survivors, (), str(folder)
        ), model

    monkeypatch.setattr(up, "_deployed", other)
    out = tmp_path / "up"
    with pytest.raises(SystemExit) as ended:
        main.main(["up", *HEART, "--rounds", "2", "--out", str(out), "--json"])
    printed, said = capsys.readouterr()
    result = json.loads(printed)
    assert ended.value.code == 1
    assert "error: deployment: found model" in said and "missing in round 2" in said
    assert result["deployment"]["equal"] is False
    assert result["model_sha256"] == result["deployment"]["model_sha256"]
    assert result["model_sha256"] != result["deployment"]["simulated_sha256"]
    deployed = load_file(out / "model.safetensors")
    simulated = load_file(out / "deployment" / "simulated-model.safetensors")
    assert set(deployed) == set(simulated)
    assert all((deployed[name] == 0.25).all() for name in ("weight", "bias"))
    assert not all((simulated[name] == 0.25).all() for name in ("weight", "bias"))


@needs_proc
def test_a_deployment_that_fails_says_why_and_leaves_its_logs(tmp_path):
    failing = 'def data(source):\n    if "up" not in sys.argv: raise ValueError("ROW-7419")\n'
    task = small_task(tmp_path, "import sys" + SMALL.replace("def data(source):\n", failing))
    run = Marked(tmp_path / "up", "--task", task, *THREE_SMALL, "--rounds", "2")
    try:
        printed, said = run.process.communicate(timeout=PATIENCE)
        assert run.process.returncode == 4 and printed == ""
        assert "error: deployment: the job ended as failed: too few sites can take part" in said
        assert "hint: the logs: " in said and "Traceback" not in said and "ROW-7419" not in said
        # The first site that fails ends the job, and may do so before the others have read a row.
        logs = (tmp_path / "up" / "deployment" / "logs").glob("?.log")
        assert any("ROW-7419" in log.read_text() for log in logs)
        assert run.alive() == []
        assert is_free(run.port())
    finally:
        run.end()


@pytest.mark.parametrize(
    ("arguments", "code", "error", "hint"),
    [
        (
            ["--drop", "1:submit:va"],
            2,
            "round.drop: found 1:submit:va, expected none in a deployment",
            "fedcore simulate",
        ),
        (
            ["--dropout", "0.1"],
            2,
            "round.dropout: found 0.1, expected none in a deployment",
            "fedcore simulate",
        ),
        (["--protection", "plain"], 3, "protect.protection: found 'plain'", "fedcore simulate"),
        (["--task", "hart"], 2, "task: found 'hart'", "heart"),
        (["--rounds", "0"], 2, "round.rounds: found 0", ""),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path, monkeypatch, capsys, arguments, code, error, hint
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main.main(["up", *arguments])
    said = capsys.readouterr().err
    assert ended.value.code == code
    assert f"error: {error}" in said and hint in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_two_sites_are_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main.main(["up", "--task", "heart", "--set", 'sites={a="va", b="hungary"}'])
    assert ended.value.code == 3
    assert "at least 3" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_toml_is_read_back_as_it_was():
    tables = {
        "task": 'a "quoted" name\\with\n\x7f', "empty": [], "n": 3, "x": 0.5, "on": True, "no": None,
        "limits": {"a": 1}, "tasks": {"heart": {"task": "heart", "source": {"path": "é.csv", "k": [{"a": 1}]}}},
        "odd key.": {"b": ["x", "y"]},
    }  # fmt: skip
    del tables["no"]
    assert tomllib.loads(to_toml(tables | {"no": None})) == tables
