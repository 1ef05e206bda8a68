"""Vectors on disk: uploads on their way in, a site's own vector, sums and checkpoints.

    FOLDER/JOB/ROUND/in/SITE/part-DIGEST-SIZE    an upload that is not complete: the offset is its length
    FOLDER/JOB/ROUND/in/SITE/whole-DIGEST        a complete one: synced, checked, renamed
    FOLDER/JOB/ROUND/NAME.chunks                 what `put` stored under a round, or (ROUND = kept) for long

All of them are chunk containers (`container.py`); ROUND is h, the digest of the round's header, in hex.
Invariants: a complete file has exactly the digest it is named for; nothing but a file's last bytes is
ever written twice; a crash at any instant leaves an upload where it can go on, a `put` there or not.
Two processes never share a spool: the journal's lock beside it sees to that.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import unquote

from fedcore.errors import BadInput, OffsetRefused, StoreFull, StoreProblem, VectorRefused
from fedcore.store import container
from fedcore.store.disk import make_folder, refusals, sync_folder
from fedcore.types import SiteId

_KEPT = "kept"
_GONE = ".gone-"
_PART = re.compile(r"part-([0-9a-f]{64})-([0-9]+)")
_LONGEST_NAME = 200
"""Bytes of a name as a path component: file systems take 255, and files are written under longer ones."""


@dataclass(frozen=True)
class Stored:
    """One complete container. size: bytes of its chunks, as signed; travels: bytes of the file."""

    path: Path
    digest: bytes
    size: int
    chunks: int

    @property
    def travels(self) -> int:
        """Bytes of an upload or download of it."""
        return self.size + container.overhead(self.chunks)


class Incoming:
    """One upload: where it stands, what comes next, and its end. Made by `Spool.upload`."""

    def __init__(self, spool: Spool, site: SiteId, part: Path, digest: bytes, size: int) -> None:
        self._spool, self._site, self._part = spool, site, part
        self._whole = part.with_name(f"whole-{digest.hex()}")
        self.digest, self.size = digest, size
        self.closed = False
        self.complete = self._whole.exists()
        self.offset = size if self.complete else _length(part)

    def write(self, offset: int, data: bytes) -> None:
        """Go on at `offset`, which must be where the last part ended.

        Raises OffsetRefused (`expected` is the right place), VectorRefused for more bytes than were
        announced or an upload that is over, StoreFull; the file is then as it was before.
        """
        self._check_open()
        if offset != self.offset:
            raise OffsetRefused(
                "vector", found=f"a part at {offset}", expected=self.offset, fault=self._site
            )
        if offset + len(data) > self.size:
            raise VectorRefused(
                "vector", found=f"{offset + len(data)} bytes or more", expected=self.size,
                fault=self._site,
            )  # fmt: skip
        with refusals("spool", self._part), self._still_there():
            _append(self._part, offset, data)
        self.offset = offset + len(data)

    def finish(self) -> Stored:
        """Check and sync what came: complete when this returns, or gone. A second call says the same.

        Raises OffsetRefused while bytes are missing; VectorRefused for another digest or no container,
        and then the upload begins anew at 0.
        """
        self._check_open()
        if not self.complete and self.offset != self.size:
            raise OffsetRefused(
                "vector", found=f"an end at {self.offset}", expected=self.offset, fault=self._site
            )
        with refusals("spool", self._part), self._still_there():
            found = self._checked(self._whole if self.complete else self._part)
            if not self.complete:
                _sync(self._part)
                self._part.replace(self._whole)
                sync_folder(self._whole.parent)
                self._spool._moved(self._part, self._whole, self.size)
                self.complete = True
        return Stored(self._whole, found.digest, found.size, found.chunks)

    @contextmanager
    def _still_there(self) -> Iterator[None]:
        """A file that vanished belongs to a round that was discarded meanwhile."""
        try:
            yield
        except FileNotFoundError:
            self.closed = True
            self._check_open()

    def _checked(self, path: Path) -> container.Vector:
        try:
            found = container.check(path, fault=self._site)
            if found.digest != self.digest:
                raise VectorRefused(
                    "vector", found="other bytes than were announced",
                    expected="the announced digest", fault=self._site,
                )  # fmt: skip
        except VectorRefused:
            path.unlink()
            self._spool._released(path)
            self.closed = True
            raise
        return found

    def _check_open(self) -> None:
        if self.closed:
            raise VectorRefused(
                "vector", found="a part of an upload that is over", expected="a new upload",
                fault=self._site,
            )  # fmt: skip


class Spool:
    """All vectors of one party under one folder, within a quota."""

    def __init__(self, folder: Path, quota_bytes: int | None = None) -> None:
        self.folder, self.quota = folder, quota_bytes
        self._busy = threading.RLock()
        self._open: dict[Path, Incoming] = {}
        with refusals("spool", folder):
            make_folder(folder)
            self._tidy()
            self._room = {each: _length(each) for each in folder.rglob("*") if each.is_file()}

    @property
    def used(self) -> int:
        """Bytes on disk, and those promised to uploads that are under way."""
        with self._busy:
            return sum(self._room.values())

    # -------------------------------------------------------------------------------- uploads

    def upload(self, job: str, header: bytes, site: SiteId, digest: bytes, size: int) -> Incoming:
        """Begin an upload of `size` bytes (as it travels), or go on with it: `.offset` is where.

        Room for all of it is taken now. A second call for the same site closes what the first returned.
        Raises StoreFull; VectorRefused for another vector than the one that is already complete.
        """
        folder = self._round(job, header) / "in" / _component(site)
        part = folder / f"part-{digest.hex()}-{size}"
        with self._busy, refusals("spool", folder):
            for other in list(folder.glob("*")):
                if other.name.startswith("whole-") and other.name != f"whole-{digest.hex()}":
                    raise VectorRefused(
                        "vector", found="another one than came before", expected="one a round",
                        fault=site,
                    )  # fmt: skip
                if _PART.fullmatch(other.name) and other != part:
                    other.unlink()
                    self._room.pop(other, None)
            before = self._open.pop(folder, None)
            if before is not None:
                before.closed = True
            make_folder(folder)
            incoming = Incoming(self, site, part, digest, size)
            if not incoming.complete:
                self._reserve(part, size)
                part.touch(mode=0o600)
            self._open[folder] = incoming
            return incoming

    def complete(self, job: str, header: bytes) -> dict[SiteId, Path]:
        """The complete uploads of a round, by site, in the order of their names."""
        folder = self._round(job, header) / "in"
        with refusals("spool", folder):
            found = sorted(folder.glob("*/whole-*"))
        return {SiteId(unquote(path.parent.name)): path for path in found}

    # -------------------------------------------------------------------- sums, checkpoints, own

    def put(self, job: str, name: str, chunks: Iterable[bytes], *, header: bytes = b"") -> Stored:
        """Store chunks under a name, whole or not at all; an earlier one of that name is replaced.

        header: of the round it goes with, for `discard`; without, it is kept until `remove` or `drop`.
        One chunk is in memory at a time. Raises StoreFull, and then the earlier one is still there.
        """
        path = self._named(job, name, header)
        beside = path.with_name(f".{path.name}.{threading.get_ident()}.{time.monotonic_ns()}")
        try:
            with refusals("spool", path):
                make_folder(path.parent)
                with _create(beside) as file:
                    found = container.write(file, chunks, lambda more: self._grow(beside, more))
                    file.flush()
                    os.fsync(file.fileno())
                beside.replace(path)
                sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                beside.unlink()
            self._released(beside)
            raise
        stored = Stored(path, found.digest, found.size, found.chunks)
        self._moved(beside, path, stored.travels)
        return stored

    def find(self, job: str, name: str, *, header: bytes = b"") -> Stored | None:
        """What `put` stored, read through and with its digest, or None."""
        path = self._named(job, name, header)
        if not path.exists():
            return None
        with refusals("spool", path):
            try:
                found = container.check(path, fault="this site")
            except VectorRefused as error:
                raise StoreProblem(
                    f"spool: {path}: found {error.found}, expected {error.expected}",
                    remedy="the file was damaged after it was stored: check the disk",
                ) from error
        return Stored(path, found.digest, found.size, found.chunks)

    def remove(self, job: str, name: str, *, header: bytes = b"") -> None:
        """Remove what `put` stored; nothing is done where it is not."""
        path = self._named(job, name, header)
        with self._busy, refusals("spool", path):
            path.unlink(missing_ok=True)
            self._room.pop(path, None)

    # -------------------------------------------------------------------------------- removal

    def discard(self, job: str, header: bytes) -> None:
        """Remove all of a round: uploads, complete or not, and what was put under it."""
        self._remove_folder(self._round(job, header))

    def drop(self, job: str) -> None:
        """Remove all of a job."""
        self._remove_folder(self.folder / _component(job))

    def jobs(self) -> list[str]:
        """The jobs that have something here."""
        with refusals("spool", self.folder):
            names = sorted(each.name for each in self.folder.iterdir() if each.is_dir())
        return [unquote(name) for name in names]

    def rounds(self, job: str) -> list[bytes]:
        """The headers' digests of rounds that have something here: after a restart, what to discard."""
        folder = self.folder / _component(job)
        with refusals("spool", folder):
            names = sorted(each.name for each in folder.glob("*") if each.is_dir())
        return [bytes.fromhex(name) for name in names if re.fullmatch("[0-9a-f]{64}", name)]

    def _remove_folder(self, folder: Path) -> None:
        """At once under another name, then file by file: a crash in between is tidied at the start."""
        with self._busy, refusals("spool", folder):
            for place in [each for each in self._open if folder in each.parents]:
                self._open.pop(place).closed = True
            gone = self.folder / f"{_GONE}{time.monotonic_ns()}"
            with suppress(FileNotFoundError):
                folder.rename(gone)
                shutil.rmtree(gone)
            for path in [each for each in self._room if folder in each.parents]:
                del self._room[path]

    def _tidy(self) -> None:
        """What a crash left: rounds half removed, and puts that did not end."""
        for path in self.folder.glob(f"{_GONE}*"):
            shutil.rmtree(path)
        for path in self.folder.rglob(".*.chunks.*"):
            path.unlink()

    # ------------------------------------------------------------------------- names and room

    def _round(self, job: str, header: bytes) -> Path:
        if len(header) != 32:
            raise BadInput(f"spool: found a header digest of {len(header)} bytes, expected 32")
        return self.folder / _component(job) / header.hex()

    def _named(self, job: str, name: str, header: bytes) -> Path:
        folder = self._round(job, header) if header else self.folder / _component(job) / _KEPT
        return folder / f"{_component(name)}.chunks"

    def _reserve(self, path: Path, size: int) -> None:
        with self._busy:
            used = self.used - self._room.get(path, 0)
            if self.quota is not None and used + size > self.quota:
                raise StoreFull(
                    f"spool {self.folder}: found {used} of {self.quota} bytes in use, expected room "
                    f"for {size} more",
                    remedy="raise the spool's quota, or wait until a round has ended",
                )
            self._room[path] = size

    def _grow(self, path: Path, more: int) -> None:
        with self._busy:
            self._reserve(path, self._room.get(path, 0) + more)

    def _moved(self, old: Path, new: Path, size: int) -> None:
        with self._busy:
            self._room.pop(old, None)
            self._room[new] = size

    def _released(self, path: Path) -> None:
        with self._busy:
            self._room.pop(path, None)


def _component(name: str) -> str:
    """A job, site or name as one path component, so that none can leave the folder or meet another."""
    safe = name.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    if safe.startswith("."):
        safe = "%2E" + safe[1:]
    if not safe or len(safe.encode()) > _LONGEST_NAME:
        raise BadInput(
            f"spool: found a name of {len(safe.encode())} bytes, expected 1 to {_LONGEST_NAME}"
        )
    return safe


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _append(path: Path, offset: int, data: bytes) -> None:
    """Write at the end; where not all of it fits, cut the file back and raise OSError."""
    handle = os.open(path, os.O_WRONLY)
    try:
        with _cut_back(handle, offset):
            left, at = memoryview(data), offset
            while left:
                written = os.pwrite(handle, left, at)
                left, at = left[written:], at + written
    finally:
        os.close(handle)


@contextmanager
def _cut_back(handle: int, length: int) -> Iterator[None]:
    try:
        yield
    except OSError:
        os.ftruncate(handle, length)
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _create(path: Path) -> IO[bytes]:
    """A new file, for this user only."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "wb")
