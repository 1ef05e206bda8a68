"""Two commands at once in the folder of one run or comparison: the second is refused, and the first ends as alone."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from support.small_tasks import tiny

import fedcore
from fedcore.cli import main as commands
from fedcore.errors import BadInput
from fedcore.experiment import api
from fedcore.experiment.run import LOCK_FILE, held
from fedcore.files.lock import FileLock

pytestmark = pytest.mark.usefixtures("no_drawings")

RUN = {"rounds": 2, "protection": "plain", "resamples": 0, "arms": "federated"}
COMPARISON = {**RUN, "arms": "centralised,federated", "rounds": 1, "seeds": 1, "folds": 2}
IN_USE = rf"here: found process {os.getpid()} writing into it, expected one command at a time"


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(**more):
    return fedcore.simulate(tiny(), out="here", **{**RUN, **more})


def comparison(**more):
    return fedcore.compare(tiny(), out="here", **{**COMPARISON, **more})


def resume(**more):
    return api.resume("here", task=tiny(), **more)


def refused(*calls):
    """A callback that makes these calls once, each of which is refused; and which of them it made."""
    made = []

    def on_event(*_):
        for call in calls if not made else ():
            made.append(call)
            with pytest.raises(BadInput, match=IN_USE) as caught:
                call()
            assert "choose another --out" in caught.value.remedy

    return on_event, made


def test_what_begins_in_the_folder_of_a_comparison_is_refused_and_the_comparison_ends():
    calls = (
        comparison, lambda: comparison(lr=0.3), lambda: comparison(force=True), run,
        lambda: run(force=True), resume,
    )  # fmt: skip
    on_cell, made = refused(*calls)
    found = comparison(workers=2, on_cell=on_cell)
    assert len(made) == len(calls)
    assert found.result.folds == 2
    assert not Path("here", LOCK_FILE).exists()


def test_what_begins_in_the_folder_of_a_run_is_refused_and_the_run_ends():
    calls = (
        resume, run, lambda: run(force=True), comparison, lambda: comparison(force=True),
    )  # fmt: skip
    on_round, made = refused(*calls)
    found = run(on_round=on_round)
    assert len(made) == len(calls)
    assert found.result.rounds == 2
    assert not Path("here", LOCK_FILE).exists()


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_resumed_run_holds_its_folder_too():
    with pytest.raises(KeyboardInterrupt):
        run(on_round=interrupt)
    assert not Path("here", LOCK_FILE).exists()
    on_round, made = refused(resume, lambda: run(force=True))
    resume(on_round=on_round)
    assert len(made) == 2


def test_a_resumed_comparison_holds_its_folder_too():
    with pytest.raises(KeyboardInterrupt):
        comparison(workers=1, on_cell=interrupt)
    assert not Path("here", LOCK_FILE).exists()
    on_cell, made = refused(comparison, lambda: comparison(force=True))
    comparison(workers=1, on_cell=on_cell)
    assert len(made) == 2


def test_the_command_ends_with_one_line_and_a_hint(capsys):
    Path("task.py").write_text("import tests.support.small_tasks as s\ntask = s.tiny()\n")
    codes = []

    def second(*_):
        with pytest.raises(SystemExit) as ended:
            commands.main(["compare", "--resume", "here"])
        codes.append(ended.value.code)

    fedcore.compare("task.py", out="here", workers=1, on_cell=second, **COMPARISON)
    assert codes == [2, 2]
    lines = capsys.readouterr().err.splitlines()
    error, hint = lines[-2:]
    assert (
        error
        == f"error: here: found process {os.getpid()} writing into it, expected one command at a time"
    )
    assert hint == "hint: let that one end or stop it; to run beside it, choose another --out"


def held_elsewhere(folder, ready, end):
    with held(folder):
        ready.set()
        end.wait()


@pytest.fixture
def elsewhere(tmp_path):
    """Start processes that hold a folder until they are told to end."""
    fork, started = multiprocessing.get_context("fork"), []

    def start():
        ready, end = fork.Event(), fork.Event()
        process = fork.Process(target=held_elsewhere, args=(tmp_path, ready, end))
        process.start()
        started.append(process)
        assert ready.wait(30)
        return process, end

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.mark.parametrize("how", ["it ends", "SIGTERM", "SIGKILL"])
def test_a_folder_is_free_when_its_process_has_ended_in_any_way(elsewhere, tmp_path, how):
    process, end = elsewhere()
    with pytest.raises(BadInput, match=f"found process {process.pid} writing"), held(tmp_path):
        pass
    if how == "it ends":
        end.set()
    else:
        os.kill(process.pid, signal.Signals[how])
    process.join()
    assert (tmp_path / LOCK_FILE).exists() == (how != "it ends")
    with held(tmp_path):
        pass
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_process_that_is_forked_from_the_holder_does_not_hold_the_folder(elsewhere, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    with held(other):
        elsewhere()  # runs on
    with held(other):
        pass


def test_a_lock_whose_file_its_holder_removes_meanwhile_is_taken_on_a_new_file(tmp_path, stand_in):
    path, flock, removed = tmp_path / LOCK_FILE, fcntl.flock, []

    def late(handle, operation):
        if not removed:
            removed.append(path.unlink())
        flock(handle, operation)

    stand_in(fcntl, flock=late)
    lock = FileLock(path, BadInput)
    assert path.read_text() == f"{os.getpid()}\n"
    with pytest.raises(BadInput, match=str(os.getpid())):
        FileLock(path, BadInput)
    lock.release()
    FileLock(path, BadInput).release()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_run_goes_without_a_lock_where_the_file_system_has_none(code, tmp_path, stand_in):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    stand_in(fcntl, flock=refuse)
    ran = []
    with held(tmp_path):
        ran.append(1)
    assert ran

    stand_in(fcntl, flock=lambda *_: (tmp_path / "gone").stat())
    with pytest.raises(FileNotFoundError), held(tmp_path):
        pass
