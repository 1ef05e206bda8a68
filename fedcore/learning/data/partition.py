"""Sites for a simulation: one data set dealt out, or one frame cut at a column.

Invariant: the parts are disjoint, together they are the whole, and none is empty.
Source: label-skewed splits by a Dirichlet distribution, Hsu et al. 2019 (arXiv:1909.06335) s3;
shards of sorted labels, McMahan et al. 2017 (arXiv:1602.05629) s3; sizes by a Dirichlet distribution, Li et al. 2022
(arXiv:2102.02079) s4.
"""

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Subset

from fedcore.errors import BadInput, UnknownName
from fedcore.learning.data.kinds import (
    Indices,
    class_indices,
    is_dataset,
    is_hugging_face,
    is_pandas,
)
from fedcore.learning.data.rows import ArrayRows, DatasetRows, TableRows
from fedcore.learning.data.statistics import Statistics

WAYS = ("iid", "dirichlet", "label", "quantity", "features")

_BY_ALPHA, _BY_LABELS = ("dirichlet", "quantity"), ("dirichlet", "label")

SHARDS_PER_SITE = 2
"""McMahan et al. 2017 s3: two shards of sorted labels per site, so most sites see two classes."""


def split(
    dataset: Any,
    n: int,
    by: str = "iid",
    alpha: float | None = None,
    seed: int = 0,
    *,
    label: str | None = None,
) -> dict[str, Any]:
    """Deal one data set to `n` sites: `{"site-01": part, ...}`, each part of the kind that came in.

    dataset: `(X, y)`, a map-style or Hugging Face Dataset, a DataFrame (with `label=` its target
        column), or rows of `fedcore.table`. Use the result as `sites=`, with
        `Task(data=lambda part: part)` or a reader.
    by: "iid" deals at random; "dirichlet" draws for every class how it is spread over the sites
        from Dirichlet(alpha): small alpha, one-sided sites; "label" sorts by class and gives each
        site two shards; "quantity" deals at random, in sizes drawn from Dirichlet(alpha); "features" sorts rows of
        arrays along the direction in which they differ most (the first principal component), so that each site
        has another range of inputs.

    Raises BadInput when `n` parts cannot all have a row, or labels are wanted and there are none.
    """
    found, take = _dealt(dataset, n, by, alpha, seed, label)
    return {name: take(part) for name, part in found.items()}


def split_places(
    dataset: Any, n: int, by: str = "iid", alpha: float | None = None, seed: int = 0
) -> dict[str, Indices]:
    """What `split` would give each site, as places of rows: {site: (rows,) int64, ascending}. Raises as it does."""
    return _dealt(dataset, n, by, alpha, seed, None)[0]


def _dealt(
    dataset: Any, n: int, by: str, alpha: float | None, seed: int, label: str | None
) -> tuple[dict[str, Indices], Callable[[Indices], Any]]:
    """The places of each site's rows, and the function that takes rows by them."""
    if by not in WAYS:
        raise UnknownName("split(by=...)", str(by), WAYS)
    if by in _BY_ALPHA and not (isinstance(alpha, (int, float)) and 0 < alpha < float("inf")):
        raise BadInput(
            f"split(by={by!r}): found alpha={alpha!r}, expected a number above 0",
            remedy="alpha=0.5 is skewed, alpha=100 nearly even",
        )
    if by not in _BY_ALPHA and alpha is not None:
        raise BadInput(
            f"split(by={by!r}): found alpha={alpha!r}, expected none",
            remedy="alpha belongs to by='dirichlet' and by='quantity'",
        )
    n = operator.index(n)
    rows, labels, take = _opened(dataset, label, wanted=by in _BY_LABELS)
    if by in _BY_LABELS and labels is None:
        raise BadInput(
            "split: found no class labels, expected one class 0, 1, 2, ... per row",
            remedy='by="iid" needs none',
        )
    least = n * SHARDS_PER_SITE if by == "label" else n
    if n < 1 or rows < least:
        raise BadInput(
            f"split(n=...): found n={n!r} for {rows} rows, expected 1 <= n"
            + (f" and at least {SHARDS_PER_SITE} rows per site" if by == "label" else " <= rows"),
            remedy="every site needs rows of its own",
        )
    generator = np.random.default_rng(seed)
    parts: Sequence[NDArray[np.integer]]
    if by == "features":
        parts = np.array_split(_along_first_component(dataset), n)
    elif by == "quantity":
        parts = _dirichlet(np.zeros(rows, dtype=np.int64), n, float(alpha or 0), generator)
    elif labels is None:
        parts = np.array_split(generator.permutation(rows), n)
    elif by == "dirichlet":
        parts = _dirichlet(labels, n, float(alpha or 0), generator)
    else:
        parts = _shards(labels, n, generator)
    width = max(2, len(str(n)))
    places = {
        f"site-{i + 1:0{width}d}": np.sort(part).astype(np.int64) for i, part in enumerate(parts)
    }
    return places, take


