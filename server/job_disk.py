"""What one job of a coordinator has on disk: its journal, its part of the spool, and files for people.

A model is written as `sealed_models.py` has it. Small files of the round under way are in the journal too, with the
record that relies on them, in one commit, and so without an fsync of their own (decision 0012). After a power cut the
next start writes a lost file again. Every error of the disk is raised as StoreProblem or OSError, and the caller's
state is unchanged.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Generic

from fedcore_server.config import METRICS_FILE
from fedcore_server.sealed_models import MODEL_FILE, SealedModels

from fedcore.errors import DataLost, StoreProblem
from fedcore.files import ROUNDS_FILE, append_row, write_atomic
from fedcore.files.disk import refusals, sync_folder
from fedcore.results import MetricsRow
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol import epoch
from fedcore.secagg.protocol.effects import RemoveMasks
from fedcore.secagg.protocol.job.coordinator.early_end import KEY as OVER
from fedcore.secagg.protocol.job.coordinator.facts import JobFacts, JobLog, KeptFile, Row
from fedcore.secagg.protocol.job.effects import AppendRecords, KeepCheckpoint
from fedcore.secagg.protocol.job_messages import JobEnded
from fedcore.secagg.protocol.round import coordinator
from fedcore.secagg.protocol.wire_form import decode, encode
from fedcore.secagg.scheme import vector_sizes
from fedcore.store import container
from fedcore.store.journal import Journal
from fedcore.store.spool import Spool, Stored
from fedcore.types import SiteId
from fedcore.wire.limits import INLINE

LOG = logging.getLogger("fedcore.coordinator.job")
ROUND = "round"
JOB_FILE = "job.toml"
_VECTOR, _SUM = "vector-", "sum-"
"""Prefixes of the keys of small files in the journal."""
_MODEL, _JOB_FILE = "model", "toml"
"""Keys of files in the job's folder."""
MOST_SHARED = 16 << 20
"""Bytes of a vector, a sum or a model that a journal on a server has too, so that a standby can go on with them."""


def _small_key(what: str, digest: bytes) -> str:
    return f"{what}{digest.hex()[:48]}"


def small_file(what: str, stored: Stored | None, most: int = INLINE) -> dict[str, bytes]:
    """What the journal keeps of a file that was not fsynced, or of any of up to `most` bytes."""
    if stored is None or stored.travels > most:
        return {}
    return {_small_key(what, stored.digest): stored.path.read_bytes()}


class JobLogFile(Generic[Row]):
    """A file of one job's rows for people.

    Invariant: the journal has a row in the commit of what it reports; the file is made from there. A disk without
    room for a line costs the line, not the job: the whole file is written again with the next row, or at the next
    start.
    """

    def __init__(self, path: Path, rows: JobLog[Row]) -> None:
        self._path = path
        self._rows: JobLog[Row] = rows
        self._behind = False

    def load(self, journal: Journal, job: str) -> None:
        """Read the rows from the journal, and write the file. Raises StoreProblem."""
        keys = [key for key in journal.keys(job) if key.startswith(self._rows.prefix)]
        rows = [json.loads(row) for key in keys if (row := journal.get(job, key)) is not None]
        kind = self._rows.kind
        self._rows.known[:] = [kind.from_json(row) for row in rows]
        self._make()

    def _make(self) -> None:
        """Write the file, unless it has all rows."""
        lines = (json.dumps(row.to_json(), allow_nan=False) for row in self._rows.known)
        text = "".join(f"{line}\n" for line in lines).encode()
        with refusals("rows", self._path):
            if (self._path.read_bytes() if self._path.exists() else b"") != text:
                write_atomic(self._path, text)
        self._behind = False

    def show(self) -> None:
        """Append the last row to the file."""
        try:
            if self._behind:
                self._make()
            else:
                append_row(self._path.parent, self._rows.known[-1].to_json(), self._path.name)
        except (OSError, StoreProblem) as error:
            self._behind = True
            LOG.warning(
                "job %s: %s not written: %s", self._path.parent.name, self._path.name, error
            )


