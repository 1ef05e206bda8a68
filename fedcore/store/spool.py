"""Vectors on disk: uploads on their way in, a site's own vector, sums and checkpoints.

    FOLDER/JOB/ROUND/in/part-DIGEST-SIZE-SITE    an upload that is not complete: the offset is its length
    FOLDER/JOB/ROUND/in/whole-DIGEST-SITE        a complete one: checked, synced, renamed
    FOLDER/JOB/ROUND/in/small-DIGEST-SITE        a complete one that was not synced
    FOLDER/JOB/ROUND/NAME.chunks                 what `put` stored under a round, or (ROUND = kept) until removed

All of them are chunk containers (`container.py`); ROUND is h, the digest of the round's header, in hex,
and DIGEST that of the vector, in base 64. A site has one upload in a round.
Invariants: a complete file has exactly the digest in its name; only the last bytes of a file are ever
rewritten; after a crash at any instant an upload can be resumed, and a `put` is complete or absent.
A small file may be left without fsync (`unsynced`) by a caller that keeps its bytes elsewhere: after a power
cut it may be missing or damaged. Such an upload is deleted at the next start, and the caller restores it from
its own copy (`give_back`); a `put` is repeated.
The lock of the journal in the same folder keeps two processes from sharing a spool.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from fedcore.errors import BadInput, OffsetRefused, StoreFull, VectorRefused
from fedcore.files.disk import make_folder, refusals, sync, sync_folder
from fedcore.store import container
from fedcore.types import SiteId

_KEPT = "kept"
_GONE = ".gone-"
_UPLOAD = re.compile(r"(?:part-[A-Za-z0-9_-]{43}-[0-9]+|whole-[A-Za-z0-9_-]{43})-(?P<site>.+)")
_PART, _WHOLE, _SMALL = "part-", "whole-", "small-"
_LONGEST_NAME, _LONGEST_SITE = 200, 192
"""Bytes of a name as a path component: file systems allow 255, and temporary files have longer names."""


@dataclass(frozen=True)
class Stored:
    """One complete container. size: bytes of its chunks, as signed; travels: bytes of the file."""

    path: Path
    digest: bytes
    size: int
    chunks: int

    @property
    def travels(self) -> int:
        """Bytes of an upload or download of it: the whole file."""
        return self.size + container.overhead(self.chunks)


class IncomingUpload:
    """One upload in progress. Made by `Spool.upload`.

    digest: of the vector, 32 bytes. size: bytes of the whole container. offset: bytes received so far.
    """

    def __init__(
        self, spool: Spool, site: SiteId, part: Path, there: Path | None, digest: bytes, size: int
    ) -> None:
        self._spool, self._site, self._part, self._there = spool, site, part, there
        self.digest, self.size = digest, size
        self.closed = False
        self.offset = size if self.complete else _length(self._part)

    @property
    def complete(self) -> bool:
        """Whether all bytes arrived and have the announced digest."""
        return self._there is not None

    def write(self, offset: int, data: bytes) -> None:
        """Append a part at `offset`, which must be the end of the last part.

        Raises OffsetRefused (`expected` is the right offset), VectorRefused for more bytes than were
        announced or a closed upload, StoreFull; the file is then unchanged.
        """
        self._check_open()
        if offset != self.offset:
            raise OffsetRefused("vector", f"a part at {offset}", self.offset, self._site)
        end = offset + len(data)
        if end > self.size:
            raise VectorRefused("vector", f"{end} bytes or more", self.size, self._site)
        with refusals("spool", self._part), self._still_there():
            _append(self._part, offset, data)
        self.offset = end

    def finish(self, *, unsynced: int = 0) -> Stored:
        """Check the upload, fsync it and mark it complete. Idempotent.

        unsynced: up to this size in bytes the file is not fsynced.
        Raises OffsetRefused while bytes are missing; VectorRefused for another digest or no container;
        then the file is deleted and the upload starts again at 0.
        """
        self._check_open()
        if not self.complete and self.offset != self.size:
            raise OffsetRefused("vector", f"an end at {self.offset}", self.offset, self._site)
        small = self.size <= unsynced
        with refusals("spool", self._part), self._still_there():
            before = self._there or self._part
            found = self._checked(before)
            after = _complete(before, _SMALL if small else _WHOLE, self.digest, self._site)
            if before != after and not before.name.startswith(_WHOLE):
                if not small:
                    sync(before)
                with self._spool._busy:  # missing after a newer upload of another vector
                    before.replace(after)
                    self._spool._moved(before, after, self.size)
                    self._spool._know(self._site, after)
                    self._there = after
            assert self._there is not None
            if not small:
                self._spool._settle(self._there.parent)
        return Stored(self._there, found.digest, found.size, found.chunks)

    @contextmanager
    def _still_there(self) -> Iterator[None]:
        """Closes the upload if its file is missing: its round was discarded meanwhile."""
        try:
            yield
        except FileNotFoundError:
            self.closed = True
            self._check_open()

    def _checked(self, path: Path) -> container.Vector:
        try:
            found = container.check(path, fault=self._site)
            if found.digest != self.digest:
                other = "other bytes than were announced"
                raise VectorRefused("vector", other, "the announced digest", self._site)
        except VectorRefused:
            path.unlink()
            self._spool._released(path)
            self._spool._know(self._site, path, gone=True)
            self.closed = True
            raise
        return found

    def _check_open(self) -> None:
        if self.closed:
            over = "a part of an upload that is over"
            raise VectorRefused("vector", over, "a new upload", self._site)


class Spool:
    """All vectors of one party under one folder, within a quota in bytes. Thread-safe."""

    def __init__(self, folder: Path, quota_bytes: int | None = None) -> None:
        self.folder, self.quota = folder, quota_bytes
        self._busy = threading.RLock()
        self._open: dict[tuple[Path, str], IncomingUpload] = {}
        self._uploads: dict[Path, dict[str, Path]] = {}
        """{a round's folder `in`: {site: its file}}, a cache that is filled at the first use of a round."""
        self._settled = {folder}
        """Folders whose names were fsynced."""
        with refusals("spool", folder):
            make_folder(folder)
            self._tidy()
            self._room = {each: _length(each) for each in folder.rglob("*") if each.is_file()}

    @property
    def used(self) -> int:
        """Bytes on disk, and those reserved for uploads in progress."""
        with self._busy:
            return sum(self._room.values())

    def upload(
        self, job: str, header: bytes, site: SiteId, digest: bytes, size: int
    ) -> IncomingUpload:
        """Begin or resume the upload of a container of `size` bytes; `.offset` of the result is where.

        Reserves space for all of it. A second call for the same site closes the earlier result.
        Raises StoreFull; VectorRefused for another vector than the one that is already complete.
        """
        folder, name = self._round(job, header) / "in", _component(site, _LONGEST_SITE)
        part = folder / f"{_PART}{_code(digest)}-{size}-{name}"
        whole, small = (_complete(part, kind, digest, site) for kind in (_WHOLE, _SMALL))
        with self._busy, refusals("spool", folder):
            here = self._files(folder)
            before = here.get(name)
            if before is not None and not before.exists():  # removed by another program
                self._released(here.pop(name))
                before = None
            if before is not None and before not in {part, whole, small}:
                if not before.name.startswith(_PART):
                    other = "another one than came before"
                    raise VectorRefused("vector", other, "one a round", site)
                before.unlink(missing_ok=True)
                self._released(before)
                del here[name]
            earlier = self._open.pop((folder, name), None)
            if earlier is not None:
                earlier.closed = True
            there = before if before in {whole, small} else None
            incoming = IncomingUpload(self, site, part, there, digest, size)
            if not incoming.complete:
                self._enter(folder)
                self._reserve(part, size)
                part.touch(mode=0o600)
                here[name] = part
            self._open[folder, name] = incoming
            return incoming

    def complete(self, job: str, header: bytes) -> dict[SiteId, Path]:
        """{site: path} of the complete uploads of a round, in the order of the names."""
        folder = self._round(job, header) / "in"
        with self._busy, refusals("spool", folder):
            found = sorted(self._files(folder).items())
            whole = [(n, p) for n, p in found if not p.name.startswith(_PART) and p.exists()]
        return {SiteId(unquote(name)): path for name, path in whole}

    def uploaded(self, job: str, header: bytes, site: SiteId, digest: bytes) -> Path | None:
        """The path of a site's complete upload, if it has this digest; else None."""
        path = self.complete(job, header).get(site)
        if path is None:
            return None
        names = (_complete(path, kind, digest, site) for kind in (_WHOLE, _SMALL))
        return path if path in names else None

    def give_back(self, job: str, header: bytes, site: SiteId, data: bytes) -> None:
        """Restore a complete upload from its bytes, which the caller kept elsewhere; without fsync. Raises
        StoreFull; BadInput for bytes that are no container."""
        digest = container.vector_digest(container.from_bytes(data))
        for _ in range(2):  # a damaged file is deleted at the first attempt
            incoming = self.upload(job, header, site, digest, len(data))
            with suppress(VectorRefused):
                if not incoming.complete:
                    incoming.write(incoming.offset, data[incoming.offset :])
                incoming.finish(unsynced=len(data))
                return

    def _files(self, folder: Path) -> dict[str, Path]:
        """{site: file} of the uploads of a round, from the cache."""
        if folder not in self._uploads:
            matches = ((_UPLOAD.fullmatch(path.name), path) for path in folder.glob("*"))
            self._uploads[folder] = {match["site"]: path for match, path in matches if match}
        return self._uploads[folder]

    def _know(self, site: SiteId, path: Path, *, gone: bool = False) -> None:
        """Update the cache for a site's upload, unless its round was discarded meanwhile."""
        with self._busy:
            here, name = self._uploads.get(path.parent, {}), _component(site, _LONGEST_SITE)
            if gone:
                here.pop(name, None)
            elif name in here:
                here[name] = path

    def put(
        self,
        job: str,
        name: str,
        chunks: Iterable[bytes],
        *,
        header: bytes = b"",
        unsynced: int = 0,
    ) -> Stored:
        """Store chunks under a name atomically; replaces an earlier file of that name.

        header: digest of the round it belongs to, for `discard`; empty: kept until `remove` or `drop`.
        unsynced: up to this size in bytes the file is not fsynced.
        One chunk is in memory at a time. Raises StoreFull; then the earlier file is unchanged.
        """
        path = self._named(job, name, header)
        beside = path.with_name(f".{path.name}.{threading.get_ident()}.{time.monotonic_ns()}")

        def reserve(more: int) -> None:
            self._reserve(beside, self._room.get(beside, 0) + more)

        try:
            with refusals("spool", path):
                self._enter(path.parent)
                handle = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(handle, "wb") as file:
                    found = container.write(file, chunks, reserve)
                    file.flush()
                    small = found.size + container.overhead(found.chunks) <= unsynced
                    if not small:
                        os.fsync(file.fileno())
                beside.replace(path)
                if not small:
                    self._settle(path.parent)
        except BaseException:
            with suppress(OSError):
                beside.unlink()
            self._released(beside)
            raise
        stored = Stored(path, found.digest, found.size, found.chunks)
        self._moved(beside, path, stored.travels)
        return stored

    def find(self, job: str, name: str, *, header: bytes = b"") -> Stored | None:
        """What `put` stored, read and verified, or None. Raises StoreProblem for a damaged file."""
        path = self._named(job, name, header)
        if not path.exists():
            return None
        with refusals("spool", path):
            try:
                found = container.check(path, fault="this site")
            except VectorRefused as error:
                raise container.damaged(path, error.found, error.expected) from error
        return Stored(path, found.digest, found.size, found.chunks)

    def remove(self, job: str, name: str, *, header: bytes = b"") -> None:
        """Remove what `put` stored. Idempotent."""
        path = self._named(job, name, header)
        with self._busy, refusals("spool", path):
            path.unlink(missing_ok=True)
            self._room.pop(path, None)

    def discard(self, job: str, header: bytes) -> None:
        """Remove everything of a round: uploads, complete or not, and what was put under it."""
        self._remove_folder(self._round(job, header))

    def drop(self, job: str) -> None:
        """Remove everything of a job."""
        self._remove_folder(self.folder / _component(job))

    def jobs(self) -> list[str]:
        """The jobs that have files here."""
        with refusals("spool", self.folder):
            names = sorted(each.name for each in self.folder.iterdir() if each.is_dir())
        return [unquote(name) for name in names]

    def rounds(self, job: str) -> list[bytes]:
        """The header digests of rounds that have files here, for the caller to discard after a restart."""
        folder = self.folder / _component(job)
        with refusals("spool", folder):
            names = sorted(each.name for each in folder.glob("*") if each.is_dir())
        return [bytes.fromhex(name) for name in names if re.fullmatch("[0-9a-f]{64}", name)]

    def _remove_folder(self, folder: Path) -> None:
        """Rename, then delete file by file; `_tidy` completes it after a crash in between."""
        with self._busy, refusals("spool", folder):
            for place in [each for each in self._open if folder in each[0].parents]:
                self._open.pop(place).closed = True
            for here in [each for each in self._uploads if folder in each.parents]:
                del self._uploads[here]
            self._settled = {e for e in self._settled if e != folder and folder not in e.parents}
            gone = self.folder / f"{_GONE}{time.monotonic_ns()}"
            with suppress(FileNotFoundError):
                folder.rename(gone)
                shutil.rmtree(gone)
            for path in [each for each in self._room if folder in each.parents]:
                del self._room[path]

    def _tidy(self) -> None:
        """Delete what a crash left: half removed rounds, unfinished puts, uploads without fsync."""
        for path in self.folder.glob(f"{_GONE}*"):
            shutil.rmtree(path)
        for path in [*self.folder.rglob(".*.chunks.*"), *self.folder.glob(f"*/*/in/{_SMALL}*")]:
            path.unlink()

    def _enter(self, folder: Path) -> None:
        """Make a folder without fsync; `_settle` fsyncs its name with the first durable file in it."""
        if not folder.is_dir():
            self._enter(folder.parent)
            folder.mkdir(mode=0o700, exist_ok=True)

    def _settle(self, folder: Path) -> None:
        """Fsync a folder and its parents up to the first that is durable already."""
        sync_folder(folder)
        while folder not in self._settled:
            sync_folder(folder.parent)
            self._settled.add(folder)
            folder = folder.parent

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

    def _moved(self, old: Path, new: Path, size: int) -> None:
        with self._busy:
            self._room.pop(old, None)
            self._room[new] = size

    def _released(self, path: Path) -> None:
        with self._busy:
            self._room.pop(path, None)


def _code(digest: bytes) -> str:
    """A digest of 32 bytes in 43 characters: hex and a long name would exceed the limit of a file name."""
    return urlsafe_b64encode(digest).decode().rstrip("=")


def _complete(path: Path, kind: str, digest: bytes, site: SiteId) -> Path:
    """The path of a complete upload, fsynced (whole) or not (small), next to `path`."""
    return path.with_name(f"{kind}{_code(digest)}-{_component(site, _LONGEST_SITE)}")


def _component(name: str, most: int = _LONGEST_NAME) -> str:
    """A job, site or name escaped as one path component, so that none leaves the folder and no two are equal."""
    safe = name.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    if safe.startswith("."):
        safe = "%2E" + safe[1:]
    if not safe or len(safe.encode()) > most:
        raise BadInput(f"spool: found a name of {len(safe.encode())} bytes, expected 1 to {most}")
    return safe


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _append(path: Path, offset: int, data: bytes) -> None:
    """Write at the end of the file; on an error truncate it to `offset` and raise OSError."""
    handle = os.open(path, os.O_WRONLY)
    try:
        left, at = memoryview(data), offset
        while left:
            written = os.pwrite(handle, left, at)
            left, at = left[written:], at + written
    except OSError:
        os.ftruncate(handle, offset)
        raise
    finally:
        os.close(handle)
