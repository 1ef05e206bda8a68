"""What was released of this site's rows: one entry for each sum that may have been opened (PROTOCOL D, H).

The ledger is an append-only file of JSON lines, `ledger.jsonl` in the site's folder. It is apart from the journal,
which one process holds open, which is in no backup, and which is rewritten after every round.
Invariant: an entry is flushed to disk before the answer that exposes the sum is sent. A crash between the two
leaves an entry of a sum that was not exposed, never a sum without an entry. What is learnt later (the survivors under
`encrypted`, the certificate) is a line of its own without a flush: if it is lost, the checks are stricter.

Entries are keyed by a digest of the rows: HMAC-SHA256 under a key derived from the site's identity, over the digest
that the training process computes. It does not leave the site; without the key guesses of rows cannot be tested
against it. Query and privacy budgets are counted here: a vector with noise in it has a line `spent`
(`privacy_limits.py`), flushed before the vector is made.
With a keystore each line is encrypted for its own place. Not detected: that the last lines are missing.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import re
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from fedcore_clients.privacy_limits import Spend

from fedcore.errors import EnvelopeRefused, StoreProblem
from fedcore.files import write_atomic
from fedcore.files.disk import make_folder, refusals, sync_folder
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.purposes import of_columns
from fedcore.store.sealing import RowSealer
from fedcore.types import Json, SiteId

LEDGER_FILE = "ledger.jsonl"
MONTH_SECONDS = 30 * 86400.0


@dataclass(frozen=True)
class Exposure:
    """A sum that holds this site's vector and may have been opened.

    header: digest of the round's header, hex; one round has one entry. rows: digest of the rows; columns:
    those of the statistics, if it is statistics. cohort: the sites invited; survivors: those in the sum,
    empty while unknown. at: seconds since 1970. certificate: hash of its release; empty: exposed without.
    keys: public identity keys of the cohort by the job's roster, hex; empty in entries of an earlier version.
    """

    header: str
    rows: str
    purpose: str
    job: str
    plan: str
    round: int
    training_round: int
    cohort: tuple[SiteId, ...]
    survivors: tuple[SiteId, ...]
    columns: tuple[str, ...]
    at: float
    certificate: str = ""
    keys: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        header: RoundHeader,
        survivors: Iterable[SiteId],
        *,
        rows: str,
        columns: Iterable[str],
        pins: Mapping[SiteId, bytes],
    ) -> Exposure:
        """The exposure of a round, now. pins: the job's roster."""
        named = tuple(columns) if of_columns(header.purpose) else ()
        return cls(
            header.digest.hex(), rows, header.purpose, header.job, header.plan_digest, header.round,
            header.training_round, tuple(header.roster), tuple(survivors), named, time.time(),
            keys=tuple(pins[name].hex() for name in header.roster),
        )  # fmt: skip

    @property
    def contributors(self) -> tuple[SiteId, ...]:
        """The sites in the sum, sorted; where they are not known the cohort stands for them."""
        return tuple(sorted(self.survivors or self.cohort))

    def pinned_by(self, pins: Mapping[SiteId, bytes]) -> bool:
        """Whether each site in the sum has the identity key by another roster that it had by this one."""
        keys = dict(zip(self.cohort, self.keys, strict=False))
        return all(
            name not in keys or (name in pins and pins[name].hex() == keys[name])
            for name in self.contributors
        )

    def to_json(self) -> Json:
        """For `--json`, and for its line."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


class Ledger:
    """The ledger of a site while its process runs. key: of the digests of rows, 32 bytes; sealer: what its lines are
    encrypted with, if they are."""

    def __init__(self, path: Path, key: bytes, sealer: RowSealer | None = None) -> None:
        self._path, self._key, self._sealer = path, key, sealer
        self._lines = 0
        self._entries: dict[str, Exposure] = {}
        self._statistics: dict[str, dict[str, Exposure]] = {}
        """By rows and header: looked up at every message of a job that has such sums."""
        self._jobs: dict[str, dict[str, float]] = {}
        """By rows: the jobs, and when each last had a sum over them."""
        self._handle = -1
        self._size = 0
        self._spends: dict[str, Spend] = {}
        self._lock = threading.Lock()
        """Spends are appended in the thread that makes a vector, exposures in others."""

    @classmethod
    def open(cls, folder: Path, identity: IdentityKey, sealer: RowSealer | None = None) -> Self:
        """Open or create the ledger of a folder. A line that a crash cut off is removed: nothing that relies on it
        was sent. Raises StoreProblem where it cannot be read or written, or is in clear where there is a sealer."""
        path = folder / LEDGER_FILE
        found = cls(path, identity.derive(b"rows of the ledger"), sealer)
        with refusals("ledger", path):
            make_folder(folder)
            found._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            sync_folder(folder)
            data = path.read_bytes()
        try:
            entries, found._spends, found._size = _parsed(path, data, sealer)
            found._lines = data.count(b"\n")
            for each in entries.values():
                found._keep(each)
            found._cut()
        except BaseException:
            found.close()
            raise
        return found

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def exposed(self, entry: Exposure) -> None:
        """Record that a sum may be opened from now on, and flush it to disk. Raises StoreProblem.

        To the entry of a round only survivors that were not known are added.
        """
        known = self._entries.get(entry.header)
        if known is None:
            self._append({"exposed": entry.to_json()}, sync=True)
            self._keep(entry)
        elif entry.survivors and not known.survivors:
            self._add(known, survivors=entry.survivors)

    def spend(self, entry: Spend) -> None:
        """Record what a vector will cost, and flush it to disk; once for each header. Raises StoreProblem."""
        if entry.header not in self._spends:
            self._append({"spent": entry.to_json()}, sync=True)
            self._spends[entry.header] = entry

    def spends(self, rows: str) -> list[Spend]:
        """What was spent of these rows."""
        return [each for each in tuple(self._spends.values()) if each.rows == rows]

    def certified(self, header: str, certificate: str) -> None:
        """A sum of the ledger was released under this certificate. Raises StoreProblem."""
        known = self._entries.get(header)
        if known is not None and not known.certificate:
            self._add(known, certificate=certificate)

    def _add(self, known: Exposure, **learnt: Any) -> None:
        self._append({"learnt": {"header": known.header, **learnt}}, sync=False)
        self._keep(replace(known, **learnt))

    def _keep(self, entry: Exposure) -> None:
        self._entries[entry.header] = entry
        if of_columns(entry.purpose):
            self._statistics.setdefault(entry.rows, {})[entry.header] = entry
        jobs = self._jobs.setdefault(entry.rows, {})
        jobs[entry.job] = max(entry.at, jobs.get(entry.job, 0.0))

    def _append(self, line: Json, *, sync: bool) -> None:
        with self._lock, refusals("ledger", self._path):
            data = _line(json.dumps(line, allow_nan=False).encode(), self._lines + 1, self._sealer)
            try:
                written = os.pwrite(self._handle, data, self._size)
                if written != len(data):
                    raise OSError(28, os.strerror(28))  # ENOSPC: the rest had no room
                if sync:
                    os.fdatasync(self._handle)
            except OSError:
                with contextlib.suppress(OSError):
                    self._cut()
                raise
            self._size += len(data)
            self._lines += 1

    def _cut(self) -> None:
        """Truncate the file after the last whole line."""
        os.ftruncate(self._handle, self._size)

    def has(self, header: str) -> bool:
        """Whether a round, by its header, has an entry."""
        return header in self._entries

    def rows_key(self, digest: str) -> str:
        """The key of entries of these rows. digest: SHA-256 over the rows, hex (`fedcore/learning/data/rows.py`)."""
        return hmac.new(self._key, bytes.fromhex(digest), hashlib.sha256).hexdigest()

    def __iter__(self) -> Iterator[Exposure]:
        return iter(tuple(self._entries.values()))

    def jobs_over(self, rows: str, now: float | None = None) -> set[str]:
        """The jobs that had a sum over these rows in the last 30 days."""
        since = (time.time() if now is None else now) - MONTH_SECONDS
        return {job for job, at in list(self._jobs.get(rows, {}).items()) if at > since}

    def apart(self, job: str, pins: Mapping[SiteId, bytes]) -> int:
        """By how many sites a roster differs from those that an earlier job invited; another key is another site."""
        parties: dict[SiteId, str] = {}
        for each in tuple(self._entries.values()):
            if each.job == job:
                keys = each.keys or tuple(pins[n].hex() if n in pins else "" for n in each.cohort)
                parties |= dict(zip(each.cohort, keys, strict=True))
        names = parties.keys() | pins.keys()
        return sum(name not in pins or parties.get(name) != pins[name].hex() for name in names)

    def statistics_only_with(
        self,
        rows: str,
        columns: Iterable[str],
        besides: str = "",
        pins: Mapping[SiteId, bytes] | None = None,
    ) -> tuple[SiteId, ...] | None:
        """The sites with which statistics of any of these columns over these rows may be given again.

        None: any, for none was given. An empty tuple: none, for two different sets have had them, or one of these
        sites has another identity key by the roster at hand: under its name somebody else may contribute, and the
        difference of the sums would be what the site gave. besides: header of the round at hand. pins: the roster of
        its job, None where keys do not count.
        """
        wanted = set(columns)
        given = [
            each
            for each in tuple(self._statistics.get(rows, {}).values())  # another thread may add one
            if each.header != besides and wanted & set(each.columns)
        ]
        if not given:
            return None
        found = {each.contributors for each in given}
        same = pins is None or all(each.pinned_by(pins) for each in given)
        return found.pop() if len(found) == 1 and same else ()


@dataclass(frozen=True)
class JobLedger:
    """The ledger as it is for a job of this roster: see `participation.Exposures`."""

    ledger: Ledger
    pins: Mapping[SiteId, bytes]

    def has(self, header: str) -> bool:
        return self.ledger.has(header)

    def rows_key(self, digest: str) -> str:
        return self.ledger.rows_key(digest)

    def jobs_over(self, rows: str) -> Collection[str]:
        return self.ledger.jobs_over(rows)

    def statistics_only_with(
        self, rows: str, columns: Collection[str], besides: str = ""
    ) -> tuple[SiteId, ...] | None:
        return self.ledger.statistics_only_with(rows, columns, besides, self.pins)


_LIKE_SEALED = re.compile(rb"[A-Za-z0-9+/]{64}")
"""How a line begins that is encrypted: base64; one in clear is JSON."""


def _line(text: bytes, number: int, sealer: RowSealer | None) -> bytes:
    """A line of the file. number: which, from 1."""
    if sealer is not None:
        text = base64.b64encode(sealer.record(text, "", "ledger", "line", number))
    return text + b"\n"


def _text(line: bytes, number: int, sealer: RowSealer | None) -> bytes:
    """The inverse. Raises ValueError for another form, EnvelopeRefused for a line of another place."""
    if sealer is None:
        return line
    return sealer.open_record(base64.b64decode(line, validate=True), "", "ledger", "line", number)


def is_sealed_ledger(folder: Path) -> bool | None:
    """Whether a folder's ledger is encrypted; None where it has no line. Raises OSError."""
    path = folder / LEDGER_FILE
    data = path.read_bytes() if path.is_file() else b""
    return _LIKE_SEALED.match(data) is not None if data else None


