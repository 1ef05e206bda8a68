"""Run directories: numbered, resumable, reproducible; the model takes raw rows after loading."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fedcore
from fedcore.comparison import api
from fedcore.errors import AlreadyExists, BadInput, TaskFailed
from fedcore.files import read_json, write_atomic
from fedcore.reproduction import reproduce
from fedcore.run import list_runs


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def heart(**settings):
    return fedcore.simulate("heart", **{"rounds": 2, "protection": "plain"} | settings)


def test_runs_are_numbered_and_latest_points_to_the_newest():
    assert heart().directory == Path("runs/heart-plain-001")
    assert heart().directory == Path("runs/heart-plain-002")
    assert Path("runs/latest").resolve() == Path("runs/heart-plain-002").resolve()
    assert [row["run"] for row in list_runs()] == ["runs/heart-plain-001", "runs/heart-plain-002"]


def test_a_run_holds_what_it_says():
    found = heart(protection="encrypted")
    names = {path.name for path in found.directory.iterdir()}
    assert names >= {
        "plan.json", "job.json", "rounds.jsonl", "result.json", "model.safetensors", "report.html", "report.md",
    }  # fmt: skip
    assert "checkpoint.pt" not in names
    assert len(found.rounds) == 2 * 4
    assert {"round", "arm", "accuracy", "auc"} <= set(found.rounds[0])
    assert found.result["label"] == read_json(found.directory / "plan.json")["label"]


def test_an_existing_directory_needs_force_and_force_takes_only_runs(tmp_path):
    heart(out="here")
    with pytest.raises(AlreadyExists, match="found here"):
        heart(out="here")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(AlreadyExists, match="no run of ours"):
        heart(out="thesis", force=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    assert heart(out="here", force=True, seed=1).result["seed"] == 1


def failing(when):
    def data(source):
        rng = np.random.default_rng(source)
        return rng.normal(size=(40, 3)).astype("f4"), rng.integers(0, 2, 40)

    def train(module, rows, fit):
        if fit.round == when:
            raise RuntimeError("the disk is on fire")

    return fedcore.Task(
        "failing", data, lambda: torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy, train=train,
        sites={"a": 1, "b": 2, "c": 3},
    )  # fmt: skip


def test_a_failure_before_the_first_whole_round_leaves_nothing():
    with pytest.raises(TaskFailed, match="round 1"):
        fedcore.simulate(failing(1), rounds=2)
    assert not list(Path("runs").glob("failing-*"))


def test_a_forced_run_that_fails_gives_the_former_one_back():
    before = heart(out="here").result
    with pytest.raises(TaskFailed):
        fedcore.simulate(failing(1), rounds=2, out="here", force=True)
    assert fedcore.load("here").result == before
    assert [path.name for path in Path().iterdir() if "replaced" in path.name] == []


def test_a_failure_later_keeps_the_rounds_that_were_whole():
    with pytest.raises(TaskFailed, match="round 2"):
        fedcore.simulate(failing(2), rounds=3)
    (directory,) = Path("runs").glob("failing-*")
    assert (directory / "checkpoint.pt").is_file()


def interrupt_after(round_, arm="federated"):
    def stop(row):
        if (row["round"], row["arm"]) == (round_, arm):
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("protection", ["plain", "encrypted"])
@pytest.mark.parametrize(
    ("round_", "arm"), [(1, "centralised"), (2, "federated"), (3, "local_only")]
)
def test_an_interrupted_run_resumes_to_the_same_bits(protection, round_, arm):
    settings = {"rounds": 4, "protection": protection, "optimiser": "adam", "server": "fedadam"}
    whole = heart(**settings)
    with pytest.raises(KeyboardInterrupt):
        heart(**settings, on_round=interrupt_after(round_, arm), out="broken")
    found = api.resume("broken")
    assert found.result["model_sha256"] == whole.result["model_sha256"]
    for key in ("arms", "gap", "per_site", "clipped_fraction"):
        assert found.result[key] == whole.result[key], key
    measured = ("seconds", "peak", "bytes")
    rows = [
        [{k: v for k, v in row.items() if not k.startswith(measured)} for row in r.rounds]
        for r in (found, whole)
    ]
    assert rows[0] == rows[1]


def test_a_finished_run_is_not_resumed():
    with pytest.raises(BadInput, match="is finished"):
        api.resume(heart().directory)


def test_resume_notices_a_changed_task(tmp_path):
    text = """
