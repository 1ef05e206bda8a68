"""The rows of one site: they can be selected, counted by class and served in batches.

Whatever `task.data` returns becomes one of three kinds here: `ArrayRows` (tensors in memory),
`TableRows` (raw features that still need federated statistics) and `DatasetRows` (a map-style
dataset read item by item). All other code uses only what the three have in common.

Left to others: the federated statistics (data/statistics.py), reading tables (data/tabular.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    default_collate,
)

from fedcore.errors import BadInput, FedcoreError
from fedcore.learning.data.canonical import REMEDY, digests_of, item_digest
from fedcore.learning.data.groups import (
    Grouped,
    Groups,
    group_digests,
    holds_ids,
    named_as_ids,
    refuse_shared,
    some_of,
)
from fedcore.learning.data.kinds import (
    Indices,
    all_labels,
    class_indices,
    dataset_labels,
    is_dataset,
    is_hugging_face,
    is_pandas,
    kind_of,
    odd_target,
)
from fedcore.learning.data.statistics import Statistics
from fedcore.learning.data.targets import TargetScale
from fedcore.learning.task import Task, user_code


@dataclass(frozen=True, eq=False)
class ArrayRows:
    """Rows in memory: `x` (rows, ...) and `y` (rows, ...); a batch is the tuple `(x, y)`.

    scale: of the targets of a regression, which the loss sees scaled; None for others. groups: None where every
    row stands for itself. adds_rows: whether the loss of a batch is the sum over its rows, and not their mean.
    """

    x: torch.Tensor
    y: torch.Tensor
    scale: TargetScale | None = None
    groups: Groups | None = None
    adds_rows: bool = False

    def __len__(self) -> int:
        return len(self.x)

    def take(self, indices: Indices) -> ArrayRows:
        picked = torch.from_numpy(np.asarray(indices, dtype=np.int64))
        groups = some_of(self.groups, indices)
        return replace(self, x=self.x[picked], y=self.y[picked], groups=groups)

    def for_loss(self, scale: TargetScale | None, *, adds_rows: bool) -> ArrayRows:
        """The same rows, with what the loss makes of a batch of them."""
        return replace(self, scale=scale, adds_rows=adds_rows)

    def with_groups(self, groups: Groups) -> ArrayRows:
        return replace(self, groups=groups)

    def labels(self) -> Indices | None:
        return class_indices(self.y)

    def digests(self) -> list[bytes]:
        return digests_of(self.x, self.y)

    def batches(self, batch_size: int, order: Indices | None) -> Iterator[Any]:
        """Batches `(x, y)`, copies: a task may change them in place."""
        picked = None if order is None else torch.from_numpy(np.asarray(order, dtype=np.int64))
        for start in range(0, len(self) if picked is None else len(picked), batch_size):
            part = slice(start, start + batch_size)
            if picked is None:  # see `copied`
                yield self.x[part].clone(), self.y[part].clone()
            else:
                yield self.x[picked[part]], self.y[picked[part]]


@dataclass(frozen=True)
class RowLayout:
    """How raw features become the model's inputs; the same at every site, known before any data.

    names, ranges, indicated: one entry per numeric feature: its name, its public (low, high), and
        whether a 0/1 missing-indicator column is added for it.
    fixed: names of the 0/1 columns (categories) that need no statistics.
    order: permutation of [numeric, indicators, fixed] columns into the declared order.
    description: JSON text that rebuilds the reader (`fedcore.learning.data.tabular.Table.from_json`), or "".
    """

    names: tuple[str, ...]
    ranges: tuple[tuple[float, float], ...]
    indicated: tuple[bool, ...]
    fixed: tuple[str, ...] = ()
    order: tuple[int, ...] = ()
    description: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the model's inputs, in their order."""
        indicators = (f"{name}_missing" for name in compress(self.names, self.indicated))
        blocks = (*self.names, *indicators, *self.fixed)
        return tuple(blocks[i] for i in self.order) if self.order else blocks

    def inputs(
        self, features: NDArray[np.float64], fixed: NDArray[np.float32], scale: Statistics
    ) -> NDArray[np.float32]:
        """Impute by the mean, standardise, add the indicators: (rows, len(columns)) float32.

        A missing value becomes exactly 0, the standardised mean. Computed in float64 and rounded
        once, so every machine gets the same bits.
        """
        p = len(self.names)
        mean, std = np.asarray(scale.mean, np.float64), np.asarray(scale.std, np.float64)
        if mean.shape != (p,) or std.shape != (p,):
            raise BadInput(
                f"statistics: found {mean.shape[0] if mean.ndim else 0} features, expected {p}",
                remedy="they belong to another task or to another version of its columns",
            )
        missing = np.isnan(features)
        numeric = np.where(missing, 0.0, (features - mean) / std)
        indicators = missing[:, np.array(self.indicated, dtype=bool)]
        columns = np.concatenate([numeric, indicators, fixed], axis=1).astype(np.float32)
        return columns[:, list(self.order)] if self.order else columns


