"""The splits of a comparison, seeds x folds: each runs on its own, and its result is kept when it ends.

Invariant: a split is on disk whole or not at all, and every number of the comparison comes from there; so neither
an interruption nor the number of processes changes a bit of it.

    splits/inputs.json          what the comparison began with; a resumed one must find the same
    splits/seed-0-fold-3.json   a finished split: its result, and its rows of rounds.jsonl
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path

from fedcore.config import Job
from fedcore.errors import Abandoned, AlreadyExists, BadInput, GuardTripped, Refused
from fedcore.experiment.environment import environment, usable_cores
from fedcore.experiment.forked import fork_refusal, run_forked, ticking
from fedcore.experiment.loop import ArmStep, OnStep, inputs_of, refuse_changed, run_experiment
from fedcore.experiment.outcome import comparison_result, in_folder, split_result
from fedcore.experiment.prepare import Prepared, job_json, prepare
from fedcore.files import RESULT_FILE, ROUNDS_FILE, append_row, read_json, write_atomic, write_json
from fedcore.learning.device import accelerator_in_use
from fedcore.learning.model import single_thread
from fedcore.learning.task import Task
from fedcore.results import ComparisonResult, Origin, RoundRow, RunResult, SplitResult
from fedcore.types import Json

OnCell = Callable[[SplitResult, int, int], object]


OnSplitStep = Callable[["Split", ArmStep], object]


@dataclass(frozen=True)
class Split:
    """One run of a comparison. number: its place in the grid, from 1. folds: how many there are; 1 where every
    site brings its own test rows."""

    number: int
    seed: int
    fold: int
    folds: int

    def __str__(self) -> str:
        return f"seed {self.seed}" + (f", fold {self.fold}" if self.folds > 1 else "")


class SplitGrid:
    """The splits of one comparison and the folder they are kept in.

    own_test_rows: whether every site brings its own. Where the caller knows it, nothing is prepared here, and
    there is no `first`.
    """

    def __init__(
        self,
        task: Task,
        job: Job,
        seeds: Sequence[int],
        say: Callable[[str], None],
        *,
        own_test_rows: bool | None = None,
    ) -> None:
        self._task, self._job, self._seeds = task, job, seeds
        self._started, self._clock = datetime.now(UTC), time.perf_counter()
        self._first: Prepared | None = None
        if own_test_rows is None:
            with single_thread():
                self._first = prepare(task, self._job_of(seeds[0], 0), say)
            own_test_rows = self._first.own_test_rows
        self.own_test_rows = own_test_rows
        # Where every site brings its own test rows, folds would repeat the same run.
        self.folds = 1 if own_test_rows else job.run.folds
        pairs = enumerate(itertools.product(seeds, range(self.folds)), start=1)
        self.splits = [Split(number, *pair, self.folds) for number, pair in pairs]

    @property
    def first(self) -> Prepared:
        """The first split, ready to run."""
        assert self._first is not None
        return self._first

    def _job_of(self, seed: int, fold: int) -> Job:
        """The job of one split; its gaps need no interval of their own."""
        return replace(
            self._job,
            run=self._job.run.model_copy(update={"seed": seed, "fold": fold}),
            track=self._job.track.model_copy(update={"resamples": 0}),
        )

    @property
    def asked(self) -> Json:
        """job.json."""
        return job_json(self._task, self._job, "compare") | {"seeds": list(self._seeds)}

    def start(self, directory: Path) -> None:
        """Write what a comparison begins with into its new folder."""
        (directory / SPLITS).mkdir()
        write_json(directory / SPLITS / "inputs.json", inputs_of(self.first))
        write_json(directory / "plan.json", self.first.plan_json())
        write_json(directory / "job.json", self.asked)

    def resume(self, directory: Path) -> None:
        """Raise AlreadyExists, which names a setting, where the folder's comparison has others than this one,
        and BadInput where the task or its rows are not what they were."""
        if differs := first_differing(read_json(directory / "job.json"), self.asked):
            key, then, now = differs
            raise AlreadyExists(
                f"--out: found {directory}, an unfinished comparison with {key} = {then}, expected {now} as given",
                remedy="the same settings, which resume it, another --out, or --force",
            )
        refuse_changed(read_json(directory / SPLITS / "inputs.json"), inputs_of(self.first))

    def left(self, directory: Path) -> list[Split]:
        """The splits that are not on disk."""
        return [split for split in self.splits if not split_file(directory, split).is_file()]

    def run(
        self,
        directory: Path,
        workers: int | None,
        on_cell: OnCell | None,
        on_step: OnSplitStep | None,
        on_tick: Callable[[], object],
    ) -> ComparisonResult:
        """Run the splits that are left, and put all of them together. Raises what a run raises."""

        def step(split: Split, doing: ArmStep) -> None:
            if on_step is not None:
                on_step(split, doing)

        def done(split: Split) -> None:
            if on_cell is not None:
                result, _ = kept_split(directory, split)
                cell = split_result(result, split.seed, split.fold)
                on_cell(cell, split.number, len(self.splits))

        left = self.left(directory)
        processes = processes_for(workers, len(left), self._job.run.device)
        if processes == 1:
            with ticking(on_tick):
                for split in left:
                    first = self.first if split == self.splits[0] else None
                    self.run_split(directory, split, partial(step, split), first)
                    done(split)
        else:
            run_forked(
                left,
                lambda split, send: self.run_split(directory, split, send),
                processes,
                on_message=step,
                on_done=done,
                on_tick=on_tick,
                on_spare=_import_what_follows,
            )
        return self.together(directory)

    def run_split(
        self, directory: Path, split: Split, on_step: OnStep, prepared: Prepared | None = None
    ) -> None:
        """Run one split and keep its result. Raises what a run raises, with the split's name."""
        rows: list[Json] = []

        def keep(row: RoundRow) -> None:
            # What differs from run to run, and what only the report of one run draws.
            left_out = ("seconds", "peak", "per_site")
            kept = {key: value for key, value in row.items() if not key.startswith(left_out)}
            rows.append({"seed": split.seed, "fold": split.fold, **kept})

        try:
            with single_thread():
                prepared = prepared or prepare(self._task, self._job_of(split.seed, split.fold))
                _, result = run_experiment(prepared, None, keep, on_step=on_step)
        except (Abandoned, GuardTripped) as error:
            for row in rows:
                append_row(directory, row)
            kind = Abandoned if isinstance(error, Abandoned) else Refused
            what = f"{split}: {str(error).removeprefix('run: ')}"
            raise kind(what, remedy=error.remedy) from error
        write_json(split_file(directory, split), {"result": result.to_json(), "rows": rows})

    def together(self, directory: Path, seconds: float | None = None) -> ComparisonResult:
        """Of all splits, which are on disk: rounds.jsonl, in the order of the grid, and the result. seconds: what they
        took; None: since this began."""
        kept = [kept_split(directory, split) for split in self.splits]
        lines = (json.dumps(row, allow_nan=False) + "\n" for _, rows in kept for row in rows)
        write_atomic(directory / ROUNDS_FILE, (line.encode() for line in lines))
        results = [result for result, _ in kept]
        cells = [
            split_result(result, split.seed, split.fold)
            for split, result in zip(self.splits, results, strict=True)
        ]
        found = comparison_result(
            results, cells, len(self._seeds), self.folds, own_test_rows=self.own_test_rows
        )
        found = replace(
            found,
            cost=replace(
                found.cost,
                seconds_total=time.perf_counter() - self._clock if seconds is None else seconds,
            ),
            origin=Origin(environment(), self._started.strftime("%Y-%m-%dT%H:%M:%SZ")),
        )
        return in_folder(found, directory)


