"""A finished run or comparison: its directory, its result, its model.

Invariant: files appear whole (written beside and renamed), and a directory is either new or was asked
for by `force`; nothing that exists is lost otherwise.

    plan.json      what both roles agree on, with its label       rounds.jsonl   one line per (arm, round)
    job.json       what was asked for, to run it again            result.json    arms, gaps, cost, label
    model.safetensors  the federated model, the statistics and the column order
    report.html, report.md                                        checkpoint.pt, splits/  only while unfinished
    checkpoints/   round-0005.safetensors ...: the model after every so many rounds, where the job asks for it
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar, overload

from fedcore.errors import Abandoned, AlreadyExists, BadInput, GuardTripped, require_extra
from fedcore.files import CHECKPOINTS, RESULT_FILE, read_json, read_result, read_rounds
from fedcore.files.lock import FileLock
from fedcore.report import require_drawing
from fedcore.results import ComparisonResult, Interval, ListedRun, RoundRow, RunResult

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from pandas import DataFrame

    from fedcore.learning.saved import Module, SavedModel, Tensor
    from fedcore.learning.task import Task

RUNS = Path("runs")
LOCK_FILE = ".lock"
"""In the folder of a run, while a command writes into it."""


@contextmanager
def new_directory(name: str, out: Path | None, *, force: bool) -> Iterator[Path]:
    """`out`, or the next free runs/<name>-<nnn>/ with runs/latest pointing to it, claimed for one run.

    No other command can write into it before the block ends (`held`).
    If the block raises before a whole round or split was saved, the directory goes away again, and a former
    run that `force` replaces comes back. After an interrupt a new directory stays, to be resumed, and
    one whose every round was abandoned, or that a site left, stays with its rounds.
    Raises AlreadyExists for an `out` that holds something, unless it is a former run and `force`,
    and BadInput where it cannot be written, another command writes into it, or its report could not be drawn.
    """
    require_drawing()
    former = None
    if out is None:
        path = _next_numbered(name)
        _point_latest(path)
    else:
        path = out if out.name else out.resolve()
        former = _set_aside(path, force=force)
        _claim(path)
    try:
        with held(path):
            yield path
    except BaseException as error:
        whole: tuple[str, ...] = ("checkpoint.pt", "result.json", "splits/seed-*.json")
        whole += tuple(f"cells/*/{pattern}" for pattern in whole[1:])  # of a grid
        saved = any(file for pattern in whole for file in path.glob(pattern))
        telling = isinstance(error, KeyboardInterrupt | Abandoned | GuardTripped) and former is None
        if not (saved or telling):
            shutil.rmtree(path, ignore_errors=True)
            if former is not None:
                former.rename(path)
                former = None
            if out is None:
                (RUNS / "latest").unlink(missing_ok=True)
                for newest in list_runs()[-1:]:
                    _point_latest(Path(newest.folder))
        raise
    finally:
        if former is not None:
            shutil.rmtree(former, ignore_errors=True)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other commands from writing into the folder of a run or comparison meanwhile; on a file system without
    locks do nothing. Raises BadInput where one does so now."""

    def refusal(holder: str) -> BadInput:
        return BadInput(
            f"{folder}: found process {holder} writing into it, expected one command at a time",
            remedy="let that one end or stop it; to run beside it, choose another --out",
        )

    lock = None
    try:
        lock = FileLock(folder / LOCK_FILE, refusal)
    except OSError as error:
        if error.errno not in {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}:
            raise
    try:
        yield
    finally:
        if lock is not None:
            lock.release(remove=True)


def _claim(path: Path) -> None:
    """Make the directory this run's own: of two that start at once, one is refused."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "job.json").open("x").close()
    except FileExistsError as error:
        found = f"--out: found {path}, which another run has just taken"
        raise AlreadyExists(found, remedy="another --out") from error
    except OSError as error:
        found = f"--out: {path} cannot be written ({error.strerror})"
        raise BadInput(found, remedy="another --out") from error


def _set_aside(out: Path, *, force: bool) -> Path | None:
    """Move a former run out of the way, to be removed or put back; None where `out` is free."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if (out / LOCK_FILE).exists():
        with held(out):  # a lock file that nobody holds is what a killed command left
            pass
    if not force:
        raise AlreadyExists(
            f"--out: found {out}, which holds files already", remedy="another --out, or --force"
        )
    if not (out / "job.json").is_file():
        found = f"--out: found {out}, which is no run of ours"
        raise AlreadyExists(found, remedy="--force replaces former runs only")
    aside = out.with_name(f".{out.name}.replaced.{os.getpid()}")
    out.rename(aside)
    return aside


