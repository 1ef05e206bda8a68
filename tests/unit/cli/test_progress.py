"""What a command says while it computes: by time, with what runs and how long it will take."""

from __future__ import annotations

import io
import os
import re

import pytest
from rich.console import Console

import fedcore
from fedcore.cli import console
from fedcore.cli.progress import RoundsProgress, SplitsProgress, reading_shown
from fedcore.experiment.comparison import Split
from fedcore.experiment.forked import ticking
from fedcore.experiment.loop import ArmStep
from fedcore.learning.data import reading
from fedcore.learning.data.rows import DatasetRows
from fedcore.results import RoundRow, SplitResult


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def screen(monkeypatch, *, terminal):
    file = io.StringIO()
    monkeypatch.setattr(
        console, "stderr", Console(file=file, force_terminal=terminal, width=100, color_system=None)
    )
    return file


@pytest.fixture
def log(monkeypatch):
    return screen(monkeypatch, terminal=False)


def federated(number, **more):
    return RoundRow(
        {"arm": "federated", "round": number, "accuracy": 0.5, "survivors": ["a"]} | more
    )


def doing(number, arm="centralised", seconds=0.0, protecting=0.0):
    return ArmStep(number, arm, seconds, protecting)


def test_a_log_has_a_line_for_every_fifth_of_the_rounds(log, clock):
    progress = RoundsProgress(clock)
    progress.begin(10, 1, "plain")
    for number in range(1, 11):
        progress.step(doing(number))
        progress.row(federated(number))
    assert re.findall(r"^round (\d+)/10  accuracy 0.500$", log.getvalue(), re.MULTILINE) == [
        "2", "4", "6", "8", "10",
    ]  # fmt: skip
    assert len(log.getvalue().splitlines()) == 5


def test_a_log_is_not_silent_for_long_and_names_what_runs(log, clock):
    progress = RoundsProgress(clock)
    progress.begin(10, 1, "masked")
    progress.step(doing(1, "federated"))
    progress.step(doing(2, "federated"))
    clock.now += 29
    progress.tick()
    assert log.getvalue() == ""
    clock.now += 2
    progress.tick()
    progress.tick()
    assert (
        log.getvalue()
        == "round 2, federated, masked, 1/10 rounds done, 31 s so far, about 4 min left\n"
    )
    clock.now += 31
    progress.step(doing(11, ""))
    assert (
        log.getvalue().splitlines()[1]
        == "final metrics and report, 10/10 rounds done, 1 min so far"
    )


def test_the_time_left_of_a_resumed_run_counts_from_where_it_went_on(log, clock):
    progress = RoundsProgress(clock)
    progress.begin(100, 1, "plain")
    progress.step(doing(91))
    clock.now += 40
    progress.step(doing(95))
    assert "94/100 rounds done, 40 s so far, about 1 min left" in log.getvalue()


def test_a_terminal_is_drawn_again_while_one_step_computes(monkeypatch, clock):
    monkeypatch.setenv("TERM", "xterm")
    shown = screen(monkeypatch, terminal=True)
    progress = RoundsProgress(clock)
    progress.begin(4, 1, "layered")
    clock.now += 1
    progress.step(doing(2, "federated"))
    seen = []
    for _ in range(3):
        clock.now += 1
        progress.tick()
        seen.append(shown.getvalue())
    assert len(set(seen)) == 3
    progress.step(doing(3, "local_only"))
    clock.now += 1
    progress.tick()
    progress.close()
    assert "round 2, federated, layered" in seen[0] and "1/4 rounds" in seen[0]
    assert re.search(r"round 3, local only .* 2/4 rounds .* about 8 s left", shown.getvalue())


@pytest.mark.parametrize(
    ("protection", "protecting", "factor"),
    [
        ("layered", 90.0, "10"),
        ("masked", 60.0, "2.5"),
        ("layered", 40.0, None),
        ("plain", 90.0, None),
    ],
)
def test_advice_has_the_factor_of_this_run(log, clock, protection, protecting, factor):
    progress = RoundsProgress(clock)
    progress.begin(10, 1, protection)
    progress.step(doing(1, "federated"))
    clock.now += 100
    for number in (2, 3):
        progress.step(doing(number, "federated", 100.0, protecting))
    hints = [line for line in log.getvalue().splitlines() if line.startswith("hint: ")]
    expected = (
        f"hint: {protection} takes {protecting:.0f}% of the time here; explore with `--protection plain`: "
        f"the same bits, {factor} times faster"
    )
    assert hints == ([expected] if factor else [])


def test_a_short_run_gets_no_advice(log, clock):
    progress = RoundsProgress(clock)
    progress.begin(10, 1, "layered")
    progress.step(doing(1, "federated"))
    clock.now += 1
    progress.step(doing(2, "federated", 1.0, 0.9))
    assert log.getvalue() == ""


