"""A run on disk and in hand: its directory, its result, its model.

Invariant: files appear whole (written beside and renamed), and a directory is either new or was asked
for by `force`; nothing that exists is lost otherwise.

    plan.json      what both roles agree on, with its label       rounds.jsonl   one line per (arm, round)
    job.json       what was asked for, to run it again            result.json    arms, gaps, cost, label
    model.safetensors  the federated model, the statistics and the column order
    report.html, report.md                                        checkpoint.pt  only while unfinished
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcore.errors import Abandoned, AlreadyExists, BadInput, GuardTripped
from fedcore.files import read_json
from fedcore.results import read_result, read_rounds
from fedcore.types import Json

RUNS = Path("runs")


@contextmanager
def new_directory(name: str, out: Path | None, *, force: bool) -> Iterator[Path]:
    """`out`, or the next free runs/<name>-<nnn>/ with runs/latest pointing to it, claimed for one run.

    If the block raises before a whole round was saved, the directory goes away again, and a former
    run that `force` replaces comes back. After an interrupt a new directory stays, to be resumed, and
    one whose every round was abandoned, or that a site left, stays with its rounds.
    Raises AlreadyExists for an `out` that holds something, unless it is a former run and `force`,
    and BadInput where it cannot be written.
    """
    former = None
    if out is None:
        path = _next_numbered(name)
        _point_latest(path)
    else:
        path = out if out.name else out.resolve()
        former = _set_aside(path, force=force)
        _claim(path)
    try:
        yield path
    except BaseException as error:
        saved = any((path / file).is_file() for file in ("checkpoint.pt", "result.json"))
        telling = isinstance(error, KeyboardInterrupt | Abandoned | GuardTripped) and former is None
        if not (saved or telling):
            shutil.rmtree(path, ignore_errors=True)
            if former is not None:
                former.rename(path)
                former = None
            if out is None:
                _point_to_newest()
        raise
    finally:
        if former is not None:
            shutil.rmtree(former, ignore_errors=True)


def _claim(path: Path) -> None:
    """Make the directory this run's own: of two that start at once, one is refused."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "job.json").open("x").close()
    except FileExistsError as error:
        raise AlreadyExists(
            f"--out: found {path}, which another run has just taken", remedy="another --out"
        ) from error
    except OSError as error:
        raise BadInput(
            f"--out: {path} cannot be written ({error.strerror})", remedy="another --out"
        ) from error


def _set_aside(out: Path, *, force: bool) -> Path | None:
    """Move a former run out of the way, to be removed or put back; None where `out` is free."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not force:
        raise AlreadyExists(
            f"--out: found {out}, which holds files already", remedy="another --out, or --force"
        )
    if not (out / "job.json").is_file():
        raise AlreadyExists(
            f"--out: found {out}, which is no run of ours",
            remedy="--force replaces former runs only",
        )
    aside = out.with_name(f".{out.name}.replaced.{os.getpid()}")
    out.rename(aside)
    return aside


def _next_numbered(name: str) -> Path:
    RUNS.mkdir(exist_ok=True)
    pattern = re.compile(re.escape(name) + r"-(\d+)$")
    taken = [int(m.group(1)) for p in RUNS.iterdir() if (m := pattern.match(p.name))]
    number = max(taken, default=0) + 1
    while True:
        path = RUNS / f"{name}-{number:03d}"
        try:
            path.mkdir()
        except FileExistsError:  # another run took the number a moment ago
            number += 1
            continue
        return path


def _point_latest(path: Path) -> None:
    """runs/latest: a link where the file system has links, quietly nothing elsewhere."""
    beside = RUNS / f".latest.{os.getpid()}"
    try:
        beside.symlink_to(path.name)
        beside.replace(RUNS / "latest")
    except OSError:
        beside.unlink(missing_ok=True)


def _point_to_newest() -> None:
    """After a failed run: runs/latest to the newest that is left, or nothing."""
    (RUNS / "latest").unlink(missing_ok=True)
    left = list_runs()
    if left:
        _point_latest(Path(left[-1]["run"]))


def append_row(directory: Path, row: Json, name: str = "rounds.jsonl") -> None:
    """One more line of a file of rows."""
    with (directory / name).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def all_abandoned(directory: Path) -> bool:
    """Whether a run ended with every one of its rounds abandoned: there is nothing to go on from."""
    if (directory / "result.json").is_file() or not (directory / "plan.json").is_file():
        return False
    rows = [row for row in read_rounds(directory) if row["arm"] == "federated"]
    done = bool(rows) and rows[-1]["round"] == read_json(directory / "plan.json")["rounds"]
    return done and all("abandoned" in row for row in rows)


def list_runs(root: Path = RUNS) -> list[Json]:
    """One row per run directory under `root`, newest last: name, result or None, abandoned, changed."""
    rows: list[Json] = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if path.is_symlink() or not (path / "job.json").is_file():
            continue
        result = read_json(path / "result.json") if (path / "result.json").is_file() else None
        rows.append(
            {
                "run": str(path),
                "result": result,
                "abandoned": all_abandoned(path),
                "changed": (path / "job.json").stat().st_mtime,
            }
        )
    return sorted(rows, key=lambda row: float(row["changed"]))


@dataclass(frozen=True)
class Gap:
    """The gap of one metric: `mean`, `low`, `high` are those of the total; `parts` has every part.

    Fractions; positive means lost against centralised.
    """

    metric: str
    parts: Mapping[str, Json]

    @property
    def mean(self) -> float | None:
        """Centralised minus federated on all test rows."""
        return self._total("mean")

    @property
    def low(self) -> float | None:
        """Lower end of the 95 % interval, None where there is none."""
        return self._total("low")

    @property
    def high(self) -> float | None:
        """Upper end of the 95 % interval, None where there is none."""
        return self._total("high")

    def _total(self, key: str) -> float | None:
        value: float | None = self.parts.get("total", {}).get(key)
        return value

    def __getitem__(self, key: str) -> Any:
        """`gap["federation"]` is a part; `gap["mean"]` a number of the total."""
        return self.parts[key] if key in self.parts else self.parts["total"][key]


def gaps_of(result: Json) -> dict[str, Gap]:
    """{metric: Gap} from a result's part-first table."""
    return {
        metric: Gap(
            metric, {part: by[metric] for part, by in result["gap"].items() if metric in by}
        )
        for metric in result["metrics"]
    }


