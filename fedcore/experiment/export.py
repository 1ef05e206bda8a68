"""`fedcore export` and `Run.export`: the model of a run as one file that is read without Fedcore."""

from pathlib import Path
from typing import Any

from fedcore.errors import BadInput
from fedcore.experiment.prepare import job_for, resolve_sites, stored_job
from fedcore.files import write_atomic
from fedcore.learning.data.loading import load_rows
from fedcore.learning.data.rows import TableRows
from fedcore.learning.exported import script
from fedcore.learning.saved import SavedModel, Tensor

FILE = "model.pt"
ROWS = 16
"""Rows of the run's own to check the file on."""


def export(model: SavedModel, run: Path, out: Path | None = None, rows: Any = None) -> Path:
    """Write the model as TorchScript that takes raw rows; returns the path of the file.

    run: its folder or file; out: the file to write, by default model.pt beside it; rows: some to check the file
    on, by default invented ones within the declared ranges, or the first ones of the run's first site. Raises
    BadInput and Refused as `learning.exported.script`; then nothing is written.
    """
    if rows is None and model.statistics is None and run.is_dir():
        rows = _own_rows(model, run)
    path = out or (run if run.is_dir() else run.parent) / FILE
    write_atomic(path, script(model, rows))
    return path


def _own_rows(model: SavedModel, run: Path) -> Any:
    """The x of a batch of the run's first site; None where it cannot be made again."""
    if not (run / "job.json").is_file():
        return None
    try:
        stored = stored_job(run, model.task)
    except BadInput:  # its sites were objects in memory
        return None
    stored.pop("kind")
    site, source = next(iter(resolve_sites(*job_for(model.task, stored)).items()))
    found, _ = load_rows(model.task, source, site)
    if isinstance(found, TableRows) or not len(found):
        return None
    batch = next(iter(found.batches(ROWS, None)))
    pair = isinstance(batch, tuple | list) and len(batch) == 2 and model.task.predict is None
    return batch[0] if pair and isinstance(batch[0], Tensor) else None
