"""`fedcore.simulate` and `fedcore.compare`: the two functions behind the commands of the same names.

Both take a task (object, name or path), sites, and any setting by its keyword; both work in a script
without a `__main__` guard, in a notebook and with lambdas, since nothing leaves this process or the ones that it
forks.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Unpack

from fedcore import report
from fedcore.config import Job, Settings, read_job_file
from fedcore.config.unsupported import refuse_split, refuse_unsupported
from fedcore.errors import BadInput
from fedcore.experiment.comparison import OnCell, OnSplitStep, SplitGrid, finish, is_unfinished
from fedcore.experiment.environment import usable_cores
from fedcore.experiment.loop import OnRound, OnStep, RunWriter, run_experiment
from fedcore.experiment.outcome import in_folder
from fedcore.experiment.prepare import Prepared, job_for, prepare, stored_job
from fedcore.experiment.run import Comparison, Run, all_abandoned, held, new_directory
from fedcore.files import RESULT_FILE
from fedcore.learning.task import Task

Layers = Sequence[Mapping[str, object]]
"""Settings of a job, later mappings winning; each flat or nested like a job file."""

OnReady = Callable[[Prepared, Path], None]
Say = Callable[[str], None]


def simulate(
    task: Task | str | None = None,
    sites: Mapping[str, object] | None = None,
    *,
    job: str | Path | Layers | None = None,
    out: str | Path | None = None,
    force: bool = False,
    workers: int | None = None,
    on_round: OnRound | None = None,
    on_step: OnStep | None = None,
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
    workers: processes, each with one torch thread, that train and score the sites; it needs `sum="exact"`. Their number
    changes no bit of the result. Without it this process does everything.
    on_round: called with every row; return `fedcore.STOP` to end after this round. on_step: called before each round
    of an arm, with what comes. on_ready: called with the prepared job and the directory before round 1.
    say: called with a line for each step of the set-up.
    Raises FedcoreError (see `fedcore/errors.py`); nothing is written for bad input.
    """
    prepared = prepare(*_job(task, sites, job, settings), say)
    _use(prepared, workers)
    name = f"{prepared.task.name}-{prepared.plan.protection}"
    with new_directory(name, Path(out) if out else None, force=force) as directory:
        writer = RunWriter(directory, prepared)
        writer.start()
        if on_ready is not None:
            on_ready(prepared, directory)
        return run_prepared(prepared, writer, on_round, on_step, resume=False)


def resume(
    directory: str | Path,
    *,
    task: Task | None = None,
    workers: int | None = None,
    on_round: OnRound | None = None,
    on_step: OnStep | None = None,
    on_ready: OnReady | None = None,
    say: Say = lambda _: None,
) -> Run:
    """Go on with an interrupted run after its last whole round, to the same bits.

    task: needed where the run's task was made in a notebook. workers: as in `simulate`. Raises BadInput for any other
    directory.
    """
    path = Path(directory)
    with held(path) if path.is_dir() else nullcontext():
        return _resume(path, task, workers, on_round, on_step, on_ready, say)


def _resume(
    path: Path,
    task: Task | None,
    workers: int | None,
    on_round: OnRound | None,
    on_step: OnStep | None,
    on_ready: OnReady | None,
    say: Say,
) -> Run:
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
            remedy=f"`fedcore compare --resume {path}`",
        )
    if all_abandoned(path):
        raise BadInput(
            f"--resume: found {path}, of which every round was abandoned, expected an interrupted run",
            remedy="a new run with fewer absences: the same settings would end the same way",
        )
    prepared = prepare(*job_for(task, stored), say)
    _use(prepared, workers)
    if on_ready is not None:
        on_ready(prepared, path)
    return run_prepared(prepared, RunWriter(path, prepared), on_round, on_step, resume=True)


def _use(prepared: Prepared, workers: int | None) -> None:
    """Raises BadInput where the job's sites cannot be trained by other processes."""
    if workers is None:
        return
    if workers < 1:
        raise BadInput(f"workers: found {workers}, expected 1 or more")
    prepared.federation.use_workers(workers)
    if workers > (cores := usable_cores()):
        prepared.findings = [
            *prepared.findings,
            (f"{workers} workers take turns on {cores} cores", f"--workers {cores}"),
        ]


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


def run_prepared(
    prepared: Prepared,
    writer: RunWriter,
    on_round: OnRound | None,
    on_step: OnStep | None,
    *,
    resume: bool,
) -> Run:
    """All rounds, and the files of the run in the writer's folder. resume: go on from the checkpoint there."""
    directory = writer.directory
    with closing(prepared.federation):
        experiment, result = run_experiment(
            prepared, writer, on_round, on_step=on_step, resume=resume
        )
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
    workers: int | None = None,
    on_cell: OnCell | None = None,
    on_step: OnSplitStep | None = None,
    on_tick: Callable[[], object] = lambda: None,
    on_ready: OnReady | None = None,
    say: Say = lambda _: None,
    **settings: Unpack[Settings],
) -> Comparison:
    """The arms over seeds x folds: paired differences with the Nadeau-Bengio correction.

    seeds: how many (0, 1, ...), or which. `folds=` is the number of folds, each the test part once.
    workers: processes, each forked from this one for a split and with one torch thread; without it one per core.
    Their number changes no bit of the result. out: also the folder of an interrupted comparison with the same
    settings, which then goes on: its finished splits are kept.
    on_cell: called with each finished cell, its number and the number of all. on_step: called before
    each round of an arm, with its split and what comes. on_tick: called about every second. on_ready: called with
    the first split's job and the directory before a split is run. The others as in `simulate`.
    Raises FedcoreError; nothing is written for bad input.
    """
    found, complete = _job(task, sites, job, settings)
    refuse_split(settings)
    refuse_unsupported(complete.to_json(), "comparison")
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise BadInput(f"seeds: found {chosen or 'none'}, expected at least 1, each once")
    if workers is not None and workers < 1:
        raise BadInput(f"workers: found {workers}, expected 1 or more")
    path = Path(out) if out else None
    with ExitStack() as claimed:
        if path is not None and not force and is_unfinished(path):
            claimed.enter_context(held(path))
            grid = SplitGrid(found, complete, chosen, say)
            grid.resume(path)
            directory = path
        else:
            grid = SplitGrid(found, complete, chosen, say)
            new = new_directory(f"{found.name}-compare", path, force=force)
            directory = claimed.enter_context(new)
            grid.start(directory)
        if on_ready is not None:
            on_ready(grid.first, directory)
        finish(directory, grid.run(directory, workers, on_cell, on_step, on_tick))
        comparison = Comparison(directory)
        comparison.report()
    return comparison
