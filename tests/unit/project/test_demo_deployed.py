"""scripts/demo --deployed: what it starts ends with it, and what it does not take is refused."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.scripts import SCRIPTS, load_script
from support.secrets_found import processes_of

demo = load_script("demo_deployed.py")
MARK = "FEDCORE_TEST_MARK"


@pytest.fixture
def commands(tmp_path):
    found = demo.Commands(tmp_path, {"sh": ["sh"]}, {MARK: str(tmp_path)})
    yield found
    found.end()


def test_a_command_gets_a_line_and_gives_its_output(commands):
    assert commands.run("sh -c 'read x; echo got $x; echo aside >&2'", line="it\n") == "got it\n"
    assert commands.said == [("sh -c 'read x; echo got $x; echo aside >&2'", "got it\n", "aside\n")]


def test_another_exit_code_than_expected_is_an_error_with_what_was_said(commands):
    with pytest.raises(demo.CommandFailed, match="exit code 3\nwhy"):
        commands.run("sh -c 'echo why; exit 3'")
    assert commands.run("sh -c 'exit 3'", code=3) == ""


def test_commands_run_side_by_side_and_answer_in_their_order(commands):
    """Each waits for the other's file, so that neither ends alone."""
    meet = "sh -c 'echo > {0}; until [ -e {1} ]; do sleep 0.01; done; read x; echo {0} got $x'"
    both = {meet.format("a", "b"): "one\n", meet.format("b", "a"): "two\n"}
    assert [*commands.run_all(both)] == ["a got one\n", "b got two\n"]


def test_of_commands_side_by_side_none_is_left_after_one_failed(commands, tmp_path):
    with pytest.raises(demo.CommandFailed, match="exit code 3"):
        [*commands.run_all({"sh -c 'exit 3'": "", "sh -c 'exec sleep 100'": ""})]
    assert processes_of(str(tmp_path)) == {}


def test_a_process_that_ends_before_it_is_ready_is_an_error_with_its_log(commands):
    commands.begin("hub", "sh -c 'echo no port; exit 2'")
    with pytest.raises(demo.CommandFailed, match="exit code 2\nno port"):
        commands.ready("hub", "listening")


def test_no_process_is_left_of_what_was_started(commands, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "GRACE_SECONDS", 0.2)
    commands.begin("deaf", "sh -c 'trap : TERM; sleep 100 & echo ready; wait; wait'", "ready")
    commands.begin("other", "sh -c 'echo ready; sleep 100'", "ready")
    assert len(processes_of(str(tmp_path))) >= 6, "the control: they and what they started"
    commands.end()
    commands.until(lambda: not processes_of(str(tmp_path)), "all of them to end")


def test_words_after_the_flag_are_refused():
    done = subprocess.run(
        [sys.executable, "-P", SCRIPTS / "demo_deployed.py", "--rounds"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    error, hint = done.stderr.splitlines()
    assert error == "error: found '--rounds', expected nothing after --deployed"
    assert hint == "hint: scripts/demo --deployed"


def test_an_interrupted_demo_leaves_no_process_and_no_folder(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-P", SCRIPTS / "demo_deployed.py"], stdout=subprocess.PIPE, text=True,
        env=os.environ | {MARK: str(tmp_path)}, start_new_session=True,
    ) as process:  # fmt: skip
        said = ""
        while "fed-coordinator invite" not in said:  # the coordinator listens
            line = process.stdout.readline()
            assert line, said
            said += line
        folder = Path(re.match("everything is in (.*) until the end", said)[1])
        assert (folder / "hospitals" / "authority" / "key.pem").exists()
        process.send_signal(signal.SIGINT)
        said += process.stdout.read()
    assert process.returncode == 130
    assert said.endswith(f"ended all processes and removed {folder}\n")
    assert not folder.exists()
    assert processes_of(str(tmp_path)) == {}
