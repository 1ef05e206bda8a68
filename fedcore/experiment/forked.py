"""Several jobs at once, each in a process that is forked from this one.

A fork takes some 7 ms, where a new interpreter takes 3 s of CPU to import torch, and it brings along tasks that
cannot be pickled: lambdas, and what was made in a notebook. Every job starts from this process as it is now, so
what one job leaves behind in its process reaches no other.

Invariant: when `run_forked` returns or raises, no process that it started is alive; one whose parent was killed
ends at its next message.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, Generic, TypeVar

from fedcore.errors import EXIT_INTERRUPTED, BadInput

J = TypeVar("J")
M = TypeVar("M")

TICK_SECONDS = 1.0
"""The longest pause between two calls of `on_tick`."""

END_SECONDS = 5.0
"""How long a process may take to end after its job: a task may have left threads behind."""


def fork_refusal(*, accelerator: bool) -> str:
    """Why jobs cannot run in forked processes here, empty where they can. accelerator: it is in use already."""
    if sys.platform != "linux":  # macOS has fork, but its frameworks crash in the child
        return f"processes cannot be forked safely on {sys.platform}"
    return "a GPU in use cannot be shared with forked processes" if accelerator else ""


@dataclass(frozen=True)
class _Ended:
    """The last message of a process. error: what its job raised."""

    error: BaseException | None


@dataclass(frozen=True)
class _Running(Generic[J, M]):
    job: J
    process: ForkProcess
    connection: Connection[object, M | _Ended]


def run_forked(
    jobs: Iterable[J],
    work: Callable[[J, Callable[[M], None]], object],
    processes: int,
    *,
    on_message: Callable[[J, M], object],
    on_done: Callable[[J], object],
    on_tick: Callable[[], object] = lambda: None,
    on_spare: Callable[[], object] = lambda: None,
) -> None:
    """Run `work(job, send)` for every job, up to so many at once.

    on_message: called here with what a job sends; on_done: with each job that has ended; on_tick: at least every
    second; on_spare: once, when fewer jobs than that are left, which go on meanwhile.
    Raises what the first job in order raises that raises anything, whichever ends first: later ones are killed,
    earlier ones end. Raises BadInput, which names the job, where its process ended without a word.
    """
    waiting, running, ended = deque(jobs), list[_Running[J, M]](), list[_Running[J, M]]()
    failed: BaseException | None = None
    spare = False
    try:
        while waiting or running or ended:
            while waiting and len(running) < processes:
                others = [each.connection for each in (*running, *ended)]
                running.append(_start(waiting.popleft(), work, others))
            while ended:  # the next job runs already
                ended[0].process.join(END_SECONDS)
                _kill(ended[:1])
                on_done(ended.pop(0).job)
            if running and len(running) < processes and not spare and failed is None:
                spare = True
                on_spare()
            ready = wait([each.connection for each in running], TICK_SECONDS) if running else []
            for each in [each for each in running if each.connection in ready]:
                if each not in running:  # killed: an earlier one failed
                    continue
                message = _receive(each)
                if not isinstance(message, _Ended):
                    on_message(each.job, message)
                    continue
                place = running.index(each)
                if message.error is None:
                    ended.append(running.pop(place))
                    continue
                each.process.join(END_SECONDS)
                failed = message.error
                waiting.clear()
                _kill(running[place:])
                del running[place:]
            on_tick()
        if failed is not None:
            raise failed
    finally:
        _kill([*running, *ended])


def _kill(running: Sequence[_Running[J, M]]) -> None:
    for each in running:
        each.process.kill()
    for each in running:
        each.process.join()
        each.connection.close()


def _start(
    job: J,
    work: Callable[[J, Callable[[M], None]], object],
    others: Sequence[Connection[object, M | _Ended]],
) -> _Running[J, M]:
    """Fork a process for the job. others: of the processes that run already, whose pipes it must not keep open."""
    ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
    try:
        about = job, work, theirs, [ours, *others], os.getpid()
        return _Running(job, forked(_work, about, f"fedcore {job}"), ours)
    finally:
        theirs.close()


def forked(target: Callable[..., object], about: tuple[Any, ...], name: str) -> ForkProcess:
    """A started process that calls `target(*about)`, which begins with `settle`."""
    process = multiprocessing.get_context("fork").Process(target=target, args=about, name=name)
    # A Ctrl-C between the fork and the child's first line would end the child with a traceback.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process


def settle(others: Iterable[Connection[Any, Any]]) -> None:
    """The first lines of a forked process. others: the pipes of other processes, which it must not keep open."""
    # A garbage collection that goes through what is inherited copies its memory, page by page.
    gc.freeze()
    # The terminal sends Ctrl-C to every process of the command; the parent then kills this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    for other in others:
        other.close()


def _work(
    job: J,
    work: Callable[[J, Callable[[M], None]], object],
    connection: Connection[M | _Ended, object],
    others: Sequence[Connection[object, M | _Ended]],
    parent: int,
) -> None:
    """The whole life of a forked process."""
    settle(others)

    def send(message: M | _Ended) -> None:
        if os.getppid() != parent:
            os._exit(EXIT_INTERRUPTED)
        connection.send(message)

    error: BaseException | None = None
    try:
        work(job, send)
    except BaseException as raised:  # noqa: BLE001 - it is raised again in the parent
        error = portable(raised, job)
    send(_Ended(error))


def portable(error: BaseException, job: object) -> BaseException:
    """The error itself if it can be pickled, with the traceback that it had in this process as a note."""
    lines = "".join(traceback.format_exception(error))
    try:
        found: BaseException = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    except Exception:  # noqa: BLE001 - whatever a foreign class does when it is pickled
        found = RuntimeError(f"{job}: {type(error).__name__}: {error}")
    if not hasattr(found, "remedy"):
        found.add_note(f"in the process of {job}:\n{lines}")
    return found


def _receive(each: _Running[J, M]) -> M | _Ended:
    with suppress(EOFError, ConnectionResetError):
        return each.connection.recv()
    each.process.join()
    code = each.process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    raise BadInput(
        f"{each.job}: its process {how}",
        remedy="if memory ran out: fewer --workers" if code == -signal.SIGKILL else "",
    )


@contextmanager
def ticking(on_tick: Callable[[], object]) -> Iterator[None]:
    """Call `on_tick` every second in a thread while the block computes. Not around a fork: a lock that the thread
    holds at that moment would stay locked in the child."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(TICK_SECONDS):
            on_tick()

    thread = threading.Thread(target=run, name="fedcore progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
