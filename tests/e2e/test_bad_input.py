"""Every kind of bad input: one clear line, a hint, the right exit code, nothing written."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from fedcore.cli import main

TASKS = """
import numpy as np, torch, fedcore
from sklearn.linear_model import LogisticRegression

def data(source):
    rng = np.random.default_rng(len(source))
    x = rng.normal(size=(60, 4)).astype("f4")
    y = (x[:, 0] > 0).astype("i8")
    if source == "nan": x[3, 2] = np.nan
    if source == "inf": x[5, 1] = np.inf
    if source == "none": return x[:0], y[:0]
    if source == "wide": x = np.hstack([x, x])
    if source == "huge": x = x * 1e30
    if source == "boom": raise RuntimeError("the file is locked")
    return x, y

def task(last, model=lambda: torch.nn.LazyLinear(2), **more):
    return fedcore.Task("bad", data, model, torch.nn.functional.cross_entropy,
                        sites={"a": "a", "b": "bb", "c": last}, **more)

fine = task("fine")
nan, inf, none, wide, huge, boom = (task(w) for w in ("nan", "inf", "none", "wide", "huge", "boom"))
estimator = task("fine", model=lambda: LogisticRegression())
metric = task("fine", metrics=("acuracy",))
two = fedcore.Task("bad", data, lambda: torch.nn.LazyLinear(2), torch.nn.functional.cross_entropy,
                   sites={"a": "a", "b": "bb"})
nowhere = fedcore.Task("bad", data, lambda: torch.nn.LazyLinear(2), torch.nn.functional.cross_entropy)

def crash(model, batch):
    raise ValueError("inside my forward")

