"""Folders, fsync, and errors of the system as StoreProblem.

Invariant: every `OSError` is raised as a StoreProblem with one line and a hint; for lack of space it is a
StoreFull, so that a caller can wait for space without parsing the text.
"""

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from fedcore.errors import StoreFull, StoreProblem

LOG = logging.getLogger("fedcore.files")

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

FREE_SOME = "free some space, or raise the limit, and start again: it resumes where it stopped"


@contextmanager
def refusals(what: str, path: Path) -> Iterator[None]:
    """Raise StoreProblem or StoreFull for every OSError inside. what: the subject of its message."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _NO_ROOM:
            raise StoreFull(
                f"{what}: found no room for {path} ({reason}), expected some", remedy=FREE_SOME
            ) from error
        remedy = ""
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            remedy = f"give this user the right to write to {path.parent}, or name another folder"
        raise StoreProblem(f"{what}: found {path} unusable ({reason})", remedy=remedy) from error


def sync(path: Path, flags: int = 0) -> None:
    """Fsync the contents of a file. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """Fsync a folder, so that renamed and new files in it keep their names after a crash. Raises OSError."""
    sync(path, os.O_DIRECTORY)


@contextmanager
def flushed_beside(flush: Callable[[], None]) -> Iterator[None]:
    """Run a flush in a thread while the block flushes another file: two at once take about as long as one, for the
    file system commits them together. Raises what the block raises, or else what the flush raises."""
    running = _flusher().submit(flush)
    try:
        yield
    finally:
        wait([running])
    running.result()


@cache
def _flusher() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="flush")


def make_folder(path: Path) -> None:
    """Create the folder and its parents with mode 0700 and fsync their names; no-op where it exists."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    sync_folder(path.parent)


OTHERS = stat.S_IRWXG | stat.S_IRWXO
"""Rights of the group and of all other users: 0o077."""


def open_to_others(folder: Path, names: Iterable[str]) -> list[Path]:
    """The folder and, of its entries with these names (globs), every file and folder below that other
    users may read, write or enter. Symbolic links are not followed. Raises StoreProblem."""

    def walk(path: Path) -> Iterator[Path]:
        with suppress(FileNotFoundError):  # removed meanwhile by a running process
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
    """Set the umask to 0o077, and remove the rights of other users from the folder and from the named entries
    (an earlier version, or a person, may have made them with wider modes). Raises StoreProblem.

    names: globs of the entries that this program owns; other entries of the folder are not changed.
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
