"""One byte form for a row, whatever kind of rows a task has, so that a keyed hash can deal rows by content.

Invariant: equal rows have equal bytes on every machine; every part is framed by its kind and length, so
two different rows never have the same bytes. 0.0 and -0.0 are one value, and so is every NaN.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fedcore.errors import BadInput
from fedcore.learning.data.kinds import kind_of

REMEDY = (
    'return a (train, test) pair from task.data, or `method = "folds"` in [split] of site.toml for a '
    "rehearsal"
)


def digests_of(*columns: Any) -> list[bytes]:
    """SHA-256 of each row over arrays or tensors with as many rows each."""
    parts = [_numbers(column) for column in columns]
    head = b"".join(
        _framed(b"array", f"{part.dtype.str} {part.shape[1:]}".encode()) for part in parts
    )
    return [
        hashlib.sha256(head + b"".join(part[row].tobytes() for part in parts)).digest()
        for row in range(len(parts[0]))
    ]


def _numbers(values: torch.Tensor | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Little-endian and contiguous, with one zero and one NaN. Raises BadInput for objects."""
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values
    if array.dtype.kind not in "fiubSU":
        raise BadInput(
            f"rows: found values of dtype {array.dtype}, expected numbers", remedy=REMEDY
        )
    found = np.ascontiguousarray(array).reshape(array.shape)
    if found.dtype.kind == "f":
        found = np.where(np.isnan(found), found.dtype.type(np.nan), found + found.dtype.type(0))
    return found.astype(found.dtype.newbyteorder("<"), copy=False)


def item_digest(item: Any) -> bytes:
    """SHA-256 of one item of a dataset: tensors, arrays, numbers, text and bytes, in tuples, lists and dicts.
    Raises BadInput for anything else."""
    found = hashlib.sha256()
    for part in _parts(item):
        found.update(part)
    return found.digest()


def _parts(item: Any) -> Iterator[bytes]:
    if isinstance(item, torch.Tensor | np.ndarray):
        values = _numbers(item)
        yield _framed(b"array", f"{values.dtype.str} {values.shape}".encode()) + values.tobytes()
    elif item is None or isinstance(item, bool | int | float | np.generic):
        value = item.item() if isinstance(item, np.generic) else item
        if not (value is None or isinstance(value, bool | int | float)):
            raise _unhashable(item)
        value = value + 0.0 if isinstance(value, float) else value
        yield _framed(type(value).__name__.encode(), repr(value).encode())
    elif isinstance(item, str | bytes):
        text = item.encode() if isinstance(item, str) else item
        yield _framed(type(item).__name__.encode(), text)
    elif isinstance(item, dict) and all(isinstance(key, str) for key in item):
        yield _framed(b"dict", str(len(item)).encode())
        for key in sorted(item):
            yield _framed(b"key", key.encode())
            yield from _parts(item[key])
    elif isinstance(item, tuple | list):
        yield _framed(b"list", str(len(item)).encode())
        for part in item:
            yield from _parts(part)
    else:
        raise _unhashable(item)


def _framed(kind: bytes, data: bytes) -> bytes:
    return b"".join(len(part).to_bytes(8, "big") + part for part in (kind, data))


def _unhashable(item: Any) -> BadInput:
    return BadInput(
        f"rows: found {kind_of(item)} in an item of the dataset, expected tensors, arrays, numbers or text",
        remedy=REMEDY,
    )
