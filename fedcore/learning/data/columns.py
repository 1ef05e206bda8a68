"""Columns by their names: of a pandas DataFrame, a .csv or .parquet file, or a mapping.

Invariant: a column that is absent, there twice or of another length is refused by name; what a value means is left to
the declared columns (data/tabular.py).
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fedcore.errors import BadInput
from fedcore.learning.data.groups import named_as_ids
from fedcore.learning.data.kinds import is_pandas


def read_columns(path: str | Path, names: Sequence[str] | None = None) -> dict[str, Sequence[Any]]:
    """The named columns of a .csv or .parquet file as they stand there; None: all. Raises BadInput."""
    return named_columns(path, names)[1]


def named_columns(source: Any, names: Sequence[str] | None) -> tuple[str, dict[str, Sequence[Any]]]:
    """`(what to call it in messages, {name: its values})` for exactly these columns; None: all there are."""
    if is_pandas(source) and hasattr(source, "columns"):
        return "table", _frame_columns("table", source, names)
    if isinstance(source, Mapping):
        names = _require_columns("table", [str(name) for name in source], names)
        columns = {name: source[name] for name in names}
        if len({len(values) for values in columns.values()}) > 1:
            raise BadInput("table: found columns of different lengths, expected one length")
        return "table", columns
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        readers = {".csv": _csv_columns, ".parquet": _parquet_columns, ".pq": _parquet_columns}
        if path.suffix.lower() not in readers:
            raise BadInput(
                f"table: found {str(source)!r}, expected a path ending in .csv or .parquet",
                remedy="read other formats with pandas and pass the DataFrame",
            )
        if not path.is_file():
            raise BadInput(
                f"table: found no file {path}",
                remedy="paths in a job file count from the folder of that file",
            )
        return path.name, readers[path.suffix.lower()](path, names)
    raise BadInput(
        f"table: found {type(source).__name__}, expected a DataFrame, the path of a .csv or "
        ".parquet file, or a mapping from column names to values"
    )


def _frame_columns(where: str, frame: Any, names: Sequence[str] | None) -> dict[str, Sequence[Any]]:
    present = [str(column) for column in frame.columns]
    names = _require_columns(where, present, names)
    columns: dict[str, Sequence[Any]] = {}
    for name in names:
        values = frame.iloc[:, present.index(name)].to_numpy()
        if values.dtype.kind not in "fiub":
            # One spelling of missing for every pandas dtype: NaN, NaT, NA and None.
            gone = frame.iloc[:, present.index(name)].isna().to_numpy()
            values = np.where(gone, None, values.astype(object))
        columns[name] = values
    return columns


def _parquet_columns(path: Path, names: Sequence[str] | None) -> dict[str, Sequence[Any]]:
    try:
        import pandas as pd

        frame = pd.read_parquet(path)
    except ImportError as error:
        raise BadInput(
            f"{path.name}: found no library for Parquet files ({error})",
            remedy="pip install pandas pyarrow, or write the table as CSV",
        ) from error
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{path.name}: found no readable Parquet table ({type(error).__name__})",
            remedy="check that the file is complete",
        ) from error
    return _frame_columns(path.name, frame, names)


def _csv_columns(path: Path, names: Sequence[str] | None) -> dict[str, Sequence[Any]]:
    """Read with the standard library: no pandas needed, and every message can name its row."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            header = [title.strip() for title in next(lines, [])]
            if not header:
                raise BadInput(f"{path.name}: found an empty file, expected a header line")
            names = _require_columns(path.name, header, names)
            places = [header.index(name) for name in names]
            columns: list[list[Any]] = [[] for _ in names]
            row = 0
            for line in lines:
                if not line:
                    continue
                row += 1
                if len(line) != len(header):
                    raise BadInput(
                        f"{path.name}: row {row}: found {len(line)} fields, expected {len(header)}",
                        remedy="put a field that holds a comma into double quotes",
                    )
                for column, place in zip(columns, places, strict=True):
                    column.append(line[place])
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path.name}: found bytes that are not UTF-8, expected a UTF-8 text file",
            remedy="save it as CSV UTF-8, or read it with pandas and pass the DataFrame",
        ) from error
    except csv.Error as error:
        raise BadInput(f"{path.name}: found no readable CSV ({error})") from error
    except OSError as error:
        raise BadInput(f"{path.name}: found no readable file ({error.strerror})") from error
    return dict(zip(names, columns, strict=True))


def titled_as_ids(source: Any) -> list[str]:
    """Columns whose name is that of an id of persons; none of a file that cannot be read: `named_columns` names it."""
    titles: list[str] = []
    if is_pandas(source) and hasattr(source, "columns"):
        titles = [str(column) for column in source.columns]
    elif isinstance(source, Mapping):
        titles = [name for name in source if isinstance(name, str)]
    elif isinstance(source, (str, Path)) and str(source).lower().endswith((".parquet", ".pq")):
        with suppress(ImportError, OSError, ValueError):
            from pyarrow.parquet import read_schema

            schema = read_schema(Path(source).expanduser())
            index = (schema.pandas_metadata or {}).get("index_columns", ())
            titles = [name for name in schema.names if name not in index]
    elif isinstance(source, (str, Path)) and str(source).lower().endswith(".csv"):
        with (
            suppress(OSError, UnicodeDecodeError, csv.Error),
            Path(source).expanduser().open(newline="", encoding="utf-8-sig") as file,
        ):
            titles = [title.strip() for title in next(csv.reader(file), [])]
    return [title for title in titles if named_as_ids(title) and titles.count(title) == 1]


def _require_columns(
    where: str, present: Sequence[str], names: Sequence[str] | None
) -> Sequence[str]:
    """The names, or all that are there for None. Raises BadInput for one that is absent or there twice."""
    names = present if names is None else names
    absent = [name for name in names if name not in present]
    if absent:
        remedy = f"the columns there are: {', '.join(present[:20])}"
        if len(present) == 1 and (";" in present[0] or "\t" in present[0]):
            remedy = "separate fields by commas; this header uses another sign"
        raise BadInput(
            f"{where}: found no column {', '.join(repr(name) for name in absent)}, expected it",
            remedy=remedy,
        )
    twice = [name for name in names if list(present).count(name) > 1]
    if twice:
        raise BadInput(f"{where}: found two columns called {twice[0]!r}, expected one")
    return names
