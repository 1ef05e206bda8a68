"""Jobs in forked processes: they end with their parent's function, and their errors arrive as they were raised."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import select
import signal
import threading
import time
import weakref
from pathlib import Path

import pytest

from fedcore import errors
from fedcore.errors import BadInput, FedcoreError, TaskFailed
from fedcore.experiment.forked import fork_refusal, run_forked
from fedcore.learning.device import accelerator_in_use


def ended(pid):
    """Whether a process is gone, or waits only for whoever has to read its exit code."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def wait_until(true, seconds=10.0):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


def forked(jobs, work, processes=2, on_message=lambda _job, _message: None):
    done = []
    run_forked(jobs, work, processes, on_message=on_message, on_done=done.append)
    return done


def for_ever(_job, send):
    send(os.getpid())
    while True:
        signal.pause()


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_every_job_runs_once_and_its_messages_arrive_in_order(processes):
    heard = {}

    def count(job, send):
        for number in range(job):
            send(number)

    done = forked(range(5), count, processes, lambda job, n: heard.setdefault(job, []).append(n))
    assert sorted(done) == [0, 1, 2, 3, 4]
    assert heard == {job: list(range(job)) for job in range(1, 5)}


def test_a_job_starts_from_its_parent_and_reaches_no_other_job():
    state = ["before"]

    def change(job, send):
        state.append(job)
        send(tuple(state))

    heard = []
    forked("ab", change, 1, lambda _job, found: heard.append(found))
    assert heard == [("before", "a"), ("before", "b")]
    assert state == ["before"]


def test_a_garbage_collection_of_a_job_leaves_out_what_it_inherits_and_collects_its_own():
    class Node:
        pass

    def in_a_circle():
        node = Node()
        node.itself = node
        return weakref.ref(node)

    gc.disable()  # or the parent may collect the circles before the fork
    inherited, frozen = [in_a_circle() for _ in range(3)], gc.get_freeze_count()

    def collect(_job, send):
        own = [in_a_circle() for _ in range(2)]
        gc.collect()
        send(([ref() is not None for ref in inherited], [ref() is None for ref in own]))

    heard = []
    try:
        forked("a", collect, 1, lambda _job, found: heard.append(found))
    finally:
        gc.enable()
    assert heard == [([True] * 3, [True] * 2)]
    assert gc.get_freeze_count() == frozen


def test_the_next_job_starts_while_the_process_of_the_last_one_ends():
    started, ready = os.pipe()
    lasting, last = os.pipe()

    def linger():
        assert os.read(started, 1) == b"."
        os.write(last, b"ended by itself")

    def work(job, _send):
        if job == "a":
            threading.Thread(target=linger).start()
        else:
            os.write(ready, b".")

    assert forked("ab", work, 1) == ["a", "b"]
    os.close(last)
    assert os.read(lasting, 20) == b"ended by itself"
    for end in (started, ready, lasting):
        os.close(end)


def spared(jobs, processes, work=lambda _job, _send: None):
    """The jobs that had ended when the parent had time to spare, once for each time."""
    done, calls = [], []
    run_forked(
        jobs, work, processes, on_message=lambda _job, _message: None, on_done=done.append,
        on_spare=lambda: calls.append(tuple(done)),
    )  # fmt: skip
    return calls


def test_the_parent_has_time_to_spare_while_the_last_job_runs():
    heard, told = os.pipe()

    def work(job, _send):
        if job == "last":  # it ends only once the parent has used the time
            assert select.select([heard], [], [], 10.0)[0]

    done = []
    run_forked(
        ["first", "last"], work, 2, on_message=lambda _job, _message: None, on_done=done.append,
        on_spare=lambda: os.write(told, b"."),
    )  # fmt: skip
    assert done == ["first", "last"]
    for end in (heard, told):
        os.close(end)


@pytest.mark.parametrize(
    ("jobs", "processes", "calls"),
    [("ab", 1, []), ("", 2, []), ("ab", 3, [()])],
    ids=["one process", "no job", "a process too many"],
)
def test_time_to_spare_is_while_fewer_jobs_run_than_could(jobs, processes, calls):
    assert spared(jobs, processes) == calls


def test_after_a_failed_job_the_parent_does_nothing_else():
    read, write = os.pipe()

    def fail(job, _send):
        if job == "b":
            os.write(write, str(os.getpid()).encode())
            raise TaskFailed(job)
        failed = int(os.read(read, 20))
        wait_until(lambda: ended(failed))

    calls = []
    with pytest.raises(TaskFailed):
        run_forked(
            "ab", fail, 2, on_message=lambda _job, _message: None, on_done=lambda _job: None,
            on_spare=lambda: calls.append("spare"),
        )  # fmt: skip
    assert calls == []
    for end in (read, write):
        os.close(end)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, ValueError, SystemExit])
