"""Frames between a process and its child: what is sent arrives, and a child that fails is named and gone."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from fedcore.runtime import pipes
from fedcore.runtime.pipes import Child, ChildEnded, Parent, python

ECHO = """
import os, sys, time
from fedcore.runtime.pipes import Parent

def answer(head, blobs):
    print("not an answer", flush=True)
    os.write(1, b"nor this")
    return {**head, "stdin": sys.stdin.read(), "sizes": [len(b) for b in blobs]}, blobs

Parent.of_this_process().serve(answer)
"""
RAW = """
import sys, time
sys.stdin.buffer.read({taken})
sys.stdout.buffer.write({data})
sys.stdout.buffer.flush()
{then}
"""
HANGS = "import time; time.sleep(60)"


def child(code, **env):
    found = Child("the worker", [sys.executable, "-c", textwrap.dedent(code)], env)
    found.start()
    return found


@pytest.fixture
def echo():
    found = child(ECHO)
    yield found
    found.close()


def runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def frame(head, *blobs):
    return struct.pack(">I", len(head)) + head + b"".join(blobs)


def refused(worker, match, **how):
    """What a call raises; the child is gone afterwards."""
    pid = worker.pid
    with pytest.raises(ChildEnded, match=match) as raised:
        worker.call({}, **how)
    assert str(raised.value).startswith("the worker: found ")
    assert not worker.alive
    assert not runs(pid)


# ------------------------------------------------------------------------------------ frames


def test_a_frame_arrives_whole_in_both_directions(echo):
    large = os.urandom(3 << 20)  # many times what a pipe holds
    for blobs in ([], [b""], [b"abc", b"", large], [large]):
        head, found = echo.call({"n": 1}, blobs)
        assert head == {"n": 1, "stdin": "", "sizes": list(map(len, blobs))}
        assert found == blobs
    assert echo.life == 1


def test_what_a_child_prints_is_no_answer(capfd):
    worker = child(ECHO)
    assert worker.call({})[0] == {"stdin": "", "sizes": []}
    worker.close()
    assert "not an answer\nnor this" in capfd.readouterr().err


WORKS = """
from fedcore.runtime.pipes import Parent
done = []

def idle(seconds):
    assert seconds >= 0
    done.append(len(done) % 3)
    return None if done[-1] == 2 else 0.001

