"""Frames over the pipes between a process and its child: a head in JSON, and blobs of bytes.

A frame is 4 bytes with the length of the head (big-endian), the head, and the blobs, whose lengths the
head gives under "blobs". No pickle: neither end runs what the other one sends.
Invariants: no frame has a longer head or more bytes of blobs than is allowed here, at either end. A child
that ended, sends anything but a frame or times out raises `ChildEnded`, with its name and the reason; it is
killed then, and a later call may start it again. Nothing a child prints can be taken for an answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TypeAlias

from fedcore.types import Json

Frame: TypeAlias = tuple[Json, list[bytes]]

MAX_HEAD = 1 << 24
"""Bytes of JSON: the wide integers of a statistics vector are the longest."""

MAX_BLOBS = 1 << 36
"""Bytes of all blobs of a frame: 64 for each of a thousand million parameters."""

_LENGTH = struct.Struct(">I")
_PIECE = 1 << 16
_LOOK_SECONDS = 1.0
"""Interval at which a child that neither reads nor writes is polled: its own children may keep its pipes open
after it ended."""


class ChildEnded(Exception):
    """The child has ended, and its state is lost."""


def python(module: str, *arguments: str) -> list[str]:
    """The command of a child that runs a module of this interpreter; the current folder is not on its path."""
    return [sys.executable, "-P", "-m", module, *arguments]


def _frame(head: Json, blobs: Sequence[bytes]) -> list[bytes]:
    """The pieces of a frame. Raises ValueError beyond the limits and for a float without a value."""
    data = json.dumps(head | {"blobs": [len(blob) for blob in blobs]}, allow_nan=False).encode()
    if len(data) > MAX_HEAD or sum(map(len, blobs)) > MAX_BLOBS:
        raise ValueError(f"frame: found it longer than {MAX_HEAD} and {MAX_BLOBS} bytes")
    return [_LENGTH.pack(len(data)) + data, *blobs]


def _read_frame(read: Callable[[int], bytes]) -> Frame:
    """The next frame of a stream. read: exactly so many bytes, or EOFError. Raises ValueError for another
    form and beyond the limits, before anything of that length is read."""
    (size,) = _LENGTH.unpack(read(_LENGTH.size))
    if size > MAX_HEAD:
        raise ValueError(f"frame: found a head of {size} bytes, expected at most {MAX_HEAD}")
    try:
        head = json.loads(read(size))
    except RecursionError as error:
        raise ValueError("frame: found a head too deep to read") from error
    lengths = head.pop("blobs", None) if isinstance(head, dict) else None
    if not isinstance(lengths, list) or not all(type(n) is int and n >= 0 for n in lengths):
        raise ValueError("frame: found a head without the lengths of blobs")
    if sum(lengths) > MAX_BLOBS:
        raise ValueError(
            f"frame: found {sum(lengths)} bytes of blobs, expected at most {MAX_BLOBS}"
        )
    return head, [read(length) for length in lengths]


def _end_with_reader(pipe: int) -> None:
    """End this process once nothing can read from a pipe any more: its reader ended, by kill -9 perhaps."""
    poll = select.poll()
    poll.register(pipe, 0)  # errors only
    poll.poll()
    os._exit(1)


class Parent:
    """The streams to the process that started this one."""

    def __init__(self, requests: IO[bytes], answers: IO[bytes]) -> None:
        self._requests, self._answers = requests, answers

    @classmethod
    def of_this_process(cls) -> Parent:
        """Use standard input and output for frames: what is printed from now on goes to standard error, and
        standard input is at its end for all other readers. This process ends with its parent, whatever it does
        then: one that trains would notice only when it is done."""
        answers = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        threading.Thread(target=_end_with_reader, args=(answers.fileno(),), daemon=True).start()
        requests = os.fdopen(os.dup(0), "rb")
        with Path(os.devnull).open("rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        return cls(requests, answers)

    def receive(self) -> Frame:
        """The next frame. Raises EOFError when the parent ended or closed, and ValueError."""
        return _read_frame(self._exactly)

    def _exactly(self, size: int) -> bytes:
        data = self._requests.read(size)
        if len(data) != size:
            raise EOFError
        return data

    def send(self, head: Json, blobs: Sequence[bytes] = ()) -> None:
        """Send a frame. Raises BrokenPipeError when the parent ended, and ValueError."""
        for piece in _frame(head, blobs):
            self._answers.write(piece)
        self._answers.flush()

    def serve(
        self,
        answer: Callable[[Json, list[bytes]], tuple[Json, Sequence[bytes]]],
        idle: Callable[[float], float | None] | None = None,
    ) -> None:
        """Answer each frame with one, until the parent ends. Raises what `answer` and `idle` raise.

        idle: a short piece of work, done while no frame waits. It takes the seconds since the last answer, and returns
        after how many more it is called again; None: not before the next frame.
        """
        while True:
            try:
                if idle is not None:
                    self._work_until_asked(idle)
                frame = self.receive()
            except EOFError:
                return
            found = answer(*frame)
            try:
                self.send(*found)
            except BrokenPipeError:
                return

    def _work_until_asked(self, idle: Callable[[float], float | None]) -> None:
        """Call `idle` until the next frame comes. The buffer of the stream is empty then: a parent sends one frame, and
        waits for its answer."""
        poll, began, pause = select.poll(), time.monotonic(), 0.0
        poll.register(self._requests, select.POLLIN)
        while not poll.poll(1000 * pause):
            found = idle(time.monotonic() - began)
            if found is None:
                return
            pause = found


class Child:
    """A process that answers frames. `start` starts it, and again once it has ended.

    name: in errors. env: variables beside this process's own. life: number of starts so far, since the state
    of a child is lost with each. One thread at a time uses it; `kill` and `close` may come from any. The
    thread that starts it should live as long as it does: a sandbox may end a child with that thread.
    """

    def __init__(
        self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.command, self._env = name, list(command), dict(env or {})
        self.life = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._requests = self._answers = -1
        self._in_use = threading.RLock()
        self._closed = False

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the current or last process; 0 before the first and after `close`."""
        return 0 if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process unless it is alive. Raises OSError, and ChildEnded after `close`."""
        with self._in_use:
            if self.alive:
                return
            self._forget()
            if self._closed:
                raise ChildEnded(f"{self.name}: found it closed, expected it to answer")
            self._process = process = subprocess.Popen(  # noqa: S603  # of this installation
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                env=os.environ | self._env,
            )  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            self._requests, self._answers = process.stdin.fileno(), process.stdout.fileno()
            os.set_blocking(self._requests, False)
            self.life += 1
            if self._closed:  # in another thread, which did not find this process yet
                process.kill()

    def call(
        self, head: Json, blobs: Sequence[bytes] = (), *, timeout: float | None = None
    ) -> Frame:
        """Send a frame and receive one: see `send` and `receive`."""
        with self._in_use:
            self.send(head, blobs)
            return self.receive(timeout=timeout)

    def send(self, head: Json, blobs: Sequence[bytes] = ()) -> None:
        """Send a frame. Raises ChildEnded, and ValueError for a frame beyond the limits."""
        pieces = _frame(head, blobs)
        with self._in_use:
            self._require_started()
            try:
                for piece in pieces:
                    data = memoryview(piece)
                    while data:
                        self._wait(self._requests, select.POLLOUT, None)
                        data = data[os.write(self._requests, data) :]
            except (OSError, EOFError) as error:
                raise self._ended(error) from error

    def receive(self, *, timeout: float | None = None) -> Frame:
        """The next frame. timeout: seconds to wait for it; None: without end. Raises ChildEnded."""
        until = None if timeout is None else time.monotonic() + timeout
        with self._in_use:
            self._require_started()
            try:
                return _read_frame(lambda size: self._read(size, until))
            except TimeoutError as error:
                raise self._ended(error, f"no answer after {timeout:g} s") from error
            except (OSError, EOFError, ValueError) as error:
                raise self._ended(error) from error

    def _require_started(self) -> None:
        if self._process is None:
            raise ChildEnded(f"{self.name}: found it not started, expected it to answer")

    def _read(self, size: int, until: float | None) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._wait(self._answers, select.POLLIN, until)
            piece = os.read(self._answers, min(size - len(data), _PIECE))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def _wait(self, pipe: int, event: int, until: float | None) -> None:
        """Wait for a pipe to take or give bytes. Raises EOFError where the process ended, TimeoutError."""
        poll = select.poll()
        poll.register(pipe, event)
        while True:
            alive = self.alive  # asked first: what it wrote before it ended is there then
            left = _LOOK_SECONDS if until is None else min(_LOOK_SECONDS, until - time.monotonic())
            if poll.poll(max(0.0, left) * 1000 if alive else 0):
                return
            if not alive:
                raise EOFError
            if left <= 0:
                raise TimeoutError

    def _ended(self, error: Exception, found: str = "") -> ChildEnded:
        """Kill it; returns the error to raise, which states what was found instead of an answer."""
        process = self._process
        assert process is not None
        if isinstance(error, ValueError):
            found = f"an answer in another form ({error})"
        elif not found:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_SECONDS)
            code = process.returncode
            found = "its pipes closed" if code is None else f"exit {code}"
            if code is not None and code < 0:
                found = f"its end by signal {-code}"
        self._forget()
        return ChildEnded(f"{self.name}: found {found}, expected an answer")

    def kill(self) -> None:
        """Kill the process: a thread that waits for its answer gets ChildEnded."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """Kill the process for good, and wait for its end."""
        self._closed = True
        self.kill()
        with self._in_use:
            self._forget()

    def _forget(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with process:  # closes its pipes and waits for its end
                process.kill()
