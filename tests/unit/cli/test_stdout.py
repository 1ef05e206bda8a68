"""stdout holds a command's result and nothing else, and a task's `sys.exit` is the task's failure."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fedcore.cli import main as commands
from fedcore.errors import TaskFailed
from fedcore.learning.task import load_task, user_code

LOUD = """
import os, subprocess, sys
import typer
from fedcore.cli import console

app = console.application("loud", "A command beside code that prints.")

@app.command()
def talk() -> None:
    print("printed")
    sys.stdout.write("written\\n")
    os.write(1, b"from a library\\n")
    subprocess.run(["echo", "from a process"], check=True)
    console.emit({"a": 1})
    console.page_console().print("page")

@app.command()
def fill() -> None:
    for _ in range(100_000):
        console.echo("line")

console.run(app, "loud")
"""


@pytest.fixture
def loud(tmp_path):
    path = tmp_path / "loud.py"
    path.write_text(LOUD)
    return [sys.executable, str(path)]


def test_whatever_else_prints_goes_to_stderr(loud):
    done = subprocess.run([*loud, "talk"], capture_output=True, text=True, check=True)
    assert done.stdout == '{\n  "a": 1\n}\npage\n'
    assert set(done.stderr.splitlines()) == {
        "printed", "written", "from a library", "from a process",
    }  # fmt: skip


@pytest.mark.parametrize("asked", ["--help", "--version"])
def test_help_and_version_are_results(loud, asked):
    done = subprocess.run([*loud, asked], capture_output=True, text=True, check=True)
    assert done.stdout and not done.stderr


def test_a_reader_that_leaves_ends_the_command_quietly(loud):
    with subprocess.Popen(
        [*loud, "fill"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        assert process.wait(30) == 0
        assert process.stderr.read() == ""


TASK = """
import sys
import numpy as np, torch, fedcore

print("the file is loaded")
{at_import}

def data(source):
    print("reading", source)
    rng = np.random.default_rng(source)
    x = rng.normal(size=(30, 3)).astype("f4")
    return x, (x[:, 0] > 0).astype(int)

def train(model, rows, fit):
    print("training")
    {in_train}

task = fedcore.Task(
    "loud", data, lambda: torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy, train=train,
    sites={{"a": 1, "b": 2, "c": 3}},
)
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(at_import="", in_train="pass"):
        path = tmp_path / "loud.py"
        path.write_text(TASK.format(at_import=at_import, in_train=in_train))
        return str(path)

    return write


def ends(*arguments):
    with pytest.raises(SystemExit) as ended:
        commands.main(arguments)
    return ended.value.code


@pytest.mark.usefixtures("no_drawings")
@pytest.mark.parametrize(
    "command",
    [
        ("simulate", "--rounds", "1", "--protection", "plain", "--task"),
        (
            "compare",
            "--seeds",
            "1",
            "--folds",
            "2",
            "--rounds",
            "1",
            "--protection",
            "plain",
            "--task",
        ),
        ("plan", "--task"),
        ("check",),
    ],
    ids=lambda command: command[0],
)
def test_json_is_one_document_whatever_the_task_prints(task, capfd, command):
    assert ends(*command, task(), "--json") == 0
    out, err = capfd.readouterr()
    assert isinstance(json.loads(out), dict)
    assert "the file is loaded" in err and "reading 1" in err


@pytest.mark.parametrize(("code", "shown"), [("0", "0"), ("3", "3"), ("'why'", "'why'"), ("", "")])
def test_a_tasks_sys_exit_is_its_failure(task, capsys, code, shown):
    found = task(in_train=f"sys.exit({code})")
    assert ends("simulate", "--rounds", "1", "--protection", "plain", "--task", found) == 1
    err = capsys.readouterr().err
    assert (
        f"error: site a, round 1: task.train called sys.exit({shown})\nhint: raise an error" in err
    )


def test_a_task_file_that_ends_the_program_is_refused_with_a_remedy(task):
    with pytest.raises(TaskFailed, match="SystemExit while it was loaded") as failed:
        load_task(task(at_import="sys.exit(2)"))
    assert "__main__" in failed.value.remedy
    assert "sys.exit(2)" in failed.value.user_traceback


def test_an_interrupt_is_not_the_tasks_failure():
    with pytest.raises(KeyboardInterrupt), user_code("task.train"):
        raise KeyboardInterrupt
