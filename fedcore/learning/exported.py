"""A saved model as one TorchScript file that takes raw rows: it is read without Fedcore and without the task.

    model = torch.jit.load("model.pt")
    model(rows)             # (n, ...) float64 of probabilities or values, as `Run.predict`
    model.columns           # what the columns of `rows` are; empty where rows are arrays as in training
    model.categories        # {column: its values}; a row has the place of its value in this list

Invariant: `script` returns bytes only after it has read them back and found the scores of `SavedModel.predict`.
"""

import io
import warnings
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from fedcore.errors import BadInput, Refused, printable
from fedcore.learning.data.arrays import array_layout
from fedcore.learning.data.rows import RowLayout, TableRows
from fedcore.learning.data.statistics import Statistics
from fedcore.learning.data.tabular import Category, Number, Table, number
from fedcore.learning.data.targets import TargetScale
from fedcore.learning.saved import SavedModel
from fedcore.seeds import generator

ROWS = 64
"""Rows that an export is checked on, where none are given."""

CLOSE = 1e-5
"""Largest difference of a score, relative and absolute: a compiled model may add in another order."""


class Predictor(nn.Module):
    """A model that takes its inputs to what `SavedModel.predict` returns, and tells what its rows are."""

    columns: list[str]
    categories: dict[str, list[str]]
    classes: list[str]

    def __init__(self, module: nn.Module, saved: SavedModel, outputs: int) -> None:
        super().__init__()
        self.module = module
        self.columns = []
        self.categories = {}
        self.classifies: Final[bool] = saved.classifies
        scale = saved.scale or TargetScale(0.0, 1.0)
        self.centre: Final[float] = scale.centre
        self.spread: Final[float] = scale.spread
        floats = (p.dtype for p in saved.module.parameters() if p.is_floating_point())
        self.dtype: Final[torch.dtype] = next(floats, torch.float32)
        self.classes = list(saved.class_names(max(2, outputs))) if saved.classifies else []

    def forward(self, rows: Tensor) -> Tensor:
        """(n, ...) as in training to (n,) or (n, C) float64."""
        with torch.no_grad():
            return self.finish(self.module(self.typed(rows)))

    def typed(self, rows: Tensor) -> Tensor:
        """In the model's own precision; integers stay what they are."""
        return rows.to(self.dtype) if rows.is_floating_point() else rows

    def finish(self, outputs: Tensor) -> Tensor:
        outputs = outputs.to(torch.float64)
        if outputs.dim() == 2 and outputs.size(1) == 1:
            outputs = outputs[:, 0]
        if not self.classifies:
            return outputs * self.spread + self.centre
        return torch.sigmoid(outputs) if outputs.dim() == 1 else torch.softmax(outputs, dim=1)


