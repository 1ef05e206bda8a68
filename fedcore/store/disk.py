"""Folders and syncs, and what the system's refusals mean for a person.

Invariant: every `OSError` leaves the store as a StoreProblem with one line and a hint; where room was
the cause it is a StoreFull, so that a shell can wait for room and must not guess from a text.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedcore.errors import StoreFull, StoreProblem

LOG = logging.getLogger("fedcore.store")

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


OTHERS = stat.S_IRWXG | stat.S_IRWXO
"""Rights of the group and of everybody else: 0o077."""


def open_to_others(folder: Path, names: Iterable[str]) -> list[Path]:
    """The folder and, of its entries with these names (globs), every file and folder below that other
    users may read, write or enter. Symbolic links are not followed. Raises StoreProblem."""

    def walk(path: Path) -> Iterator[Path]:
        with suppress(FileNotFoundError):  # a running process removed it meanwhile
            mode = path.lstat().st_mode
            if mode & OTHERS and not stat.S_ISLNK(mode):
                yield path
            if stat.S_ISDIR(mode):
                for each in path.iterdir():
                    yield from walk(each)

    with refusals("folder", folder):
        if not folder.is_dir():
            return []
        found = [folder] if folder.stat().st_mode & OTHERS else []
        for each in sorted({path for name in names for path in folder.glob(name)}):
            found += walk(each)
    return found


def close_to_others(folder: Path, names: Iterable[str]) -> None:
    """Files that this process makes from now on are its user's alone (umask 0o077), and so are the folder
    and what an earlier version, or a person, left more open in it. Raises StoreProblem.

    names: globs of the entries that this program owns; other entries of the folder are left alone.
    """
    os.umask(OTHERS)
    found = open_to_others(folder, names)
    for path in found:
        with refusals("folder", path):
            path.chmod(stat.S_IMODE(path.lstat().st_mode) & ~OTHERS)
    if found:
        LOG.warning(
            "folder %s: found %d files and folders open to other users, as %s; closed to all but this user",
            folder, len(found), found[-1],
        )  # fmt: skip
