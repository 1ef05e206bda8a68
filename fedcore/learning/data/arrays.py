"""Arrays and tensors of a task as numbers: inputs, targets, raw features with their layout.

Invariant: what is no number, is not finite or lacks a target is refused by name, before anything trains on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedcore.errors import BadInput
from fedcore.learning.data.rows import RowLayout


def array_inputs(raw: Any, where: str) -> torch.Tensor:
    """An array or a tensor as a model takes it, in training and in `Run.predict` alike.

    float32, except that a *tensor* of integers (token ids, raw pixels) keeps its dtype: a numpy array
    of integers is nearly always a table of numbers, which a Linear layer would refuse.
    Raises BadInput for what are not numbers, and for NaN or infinity.
    """
    _require_numbers(raw, "X", where)
    if isinstance(raw, torch.Tensor):
        keep = not raw.is_floating_point() and raw.dtype is not torch.bool
        x = raw.detach().cpu() if keep else raw.detach().cpu().to(torch.float32)
    else:
        # Row by row in memory: the last bits of a product may depend on it, and data frames give columns.
        x = torch.from_numpy(np.array(raw, dtype=np.float32, order="C"))
    _refuse_not_finite(x, "X", where)
    return x


def target_tensor(raw: Any, where: str) -> torch.Tensor:
    """Integers and booleans become int64, floats float32. Raises BadInput for what are not numbers, and for targets
    that are missing."""
    _require_numbers(raw, "y", where)
    if isinstance(raw, torch.Tensor):
        y = raw.detach().cpu()
    else:
        y = torch.from_numpy(np.array(raw, dtype=np.float32 if raw.dtype.kind == "f" else np.int64))
    y = y.to(torch.float32 if y.is_floating_point() else torch.int64)
    _refuse_not_finite(y, "y", where)
    return y


def array_features(raw: Any, columns: int, where: str) -> NDArray[np.float64]:
    """An array whose task declared public ranges: (rows, columns) float64, NaN = missing. Raises BadInput for
    another shape, for what are not numbers, and for infinity."""
    features = np.array(raw.detach().cpu().numpy() if isinstance(raw, torch.Tensor) else raw)
    _require_numbers(features, "X", where)
    features = features.astype(np.float64)
    if features.ndim != 2 or features.shape[1] != columns:
        raise BadInput(
            f"{where}: found X of shape {list(features.shape)}, expected (rows, {columns})",
            remedy="Task(statistics=...) gives one (low, high) per column of X",
        )
    observed = np.where(np.isnan(features), 0.0, features)
    _refuse_not_finite(torch.from_numpy(observed), "X", where)
    return features


def array_layout(statistics: Sequence[Any]) -> RowLayout:
    """The layout of an array task from `Task.statistics`: per column (low, high) or a `number(...)`. Raises
    BadInput unless low < high, both finite."""
    ranges, indicated = [], []
    for i, entry in enumerate(statistics):
        indicated.append(bool(getattr(entry, "may_be_missing", False)))
        try:
            pair = (entry.low, entry.high) if hasattr(entry, "low") else entry
            low, high = float(pair[0]), float(pair[1])
        except (TypeError, ValueError, IndexError, KeyError):
            low = high = float("nan")
        if not (low < high and np.isfinite([low, high]).all()):
            raise BadInput(
                f"task.statistics[{i}]: found {entry!r}, expected (low, high) with low < high",
                remedy="a public range every site can know without looking at its rows",
            )
        ranges.append((low, high))
    names = tuple(f"x{i}" for i in range(len(ranges)))
    return RowLayout(names, tuple(ranges), tuple(indicated))


def _refuse_not_finite(values: torch.Tensor, name: str, where: str) -> None:
    if not values.is_floating_point():
        return
    bad = ~torch.isfinite(values)
    count = int(bad.sum())
    if count == 0:
        return
    place = name
    if values.ndim == 2:
        columns = torch.nonzero(bad.any(dim=0)).flatten().tolist()
        shown = ", ".join(str(c) for c in columns[:5]) + (", ..." if len(columns) > 5 else "")
        place = f"{name} column{'s' if len(columns) > 1 else ''} {shown}"
    remedy = "drop those rows: a target must be observed"
    if name == "X":
        remedy = (
            "impute them, or give Task(statistics=((low, high), ...)) and the sites impute and "
            "standardise together; fedcore.table(...) does this for data frames"
        )
    raise BadInput(
        f"{where}: found {count} NaN or infinite value{'s' if count > 1 else ''} in {place}, "
        "expected finite numbers",
        remedy=remedy,
    )


def _refuse_objects(values: NDArray[Any], where: str) -> None:
    """Name what makes targets an array of objects: missing values, or rows of different lengths."""
    flat = values.reshape(-1)
    missing = [
        i for i, each in enumerate(flat) if each is None or str(each) in ("nan", "<NA>", "NaT")
    ]
    if missing:
        raise BadInput(
            f"{where}: found {len(missing)} missing value{'s' if len(missing) > 1 else ''} in y (the first in row "
            f"{missing[0] // max(1, len(flat) // len(values)) + 1}), expected a target for every row",
            remedy="drop those rows: a target must be observed",
        )
    lengths = {
        len(value) for value in flat if hasattr(value, "__len__") and not isinstance(value, str)
    }
    if lengths:
        raise BadInput(
            f"{where}: found rows of {min(lengths)} to {max(lengths)} values in y, expected as many in every row",
            remedy="one class index per row; of several labels a row of 0 and 1 for each, with an `evaluate` of "
            "the task's own",
        )


def _require_numbers(values: Any, name: str, where: str) -> None:
    """Raise BadInput unless an array or tensor has real numbers or truth values."""
    tensor = isinstance(values, torch.Tensor)
    if not values.is_complex() if tensor else values.dtype.kind in "fiub":
        return
    if name == "y" and not tensor and values.dtype.kind == "O":
        _refuse_objects(values, where)
    remedy = "map classes to 0, 1, 2, ... the same way at every site"
    if name == "X":
        remedy = "fedcore.table(target=..., columns={...}) turns declared categories into numbers"
    raise BadInput(
        f"{where}: found {name} of dtype {values.dtype}, expected numbers", remedy=remedy
    )
