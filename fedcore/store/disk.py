"""Folders and syncs, and what the system's refusals mean for a person.

Invariant: every `OSError` leaves the store as a StoreProblem with one line and a hint; where room was
the cause it is a StoreFull, so that a shell can wait for room and must not guess from a text.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedcore.errors import StoreFull, StoreProblem

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

FREE_SOME = "free some space, or raise the limit, and start again: it goes on where it stood"


def problem(what: str, path: Path, error: OSError) -> StoreProblem:
    """The error to raise for a refusal of the system: what, where, why, and the next step."""
    reason = error.strerror or str(error)
    if error.errno in _NO_ROOM:
        return StoreFull(
            f"{what}: found no room for {path} ({reason}), expected some", remedy=FREE_SOME
        )
    remedy = ""
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        remedy = f"give this user the right to write to {path.parent}, or name another folder"
    return StoreProblem(f"{what}: found {path} unusable ({reason})", remedy=remedy)


@contextmanager
def refusals(what: str, path: Path) -> Iterator[None]:
    """Raise StoreProblem for every OSError inside."""
    try:
        yield
    except OSError as error:
        raise problem(what, path, error) from error


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable: a renamed file is only there after a crash if they are."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """The folder and its parents, for this user only, durable; nothing is done where it exists."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    sync_folder(path.parent)