def _next_numbered(name: str) -> Path:
    RUNS.mkdir(exist_ok=True)
    pattern = re.compile(re.escape(name) + r"-(\d+)$")
    taken = [int(m.group(1)) for p in RUNS.iterdir() if (m := pattern.match(p.name))]
    number = max(taken, default=0)
    while True:
        number += 1
        path = RUNS / f"{name}-{number:03d}"
        with suppress(FileExistsError):  # another run took the number a moment ago
            path.mkdir()
            return path


def _point_latest(path: Path) -> None:
    """Link runs/latest to the run; do nothing on a file system without links."""
    beside = RUNS / f".latest.{os.getpid()}"
    try:
        beside.symlink_to(path.name)
        beside.replace(RUNS / "latest")
    except OSError:
        beside.unlink(missing_ok=True)


def all_abandoned(directory: Path) -> bool:
    """Whether a run ended with all of its rounds abandoned, so that it cannot be resumed."""
    if (directory / RESULT_FILE).is_file() or not (directory / "plan.json").is_file():
        return False
    rows = [row for row in read_rounds(directory) if row.arm == "federated"]
    done = bool(rows) and rows[-1].round == read_json(directory / "plan.json")["rounds"]
    return done and all(row.abandoned for row in rows)


def list_runs(root: Path = RUNS) -> list[ListedRun]:
    """The run directories under `root`, newest last. Raises BadInput for a result that cannot be read."""
    runs: list[ListedRun] = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if path.is_symlink() or not (path / "job.json").is_file():
            continue
        result = read_result(path) if (path / RESULT_FILE).is_file() else None
        changed = (path / "job.json").stat().st_mtime
        runs.append(ListedRun(str(path), result, all_abandoned(path), changed))
    return sorted(runs, key=lambda run: run.changed)


@dataclass(frozen=True)
class Gap:
    """The gap of one metric: centralised minus federated on all test rows, with its parts.

    Fractions; positive means lost against centralised. mean: of the total; low, high: ends of its 95 % interval,
    None where there is none. parts: {part: its estimate and interval}, the total among them.
    """

    metric: str
    parts: Mapping[str, Interval]
    mean: float | None
    low: float | None
    high: float | None

    @overload
    def __getitem__(self, key: Literal["mean", "low", "high"]) -> float | None: ...
    @overload
    def __getitem__(
        self,
        key: Literal["total", "federation", "quantisation", "privacy", "protection", "local_only"],
    ) -> Interval: ...
    def __getitem__(self, key: str) -> object:
        """`gap["federation"]` is a part; `gap["mean"]` a number of the total."""
        return self.parts[key] if key in self.parts else self.parts["total"][key]


R = TypeVar("R", RunResult, ComparisonResult)


class _Finished(Generic[R]):
    """What a run and a comparison share: a directory, its result, its page.

    Raises BadInput for a directory without a result, or with one of the other kind.
    """

    def __init__(self, directory: Path, kind: type[R]) -> None:
        self.directory = Path(directory)
        found = read_result(self.directory)
        if not isinstance(found, kind):
            raise BadInput(
                f"{directory}: found a result of kind {found.kind!r}, expected {kind.kind!r}",
                remedy="fedcore.load opens both; only a run has a model",
            )
        self.result: R = found

    @property
    def gap(self) -> dict[str, Gap]:
        """{metric: Gap}."""
        found = {}
        for metric in self.result.metrics:
            gaps = self.result.gap.items()
            parts = {part: by[metric] for part, by in gaps if metric in by}
            total = parts.get("total", Interval(None))
            found[metric] = Gap(metric, parts, total.mean, total.low, total.high)
        return found

    @property
    def rounds(self) -> list[RoundRow]:
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