def group(frame: Any, by: str) -> dict[str, Any]:
    """Cut a DataFrame at the values of one column: `{site id: its rows}`, ids in sorted order.

    An id is the value in lower case with every other sign than a-z, 0-9 and `-` replaced by `-`.
    Raises BadInput for a missing column, a missing value in it, or two values with the same id.
    """
    if not (is_pandas(frame) and hasattr(frame, "columns")):
        raise BadInput(f"group: found {type(frame).__name__}, expected a pandas DataFrame")
    if by not in frame.columns:
        raise UnknownName("group(by=...)", str(by), [str(column) for column in frame.columns])
    absent = int(frame[by].isna().sum())
    if absent:
        raise BadInput(
            f"group(by={by!r}): found {absent} rows without a value, expected one in each",
            remedy=f"frame.dropna(subset=[{by!r}]) leaves them out",
        )
    if len(frame) == 0:
        raise BadInput("group: found 0 rows, expected at least 1")
    of_row = frame[by].map(site_id)
    names: dict[str, str] = {}
    for value in frame[by].unique().tolist():
        safe = site_id(value)
        if safe in names:
            raise BadInput(
                f"group(by={by!r}): found {names[safe]!r} and {str(value)!r}, which both make the "
                f"site id {safe!r}, expected different ids",
                remedy="rename one of them first",
            )
        names[safe] = str(value)
    return {name: frame[(of_row == name).to_numpy()] for name in sorted(names)}


def site_id(value: Any) -> str:
    """A site id for any value: `VA Long Beach` -> `va-long-beach`, `3.0` -> `3`."""
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    return re.sub(r"[^a-z0-9]+", "-", text.strip().lower()).strip("-") or "site"


def _opened(
    dataset: Any, label: str | None, wanted: bool
) -> tuple[int, Indices | None, Callable[[Indices], Any]]:
    """`(number of rows, class of each row if wanted, function taking rows by index)`."""
    labels: Indices | None = None
    taker: Callable[[Indices], Any]
    if isinstance(dataset, (tuple, list)) and len(dataset) == 2:
        x, y = dataset
        for name, value in (("X", x), ("y", y)):
            if not isinstance(value, (np.ndarray, torch.Tensor)) or value.ndim == 0:
                raise BadInput(
                    f"split: found {type(value).__name__} for {name}, expected an array or a tensor"
                )
        if len(x) != len(y):
            raise BadInput(f"split: found {len(x)} rows in X and {len(y)} in y, expected as many")
        labels = class_indices(torch.as_tensor(y)) if wanted else None
        return len(x), labels, lambda part: (x[part], y[part])
    if isinstance(dataset, DataLoader):
        raise BadInput(
            "split: found a DataLoader, expected a data set",
            remedy="split its dataset and build a DataLoader per site in task.data",
        )
    if is_pandas(dataset) and hasattr(dataset, "iloc"):
        if wanted:
            if label is None or label not in dataset.columns:
                raise BadInput(
                    f"split: found label={label!r}, expected the name of a column",
                    remedy='split(frame, n, by="label", label="diagnosis")',
                )
            # Sorted, so that the numbering does not depend on the order of the rows.
            _, codes = np.unique(
                dataset[label].astype(str).to_numpy().astype(str), return_inverse=True
            )
            labels = codes.astype(np.int64)
        return len(dataset), labels, lambda part: dataset.iloc[part]
    rows = dataset
    if isinstance(dataset, (ArrayRows, TableRows, DatasetRows)):
        taker = dataset.take
    elif is_hugging_face(dataset):
        rows, taker = DatasetRows(dataset), lambda part: dataset.select(part.tolist())
    elif is_dataset(dataset):
        if not hasattr(dataset, "__len__"):
            raise BadInput("split: found an iterable dataset, expected a map-style one")
        rows, taker = (
            DatasetRows(dataset, site="split"),
            lambda part: Subset(dataset, part.tolist()),
        )
    else:
        raise BadInput(
            f"split: found {type(dataset).__name__}, expected (X, y), a Dataset or a DataFrame"
        )
    return len(dataset), rows.labels() if wanted else None, taker


def _dirichlet(
    labels: Indices, n: int, alpha: float, generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    parts: list[list[int]] = [[] for _ in range(n)]
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        shares = generator.dirichlet(np.full(n, alpha))
        if not np.isfinite(shares).all():  # every gamma draw underflowed at a tiny alpha
            shares = np.eye(n)[generator.integers(n)]
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for part, some in zip(parts, np.split(members, cuts), strict=True):
            part.extend(some.tolist())
    # A site without rows could not take part: it gets one from the site with the most.
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    return [np.array(part, dtype=np.int64) for part in parts]


def _along_first_component(dataset: Any) -> NDArray[np.int64]:
    """The rows of `(X, y)` in their order along the first principal component of X; equal ones as they were."""
    if isinstance(dataset, TableRows):  # as a model gets them without statistics that travel
        dataset = dataset.standardise(
            Statistics.of_ranges(dataset.layout.names, dataset.layout.ranges)
        )
    if isinstance(dataset, ArrayRows):
        dataset = dataset.x, dataset.y
    if not isinstance(dataset, (tuple, list)):
        raise BadInput(
            f"split(by='features'): found {type(dataset).__name__}, expected arrays (X, y)",
            remedy="fedcore.group cuts a frame at a column, which says more",
        )
    x = np.asarray(dataset[0], dtype=np.float64).reshape(len(dataset[0]), -1)
    centred = x - x.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    return np.argsort(centred @ vectors[:, -1], kind="stable").astype(np.int64)


def _shards(labels: Indices, n: int, generator: np.random.Generator) -> list[NDArray[np.int64]]:
    mixed = generator.permutation(len(labels))
    by_label = mixed[np.argsort(labels[mixed], kind="stable")]
    shards = np.array_split(by_label, n * SHARDS_PER_SITE)
    dealt = generator.permutation(len(shards)).reshape(n, SHARDS_PER_SITE)
    return [np.concatenate([shards[i] for i in mine]) for mine in dealt]
