"""A digest of one site's rows: the same for the same rows, in whatever order and whatever job.

Invariant: it depends on the values and nothing else: not on the split into training and test rows, on the
fold, on a cap, or on the order of a file. SHA-256 over the sorted SHA-256 of every row, so one changed,
added or removed row gives another digest. It tells of its rows to whoever can guess them: it stays at the
site, and what is kept is keyed (`clients/ledger.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from fedcore.data.rows import ArrayRows, Rows, TableRows

_NAN = np.float64("nan")


def rows_digest(*parts: Rows | None) -> str:
    """64 hex digits over all rows of all parts (training rows and the test rows a task brings itself).

    A dataset that is read item by item, and may give other values each time, goes by the number of its
    rows and their labels.
    """
    every = sorted(digest for part in parts if part is not None for digest in _each(part))
    return hashlib.sha256(b"fedcore rows " + b"".join(every)).hexdigest()


def _each(rows: Rows) -> Iterator[bytes]:
    if isinstance(rows, TableRows):
        features = np.where(np.isnan(rows.features), _NAN, rows.features) + 0.0  # one NaN, no -0
        return _joined((features, rows.fixed, rows.y.numpy()))
    if isinstance(rows, ArrayRows):
        return _joined((rows.x.numpy(), rows.y.numpy()))
    labels = rows.labels()
    found = np.arange(len(rows), dtype=np.int64) * 0 if labels is None else labels
    return _joined((found,))


def _joined(columns: Iterable[Any]) -> Iterator[bytes]:
    """SHA-256 of each row over its part of every array, each with its type and shape."""
    arrays = [np.ascontiguousarray(each) for each in columns]
    about = repr([(each.dtype.str, each.shape[1:]) for each in arrays]).encode()
    for parts in zip(*arrays, strict=True):
        row = hashlib.sha256(about)
        for part in parts:
            row.update(np.asarray(part).tobytes())
        yield row.digest()
