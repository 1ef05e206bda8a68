"""A lock between processes, which the system releases when its holder ends in any way.

Invariant: the lock is of the process that took it. One that is forked from it does not hold it, so that after a
SIGKILL of the holder the lock is free at once, whatever it started.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedcore.errors import BadInput

WAIT_SECONDS = 10.0
"""How long a command waits for another one that changes the same files; each takes seconds at most."""

_held: set[int] = set()


class FileLock:
    """An exclusive lock on a file, which holds the id of the process that has it."""

    def __init__(self, path: Path, refusal: Callable[[str], Exception]) -> None:
        """Take the lock. refusal: what is raised where another has it, from its process id. Raises OSError, also
        where the file system has no locks."""
        self._path, self._handle = path, -1
        while self._handle < 0:
            self._handle = _taken(path, refusal)
        _held.add(self._handle)
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)

    @property
    def released(self) -> bool:
        """Whether the lock was given back."""
        return self._handle < 0

    def release(self, *, remove: bool = False) -> None:
        """Give the lock back. remove: delete its file as well. Idempotent."""
        if self._handle not in _held:
            return
        if remove:
            with suppress(OSError):  # its folder may be gone
                self._path.unlink()
        _held.discard(self._handle)
        os.close(self._handle)
        self._handle = -1


@contextmanager
def one_at_a_time(path: Path, what: str, *, remove: bool = False) -> Iterator[None]:
    """Hold a lock while inside, after waiting for commands that have it. what: that they change, for the message;
    remove: its file afterwards. Raises BadInput where another has it for long, OSError as `FileLock`."""

    def held(process: str) -> BadInput:
        return BadInput(
            f"{what}: found another command changing it (process {process}), expected none",
            remedy="wait until it ends, and repeat this one",
        )

    until = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            lock = FileLock(path, held)
            break
        except BadInput:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)
    try:
        yield
    finally:
        lock.release(remove=remove)


def _taken(path: Path, refusal: Callable[[str], Exception]) -> int:
    """The descriptor of the locked file; -1 where its holder removed it while this process opened it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
    except BlockingIOError as error:
        holder = os.pread(handle, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise refusal(holder) from error
    except OSError:
        os.close(handle)
        raise
    os.close(handle)
    return -1


def _leave_to_parent() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_leave_to_parent)
