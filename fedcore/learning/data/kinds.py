"""Telling apart what a user's function returned, and where its rows keep their classes.

Invariant: libraries that a task may not use (pandas, Hugging Face datasets) are recognised by the
name of a module, never imported for it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from fedcore.learning.data.groups import named_as_ids
from fedcore.learning.data.reading import each_item

Indices = NDArray[np.int64]
"""(rows,) int64: positions of rows, or the class index of each."""

LIST_NAMES = ("targets", "labels")
"""Where a map-style dataset lists the targets of its items, in this order (the names torchvision uses)."""

LABEL_NAMES = ("label", "labels", "target", "y")
"""Where a row that is a dict keeps its class, in this order (the names Hugging Face models use)."""


def class_indices(y: torch.Tensor) -> Indices | None:
    """(rows,) int64 when `y` holds one class index per row, in whatever dtype; else None."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        return None
    values = y.numpy()
    if values.dtype.kind == "f":
        # Losses on one logit need float targets; exactly 0.0 and 1.0 are classes nevertheless.
        if not np.isin(values, (0.0, 1.0)).all():
            return None
    elif values.size and values.min() < 0:
        return None
    return values.astype(np.int64)


def dataset_labels(
    dataset: Any,
    picked: Indices | None = None,
    where: str = "dataset",
    beside: dict[str, list[Any]] | None = None,
) -> Indices | None:
    """Class indices of the rows `picked` (None: all), from where the dataset's kind keeps them. where: whose they are.

    A dataset of another kind is read item by item; the first item without a class ends the search. beside: gets the
    entries of items so read, where those are dicts, under names of ids of persons.
    Raises whatever the user's `__getitem__` raises.
    """
    if isinstance(dataset, Subset):
        inner = np.asarray(dataset.indices, dtype=np.int64)
        some = inner if picked is None else inner[picked]
        return dataset_labels(dataset.dataset, some, where, beside)
    labels: Indices | None
    if is_hugging_face(dataset):
        labels = _column_labels(dataset)
    elif isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        labels = class_indices(dataset.tensors[-1].detach().cpu())
    elif isinstance(dataset, ConcatDataset):
        labels = all_labels(
            [dataset_labels(part, None, where, beside) for part in dataset.datasets]
        )
    elif (listed := _listed_labels(dataset)) is not None:
        labels = listed
    else:
        places = np.arange(len(dataset)) if picked is None else picked
        return _labels_by_reading(dataset, places, where, beside)
    return labels if labels is None or picked is None else labels[picked]


def all_labels(parts: Sequence[Indices | None]) -> Indices | None:
    """The labels of several parts together; None where one of them has none."""
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None


def _column_labels(dataset: Any) -> Indices | None:
    name = next((n for n in LABEL_NAMES if n in dataset.column_names), None)
    if name is None:
        return None
    values = np.asarray(dataset.select_columns([name]).with_format("numpy")[:][name])
    if values.dtype.kind not in "iub":
        return None
    return class_indices(torch.from_numpy(values.astype(np.int64)))


def _listed_labels(dataset: Any) -> Indices | None:
    """The labels that the dataset lists itself; None where it lists none, or where the first, the middle or the last
    item has another one, as after a transformation."""
    for name in LIST_NAMES:
        try:
            found = torch.as_tensor(getattr(dataset, name, None))
        except (TypeError, ValueError, RuntimeError):  # absent, text, ragged
            continue
        labels = class_indices(found.detach().cpu()) if found.ndim else None
        if labels is None or len(labels) != len(dataset) or not len(labels):
            continue
        some = np.unique([0, len(labels) // 2, len(labels) - 1])
        read = _labels_by_reading(dataset, some, "dataset")
        if read is not None and np.array_equal(read, labels[some]):
            return labels
    return None


def target_of(item: Any) -> Any:
    """The target of an item: the last of a tuple or a list, or the entry of a dict under one of LABEL_NAMES; None
    without one."""
    if isinstance(item, (tuple, list)) and len(item) > 1:
        return item[-1]
    if isinstance(item, dict):
        return next((item[name] for name in LABEL_NAMES if name in item), None)
    return None


def odd_target(items: Sequence[Any]) -> tuple[int, str] | None:
    """(place, what is wrong) of the first target that is missing or has another shape than the first item's; None
    where targets are not to blame for a batch that cannot be made."""
    shapes = []
    for place, item in enumerate(items):
        keyed = isinstance(item, dict) and any(name in item for name in LABEL_NAMES)
        if not keyed and not (isinstance(item, (tuple, list)) and len(item) > 1):
            return None
        target = target_of(item)
        if target is None:
            return place, "None as its target"
        try:
            shapes.append(tuple(np.shape(target)))
        except ValueError:
            return place, "a target of rows of different lengths"
        if shapes[-1] != shapes[0]:
            return place, f"a target of shape {shapes[-1]} after one of shape {shapes[0]}"
    return None


def _labels_by_reading(
    dataset: Any, picked: Indices, where: str, beside: dict[str, list[Any]] | None = None
) -> Indices | None:
    labels = np.empty(len(picked), dtype=np.int64)
    for place, item in enumerate(each_item(dataset, picked.tolist(), where)):
        target = target_of(item)
        if target is None:
            return None
        if beside is not None and isinstance(item, dict):
            for name in filter(named_as_ids, filter(_is_text, item)):
                beside.setdefault(name, []).append(_plain(item[name]))
        value = np.asarray(target)
        if value.size != 1 or value.dtype.kind not in "iubf":
            return None
        number = float(value.reshape(()))
        if number < 0 or not number.is_integer() or (value.dtype.kind == "f" and number > 1):
            return None
        labels[place] = int(number)
    return labels


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _plain(value: Any) -> Any:
    """The number in a tensor or array of one."""
    single = isinstance(value, (torch.Tensor, np.ndarray)) and np.size(value) == 1
    return value.item() if single else value


def is_hugging_face(value: Any) -> bool:
    """Whether this is a `datasets.Dataset`, found without importing that library."""
    return (
        any(kind.__module__.split(".")[0] == "datasets" for kind in type(value).__mro__)
        and hasattr(value, "column_names")
        and hasattr(value, "with_format")
        and hasattr(value, "__len__")
        and not isinstance(value, dict)
    )


def is_dataset(value: Any) -> bool:
    """A torch Dataset, or an object of the user's own with the same two methods."""
    if isinstance(value, Dataset):
        return True
    builtin = isinstance(value, (np.ndarray, torch.Tensor, str, bytes, dict, list, tuple))
    return (
        not builtin
        and not is_pandas(value)
        and not isinstance(value, type)
        and hasattr(value, "__getitem__")
        and hasattr(value, "__len__")
        and type(value).__module__.split(".")[0] not in ("scipy", "pyarrow", "polars")
    )


def is_pandas(value: Any) -> bool:
    """Whether this is a pandas DataFrame, Series or Index, found without importing pandas."""
    return type(value).__module__.split(".")[0] == "pandas"


def kind_of(value: Any) -> str:
    """What to call a value in a message: its type, and its first keys or its length."""
    if isinstance(value, dict):
        names = ", ".join(repr(key) for key in list(value)[:3])
        return f"{type(value).__name__} with keys {names}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__
