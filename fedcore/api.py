"""`fedcore.simulate` and `fedcore.compare`: the two functions behind the commands of the same names.

Both take a task (object, name or path), sites, and any setting by its keyword; both work in a script
without a `__main__` guard, in a notebook and with lambdas, since nothing leaves this process.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Unpack

from fedcore import report
from fedcore.config import Job, Settings, read_job_file
from fedcore.errors import Abandoned, BadInput, GuardTripped, Refused
from fedcore.experiment.environment import environment
from fedcore.experiment.loop import OnRound, RunWriter, run_experiment
from fedcore.experiment.outcome import comparison_result, in_folder, split_result
from fedcore.experiment.prepare import Prepared, job_for, job_json, prepare, stored_job
from fedcore.experiment.run import Comparison, Run, all_abandoned, new_directory
from fedcore.files import RESULT_FILE, append_row, write_json
from fedcore.learning.task import Task
from fedcore.results import ComparisonResult, Origin, RoundRow, RunResult, SplitResult

Layers = Sequence[Mapping[str, object]]
"""Settings of a job, later mappings winning; each flat or nested like a job file."""

OnReady = Callable[[Prepared, Path], None]
OnCell = Callable[[SplitResult, int, int], object]
Say = Callable[[str], None]


def simulate(
    task: Task | str | None = None,
    sites: Mapping[str, object] | None = None,
    *,
    job: str | Path | Layers | None = None,
    out: str | Path | None = None,
    force: bool = False,
    on_round: OnRound | None = None,
    on_ready: OnReady | None = None,
    say: Say = lambda _: None,
    **settings: Unpack[Settings],
) -> Run:
    """Run one simulated federation and its comparison arms; returns the finished `Run`.

    task: a `fedcore.Task`, `"heart"`, `"path/to/file.py[:attribute]"` or `"package.module:attribute"`.
    sites: {site id: source for task.data}; without it, the job's or the task's own sites.
    job: a job file, a folder with job.toml in it, or mappings with the keys of one, later ones winning.
    settings: any key of a job (`config.Settings`), e.g. `rounds=20`, `seed=0`, `protection="plain"`, `lr=0.1`.
    out: a new directory; without it, the next runs/<task>-<protection>-<nnn>/. force: replace a former run there.
    on_round: called with every row; return `fedcore.STOP` to end after this round. on_ready: called with the
    prepared job and the directory before round 1. say: called with a line for each step of the set-up.
    Raises FedcoreError (see `fedcore/errors.py`); nothing is written for bad input.
    """
    prepared = prepare(*_job(task, sites, job, settings), say)
    name = f"{prepared.task.name}-{prepared.plan.protection}"
    with new_directory(name, Path(out) if out else None, force=force) as directory:
        writer = RunWriter(directory, prepared)
        writer.start()
        if on_ready is not None:
            on_ready(prepared, directory)
        return _run(prepared, writer, on_round, resume=False)


def resume(
    directory: str | Path,
    *,
    task: Task | None = None,
    on_round: OnRound | None = None,
    on_ready: OnReady | None = None,
    say: Say = lambda _: None,
) -> Run:
    """Go on with an interrupted run after its last whole round, to the same bits.

    task: needed where the run's task was made in a notebook. Raises BadInput for any other directory.
    """
    path = Path(directory)
    if (path / RESULT_FILE).is_file():
        if (path / report.PAGE).is_file():
            found = f"--resume: found {path}, which is finished"
            raise BadInput(found, remedy=f"`fedcore report {path}`")
        report.write(path)  # it was interrupted while this was drawn
        return Run(path, task)
    stored = stored_job(path, task)
    if stored.pop("kind") != "run":
        raise BadInput(
            f"--resume: found the comparison {path}, expected a run",
            remedy="comparisons start again: `fedcore compare` with the same settings",
        )
    if all_abandoned(path):
        raise BadInput(
            f"--resume: found {path}, of which every round was abandoned, expected an interrupted run",
            remedy="a new run with fewer absences: the same settings would end the same way",
        )
    prepared = prepare(*job_for(task, stored), say)
    if on_ready is not None:
        on_ready(prepared, path)
    return _run(prepared, RunWriter(path, prepared), on_round, resume=True)


def _job(
    task: Task | str | None,
    sites: Mapping[str, object] | None,
    job: str | Path | Layers | None,
    settings: Mapping[str, object],
) -> tuple[Task, Job]:
    layers: list[Mapping[str, object]] = []
    if job:
        layers += [read_job_file(Path(job))] if isinstance(job, str | Path) else job
    if isinstance(task, str):
        layers.append({"task": task})
    elif not isinstance(task, Task | None):
        raise BadInput(f"task: found {type(task).__name__}, expected a fedcore.Task or its name")
    if sites is not None:
        layers.append({"sites": sites})
    return job_for(task if isinstance(task, Task) else None, *layers, settings)


def _run(prepared: Prepared, writer: RunWriter, on_round: OnRound | None, *, resume: bool) -> Run:
    directory = writer.directory
    experiment, result = run_experiment(prepared, writer, on_round, resume=resume)
    writer.finish(experiment, in_folder(result, directory))
    report.write(directory)
    return Run(directory, prepared.task)


def compare(
    task: Task | str | None = None,
    sites: Mapping[str, object] | None = None,
    *,
    seeds: int | Sequence[int] = 5,
    job: str | Path | Layers | None = None,
    out: str | Path | None = None,
    force: bool = False,
    on_cell: OnCell | None = None,
    on_ready: OnReady | None = None,
    say: Say = lambda _: None,
    **settings: Unpack[Settings],
) -> Comparison:
    """The arms over seeds x folds: paired differences with the Nadeau-Bengio correction.

    seeds: how many (0, 1, ...), or which. `folds=` is the number of folds, each the test part once.
    on_cell: called with each finished cell, its number and the number of all. on_ready: called with the first
    split's job and the directory before it is run. The others as in `simulate`.
    Raises FedcoreError; nothing is written for bad input.
    """
    found, complete = _job(task, sites, job, settings)
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen:
        raise BadInput("seeds: found none, expected at least 1")
    name = f"{found.name}-compare"
    with new_directory(name, Path(out) if out else None, force=force) as directory:
        first = prepare(found, _cell_job(complete, chosen[0], 0), say)
        if on_ready is not None:
            on_ready(first, directory)
        result = _compare_into(directory, found, complete, chosen, on_cell, first)
        write_json(directory / RESULT_FILE, result.to_json())
        comparison = Comparison(directory)
        comparison.report()
    return comparison


def _compare_into(
    directory: Path,
    task: Task,
    job: Job,
    seeds: Sequence[int],
    on_cell: OnCell | None,
    first: Prepared,
) -> ComparisonResult:
    """Every split of the grid, the first one prepared; writes job.json and plan.json, returns the result."""
    started, clock = datetime.now(UTC), time.perf_counter()
    # Where every site brings its own test rows, folds would repeat the same run.
    folds = 1 if first.own_test_rows else job.run.folds
    write_json(directory / "job.json", job_json(task, job, "compare"))
    write_json(directory / "plan.json", first.plan_json())
    grid = list(itertools.product(seeds, range(folds)))
    cells: list[SplitResult] = []
    results: list[RunResult] = []
    for number, (seed, fold) in enumerate(grid, start=1):
        prepared = first if number == 1 else prepare(task, _cell_job(job, seed, fold))
        try:
            _, result = run_experiment(prepared, None, partial(_keep_row, directory, seed, fold))
        except (Abandoned, GuardTripped) as error:
            kind = Abandoned if isinstance(error, Abandoned) else Refused
            what = f"seed {seed}, fold {fold}: {str(error).removeprefix('run: ')}"
            raise kind(what, remedy=error.remedy) from error
        results.append(result)
        cells.append(split_result(result, seed, fold))
        if on_cell is not None:
            on_cell(cells[-1], number, len(grid))
    found = comparison_result(results, cells, len(seeds), folds, own_test_rows=first.own_test_rows)
    found = replace(
        found,
        cost=replace(found.cost, seconds_total=time.perf_counter() - clock),
        origin=Origin(environment(), started.strftime("%Y-%m-%dT%H:%M:%SZ")),
    )
    return in_folder(found, directory)


def _cell_job(job: Job, seed: int, fold: int) -> Job:
    """The job of one split; its gaps need no interval of their own."""
    return replace(
        job,
        run=job.run.model_copy(update={"seed": seed, "fold": fold}),
        track=job.track.model_copy(update={"resamples": 0}),
    )


def _keep_row(directory: Path, seed: int, fold: int, row: RoundRow) -> None:
    """rounds.jsonl of a comparison: which split, which arm, which round, and how it scored."""
    kept = {key: value for key, value in row.items() if not key.startswith(("seconds", "peak"))}
    append_row(directory, RoundRow({"seed": seed, "fold": fold, **kept}))
