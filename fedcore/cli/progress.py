"""What runs and how long it will take, on stderr while a command computes.

On a terminal one line is drawn again every second: the round or the splits, the arm with its protection, the
newest metric, the time left. In a log there is a line for every fifth of the rounds or for each finished split,
and one after LOG_SECONDS without any. Times and advice are measured in this run.

Invariant: no thread of this module runs while processes are forked: a lock that it held then would stay locked
in the child.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from fedcore.cli import console
from fedcore.cli.console import ago, say

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from fedcore.config.grid_file import Combination
    from fedcore.experiment.comparison import Split
    from fedcore.experiment.loop import ArmStep
    from fedcore.results import RoundRow, SplitResult

LOG_SECONDS = 30.0
"""The longest silence in a log."""

DRAW_SECONDS = 0.1
"""The shortest time between two drawings on a terminal."""

ADVICE_SECONDS, ADVICE_FACTOR = 20.0, 2.0
"""With less time left, or less to gain, nobody is advised to begin again."""

Clock = Callable[[], float]


class Display:
    """How far so many units of work have come. unit: `rounds` or `splits`; clock: in seconds."""

    def __init__(self, unit: str, clock: Clock = time.monotonic) -> None:
        self._unit, self._clock = unit, clock
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self.begin(0)
        self._advised = False

    def begin(self, total: int, done: float | None = None) -> None:
        """Start, or start again. done: what was finished before; None: whatever the first `show` says."""
        self.close()
        self.total, self._done, self._already = total, done or 0.0, done
        self._count = int(self._done)
        self._began = self._said = self._drawn = self._clock()
        self._text, self._metric = "starting" if total else "", ""
        if total and console.stderr.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn

            fields = ("count", "metric", "left")
            texts = [TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in fields]
            self._bar = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(bar_width=16), *texts,
                console=console.stderr, transient=True, auto_refresh=False,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=total, count="", metric="", left="")
            self._bar.start()

    def show(self, text: str, done: float, metric: str | None = None, begun: float = 0.0) -> None:
        """What runs now, and how many units are done; a metric stays until the next one. begun: how much is done
        of those that are not finished, in units."""
        if self._already is None:
            self._already, self._began = done, self._clock()
        self._text, self._count, self._done = text, int(done), done + begun
        self._metric = self._metric if metric is None else metric
        self.tick()

    def tick(self) -> None:
        """Draw it, or say it after a long silence; to be called about every second."""
        now = self._clock()
        bar, task, count = self._bar, self._task, f"{self._count}/{self.total} {self._unit}"
        if bar is not None and task is not None:
            if now - self._drawn >= DRAW_SECONDS:
                self._drawn = now
                bar.update(
                    task, completed=self._done, description=self._text, count=count,
                    metric=self._metric, left=self._left_text(), refresh=True,
                )  # fmt: skip
        elif self._text and now - self._said >= LOG_SECONDS:
            so_far = f"{ago(now - self._began)} so far"
            parts = (self._text, f"{count} done", so_far, self._left_text())
            self.say(", ".join(filter(None, parts)))

    def say(self, text: str) -> None:
        """A line that stays: above the bar, or in the log."""
        self._said = self._clock()
        say(text)

    def seconds_left(self) -> float | None:
        """By the pace of this run; None before there is one."""
        done = self._done - (self._already or 0.0)
        return (self._clock() - self._began) / done * (self.total - self._done) if done else None

    def _left_text(self) -> str:
        left = self.seconds_left()
        return f"about {ago(left)} left" if left else ""

    def advise(self, doing: ArmStep, protection: str) -> None:
        """Once, where protection takes most of a long run: what the run would gain without it."""
        left, rest = self.seconds_left(), doing.seconds - doing.protecting
        if self._advised or left is None or left < ADVICE_SECONDS or rest <= 0:
            return
        from fedcore.secagg.protections import unprotected

        factor = doing.seconds / rest
        if factor >= ADVICE_FACTOR and not unprotected(protection):
            self._advised = True
            share = f"{protection} takes {doing.protecting / doing.seconds:.0%} of the time here"
            faster = f"the same bits, {factor:.{0 if factor >= 10 else 1}f} times faster"
            self.say(f"hint: {share}; explore with `--protection plain`: {faster}")

    def close(self) -> None:
        """Remove the bar; what was said stays."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class RoundsProgress:
    """The rounds of one run."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._display = Display("rounds", clock)
        self._sites, self._protection = 0, ""
        self.tick, self.close = self._display.tick, self._display.close

    def begin(self, rounds: int, sites: int, protection: str) -> None:
        """Start, or start again, for so many rounds of so many sites."""
        self._display.begin(rounds)
        self._sites, self._protection = sites, protection

    def step(self, doing: ArmStep) -> None:
        """Called before each round of an arm, and before the final metrics."""
        self._display.show(_what(doing, self._protection), doing.round - 1)
        self._display.advise(doing, self._protection)

    def row(self, row: RoundRow) -> None:
        """Called with each row; shows those of the protected arm."""
        if row.arm != "federated":
            return
        from fedcore.report.terminal import progress

        shown, total = progress(row, self._sites), self._display.total
        due = row.round == total or row.round % max(1, total // 5) == 0
        if row.abandoned or (due and not console.stderr.is_terminal):
            self._display.say(f"round {row.round}/{total}  {shown}")
        self._display.show(f"round {row.round}", row.round, shown)


class SplitsProgress:
    """The splits of a comparison, of which several run at once."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._display = Display("splits", clock)
        self._rounds, self._folds, self._finished, self._protection = 1, 1, 0, ""
        self._running: dict[int, ArmStep] = {}
        self.tick, self.close = self._display.tick, self._display.close

    def begin(self, splits: int, folds: int, finished: int, rounds: int, protection: str) -> None:
        """Start for so many splits, some of which are finished already, of so many rounds."""
        self._display.begin(splits, finished)
        self._rounds, self._finished, self._protection = rounds, finished, protection
        self._folds = folds

    def step(self, split: Split, doing: ArmStep) -> None:
        """Called before each round of an arm of a split."""
        self._running[split.number] = doing
        self._show()
        self._display.advise(doing, self._protection)

    def cell(self, split: SplitResult, number: int, total: int) -> None:
        """Called with each finished split."""
        self._running.pop(number, None)
        self._finished += 1
        scores = ", ".join(
            f"{metric} {split.arms['federated'][metric]:.3f} (gap {value:+.4f})"
            for metric, value in split.gap.get("total", {}).items()
            if value is not None
        )
        which = f"seed {split.seed}" + (f", fold {split.fold}" if self._folds > 1 else "")
        self._display.say(f"split {number}/{total}  {which}: {scores}")
        self._show()

    def _show(self) -> None:
        begun = sum(doing.round - 1 for doing in self._running.values()) / self._rounds
        numbers = sorted(self._running)
        text = "report" if self._finished == self._display.total else "starting"
        if numbers:
            first = _what(self._running[numbers[0]], self._protection)
            text = f"split{'s'[: len(numbers) - 1]} {_listed(numbers)}: {first}"
        self._display.show(text, self._finished, begun=begun)