import numpy as np, torch, fedcore
def data(s):
    r = np.random.default_rng(int(s)); return r.normal(size=(40, 3)).astype("f4"), r.integers(0, 2, 40)
def model():
    return torch.nn.Linear(3, 2)
task = fedcore.Task("mine", data, model, torch.nn.functional.cross_entropy, sites={"a": "1", "b": "2", "c": "3"})
"""
    Path("mine.py").write_text(text)
    with pytest.raises(KeyboardInterrupt):
        fedcore.simulate("mine.py", rounds=3, on_round=interrupt_after(2), out="run")
    import linecache

    Path("mine.py").write_text(text.replace("Linear(3, 2)", "Linear(3, 2, bias=True)"))
    linecache.clearcache()
    with pytest.raises(BadInput, match="the task has changed"):
        api.resume("run")


def test_reproduce_says_same_or_where_it_first_differs():
    found = heart(protection="encrypted")
    assert reproduce(found.directory).same
    rows = found.rounds
    rows[5]["auc"] += 1e-9
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomic(found.directory / "rounds.jsonl", text.encode())
    again = reproduce(found.directory)
    assert not again.same
    assert re.match(r"round 2, arm local_only: auc was", again.difference)


def test_reproduce_notices_another_model_hash_alone():
    found = heart()
    result = found.result | {"model_sha256": "0" * 64}
    (found.directory / "result.json").write_text(json.dumps(result))
    assert "final model differs" in reproduce(found.directory).difference


def test_a_run_made_in_memory_says_why_it_cannot_be_made_again():
    task = failing(9)
    found = fedcore.simulate(task, rounds=1)
    with pytest.raises(BadInput, match="made in memory"):
        reproduce(found.directory)
    assert reproduce(found.directory, task=task).same


def test_a_loaded_model_takes_raw_rows():
    import pandas as pd

    from fedcore.data import heart as module

    found = heart(rounds=5)
    frame = pd.read_csv(Path(module.__file__).with_name("heart.csv"))
    direct = found.predict(frame)
    loaded = fedcore.load(found.directory)
    np.testing.assert_array_equal(loaded.predict(frame), direct)
    assert direct.shape == (len(frame),) and ((direct > 0) & (direct < 1)).all()
    assert ((direct > 0.5) == (frame["num"] > 0)).mean() > 0.7
    subset = frame.drop(columns="num").iloc[:3]
    np.testing.assert_allclose(loaded.predict(subset), direct[:3], rtol=1e-6)


def test_a_model_of_a_task_in_memory_needs_the_task():
    task = failing(9)
    found = fedcore.simulate(task, rounds=1)
    with pytest.raises(BadInput, match="made in memory"):
        _ = fedcore.load(found.directory).model
    model = fedcore.load(found.directory, task=task).model
    assert isinstance(model, torch.nn.Linear) and not model.training


def test_print_is_plain_text_and_names_the_gap():
    text = str(heart())
    assert "\x1b" not in text and "points" in text and "reproduce" in text


def test_gap_reads_by_metric():
    gap = heart().gap["auc"]
    assert gap.mean == gap["mean"] == gap["total"]["mean"]
    assert set(gap.parts) == {"total", "federation", "quantisation", "protection", "local_only"}
    assert gap.low <= gap.high


def test_plot_is_a_figure():
    figure = heart().plot()
    assert len(figure.axes) >= 1


def test_compare_tables():
    found = fedcore.compare("heart", seeds=2, folds=2, rounds=2, protection="plain")
    table = found.table()
    assert len(table) == 2 * 2 * 4 and set(table["arm"]) >= {"centralised", "federated"}
    assert "tabular" in found.latex()
    assert len(found.rounds) == 2 * 2 * 4 * 2 and {"seed", "fold"} <= set(found.rounds[0])
    assert "Round by round" in found.report().read_text()
    assert found.report().is_file()
    gap = found.result["gap"]["total"]["auc"]
    assert gap["n"] == 4 and "Nadeau" in gap["method"]
    assert found.result["gap"]["protection"]["auc"]["mean"] == 0
    assert fedcore.load(found.directory).result == found.result
    assert reproduce(found.directory).same


def test_overlay_of_two_runs():
    from fedcore import report

    a, b = heart(), heart(seed=1)
    page = report.render([report.read(a.directory), report.read(b.directory)])
    assert "heart-plain-001" in page and "heart-plain-002" in page


@pytest.mark.parametrize("content", ["", "[]", "{broken"])
def test_a_broken_result_is_refused_by_name(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(BadInput, match=re.escape("result.json")):
        fedcore.load(tmp_path)
