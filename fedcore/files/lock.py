"""A lock between processes, which the system releases when its holder ends in any way.

Invariant: the lock is of the process that took it. One that is forked from it does not hold it, so that after a
SIGKILL of the holder the lock is free at once, whatever it started.
"""

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

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
