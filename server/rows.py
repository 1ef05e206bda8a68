"""Rows that a job keeps for people: one a round, and one a release whose metrics are public.

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
from fedcore.secagg.plan import canonical
from fedcore.store.disk import refusals
from fedcore.store.journal import Journal
from fedcore.types import Json

LOG = logging.getLogger("fedcore.coordinator.rows")

ROUNDS_FILE, METRICS_FILE = "rounds.jsonl", "metrics.jsonl"
_PREFIXES = {ROUNDS_FILE: "row-", METRICS_FILE: "metrics-"}


class Rows:
    """The rows of one file. known: all of them, oldest first; the list stays the same object."""

    def __init__(self, journal: Journal, job: str, directory: Path, file: str) -> None:
        self._journal, self._job, self._path = journal, job, directory / file
        self._prefix = _PREFIXES[file]
        self._behind = False
        self.known: list[Json] = []

    def restore(self) -> None:
        """Read what the journal has; into the file too, where it has not all of it. Raises StoreProblem."""
        journal, job = self._journal, self._job
        keys = [key for key in journal.keys(job) if key.startswith(self._prefix)]
        found = [row for key in keys if (row := journal.get(job, key)) is not None]
        self.known[:] = map(json.loads, found)
        self._make()

    def _make(self) -> None:
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in self.known).encode()
        with refusals("rows", self._path):
            if (self._path.read_bytes() if self._path.exists() else b"") != text:
                write_atomic(self._path, text)
        self._behind = False

    def entry(self, row: Json) -> dict[str, bytes]:
        """The next row as a value of the journal, for the commit that it belongs to."""
        return {f"{self._prefix}{len(self.known):06}": canonical(row)}

    def add(self, row: Json) -> None:
        """Its entry is in the journal."""
        self.known.append(row)

    def show(self) -> None:
        """Write the last row into the file."""
        try:
            if self._behind:
                self._make()
            else:
                append_row(self._path.parent, self.known[-1], self._path.name)
        except (OSError, StoreProblem) as error:
            self._behind = True
            LOG.warning("job %s: %s not written: %s", self._job, self._path.name, error)