@dataclass(frozen=True, eq=False)
class TableRows:
    """Raw rows of one site, before the federated statistics are known.

    features: (rows, p) float64 numeric features, NaN = missing.
    fixed: (rows, q) float32 one-hot columns, complete already.
    y: (rows,) int64 classes or float32 values.
    groups: None where every row stands for itself.
    ids: {column: how many different ids it holds}, of columns with ids of persons that are no group.
    """

    features: NDArray[np.float64]
    fixed: NDArray[np.float32]
    y: torch.Tensor
    layout: RowLayout
    groups: Groups | None = None
    ids: Mapping[str, int] = field(default_factory=dict)
    scale: ClassVar[None] = None
    adds_rows: ClassVar[bool] = False

    @property
    def unknown(self) -> dict[str, int]:
        """Rows per column whose category was not declared and became `other` (only where > 0)."""
        counts = {
            name.removesuffix("=other"): int(self.fixed[:, i].sum())
            for i, name in enumerate(self.layout.fixed)
            if name.endswith("=other")
        }
        return {name: count for name, count in counts.items() if count}

    def __len__(self) -> int:
        return len(self.features)

    def take(self, indices: Indices) -> TableRows:
        picked = np.asarray(indices, dtype=np.int64)
        return TableRows(
            self.features[picked], self.fixed[picked], self.y[torch.from_numpy(picked)], self.layout,
            some_of(self.groups, indices), self.ids,
        )  # fmt: skip

    def with_groups(self, groups: Groups) -> TableRows:
        return replace(self, groups=groups, ids={})

    def labels(self) -> Indices | None:
        return class_indices(self.y)

    def digests(self) -> list[bytes]:
        return digests_of(self.features, self.fixed, self.y)

    def batches(self, batch_size: int, order: Indices | None) -> Iterator[Any]:  # noqa: ARG002 - as all
        """Raises BadInput: raw rows are no inputs yet."""
        raise BadInput(
            "table rows: found no statistics, expected standardised rows",
            remedy="call rows.standardise(statistics) first; fedcore.simulate does so by itself",
        )

    def standardise(self, statistics: Statistics) -> ArrayRows:
        """The model's inputs under these federated statistics (mean and std, (p,) float64)."""
        x = self.layout.inputs(self.features, self.fixed, statistics)
        return ArrayRows(torch.from_numpy(x), self.y, groups=self.groups)


