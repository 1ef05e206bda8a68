"""Tables: declared columns in, numbers out, the same ones at every site whatever its rows hold.

`table(target=..., columns={...})` returns a reader; calling it with a pandas DataFrame, the path of a
.csv or .parquet file, or a dict of columns gives `TableRows`. A numeric column becomes one standardised input, a
category one 0/1 input per declared value plus `other`; either gets a 0/1 `missing` input if it is
declared so.

Invariant: the model's inputs and their order follow from the declaration alone, never from data.
Left to others: reading columns (data/columns.py); mean and standard deviation (federated statistics,
data/statistics.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedcore.errors import BadInput
from fedcore.learning.data.columns import named_columns, titled_as_ids
from fedcore.learning.data.groups import group_digests, repeated_ids
from fedcore.learning.data.rows import RowLayout, TableRows
from fedcore.learning.data.statistics import Statistics
from fedcore.types import Json

MISSING = frozenset({"", "na", "n/a", "nan", "none", "null", "<na>", "nat", "?"})
"""Texts that mean "not observed", in any case: what pandas reads as missing, and UCI's `?`."""

TRUTH = {"true": 1.0, "false": 0.0}


@dataclass(frozen=True)
class Number:
    """A numeric column: its public range, and which values mean that it was not observed."""

    low: float
    high: float
    may_be_missing: bool = False
    missing: tuple[float, ...] = ()


@dataclass(frozen=True)
class Category:
    """A categorical column: all values declared for the federation, as text."""

    values: tuple[str, ...]
    may_be_missing: bool = False


def number(
    low: float | None = None,
    high: float | None = None,
    *,
    may_be_missing: bool = False,
    missing: Sequence[float] = (),
) -> Number:
    """Declare a numeric column with the public range [low, high].

    The column is scaled by it, so that nothing about rows has to travel, and is not clipped. Where a job
    asks for federated statistics, the range bounds what one row adds to them (values beyond it are
    clipped there and counted). `missing` lists values that stand for "not observed", such as a
    cholesterol of 0, and implies `may_be_missing`. Booleans count as 0 and 1.
    Raises BadInput unless low < high, both finite.
    """
    remedy = "give a range known without looking at the rows, such as number(0, 120) for an age"
    if low is None or high is None:
        raise BadInput(
            "number: found no range, expected the public (low, high) that its values are scaled by",
            remedy=remedy,
        )
    if not (_is_number(low) and _is_number(high) and low < high):
        raise BadInput(
            f"number: found the range ({low!r}, {high!r}), expected finite low < high",
            remedy=remedy,
        )
    codes = tuple(float(value) for value in missing)
    return Number(float(low), float(high), may_be_missing or bool(codes), codes)


def category(*values: Any, may_be_missing: bool = False) -> Category:
    """Declare a categorical column and all its values; any other value becomes `other`.

    Values are compared as text: 1, 1.0 and "1" are the same, and so are True and "TRUE".
    Raises BadInput for no values or for the same value twice.
    """
    texts = tuple(_text(value) for value in values)
    if not texts or len(set(texts)) < len(texts):
        raise BadInput(
            f"category: found the values {values!r}, expected at least one, each once",
            remedy='list them: category("never", "former", "current")',
        )
    return Category(texts, may_be_missing)