class _Finished:
    """What a run and a comparison share: a directory, its result, its page."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.result = read_result(self.directory)

    @property
    def gap(self) -> dict[str, Gap]:
        """{metric: Gap}."""
        return gaps_of(self.result)

    @property
    def rounds(self) -> list[Json]:
        """Rows of rounds.jsonl: one per (arm, round), and per split in a comparison;
        `pandas.DataFrame(run.rounds)` is tidy."""
        return read_rounds(self.directory)

    def report(self) -> Path:
        """Write report.html and report.md again; returns the page's path."""
        from fedcore.report import write

        return write(self.directory)

    def __str__(self) -> str:
        from fedcore.report.terminal import as_text, summary

        return as_text(summary(self.result))

    def __repr__(self) -> str:
        return f"<fedcore.{type(self).__name__} {self.directory}>"


class Run(_Finished):
    """A finished run: `print(run)`, `run.gap["auc"]`, `run.model`, `run.predict(frame)`,
    `run.rounds`, `run.plot()`, `run.report()`."""

    def __init__(self, directory: Path, task: Any = None) -> None:
        super().__init__(directory)
        if self.result.get("kind") != "run":
            raise BadInput(
                f"{directory}: found a result of kind {self.result.get('kind')!r}, expected a run",
                remedy="comparisons open with fedcore.load too, but have no model",
            )
        self._task = task
        self._model: Any = None

    @property
    def model(self) -> Any:
        """The federated model as a torch module in evaluation mode."""
        return self._saved().module

    def predict(self, rows: Any) -> Any:
        """Raw rows (a DataFrame for table tasks, an array otherwise) to a NumPy array.

        Probabilities for classification metrics, (n,) for one logit and (n, C) for several; the
        model's own outputs otherwise.
        """
        return self._saved().predict(rows)

    def _saved(self) -> Any:
        from fedcore.learning.saved import load_model

        if self._model is None:
            self._model = load_model(self.directory, self._task)
        return self._model

    def plot(self) -> Any:
        """A matplotlib figure: the first metric by round per arm, the gap below."""
        from fedcore.report.plots import rounds_figure, shown_in_notebooks

        return shown_in_notebooks(
            rounds_figure([(self.result, self.rounds)], self.result["metrics"][0])
        )


class Comparison(_Finished):
    """A finished comparison over seeds and folds: `.table()`, `.latex()`, `.report()`."""

    def table(self) -> Any:
        """A pandas DataFrame: one row per (seed, fold, arm)."""
        import pandas as pd

        return pd.DataFrame(
            {"seed": cell["seed"], "fold": cell["fold"], "arm": arm, **values}
            for cell in self.result["cells"]
            for arm, values in cell["arms"].items()
        )

    def latex(self) -> str:
        """The table of arms and gaps for a paper (booktabs)."""
        from fedcore.report import latex

        return latex.render(self.result)

    def markdown(self) -> str:
        """The same as Markdown."""
        from fedcore.report import markdown

        return markdown.render(self.result)


def load(directory: str | Path, task: Any = None) -> Run | Comparison:
    """Open a run or a comparison from its directory. `task`: needed for the model of a task that was
    made in a notebook; others are loaded again from where they came."""
    path = Path(directory)
    if read_result(path).get("kind") == "compare":
        return Comparison(path)
    return Run(path, task)
