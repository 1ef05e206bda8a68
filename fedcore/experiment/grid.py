"""A grid of comparisons in one folder: every split of every cell is a job of its own, over all cores.

    job.json                 the grid as it was asked for; a resumed one must be the same
    cells/01-heart-.../      a cell: the folder of an ordinary comparison, with its own report
        cell.json            what the grid's table takes from its splits, written before its result
    result.json              the grid's result, once every cell has ended; table.json: its numbers, one a row
    report.html, report.md

Invariant: every cell is prepared before any is trained, so that what a plan refuses costs no time; a cell that fails
while it trains is told in the table, and the others go on. Neither an interruption nor the number of processes
changes a bit of the results.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from os.path import relpath
from pathlib import Path

from fedcore.config import Job
from fedcore.config.grid_file import Combination, GridFile, cells_of
from fedcore.config.unsupported import refuse_unsupported
from fedcore.errors import AlreadyExists, BadInput, FedcoreError
from fedcore.experiment.comparison import (
    Split,
    SplitGrid,
    finish,
    is_unfinished,
    kept_split,
    processes_for,
)
from fedcore.experiment.environment import environment
from fedcore.experiment.forked import run_forked
from fedcore.experiment.grid_table import grid_cells, tidy, with_curves
from fedcore.experiment.loop import ArmStep
from fedcore.experiment.prepare import job_for
from fedcore.experiment.run import Comparison, held, new_directory
from fedcore.files import RESULT_FILE, read_json, write_json
from fedcore.learning.data.partition import site_id
from fedcore.learning.task import Task
from fedcore.results import GridCell, GridResult
from fedcore.types import Json

CELLS, FACTS, TABLE = "cells", "cell.json", "table.json"


@dataclass(frozen=True)
class Checked:
    """What is known of a cell once it was prepared. work: rows x rounds x coordinates of one split, by which the time
    of cells without a finished split is guessed."""

    own_test_rows: bool
    work: float


@dataclass(frozen=True)
class CellFailure:
    """Why a cell has no result. code: the exit code of a command that fails so."""

    text: str
    code: int


@dataclass
class CellRun:
    """A cell, its folder, and how far it has come. seconds: of its splits that ended in this process."""

    number: int
    cell: Combination
    folder: Path
    task: Task
    job: Job
    checked: Checked | None = None
    failed: CellFailure | None = None
    splits: list[Split] = field(default_factory=list)
    left: int = 0
    seconds: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        return f"cell {self.number} ({self.cell})"

    @property
    def done(self) -> bool:
        """Whether its result is on disk."""
        return (self.folder / RESULT_FILE).is_file()

    def grid(self, *, known: bool) -> SplitGrid:
        """Its splits. known: it was checked, so nothing is prepared."""
        assert self.checked is not None or not known
        own = self.checked.own_test_rows if known and self.checked is not None else None
        return SplitGrid(self.task, self.job, self.cell.seeds, lambda _: None, own_test_rows=own)


@dataclass(frozen=True)
class _Job:
    """One split of one cell. first: of the cells that are checked, which have no split yet."""

    run: CellRun
    split: Split | None

    def __str__(self) -> str:
        return f"{self.run}: {self.split}" if self.split is not None else str(self.run)


@dataclass(frozen=True)
class GridListener:
    """Who is told how a grid comes along. Each function may do nothing.

    on_checked: (cells checked, all). on_begin: (splits finished before, all). on_step: (split, its cell, what comes).
    on_split: (its cell, splits done, all). on_cell: with each cell that ended. on_tick: about every second.
    """

    on_checked: Callable[[int, int], object] = lambda *_: None
    on_begin: Callable[[int, int], object] = lambda *_: None
    on_step: Callable[[Split, Combination, ArmStep], object] = lambda *_: None
    on_split: Callable[[Combination, int, int], object] = lambda *_: None
    on_cell: Callable[[Combination, int, int, str], object] = lambda *_: None
    on_tick: Callable[[], object] = lambda: None


class GridRun:
    """The cells of one grid, from their settings to the folder's result."""

    def __init__(self, grid: GridFile, base: Path) -> None:
        """base: the folder that relative paths of the file count from. Raises BadInput for a cell whose settings are
        refused, before anything is written."""
        self._grid, self._base = grid, base
        self.cells = cells_of(grid, base)
        self.runs: list[CellRun] = []
        self._started, self._clock = datetime.now(UTC), time.perf_counter()
        self._processes = 1

    def asked(self, directory: Path) -> Json:
        """job.json of the grid's folder. `base` counts from this folder: results are passed on, and the folders of a
        machine tell of its user."""
        base = relpath(self._base.resolve(), directory.resolve())
        return {"kind": "grid", "base": base, **self._grid.model_dump(mode="json")}

    def open(self, directory: Path, *, resume: bool) -> None:
        """Find the task and the complete job of every cell. Raises what these raise, with the cell's name, and
        AlreadyExists where the folder holds another grid."""
        if resume and read_json(directory / "job.json") != self.asked(directory):
            raise AlreadyExists(
                f"--out: found {directory}, an unfinished grid with other settings, expected those given",
                remedy="the same file, which resumes it, another --out, or --force",
            )
        for number, cell in enumerate(self.cells, start=1):
            name = "-".join(map(site_id, cell.names))
            folder = directory / CELLS / f"{number:02d}-{name}"
            try:
                task, job = job_for(None, *cell.layers)
                refuse_unsupported(job.to_json(), "comparison")
            except FedcoreError as error:
                raise _named(error, number, cell) from error
            self.runs.append(CellRun(number, cell, folder, task, job))

    def check(self, workers: int | None, listener: GridListener) -> None:
        """Prepare every cell that has no result, each in a process of its own. Raises what is refused, with the
        cell's name."""
        open_ = [_Job(run, None) for run in self.runs if not run.done]
        devices = {run.job.run.device for run in self.runs}
        self._processes = processes_for(workers, len(self.runs) * 64, *devices)
        done = len(self.runs) - len(open_)

        def told(job: _Job, found: Checked) -> None:
            job.run.checked = found

        def ended(_: _Job) -> None:
            nonlocal done
            done += 1
            listener.on_checked(done, len(self.runs))

        run_forked(
            open_, _check, self._processes, on_message=told, on_done=ended, on_tick=listener.on_tick
        )
        for run in self.runs:
            if run.checked is not None:
                grid = run.grid(known=True)
                run.splits, run.left = grid.splits, len(grid.left(run.folder))

    def train(self, listener: GridListener) -> None:
        """Run every split that is left, and put each cell together when its last one has ended."""
        jobs = [
            _Job(run, split)
            for run in self.runs
            if run.checked is not None
            for split in run.grid(known=True).left(run.folder)
        ]
        total = sum(len(run.splits) for run in self.runs)
        done = total - len(jobs)
        listener.on_begin(done, total)
        began: dict[int, float] = {}

        def told(job: _Job, found: ArmStep | CellFailure) -> None:
            assert job.split is not None
            began.setdefault(id(job), time.perf_counter())
            if isinstance(found, CellFailure):
                job.run.failed = job.run.failed or found
            else:
                listener.on_step(job.split, job.run.cell, found)

        def ended(job: _Job) -> None:
            nonlocal done
            done += 1
            job.run.left -= 1
            if id(job) in began:
                job.run.seconds.append(time.perf_counter() - began[id(job)])
            listener.on_split(job.run.cell, done, total)
            if job.run.left == 0:
                self._end(job.run, listener)

        for run in self.runs:  # interrupted between its last split and its result
            if run.checked is not None and run.left == 0 and not run.done:
                self._end(run, listener)
        run_forked(
            jobs, _train, self._processes, on_message=told, on_done=ended, on_tick=listener.on_tick
        )

    def _end(self, run: CellRun, listener: GridListener) -> None:
        if run.failed is None:
            _put_together(run)
        text = run.failed.text if run.failed is not None else ""
        ended = sum(each.done or each.failed is not None for each in self.runs)
        listener.on_cell(run.cell, ended, len(self.runs), text)

    def seconds_left(self) -> float | None:
        """By the pace of this run: of each cell that of its own splits, of others by how much there is to compute."""
        paces = [
            (sum(run.seconds) / len(run.seconds), run.checked.work)
            for run in self.runs
            if run.seconds and run.checked is not None
        ]
        if not paces:
            return None
        rate = sum(seconds for seconds, _ in paces) / max(1.0, sum(work for _, work in paces))
        left = 0.0
        for run in self.runs:
            if run.left and run.checked is not None:
                own = sum(run.seconds) / len(run.seconds) if run.seconds else None
                left += run.left * (own if own is not None else rate * run.checked.work)
        return left / self._processes

    def result(self, directory: Path) -> GridResult:
        """The grid's result, of the cells on disk."""
        bare = [self._cell(run, directory) for run in self.runs]
        known = {
            run.number: (Comparison(run.folder).result, read_json(run.folder / FACTS))
            for run in self.runs
            if run.done
        }
        found = GridResult(
            name=self._grid.name,
            started=self._started.strftime("%Y-%m-%dT%H:%M:%SZ"),
            seconds_total=time.perf_counter() - self._clock,
            workers=self._processes,
            currency=self._grid.prices.currency,
            cells=tuple(grid_cells(bare, known, self._grid.prices)),
            asked=self.asked(directory),
            environment=_versions(environment()),
        )
        return with_curves(found, directory)

    def _cell(self, run: CellRun, directory: Path) -> GridCell:
        task, partition, algorithm, protection, privacy = run.cell.names
        return GridCell(
            number=run.number, task=task, partition=partition, algorithm=algorithm, protection=protection,
            privacy=privacy, folder=str(run.folder.relative_to(directory)),
            failed=run.failed.text if run.failed is not None else "",
        )  # fmt: skip


