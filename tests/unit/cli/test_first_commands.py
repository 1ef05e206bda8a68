"""What a newcomer types first: a task's file in place of a job, sites as a list, a full disk, fixed test rows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fedcore_clients.session import Session

import fedcore
from fedcore.cli import main as commands
from fedcore.cli.console import exit_codes
from fedcore.errors import BadInput
from fedcore.wire import frames

pytestmark = pytest.mark.usefixtures("no_drawings")

TASK = """
import numpy as np, torch, fedcore

def data(source):
    rng = np.random.default_rng(source)
    x = rng.normal(size=(30, 3)).astype("f4")
    return x, (x[:, 0] > 0).astype(int)

task = fedcore.Task(
    "typed", data, lambda: torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy,
    sites={"a": 1, "b": 2, "c": 3}, defaults={"rounds": 1, "protection": "plain"},
)
"""


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder():
    Path("my-task").mkdir()
    Path("my-task/task.py").write_text(TASK)


def ends(*arguments):
    with pytest.raises(SystemExit) as ended:
        commands.main(arguments)
    return ended.value.code


@pytest.mark.parametrize(
    "call",
    [
        ("simulate", "my-task/task.py"),
        ("simulate", "my-task/task.py:task", "--seed", "1"),
        ("simulate", "my-task"),
        ("simulate", "--task", "my-task/task.py"),
        ("plan", "my-task/task.py"),
        ("check", "my-task"),
        ("check", "my-task/task.py"),
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("folder")
def test_a_task_stands_in_place_of_a_job(call, capsys):
    assert ends(*call) == 0
    assert "3 sites" in "".join(capsys.readouterr())


@pytest.mark.usefixtures("folder")
def test_a_job_file_in_the_folder_comes_first(capsys):
    Path("my-task/job.toml").write_text('task = "task.py"\n[round]\nrounds = 2\n')
    assert ends("simulate", "my-task", "--out", "run") == 0
    assert fedcore.load("run").result.rounds == 2


@pytest.mark.usefixtures("folder")
def test_two_tasks_at_once_are_refused(capsys):
    assert ends("simulate", "my-task/task.py", "--task", "heart") == 2
    assert "found 'heart' beside the task my-task/task.py" in capsys.readouterr().err
    assert ends("simulate", "other/task.py") == 2
    assert "other/task.py" in capsys.readouterr().err


def data(source):
    rng = np.random.default_rng(source)
    x = rng.normal(size=(30, 3)).astype("f4")
    return x, (x[:, 0] > 0).astype(int)


def pair(source):
    x, y = data(source)
    return (x[:20], y[:20]), (x[20:], y[20:])


def tiny(read=data, **more):
    return fedcore.Task(
        "tiny", read, lambda: torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy,
        **{"sites": {"a": 1, "b": 2, "c": 3}} | more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("task", "given", "found"),
    [
        (tiny(), {"sites": ["a", "b"]}, "sites: found list"),
        (tiny(), {"sites": "abc"}, "sites: found str"),
        (tiny(sites=["a", "b", "c"]), {}, "task.sites: found list"),
        (tiny(sites=("a", "b")), {}, "task.sites: found tuple"),
        (tiny(sites=lambda: ["a", "b"]), {}, "task.sites: found list"),
    ],
)
def test_sites_that_are_no_mapping_are_refused_by_their_type(task, given, found):
    with pytest.raises(
        BadInput, match=f"^{found}, expected a mapping of site id to source"
    ) as refused:
        fedcore.simulate(task, rounds=1, **given)
    assert "sites={" in refused.value.remedy
    assert not Path("runs").exists()


SMALL = {"rounds": 1, "protection": "plain"}


@pytest.mark.usefixtures("folder")
def test_only_what_a_file_can_bring_back_is_offered_for_reproduction():
    in_memory = [
        fedcore.simulate(tiny(), **SMALL),
        fedcore.compare(tiny(), seeds=1, folds=2, **SMALL),
        fedcore.simulate("my-task/task.py", sites={"a": np.int64(1), "b": 2, "c": 3}),
    ]
    for found in in_memory:
        assert found.result.origin.reproduce == ""
        assert "reproduce" not in str(found)
        assert "fedcore reproduce" not in (found.directory / "report.md").read_text()
    again = fedcore.simulate("my-task/task.py")
    assert f"fedcore reproduce {again.directory}" in str(again)


def fill(_prepared, directory):
    """From here on this run's rows meet a full disk."""
    (directory / "rounds.jsonl").unlink()
    (directory / "rounds.jsonl").symlink_to("/dev/full")


def test_a_full_disk_names_the_file_and_leaves_nothing_half_written(capsys):
    with pytest.raises(SystemExit) as ended, exit_codes():
        fedcore.simulate(tiny(), out="run", on_ready=fill, **SMALL)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: run/rounds.jsonl: No space left on device",
        "hint: free some space there, or use another folder; every file is written whole or not at all",
    ]
    assert not Path("run").exists()


def test_a_file_that_a_process_of_a_comparison_cannot_write_is_named(capsys):
    def take_names(_prepared, directory):
        for fold in (0, 1):
            beside = directory / "splits" / f"seed-0-fold-{fold}.json"
            beside.mkdir()  # no file can take its name

    with pytest.raises(SystemExit) as ended, exit_codes():
        fedcore.compare(
            tiny(), seeds=1, folds=2, workers=2, out="run", on_ready=take_names, **SMALL
        )  # fmt: skip
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: run/splits/seed-0-fold-")


def test_fixed_test_rows_are_not_called_folds():
    run = fedcore.simulate(tiny(pair), **SMALL)
    assert run.result.folds is None
    compared = fedcore.compare(tiny(pair), seeds=2, **SMALL)
    for found in (run, compared):
        page = (found.directory / "report.md").read_text() + (
            found.directory / "report.html"
        ).read_text()
        assert "stratified folds" not in page and "1 folds" not in page and "fold 0" not in page
    assert "over 2 seeds" in (compared.directory / "report.html").read_text()
    assert (
        "stratified folds"
        in (fedcore.simulate(tiny(), **SMALL).directory / "report.html").read_text()
    )


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("stopping", ""),
        ("replaced", "replaced: why"),
        ("cloned", "cloned: why"),
        ("evicted", "evicted: why"),
        ("roster", "roster: why"),
    ],
)
def test_an_orderly_end_of_a_session_is_no_error(code, error):
    address = SimpleNamespace(addresses=[("localhost", 1)])
    session = Session(None, address, None, None, None, None)
    session.last_error = "of a moment ago"
    session._goodbye(frames.Goodbye(code, "why"))
    assert session.last_error == error
