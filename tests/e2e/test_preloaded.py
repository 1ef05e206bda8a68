"""Forked processes stand in for started ones: exit codes, signals, streams, and no one outlives who asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.preloaded import SUPPORTED, preloaded

WAITS = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the real interpreter stands in here")


@pytest.mark.parametrize(
    "code",
    [
        "import sys; print(input()); sys.exit(7)",
        "import sys; sys.exit('wrong')",
        "raise KeyError('x')",
        "import os; os.kill(os.getpid(), 9)",
        "import atexit; atexit.register(print, 'last'); print('first', end=' ')",
    ],
)
def test_a_command_ends_as_the_real_interpreter_ends_it(code):
    ends = []
    for python in (sys.executable, preloaded().python):
        done = subprocess.run(
            [python, "-P", "-c", code], input="words", capture_output=True, text=True, timeout=120
        )
        ends.append((done.returncode, done.stdout, done.stderr.splitlines()[-1:]))
    assert ends[0] == ends[1]


def test_a_started_process_takes_signals(tmp_path):
    with (tmp_path / "log").open("wb") as log:
        process = preloaded().start(["-P", "-c", WAITS], env=os.environ, output=log)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == process.returncode == -signal.SIGTERM


def test_a_process_ends_with_the_one_that_asked_for_it():
    command = [preloaded().python, "-P", "-c", WAITS]
    asker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with asker:
        place = Path("/proc", asker.stdout.readline().strip())
        assert place.exists()
        asker.kill()
    until = time.monotonic() + 120
    while place.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_who_is_killed_before_it_has_asked_leaves_the_others_their_processes():
    """kill -9 between the connection and the request."""
    pool = preloaded()
    code = Path(pool.python).read_text()
    for sent in ("", "link.send(b'1'); ", "link.send(b'1234'); "):
        before, after = code.split("link.sendmsg(", 1)
        killed = before + f"{sent}os.kill(os.getpid(), 9)\nlink.sendmsg(" + after
        done = subprocess.run([sys.executable, "-ISS", "-c", killed, "-c", "pass"], timeout=120)
        assert done.returncode == -signal.SIGKILL
        done = subprocess.run(
            [pool.python, "-P", "-c", "print(6 * 7)"], capture_output=True, text=True, timeout=120
        )
        assert done.stdout == "42\n", done.stderr
