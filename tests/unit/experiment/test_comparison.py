"""A comparison's splits: the same table in any number of processes and after any interruption."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from support.small_tasks import tiny

import fedcore
from fedcore.cli import main as commands
from fedcore.errors import AlreadyExists, BadInput, TaskFailed
from fedcore.experiment import api

pytestmark = pytest.mark.usefixtures("no_drawings")

SETTINGS = {"seeds": 2, "folds": 2, "rounds": 2, "protection": "plain"}


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def table(found):
    """Everything of a comparison but its name, and when and how fast it ran."""
    result = found.result.to_json()
    for measured in ("run", "reproduce", "started", "seconds_total"):
        del result[measured]
    return result, found.rounds


def interrupt_after(cells):
    seen = []

    def stop(*_):
        seen.append(None)
        if len(seen) == cells:
            raise KeyboardInterrupt

    return stop


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return table(
        fedcore.compare(tiny(), out=tmp_path_factory.mktemp("whole"), workers=1, **SETTINGS)
    )


@pytest.mark.parametrize("workers", [None, 2, 3, 9])
def test_the_table_is_the_same_in_any_number_of_processes(whole, workers):
    found = fedcore.compare(tiny(), workers=workers, **SETTINGS)
    assert table(found) == whole
    assert not (found.directory / "splits").exists()


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1), (3, 3)])
def test_an_interrupted_comparison_goes_on_with_what_it_has(whole, first, second):
    with pytest.raises(KeyboardInterrupt):
        fedcore.compare(
            tiny(), out="here", workers=first, on_cell=interrupt_after(2), **SETTINGS
        )  # fmt: skip
    kept = {path.name: path.stat().st_mtime_ns for path in Path("here/splits").glob("seed-*.json")}
    assert len(kept) >= 2
    began, cells = [], []
    found = fedcore.compare(
        tiny(), out="here", workers=second, on_ready=lambda _, path: began.append(path),
        on_cell=lambda split, *_: cells.append((split.seed, split.fold)), **SETTINGS,
    )  # fmt: skip
    assert began == [Path("here")]
    assert len(cells) == 4 - len(kept)
    assert not {f"seed-{seed}-fold-{fold}.json" for seed, fold in cells} & kept.keys()
    assert table(found) == whole


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"lr": 0.25}, "train.lr = 0.05, expected 0.25"),
        ({"seeds": 3}, r"seeds = \[0, 1\], expected \[0, 1, 2\]"),
        ({"folds": 3}, "folds = 2, expected 3"),
        ({"protection": "masked"}, 'protect.protection = "plain", expected "masked"'),
        ({"sites": {"a": 1, "b": 2, "c": 9}}, "sites.a = none, expected 1"),
    ],
)
def test_other_settings_are_refused_by_name(changed, named):
    with pytest.raises(KeyboardInterrupt):
        fedcore.compare(tiny(), out="here", workers=1, on_cell=interrupt_after(1), **SETTINGS)
    before = sorted(Path("here").rglob("*"))
    with pytest.raises(AlreadyExists, match=f"unfinished comparison with {named} as given"):
        fedcore.compare(tiny(), out="here", **SETTINGS | changed)
    assert sorted(Path("here").rglob("*")) == before


def test_other_rows_or_another_task_are_refused_by_name():
    with pytest.raises(KeyboardInterrupt):
        fedcore.compare(tiny(), out="here", workers=1, on_cell=interrupt_after(1), **SETTINGS)
    with pytest.raises(BadInput, match=r"the (task|rows of the sites) changed"):
        fedcore.compare(tiny(rows=40), out="here", **SETTINGS)
    assert fedcore.compare(tiny(rows=40), out="here", force=True, **SETTINGS).result.seeds == 2


def kill_own_process(_module, rows, fit):
    if fit.seed == 1 and os.getpid() != PARENT:
        os.kill(os.getpid(), signal.SIGKILL)


PARENT = os.getpid()


def test_a_split_whose_process_is_killed_is_named_and_the_others_stay():
    task = tiny(train=kill_own_process)
    with pytest.raises(BadInput, match=r"seed 1, fold [01]: its process was killed by SIGKILL"):
        fedcore.compare(task, out="here", workers=2, **SETTINGS)
    assert list(Path("here/splits").glob("seed-0-*.json"))
    found = fedcore.compare(task, out="here", workers=1, **SETTINGS)  # not killed in this process
    assert len(found.result.cells) == 4


def test_a_failure_before_the_first_split_leaves_nothing():
    def fail(*_):
        raise ValueError("no")

    with pytest.raises(TaskFailed, match="round 1"):
        fedcore.compare(tiny(train=fail), out="here", workers=2, **SETTINGS)
    assert not Path("here").exists()


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_seeds_are_some_and_distinct(seeds):
    with pytest.raises(BadInput, match="expected at least 1, each once"):
        fedcore.compare(tiny(), **SETTINGS | {"seeds": seeds})
    with pytest.raises(BadInput, match="workers: found 0"):
        fedcore.compare(tiny(), workers=0, **SETTINGS)


def ends(*arguments):
    with pytest.raises(SystemExit) as ended:
        commands.main(arguments)
    return ended.value.code


HEART = ("compare", "--seeds", "1", "--folds", "2", "--rounds", "1", "--protection", "plain")


def test_the_command_says_how_to_resume_and_resumes(capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(api, "finish", interrupt_after(1))
        assert ends(*HEART, "--out", "here") == 130
    assert "resume: fedcore compare --resume here\ninterrupted\n" in capsys.readouterr().err
    assert ends("compare", "--resume", "here", "--seeds", "2") == 2
    assert ends("compare", "--resume", "here", "--json") == 0
    out, err = capsys.readouterr()
    assert "2 finished splits are kept in here" in err
    assert json.loads(out)["folds"] == 2
    assert ends("compare", "--resume", "here") == 2
    assert "found a finished comparison in here" in capsys.readouterr().err
    assert ends("simulate", "--rounds", "1", "--protection", "plain", "--out", "run") == 0
    assert ends("compare", "--resume", "run") == 2
    assert "found a run in run" in capsys.readouterr().err