def processes_for(workers: int | None, jobs: int, *devices: str) -> int:
    """In how many processes so many jobs on these devices run. Raises BadInput for more than this machine can fork."""
    refusal = fork_refusal(accelerator=any(map(accelerator_in_use, devices)))
    if refusal and (workers or 1) > 1:
        raise BadInput(f"--workers: found {workers}, expected 1: {refusal}")
    wanted = workers or (1 if refusal else usable_cores())
    return max(1, min(wanted, jobs))


def _import_what_follows() -> None:
    """What the intervals and the report need, which takes a second: beside the last split a core is free for it."""
    for name in _FOLLOWS:
        import_module(name)


_FOLLOWS = (
    "scipy.special", "matplotlib.figure", "matplotlib.backends.backend_svg", "fedcore.report.page",
)  # fmt: skip


SPLITS = "splits"


def is_unfinished(directory: Path) -> bool:
    """Whether a folder holds a comparison that was interrupted."""
    return (directory / SPLITS).is_dir() and not (directory / RESULT_FILE).is_file()


def finish(directory: Path, result: ComparisonResult) -> None:
    """Write the result; the splits go, whose numbers are in it."""
    write_json(directory / RESULT_FILE, result.to_json())
    shutil.rmtree(directory / SPLITS)


def split_file(directory: Path, split: Split) -> Path:
    """Where a finished split is kept."""
    return directory / SPLITS / f"seed-{split.seed}-fold-{split.fold}.json"


def kept_split(directory: Path, split: Split) -> tuple[RunResult, list[Json]]:
    """A finished split: its result, and its rows of rounds.jsonl."""
    found = read_json(split_file(directory, split))
    return RunResult.from_json(found["result"]), found["rows"]


def first_differing(then: Json, now: Json) -> tuple[str, str, str] | None:
    """The first setting in which two job.json differ, and its two values as text; None where they are equal."""
    mine, yours = _settings(then), _settings(now)
    for key in mine | yours:
        if mine.get(key) != yours.get(key):
            return key, _shown(mine.get(key)), _shown(yours.get(key))
    return None


def _settings(asked: Json) -> dict[str, object]:
    """job.json as flat settings. The folder it was written from is none of them."""

    def flat(prefix: str, value: object) -> Iterator[tuple[str, object]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from flat(f"{prefix}.{key}".lstrip("."), inner)
        else:
            yield prefix, value

    return {key: value for key, value in flat("", asked) if key not in {"base", "kind"}}


def _shown(value: object) -> str:
    return "none" if value is None else json.dumps(value)