class JobDisk:
    """Journal, spool and folder of one job. directory: where people find its files."""

    def __init__(
        self,
        journal: Journal,
        spool: Spool,
        directory: Path,
        facts: JobFacts,
        models: SealedModels,
    ) -> None:
        self._journal, self.spool, self._directory = journal, spool, directory
        self._models = models
        self._facts, self._job = facts, facts.id
        self._rounds = JobLogFile(directory / ROUNDS_FILE, facts.rounds)
        self._metrics = JobLogFile(directory / METRICS_FILE, facts.metrics)
        self._most = MOST_SHARED if journal.elsewhere else INLINE
        self._small: set[str] = set()
        """Keys of the journal with files of the round under way, of up to so many bytes."""
        self.lost: tuple[SiteId, ...] = ()
        """Sites on the list of the round under way whose vectors are neither in spool nor journal."""
        self.uploads: dict[bytes, Stored] = {}
        """Complete uploads of the round under way, by digest."""
        self.sum: Stored | None = None
        """Of the round under way, or of the last one until the next begins."""
        self._round = b""
        """Header of that round."""
        self.checkpoint: Stored | None = None

    def load(self) -> bool:
        """Read the journal into the facts, and bring spool and files in line with them.

        Whether another process, or this one before an error of the disk, began the round under way.
        Raises StoreProblem.
        """
        journal, name, facts = self._journal, self._job, self._facts

        def value(key: str, otherwise: Any = None) -> Any:
            found = journal.get(name, key)
            return otherwise if found is None else decode(found, object)

        about, facts.outcome = journal.get(name, "plan"), value("ended")
        self._give_back_files()
        if about is None:
            facts.plan, facts.step = None, None
            return False
        planned = json.loads(about)
        plan, features = RoundPlan.from_json(planned["plan"]), planned["features"]
        facts.adopt(plan, features, vector_sizes(plan, features))
        records = list(journal.read(name, ROUND))
        facts.epoch, facts.step = value("epoch", epoch.NoEpoch()), value("step")
        facts.stage = coordinator.replay(value("stage", coordinator.Ready()), records)
        facts.certificate, facts.over = value("certificate"), journal.get(name, OVER) is not None
        facts.withdrawn = frozenset(json.loads(journal.get(name, "withdrawn") or b"[]"))
        for file in (self._rounds, self._metrics):
            file.load(journal, name)
        self._settle()
        self.lost = self._missing()
        if (
            self.lost
            and (kept := coordinator.without_vectors(facts.stage, records, self.lost)) is not None
        ):
            LOG.info("job %s: sites %s send their vectors again", name, ", ".join(self.lost))
            journal.compact(name, ROUND, kept)
            facts.stage = coordinator.replay(value("stage", coordinator.Ready()), kept)
            self.lost = ()
        return bool(records)

    def _missing(self) -> tuple[SiteId, ...]:
        """The sites whose vectors are needed for the sum of the round under way, and are gone."""
        stage = self._facts.round
        if stage is None or isinstance(stage, coordinator.Releasing):
            return ()
        header = stage.header.digest
        return tuple(
            submit.site
            for submit in getattr(stage, "submissions", ())
            if self.spool.uploaded(self._job, header, submit.site, submit.digest) is None
        )

    def _settle(self) -> None:
        facts, stage = self._facts, self._facts.round
        self._give_back_small()
        self.sum, self.checkpoint = None, None
        self._round = stage.header.digest if stage is not None else b""
        keep = {self._round}
        if facts.certificate is not None:
            self.checkpoint = self.spool.find(self._job, facts.checkpoint_name)
            keep.add(facts.certificate.header.digest)  # a checkpoint that is being uploaded
        if isinstance(stage, coordinator.Releasing):
            self.sum = self.spool.find(self._job, "sum", header=stage.header.digest)
        self._discard_all(keep if facts.outcome is None else ())

    def keep_job_file(self, toml: bytes) -> None:
        """Write the operator's job file into the job's folder; the journal has it too."""
        self.put({_JOB_FILE: toml})
        self._give_back_files()

    def _give_back_files(self) -> None:
        """Write the files of the job's folder that only the journal has: another machine wrote the others."""
        for key, file in ((_JOB_FILE, JOB_FILE), (_MODEL, MODEL_FILE)):
            path = self._directory / file
            if not path.exists() and (data := self._journal.get(self._job, key)) is not None:
                whole = self._models.restored(path, data) if key == _MODEL else data
                with refusals("job", path):
                    write_atomic(path, whole)

    def _give_back_small(self) -> None:
        """Write files again that the journal has: they may be missing or empty after a power cut."""
        journal, name, stage = self._journal, self._job, self._facts.round
        self._small = {key for key in journal.keys(name) if key.startswith((_VECTOR, _SUM))}
        if stage is None:
            return
        header = stage.header.digest
        for submit in getattr(stage, "submissions", ()):
            if self.spool.uploaded(name, header, submit.site, submit.digest) is not None:
                continue
            data = journal.get(name, _small_key(_VECTOR, submit.digest))
            if data is not None:
                self.spool.give_back(name, header, submit.site, data)
        for key in self._small:
            data = journal.get(name, key) if key.startswith(_SUM) else None
            if data is not None:
                self.keep_sum(header, container.from_bytes(data))

    @property
    def has_model(self) -> bool:
        """Whether the model is among the job's files."""
        return (self._directory / MODEL_FILE).exists()

    def kept(self, what: str) -> Stored | None:
        """The `sum` or the `checkpoint`."""
        return self.sum if what == "sum" else self.checkpoint

    def put(self, values: Mapping[str, bytes]) -> None:
        """Write values: one commit."""
        self._journal.append(self._job, ROUND, (), put=values)

    def append(self, effect: AppendRecords) -> None:
        """Append records to the round's, with the small files that they rely on: one commit."""
        put: dict[str, bytes] = {}
        for digest in effect.vectors:
            put |= small_file(_VECTOR, self.uploads.get(digest), self._most)
        if effect.with_sum:
            put |= small_file(_SUM, self.sum, self._most)
        self._journal.append(self._job, ROUND, effect.records, put=put)
        self._small |= put.keys()

    def close_round(self, values: Mapping[str, bytes]) -> None:
        """Write the end of a round and delete its records and small files.

        They contain no secret of a site, so free pages need not be overwritten."""
        self._journal.trim(self._job, ROUND, put=values, forget=sorted(self._small))
        self._round_gone()

    def end(self, ended: JobEnded) -> None:
        """Write the end of the job and erase what is left of a round."""
        put = {"ended": encode(ended)}
        self._journal.compact(self._job, ROUND, put=put, forget=sorted(self._small))
        self._round_gone()

    def _round_gone(self) -> None:
        self._small = set()
        self.uploads.clear()

    def keep_metrics(self, row: MetricsRow) -> None:
        """Write the public metrics of one release into journal and file."""
        self.put(self._facts.metrics.entry(row))
        self._facts.metrics.known.append(row)
        self._metrics.show()

    def show_round(self) -> None:
        """Append the last row of a round to its file: the journal has it."""
        self._rounds.show()

    def keep_sum(self, header: bytes, chunks: Iterable[bytes]) -> Stored:
        """Write the sum of a round."""
        return self.spool.put(self._job, "sum", chunks, header=header, unsynced=INLINE)

    def begin_round(self, header: bytes) -> None:
        """From now on the sum is of the round with this header."""
        if header != self._round:
            self._round, self.sum = header, None

    def summands(self, asked: RemoveMasks) -> list[Path]:
        """The files of a sum, small ones restored from the journal. Raises DataLost for a lost one."""
        header = asked.header.digest
        found = self.spool.complete(self._job, header)
        if not found.keys() >= set(asked.survivors):
            self._give_back_small()
            found = self.spool.complete(self._job, header)
        for name in asked.survivors:
            if name not in found:
                raise DataLost(
                    f"spool: found the vector of site {name} gone, expected it until its round is over",
                    remedy="check the disk; the spool is the coordinator's own, nothing else may remove files",
                )
        return [found[name] for name in asked.survivors]

    def keep_checkpoint(self, asked: KeepCheckpoint) -> KeptFile | None:
        """Make a site's upload the checkpoint; None if there is no such upload."""
        path = self.spool.uploaded(self._job, asked.header, asked.site, asked.digest)
        if path is None:
            return None
        self.checkpoint = self.spool.put(self._job, asked.name, container.read(path))
        self.spool.discard(self._job, asked.header)
        return KeptFile(self.checkpoint.digest, self.checkpoint.size)

    def drop_checkpoint(self, name: str) -> None:
        """Remove it: it is of an earlier release or key epoch."""
        self.spool.remove(self._job, name)
        self.checkpoint = None

    def keep_model(self, digest: bytes) -> None:
        """Write an upload among the job's files, whole or not at all."""
        path, stored = self._directory / MODEL_FILE, self.uploads[digest]
        with refusals("model", path):
            write_atomic(path, self._models.content(path, container.read(stored.path)))
            sync_folder(path.parent)
            if self._journal.elsewhere and stored.travels <= MOST_SHARED:
                self.put({_MODEL: path.read_bytes()})

    def open_file(self, path: Path) -> BinaryIO:
        """One of the job's files, to be read in clear. Raises StoreProblem, OSError."""
        return self._models.open(path) if path.name == MODEL_FILE else path.open("rb")

    def discard(self, header: bytes | None) -> None:
        """Remove the files under this header; of all rounds if None, after the end of the job."""
        if header is not None:
            self.spool.discard(self._job, header)
            return
        try:
            self._discard_all(())
        except StoreProblem as error:  # the job is over all the same; the next process removes them
            LOG.warning("job %s: %s", self._job, error)

    def _discard_all(self, keep: Iterable[bytes]) -> None:
        for found in self.spool.rounds(self._job):
            if found not in keep:
                self.spool.discard(self._job, found)