def seal_ledger(folder: Path, sealer: RowSealer) -> bool:
    """Encrypt a ledger that is in clear, whole or not at all; whether it was. Raises OSError."""
    if is_sealed_ledger(folder) is not False:
        return False
    path = folder / LEDGER_FILE
    data = path.read_bytes()
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    write_atomic(path, [_line(line, number, sealer) for number, line in enumerate(lines, 1)])
    sync_folder(folder)
    return True


def _parsed(
    path: Path, data: bytes, sealer: RowSealer | None = None
) -> tuple[dict[str, Exposure], dict[str, Spend], int]:
    """The entries, what was spent, and the length of all whole lines."""
    whole = data[: data.rfind(b"\n") + 1]
    entries: dict[str, Exposure] = {}
    spends: dict[str, Spend] = {}
    if whole and (_LIKE_SEALED.match(whole) is not None) != (sealer is not None):
        found = "in clear" if sealer is not None else "encrypted"
        raise StoreProblem(
            f"ledger {path}: found it {found}, expected it {'as' if sealer else 'in clear, as'} [keystore] says",
            remedy="fed-site keystore encrypt"
            if sealer
            else "write [keystore] back into site.toml",
        )
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            about = json.loads(_text(line, number, sealer))
            if "spent" in about:
                spend = Spend(**about["spent"])
                spends[spend.header] = spend
            else:
                _read_line(entries, about)
        except (ValueError, KeyError, TypeError, EnvelopeRefused) as error:
            raise StoreProblem(
                f"ledger {path}: found line {number} damaged, expected an entry",
                remedy="restore ledger.jsonl from a backup: without it this site does not know what it "
                "has given, and must give nothing",
            ) from error
    return entries, spends, len(whole)