class RowPredictor(Predictor):
    """One that scales and encodes raw rows itself: (n, columns) float64. A number is as it is written, NaN
    where it is missing; a category is the place of its value in `categories`, any other number for a value that
    is not there, and NaN where it is missing."""

    # TorchScript reads the annotations of this class alone, and needs them where a list is empty.
    columns: list[str]
    categories: dict[str, list[str]]
    classes: list[str]
    mean: Tensor
    std: Tensor
    numbers: Tensor
    indicated: Tensor
    order: Tensor
    whole: list[int]
    code_columns: list[int]
    code_values: list[float]
    category_columns: list[int]
    category_sizes: list[int]
    category_missing: list[int]

    def __init__(
        self,
        module: nn.Module,
        saved: SavedModel,
        outputs: int,
        layout: RowLayout,
        scale: Statistics,
        specs: tuple[tuple[str, Number | Category], ...],
    ) -> None:
        super().__init__(module, saved, outputs)
        self.columns = [name for name, _ in specs]
        self.register_buffer("mean", torch.from_numpy(np.array(scale.mean, np.float64)))
        self.register_buffer("std", torch.from_numpy(np.array(scale.std, np.float64)))
        numbers = [i for i, (_, spec) in enumerate(specs) if isinstance(spec, Number)]
        indicated = [i for i, shown in enumerate(layout.indicated) if shown]
        order = layout.order or range(len(layout.columns))
        for name, places in (("numbers", numbers), ("indicated", indicated), ("order", order)):
            self.register_buffer(name, torch.tensor(list(places), dtype=torch.int64))
        # An array's gaps are always filled; a table's column has them where it is declared so.
        is_table = bool(layout.description)
        self.whole = [
            i for i, (_, spec) in enumerate(specs) if is_table and not spec.may_be_missing
        ]
        codes = [
            (i, c) for i, (_, s) in enumerate(specs) if isinstance(s, Number) for c in s.missing
        ]
        self.code_columns = [i for i, _ in codes]
        self.code_values = [value for _, value in codes]
        found = [(i, spec) for i, (_, spec) in enumerate(specs) if isinstance(spec, Category)]
        self.category_columns = [i for i, _ in found]
        self.category_sizes = [len(spec.values) for _, spec in found]
        self.category_missing = [int(spec.may_be_missing) for _, spec in found]
        self.categories = {n: list(s.values) for n, s in specs if isinstance(s, Category)}

    def forward(self, rows: Tensor) -> Tensor:
        """(n, columns) of any real type to (n,) or (n, C) float64. Raises for another shape, for infinity, and
        for a missing value in a column that has none."""
        if rows.dim() != 2 or rows.size(1) != len(self.columns):
            raise ValueError(f"found rows of shape {rows.shape}, expected (n, {len(self.columns)})")
        with torch.no_grad():
            return self.finish(self.module(self.encoded(rows.to(torch.float64).clone())))

    def encoded(self, rows: Tensor) -> Tensor:
        """The model's inputs, (n, inputs)."""
        for place, column in enumerate(self.code_columns):
            gone = rows[:, column] == self.code_values[place]
            rows[:, column] = torch.where(gone, torch.nan, rows[:, column])
        if bool(torch.isinf(rows).any()):
            raise ValueError("found an infinite value, expected finite numbers")
        for column in self.whole:
            if bool(torch.isnan(rows[:, column]).any()):
                raise ValueError(f"found a missing value in column {self.columns[column]}")
        features = rows.index_select(1, self.numbers)
        missing = torch.isnan(features)
        zero = torch.zeros_like(features)
        blocks = [torch.where(missing, zero, (features - self.mean) / self.std)]
        blocks.append(missing.index_select(1, self.indicated).to(torch.float64))
        for place, column in enumerate(self.category_columns):
            value, size = rows[:, column], self.category_sizes[place]
            known = (value >= 0) & (value < size) & (value == torch.floor(value))
            code = torch.where(known, value, float(size))
            code = torch.where(torch.isnan(value), float(size + 1), code)
            each = torch.nn.functional.one_hot(code.to(torch.int64), size + 2)
            blocks.append(each[:, : size + 1 + self.category_missing[place]].to(torch.float64))
        return self.typed(torch.cat(blocks, dim=1).index_select(1, self.order).to(torch.float32))


def script(saved: SavedModel, rows: Any = None) -> bytes:
    """The file's bytes. rows: some to check it on, as `SavedModel.predict` takes them; a model whose columns are
    declared needs none.

    Raises BadInput where rows are needed or are none of the model's, Refused for a model that TorchScript can
    neither compile nor record, or whose scores it changes.
    """
    raw, right = _checked_rows(saved, rows)
    inputs = saved.inputs(right)
    # Whole, and by single rows: a recording may have lost what depends on values or on the number of rows.
    parts = [slice(None), *(slice(i, i + 1) for i in range(min(16, len(raw))))]
    expected = [saved.scores(inputs[part]) for part in parts]
    columns = expected[0].shape[1] if expected[0].ndim == 2 else 1
    with warnings.catch_warnings():
        # torch calls TorchScript deprecated (its files are read without Python at all), and warns of what a
        # recording may have lost, which the check below decides.
        warnings.simplefilter("ignore")
        try:
            compiled = torch.jit.script(_wrapped(_compiled(saved.module, inputs), saved, columns))
            file = io.BytesIO()
            torch.jit.save(compiled, file)
            again = torch.jit.load(io.BytesIO(file.getvalue()))  # type: ignore[no-untyped-call]
            found = [again(raw[part]).numpy() for part in parts]
        except Exception as error:
            text = next((line for line in str(error).splitlines() if line.strip()), "")
            raise Refused(
                f"export: TorchScript can neither compile nor record this model ({type(error).__name__}: "
                f"{printable(text, 200)})",
                remedy="run.predict and `fedcore predict` take the model as it is",
            ) from error
    for ours, theirs in zip(expected, found, strict=True):
        if not np.allclose(theirs, ours, rtol=CLOSE, atol=CLOSE):
            raise Refused(
                f"export: found scores up to {np.abs(theirs - ours).max():.2g} from the model's own, "
                "expected the same",
                remedy="its forward depends on values or on the number of rows: write it in what "
                "torch.jit.script compiles",
            )
    return file.getvalue()