class DatasetRows:
    """Rows of a map-style dataset, read when a batch needs them.

    A Hugging Face dataset without a format of its own is read as torch tensors, so that the default
    collate function stacks its columns into a dict of tensors.

    drop_last: whether training leaves an incomplete last batch out, as the task's DataLoader does; `batches` has it.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any] | None = None,
        batch_size: int | None = None,
        *,
        site: str = "",
        known_labels: Sequence[Indices | None] = (),
        drop_last: bool = False,
    ) -> None:
        if is_hugging_face(dataset) and dataset.format["type"] is None:
            dataset = dataset.with_format("torch")
        self.dataset, self.collate, self.batch_size, self.site = dataset, collate, batch_size, site
        self.drop_last = drop_last
        self.indices: Indices = np.arange(len(dataset), dtype=np.int64)
        # Labels and digests of the whole dataset, filled at first use and shared by every `take`: finding
        # them may mean reading each item once.
        self._labels = list(known_labels)
        self._hashed: list[list[bytes]] = []
        self._groups: Groups | None = None
        self.ids: Mapping[str, int] = {}
        """{column: how many different ids it holds}, as of `TableRows`; of Hugging Face datasets only."""
        self.scale: TargetScale | None = None
        self.adds_rows = False

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def groups(self) -> Groups | None:
        """None where every row stands for itself."""
        return some_of(self._groups, self.indices)

    def with_groups(self, groups: Groups) -> DatasetRows:
        found = copy(self)
        found._groups, found.ids = groups, {}  # noqa: SLF001 - its own copy
        return found

    def take(self, indices: Indices) -> DatasetRows:
        taken = copy(self)
        taken.indices = self.indices[np.asarray(indices, dtype=np.int64)]
        return taken

    def for_loss(self, scale: TargetScale | None, *, adds_rows: bool) -> DatasetRows:
        """The same rows, with what the loss makes of a batch of them."""
        same = copy(self)
        same.scale, same.adds_rows = scale, adds_rows
        return same

    def labels(self) -> Indices | None:
        """Class indices, found once for the whole dataset. Raises TaskFailed if reading it fails."""
        if not self._labels:
            with user_code(f"{self.site or 'dataset'}: reading its rows"):
                self._labels.append(dataset_labels(self.dataset))
        known = self._labels[0]
        return None if known is None else known[self.indices]

    def digests(self) -> list[bytes]:
        """SHA-256 of each item's canonical form, found once for the whole dataset.

        Raises BadInput for an item without one, or where the dataset gives another item when it is read
        again, and TaskFailed if reading it fails.
        """
        if not self._hashed:
            with user_code(f"{self.site or 'dataset'}: reading its rows"):
                found = [item_digest(self.dataset[index]) for index in range(len(self.dataset))]
                again = [item_digest(self.dataset[index]) for index in range(min(3, len(found)))]
            if again != found[: len(again)]:
                kind = type(self.dataset).__name__
                raise BadInput(
                    f"rows: found another item of {kind} when it was read again, expected the same one",
                    remedy=f"draw augmentations in task.train instead; or {REMEDY}",
                )
            self._hashed.append(found)
        return [self._hashed[0][int(index)] for index in self.indices]

    def batches(self, batch_size: int, order: Indices | None) -> Iterator[Any]:
        """Collated batches; a DataLoader's own batch size wins. Raises what the dataset raises."""
        picked = self.indices if order is None else self.indices[np.asarray(order, dtype=np.int64)]
        collate = default_collate if self.collate is None else self.collate
        size = self.batch_size or batch_size
        fetch_many = getattr(self.dataset, "__getitems__", None)
        for start in range(0, len(picked), size):
            some = [int(i) for i in picked[start : start + size]]
            items = list(fetch_many(some)) if fetch_many else [self.dataset[i] for i in some]
            try:
                batch = collate(items)
            except (TypeError, RuntimeError, ValueError) as error:
                if found := odd_target(items):
                    place, what = found
                    raise BadInput(
                        f"{self.site or 'dataset'}: item {some[place]}: found {what}, expected targets of one shape "
                        "that are all there",
                        remedy="leave such items out; where targets differ in length, pad them in the collate_fn "
                        "of a DataLoader",
                    ) from error
                raise
            yield batch


Rows: TypeAlias = ArrayRows | TableRows | DatasetRows
"""The rows of one site, or of one fold of it.

`take` gives some of them, in the order asked for; `labels` (rows,) int64 class indices, None where the target is not
a class or is unknown; `digests` SHA-256 of each row's canonical bytes, features and target, equal for equal rows only
(raises BadInput for rows without a canonical form); `groups` which rows belong
together; `batches` what `task.predict` takes, `order=None` being row order.
"""


def load_rows(task: Task, source: Any, site: str) -> tuple[Rows, Rows | None]:
    """Call `task.data(source)` for one site: `(all its rows, None)` or `(train rows, test rows)`.

    Raises TaskFailed when the user's function raises (with the user's traceback), BadInput when
    what it returned is empty, not finite, or of no kind listed in docs/tasks.md.
    """
    where = f"site {site}"
    with user_code(f"{where}: task.data"):
        try:
            found = task.data(source)
        except FedcoreError as error:
            # An error of our own reader; only the site's name is added.
            raise BadInput(f"{where}: {error}", remedy=error.remedy) from error
    if isinstance(found, (tuple, list)) and len(found) == 2 and all(_is_whole(v) for v in found):
        train = _recognise(found[0], task, f"{where} (train part)")
        test = _recognise(found[1], task, f"{where} (test part)")
        refuse_shared(train.groups, test.groups, where)
        return train, test
    return _recognise(found, task, where), None


