"""A party's audit trail while its process runs.

Invariant: one process at a time has a trail open. A line that `record` wrote survives `kill -9` of the process; `sync`
makes all of them survive a power cut, and is called where the site's ledger is flushed, before a sum is exposed.
What a crash left of a last line is kept beside the trail, and the next line states it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, Self

from fedcore.audit.keys import Signer
from fedcore.audit.lines import (
    LABEL,
    NOTHING,
    Fact,
    Line,
    checked_facts,
    line_hash,
    signed_line,
    stamp,
)
from fedcore.errors import BadInput, StoreProblem
from fedcore.files.disk import make_folder, refusals, sync_folder
from fedcore.files.lock import FileLock

TRAIL_FILE = "audit.jsonl"
OWN_FILES = "audit.*"
"""Of the party's folder: the trail, its lock, and what was kept of damaged ends."""


class Recorder(Protocol):
    """What takes note of events: an `AuditTrail`, or nothing at all in a benchmark and a test."""

    def record(self, event: str, /, **facts: Fact) -> None:
        """Append one line, before the effect that it is about. Raises StoreProblem."""
        ...

    def sync(self) -> None:
        """Flush what was recorded to disk. Raises StoreProblem."""
        ...

    @property
    def head(self) -> tuple[int, str]:
        """Number and hash of the last line; 0 and zeros without one."""
        ...


class NoTrail:
    """Records nothing."""

    def record(self, event: str, /, **facts: Fact) -> None:
        """Checks its arguments as a trail does."""
        checked_facts(event, facts)

    def sync(self) -> None:
        """Nothing to flush."""

    @property
    def head(self) -> tuple[int, str]:
        """Of no line."""
        return 0, NOTHING


class AuditTrail:
    """The trail in a party's folder, open. Thread-safe."""

    def __init__(self, path: Path, signer: Signer, now: Callable[[], float]) -> None:
        self._path, self._signer, self._now = path, signer, now
        self._busy = threading.RLock()
        self._lock: FileLock | None = None
        self._handle = -1
        self._size = self._synced = 0
        self.sequence, self.hash = 0, NOTHING
        """Of the last line."""

    @classmethod
    def open(
        cls,
        folder: Path,
        signer: Signer,
        facts: Mapping[str, Fact],
        now: Callable[[], float] = time.time,
    ) -> Self:
        """Open or create the trail of a folder, and record that it was opened, with these facts and the key.

        Raises StoreProblem where another process has it open, or where it cannot be read or written.
        """
        path = folder / TRAIL_FILE
        found = cls(path, signer, now)
        try:
            with refusals("audit", path):
                make_folder(folder)
                found._lock = FileLock(
                    path.with_suffix(".lock"), lambda holder: _in_use(path, holder)
                )
                found._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                sync_folder(folder)
                torn = found._resume(path.read_bytes())
            found.record("opened", key=signer.public, **facts)
            if torn:
                found.record("torn", **torn)
            found.sync()
        except BaseException:
            found.close()
            raise
        return found

    def _resume(self, data: bytes) -> dict[str, Fact]:
        """Go on behind the last whole line; what follows it is kept in a file of its own, and described."""
        self._size, last = _sound_end(data)
        if last is not None:
            raw = data[: self._size - 1].rpartition(b"\n")[2]
            self.sequence, self.hash = last.sequence, line_hash(raw)
        rest = data[self._size :]
        if not rest:
            return {}
        digest = hashlib.sha256(rest).hexdigest()
        beside = self._path.with_name(f"audit.torn-{self.sequence + 1}-{digest[:16]}")
        beside.write_bytes(rest)
        beside.chmod(0o600)
        self._cut()
        return {"file": beside.name, "bytes": len(rest), "sha256": digest}

    def close(self) -> None:
        """Flush and close the trail, and release its lock. Idempotent."""
        with self._busy:
            if self._handle >= 0:
                with contextlib.suppress(StoreProblem):
                    self.sync()
                os.close(self._handle)
                self._handle = -1
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def record(self, event: str, /, **facts: Fact) -> None:
        """Append one line. Raises StoreFull and StoreProblem; then nothing of it is kept.

        Raises ValueError for an event without a name in `EVENTS`, TypeError for a fact of another type.
        """
        about = checked_facts(event, facts)
        with self._busy, refusals("audit", self._path):
            body = Line(self.sequence + 1, stamp(self._now()), event, about, self.hash).body
            data = signed_line(body, self._signer.sign(LABEL, body))
            self._append(data + b"\n")
            self.sequence, self.hash = self.sequence + 1, line_hash(data)

    @property
    def head(self) -> tuple[int, str]:
        """Number and hash of the last line."""
        with self._busy:
            return self.sequence, self.hash

    def read(self) -> bytes:
        """All lines. Raises StoreProblem."""
        with self._busy, refusals("audit", self._path):
            return self._path.read_bytes()

    def _append(self, data: bytes) -> None:
        if self._handle < 0:
            raise StoreProblem(f"audit {self._path}: found it closed, expected it open")
        try:
            if os.pwrite(self._handle, data, self._size) != len(data):
                raise OSError(28, os.strerror(28))  # ENOSPC: the rest had no room
        except OSError:
            with contextlib.suppress(OSError):
                self._cut()
            raise
        self._size += len(data)

    def sync(self) -> None:
        """Flush all lines to disk; no-op where they are. Raises StoreProblem."""
        with self._busy, refusals("audit", self._path):
            if self._synced != self._size:
                os.fdatasync(self._handle)
                self._synced = self._size

    def _cut(self) -> None:
        """Truncate the file after the last whole line."""
        os.ftruncate(self._handle, self._size)


def _sound_end(data: bytes) -> tuple[int, Line | None]:
    """The length up to the end of the last line that is whole and signed by the key of its trail, and this line."""
    end = data.rfind(b"\n") + 1
    while end:
        start = data.rfind(b"\n", 0, end - 1) + 1
        with contextlib.suppress(BadInput):
            line = Line.parse(data[start : end - 1])
            if line.signed_by(_key_at(data[:end])):
                return end, line
        end = start
    return 0, None


_OPENED = re.compile(rb'"event":"opened","facts":\{"key":"([a-z0-9:]+)"')


def _key_at(data: bytes) -> str:
    """The key that the last opening of a trail names."""
    at = data.rfind(b'"event":"opened"')
    found = _OPENED.match(data, at) if at >= 0 else None
    return "" if found is None else found[1].decode()


def _in_use(path: Path, holder: str) -> StoreProblem:
    return StoreProblem(
        f"audit {path}: found it in use by process {holder}, expected one process at a time",
        remedy="stop the other process, or give this one another folder",
    )