def _read_line(entries: dict[str, Exposure], line: Mapping[str, Any]) -> None:
    if "exposed" in line:
        found = Exposure(**_tuples(line["exposed"]))
        entries[found.header] = found
    else:
        learnt = _tuples(line["learnt"])
        header = learnt.pop("header")
        entries[header] = replace(entries[header], **learnt)


def _tuples(about: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in about.items()}


def read_ledger(folder: Path, sealer: RowSealer | None = None) -> list[Exposure]:
    """The entries of a folder's ledger, the oldest first; nothing is locked or changed. Raises StoreProblem."""
    return list(_read(folder, sealer)[0].values())


def read_spends(folder: Path, sealer: RowSealer | None = None) -> list[Spend]:
    """What a folder's ledger has of privacy that was spent, the oldest first; as `read_ledger`."""
    return list(_read(folder, sealer)[1].values())


def _read(folder: Path, sealer: RowSealer | None) -> tuple[dict[str, Exposure], dict[str, Spend]]:
    path = folder / LEDGER_FILE
    if not path.is_file():
        return {}, {}
    with refusals("ledger", path):
        data = path.read_bytes()
    return _parsed(path, data, sealer)[:2]


def ledger_lines(entries: Sequence[Exposure]) -> Iterator[str]:
    """The entries in words, one line each."""
    if not entries:
        yield "nothing was released of this site's rows"
    for each in entries:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.at))
        sites = ", ".join(each.survivors) or f"not known, of {', '.join(each.cohort)}"
        end = (
            f"certificate {each.certificate[:16]}" if each.certificate else "without a certificate"
        )
        yield (
            f"{when}  {each.purpose} (round {each.training_round})  job {each.job}, number {each.round}, "
            f"plan {each.plan[:16]}  rows {each.rows[:16]}  sites {sites}  {end}"
        )
