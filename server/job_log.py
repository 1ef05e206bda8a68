"""The files of a job's rows for people: one row a round, and one a release whose metrics are public.

Invariant: the journal has a row in the commit of what it tells; the file is made from there. A disk without
room for a line costs the line, not the job: the whole file is made again with the next row that finds room,
or at the next start.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from fedcore.errors import StoreProblem
from fedcore.files import append_row, write_atomic
from fedcore.secagg.protocol.job.coordinator.facts import JobLog
from fedcore.store.disk import refusals
from fedcore.store.journal import Journal
from fedcore.types import Json

LOG = logging.getLogger("fedcore.coordinator.rows")

ROUNDS_FILE, METRICS_FILE = "rounds.jsonl", "metrics.jsonl"


class JobLogFile:
    """The file of one job's rows. rows: all of them; the object stays the same."""

    def __init__(self, path: Path, rows: JobLog) -> None:
        self._path, self._rows = path, rows
        self._behind = False

    def kept(self, journal: Journal, job: str) -> list[Json]:
        """The rows that the journal has, oldest first. Raises StoreProblem."""
        keys = [key for key in journal.keys(job) if key.startswith(self._rows.prefix)]
        return [json.loads(row) for key in keys if (row := journal.get(job, key)) is not None]

    def make(self) -> None:
        """Write the file, where it has not all rows. Raises StoreProblem."""
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in self._rows.known).encode()
        with refusals("rows", self._path):
            if (self._path.read_bytes() if self._path.exists() else b"") != text:
                write_atomic(self._path, text)
        self._behind = False

    def show(self) -> None:
        """Append the last row to the file."""
        try:
            if self._behind:
                self.make()
            else:
                append_row(self._path.parent, self._rows.known[-1], self._path.name)
        except (OSError, StoreProblem) as error:
            self._behind = True
            LOG.warning(
                "job %s: %s not written: %s", self._path.parent.name, self._path.name, error
            )