class Run(_Finished[RunResult]):
    """A finished run: `print(run)`, `run.gap["auc"]`, `run.predict(frame)`, `run.model`,
    `run.rounds`, `run.plot()`, `run.report()`."""

    def __init__(self, directory: Path, task: Task | None = None) -> None:
        super().__init__(directory, RunResult)
        self._task, self._file = task, self.directory
        self._model: SavedModel | None = None

    @property
    def model(self) -> Module:
        """The federated model as a torch module in evaluation mode: it takes `run.inputs(rows)`, what training
        gave it, and not raw rows where the task scales them (a warning says so)."""
        model = self._saved()
        if model.statistics is not None:
            count = len(model.about["columns"])
            text = (
                f"run.model takes {count} scaled inputs, not raw rows: use run.predict(rows), or "
                "run.model(run.inputs(rows))"
            )
            warnings.warn(text, stacklevel=2)
        return model.module

    @property
    def checkpoints(self) -> Mapping[int, Path]:
        """{round: file of the model after it}, of a run with `checkpoint_every`."""
        files = sorted((self.directory / CHECKPOINTS).glob("round-*.safetensors"))
        return {int(file.stem.removeprefix("round-")): file for file in files}

    def after(self, round_: int) -> Run:
        """The run with the model after a round that was kept, for `model`, `predict`, `inputs` and `export`; its
        result stays that of the whole run. Raises BadInput where no model of that round was kept."""
        if round_ not in self.checkpoints:
            kept = ", ".join(map(str, self.checkpoints)) or "none"
            raise BadInput(
                f"{self.directory}: found no model of round {round_}, expected one of: {kept}",
                remedy="checkpoint_every=1 keeps the model of every round",
            )
        found = Run(self.directory, self._task)
        found._file = self.checkpoints[round_]
        return found

    def inputs(self, rows: object) -> Tensor:
        """Raw rows, as `predict` takes them, to what `model` takes: (n, ...), scaled and encoded as in training.
        Raises BadInput as `predict`."""
        return self._saved().inputs(rows)

    def predict(self, rows: object) -> NDArray[np.float64]:
        """Raw rows to a NumPy array. rows: for a table task a DataFrame, a dict of columns or the path of a .csv
        or .parquet file, of which the declared columns are read (no target is needed); otherwise an array, or
        the path of a .npy, .npz or .parquet file.

        Probabilities for classification metrics, (n,) of class 1 for one logit and (n, C) for several; the
        model's own outputs otherwise. Raises BadInput for rows that training would have refused.
        """
        return self._saved().predict(rows)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of the columns of `predict`, as the task's table declares them;
        empty for a task without declared classes."""
        table = self._saved().table
        return (table.classes or ()) if table else ()

    def export(self, out: str | Path | None = None, rows: object = None) -> Path:
        """Write the model as one TorchScript file that takes raw rows (`fedcore export`); returns its path.

        out: by default model.pt in the run's directory. rows: some to check the file on, as `predict` takes
        them. Raises BadInput where they are needed, Refused for a model that TorchScript does not take.
        """
        from fedcore.experiment.export import export

        return export(self._saved(), self.directory, Path(out) if out else None, rows)

    def _saved(self) -> SavedModel:
        from fedcore.learning.saved import load_model

        if self._model is None:
            self._model = load_model(self._file, self._task)
            if text := self._model.warning:
                warnings.warn(text, stacklevel=3)
        return self._model

    def plot(self) -> Figure:
        """A matplotlib figure with a legend: the first metric by round per arm, the gap below."""
        from fedcore.report.plots import rounds_figure, shown_in_notebooks, with_legend

        figure = rounds_figure([(self.result, self.rounds)], self.result.metrics[0])
        return shown_in_notebooks(with_legend(figure))


class Comparison(_Finished[ComparisonResult]):
    """A finished comparison over seeds and folds: `.table()`, `.latex()`, `.report()`."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, ComparisonResult)

    def table(self) -> DataFrame:
        """A pandas DataFrame: one row per (seed, fold, arm)."""
        require_extra("table", "tables", "pandas")
        import pandas as pd

        return pd.DataFrame(
            {"seed": split.seed, "fold": split.fold, "arm": arm, **scores}
            for split in self.result.cells
            for arm, scores in split.arms.items()
        )

    def latex(self) -> str:
        """The table of arms and gaps for a paper (booktabs)."""
        from fedcore.report import latex

        return latex.render(self.result)

    def markdown(self) -> str:
        """The same as Markdown."""
        from fedcore.report import markdown

        return markdown.render(self.result)


def load(directory: str | Path, task: Task | None = None) -> Run | Comparison:
    """Open a run or a comparison from its directory. `task`: needed for the model of a task that was
    made in a notebook; others are loaded again from where they came."""
    path = Path(directory)
    return Comparison(path) if isinstance(read_result(path), ComparisonResult) else Run(path, task)
