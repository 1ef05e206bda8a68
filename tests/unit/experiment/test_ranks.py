"""`fedcore simulate` under torchrun: several ranks give the bits of one process, also after one was killed, and refuse
what is not alike at all of them. Ranks are real processes that meet on loopback; most are forked from this one."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fedcore
from fedcore.cli import main as commands
from fedcore.cli import torchrun
from fedcore.errors import EXIT_BAD_INPUT, EXIT_TASK_FAILED, BadInput
from fedcore.experiment.leader import shared_out
from fedcore.experiment.run import held
from fedcore.files import read_result
from fedcore.learning.ranks import Ranks, rows_digest

pytestmark = pytest.mark.usefixtures("no_drawings")

TASK = """
import os, signal
from pathlib import Path
import numpy as np
from torch import nn
import fedcore

OTHER = float(os.environ.get("OTHER_ROWS", 0))

def data(site):
    rng = np.random.default_rng(site)
    x = rng.normal(size=(9 + site % 13, 4)).astype("f4")
    return x + np.float32(OTHER), (x[:, 0] > 0).astype("i8")

def loss(outputs, targets):
    rank, training = os.environ.get("RANK", "none"), outputs.requires_grad
    if rank == os.environ.get("FAILS") and training:
        raise ZeroDivisionError("no rows of this kind")
    mark = Path("killed")
    # After round 1, in the round of which no checkpoint is there yet.
    if rank == os.environ.get("DIES") and training and Path("run/checkpoint.pt").exists() and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return nn.functional.cross_entropy(outputs, targets)

sites = {f"s{number:02d}": number for number in range(40)}
task = fedcore.Task("t", data, lambda: nn.Linear(4, 2), loss, sites=sites, metrics=("accuracy",))
"""

SETTINGS = ["--rounds", "3", "--sum", "exact", "--protection", "masked", "--cohort", "36", "--arms", "federated",
            "--batch-size", "4", "--folds", "3"]  # fmt: skip
COMMAND = ["simulate", "task.py", *SETTINGS, "--out", "run"]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("task.py").write_text(TASK)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _rank(arguments, environment, before):
    """The life of a forked rank."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(
            os.open(f"{name}-{environment['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number
        )
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    os.environ.update(environment)
    before()
    commands.main(arguments)


def ranks(*by_rank, before=None, **environment):
    """Start a rank for each list of arguments; (exit code, stdout, stderr) of each. before: {rank: called in it}."""
    port, processes = free_port(), []
    for rank, arguments in enumerate(by_rank):
        mine = {
            "RANK": str(rank), "WORLD_SIZE": str(len(by_rank)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo", **environment,
        }  # fmt: skip
        about = arguments, mine, (before or {}).get(rank, lambda: None)
        processes.append(multiprocessing.get_context("fork").Process(target=_rank, args=about))
        processes[-1].start()
    try:
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes].count(None) == 0, "a rank did not end"
    finally:
        for process in processes:
            process.kill()
            process.join()
    text = [
        [Path(f"{name}-{rank}").read_text() for name in ("out", "err")]
        for rank in range(len(by_rank))
    ]
    return [(process.exitcode, *said) for process, said in zip(processes, text, strict=True)]


def one_process(out="alone", **more):
    fedcore.simulate(job=_layers(), out=out, **more)
    return outcome(out)


def _layers():
    pairs = zip(SETTINGS[::2], SETTINGS[1::2], strict=True)
    return [{"task": "task.py", **{key[2:].replace("-", "_"): value for key, value in pairs}}]


def outcome(folder):
    """The model and all rows, without what is measured."""
    rows = [json.loads(line) for line in Path(folder, "rounds.jsonl").read_text().splitlines()]
    kept = [
        {
            key: value
            for key, value in row.items()
            if not key.startswith("seconds") and key != "peak_memory_mb"
        }
        for row in rows
    ]
    return read_result(Path(folder)).model_sha256, kept