def pool(parts: Sequence[Rows]) -> Rows:
    """The union of the sites' rows, in the order given: what the centralised arm trains on. Raises BadInput
    when the sites' rows are of different kinds, shapes or column layouts."""
    if not parts:
        raise BadInput("pool: found no sites, expected at least 1")
    ways: dict[type[Any], Callable[[Any], Rows]] = {
        ArrayRows: _pool_arrays, TableRows: _pool_tables, DatasetRows: _pool_datasets,
    }  # fmt: skip
    for kind, join in ways.items():
        if all(isinstance(part, kind) for part in parts):
            return join(parts)
    kinds = sorted({type(part).__name__ for part in parts})
    raise BadInput(
        f"sites: found rows of different kinds ({', '.join(kinds)}), expected one kind",
        remedy="task.data must return the same kind for every site",
    )


def _pool_arrays(parts: Sequence[ArrayRows]) -> ArrayRows:
    shapes = {
        f"X {list(p.x.shape[1:])} {p.x.dtype}, y {list(p.y.shape[1:])} {p.y.dtype}" for p in parts
    }
    if len(shapes) > 1:
        seen = "; ".join(sorted(shapes)).replace("torch.", "")
        raise BadInput(
            f"sites: found rows of different shapes ({seen}), expected one shape",
            remedy="task.data must return the same columns and target type for every site",
        )
    x, y = torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts])
    return ArrayRows(x, y, parts[0].scale, adds_rows=parts[0].adds_rows)


def _pool_tables(parts: Sequence[TableRows]) -> TableRows:
    if len({(p.layout, p.y.dtype) for p in parts}) > 1:
        raise BadInput(
            "sites: found tables of different columns, expected one declaration for all",
            remedy="build fedcore.table(...) once, outside task.data",
        )
    return TableRows(
        np.concatenate([p.features for p in parts]),
        np.concatenate([p.fixed for p in parts]),
        torch.cat([p.y for p in parts]),
        parts[0].layout,
    )


def _pool_datasets(parts: Sequence[DatasetRows]) -> DatasetRows:
    union: ConcatDataset[Any] = ConcatDataset(
        [Subset(part.dataset, part.indices.tolist()) for part in parts]
    )
    labels = all_labels([part.labels() for part in parts])
    pooled = DatasetRows(
        union, parts[0].collate, parts[0].batch_size, site="all sites", known_labels=[labels],
        drop_last=parts[0].drop_last,
    )  # fmt: skip
    return pooled.for_loss(parts[0].scale, adds_rows=parts[0].adds_rows)


def copied(rows: Rows) -> Rows:
    """For code that may change arrays in place: `clone` keeps their order in memory, and so the last bits."""
    if not isinstance(rows, ArrayRows):
        return rows
    return replace(rows, x=rows.x.clone(), y=rows.y.clone())


def rows_digest(*parts: Rows | None) -> str:
    """SHA-256 over the sorted SHA-256 of all rows of all parts, hex: the same for the same rows in any order.

    It depends on no split, fold, cap or job. Rows can be guessed by comparing digests, so it stays at the site,
    and the ledger stores a keyed form (`clients/ledger.py`). A dataset whose items have no content that stays
    goes by the number of its rows and their labels.
    """
    every = sorted(digest for part in parts if part is not None for digest in _content_of(part))
    return hashlib.sha256(b"fedcore rows " + b"".join(every)).hexdigest()


def _content_of(rows: Rows) -> list[bytes]:
    try:
        return rows.digests()
    except BadInput:  # items without a content that stays
        labels = rows.labels()
        return digests_of(np.zeros(len(rows), dtype=np.int64) if labels is None else labels)


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
        each: list[Any] = [found.ids(rows.dataset[index]) for index in range(len(rows))]
    return each


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
        if is_hugging_face(dataset):
            named = filter(named_as_ids, dataset.column_names)
            values = {name: list(dataset.with_format(None)[name]) for name in named}
            rows.ids = {name: ids for name in values if (ids := holds_ids(name, values[name]))}
        return rows


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
    y = _target_tensor(raw_y, where)
    if task.statistics is None:
        return ArrayRows(array_inputs(raw_x, where), y)
    layout = array_layout(task.statistics)
    features = array_features(raw_x, len(layout.names), where)
    return TableRows(features, np.zeros((len(features), 0), np.float32), y, layout)


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


def _target_tensor(raw: Any, where: str) -> torch.Tensor:
    """Integers and booleans become int64, floats float32."""
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
