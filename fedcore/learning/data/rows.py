"""The rows of one site: they can be selected, counted by class and served in batches.

Whatever `task.data` returns becomes one of three kinds here: `ArrayRows` (tensors in memory),
`TableRows` (raw features that still need federated statistics) and `DatasetRows` (a map-style
dataset read item by item). All other code uses only what the three have in common.

Left to others: what a task returned (data/loading.py), numbers in arrays (data/arrays.py), the federated
statistics (data/statistics.py), reading tables (data/tabular.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Subset, default_collate

from fedcore.errors import BadInput
from fedcore.learning.data.canonical import REMEDY, digests_of, item_digest
from fedcore.learning.data.groups import Groups, repeated_ids, some_of
from fedcore.learning.data.kinds import (
    Indices,
    all_labels,
    class_indices,
    dataset_labels,
    is_hugging_face,
    odd_target,
)
from fedcore.learning.data.reading import each_item
from fedcore.learning.data.statistics import Statistics
from fedcore.learning.data.targets import TargetScale
from fedcore.learning.task import user_code


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
        self.ids: dict[str, int] = {}
        """{column: how many different ids it holds}, as of `TableRows`; of Hugging Face datasets, and of those of dicts
        whose items were read for their labels."""
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
            where = self.site or "dataset"
            with user_code(f"{where}: reading its rows"):
                beside: dict[str, list[Any]] = {}
                self._labels.append(dataset_labels(self.dataset, None, where, beside))
            if self._groups is None:
                whole = {k: ids for k, ids in beside.items() if len(ids) == len(self.dataset)}
                self.ids.update(repeated_ids(whole))
        known = self._labels[0]
        return None if known is None else known[self.indices]

    def digests(self) -> list[bytes]:
        """SHA-256 of each item's canonical form, found once for the whole dataset.

        Raises BadInput for an item without one, or where the dataset gives another item when it is read
        again, and TaskFailed if reading it fails.
        """
        if not self._hashed:
            where, places = self.site or "dataset", range(len(self.dataset))
            with user_code(f"{where}: reading its rows"):
                found = [*map(item_digest, each_item(self.dataset, places, where))]
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
