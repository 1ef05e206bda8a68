"""Files that appear whole or not at all: written beside, flushed, renamed. Configuration files: `files/toml.py`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcore.errors import BadInput
from fedcore.results import (
    GRID_SCHEMA,
    SCHEMA,
    ComparisonResult,
    GridResult,
    RoundRow,
    RunResult,
)

if TYPE_CHECKING:  # it imports numpy, which the terminal does without
    from fedcore.types import Json


RESULT_FILE, ROUNDS_FILE = "result.json", "rounds.jsonl"
CHECKPOINTS = "checkpoints"
"""Folder of the models that a run keeps every so many rounds."""


def write_atomic(path: Path, data: bytes | Iterable[bytes], *, flush: bool = True) -> None:
    """Write a file, from its bytes or from its pieces, so that it is there whole or not at all. flush: also after a
    power cut."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with _named(path):
            with beside.open("wb") as file:
                file.writelines((data,) if isinstance(data, bytes) else data)
                file.flush()
                if flush:
                    os.fsync(file.fileno())
            beside.replace(path)
    finally:
        # Where the folder vanished or is not writable, the error above is the one to tell.
        with suppress(OSError):
            beside.unlink()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file in every OSError: those of a write, a full disk's among them, name none."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def write_json(path: Path, value: Any) -> None:
    """Pretty JSON, written whole."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomic(path, text.encode())


def append_row(directory: Path, row: Mapping[str, object], name: str = ROUNDS_FILE) -> None:
    """Append one JSON line to a file of rows."""
    path = directory / name
    with _named(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(row), allow_nan=False) + "\n")


def read_json(path: Path) -> Json:
    """A JSON object from a run's file; raises BadInput where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(
            f"run: found no {path.name} in {path.parent}",
            remedy="`fedcore runs` lists runs; an unfinished one goes on with `fedcore simulate --resume RUN`",
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise BadInput(f"{path}: it cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise BadInput(f"{path}: found {type(found).__name__}, expected a JSON object")
    return found


def read_result(directory: Path) -> RunResult | ComparisonResult:
    """The result of a finished run or comparison.

    Raises BadInput for a file that is missing, unreadable or of another schema.
    """
    path = directory / RESULT_FILE
    found = read_json(path)
    if found.get("schema") != SCHEMA:
        raise BadInput(f"{path}: found schema {found.get('schema')!r}, expected {SCHEMA}")
    if (kind := found.get("kind")) not in ("run", "compare"):
        raise BadInput(f"{path}: found a result of kind {kind!r}, expected run or compare")
    try:
        return RunResult.from_json(found) if kind == "run" else ComparisonResult.from_json(found)
    except TypeError as error:
        raise BadInput(f"{path}: it does not hold a result ({error})") from error


def read_grid_result(directory: Path) -> GridResult:
    """The result of a finished grid. Raises BadInput for a file that is missing, unreadable or of another kind."""
    path = directory / RESULT_FILE
    found = read_json(path)
    if (found.get("kind"), found.get("schema")) != ("grid", GRID_SCHEMA):
        kind, schema = found.get("kind"), found.get("schema")
        raise BadInput(
            f"{path}: found kind {kind!r}, schema {schema!r}, expected 'grid', {GRID_SCHEMA}"
        )
    try:
        return GridResult.from_json(found)
    except TypeError as error:
        raise BadInput(f"{path}: it does not hold the result of a grid ({error})") from error


def is_grid(directory: Path) -> bool:
    """Whether a folder is that of a grid of comparisons, finished or not."""
    try:
        return read_json(directory / "job.json").get("kind") == "grid"
    except BadInput:
        return False


def read_rounds(directory: Path) -> list[RoundRow]:
    """The rows of rounds.jsonl; a last line cut off by a crash is left out."""
    rows: list[RoundRow] = []
    path = directory / ROUNDS_FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(RoundRow(json.loads(line)))
        except json.JSONDecodeError:
            break
    return rows


def stamp_of(path: Path) -> tuple[int, ...]:
    """What changes when a file is written anew or replaced, for one stat; of a missing one, too, whose reading then
    raises with the reason."""
    try:
        found = path.stat()
    except OSError:
        return (-1,)
    return (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)


class WatchedFile:
    """A file that others may write anew or replace while a process runs."""

    def __init__(self, path: Path | None) -> None:
        """path: None for one that is not there and never will be. What is in the file now is a change until `known`."""
        self.path = path
        self._stamp: tuple[int, ...] = ()

    def known(self) -> None:
        """The file as it is now is no change: it was read already."""
        if self.path is not None:
            self._stamp = stamp_of(self.path)

    def changed(self) -> bool:
        """Whether the file is another one than at the last call. Costs one stat. Call it before reading: a change while
        reading is then seen next time."""
        before = self._stamp
        self.known()
        return self._stamp != before