crashing = task("fine", predict=crash)
number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "tasks.py").write_text(textwrap.dedent(TASKS))
    (tmp_path / "instance.py").write_text(
        "import fedcore\nfrom sklearn.linear_model import LogisticRegression\n"
        "task = fedcore.Task('t', len, LogisticRegression(), len)\n"
    )
    (tmp_path / "syntax.py").write_text("task = (")
    (tmp_path / "section.toml").write_text("[trian]\nlr = 1\n")
    (tmp_path / "broken.toml").write_text("a = [")
    (tmp_path / "unknown.toml").write_text("[trian]\nlr = 1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(capfd, *arguments):
    with pytest.raises(SystemExit) as ended:
        main.main([str(a) for a in arguments])
    out, err = capfd.readouterr()
    return ended.value.code, out, err


def simulate(name, *more):
    return ("simulate", "--task", f"tasks.py:{name}", "--rounds", "2", *more)


CASES = {
    "unknown task": (("simulate", "--task", "hart"), 2, "task: found 'hart'", "'heart'"),
    "unknown protection": (("simulate", "--protection", "encripted"), 2, "found 'encripted'", "'encrypted'"),
    "unknown key with path": (("simulate", "unknown.toml"), 2, "trian", ""),
    "unknown flag": (("simulate", "--lrr", "3"), 2, "key: found 'lrr'", "'lr'"),
    "unknown set": (("simulate", "--set", "train.lrr=3"), 2, "train.lrr", "train.lr"),
    "flag without value": (("simulate", "--lr"), 2, "--lr: found no value", "--lr VALUE"),
    "wrong value": (("simulate", "--lr", "fast"), 2, "train.lr: found 'fast'", ""),
    "wrong type of an option": (("simulate", "--rounds", "many"), 2, "'many' is not a valid integer", "--help"),
    "unknown command": (("simulte",), 2, "No such command", "simulate"),
    "broken job file": (("simulate", "broken.toml"), 2, "broken.toml: it cannot be read as TOML", ""),
    "missing job file": (("simulate", "nope.toml"), 2, "found no file nope.toml", "fedcore new"),
    "missing task file": (("simulate", "--task", "nope.py"), 2, "found no file", "fedcore new"),
    "missing package": (("simulate", "--task", "nopkg.mod:task"), 2, "found no module", "install"),
    "missing attribute": (simulate("nope"), 2, "found no attribute 'nope'", "fedcore.Task"),
    "not a task": (simulate("number"), 2, "found int", "fedcore.Task"),
    "no sites": (simulate("nowhere"), 2, "names none", "[sites]"),
    "bits outside": (("simulate", "--bits", "40"), 2, "protect.bits: found 40", ""),
    "sites that do not fit": (
        ("simulate", "--bits", "24", "--max-sites", "5000000"), 3, "no ring proves headroom", "largest that fit",
    ),
    "roster above max_sites": (("simulate", "--max-sites", "3"), 3, "max_sites = 3", "4 or more"),
    "no rows": (simulate("none"), 2, "site c: found 0 rows", ""),
    "NaN in data": (simulate("nan"), 2, "site c: found 1 NaN", "statistics"),
    "infinity in data": (simulate("inf"), 2, "site c: found 1 NaN or infinite", ""),
    "NaN in an update": (simulate("huge"), 2, "site c, round 1: found NaN or infinity", "train.lr"),
    "model sizes differ": (simulate("wide"), 2, "site c: found a model of 18 coordinates, expected 10", ""),
    "two sites": (simulate("two"), 3, "found 2 under 'layered', expected at least 3", "plain"),
    "a threshold of less than half": (simulate("fine", "--threshold", "1"), 3, "found 1 for 3 sites", "default, 3"),
    "a threshold above all": (simulate("fine", "--threshold", "4"), 3, "found 4 for 3 sites", "leave it out"),
    "a threshold in words": (simulate("fine", "--threshold", "most"), 2, "'most' is not a valid integer", "--help"),
    "no absence": (simulate("fine", "--drop", "submit"), 2, "round.drop: found 'submit'", "--drop 3:submit:va"),
    "an unknown stage": (simulate("fine", "--drop", "1:sumbit:a"), 2, "stage: found 'sumbit'", "'submit'"),
    "an absent stranger": (simulate("fine", "--drop", "1:submit:zoe"), 2, "site: found 'zoe'", "a, b, c"),
    "an absence too late": (simulate("fine", "--drop", "1:keys:a,4:keys:a"), 2, "found round 4, expected 1 to 3", ""),
    "a dropout of 1": (simulate("fine", "--dropout", "1"), 2, "round.dropout: found 1.0, expected less than 1", ""),
    "absences to resume": (("simulate", "--resume", "x", "--drop", "1:keys:a"), 2, "--resume", ""),
    "an estimator": (simulate("estimator"), 2, "LogisticRegression", "fedcore.linear"),
    "an estimator object": (("simulate", "--task", "instance.py"), 2, "instance.py: task.model", "fedcore.linear"),
    "unknown metric": (simulate("metric"), 2, "'acuracy'", "'accuracy'"),
    "resume of nothing": (("simulate", "--resume", "nope"), 2, "found no job.json in nope", ""),
    "resume with settings": (("simulate", "--resume", "x", "--lr", "1"), 2, "--resume", ""),
    "report of nothing": (("report", "nope"), 2, "nope", ""),
    "report format": (("report", "nope", "--format", "pdf"), 2, "'pdf'", ""),
    "a path through a file": (
        ("simulate", "--rounds", "1", "--out", "tasks.py/x"), 2, "tasks.py/x cannot be written", "",
    ),
    "a report nowhere": (("report", ".", "--out", "no/where/x.html"), 2, "result.json", ""),
    "unknown section": (("simulate", "section.toml"), 2, "'trian'", "'train'"),
    "bench bits": (("bench", "protect", "--bits", "a,b"), 2, "--bits: found 'a,b'", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_line_a_hint_and_nothing_written(name, folder, capfd):
    arguments, code, message, hint = CASES[name]
    before = sorted(folder.rglob("*"))
    got, out, err = call(capfd, *arguments)
    assert got == code, err
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0], err
    refusal = err[err.index(errors[0]) :]  # a warning before it has a hint of its own
    hints = [line for line in refusal.splitlines() if line.startswith("hint:")]
    assert len(hints) <= 1
    assert hint in (hints[0] if hints else ""), err
    assert "Traceback" not in err and not out
    after = [p for p in folder.rglob("*") if "__pycache__" not in p.parts and p not in before]
    assert [p for p in after if p.name not in ("runs", "latest")] == []


@pytest.mark.parametrize(
    ("arguments", "line", "message"),
    [
        (
            simulate("boom"),
            'raise RuntimeError("the file is locked")',
            "site c: task.data raised RuntimeError",
        ),
        (simulate("crashing"), 'raise ValueError("inside my forward")', "site a"),
        (("simulate", "--task", "syntax.py"), "task = (", "SyntaxError"),
    ],
)
def test_the_user_s_own_error_shows_their_traceback_first(arguments, line, message, folder, capfd):
    got, out, err = call(capfd, *arguments)
    assert got == 1, err
    assert line in err and message in err
    trace = err[err.index("Traceback") : err.index("error:")] if "Traceback" in err else ""
    first = next((row for row in trace.splitlines() if row.strip().startswith("File")), "")
    assert "fedcore/" not in first.replace(str(Path.cwd()), "")
    assert not out


def test_the_plan_of_a_run_takes_no_settings(folder, capfd):
    """It would show the run's own plan as if it were that of the settings."""
    (folder / "run").mkdir()
    (folder / "run" / "plan.json").write_text("{}")
    got, out, err = call(capfd, "plan", "run", "--threshold", "4")
    assert got == 2 and not out
    assert "whose plan is fixed" in err and "hint: the settings with a job file" in err


def test_an_existing_directory_without_force(folder, capfd):
    (folder / "out").mkdir()
    (folder / "out" / "letter.txt").write_text("dear")
    for more in ((), ("--force",)):
        got, _, err = call(capfd, *simulate("fine", "--out", "out", *more))
        assert got == 2 and "found out" in err
    assert [p.name for p in (folder / "out").iterdir()] == ["letter.txt"]


def test_new_refuses_a_folder_with_files(folder, capfd):
    got, _, err = call(capfd, "new", ".")
    assert got == 2 and "hint:" in err