@pytest.mark.parametrize("executor", ["sequential", "batched"])
def test_any_number_of_ranks_gives_the_model_and_rows_of_one_process_and_rank_0_alone_prints(
    executor,
):
    # Under `batched` the bits are of how many sites are stacked, which workers and ranks share.
    expected = one_process(executor=executor, workers=1)
    for count in (2, 3) if executor == "sequential" else (3,):
        folder = f"run-{count}"
        command = [*COMMAND[:-1], folder, "--executor", executor, "--json"]
        (code, out, err), *others = ranks(*[command] * count)
        assert code == 0, err
        assert outcome(folder) == expected
        found = json.loads(out)["executor"]
        assert (found["name"], found["ranks"]) == (executor, count)
        assert others == [(0, "", "")] * (count - 1)


def test_a_killed_rank_ends_the_run_and_the_same_command_goes_on_from_the_whole_rounds():
    expected = one_process()
    (code, _, err), other = ranks(COMMAND, COMMAND, DIES="1")
    assert other[0] == -signal.SIGKILL
    assert code == EXIT_BAD_INPUT
    assert "error: torchrun: another rank of this run has ended (" in err
    assert "the same command goes on from the last whole round" in err
    first = Path("run/rounds.jsonl").read_bytes()
    assert first.count(b"\n") == 1  # round 1 is whole, round 2 is not
    again = ranks(COMMAND, COMMAND, COMMAND)  # as many ranks as there are now
    assert [code for code, *_ in again] == [0, 0, 0], again[0][2]
    assert outcome("run") == expected
    assert (
        Path("run/rounds.jsonl").read_bytes().startswith(first)
    )  # with its seconds: it was not done again
    shown = ranks(COMMAND, COMMAND)  # finished: its result, and nothing trained
    assert shown[0][0] == shown[1][0] == 0
    assert expected[0] in shown[0][1]
    assert "round 3/3" not in shown[0][2]