def _compiled(module: nn.Module, inputs: Tensor) -> nn.Module:
    """The module compiled, or recorded on these inputs where it has what TorchScript cannot compile."""
    try:
        return torch.jit.script(module)
    except Exception:  # noqa: BLE001 - each kind of code that it does not know has an error of its own
        return torch.jit.trace(module, inputs, check_trace=False)  # type: ignore[no-any-return, no-untyped-call]


def _wrapped(module: nn.Module, saved: SavedModel, columns: int) -> Predictor:
    scale = saved.statistics
    if scale is None:
        return Predictor(module, saved, columns).eval()
    layout, specs = _columns_of(saved)
    return RowPredictor(module, saved, columns, layout, scale, specs).eval()


def _columns_of(saved: SavedModel) -> tuple[RowLayout, tuple[tuple[str, Number | Category], ...]]:
    table = saved.table
    if table is not None:
        return table.layout, table.specs
    about = [number(low, high, may_be_missing=m) for low, high, m in saved.about["numbers"]]
    layout = array_layout(about)
    return layout, tuple(zip(layout.names, about, strict=True))


def _checked_rows(saved: SavedModel, rows: Any) -> tuple[Tensor, Any]:
    """Rows to compare on, as the exported model takes them and as `SavedModel.predict` does."""
    if saved.statistics is None:
        if rows is None:
            raise BadInput(
                "export: found no rows to check the exported model on, expected some",
                remedy="--rows rows.npy, or rows=... in Python: a few rows as in training",
            )
        inputs = saved.inputs(rows)
        return inputs, inputs
    layout, specs = _columns_of(saved)
    table = saved.table
    if rows is None:
        read = _invented(layout, specs)
    elif table is not None:
        read = table.without_target(rows)
    else:
        raw = saved.raw_array(rows)
        return torch.from_numpy(raw), raw
    raw = _as_numbers(read, table)
    return torch.from_numpy(raw), read if table is not None else read.features


def _invented(layout: RowLayout, specs: tuple[tuple[str, Number | Category], ...]) -> TableRows:
    """Rows within the declared ranges, with every kind of value that is declared."""
    random = generator(0, 0, "", "export")
    low, high = np.array(layout.ranges).reshape(-1, 2).T
    features = low + (high - low) * random.random((ROWS, len(low)))
    gaps = np.array(layout.indicated, dtype=bool) & (random.random(features.shape) < 0.2)
    features[gaps] = np.nan
    blocks = [np.empty((ROWS, 0), np.float32)]
    for _, spec in specs:
        if isinstance(spec, Category):
            kinds = len(spec.values) + 1 + spec.may_be_missing
            blocks.append(np.eye(kinds, dtype=np.float32)[random.integers(0, kinds, ROWS)])
    return TableRows(features, np.concatenate(blocks, axis=1), torch.empty(0), layout)


def _as_numbers(rows: TableRows, table: Table | None) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(n, columns) float64 as a `RowPredictor` takes it."""
    if table is None:
        return rows.features
    columns, number_, block = [], 0, 0
    for _, spec in table.specs:
        if isinstance(spec, Number):
            columns.append(rows.features[:, number_])
            number_ += 1
            continue
        kinds = len(spec.values) + 1 + spec.may_be_missing
        place = rows.fixed[:, block : block + kinds].argmax(axis=1).astype(np.float64)
        columns.append(np.where(place > len(spec.values), np.nan, place))
        block += kinds
    return np.stack(columns, axis=1)