def _versions(found: Json) -> Json:
    """Versions and the machine in words, without what names it: results are meant to be passed on."""
    left_out = ("platform", "cpu", "cores", "threads", "hash_seed", "commit")
    versions = {name: value for name, value in found.items() if name not in left_out}
    return versions | {"machine": f"{found['cores']} cores, {platform.machine()}"}


def _named(error: FedcoreError, number: int, cell: Combination) -> FedcoreError:
    """The same error with the cell in front."""
    named = BadInput(f"cell {number} ({cell}): {error}", remedy=error.remedy)
    named.exit_code = error.exit_code
    return named


def _check(job: _Job, send: Callable[[Checked], None]) -> None:
    """In a process of its own: prepare a cell, and begin its folder."""
    run = job.run
    try:
        grid = run.grid(known=False)
        if is_unfinished(run.folder) and (run.folder / "job.json").is_file():
            grid.resume(run.folder)
        else:  # new, or interrupted while it was begun
            shutil.rmtree(run.folder, ignore_errors=True)
            run.folder.mkdir(parents=True)
            grid.start(run.folder)
    except FedcoreError as error:
        raise _named(error, run.number, run.cell) from error
    plan, arms = grid.first.plan, len(grid.first.arms)
    rows = sum(map(len, grid.first.sites))
    work = float(plan.rounds * plan.train.epochs * rows * (1_000 + plan.coordinates) * arms)
    send(Checked(grid.own_test_rows, work))