def split(number):
    return Split(number, 0, number - 1, 5)


def cell(number):
    arms = {"federated": {"auc": 0.9}}
    return SplitResult(
        seed=0,
        fold=number - 1,
        model_sha256="",
        arms=arms,
        gap={"total": {"auc": 0.01}},
        per_site={},
    )


def test_a_comparison_names_the_splits_that_run_and_the_time_left(log, clock):
    progress = SplitsProgress(clock)
    progress.begin(25, 5, 5, 20, "layered")
    progress.step(split(6), doing(11, "federated"))
    progress.step(split(7), doing(11))
    clock.now += 31
    progress.tick()
    assert log.getvalue().splitlines() == [
        "splits 6, 7: round 11, federated, layered, 5/25 splits done, 31 s so far, about 9 min left"
    ]
    progress.cell(cell(6), 6, 25)
    clock.now += 31
    progress.tick()
    assert log.getvalue().splitlines()[1:] == [
        "split 6/25  seed 0, fold 5: auc 0.900 (gap +0.0100)",
        "split 7: round 11, centralised, 6/25 splits done, 1 min so far, about 12 min left",
    ]


def test_many_splits_at_once_are_a_range(log, clock):
    progress = SplitsProgress(clock)
    progress.begin(25, 5, 0, 20, "plain")
    for number in range(1, 17):
        progress.step(split(number), doing(1))
    clock.now += 31
    progress.tick()
    assert log.getvalue().startswith("splits 1 - 16: round 1, centralised, 0/25 splits done")


@pytest.mark.usefixtures("no_drawings")
@pytest.mark.parametrize("protection", ["plain", "masked"])
def test_a_run_says_what_comes_and_how_long_protection_took(tmp_path, protection):
    steps = []
    arms = ("centralised", "federated")
    fedcore.simulate(
        "heart",
        rounds=2,
        protection=protection,
        arms=arms,
        out=tmp_path / "run",
        on_step=steps.append,
    )
    assert [(each.round, each.arm) for each in steps] == [
        (1, "federated"), (1, "federated"), (1, "centralised"), (2, "federated"), (2, "centralised"), (3, ""),
    ]  # fmt: skip
    last = steps[-1]
    assert 0 <= last.protecting < last.seconds
    share = last.protecting / last.seconds
    assert share < 0.2 if protection == "plain" else share > 0.1


def test_ticks_come_while_the_block_computes_and_end_with_it():
    import threading

    ticked = threading.Event()
    with ticking(ticked.set):
        assert ticked.wait(10)
    assert not [thread for thread in threading.enumerate() if thread.name == "fedcore progress"]


class Slow:
    """A dataset of which each item takes so many seconds of a clock."""

    def __init__(self, clock, seconds, rows=40):
        self.clock, self.seconds, self.rows = clock, seconds, rows

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        self.clock.now += self.seconds
        return [float(index)], index % 2


@pytest.fixture
def reading_clock(monkeypatch, clock):
    monkeypatch.setattr(reading, "_clock", clock)
    return clock


@pytest.mark.parametrize("read", [DatasetRows.labels, DatasetRows.digests])
def test_a_log_says_how_far_reading_the_items_of_a_dataset_is(log, reading_clock, read):
    with reading_shown(reading_clock):
        read(DatasetRows(Slow(reading_clock, 2.0), site="site a"))
    first = log.getvalue().splitlines()[0]
    assert first == "site a: reading rows, 16/40 rows done, 30 s so far, about 48 s left"
    assert len(log.getvalue().splitlines()) == 2, "one each 30 s"


def test_a_terminal_shows_it_as_a_bar_that_goes_at_the_end(monkeypatch, reading_clock):
    monkeypatch.setenv("TERM", "xterm")
    shown = screen(monkeypatch, terminal=True)
    with reading_shown(reading_clock):
        DatasetRows(Slow(reading_clock, 0.5), site="site a").labels()
        at = shown.tell()
        DatasetRows(Slow(reading_clock, 0.01), site="site b").labels()
        assert shown.tell() == at, "a pass of a moment is not shown"
        DatasetRows(Slow(reading_clock, 0.5, rows=9), site="site c").labels()
    text = shown.getvalue()
    assert re.search(r"site a: reading rows .* 20/40 rows .* about 10 s left", text)
    assert "site c: reading rows" in text and "site b" not in text
    at = shown.tell()
    DatasetRows(Slow(reading_clock, 2.0), site="site d").labels()
    assert shown.tell() == at, "nobody is told outside"


def test_reading_in_a_forked_process_shows_nothing(log, monkeypatch, reading_clock):
    with reading_shown(reading_clock):
        own = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: own + 1)
        DatasetRows(Slow(reading_clock, 20.0)).labels()
    assert log.getvalue() == ""
