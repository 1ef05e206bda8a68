"""`fedcore predict`: new rows from a file to a CSV with a class and its probability, or the value, of each.

Invariant: every row of the file has one line, in its order; a file that is not what the model was trained on is
refused by the name of the column, or by the shape of the array.
"""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import BadInput
from fedcore.learning.data.columns import read_columns
from fedcore.learning.data.rows import TableRows
from fedcore.learning.data.tabular import Table
from fedcore.learning.saved import SavedModel, load_model
from fedcore.learning.task import load_task


@dataclass(frozen=True)
class Predictions:
    """columns: {title: one value a row}, for a CSV. notes: what is unusual about the rows, for the terminal."""

    columns: Mapping[str, Sequence[object]]
    notes: tuple[str, ...]

    def to_csv(self) -> str:
        """Numbers as their shortest form that reads back the same, text quoted where it needs to be."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(self.columns)
        lines.writerows(zip(*self.columns.values(), strict=True))
        return text.getvalue()


def predict(run: Path, rows: Path, keep: Sequence[str] = (), task: str = "") -> Predictions:
    """The predictions of a run's model, or of a released model's file, for the rows of a file.

    keep: columns of the file to copy to the left of the predictions. task: in place of the one that the model's
    file names. Raises BadInput for rows that the model does not take, and for columns that it does not know.
    """
    model = load_model(run, load_task(task) if task else None)
    notes = [model.warning] if model.warning else []
    if not rows.is_file():
        raise BadInput(f"predict: found no file {rows}")
    if (table := model.table) is not None:
        read = table.without_target(rows)
        kept = _kept(rows, table, keep)
        notes += _unusual(read)
        found = model.predict(read)
    else:
        if keep:
            raise BadInput(f"--keep: found {keep[0]!r}, but {rows.name} has no columns with names")
        kept, found = {}, model.predict(rows)
    if not np.isfinite(found).all():
        bad = int(np.count_nonzero(~np.isfinite(found).reshape(len(found), -1).all(axis=1)))
        raise BadInput(f"{rows.name}: found NaN or infinity as the prediction of {bad} rows")
    columns = dict(_titled(model, found))
    if clash := [name for name in kept if name in columns]:
        raise BadInput(
            f"--keep: found {clash[0]!r}, which is a column of the predictions",
            remedy="rename it in the file",
        )
    return Predictions({**kept, **columns}, tuple(notes))


def _kept(path: Path, table: Table, keep: Sequence[str]) -> dict[str, Sequence[Any]]:
    """The columns to copy. Raises BadInput for an empty table, and for a column that is neither declared nor kept."""
    there = read_columns(path)
    known = {*(name for name, _ in table.specs), table.target, *keep}
    if extra := [name for name in there if name not in known]:
        named, them = ", ".join(map(repr, extra)), "them" if len(extra) > 1 else "it"
        flags = " ".join(f"--keep {shlex.quote(name)}" for name in extra)
        raise BadInput(
            f"{path.name}: found the column{'s' if len(extra) > 1 else ''} {named}, which the model does not take",
            remedy=f"remove {them}, or copy {them} to the predictions: {flags}",
        )
    if not any(len(values) for values in there.values()):
        raise BadInput(f"{path.name}: found no row below the header")
    missing = next((name for name in keep if name not in there), None)
    if missing is not None:
        raise BadInput(f"--keep: found no column {missing!r} in {path.name}")
    return {name: there[name] for name in keep}


def _unusual(rows: TableRows) -> Iterator[str]:
    """What the model will take as it is, though it hardly saw the like in training."""
    for name, count in rows.unknown.items():
        yield f"{_rows(count)} a value of {name!r} that is not declared: it counts as `other`"
    for place, (name, (low, high)) in enumerate(
        zip(rows.layout.names, rows.layout.ranges, strict=True)
    ):
        values = rows.features[:, place]
        if outside := int(np.count_nonzero((values < low) | (values > high))):
            yield f"{_rows(outside)} a value of {name!r} outside its declared range {low:g} to {high:g}"


def _rows(count: int) -> str:
    return f"{count} row{' has' if count == 1 else 's have'}"


def _titled(model: SavedModel, found: NDArray[np.float64]) -> Iterator[tuple[str, list[object]]]:
    """The columns of the predictions. found: (n,) or (n, C). Raises BadInput for another shape."""
    if found.ndim > 2:
        raise BadInput(
            f"predict: found outputs of shape {list(found.shape[1:])} a row, expected numbers or classes",
            remedy="run.predict(rows) in Python returns them as an array",
        )
    if not model.classifies:
        several = found.ndim == 2
        titles = [f"value_{i}" for i in range(found.shape[1])] if several else ["value"]
        yield from zip(titles, found.reshape(len(found), -1).T.tolist(), strict=True)
        return
    each = found if found.ndim == 2 else np.stack([1 - found, found], axis=1)
    names = model.class_names(each.shape[1])
    # As metrics count: of one logit, class 1 needs more than one half; the first of equals otherwise.
    yield "class", [names[i] for i in each.argmax(axis=1)]
    for name, column in zip(names, each.T.tolist(), strict=True):
        yield f"probability_{name}", column