def _train(job: _Job, send: Callable[[ArmStep | CellFailure], None]) -> None:
    """In a process of its own: run a split of a cell that has not failed."""
    run, split = job.run, job.split
    assert split is not None
    if run.failed is not None:
        return
    try:
        run.grid(known=True).run_split(run.folder, split, send)
    except FedcoreError as error:
        send(CellFailure(str(error), error.exit_code))


def _put_together(run: CellRun) -> None:
    """Write a cell's facts, its result and its report."""
    grid = run.grid(known=True)
    results = [result for result, _ in (kept_split(run.folder, split) for split in grid.splits)]
    counted = [result.rows for result in results if result.rows is not None]
    spent = [sum(r.cost.seconds.values()) for r in results if r.cost.seconds is not None]
    facts = {
        "seconds": sum(spent) / len(spent) if spent else None,
        "rows": counted[0].train + counted[0].test if counted else None,
        "test_fraction_ratio": sum(r.test for r in counted) / max(1, sum(r.train for r in counted)),
    }
    write_json(run.folder / FACTS, facts)
    whole = sum(result.cost.seconds_total or 0.0 for result in results)
    finish(run.folder, grid.together(run.folder, whole))
    Comparison(run.folder).report()


def run_grid(
    grid: GridFile,
    base: Path,
    *,
    out: Path | None = None,
    force: bool = False,
    workers: int | None = None,
    listener: Callable[[GridRun, Path], GridListener] = lambda *_: GridListener(),
) -> tuple[GridResult, Path]:
    """Run every cell of a grid; returns its result and its folder.

    out: a new folder, or that of an interrupted grid of the same file, which goes on. listener: of the run and its
    folder. Raises FedcoreError; nothing is left behind for bad input.
    """
    run = GridRun(grid, base)
    with ExitStack() as claimed:
        resume = out is not None and not force and is_unfinished_grid(out)
        if resume:
            assert out is not None
            claimed.enter_context(held(out))
            directory = out
            run.open(directory, resume=True)
        else:
            directory = claimed.enter_context(new_directory(f"{grid.name}-grid", out, force=force))
            run.open(directory, resume=False)
            write_json(directory / "job.json", run.asked(directory))
        told = listener(run, directory)
        run.check(workers, told)
        run.train(told)
        result = run.result(directory)
        write_json(directory / TABLE, tidy(result, directory))
        write_json(directory / RESULT_FILE, result.to_json())
        from fedcore.report import grid_page

        grid_page.write(directory)
    return result, directory


def is_unfinished_grid(directory: Path) -> bool:
    """Whether a folder holds a grid that was interrupted."""
    try:
        asked = read_json(directory / "job.json")
    except FedcoreError:
        return False
    return asked.get("kind") == "grid" and not (directory / RESULT_FILE).is_file()


def asked_of(directory: Path) -> tuple[GridFile, Path]:
    """The grid of a folder, and what its paths count from. Raises BadInput for any other folder."""
    if not is_unfinished_grid(directory):
        raise BadInput(f"--resume: found {directory}, expected the folder of an interrupted grid")
    asked = read_json(directory / "job.json")
    base = (directory / asked.pop("base")).resolve()
    asked.pop("kind")
    return GridFile.model_validate(asked), base


def first_failure(run: Sequence[CellRun]) -> CellFailure | None:
    """The failure that a command ends with; None where every cell has a result."""
    return next((each.failed for each in run if each.failed is not None), None)