def test_torchrun_starts_all_ranks_again_after_one_was_killed_and_the_run_ends_with_the_same_bits():
    expected = one_process()
    # Two starts of two interpreters, so some 20 s of CPU: this is the command that people type.
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    fedcore_ = ["--no-python", sys.executable, "-m", "fedcore.cli.main"]
    done = subprocess.run(
        [*launcher, "--max-restarts", "1", *fedcore_, *COMMAND],
        env={**os.environ, "DIES": "1", "GLOO_SOCKET_IFNAME": "lo"}, capture_output=True, text=True, timeout=400,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Path("killed").exists()
    assert "SIGKILL" in done.stderr or "exitcode: -9" in done.stderr
    assert outcome("run") == expected
    assert done.stdout.count(expected[0]) == 1


def another_version():
    fedcore.__version__ = "9.9"


UNLIKE = {
    "version": ({}, {1: another_version}, r"found fedcore = 9\.9, expected {version} as at rank 0"),
    "seed": ({"more": ["--seed", "7"]}, {}, r"found seed = 7, expected 0 as at rank 0"),
    "rows": (
        {},
        {1: lambda: os.environ.update(OTHER_ROWS="1")},
        "found other values of the rows, expected the same as at rank 0",
    ),
    "data it cannot read": (
        {},
        {1: lambda: os.environ.update(OTHER_ROWS="nan")},
        "site s00: .*",
    ),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_a_rank_that_differs_is_named_before_anything_is_trained_or_written(what):
    given, before, said = UNLIKE[what]
    (code, out, err), other = ranks(COMMAND, COMMAND + given.get("more", []), before=before)
    assert code != 0 and other[0] != 0
    said = said.replace("{version}", re.escape(fedcore.__version__))
    assert re.search(rf"error: rank 1 \({re.escape(socket.gethostname())}\): {said}", err), err
    assert (out, other[1], other[2]) == ("", "", "")
    assert not Path("run").exists()


REFUSED = {
    "more ranks than pieces": (
        ["--cohort", "20"],
        r"torchrun: found 3 ranks, expected at most 2: a round of 20 sites is divided into 2 pieces",
    ),
    "an algorithm that keeps values": (
        ["--algorithm", "scaffold"],
        "torchrun: found 3 ranks, but the algorithm 'scaffold' keeps values",
    ),
    "a choice by time": (["--executor", "auto"], "executor: found 'auto' under torchrun"),
    "a key nobody knows": (["--lrr", "1"], "lrr"),
    "workers": (["--workers", "2"], "--workers: found 2 under torchrun"),
    "a former run replaced": (["--force"], "--force: found it under torchrun"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_all_ranks_refuse_is_said_once_and_nothing_is_written(what):
    more, said = REFUSED[what]
    (code, _, err), *others = ranks(*[COMMAND + more] * 3)
    assert re.search(f"error: .*{said}", err), err
    assert err.count("error: ") == 1
    assert code == EXIT_BAD_INPUT and all(
        each[0] == code and each[1:] == ("", "") for each in others
    )
    assert not Path("run").exists()


def test_a_run_without_a_folder_and_one_to_be_resumed_are_refused_with_the_command_that_goes_on():
    asked = SimpleNamespace(layers=list, out=None, force=False, workers=None, resume=None)
    for key, value, said in (
        ("out", None, "--out: found none"),
        ("resume", Path("run"), "--resume: found it"),
    ):
        with pytest.raises(BadInput, match=said) as refused:
            torchrun.Asked(**{**vars(asked), key: value}).settings()
        assert "the same command goes on with the run in --out" in refused.value.remedy


def test_the_folder_of_another_run_or_one_that_is_written_to_is_refused_and_all_ranks_end():
    one_process("run")
    before = Path("run/rounds.jsonl").read_bytes()
    (code, _, err), other = ranks(*[[*COMMAND, "--seed", "3"]] * 2)
    assert "--out: found run, a run with seed = 0, expected 3 as given" in err
    assert code == other[0] == EXIT_BAD_INPUT
    with held(Path("run")):
        (code, _, err), other = ranks(COMMAND, COMMAND)
    assert f"run: found process {os.getpid()} writing into it" in err
    assert code == other[0] == EXIT_BAD_INPUT
    assert Path("run/rounds.jsonl").read_bytes() == before


def test_what_the_task_raises_at_another_rank_is_raised_by_rank_0():
    (code, _, err), other = ranks(COMMAND, COMMAND, FAILS="1")
    assert code == EXIT_TASK_FAILED and other[0] != 0
    assert re.search("error: .*no rows of this kind", err)
    assert other[1:] == ("", "")


def test_ranks_that_do_not_come_are_an_error_with_how_to_reach_them(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(BadInput, match="found ranks that do not meet within 1 s") as refused:
        Ranks(wait=timedelta(seconds=1))
    assert "--rdzv-endpoint" in refused.value.remedy


def of_rows(*counts):
    return [
        SimpleNamespace(site=SimpleNamespace(index=index, train=range(count)))
        for index, count in enumerate(counts)
    ]


def test_pieces_are_shared_out_by_their_rows_and_each_is_at_one_rank():
    first, second, third = ([site] for site in of_rows(10, 6, 5))
    assert shared_out([third, first, second], 2) == (((0,),), ((1,), (2,)))
    assert shared_out([first], 3) == (((0,),), (), ())


def test_the_digest_of_rows_changes_with_a_value_and_with_the_part_that_a_row_is_in():
    def site(train, test):
        parts = (fedcore_rows(train), fedcore_rows(test), None)
        return SimpleNamespace(train=parts[0], test=parts[1], validation=None)

    def fedcore_rows(values):
        import torch

        from fedcore.learning.data.rows import ArrayRows

        x = torch.from_numpy(np.array(values, dtype="f4"))
        return ArrayRows(x, torch.zeros(len(x), dtype=torch.int64))

    found = {rows_digest([site(*parts)]) for parts in (([1, 2], [3]), ([1, 2], [4]), ([1], [2, 3]))}
    assert len(found) == 3
    assert rows_digest([site([1, 2], [3])]) in found
