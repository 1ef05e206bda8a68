"""The rows that `task.data` returned for one site, in whichever of the forms of docs/tasks.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from fedcore.errors import BadInput, FedcoreError, TaskFailed
from fedcore.learning.data.arrays import array_features, array_inputs, array_layout, target_tensor
from fedcore.learning.data.groups import (
    Grouped,
    group_digests,
    named_as_ids,
    refuse_shared,
    repeated_ids,
)
from fedcore.learning.data.kinds import Indices, is_dataset, is_hugging_face, is_pandas, kind_of
from fedcore.learning.data.reading import each_item
from fedcore.learning.data.rows import ArrayRows, DatasetRows, Rows, TableRows
from fedcore.learning.task import Task, user_code


def load_rows(task: Task, source: Any, site: str) -> tuple[Rows, Rows | None]:
    """Call `task.data(source)` for one site: `(all its rows, None)` or `(train rows, test rows)`.

    Raises TaskFailed when the user's function raises (with the user's traceback), BadInput when
    what it returned is empty, not finite, or of no kind listed in docs/tasks.md.
    """
    where = f"site {site}"
    if isinstance(source, (ArrayRows, TableRows, DatasetRows)):  # of sites that were dealt again
        return source, None
    with user_code(f"{where}: task.data"):
        try:
            found = task.data(source)
        except TaskFailed:  # of an app's own code, and named
            raise
        except FedcoreError as error:
            # An error of our own reader; only the site's name is added.
            raise BadInput(f"{where}: {error}", remedy=error.remedy) from error
    if isinstance(found, (tuple, list)) and len(found) == 2 and all(_is_whole(v) for v in found):
        train = _recognise(found[0], task, f"{where} (train part)")
        test = _recognise(found[1], task, f"{where} (test part)")
        refuse_shared(train.groups, test.groups, where)
        return train, test
    return _recognise(found, task, where), None


def _recognise(found: Any, task: Task, where: str) -> Rows:
    if isinstance(found, Grouped):
        rows = _recognise(found.rows, task, where)
        return rows.with_groups(group_digests(_ids_of(found, rows, where), len(rows), where))
    rows = _rows_of(found, task, where)
    if not len(rows):
        raise BadInput(
            f"{where}: found 0 rows, expected at least 1", remedy="check what task.data reads there"
        )
    return rows


def _ids_of(found: Grouped, rows: Rows, where: str) -> Iterable[Any]:
    if not callable(found.ids):
        given: Iterable[Any] = found.ids
        return given
    if not isinstance(rows, DatasetRows):
        raise BadInput(
            f"{where}: found a function for the ids of rows in memory, expected one id for each row",
            remedy="fedcore.grouped(rows, ids) with an array of ids",
        )
    with user_code(f"{where}: the ids of fedcore.grouped"):
        return [*map(found.ids, each_item(rows.dataset, range(len(rows)), where))]


def _rows_of(found: Any, task: Task, where: str) -> Rows:
    if isinstance(found, (ArrayRows, TableRows)):
        return found
    if isinstance(found, DatasetRows):
        found.site = found.site or where
        return found
    if isinstance(found, DataLoader):
        return _rows_of_loader(found, where)
    if isinstance(found, IterableDataset) or type(found).__name__ == "IterableDataset":
        raise _iterable(where, type(found).__name__)
    if is_hugging_face(found) or is_dataset(found):
        return _rows_of_dataset(found, where, None, None)
    if is_pandas(found):
        raise _frame(where)
    if isinstance(found, (tuple, list)) and len(found) == 2:
        return _rows_of_arrays(found[0], found[1], task, where)
    raise BadInput(
        f"{where}: task.data returned {kind_of(found)}, expected (X, y), a table, a Dataset, "
        "a DataLoader, or a (train, test) pair of these",
        remedy="docs/tasks.md shows each form",
    )


def _rows_of_loader(loader: DataLoader[Any], where: str) -> DatasetRows:
    if isinstance(loader.dataset, IterableDataset):
        raise _iterable(where, type(loader.dataset).__name__)
    batches = loader.batch_sampler
    plain = isinstance(loader.sampler, (RandomSampler, SequentialSampler))
    if batches is None or type(batches) is not BatchSampler or not plain:
        found = loader.sampler if isinstance(batches, BatchSampler) else batches
        raise BadInput(
            f"{where}: found a DataLoader with its own {kind_of(found)}, expected batch_size= and "
            "optionally shuffle= and collate_fn=",
            remedy="the run's seed decides the order of rows; for another way of sampling give "
            "Task(train=...)",
        )
    rows = _rows_of_dataset(loader.dataset, where, loader.collate_fn, batches.batch_size)
    rows.drop_last = batches.drop_last
    return rows


def _rows_of_dataset(
    dataset: Any, where: str, collate: Callable[[list[Any]], Any] | None, batch_size: int | None
) -> DatasetRows:
    with user_code(
        f"{where}: the length of {type(dataset).__name__}",
        remedy="a map-style dataset defines __len__ and __getitem__",
    ):
        rows = DatasetRows(dataset, collate, batch_size, site=where)
        rows.ids = repeated_ids(_id_columns(dataset))
        return rows


def _id_columns(dataset: Any, picked: Indices | None = None) -> dict[str, list[Any]]:
    """Columns of a Hugging Face dataset, also of some of its rows, that have the name of ids of persons."""
    if isinstance(dataset, Subset):
        inner = np.asarray(dataset.indices, dtype=np.int64)
        return _id_columns(dataset.dataset, inner if picked is None else inner[picked])
    if not is_hugging_face(dataset):
        return {}
    columns = dataset.with_format(None)
    named = {name: list(columns[name]) for name in filter(named_as_ids, dataset.column_names)}
    if picked is None:
        return named
    return {name: [values[row] for row in picked] for name, values in named.items()}


def _rows_of_arrays(raw_x: Any, raw_y: Any, task: Task, where: str) -> Rows:
    for name, value in (("X", raw_x), ("y", raw_y)):
        if is_pandas(value):
            raise _frame(where)
        if not isinstance(value, (np.ndarray, torch.Tensor)):
            remedy = f"np.asarray({name}) makes one"
            if hasattr(value, "toarray"):
                remedy = f"{name}.toarray() makes one from a sparse matrix"
            raise BadInput(
                f"{where}: found {kind_of(value)} for {name}, expected an array or a tensor",
                remedy=remedy,
            )
        if value.ndim == 0:
            raise BadInput(f"{where}: found a single number for {name}, expected one entry per row")
    if len(raw_x) != len(raw_y):
        raise BadInput(
            f"{where}: found {len(raw_x)} rows in X and {len(raw_y)} in y, expected as many",
            remedy="task.data returns (X, y) with one target per row",
        )
    y = target_tensor(raw_y, where)
    if task.statistics is None:
        return ArrayRows(array_inputs(raw_x, where), y)
    layout = array_layout(task.statistics)
    features = array_features(raw_x, len(layout.names), where)
    return TableRows(features, np.zeros((len(features), 0), np.float32), y, layout)


def _is_whole(value: Any) -> bool:
    """True for one half of a (train, test) pair: something that is rows by itself."""
    if isinstance(value, (tuple, list)):
        return len(value) == 2 and all(hasattr(part, "ndim") for part in value)
    kinds = (ArrayRows, TableRows, DatasetRows, DataLoader, Dataset, Grouped)
    return isinstance(value, kinds) or is_hugging_face(value) or is_dataset(value)


def _iterable(where: str, kind: str) -> BadInput:
    return BadInput(
        f"{where}: found the iterable dataset {kind}, expected a map-style one",
        remedy="define __len__ and __getitem__: folds and seeds need rows that can be counted",
    )


def _frame(where: str) -> BadInput:
    return BadInput(
        f"{where}: found a pandas DataFrame or Series, expected rows of declared columns",
        remedy="return fedcore.table(target=..., columns={...})(frame): declared columns are the "
        "same at every site, whatever values each one happens to hold",
    )