@dataclass(frozen=True)
class Table:
    """A reader of tables, made by `fedcore.table`. Frozen; its `repr` and `to_json` are complete."""

    target: str
    specs: tuple[tuple[str, Number | Category], ...]
    classes: tuple[str, ...] | None = None
    above: float | None = None
    regression: bool = False
    group: str | None = None

    @property
    def layout(self) -> RowLayout:
        """Which inputs there are, in declared order: a column, then its `missing` indicator."""
        numeric = [(name, spec) for name, spec in self.specs if isinstance(spec, Number)]
        blocks = RowLayout(
            names=tuple(name for name, _ in numeric),
            ranges=tuple((spec.low, spec.high) for _, spec in numeric),
            indicated=tuple(spec.may_be_missing for _, spec in numeric),
            fixed=tuple(
                title
                for name, spec in self.specs
                if isinstance(spec, Category)
                for title in _titles(name, spec)
            ),
        )
        place = {title: index for index, title in enumerate(blocks.columns)}
        declared = [title for name, spec in self.specs for title in _titles(name, spec)]
        return replace(
            blocks,
            order=tuple(place[title] for title in declared),
            description=json.dumps(self.to_json(), sort_keys=True),
        )

    @property
    def columns(self) -> tuple[str, ...]:
        return self.layout.columns

    def __call__(self, source: Any) -> TableRows:
        """Read a DataFrame, the path of a .csv or .parquet file, or a dict of columns. Raises BadInput naming
        the file, the column and the row (1 = the first below the header)."""
        wanted = [*dict(self.specs), self.target]
        others = [self.group] if self.group is not None else titled_as_ids(source)
        where, raw = named_columns(source, list(dict.fromkeys([*wanted, *others])))
        numeric, fixed = self._encode(where, raw)
        targets = self._targets(where, raw[self.target])
        if self.group is not None:
            ids = (None if _text(v).lower() in MISSING else v for v in raw[self.group])
            groups = group_digests(ids, len(numeric), f"{where}: column {self.group!r}")
            return TableRows(numeric, fixed, targets, self.layout, groups)
        repeated = repeated_ids({name: raw[name] for name in others})
        return TableRows(numeric, fixed, targets, self.layout, ids=repeated)

    def inputs(self, source: Any, statistics: Statistics) -> NDArray[np.float32]:
        """What a trained model takes for these raw rows, (rows, len(columns)) float32. Needs no target
        column; `statistics` are those of the run."""
        rows = self.without_target(source)
        return self.layout.inputs(rows.features, rows.fixed, statistics)

    def without_target(self, source: Any) -> TableRows:
        """The declared columns of rows whose target is not known: their `y` is empty. Raises as a call."""
        numeric, fixed = self._encode(*named_columns(source, [name for name, _ in self.specs]))
        return TableRows(numeric, fixed, torch.empty(0), self.layout)

    def to_json(self) -> Json:
        """A JSON description from which `from_json` rebuilds an equal reader."""
        about = {
            name: value
            for name, value in vars(self).items()
            if name != "specs" and (name != "group" or value is not None)
        }
        columns = [
            {"name": name, "kind": type(spec).__name__.lower(), **vars(spec)}
            for name, spec in self.specs
        ]
        return about | {"schema": 1, "columns": columns}

    @classmethod
    def from_json(cls, description: Json | str) -> Table:
        """Rebuild a reader from `to_json()` or its text. Raises BadInput when it is not one."""
        try:
            found = json.loads(description) if isinstance(description, str) else description
            {1: None}[found["schema"]]  # a KeyError for any other
            columns = {entry["name"]: _column(**entry) for entry in found["columns"]}
            return table(
                columns=columns,
                **{key: found[key] for key in ("target", "classes", "above", "regression")},
                group=found.get("group"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(
                f"table description: found {type(error).__name__} ({error}), expected schema 1",
                remedy="it was written by another version of fedcore, or edited",
            ) from error

    def _encode(
        self, where: str, raw: Mapping[str, Sequence[Any]]
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        rows = len(next(iter(raw.values())))
        numeric = [_numbers(where, n, s, raw[n]) for n, s in self.specs if isinstance(s, Number)]
        fixed = [_one_hot(where, n, s, raw[n]) for n, s in self.specs if isinstance(s, Category)]
        return (
            np.stack(numeric, axis=1) if numeric else np.empty((rows, 0), np.float64),
            np.concatenate(fixed, axis=1) if fixed else np.empty((rows, 0), np.float32),
        )

    def _targets(self, where: str, values: Sequence[Any]) -> torch.Tensor:
        if self.classes is not None:
            index = {text: i for i, text in enumerate(self.classes)}
            found = np.empty(len(values), dtype=np.int64)
            for row, value in enumerate(values):
                text = _text(value)
                if text not in index:
                    expected = f"one of {', '.join(self.classes)}"
                    remedy = "list every class in table(classes=(...)), or drop those rows"
                    raise _wrong(where, self.target, row, _shown(value), expected, remedy)
                found[row] = index[text]
            return torch.from_numpy(found)
        # The public range is irrelevant for a target, which enters no statistics.
        numbers = _numbers(where, self.target, None, values)
        if self.above is not None:
            return torch.from_numpy((numbers > self.above).astype(np.int64))
        if self.regression:
            return torch.from_numpy(numbers.astype(np.float32))
        wrong = np.flatnonzero((numbers < 0) | (numbers != np.floor(numbers)))
        if len(wrong):
            raise BadInput(
                f"{where}: column {self.target!r}, row {wrong[0] + 1}: found "
                f"{numbers[wrong[0]]:g}, expected a class 0, 1, 2, ...",
                remedy="give table(classes=(...)) for names, above=LIMIT for yes or no, or "
                "regression=True for a number",
            )
        return torch.from_numpy(numbers.astype(np.int64))


def _column(name: str, kind: str, **about: Any) -> Number | Category:  # noqa: ARG001 - as in JSON
    return number(**about) if kind == "number" else category(*about.pop("values"), **about)


def table(
    *,
    target: str,
    columns: Mapping[str, Number | Category],
    classes: Sequence[Any] | None = None,
    above: float | None = None,
    regression: bool = False,
    group: str | None = None,
) -> Table:
    """Declare how rows of a table become numbers; returns a reader to use in, or as, `task.data`.

    target: name of the column to predict. By default it holds class indices 0, 1, 2, ...; with
        `classes=("benign", "malignant")` it holds these names, with `above=0` the class is 1 where
        the value is above 0, and with `regression=True` it is a number.
    columns: name -> `number(low, high)` or `category("a", "b")`; their order is the inputs' order.
    group: name of the column that says which rows belong together, such as the patient's: no split parts them,
        and a gap's interval resamples them together. It is no input unless it is among the columns too.

    Raises BadInput when the declaration contradicts itself.
    """
    if not columns or not hasattr(columns, "items"):
        raise BadInput(
            f"table(columns=...): found {columns!r}, expected at least one declared column",
            remedy='columns={"age": fedcore.number(0, 120), "sex": fedcore.category("f", "m")}',
        )
    for name, spec in columns.items():
        if not isinstance(spec, (Number, Category)):
            raise BadInput(
                f"table(columns=...): found {spec!r} for {name!r}, "
                "expected number(...) or category(...)",
                remedy=f'write "{name}": fedcore.number(low, high)',
            )
    if target in columns:
        raise BadInput(
            f"table(target={target!r}): found it among the columns, expected it outside them",
            remedy="a model that sees its target learns nothing else",
        )
    if sum([classes is not None, above is not None, bool(regression)]) > 1:
        raise BadInput("table: found several of classes=, above= and regression=, expected one")
    names = None if classes is None else category(*classes).values
    if group == target:
        raise BadInput(f"table(group={group!r}): found the target, expected another column")
    made = Table(str(target), tuple(columns.items()), names, above, regression, group)
    titles = made.columns
    twice = sorted({title for title in titles if titles.count(title) > 1})
    if twice:
        raise BadInput(
            f"table(columns=...): found two inputs called {twice[0]!r}, expected different names",
            remedy="rename one of the columns",
        )
    return made


def _titles(name: str, spec: Number | Category) -> list[str]:
    """Names of the inputs that a column becomes."""
    titles = [name]
    if isinstance(spec, Category):
        titles = [f"{name}={value}" for value in (*spec.values, "other")]
    return [*titles, f"{name}_missing"] if spec.may_be_missing else titles


def _numbers(
    where: str, name: str, spec: Number | None, values: Sequence[Any]
) -> NDArray[np.float64]:
    """(rows,) float64, NaN = missing; `spec=None` is a target, which may not be missing."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "fiub":
        found = values.astype(np.float64)
    else:
        numbers = [_number(where, name, i, value) for i, value in enumerate(values)]
        found = np.array(numbers, dtype=np.float64)
    infinite = np.flatnonzero(np.isinf(found))
    if len(infinite):
        remedy = "leave the field empty where nothing was observed"
        raise _wrong(where, name, infinite[0], "an infinite value", "a finite number", remedy)
    for code in spec.missing if spec is not None else ():
        found[found == code] = np.nan
    if spec is None or not spec.may_be_missing:
        gone = np.isnan(found)
        _refuse_missing(where, name, gone, is_target=spec is None, kind="number(low, high")
    return found


def _number(where: str, name: str, index: int, value: Any) -> float:
    if value is None or (isinstance(value, str) and value.strip().lower() in MISSING):
        return math.nan
    try:
        if isinstance(value, str):
            text = value.strip().lower()
            # float() would read 1_000 as a thousand, so an underscore is made unreadable.
            return TRUTH[text] if text in TRUTH else float(text.replace("_", "?"))
        return math.nan if str(value) in ("<NA>", "NaT") else float(value)
    except (TypeError, ValueError):
        remedy = f"declare it as fedcore.category(...) if {name!r} holds names"
        if isinstance(value, str) and "," in value:
            remedy = "write decimals with a point, and no thousands separator"
        raise _wrong(where, name, index, _shown(value), "a number", remedy) from None


def _one_hot(where: str, name: str, spec: Category, values: Sequence[Any]) -> NDArray[np.float32]:
    """(rows, declared + other [+ missing]) float32 of 0 and 1, one 1 per row at most."""
    index = {text: i for i, text in enumerate(spec.values)}
    other = len(spec.values)
    texts = [_text(value) for value in values]
    # A declared value wins over what its text would mean elsewhere ("none" may be an answer).
    codes = np.array(
        [index.get(t, other + 1 if t.lower() in MISSING else other) for t in texts], dtype=np.int64
    )
    if not spec.may_be_missing:
        _refuse_missing(where, name, codes == other + 1, is_target=False, kind="category(...")
    return np.eye(other + 2, dtype=np.float32)[codes][:, : other + 1 + spec.may_be_missing]


def _refuse_missing(
    where: str, name: str, missing: NDArray[np.bool_], *, is_target: bool, kind: str
) -> None:
    rows = np.flatnonzero(missing)
    if not len(rows):
        return
    remedy = "drop those rows: a target must be observed"
    if not is_target:
        remedy = f"declare it as fedcore.{kind}, may_be_missing=True)"
    raise _wrong(where, name, rows[0], f"a missing value ({len(rows)} in all)", "none", remedy)


def _wrong(
    where: str, column: str, index: int | np.intp, found: str, expected: str, remedy: str
) -> BadInput:
    return BadInput(
        f"{where}: column {column!r}, row {index + 1}: found {found}, expected {expected}",
        remedy=remedy,
    )


def _text(value: Any) -> str:
    """One spelling per value, whether it came from a data frame or from text."""
    if value is None:
        return ""
    text = str(value).strip()
    if text.lower() in TRUTH:
        return text.lower()
    return text[:-2] if text.endswith(".0") and text[:-2].lstrip("-").isdigit() else text


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and math.isfinite(value)


def _shown(value: Any) -> str:
    text = str(value).strip()
    return repr(text if len(text) <= 40 else text[:37] + "...")