Parent.of_this_process().serve(lambda head, blobs: ({"done": done}, []), idle)
"""


def test_a_child_works_between_frames_for_as_long_as_it_has_something_to_do():
    """Three steps after the start and after each answer, or fewer where the next frame comes before."""
    worker, found = child(WORKS), []
    until = time.monotonic() + 60
    while found[-3:] != [0, 1, 2]:
        assert time.monotonic() < until
        time.sleep(0.01)  # not a wait: frames that come at once leave no time to work
        found = worker.call({})[0]["done"]
    worker.close()


HALF = np.broadcast_to(np.uint8(0), pipes.MAX_BLOBS // 2 + 1)
"""As long as half of what a frame may hold, without the memory."""


@pytest.mark.parametrize(
    ("head", "blobs"),
    [({"a": "b" * pipes.MAX_HEAD}, []), ({}, [HALF, HALF])],
    ids=["head", "blobs"],
)
def test_a_frame_beyond_the_limits_is_not_sent(echo, head, blobs):
    with pytest.raises(ValueError, match="frame: found it longer"):
        echo.call(head, blobs)
    assert echo.call({})[1] == []  # nothing of it was sent


def test_a_float_without_a_value_is_not_sent(echo):
    with pytest.raises(ValueError, match="Out of range float"):
        echo.call({"loss": float("nan")})
    assert echo.call({"loss": 0.5})[0]["loss"] == 0.5


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", pipes.MAX_HEAD + 1),
        frame(b"no json"),
        frame(b"[]"),
        frame(b"{}"),
        frame(b'{"blobs": 1}'),
        frame(b'{"blobs": [-1]}'),
        frame(b'{"blobs": [true]}'),
        frame(b'{"blobs": [1.0]}'),
        frame(b'{"blobs": [68719476737]}'),
        frame(b'{"blobs": [68719476736, 1]}'),
        frame(b"\xff\xff"),
        frame(b"[" * 100_000),
    ],
)
def test_an_answer_in_another_form_ends_the_child_at_once(data):
    """It would otherwise be read until the memory is full, or taken for the next answer."""
    refused(child(RAW.format(taken=1, data=data, then=HANGS)), "another form", timeout=60)


def test_a_frame_that_breaks_off_is_the_end_for_both():
    whole = frame(b'{"blobs": [3]}', b"abc")
    parent = Parent(io.BytesIO(whole), io.BytesIO())
    assert parent.receive() == ({}, [b"abc"])
    for size in range(len(whole)):
        with pytest.raises(EOFError):
            Parent(io.BytesIO(whole[:size]), io.BytesIO()).receive()
        if size % 7 == 0:
            refused(child(RAW.format(taken=1, data=whole[:size], then="")), "exit 0")


# ------------------------------------------------------------------------------------ deaths


def test_a_child_that_exits_is_named_with_its_code_and_starts_again():
    worker = child(RAW.format(taken=1, data=b"", then="raise SystemExit(3)"))
    for life in (1, 2):
        assert worker.life == life
        refused(worker, "found exit 3, expected an answer")
        with pytest.raises(ChildEnded, match="not started"):
            worker.call({})
        worker.start()
    worker.close()


def test_a_child_that_is_killed_between_two_calls_is_named_with_the_signal(echo):
    echo.call({})
    os.kill(echo.pid, signal.SIGKILL)
    refused(echo, "found its end by signal 9")
    echo.start()
    assert echo.call({})[1] == []
    assert echo.life == 2


def test_a_child_that_ends_while_it_is_sent_something_is_named():
    worker = child(RAW.format(taken=1, data=b"", then="raise SystemExit(4)"))
    pid = worker.pid
    with pytest.raises(ChildEnded, match="found exit 4"):
        worker.call({}, [bytes(16 << 20)])
    assert not runs(pid)


def test_a_child_that_gives_no_answer_in_time_is_ended():
    worker, began = child(HANGS), time.monotonic()
    refused(worker, "found no answer after 0.3 s", timeout=0.3)
    assert 0.3 <= time.monotonic() - began < 30


def test_a_child_that_stops_in_the_middle_of_an_answer_is_ended():
    worker = child(RAW.format(taken=1, data=frame(b'{"blobs": [3]}', b"a"), then=HANGS))
    refused(worker, "found no answer after 1 s", timeout=1)


def test_the_end_of_a_child_is_noticed_though_its_own_child_keeps_the_pipes_open():
    code = """
    import os, sys, time
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    os._exit(5)
    """
    worker, began = child(code), time.monotonic()
    refused(worker, "found exit 5")
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("end", ["kill", "close"])
def test_whoever_waits_finds_a_child_that_another_thread_ended(end):
    worker = child(HANGS)
    timer = threading.Timer(0.2, getattr(worker, end))
    timer.start()
    refused(worker, "found its end by signal 9")
    timer.join()


def test_a_closed_child_does_not_start_again(echo):
    pid = echo.pid
    echo.close()
    assert not runs(pid)
    assert not echo.alive
    with pytest.raises(ChildEnded, match="found it closed"):
        echo.start()
    echo.close()


def test_a_child_ends_with_the_stream_of_its_parent():
    answers = io.BytesIO()
    Parent(io.BytesIO(frame(b'{"blobs": []}')), answers).serve(lambda head, blobs: (head, blobs))
    assert answers.getvalue() == frame(b'{"blobs": []}')


BUSY_CHILD = """
import time
from fedcore.runtime.pipes import Parent
def busy(head, blobs):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        {work}
Parent.of_this_process().serve(busy)
"""
KILLED = """
import os, signal, sys, time
from fedcore.runtime.pipes import Child
worker = Child("a worker", [sys.executable, "-c", {code!r}])
worker.start()
worker.send({{}})
time.sleep(0.1)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    "work", ["pass", "time.sleep(60)", "sum(range(10**6))", "sorted(range(10**6))"]
)
def test_a_busy_child_ends_within_five_seconds_after_its_parent_was_killed(work):
    """Both hold this test's standard error open: it is at its end when neither runs."""
    code = KILLED.format(code=BUSY_CHILD.format(work=work))
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    assert parent.wait(timeout=30) == -signal.SIGKILL
    _, said = parent.communicate(timeout=5)
    assert said == b""


def test_the_environment_of_a_child_is_this_one_and_its_own_variables():
    code = ECHO.replace("**head", '"kept": os.environ["PATH"], "own": os.environ["OWN"]')
    worker = child(code, OWN="yes")
    head, _ = worker.call({})
    assert (head["kept"], head["own"]) == (os.environ["PATH"], "yes")
    worker.close()


def test_a_module_is_run_by_this_interpreter_without_the_current_folder():
    assert python("fedcore.cli", "x") == [sys.executable, "-P", "-m", "fedcore.cli", "x"]