class _Paced(Display):
    """A display whose time left is known to somebody else: its units take very different times."""

    def __init__(self, unit: str, clock: Clock, left: Callable[[], float | None]) -> None:
        super().__init__(unit, clock)
        self.seconds_left = left  # type: ignore[method-assign]


class GridProgress:
    """The splits of all cells of a grid. left: seconds that the rest takes, None before there is a pace."""

    def __init__(self, left: Callable[[], float | None], clock: Clock = time.monotonic) -> None:
        self._display = _Paced("splits", clock, left)
        self._running: dict[str, str] = {}
        self._done = 0
        self.tick, self.close = self._display.tick, self._display.close

    def checked(self, done: int, total: int) -> None:
        """Called with how many cells were prepared."""
        if done in (1, total):
            self._display.say(f"cells checked: {done} of {total}")

    def begin(self, done: int, total: int) -> None:
        """Start for so many splits, some of which are finished already."""
        self._done = done
        if done:
            self._display.say(f"{done} finished splits are kept")
        self._display.begin(total, done)

    def step(self, split: Split, cell: Combination, doing: ArmStep) -> None:
        """Called before each round of an arm of a split."""
        where = f"{cell}, {split}"
        self._running[where] = _what(doing, cell.protection)
        self._show()

    def split(self, cell: Combination, done: int, total: int) -> None:
        """Called with the cell of each finished split."""
        self._done = done
        mine = [where for where in self._running if where.startswith(f"{cell}, ")]
        for where in mine:  # those that still run say so again at their next step
            del self._running[where]
        if done == total:
            self._running.clear()
        self._show()

    def cell(self, cell: Combination, done: int, total: int, failed: str) -> None:
        """Called with each cell that ended. failed: why it has no result."""
        self._display.say(f"cell {done}/{total}  {cell}: {failed or 'done'}")

    def _show(self) -> None:
        where, doing = next(iter(self._running.items()), ("", "report"))
        self._display.show(f"{where}: {doing}" if where else doing, self._done)


@contextmanager
def reading_shown(clock: Clock = time.monotonic) -> Iterator[None]:
    """Show how far reading a dataset's items has come, for those passes that take more than a moment. Processes
    forked within it show nothing."""
    from fedcore.learning.data import reading

    display, of, whose = Display("rows", clock), os.getpid(), ""

    def read(where: str, done: int, total: int) -> None:
        nonlocal whose
        if os.getpid() != of:
            return
        if (where, total) != (whose, display.total):
            whose = where
            display.begin(total, done)
        display.show(f"{where}: reading rows", done)
        if done == total:
            whose = ""
            display.close()

    with closing(display), reading.reporting_to(read):
        yield


def _listed(numbers: list[int]) -> str:
    """`3, 4` or, of many, `3 - 18`."""
    few = ", ".join(map(str, numbers))
    return few if len(numbers) <= 4 else f"{numbers[0]} - {numbers[-1]}"


def _what(doing: ArmStep, protection: str) -> str:
    """`round 3, local only`; the protected arm with its protection."""
    from fedcore.report.phrases import ARM_NAMES

    if not doing.arm:
        return "final metrics and report"
    arm = f"federated, {protection}" if doing.arm == "federated" else ARM_NAMES[doing.arm]
    return f"round {doing.round}, {arm}"
