"""Rows that belong together, such as all scans of one patient: no split parts them, and resamples draw them together.

Rows of one person resemble each other, so a model that trained on some of them recognises the others: a score on
them says nothing about other people. Which rows belong together is declared by an id for each row, with
`fedcore.table(..., group=)` or `fedcore.grouped(rows, ids)`.

Invariant: a group is known by a digest of its id as text: 1, 1.0 and "1" are one id, in whatever kind of file. Ids
are of one site: the same id at two sites means nothing.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import BadInput

Groups = NDArray[np.bytes_]
"""(rows,) S32: 32 hex digits of the SHA-256 of each row's id."""

_PERSON = frozenset({
    "patient", "patients", "subject", "subjects", "person", "participant", "individual", "mrn", "pid",
    "patientid", "subjectid", "personid", "participantid",
})  # fmt: skip
"""Words in the name of a column that holds ids of persons."""

LEAST_IDS = 1 / 20
"""Different values, as a share of the rows, from which a column called `..id` counts as ids of persons: fewer are
those of hospitals or devices."""


@dataclass(frozen=True)
class Grouped:
    """Rows with the ids of their groups, until they are read."""

    rows: Any
    ids: Any


def grouped(rows: Any, ids: Iterable[Any] | Callable[[Any], Any]) -> Grouped:
    """Rows of one site of which those with one id stay together, for `task.data` to return.

    rows: anything that `task.data` may return but a `(train, test)` pair, whose halves are grouped each.
    ids: one for each row, in their order: numbers or text; or `ids(item)` for each item of a dataset.
    """
    return Grouped(rows, ids)


def group_digests(ids: Iterable[Any], rows: int, where: str) -> Groups:
    """The groups of so many rows. Raises BadInput for another number of ids, and for one that is missing."""
    texts = [_text(value) for value in ids]
    if len(texts) != rows:
        raise BadInput(
            f"{where}: found {len(texts)} group ids for {rows} rows, expected one for each row"
        )
    gone = [row for row, text in enumerate(texts) if not text]
    if gone:
        raise BadInput(
            f"{where}: found no group id in {len(gone)} of {rows} rows (row {gone[0] + 1} first), expected one "
            "in each",
            remedy="give a row that belongs to nobody else an id of its own, or drop it",
        )
    return np.array([hashlib.sha256(t.encode()).hexdigest()[:32] for t in texts], dtype="S32")


def _text(value: Any) -> str:
    """One spelling per id; empty where there is none."""
    if value is None or value != value:  # noqa: PLR0124 - NaN, which no library needs to be asked about
        return ""
    text = str(value.decode() if isinstance(value, bytes) else value).strip()
    if text.lower() in ("nan", "nat", "<na>", "none"):
        return ""
    return text[:-2] if text.endswith(".0") and text[:-2].lstrip("-").isdigit() else text


def some_of(groups: Groups | None, indices: NDArray[np.int64]) -> Groups | None:
    """The groups of these rows; None where every row stands for itself."""
    return None if groups is None else groups[np.asarray(indices, dtype=np.int64)]


def codes_of(groups: Groups) -> NDArray[np.int64]:
    """(rows,) 0, 1, 2, ...: which group each row is of."""
    return np.unique(groups, return_inverse=True)[1].astype(np.int64)


def labels_of(codes: NDArray[np.int64], labels: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """(groups,) the most frequent class of each group, of equals the least; all 0 where rows have no class."""
    groups = int(codes.max(initial=-1)) + 1
    if labels is None:
        return np.zeros(groups, dtype=np.int64)
    values, of_row = np.unique(labels, return_inverse=True)
    counts = np.zeros((groups, len(values)), dtype=np.int64)
    np.add.at(counts, (codes, of_row), 1)
    return np.asarray(values[counts.argmax(axis=1)], dtype=np.int64)


def holds_ids(name: str, values: Sequence[Any]) -> int:
    """How many different ids a column holds whose name and values are those of ids of persons, some of them in
    several rows; 0 for any other column."""
    if not named_as_ids(name):
        return 0
    different = len({_text(value) for value in values} - {""})
    least = 2 if _words(name) & _PERSON else max(2, LEAST_IDS * len(values))
    return different if least <= different < len(values) else 0


def repeated_ids(columns: Mapping[str, Sequence[Any]]) -> dict[str, int]:
    """{column: how many different ids it holds}, of those columns that `holds_ids` finds some in."""
    return {name: ids for name, values in columns.items() if (ids := holds_ids(name, values))}


def named_as_ids(name: str) -> bool:
    """Whether a column has such a name: `patient`, `SubjectID`, `person_id`, `id`."""
    return bool(_words(name) & (_PERSON | {"id"}))


def _words(name: str) -> set[str]:
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    return set(re.split(r"[^a-z]+", apart)) | set(re.split(r"[^a-z]+", name.lower()))


def refuse_shared(train: Groups | None, test: Groups | None, where: str) -> None:
    """Raise BadInput where a task's own train and test parts share a group, or only one of them has groups."""
    if train is None and test is None:
        return
    if train is None or test is None:
        part = "train" if train is None else "test"
        raise BadInput(
            f"{where}: found no group ids in the {part} part, expected them in both parts"
        )
    shared = len(np.intersect1d(train, test))
    if shared:
        raise BadInput(
            f"{where}: found {shared} groups with rows in both the train and the test part, expected each in one",
            remedy="split by group, or return all rows and let the folds keep groups together",
        )