def test_whatever_ends_the_function_ends_the_processes(raised):
    pids = []

    def hear(_job, pid):
        pids.append(pid)
        if len(pids) == 2:
            raise raised

    with pytest.raises(raised):
        forked("ab", for_ever, on_message=hear)
    assert len(pids) == 2 and all(map(ended, pids))


def test_a_job_does_not_see_the_ctrl_c_that_its_parent_gets():
    def interrupted(_job, send):
        os.kill(os.getpid(), signal.SIGINT)
        send("unharmed")

    heard = []
    assert forked("a", interrupted, on_message=lambda _job, text: heard.append(text)) == ["a"]
    assert heard == ["unharmed"]


def test_processes_end_when_their_parent_was_killed(tmp_path):
    def busy(job, send):
        (tmp_path / job).write_text(str(os.getpid()))
        while True:
            send(job)
            time.sleep(0.005)

    parent = multiprocessing.get_context("fork").Process(target=forked, args=("ab", busy))
    parent.start()
    wait_until(
        lambda: all((tmp_path / job).is_file() and (tmp_path / job).read_text() for job in "ab")
    )
    parent.kill()
    parent.join()
    pids = [(tmp_path / job).read_text() for job in "ab"]
    wait_until(lambda: all(map(ended, pids)))


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by SIGKILL"),
        (lambda: (faulthandler.disable(), os.abort()), "was killed by SIGABRT"),
        (lambda: os._exit(7), "ended with code 7"),
    ],
)
def test_a_process_that_ends_without_a_word_is_named(end, how):
    with pytest.raises(BadInput, match=f"seed 3: its process {how}") as refused:
        forked(["seed 3"], lambda _job, _send: end())
    assert ("memory" in refused.value.remedy) == ("SIGKILL" in how)


def test_of_two_jobs_that_fail_the_first_in_order_is_named_whichever_ends_first(tmp_path):
    second = tmp_path / "second"

    def fail(job, _send):
        if job == "second":
            second.write_text(str(os.getpid()))
            raise BadInput("second")
        wait_until(
            lambda: second.exists() and second.read_text() and ended(int(second.read_text()))
        )
        raise BadInput("first")

    with pytest.raises(BadInput, match=r"^first$"):
        forked(["first", "second"], fail)


def test_an_error_of_a_job_is_raised_with_what_it_carries():
    def fail(_job, _send):
        raise TaskFailed("site a: it raised", user_traceback="task.py line 7", remedy="mend it")

    with pytest.raises(TaskFailed, match="site a: it raised") as failed:
        forked("a", fail)
    assert failed.value.user_traceback == "task.py line 7"
    assert failed.value.remedy == "mend it"


class Stubborn(Exception):
    def __reduce__(self):
        raise TypeError("not me")


@pytest.mark.parametrize(
    ("raised", "seen"), [(KeyError("x"), KeyError), (Stubborn("y"), RuntimeError)]
)
def test_a_foreign_error_keeps_the_traceback_of_its_process(raised, seen):
    def fail(_job, _send):
        raise raised

    with pytest.raises(seen) as failed:
        forked(["seed 1"], fail)
    (note,) = failed.value.__notes__
    assert note.startswith("in the process of seed 1:") and "in fail" in note


@pytest.mark.parametrize(
    "error",
    [
        BadInput("what", remedy="how"),
        errors.UnknownName("task", "hart", ["heart"]),
        errors.PolicyRefused("no", word="policy", remedy="ask"),
        errors.GuardTripped(["a", "b"], 3, "the loss rose", found="7"),
        errors.CertificateRefused("no", check="host"),
        errors.RosterRefused("roster", 2, 3, "coordinator"),
        errors.RoundAbandoned("submit", 2, 3),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_with_other_arguments_than_a_message_are_the_same_after_pickling(error):
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, FedcoreError) and type(again) is type(error)
    assert (str(again), vars(again)) == (str(error), vars(error))


def test_a_run_on_a_gpu_is_not_forked():
    """Nor one that only looked for a GPU: the driver refuses a process forked after that."""
    assert "GPU" in fork_refusal(accelerator=accelerator_in_use("cuda"))
    assert fork_refusal(accelerator=accelerator_in_use("cpu")) == ""
