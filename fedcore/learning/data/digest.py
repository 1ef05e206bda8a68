"""A digest of one site's rows: the same for the same rows, in whatever order and whatever job.

Invariant: it depends on the values and nothing else: not on the split into training and test rows, on the
fold, on a cap, or on the order of a file. SHA-256 over the sorted SHA-256 of every row, so one changed,
added or removed row gives another digest. Rows can be guessed by comparing digests, so it stays at the site,
and the ledger stores a keyed form (`clients/ledger.py`).
"""

import hashlib

import numpy as np

from fedcore.errors import BadInput
from fedcore.learning.data.canonical import digests_of
from fedcore.learning.data.rows import Rows


def rows_digest(*parts: Rows | None) -> str:
    """64 hex digits over all rows of all parts (training rows and the test rows a task brings itself). A
    dataset whose items have no content that stays goes by the number of its rows and their labels."""
    every = sorted(digest for part in parts if part is not None for digest in _each(part))
    return hashlib.sha256(b"fedcore rows " + b"".join(every)).hexdigest()


def _each(rows: Rows) -> list[bytes]:
    try:
        return rows.digests()
    except BadInput:  # items without a content that stays
        labels = rows.labels()
        found = np.zeros(len(rows), dtype=np.int64) if labels is None else labels
        return digests_of(found)
